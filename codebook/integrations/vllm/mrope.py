"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL in vLLM, pruned: visual tokens keep their positions (`positions=keep`).

vLLM lets a model number the tokens of a prompt twice: when all it knows of the images is their sizes, and again, chunk
by chunk, when embeddings come, with which the rows and columns of the tokens that stayed travel. The second time is
meant for pruned videos (EVS), so that has to look switched on; its own functions are wrong for images.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.exceptions import VLLMValidationError
from vllm.model_executor.models.interfaces import SupportsMultiModalPruning
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.model_executor.models.qwen2_vl import (
    Qwen2VLDummyInputsBuilder,
    Qwen2VLForConditionalGeneration,
    Qwen2VLMultiModalProcessor,
    Qwen2VLProcessingInfo,
)
from vllm.model_executor.models.qwen3_vl import (
    Qwen3VLDummyInputsBuilder,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMultiModalProcessor,
    Qwen3VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.platforms import current_platform

from codebook.errors import CodebookError
from codebook.integrations.vllm.positions import Placed, place, prompt_positions, with_places, without_places
from codebook.integrations.vllm.pruned import Data, PruningModel, PruningProcessor
from codebook.integrations.vllm.settings import VllmSettings, surviving
from codebook.models.layout import Layout

ALMOST_NONE = 1e-300
"""Share of a video that EVS is to drop: more than nothing, so that it is on, and too little to drop a token."""
ROTATIONS = 4
"""Positions that vLLM has rotations for, as multiples of the model's longest prompt; beyond them an engine dies."""
ELONGATION = 400
"""Most times that an image may be longer than wide: Qwen's image processors refuse 200, before they round."""


def qwen_layouts(config: Any, data: Data) -> list[Layout]:
    merge = config.vision_config.spatial_merge_size
    sizes = torch.as_tensor(data["image_grid_thw"]).tolist()
    return [Layout.stacked(1, rows // merge, cols // merge, "view") for _, rows, cols in sizes]


def qwen_pixels(config: Any, data: Data) -> list[Tensor]:
    patches = torch.as_tensor(data["image_grid_thw"]).prod(1).tolist()
    return list(data["pixel_values"].split(patches))


def check(config: Any) -> None:
    """Raise a CodebookError where vLLM would not ask for the positions of pruned images, or not in time."""
    wrong = "vLLM would give the tokens of pruned Qwen images wrong positions"
    if current_platform.is_cpu():
        raise CodebookError(f"{wrong} on a CPU: use a GPU, or a model of the LLaVA or InternVL families")
    if config.parallel_config.pipeline_parallel_size > 1:
        raise CodebookError(f"{wrong} under pipeline parallelism: use --tensor-parallel-size instead")
    if config.speculative_config is not None:
        raise CodebookError(f"{wrong} under speculative decoding: leave --speculative-config out")
    if config.model_config.enable_prompt_embeds:
        raise CodebookError(f"{wrong} beside embedded prompts: leave --enable-prompt-embeds out")
    if config.model_config.get_multimodal_config().video_pruning_rate is not None:
        raise CodebookError("Qwen with pruned images takes no videos: leave --video-pruning-rate out")


class PruningInfo:
    """What stays to be known of the inputs when only images are taken; stands before vLLM's own in the bases."""

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        # Without video among them at all, vLLM's class of Qwen3-VL does not load.
        return {"image": None, "video": 0}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        info: Any = self
        config = info.get_hf_config()
        width, height = info.get_image_size_with_most_features()
        patch = config.vision_config.patch_size
        [layout] = qwen_layouts(config, {"image_grid_thw": [[1, height // patch, width // patch]]})
        return {"image": VllmSettings.read(config).kept(layout)}


class PruningQwenProcessor(PruningProcessor):
    """Refuses prompts of which positions would not be known."""

    layouts = staticmethod(qwen_layouts)

    def get_dummy_inputs(self, *args: Any, **options: Any) -> Any:
        inputs = super().get_dummy_inputs(*args, **options)  # type: ignore[misc]
        inputs.prompt = [*inputs.prompt, 0]  # vLLM's own may end with an image
        return inputs

    def apply(self, *args: Any, **options: Any) -> Any:
        out = super().apply(*args, **options)  # type: ignore[misc]
        info: Any = self.info  # type: ignore[attr-defined]
        ids, images = out["prompt_token_ids"], out["mm_placeholders"].get("image", ())
        if ids.count(self.config.image_token_id) > sum(image.length for image in images):
            raise VLLMValidationError("the prompt has more image tokens than images: take them out of its text")
        if any(image.offset + image.length == len(ids) for image in images):
            raise VLLMValidationError("the prompt ends with an image: put text after it")
        # Text goes on behind an image's longer side, so a prompt's positions may run ahead of its length.
        reach = info.ctx.model_config.max_model_len + sum(self._longest_side(image.length) for image in images)
        if reach > ROTATIONS * self.config.get_text_config().max_position_embeddings:
            raise VLLMValidationError("the prompt's images may reach further than the model: show fewer of them")
        return out

    def _longest_side(self, kept: int) -> float:
        """The most rows or columns of an image of which so many tokens stay; sizes are not in what is cached of it."""
        keep = self.settings.stage.keep
        info: Any = self.info  # type: ignore[attr-defined]
        whole = (kept + 1) / keep if isinstance(keep, float) else info.get_max_image_tokens()
        return min(whole, math.sqrt(ELONGATION * whole))


class PruningQwen(PruningModel):
    """The positions of what stays."""

    layouts, pixels = staticmethod(qwen_layouts), staticmethod(qwen_pixels)
    supports_tower_connector_lora = False  # vLLM would take the number of tokens that stay for the tower's

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        check(vllm_config)
        vllm_config.model_config.get_multimodal_config().video_pruning_rate = ALMOST_NONE
        super().__init__(vllm_config=vllm_config, prefix=prefix)

    def embed_multimodal(self, **data: Any) -> list[Tensor]:
        """For each image (kept, d + CHANNELS): the embeddings that stay, in raster order, and their places.

        Those of Qwen3-VL hold, behind the features, what is added to the first decoder layers.
        """
        own: Any = self
        if "pixel_values" not in data:
            return []
        whole = own._process_image_input(own._parse_and_validate_image_input(**data))
        features = [image[:, : own.config.get_text_config().hidden_size] for image in whole]
        indices, layouts = self.kept(features, own.config, data), qwen_layouts(own.config, data)
        return [
            with_places(surviving(image, index), index, layout.grids[0].cols)
            for image, index, layout in zip(whole, indices, layouts, strict=True)
        ]

    def get_mrope_input_positions(self, input_tokens: Sequence[int], mm_features: Sequence[Any]) -> tuple[Tensor, int]:
        config = self.config  # type: ignore[attr-defined]
        images = []
        for feature in mm_features:
            [layout] = qwen_layouts(config, {"image_grid_thw": feature.data["image_grid_thw"].data[None]})
            [grid], where = layout.grids, feature.mm_position
            images.append(Placed(where.offset, where.length, grid.rows, grid.cols))
        return prompt_positions(len(input_tokens), images)

    def recompute_mrope_positions(
        self,
        input_ids: Sequence[int] | Tensor,
        multimodal_embeddings: Sequence[Tensor],
        mrope_positions: Tensor,
        num_computed_tokens: int,
    ) -> tuple[list[Tensor], Tensor, int]:
        embeddings = []
        if multimodal_embeddings:
            parts = [without_places(own) for own in multimodal_embeddings]
            embeddings = [own for own, _ in parts]
            places = torch.cat([own for _, own in parts], dim=1).to(mrope_positions.device)
            token = self.config.image_token_id  # type: ignore[attr-defined]
            mrope_positions = place(mrope_positions, input_ids, token, num_computed_tokens, places)
        ahead = int(mrope_positions[0, -1]) + 1 - mrope_positions.shape[1]  # a prompt ends with text
        return embeddings, mrope_positions, ahead


class PrunedQwen2VLInfo(PruningInfo, Qwen2VLProcessingInfo):
    pass


class PrunedQwen2VLProcessor(PruningQwenProcessor, Qwen2VLMultiModalProcessor):
    pass


@MULTIMODAL_REGISTRY.register_processor(
    PrunedQwen2VLProcessor, info=PrunedQwen2VLInfo, dummy_inputs=Qwen2VLDummyInputsBuilder
)
class CodebookQwen2VLForConditionalGeneration(PruningQwen, Qwen2VLForConditionalGeneration, SupportsMultiModalPruning):
    pass


class PrunedQwen25VLInfo(PruningInfo, Qwen2_5_VLProcessingInfo):
    pass


class PrunedQwen25VLProcessor(PruningQwenProcessor, Qwen2_5_VLMultiModalProcessor):
    pass


@MULTIMODAL_REGISTRY.register_processor(
    PrunedQwen25VLProcessor, info=PrunedQwen25VLInfo, dummy_inputs=Qwen2_5_VLDummyInputsBuilder
)
class CodebookQwen2_5_VLForConditionalGeneration(PruningQwen, Qwen2_5_VLForConditionalGeneration):
    pass


class PrunedQwen3VLInfo(PruningInfo, Qwen3VLProcessingInfo):
    pass


class PrunedQwen3VLProcessor(PruningQwenProcessor, Qwen3VLMultiModalProcessor):
    pass


@MULTIMODAL_REGISTRY.register_processor(
    PrunedQwen3VLProcessor, info=PrunedQwen3VLInfo, dummy_inputs=Qwen3VLDummyInputsBuilder
)
class CodebookQwen3VLForConditionalGeneration(PruningQwen, Qwen3VLForConditionalGeneration):
    pass
