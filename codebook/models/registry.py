"""The model families that are supported, and which of them a model belongs to."""

from __future__ import annotations

from functools import cache
from importlib import metadata
from typing import Any

from packaging.version import Version

from codebook.errors import CodebookError, did_you_mean
from codebook.models.aya_vision import AyaVision, Cohere2Vision
from codebook.models.base import Family, Model, Processor
from codebook.models.deepseek_vl import DeepseekVL
from codebook.models.ernie4_5_vl_moe import Ernie45VLMoe
from codebook.models.gemma3 import Gemma3
from codebook.models.gemma4 import Gemma4, Gemma4Unified
from codebook.models.generic import Untested, may_be_generic
from codebook.models.glm4v import Glm4v, Glm4vMoe, Glm46v, Glmga
from codebook.models.granite4_vision import Granite4Vision
from codebook.models.idefics3 import Idefics3, SmolVLM
from codebook.models.internvl import InternVL
from codebook.models.kimi_k25 import KimiK25
from codebook.models.lfm2_vl import Lfm2VL, Lfm3VL
from codebook.models.llama4 import Llama4
from codebook.models.llava import Llava
from codebook.models.llava_next import LlavaNext
from codebook.models.llava_next_video import LlavaNextVideo
from codebook.models.llava_onevision import LlavaOnevision
from codebook.models.minicpmv import MiniCPMOcr, MiniCPMV46, MiniCPMV47
from codebook.models.mistral3 import Mistral3
from codebook.models.molmo2 import Molmo2
from codebook.models.ovis2 import Ovis2
from codebook.models.paddleocr_vl import PaddleOCRVL
from codebook.models.paligemma import PaliGemma
from codebook.models.qwen2_vl import Qwen2VL, Qwen25VL
from codebook.models.qwen3_vl import Cosmos3Omni, Qwen3VL, Qwen3VLMoe, Qwen35, Qwen35Moe
from codebook.models.qwen_omni import Qwen3OmniMoeThinker, Qwen25OmniThinker
from codebook.models.trial import Report, learned, try_model
from codebook.models.video_llava import VideoLlava
from codebook.models.vipllava import VipLlava
from codebook.models.wrappers import stock

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Llava(),
        LlavaNext(),
        LlavaOnevision(),
        Qwen2VL(),
        Qwen25VL(),
        Qwen3VL(),
        Qwen3VLMoe(),
        Cosmos3Omni(),
        Qwen25OmniThinker(),
        Qwen3OmniMoeThinker(),
        Qwen35(),
        Qwen35Moe(),
        Lfm2VL(),
        Lfm3VL(),
        InternVL(),
        Idefics3(),
        SmolVLM(),
        Gemma3(),
        PaliGemma(),
        Mistral3(),
        VipLlava(),
        AyaVision(),
        Cohere2Vision(),
        LlavaNextVideo(),
        VideoLlava(),
        Glm4v(),
        Glm46v(),
        Glmga(),
        Glm4vMoe(),
        PaddleOCRVL(),
        Ernie45VLMoe(),
        DeepseekVL(),
        Gemma4(),
        Gemma4Unified(),
        KimiK25(),
        Llama4(),
        Ovis2(),
        Molmo2(),
        Granite4Vision(),
        MiniCPMV46(),
        MiniCPMV47(),
        MiniCPMOcr(),
    )
}
"""Supported families by the `model_type` of their config."""

version = cache(metadata.version)
"""Version of a package; to read it takes a millisecond, and every context asks for it."""

ATTENTION_LAYERS = {"full_attention", "sliding_attention"}
"""Kinds of decoder layers that cache keys and values of single tokens."""

RECURRENT_LAYERS = {"linear_attention", "conv"}
"""Kinds that carry a state from token to token: shown a shorter sequence, they never hear of what was dropped."""

LEARNED_QUERIES = "visual tokens that are learned queries, without a place in the picture"

REFUSED = {
    "aria": LEARNED_QUERIES,
    "blip-2": LEARNED_QUERIES,
    "diffusion_gemma": "answers that are written in whole blocks, by diffusion",
    "florence2": "images that go through an encoder of text, to which the decoder cross-attends",
    "idefics2": LEARNED_QUERIES,
    "instructblip": LEARNED_QUERIES,
    "instructblipvideo": LEARNED_QUERIES,
    "deepseek_ocr2": LEARNED_QUERIES,
    "gemma3n": "several copies of each hidden state, which its decoder hands from layer to layer",
    "phi4_multimodal": "images that the decoder itself encodes, where no call shows them",
    "perception_lm": "a vision tower of timm, which computes its attention itself and has not been tried",
}
"""What families have that cannot be pruned exactly, by their `model_type`."""


def family(model: Model) -> Family:
    """The family of a loaded model, or of the one inside a wrapper that `unwrap` knows.

    Raises
    ------
    CodebookError
        If the family, or this variant of it, is not supported.
    """
    model = stock(model)
    found = family_of_config(model.config)
    return learned(model) if isinstance(found, Untested) else found


def check_model(model: Model, processor: Processor) -> Report:
    """Test on a stock model whether its visual tokens are where they are believed to be: codebook/models/trial.py.

    What a file of `codebook/models` says is tested if there is one. Otherwise a belief that holds is looked for, and
    the result is kept as long as the model lives. Neither random numbers nor the training mode change.

    Parameters
    ----------
    processor
        The one that goes with the model: it makes the prompts and pixels of the test.

    Returns
    -------
    A report; if the test refuses the model, its `reason` says why

    Raises
    ------
    CodebookError
        If the model can be known not to work without a test.
    """
    model = stock(model)
    found = family_of_config(model.config)
    return try_model(model, processor, None if isinstance(found, Untested) else found)


def family_of_config(config: Any) -> Family:
    """The family of a model with this transformers config; raises as `family` does, but for what a test may tell."""
    name, text = config.model_type, config.get_text_config()
    if getattr(text, "cross_attention_layers", None):
        raise CodebookError(
            f"models of type {name} cross-attend to their images: there are no visual tokens in the sequence to prune; "
            "use a model that puts them there, such as llava or qwen2_5_vl"
        )
    if getattr(config, "thinker_config", None) is not None:
        raise CodebookError(
            f"models of type {name} also speak, of which pruning knows nothing: pass their `thinker`, which sees and "
            "answers in text; codebook.load loads it alone"
        )
    if name in REFUSED:
        raise CodebookError(f"models of type {name} are not supported, with {REFUSED[name]}; use qwen3_vl or internvl")
    known = ATTENTION_LAYERS | RECURRENT_LAYERS
    if name in FAMILIES and FAMILIES[name].chunked:
        known = known | {"chunked_attention"}
    if odd := set(getattr(text, "layer_types", None) or ()) - known:
        kinds = " and ".join(sorted(odd))
        raise CodebookError(
            f"models of type {name} have a decoder with {kinds} layers, which nobody has checked; use a model with "
            "full attention, such as qwen3_vl"
        )
    if name not in FAMILIES and may_be_generic(config):
        return Untested(name)
    if name not in FAMILIES:
        raise CodebookError(
            f"models of type {name} are not supported; {did_you_mean(name, FAMILIES)}use one of the {len(FAMILIES)} of "
            "docs/models.md, such as llava, qwen2_5_vl, qwen3_vl, or a model whose config has a vision_config and an "
            "image token"
        )
    found, installed = FAMILIES[name], version("transformers")
    if Version(installed) < Version(found.since):
        raise CodebookError(f"{name} needs transformers {found.since}, this is {installed}: use a newer one")
    return found.check(config)
