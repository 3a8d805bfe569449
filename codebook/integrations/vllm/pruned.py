"""What every pruned class adds to vLLM's own: fewer placeholders in the prompt, and fewer embeddings for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_world_size, get_tp_group
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.processing import PromptReplacement, PromptUpdate, PromptUpdateDetails

from codebook.errors import CodebookError
from codebook.integrations.vllm.checkpoint import Watched
from codebook.integrations.vllm.settings import VllmSettings, surviving
from codebook.models.layout import Layout
from codebook.models.registry import family_of_config
from codebook.pruning.ownership import codebooks_of

Data = Mapping[str, Any]
"""What vLLM's processor made of several images: tensors by the names of the model's arguments."""


class PruningProcessor:
    """A vLLM processor that leaves room in the prompt for the tokens that stay; stands before vLLM's in the bases.

    Attributes
    ----------
    layouts
        Function of the model's config and `Data`: how the tokens of each image are laid out, unpruned.
    """

    layouts: Callable[[Any, Data], list[Layout]]

    def __init__(self, info: Any, dummy_inputs: Any) -> None:
        super().__init__(info, dummy_inputs)  # type: ignore[call-arg]
        self.config = info.get_hf_config()
        self.settings = VllmSettings.read(self.config)
        family_of_config(self.config)
        if info.ctx.model_config.get_multimodal_config().enable_mm_embeds:
            raise CodebookError("pruning needs images, not their embeddings: leave --enable-mm-embeds out")

    def _get_mm_hashes(self, inputs: Any) -> dict[str, list[str]]:
        """Name every image together with what is kept of it: engines that keep other tokens may share a store.

        Ids that clients give to images are within vLLM's own hashes.
        """
        hashes = super()._get_mm_hashes(inputs)  # type: ignore[misc]
        return {kind: [f"{own}-{self.settings.digest}" for own in some] for kind, some in hashes.items()}

    def _get_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any) -> list[PromptUpdate]:
        updates = super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)  # type: ignore[misc]
        shown = mm_items.get_all_counts().get("image", 0)  # none, if all are in the processor's cache
        data = out_mm_kwargs.get_data() if shown else {}
        self._check_shape(data.get("pixel_values", ()))
        layouts = type(self).layouts(self.config, data) if shown else []
        return [self._shortened(update, layouts) for update in updates]

    def _check_shape(self, pixels: Tensor | Sequence[Tensor]) -> None:
        """Refuse pixels that the tower does not take: in the model they would end the engine, for all requests."""
        wanted = tower_shape(self.config.vision_config)
        for own in [pixels] if isinstance(pixels, Tensor) else pixels:
            if (given := list(own.shape[-len(wanted) :])) != wanted:
                raise VLLMValidationError(
                    f"mm_processor_kwargs make an image pixels of shape {given}, and the model takes {wanted}: leave "
                    "out what changes its size or its patches",
                    parameter="mm_processor_kwargs",
                )

    def _shortened(self, update: PromptUpdate, layouts: Sequence[Layout]) -> PromptUpdate:
        if update.modality != "image":
            return update
        assert isinstance(update, PromptReplacement)
        return replace(update, replacement=partial(self._content, update.replacement, layouts))

    def _content(self, whole: Any, layouts: Sequence[Layout], number: int) -> PromptUpdateDetails:
        """What stands in the prompt for an image: vLLM's, with as many placeholders as tokens stay."""
        content = whole(number) if callable(whole) else whole
        if not isinstance(content, PromptUpdateDetails):
            content = PromptUpdateDetails.from_seq(content)
        token, layout = self.config.image_token_id, layouts[number]
        if content.full.count(token) != layout.length:
            raise CodebookError(
                f"vLLM has {content.full.count(token)} placeholders for an image of {layout.length} visual tokens: "
                "this version of vLLM is not supported"
            )
        try:
            spare, full = layout.length - self.settings.kept(layout), []
        except CodebookError as error:  # the image has fewer tokens than the number that is to stay
            raise VLLMValidationError(str(error), parameter="image") from None
        for own in content.full:
            if own == token and spare:
                spare -= 1
            else:
                full.append(own)
        return replace(content, full=full)


def tower_shape(config: Any) -> list[int]:
    """The last axes of the pixels that a tower of this config takes: those of an image or crop, or of a Qwen patch."""
    if (size := getattr(config, "image_size", None)) is None:
        return [config.in_channels * config.temporal_patch_size * config.patch_size**2]
    return [size, size] if isinstance(size, int) else list(size)


class PruningModel:
    """A vLLM model that encodes images and keeps some of their embeddings; stands before vLLM's in the bases.

    Attributes
    ----------
    layouts
        As the processor has it.
    pixels
        Function of the model's config and `Data`: the pixels of each image, the same in any company.
    uncompared : list[Codebook]
        Codebooks that have yet to be compared with the weights.
    """

    layouts: Callable[[Any, Data], list[Layout]]
    pixels: Callable[[Any, Data], list[Tensor]]

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        lora = vllm_config.lora_config
        if lora is not None and lora.enable_tower_connector_lora:  # vLLM itself would ignore it, with a warning
            raise CodebookError(
                "adapters of tower and projector are not applied where images are pruned: leave "
                "--enable-tower-connector-lora out"
            )
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self.settings = VllmSettings.read(vllm_config.model_config.hf_config)
        books = codebooks_of(self.settings.stage.pruner)
        self.uncompared = [book for book in books if book.config["fingerprint"]]

    def embed_multimodal(self, **data: Any) -> list[Tensor]:
        """For each image (kept, d): the embeddings that stay, in raster order."""
        whole = list(super().embed_multimodal(**data))  # type: ignore[misc]
        if not whole:
            return whole
        config = self.config  # type: ignore[attr-defined]
        return [surviving(own, index) for own, index in zip(whole, self.kept(whole, config, data), strict=True)]

    def kept(self, features: Sequence[Tensor], config: Any, data: Data) -> list[Tensor]:
        """For each image the places of its tokens that stay, (kept,) int64, the same on every rank.

        Ranks of tensor parallelism sum in an order of their own, and a near tie could fall either way: they take what
        the first of them chose.
        """
        if self.uncompared:
            raise CodebookError(
                "this --load-format puts weights into the model without showing them, so that the codebook cannot be "
                "compared with them: leave it out, or use a method without a codebook, such as farthest"
            )
        layouts = type(self).layouts(config, data)
        chosen = self.settings.choose(features, layouts, type(self).pixels(config, data))
        if get_tensor_model_parallel_world_size() > 1:
            both = get_tp_group().broadcast(torch.cat(chosen), src=0)
            chosen = list(both.split([len(own) for own in chosen]))
        return chosen

    def get_encoder_cudagraph_config(self) -> Any:
        """That of vLLM's class, where it has one, for no images: recorded towers run without `embed_multimodal`."""
        return replace(super().get_encoder_cudagraph_config(), modalities=[])  # type: ignore[misc]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load, and refuse a codebook that was built for other weights; later updates may be of the LLM alone."""
        if not self.uncompared:
            return set(super().load_weights(weights))  # type: ignore[misc]
        watched = Watched(self.config, self.uncompared)  # type: ignore[attr-defined]
        loaded: set[str] = super().load_weights(watched.passing(weights))  # type: ignore[misc]
        watched.check()
        self.uncompared = []
        return loaded
