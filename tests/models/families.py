"""A tiny random model of each family, by its name: real stock classes, nothing downloaded."""

from functools import partial

import transformers as hf
from packaging.version import Version

from codebook import models
from tests.models import configs
from tests.models.prompts import (
    NEWLINE,
    Ernie,
    Fixed,
    Gemma3,
    Gemma4,
    Gemma4Unified,
    Glm,
    Granite,
    Idefics3,
    InternVL,
    Kimi,
    Lfm2,
    Lfm3,
    Llama4,
    Llava,
    LlavaNext,
    MiniCPM,
    Mistral3,
    Mixture,
    Molmo2,
    NextVideo,
    Omni,
    Onevision,
    Ovis2,
    Paddle,
    PaliGemma,
    Qwen,
    Qwen3,
    Tagged,
    VideoLlava,
    VipLlava,
)
from tests.tiny import IMAGE

INSTALLED = {name for name, family in models.FAMILIES.items() if Version(hf.__version__) >= Version(family.since)}
FAMILIES = {
    tiny.name: tiny
    for tiny in (
        Llava("llava", None, ""),
        LlavaNext("llava_next", configs.llava_next, "LlavaNextForConditionalGeneration"),
        Onevision("llava_onevision", configs.onevision, "LlavaOnevisionForConditionalGeneration", videos=True),
        Qwen("qwen2_vl", partial(
            configs.qwen, hf.Qwen2VLConfig, None, configs.QWEN_VISION | {"embed_dim": 32, "hidden_size": 64}
        ), "Qwen2VLForConditionalGeneration", True, 3),
        Qwen("qwen2_5_vl", partial(
            configs.qwen, hf.Qwen2_5_VLConfig, None,
            configs.QWEN_VISION | {"hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 64, "window_size": 16,
                                   "fullatt_block_indexes": [2]}
        ), "Qwen2_5_VLForConditionalGeneration", True, 3),
        Qwen3("qwen3_vl", partial(
            configs.qwen, hf.Qwen3VLConfig, None, configs.QWEN3_VISION, True
        ), "Qwen3VLForConditionalGeneration", True, 3),
        Qwen3("qwen3_vl_moe", partial(
            configs.qwen, hf.Qwen3VLMoeConfig, configs.EXPERTS | {"num_experts": 4}, configs.QWEN3_VISION, True
        ), "Qwen3VLMoeForConditionalGeneration", True, 3),
        Qwen3("cosmos3_omni", partial(
            configs.qwen, getattr(hf, "Cosmos3OmniConfig", None), None, configs.QWEN3_VISION, True
        ), "Cosmos3OmniForConditionalGeneration", True, 3),
        Omni("qwen2_5_omni_thinker", partial(
            configs.omni, hf.Qwen2_5OmniThinkerConfig, window_size=16, fullatt_block_indexes=[2]
        ), "Qwen2_5OmniThinkerForConditionalGeneration", True, 3),
        Omni("qwen3_omni_moe_thinker", partial(
            configs.omni, hf.Qwen3OmniMoeThinkerConfig, configs.EXPERTS | {"num_experts": 4},
            num_position_embeddings=64, deepstack_visual_indexes=[0, 1, 2]
        ), "Qwen3OmniMoeThinkerForConditionalGeneration", True, 3),
        Qwen3("qwen3_5", partial(configs.hybrid, hf.Qwen3_5Config), "Qwen3_5ForConditionalGeneration", True, 3),
        Mixture("qwen3_5_moe", partial(
            configs.hybrid, hf.Qwen3_5MoeConfig, **configs.MIXTURE
        ), "Qwen3_5MoeForConditionalGeneration", True, 3),
        Lfm2("lfm2_vl", configs.lfm2, "Lfm2VlForConditionalGeneration"),
        Lfm3("lfm3_vl", configs.lfm3, "Lfm3VlForConditionalGeneration", videos=True),
        InternVL("internvl", configs.internvl, "InternVLForConditionalGeneration"),
        Idefics3("idefics3", partial(configs.idefics3, hf.Idefics3Config), "Idefics3ForConditionalGeneration"),
        Idefics3("smolvlm", partial(configs.idefics3, hf.SmolVLMConfig), "SmolVLMForConditionalGeneration"),
        Gemma3("gemma3", configs.gemma3, "Gemma3ForConditionalGeneration"),
        PaliGemma("paligemma", configs.paligemma, "PaliGemmaForConditionalGeneration"),
        Mistral3("mistral3", configs.mistral3, "Mistral3ForConditionalGeneration"),
        VipLlava("vipllava", configs.vipllava, "VipLlavaForConditionalGeneration"),
        Tagged("aya_vision", partial(
            configs.cohere, hf.AyaVisionConfig, image_token_index=IMAGE
        ), "AyaVisionForConditionalGeneration"),
        Tagged("cohere2_vision", partial(
            configs.cohere, hf.Cohere2VisionConfig, image_token_id=IMAGE, alignment_intermediate_size=64
        ), "Cohere2VisionForConditionalGeneration"),
        NextVideo("llava_next_video", configs.next_video, "LlavaNextVideoForConditionalGeneration", videos=True),
        VideoLlava("video_llava", configs.video_llava, "VideoLlavaForConditionalGeneration", videos=True),
        Glm("glm4v", partial(configs.glm, hf.Glm4vConfig), "Glm4vForConditionalGeneration", True, 3),
        Glm("glm46v", partial(configs.glm, hf.Glm46VConfig), "Glm46VForConditionalGeneration", True, 3),
        Glm("glmga", partial(
            configs.glm, getattr(hf, "GlmgaConfig", None)
        ), "Glm46VForConditionalGeneration", True, 3),
        Glm("glm4v_moe", partial(
            configs.glm, hf.Glm4vMoeConfig, **configs.EXPERTS, n_routed_experts=4, first_k_dense_replace=1
        ), "Glm4vMoeForConditionalGeneration", True, 3),
        Paddle("paddleocr_vl", configs.paddle, "PaddleOCRVLForConditionalGeneration", axes=3),
        Ernie("ernie4_5_vl_moe", configs.ernie, "Ernie4_5_VLMoeForConditionalGeneration", True, 3),
        Gemma4("gemma4", configs.gemma4, "Gemma4ForConditionalGeneration", videos=True),
        Gemma4("gemma4_e2b", configs.gemma4_e2b, "Gemma4ForConditionalGeneration", videos=True),
        Gemma4Unified(
            "gemma4_unified", configs.gemma4_unified, "Gemma4UnifiedForConditionalGeneration", videos=True
        ),
        Ovis2("ovis2", configs.ovis2, "Ovis2ForConditionalGeneration"),
        Llama4("llama4", configs.llama4, "Llama4ForConditionalGeneration"),
        Molmo2("molmo2", configs.molmo2, "Molmo2ForConditionalGeneration", videos=True),
        Granite("granite4_vision", configs.granite4_vision, "Granite4VisionForConditionalGeneration"),
        Kimi("kimi_k25", configs.kimi, "Kimi_K25ForConditionalGeneration"),
        MiniCPM("minicpmv4_6", partial(
            configs.minicpm, getattr(hf, "MiniCPMV4_6Config", None)
        ), "MiniCPMV4_6ForConditionalGeneration", True),
        MiniCPM("minicpm_ocr", partial(
            configs.minicpm, getattr(hf, "MiniCPMOcrConfig", None), tie_word_embeddings=False
        ), "MiniCPMOcrForConditionalGeneration", True, seed=1),
        MiniCPM("minicpmv4_7", partial(
            configs.minicpm, getattr(hf, "MiniCPMV4_7Config", None), image_start_id=94, image_end_id=93,
            slice_start_id=92, slice_end_id=91, newline_id=NEWLINE
        ), "MiniCPMV4_7ForConditionalGeneration", True, 3),
        Fixed("deepseek_vl", configs.deepseek_vl, "DeepseekVLForConditionalGeneration"),
    )
    if tiny.family in INSTALLED
}  # fmt: skip
