"""Tiny random models of each family: real stock classes, seconds to run, nothing downloaded."""

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
)

IMAGE, PAD, VOCAB, SIDE = 99, 0, 100, 6


def llava(
    attention: str = "sdpa", layers: int = 4, seed: int = 0, tower: str = "clip"
) -> LlavaForConditionalGeneration:
    """A random LLaVA with 36 visual tokens an image, fp32, in eval mode; the tower is clip or siglip."""
    torch.manual_seed(seed)
    sizes = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
        "image_size": SIDE * 4, "patch_size": 4,
    }  # fmt: skip
    clip = tower == "clip"
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes, projection_dim=32)
        if clip
        else SiglipVisionConfig(**sizes, vision_use_head=False),
        text_config=LlamaConfig(
            vocab_size=VOCAB, hidden_size=48, intermediate_size=96, num_hidden_layers=layers,
            num_attention_heads=4, num_key_value_heads=2, pad_token_id=PAD, bos_token_id=1, eos_token_id=2,
            initializer_range=0.2,
        ),
        image_token_id=IMAGE, vision_feature_layer=-2, vision_feature_select_strategy="default" if clip else "full",
        image_seq_length=SIDE * SIDE,
    )  # fmt: skip
    config._attn_implementation = attention
    model = LlavaForConditionalGeneration(config).eval()
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = (
        PAD,
        None,
    )  # never stops early
    return model
