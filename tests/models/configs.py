"""Configs of a tiny model of each family."""

from functools import partial

import transformers as hf

from tests.models.prompts import AUDIO, GLOBAL, SEPARATOR, VIDEO
from tests.tiny import IMAGE, PAD, VOCAB

SIGLIP = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "patch_size": 4,
}  # fmt: skip
TEXT = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2,
}  # fmt: skip


def clip(side):
    return hf.CLIPVisionConfig(**SIGLIP, image_size=side, projection_dim=32)


def siglip(side):
    return hf.SiglipVisionConfig(**SIGLIP, image_size=side, vision_use_head=False)


def llava_next():
    return hf.LlavaNextConfig(
        vision_config=clip(16), text_config=hf.MistralConfig(**TEXT, sliding_window=None), image_token_index=IMAGE,
        image_grid_pinpoints=[[16, 32], [32, 16]], vision_feature_layer=-2, vision_feature_select_strategy="default",
    )  # fmt: skip


def onevision():
    return hf.LlavaOnevisionConfig(
        vision_config=siglip(16), text_config=hf.Qwen2Config(**TEXT), image_token_index=IMAGE, vision_feature_layer=-1,
        video_token_index=VIDEO, image_grid_pinpoints=[[16, 32], [32, 16]], vision_feature_select_strategy="full",
    )  # fmt: skip


def qwen(cls, text, vision, interleaved=False):
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    extra = {"mrope_interleaved": True} if interleaved else {}
    ids = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": 94, "vision_end_token_id": 93}
    more = {"head_dim": 16} if extra else {}
    text = {**TEXT, "rope_parameters": rope | extra, **more, **(text or {})}
    return cls(text_config=text, vision_config=vision, **ids)


def hybrid(cls, **more):
    """Layers with attention at 0 and 2, where stages that need it look; recurrent ones between."""
    linear = {
        "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "layer_types": ["full_attention", "linear_attention"] * 2,
    }  # fmt: skip
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "mrope_interleaved": True, "rope_theta": 10000.0}
    text = {**TEXT, "head_dim": 16, **linear, **more, "rope_parameters": rope | {"partial_rotary_factor": 0.5}}
    ids = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": 94, "vision_end_token_id": 93}
    vision = {"hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 64, "num_position_embeddings": 64}
    return cls(text_config=text, vision_config=QWEN_VISION | vision, **ids)


def minicpm(cls, **more):
    vision = SIGLIP | {"image_size": 64}
    text = hybrid(hf.Qwen3_5Config).text_config
    return cls(vision_config=vision, text_config=text, insert_layer_id=0, image_token_id=IMAGE, video_token_id=VIDEO,
               **more)  # fmt: skip


CONVOLUTIONS = {"layer_types": ["full_attention", "conv"] * 2}


def lfm2():
    vision = hf.Siglip2VisionConfig(**SIGLIP, num_patches=64, vision_use_head=False)
    text = hf.Lfm2Config(**TEXT | CONVOLUTIONS, block_auto_adjust_ff_dim=False)
    return hf.Lfm2VlConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, projector_hidden_size=64)


def lfm3():
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "patch_size": 4, **CONVOLUTIONS,
    }  # fmt: skip
    ids = {"image_token_id": IMAGE, "video_token_id": VIDEO}
    text = TEXT | CONVOLUTIONS
    return hf.Lfm3VlConfig(vision_config=vision, text_config=text, projector_hidden_size=64, **ids)


def omni(config, text=None, **vision):
    audio = {"num_mel_bins": 8, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16, "d_model": 16}
    audio |= {"initializer_range": 0.4}
    audio |= {"output_dim": 64, "downsample_hidden_size": 4} if "3" in config.__name__ else {"output_dim": 64}
    begin, token, end = AUDIO
    more = {"audio_config": audio, "audio_start_token_id": begin, "audio_token_id": token, "audio_end_token_id": end}
    vision = QWEN_VISION | {"hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 64, **vision}
    return qwen(partial(config, **more), text, vision, "Qwen3" in config.__name__)


EXPERTS = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
MIXTURE = EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 32}
QWEN_VISION = {"depth": 3, "num_heads": 4, "patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2}
QWEN3_VISION = QWEN_VISION | {
    "hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 64, "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0, 1, 2],
}  # fmt: skip


def internvl():
    vision = hf.InternVLVisionConfig(
        **SIGLIP | {"patch_size": (4, 4)}, image_size=(32, 32), layer_scale_init_value=1.0, initializer_range=0.2
    )
    return hf.InternVLConfig(
        vision_config=vision, text_config=hf.Qwen2Config(**TEXT), image_token_id=IMAGE, image_seq_length=16
    )


def idefics3(cls):
    text = hf.LlamaConfig(**TEXT)
    return cls(vision_config=SIGLIP | {"image_size": 32}, text_config=text, image_token_id=IMAGE, scale_factor=2)


def mistral3():
    return hf.Mistral3Config(
        vision_config=hf.PixtralVisionConfig(**SIGLIP, image_size=64, initializer_range=0.3),
        text_config=hf.MistralConfig(**TEXT), image_token_index=IMAGE, spatial_merge_size=2,
    )  # fmt: skip


def vipllava():
    return hf.VipLlavaConfig(
        vision_config=clip(16), text_config=hf.LlamaConfig(**TEXT), image_token_index=IMAGE,
        vision_feature_layer=[-2, 1], image_seq_length=16,
    )  # fmt: skip


def cohere(cls, **more):
    kinds = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    text = hf.Cohere2Config(**TEXT, sliding_window=12, layer_types=kinds)
    return cls(vision_config=siglip(32), text_config=text, **more)


def next_video():
    return hf.LlavaNextVideoConfig(
        vision_config=clip(16), text_config=hf.LlamaConfig(**TEXT), image_token_index=IMAGE, video_token_index=VIDEO,
        image_grid_pinpoints=[[16, 32], [32, 16]],
    )  # fmt: skip


def video_llava():
    return hf.VideoLlavaConfig(
        vision_config=clip(16), text_config=hf.LlamaConfig(**TEXT), image_token_index=IMAGE, video_token_index=VIDEO,
    )  # fmt: skip


def paddle():
    vision = {name: value for name, value in SIGLIP.items()} | {"image_size": 32}
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    return hf.PaddleOCRVLConfig(
        vision_config=vision, text_config=TEXT | {"head_dim": 16, "rope_parameters": rope}, image_token_id=IMAGE,
        video_token_id=VIDEO, vision_start_token_id=94, vision_end_token_id=93,
    )  # fmt: skip


def glm(cls, **text):
    rope = {"rope_type": "default", "mrope_section": [1, 2, 1], "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    vision = {
        "depth": 3, "hidden_size": 32, "num_heads": 4, "patch_size": 4, "image_size": 32, "intermediate_size": 64,
        "out_hidden_size": 64,
    }  # fmt: skip
    ids = {"image_token_id": IMAGE, "video_token_id": VIDEO, "image_start_token_id": 94, "image_end_token_id": 93}
    ids |= {"video_start_token_id": 92, "video_end_token_id": 91}
    return cls(text_config={**TEXT, "rope_parameters": rope, **text}, vision_config=vision, **ids)


def ernie():
    rope = {"rope_type": "default", "mrope_section": [3, 3, 2], "rope_theta": 10000.0}
    text = {"moe_intermediate_size": [32, 24], "moe_k": 2, "moe_num_experts": 4, "moe_num_shared_experts": 1}
    vision = {"depth": 3, "hidden_size": 32, "num_heads": 4, "patch_size": 4, "intermediate_size": 64}
    return hf.Ernie4_5_VLMoeConfig(
        text_config={**TEXT, "rope_parameters": rope, **text}, vision_config=vision, image_token_id=IMAGE,
        video_token_id=VIDEO, image_start_token_id=94, image_end_token_id=93, video_start_token_id=92,
        video_end_token_id=91,
    )  # fmt: skip


def ovis2():
    vision = SIGLIP | {"image_size": 32, "hidden_stride": 2, "vocab_size": 60, "initializer_range": 0.2}
    return hf.Ovis2Config(
        vision_config=vision, text_config=hf.Qwen2Config(**TEXT), image_token_id=IMAGE, hidden_size=64,
        visual_indicator_token_ids=[80, 81, 82, 83, 84], vocab_size=VOCAB,
    )  # fmt: skip


def molmo2(**more):
    """Layers whose positions are scaled among others."""
    vision = {name: value for name, value in SIGLIP.items()} | {"image_size": [28, 28], "initializer_range": 0.2}
    vision |= {"num_key_value_heads": 4, "head_dim": 8}
    adapter = {"vision_feature_layer": [2, 0], "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4}
    adapter |= {"head_dim": 8, "intermediate_size": 64, "text_hidden_size": 64, "initializer_range": 0.2}
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    text = {"head_dim": 16, "rope_parameters": rope, "rope_scaling_layers": [0, 2], "additional_vocab_size": 4}
    return hf.Molmo2Config(
        vision_config=vision, adapter_config=adapter, text_config=TEXT | text | more, image_patch_id=IMAGE,
        image_start_token_id=GLOBAL, low_res_image_start_token_id=SEPARATOR, image_end_token_id=93,
        frame_start_token_id=SEPARATOR, frame_end_token_id=93,
    )  # fmt: skip


def granite4_vision():
    """Features for layers 0 to 3: for one of them two, and some for one that the decoder lacks."""
    former = {"model_type": "blip_2_qformer", "num_hidden_layers": 1, "intermediate_size": 64}
    former |= {"cross_attention_frequency": 1, "initializer_range": 0.1}
    vision = hf.SiglipVisionConfig(**SIGLIP | {"hidden_size": 64}, image_size=32, vision_use_head=False)
    text = {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3, "logits_scaling": 2.0}
    return hf.Granite4VisionConfig(
        vision_config=vision, text_config=TEXT | text, qformer_config=former, image_token_index=IMAGE,
        image_grid_pinpoints=[[32, 64], [64, 32]], vision_feature_select_strategy="full", downsample_rate="2/4",
        deepstack_layer_map=[[1, 2], [-1, 0]], spatial_target_layers=[1, 3, 3, 9],
    )  # fmt: skip


def kimi():
    text = EXPERTS | {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
    text |= {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
    vision = {"patch_size": 4, "pos_emb_height": 8, "pos_emb_width": 8, "num_attention_heads": 4}
    vision |= {"num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 64}
    return hf.Kimi_K25Config(
        text_config={"model_type": "deepseek_v3", **TEXT, "num_key_value_heads": 4, **text}, vision_config=vision,
        image_token_id=IMAGE, video_token_id=VIDEO, projection_hidden_size=32,
    )  # fmt: skip


def llama4():
    """Two layers with positions, in chunks, around two without."""
    vision = {name: value for name, value in SIGLIP.items()} | {"image_size": 32, "intermediate_size": 128}
    vision |= {"projector_input_dim": 64, "projector_output_dim": 64, "vision_output_dim": 64}
    vision |= {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "initializer_range": 0.2}
    text = TEXT | {"head_dim": 16, "intermediate_size_mlp": 96, "num_local_experts": 4, "moe_layers": [1, 3]}
    text |= {"no_rope_layers": [1, 0, 0, 1], "attention_chunk_size": 12}
    return hf.Llama4Config(text_config=text, vision_config=vision, image_token_index=IMAGE, pad_token_id=PAD)


def deepseek_vl():
    return hf.DeepseekVLConfig(vision_config=siglip(16), text_config=hf.LlamaConfig(**TEXT), image_token_id=IMAGE)


def gemma3():
    text = TEXT | {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 12}
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    return hf.Gemma3Config(
        vision_config=siglip(32), text_config=hf.Gemma3TextConfig(**text, layer_types=kinds), mm_tokens_per_image=16,
        image_token_index=IMAGE, boi_token_index=92, eoi_token_index=91,
    )  # fmt: skip


GEMMA4_IDS = {
    "image_token_id": IMAGE, "video_token_id": VIDEO, "boi_token_id": 92, "eoi_token_id": 91, "boa_token_id": 90,
    "eoa_token_index": 89, "audio_token_id": 88,
}  # fmt: skip
GEMMA4_TEXT = TEXT | {
    "head_dim": 16, "global_head_dim": 32, "sliding_window": 12,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
}  # fmt: skip


def gemma4_unified():
    vision = {"patch_size": 4, "pooling_kernel_size": 2, "mm_embed_dim": 64, "mm_posemb_size": 64}
    vision |= {"output_proj_dims": 64}
    return hf.Gemma4UnifiedConfig(text_config=GEMMA4_TEXT, vision_config=vision, audio_config=None, **GEMMA4_IDS)


def gemma4():
    text = GEMMA4_TEXT | {
        "hidden_size_per_layer_input": 0,
        "use_bidirectional_attention": "vision",
        "enable_moe_block": True,
    }
    text |= {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}
    vision = SIGLIP | {"head_dim": 8, "num_key_value_heads": 4, "pooling_kernel_size": 2, "position_embedding_size": 64}
    return hf.Gemma4Config(text_config=text, vision_config=vision, **GEMMA4_IDS)


def gemma4_e2b():
    """Five layers with keys of their own; two that use those of layers 3 and 4."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    text = GEMMA4_TEXT | {"num_hidden_layers": 7, "num_kv_shared_layers": 2, "use_double_wide_mlp": True}
    text |= {"layer_types": [*kinds, "sliding_attention", "full_attention"], "final_logit_softcapping": 30.0}
    text |= {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB}
    vision = SIGLIP | {"head_dim": 8, "num_key_value_heads": 4, "pooling_kernel_size": 2, "position_embedding_size": 64}
    return hf.Gemma4Config(text_config=text, vision_config=vision, **GEMMA4_IDS)


def paligemma():
    vision = siglip(16)
    vision.projection_dim = 64
    text = hf.GemmaConfig(**TEXT, head_dim=16)
    return hf.PaliGemmaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, projection_dim=64)
