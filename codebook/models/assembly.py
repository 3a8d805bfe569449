"""Models of which only what was trained ships: put together with their language model, and kept in the cache.

Such a folder holds `parts.safetensors` in the place of weights and tokenizer: a vision tower, a projector, and low-rank
updates (LoRA, https://arxiv.org/abs/2106.09685) of SmolLM2's matrices. What is put together is a folder like any other.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from codebook.errors import CodebookError, remedy_for
from codebook.models.caching import cache_folder, give_usual_rights
from codebook.models.gguf import Gguf, read_gguf
from codebook.models.smollm2 import (
    GGUF_SHA256,
    LAYERS,
    MATRICES,
    language_file,
    language_tokenizer,
    language_weights,
    sha256_of,
)

PARTS_FILE = "parts.safetensors"
"""Name of the file of parts."""

LARGEST_PARTS = 2**26
"""Most bytes of one."""

TOWER, PROJECTOR, LORA = "vision_tower.", "multi_modal_projector.", "lora."
"""Beginnings of the parts' names; a low-rank factor is `lora.q_proj.a` or `.b`, all layers in one tensor."""

HASHES = "assembled.json"
"""Name of the file with the hashes of the others, by which damage is seen."""

ASSEMBLY_VERSION = 1
"""Version of what is put together: another one is put together anew."""


def assembled(folder: Path) -> Path:
    """The folder of the whole model: the given one, or if that holds parts, one in the cache, made where it is missing.

    Raises
    ------
    CodebookError
        If the parts are damaged or another language model's, that cannot be fetched, or the cache cannot be written.
    """
    if not (folder / PARTS_FILE).is_file():
        return folder
    try:
        shipped = {file.name: file for file in sorted(folder.iterdir()) if file.is_file()}
        if (size := shipped[PARTS_FILE].stat().st_size) > LARGEST_PARTS:
            raise CodebookError(
                f"{shipped[PARTS_FILE]} has {size:,} bytes, more than the {LARGEST_PARTS:,} that are read"
            )
        digest = hashlib.sha256(f"{ASSEMBLY_VERSION} {GGUF_SHA256}".encode())
        for name, file in shipped.items():
            digest.update(f"{name} {sha256_of(file)}".encode())
        whole = cache_folder() / f"{folder.name}-{digest.hexdigest()[:16]}"
        if not _intact(whole):
            _assemble(shipped, whole)
    except OSError as error:
        raise CodebookError(
            f"cannot put {folder} together: {error.strerror}: {error.filename}; {remedy_for(error)}, as XDG_CACHE_HOME"
        ) from None
    return whole


def merged(file: Gguf, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the whole model in float32, by the names of `LlavaForConditionalGeneration`'s checkpoints.

    Raises
    ------
    CodebookError
        If parts are missing or of other shapes.
    """
    parts = {name: part.float() for name, part in parts.items()}
    whole = {f"language_model.model.{k}": torch.from_numpy(v.copy()) for k, v in language_weights(file).items()}
    whole |= {name: part for name, part in parts.items() if name.startswith((TOWER, PROJECTOR))}
    try:
        for name, (place, _) in MATRICES.items():
            update = parts[f"{LORA}{name}.b"] @ parts[f"{LORA}{name}.a"]
            for i in range(LAYERS):
                whole[f"language_model.model.layers.{i}.{place}.{name}.weight"] += update[i]
    except (KeyError, IndexError, RuntimeError) as error:
        raise CodebookError(f"the parts do not fit SmolLM2 ({str(error)[:80]}): fetch them again") from None
    return whole


def read_parts(file: Path) -> dict[str, Tensor]:
    """The parts in a file.

    Raises
    ------
    CodebookError
        If it is damaged, or says that it belongs to another language model.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as held:
            theirs = (held.metadata() or {}).get("language_model")
            parts = {name: held.get_tensor(name) for name in held.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CodebookError(f"{file} is damaged ({str(error)[:80]}): fetch it again") from None
    if theirs != GGUF_SHA256:
        raise CodebookError(f"the parts in {file} belong to another language model: use this version's own")
    return parts


def _intact(whole: Path) -> bool:
    """Whether a folder in the cache is all there, byte by byte."""
    try:
        hashes = json.loads((whole / HASHES).read_text())
        return all(sha256_of(whole / name) == value for name, value in hashes.items())
    except (OSError, ValueError, AttributeError, TypeError):
        return False


def _assemble(shipped: dict[str, Path], whole: Path) -> None:
    """Make a folder in the cache; it appears there whole or not at all."""
    from safetensors.torch import save_file

    file = read_gguf(language_file())
    weights = merged(file, read_parts(shipped[PARTS_FILE]))
    whole.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{whole.name}-", dir=whole.parent) as place:
        draft = Path(place) / "draft"
        draft.mkdir()
        for name, source in shipped.items():
            if name != PARTS_FILE:
                shutil.copyfile(source, draft / name)
        # As in the miniature: float16 halves the file, and config.json says that it is computed in float32.
        halves = {name: weight.half().contiguous() for name, weight in weights.items()}
        save_file(halves, draft / "model.safetensors", metadata={"format": "pt"})
        language_tokenizer(file).backend_tokenizer.save(str(draft / "tokenizer.json"))
        hashes = {made.name: sha256_of(made) for made in sorted(draft.iterdir())}
        (draft / HASHES).write_text(json.dumps(hashes, indent=1) + "\n")
        give_usual_rights(draft)
        if whole.exists() and not _intact(whole):
            whole.rename(Path(place) / "damaged")
        try:
            draft.rename(whole)
        except OSError:
            if not _intact(whole):  # else another process was faster
                raise
