"""`eyes`: the miniature's vision tower before a real, pretrained language model; architecture, processor and parts.

A stock `LlavaForConditionalGeneration`: the tower, a projector of two layers, and SmolLM2-135M-Instruct with a
low-rank update (LoRA, https://arxiv.org/abs/2106.09685) on every matrix of its layers. What was trained is small and
ships with the package; `assemble` puts it onto the language model. See `docs/miniature.md`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from codebook.miniature.model import VISION, drafting, scene_processor
from codebook.miniature.scenes import GRID, IMAGE_SIDE, PATCH
from codebook.miniature.tasks import PLACES
from codebook.models.assembly import PARTS_FILE, PROJECTOR, TOWER, merged
from codebook.models.smollm2 import (
    BEGIN_ID,
    END_ID,
    GGUF_SHA256,
    IMAGE_TOKEN,
    IMAGE_TOKEN_ID,
    INNER,
    LLM_WIDTH,
    SHARED_HEADS,
    TEXT_CONFIG,
    language_tokenizer,
    language_weights,
)

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    from codebook.models.gguf import Gguf

RANK = 16
"""Rank of the low-rank updates."""

SHAPES_OF = {
    "q_proj": (LLM_WIDTH, LLM_WIDTH),
    "k_proj": (SHARED_HEADS * 64, LLM_WIDTH),
    "v_proj": (SHARED_HEADS * 64, LLM_WIDTH),
    "o_proj": (LLM_WIDTH, LLM_WIDTH),
    "gate_proj": (INNER, LLM_WIDTH),
    "up_proj": (INNER, LLM_WIDTH),
    "down_proj": (LLM_WIDTH, INNER),
}
"""Rows and columns of each matrix of a layer."""

ONE_IMAGE, MANY_IMAGES = "The image shows:", "Image {}:"
EYES_TEMPLATE = (
    "{% set places = " + str(list(PLACES)) + " %}"
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ ' ' }}{% endif %}"
    "{% if message['content'] is string %}"
    "{% if message['role'] != 'assistant' %}{{ '\\nQuestion: ' }}{% endif %}{{ message['content'] }}"
    "{% else %}{% set images = message['content'] | selectattr('type', 'equalto', 'image') | list %}"
    "{% for part in images %}"
    "{% if images | length == 1 %}The image shows:{% else %}{% if not loop.first %}{{ ' ' }}{% endif %}"
    "Image {{ places[loop.index0] }}:{% endif %}" + IMAGE_TOKEN + "{% endfor %}"
    "{% if message['role'] != 'assistant' %}{{ '\\nQuestion: ' }}{% endif %}"
    "{{ message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join(' ') }}"
    "{% endif %}{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ '\\nAnswer:' }}{% endif %}"
    "{% endfor %}"
)
"""The chat template. A question ends with what its answer follows, so `add_generation_prompt` has nothing to add."""


def asked(question: str) -> str:
    """A question as the template puts it behind the images."""
    return f"\nQuestion: {question}\nAnswer:"


def eyes_processor(file: Gguf) -> LlavaProcessor:
    """The processor: SmolLM2's tokenizer, a chat template, and the miniature's image processor."""
    return scene_processor(language_tokenizer(file), EYES_TEMPLATE, IMAGE_TOKEN)


def eyes_model(file: Gguf) -> LlavaForConditionalGeneration:
    """The model in float32: the language model as it is in the file, and tower and projector untrained."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision: dict[str, Any] = {**VISION, "image_size": IMAGE_SIDE, "patch_size": PATCH}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision, hidden_act="gelu", projection_dim=64),
        text_config=LlamaConfig(**TEXT_CONFIG),
        image_token_index=IMAGE_TOKEN_ID,
        image_seq_length=GRID * GRID,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    config.pad_token_id, config.bos_token_id, config.eos_token_id = END_ID, BEGIN_ID, END_ID
    built = LlavaForConditionalGeneration(config).float()
    weights = {name: torch.from_numpy(array.copy()) for name, array in language_weights(file).items()}
    built.model.language_model.load_state_dict(weights, strict=True)
    built.tie_weights()
    built.generation_config.update(pad_token_id=END_ID, bos_token_id=BEGIN_ID, eos_token_id=END_ID, max_new_tokens=32)
    return built


def apply_parts(built: LlavaForConditionalGeneration, file: Gguf, parts: dict[str, Tensor]) -> None:
    """Give a model of `eyes_model` what was trained, as `load` does."""
    places = {"language_model.model.": built.model.language_model}
    places |= {name: getattr(built.model, name[:-1]) for name in (TOWER, PROJECTOR)}
    whole = merged(file, parts)
    for beginning, module in places.items():
        own = {name.removeprefix(beginning): part for name, part in whole.items() if name.startswith(beginning)}
        module.load_state_dict(own, strict=True)


def write_weights(built: LlavaForConditionalGeneration, file: Gguf, parts: dict[str, Tensor], folder: Path) -> None:
    """Write a folder that `load` puts together: what was trained, in half precision, and all small files."""
    from safetensors.torch import save_file

    with drafting(folder) as draft:
        eyes_processor(file).save_pretrained(draft)
        (draft / "tokenizer.json").unlink()  # of the language model, and large
        built.config.dtype = "float32"
        built.config.architectures = [type(built).__name__]
        built.config.save_pretrained(draft)
        built.generation_config.save_pretrained(draft)
        halves = {name: part.detach().half().cpu().contiguous() for name, part in parts.items()}
        save_file(halves, draft / PARTS_FILE, metadata={"format": "pt", "language_model": GGUF_SHA256})
