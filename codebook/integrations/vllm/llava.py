"""LLaVA-1.5 and LLaVA-NeXT in vLLM, pruned: rotary positions count what is in the prompt (`positions=compact`)."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import (
    get_anyres_image_grid_shape,
    image_size_to_num_patches,
    unpad_image,
)
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.model_executor.models.llava_next import (
    LlavaNextForConditionalGeneration,
    LlavaNextMultiModalProcessor,
    LlavaNextProcessingInfo,
)
from vllm.model_executor.models.utils import WeightsMapper
from vllm.multimodal import MULTIMODAL_REGISTRY

from codebook.integrations.vllm.pruned import Data, PruningModel, PruningProcessor
from codebook.models.layout import Grid, Layout

TOWER_NAMES = WeightsMapper(
    orig_to_new_regex={re.compile(r"^(model\.)?vision_tower\.(?!vision_model\.)"): "vision_tower.vision_model."}
)
"""Names of a CLIP or SigLIP tower's weights as vLLM has them; transformers 5 saves them without `vision_model`."""


def side(config: Any) -> int:
    """Patches across one view of an image."""
    return config.vision_config.image_size // config.vision_config.patch_size


def llava_layouts(config: Any, data: Data) -> list[Layout]:
    return [Layout.stacked(1, side(config), side(config), "view")] * len(data["pixel_values"])


def llava_pixels(config: Any, data: Data) -> list[Tensor]:
    return list(data["pixel_values"])


def anyres_grid(config: Any, size: list[int]) -> tuple[int, int]:
    """Rows and columns of the crops of an image of this height and width, joined and without their padding."""
    crops = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, config.vision_config.image_size)
    down, across = (count * side(config) for count in crops)
    rows, cols = unpad_image(torch.empty(1, down, across, device="meta"), size).shape[1:]
    return rows, cols


def anyres_layout(config: Any, rows: int, cols: int) -> Layout:
    """The whole view, then rows of the crops' grid, each of which ends with a newline."""
    own = side(config)
    grids = Grid(0, own, own), Grid(own * own, rows, cols, "crop", cols + 1)
    return Layout(own * own + rows * (cols + 1), grids)


def next_layouts(config: Any, data: Data) -> list[Layout]:
    return [anyres_layout(config, *anyres_grid(config, size)) for size in torch.as_tensor(data["image_sizes"]).tolist()]


def anyres_pixels(config: Any, data: Data) -> list[Tensor]:
    """The pixels of each image, without the crops that pad it to the number that another one has."""
    sizes, points = torch.as_tensor(data["image_sizes"]).tolist(), config.image_grid_pinpoints
    crops = [image_size_to_num_patches(size, points, config.vision_config.image_size) for size in sizes]
    return [own[:count] for own, count in zip(data["pixel_values"], crops, strict=True)]


class PrunedLlavaProcessor(PruningProcessor, LlavaMultiModalProcessor):
    layouts = staticmethod(llava_layouts)


@MULTIMODAL_REGISTRY.register_processor(
    PrunedLlavaProcessor, info=LlavaProcessingInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class CodebookLlavaForConditionalGeneration(PruningModel, LlavaForConditionalGeneration):
    layouts, pixels = staticmethod(llava_layouts), staticmethod(llava_pixels)
    hf_to_vllm_mapper = LlavaForConditionalGeneration.hf_to_vllm_mapper | TOWER_NAMES
    supports_tower_connector_lora = False  # vLLM would take the number of tokens that stay for the tower's


class PrunedLlavaNextProcessor(PruningProcessor, LlavaNextMultiModalProcessor):
    layouts = staticmethod(next_layouts)


@MULTIMODAL_REGISTRY.register_processor(
    PrunedLlavaNextProcessor, info=LlavaNextProcessingInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class CodebookLlavaNextForConditionalGeneration(PruningModel, LlavaNextForConditionalGeneration):
    layouts, pixels = staticmethod(next_layouts), staticmethod(anyres_pixels)
    hf_to_vllm_mapper = LlavaNextForConditionalGeneration.hf_to_vllm_mapper | TOWER_NAMES
    supports_tower_connector_lora = False
