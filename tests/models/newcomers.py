"""Tiny models of stock classes that no file of codebook describes, and their image processors."""

import functools

import torch
import transformers as hf

from tests.models.configs import QWEN_VISION, SIGLIP, TEXT, glm, siglip
from tests.models.pictured import OPTIONS
from tests.models.processors import PATCHES, PROCESSORS, SQUARE
from tests.models.prompts import VIDEO, Fixed, Glm, InternVL, Mistral3, Qwen
from tests.tiny import IMAGE


def _exaone4_5():
    vision = {"hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 64, "window_size": 16}
    vision |= {"fullatt_block_indexes": [2], "num_key_value_heads": 2}
    text = {"model_type": "exaone4", **TEXT, "layer_types": ["full_attention"] * 4}
    ids = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": 94, "vision_end_token_id": 93}
    return hf.Exaone4_5_Config(text_config=text, vision_config=QWEN_VISION | vision, **ids)


def _lighton_ocr():
    vision, text = hf.PixtralVisionConfig(**SIGLIP, image_size=64, initializer_range=0.3), hf.Qwen3Config
    return hf.LightOnOcrConfig(
        vision_config=vision, text_config=text(**TEXT, head_dim=16), image_token_id=IMAGE, spatial_merge_size=2
    )


def _qianfan_ocr():
    vision = SIGLIP | {"patch_size": (4, 4), "image_size": (32, 32), "layer_scale_init_value": 1.0}
    return hf.QianfanOCRConfig(
        vision_config=vision | {"initializer_range": 0.2}, text_config=hf.Qwen3Config(**TEXT, head_dim=16),
        image_token_id=IMAGE, image_seq_length=16,
    )  # fmt: skip


MROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
SAM = {
    "model_type": "sam_vision_model", "hidden_size": 32, "output_channels": 16, "num_hidden_layers": 2,
    "num_attention_heads": 4, "image_size": 64, "patch_size": 4, "window_size": 4, "global_attn_indexes": [1],
    "mlp_dim": 64,
}  # fmt: skip


def _cosmos3_edge():
    ids = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": 94, "vision_end_token_id": 93}
    return hf.Cosmos3EdgeConfig(
        vision_config={**SIGLIP, "num_patches": 64, "spatial_merge_size": 2}, projector_hidden_size=64,
        text_config={**TEXT, "head_dim": 16, "rope_parameters": MROPE}, **ids,
    )  # fmt: skip


def _deepseek_vl_hybrid():
    return hf.DeepseekVLHybridConfig(
        vision_config=siglip(16).to_dict(), high_res_vision_config=SAM, image_token_id=IMAGE,
        text_config={"model_type": "llama", **TEXT},
    )  # fmt: skip


def _hunyuan_vl():
    rope = MROPE | {"rope_type": "xdrope", "mrope_section": [2, 2, 2, 2], "alpha": 1.0, "factor": 1.0}
    vision = {"out_hidden_size": 64, "spatial_merge_size": 2, "max_image_size": 64, "img_max_token_num": 256}
    return hf.HunYuanVLConfig(
        vision_config={**SIGLIP, **vision}, text_config={**TEXT, "head_dim": 16, "rope_parameters": rope},
        image_token_id=IMAGE, im_start_id=94, im_end_id=93, im_newline_id=92,
    )  # fmt: skip


def _hyperclovax():
    vision = {"model_type": "qwen2_5_vl_vision", "hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 64}
    vision |= {"window_size": 16, "fullatt_block_indexes": [2]}
    return hf.HyperCLOVAXVisionV2Config(
        vision_config=QWEN_VISION | vision, text_config={"model_type": "hyperclovax", **TEXT}, image_token_id=IMAGE,
        video_token_id=VIDEO,
    )  # fmt: skip


def _janus():
    codes = {"embed_dim": 4, "num_embeddings": 16, "latent_channels": 32, "base_channels": 32, "num_res_blocks": 1}
    codes |= {"channel_multiplier": [1, 1], "projection_dim": 64, "image_token_embed_dim": 64, "num_hidden_layers": 1}
    vision = {"image_size": 16, "projection_dim": 64, "num_image_tokens": 16, "initializer_range": 0.2}
    return hf.JanusConfig(
        vision_config={**SIGLIP, **vision}, vq_config=codes, text_config={"model_type": "llama", **TEXT},
        image_token_id=IMAGE,
    )  # fmt: skip


def _minimax_m3():
    text = {"head_dim": 16, "rotary_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}
    text |= {"dense_intermediate_size": 64, "shared_intermediate_size": 32, "intermediate_size": 32}
    return hf.MiniMaxM3VLConfig(
        vision_config={**SIGLIP, "image_size": 64, "hidden_size": 48}, text_config={**TEXT, **text},
        image_token_index=IMAGE, video_token_index=VIDEO, projector_hidden_size=64,
    )  # fmt: skip


def _video_llama_3():
    return hf.VideoLlama3Config(
        vision_config=SIGLIP, text_config={"model_type": "qwen2", **TEXT}, image_token_id=IMAGE, video_token_id=VIDEO
    )


class Still(Qwen):
    """Patches of one frame."""

    def _grid(self, draw, kind, frames, height, width):
        ids, pieces, *rest = super()._grid(draw, kind, frames, height, width)
        return ids, pieces | {"pixel_values": draw(height * width, 3 * 4 * 4)}, *rest


class HunYuan(Still):
    """A begin, newlines and an end are image tokens."""

    def _grid(self, draw, kind, frames, height, width):
        _, pieces, [(rows, cols)], _ = super()._grid(draw, kind, frames, height, width)
        count = rows * (cols + 1) + 2
        return [IMAGE] * count, pieces, [(rows, cols)], [0, *range(cols + 1, count, cols + 1), count - 1]


class VideoLlama3(Still):
    """Each patch is a token."""

    def _grid(self, draw, kind, frames, height, width):
        _, pieces, *_ = super()._grid(draw, kind, frames, height, width)
        return [IMAGE] * (height * width), pieces | {"image_merge_sizes": torch.ones(1).long()}, [(height, width)], []

    def types(self, ids):
        return {}


class Hybrid(Fixed):
    """Each picture at two sizes."""

    def image(self, draw):
        ids, pieces, *rest = super().image(draw)
        return ids, pieces | {"high_res_pixel_values": draw(1, 3, 64, 64)}, *rest

    large = image


class Uncut(InternVL):
    """Crops would count as images of their own."""

    def large(self, draw):
        return self.image(draw)


class Plain(Qwen):
    """Positions with one axis: no token types."""

    def types(self, ids):
        return {}


LIKE = {
    "glm_ocr": "glm46v", "exaone4_5": "qwen2_vl", "lighton_ocr": "mistral3", "qianfan_ocr": "internvl",
    "hyperclovax_vision_v2": "qwen2_vl", "minimax_m3_vl": "qwen2_vl",
}  # fmt: skip
"""Whose image processor they have."""
PROCESSORS.update({
    "cosmos3_edge": lambda: hf.Cosmos3EdgeImageProcessor(**PATCHES),
    "deepseek_vl_hybrid": lambda: hf.DeepseekVLHybridImageProcessor(
        size=SQUARE, high_res_size={"height": 64, "width": 64}
    ),
    "hunyuan_vl": lambda: hf.HunYuanVLImageProcessor(**PATCHES),
    "janus": lambda: hf.JanusImageProcessor(size=SQUARE, min_size=4),
    "video_llama_3": lambda: hf.VideoLlama3ImageProcessor(**PATCHES),
})  # fmt: skip
PROCESSORS.update({name: PROCESSORS[like] for name, like in LIKE.items()})
OPTIONS.update({name: OPTIONS[like] for name, like in LIKE.items() if like in OPTIONS})
NEWCOMERS = {
    tiny.name: tiny
    for tiny in (
        Glm("glm_ocr", functools.partial(glm, getattr(hf, "GlmOcrConfig", None)), "GlmOcrForConditionalGeneration",
            axes=3),
        Plain("exaone4_5", _exaone4_5, "Exaone4_5_ForConditionalGeneration"),
        Mistral3("lighton_ocr", _lighton_ocr, "LightOnOcrForConditionalGeneration"),
        Uncut("qianfan_ocr", _qianfan_ocr, "QianfanOCRForConditionalGeneration"),
        Still("cosmos3_edge", _cosmos3_edge, "Cosmos3EdgeForConditionalGeneration", axes=3),
        Hybrid("deepseek_vl_hybrid", _deepseek_vl_hybrid, "DeepseekVLHybridForConditionalGeneration"),
        HunYuan("hunyuan_vl", _hunyuan_vl, "HunYuanVLForConditionalGeneration", axes=3),
        Plain("hyperclovax_vision_v2", _hyperclovax, "HyperCLOVAXVisionV2ForConditionalGeneration"),
        Fixed("janus", _janus, "JanusForConditionalGeneration"),
        Plain("minimax_m3_vl", _minimax_m3, "MiniMaxM3SparseForConditionalGeneration"),
        VideoLlama3("video_llama_3", _video_llama_3, "VideoLlama3ForConditionalGeneration"),
    )
    if hasattr(hf, tiny.cls)  # an old transformers has fewer
}  # fmt: skip
