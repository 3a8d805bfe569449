"""LLaVA-OneVision and InternVL in vLLM, pruned: each crop keeps its share; positions as in LLaVA."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models.interns1 import (
    InternS1DummyInputsBuilder,
    InternS1ForConditionalGeneration,
    InternS1MultiModalProcessor,
    InternS1ProcessingInfo,
)
from vllm.model_executor.models.llava_onevision import (
    LlavaOnevisionDummyInputsBuilder,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionMultiModalProcessor,
    LlavaOnevisionProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from codebook.integrations.vllm.llava import TOWER_NAMES, anyres_grid, anyres_layout, anyres_pixels, side
from codebook.integrations.vllm.pruned import Data, PruningModel, PruningProcessor
from codebook.models.layout import Layout, crops_and_view

MOST_CROPS = 9
"""Crops whose grid OneVision takes as it is, or nearly; a larger one is shrunk to as many tokens (`anyres_max_9`)."""


def onevision_layouts(config: Any, data: Data) -> list[Layout]:
    found = []
    for size in torch.as_tensor(data["image_sizes"]).tolist():
        rows, cols = anyres_grid(config, size)
        ratio = math.sqrt(rows * cols / (MOST_CROPS * side(config) ** 2))
        if ratio > 1.1:
            rows, cols = int(rows // ratio), int(cols // ratio)
        found.append(anyres_layout(config, rows, cols))
    return found


def internvl_layouts(config: Any, data: Data) -> list[Layout]:
    rows, cols = (
        int(size // patch * config.downsample_ratio)
        for size, patch in zip(config.vision_config.image_size, config.vision_config.patch_size, strict=True)
    )
    return [crops_and_view(count, (rows, cols)) for count in torch.as_tensor(data["image_num_patches"]).tolist()]


def internvl_pixels(config: Any, data: Data) -> list[Tensor]:
    return list(data["pixel_values"].split(torch.as_tensor(data["image_num_patches"]).tolist()))


class ImagesOnly:
    """What vLLM knows of a model before it runs, where videos are refused: they would not be pruned."""

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None}


class PrunedOnevisionInfo(ImagesOnly, LlavaOnevisionProcessingInfo):
    pass


class PrunedOnevisionProcessor(PruningProcessor, LlavaOnevisionMultiModalProcessor):
    layouts = staticmethod(onevision_layouts)


@MULTIMODAL_REGISTRY.register_processor(
    PrunedOnevisionProcessor, info=PrunedOnevisionInfo, dummy_inputs=LlavaOnevisionDummyInputsBuilder
)
class CodebookLlavaOnevisionForConditionalGeneration(PruningModel, LlavaOnevisionForConditionalGeneration):
    layouts, pixels = staticmethod(onevision_layouts), staticmethod(anyres_pixels)
    hf_to_vllm_mapper = LlavaOnevisionForConditionalGeneration.hf_to_vllm_mapper | TOWER_NAMES
    supports_tower_connector_lora = False


class PrunedInternVLInfo(ImagesOnly, InternS1ProcessingInfo):
    pass


class PrunedInternVLProcessor(PruningProcessor, InternS1MultiModalProcessor):
    layouts = staticmethod(internvl_layouts)


@MULTIMODAL_REGISTRY.register_processor(
    PrunedInternVLProcessor, info=PrunedInternVLInfo, dummy_inputs=InternS1DummyInputsBuilder
)
class CodebookInternVLForConditionalGeneration(PruningModel, InternS1ForConditionalGeneration):
    layouts, pixels = staticmethod(internvl_layouts), staticmethod(internvl_pixels)
    supports_tower_connector_lora = False
