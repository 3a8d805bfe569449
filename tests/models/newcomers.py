"""Tiny models of stock classes that no file of codebook describes, and their image processors."""

import functools

import transformers as hf

from tests.models.families import QWEN_VISION, SIGLIP, TEXT, VIDEO, Glm, InternVL, Mistral3, Qwen, _glm
from tests.models.pictured import OPTIONS
from tests.models.processors import PROCESSORS
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


class Uncut(InternVL):
    """Crops would count as images of their own."""

    def large(self, draw):
        return self.image(draw)


class Plain(Qwen):
    """Positions with one axis: no token types."""

    def types(self, ids):
        return {}


LIKE = {"glm_ocr": "glm46v", "exaone4_5": "qwen2_vl", "lighton_ocr": "mistral3", "qianfan_ocr": "internvl"}
"""Whose image processor they have."""
PROCESSORS.update({name: PROCESSORS[like] for name, like in LIKE.items()})
OPTIONS.update({name: OPTIONS[like] for name, like in LIKE.items() if like in OPTIONS})
NEWCOMERS = {
    tiny.name: tiny
    for tiny in (
        Glm("glm_ocr", functools.partial(_glm, getattr(hf, "GlmOcrConfig", None)), "GlmOcrForConditionalGeneration",
            axes=3),
        Plain("exaone4_5", _exaone4_5, "Exaone4_5_ForConditionalGeneration"),
        Mistral3("lighton_ocr", _lighton_ocr, "LightOnOcrForConditionalGeneration"),
        Uncut("qianfan_ocr", _qianfan_ocr, "QianfanOCRForConditionalGeneration"),
    )
    if hasattr(hf, tiny.cls)  # an old transformers has fewer
}  # fmt: skip
