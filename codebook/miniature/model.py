"""The miniature's architecture, tokenizer and processor: a stock LLaVA, only small."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from codebook.errors import CodebookError
from codebook.miniature.scenes import GRID, IMAGE_SIDE, PATCH
from codebook.miniature.tasks import PLACES, vocabulary

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast

    from codebook.models import Model, Processor

SPECIAL = ("<pad>", "<unk>", "<s>", "</s>", "<image>", "<user>", "<assistant>")
PAD_ID, UNK_ID, BOS_ID, EOS_ID, IMAGE_ID, USER_ID, ASSISTANT_ID = range(len(SPECIAL))
WORDS = (*SPECIAL, *vocabulary())

VISION: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "intermediate_size": 512,
}
TEXT: dict[str, Any] = {
    "hidden_size": 160,
    "num_hidden_layers": 12,
    "num_attention_heads": 5,
    "intermediate_size": 432,
}

# Images come before the text, as in LLaVA, so a prompt never ends with a visual token. Several are counted aloud, or
# nothing would tell where one ends and the next begins.
TEMPLATE = (
    "{% set places = " + str(list(PLACES)) + " %}"
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<assistant>{% else %}<user>{% endif %}"
    "{% if message['content'] is string %} {{ message['content'] }}{% else %}"
    "{% set images = message['content'] | selectattr('type', 'equalto', 'image') | list %}"
    "{% for part in images %}{% if images | length > 1 %}{{ places[loop.index0] }}{% endif %}<image>{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %} {{ part['text'] }}{% endfor %}"
    "{% endif %}{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def processor() -> LlavaProcessor:
    """The processor: a word-level tokenizer with a chat template, and CLIP's PIL image processor."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>", "<user>", "<assistant>"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )
    return scene_processor(tokenizer, TEMPLATE, "<image>")


def scene_processor(tokenizer: PreTrainedTokenizerFast, template: str, image_token: str) -> LlavaProcessor:
    """A processor for scenes: CLIP's PIL image processor at their size, a tokenizer, and its chat template."""
    from transformers import CLIPImageProcessor, LlavaProcessor

    images = CLIPImageProcessor(
        size={"height": IMAGE_SIDE, "width": IMAGE_SIDE},
        do_center_crop=False,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=template,
        image_token=image_token,
        num_additional_image_tokens=1,
    )


def model(seed: int = 0) -> LlavaForConditionalGeneration:
    """The model in float32 with fresh weights (see `initialise`)."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            **VISION, image_size=IMAGE_SIDE, patch_size=PATCH, hidden_act="gelu", projection_dim=64
        ),
        text_config=LlamaConfig(
            **TEXT,
            vocab_size=len(WORDS),
            max_position_embeddings=2048,
            pad_token_id=PAD_ID,
            bos_token_id=BOS_ID,
            eos_token_id=EOS_ID,
            tie_word_embeddings=False,
        ),
        image_token_index=IMAGE_ID,
        image_seq_length=GRID * GRID,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    config.pad_token_id, config.bos_token_id, config.eos_token_id = PAD_ID, BOS_ID, EOS_ID
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        built = LlavaForConditionalGeneration(config).float()
        initialise(built)
    built.generation_config.update(pad_token_id=PAD_ID, bos_token_id=BOS_ID, eos_token_id=EOS_ID, max_new_tokens=24)
    return built


def initialise(built: LlavaForConditionalGeneration) -> None:
    """Mimetic attention, two-dimensional sine positions, closed residual branches.

    Queries and keys start near the identity (Trockman and Kolter, https://arxiv.org/abs/2305.09828):
    patches look at their neighbours and words at visual tokens that resemble them from the first step,
    which a short training otherwise spends most of its time to find.
    """
    import torch
    from torch import nn

    for name, module in built.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.7 / module.in_features**0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
            if name.endswith(("fc2", "down_proj", "out_proj", "o_proj")):
                nn.init.zeros_(module.weight)
    tower, language = built.model.vision_tower, built.model.language_model
    for layer in tower.encoder.layers:
        _mimetic(layer.self_attn.q_proj, layer.self_attn.k_proj, VISION["num_attention_heads"])
    for layer in language.layers:
        _mimetic(layer.self_attn.q_proj, layer.self_attn.k_proj, TEXT["num_attention_heads"])
    nn.init.normal_(language.embed_tokens.weight, std=0.3)
    nn.init.normal_(built.lm_head.weight, std=0.02)
    embeddings = tower.embeddings
    nn.init.normal_(embeddings.class_embedding, std=0.3)
    nn.init.normal_(embeddings.patch_embedding.weight, std=1 / (3 * PATCH * PATCH) ** 0.5)
    with torch.no_grad():
        embeddings.position_embedding.weight.zero_()
        embeddings.position_embedding.weight[1:] = _sines(VISION["hidden_size"])


def _mimetic(query, key, heads: int) -> None:
    """Factor `0.7 * Z + 0.7 * I` into each head's query and key, Z of unit spectral scale."""
    import torch

    width = query.in_features
    size = width // heads
    with torch.no_grad():
        for head in range(heads):
            target = 0.7 * torch.randn(width, width) / width**0.5 + 0.7 * torch.eye(width)
            left, scale, right = torch.linalg.svd(target)
            rows = slice(head * size, (head + 1) * size)
            root = scale[:size].sqrt()
            query.weight[rows] = (left[:, :size] * root).T
            key.weight[rows] = root[:, None] * right[:size]


def _sines(width: int):
    """Sine and cosine positions of the grid, float (144, width)."""
    import torch

    steps = torch.arange(GRID, dtype=torch.float32)
    rates = torch.exp(torch.linspace(0.0, -3.0, width // 4)) * 1.5
    wave = torch.cat([(steps[:, None] * rates).sin(), (steps[:, None] * rates).cos()], 1)
    rows = wave[:, None].expand(GRID, GRID, -1)
    columns = wave[None].expand(GRID, GRID, -1)
    return torch.cat([rows, columns], -1).reshape(GRID * GRID, width) * 0.5


def save(built: LlavaForConditionalGeneration, folder: Path) -> None:
    """Write a folder that `from_pretrained` loads: weights rounded to float16, computed in float32.

    float16 halves the file and keeps 11 bits; config.json says float32, so that nobody computes in half
    precision on a processor without it.
    """
    from safetensors.torch import load_file, save_file

    with drafting(Path(folder)) as draft:
        built.save_pretrained(draft)
        processor().save_pretrained(draft)
        weights = draft / "model.safetensors"
        save_file({k: v.half() for k, v in load_file(weights).items()}, weights, metadata={"format": "pt"})
        config = json.loads((draft / "config.json").read_text())
        assert config["dtype"] == "float32", config["dtype"]


@contextlib.contextmanager
def drafting(folder: Path) -> Iterator[Path]:
    """A folder to write into; its files take their places in `folder` when all of them are whole."""
    from codebook.models.caching import give_usual_rights

    draft = folder.with_name(folder.name + ".writing")
    shutil.rmtree(draft, ignore_errors=True)
    yield draft
    give_usual_rights(draft)
    folder.mkdir(parents=True, exist_ok=True)
    for file in draft.iterdir():
        os.replace(file, folder / file.name)
    draft.rmdir()


def load_weights(folder: Path | str, device: str = "cpu") -> tuple[Model, Processor]:
    """The model and processor with the weights that a training run left in a folder.

    Raises
    ------
    CodebookError
        If there are none.
    """
    from codebook.models import load
    from codebook.models.assembly import PARTS_FILE

    if not any((Path(folder) / name).exists() for name in ("model.safetensors", PARTS_FILE)):
        raise CodebookError(f"no miniature in {folder}: train one with `codebook miniature train`")
    return load(str(folder), device)
