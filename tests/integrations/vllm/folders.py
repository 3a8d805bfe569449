"""Tiny random models as vLLM loads them: whole folders, with tokenizer and processor."""

from __future__ import annotations

import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.models.families import FAMILIES
from tests.models.prompts import SEPARATOR, VIDEO
from tests.tiny import IMAGE, VOCAB

START, END = SEPARATOR, 96
SPECIAL = {0: "<pad>", 1: "<s>", 2: "</s>", IMAGE: "<image>", VIDEO: "<video>", START: "<img>", END: "</img>"}
EXTRA = {
    "image_token": "<image>", "video_token": "<video>", "context_image_token": "<image>",
    "start_image_token": "<img>", "end_image_token": "</img>",
}  # fmt: skip


QWEN_SPECIAL = SPECIAL | {
    IMAGE: "<|image_pad|>", VIDEO: "<|video_pad|>", 94: "<|vision_start|>", 93: "<|vision_end|>",
    START: f"w{START}", END: f"w{END}",
}  # fmt: skip
QWEN_EXTRA = {
    "image_token": "<|image_pad|>", "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>",
}  # fmt: skip


def tokenizer(special=SPECIAL, extra=EXTRA):
    """One word per token, `w20` for 20 and so on, but for the special ones."""
    words = Tokenizer(models.WordLevel({special.get(i, f"w{i}"): i for i in range(VOCAB)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens(list(special.values()))
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", extra_special_tokens=extra
    )


def llava_next():
    images = hf.LlavaNextImageProcessor(
        size={"shortest_edge": 16}, crop_size=16, image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]]
    )
    return hf.LlavaNextProcessor(
        images, tokenizer(), patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


def llava_onevision():
    square, points = {"height": 16, "width": 16}, [[16, 32], [32, 16], [32, 32], [16, 96], [64, 64]]
    images = hf.LlavaOnevisionImageProcessor(size=square, image_grid_pinpoints=points)
    return hf.LlavaOnevisionProcessor(
        images, tokenizer(), hf.LlavaOnevisionVideoProcessor(size=square), num_image_tokens=16,
        vision_feature_select_strategy="full",
    )  # fmt: skip


def internvl():
    square = {"height": 32, "width": 32}
    images = hf.GotOcr2ImageProcessor(size=square, crop_to_patches=True, min_patches=1, max_patches=6)
    return hf.InternVLProcessor(images, tokenizer(), hf.InternVLVideoProcessor(size=square), image_seq_length=16)


def qwen(processor, videos):
    sizes = {"patch_size": 4, "size": {"shortest_edge": 64, "longest_edge": 300 * 64}}  # tokens of 8 x 8 pixels
    return processor(hf.Qwen2VLImageProcessor(**sizes), tokenizer(QWEN_SPECIAL, QWEN_EXTRA), videos(**sizes))


def qwen2_vl():
    return qwen(hf.Qwen2VLProcessor, hf.Qwen2VLVideoProcessor)


def qwen2_5_vl():
    return qwen(hf.Qwen2_5_VLProcessor, hf.Qwen2VLVideoProcessor)


def qwen3_vl():
    return qwen(hf.Qwen3VLProcessor, hf.Qwen3VLVideoProcessor)


def save(processor, folder):
    """The tiny model of a family of `tests.models`, of heads of 32 channels, which vLLM's kernels ask for."""
    name = processor.__name__
    torch.manual_seed(0)
    config = FAMILIES[name].config()
    text = config.text_config
    text.num_attention_heads, text.num_key_value_heads, text.head_dim = 2, 1, 32
    text.max_position_embeddings = 2048
    if "mrope_section" in text.rope_parameters:
        text.rope_parameters["mrope_section"] = [6, 5, 5]
    made = processor()
    if hasattr(config, "image_grid_pinpoints"):
        config.image_grid_pinpoints = made.image_processor.image_grid_pinpoints
    model = getattr(hf, FAMILIES[name].cls)(config).eval()
    for weight_name, weight in model.named_parameters():  # stock initialisation leaves these at zero
        if any(word in weight_name for word in ("cls_token", "position_embeddings", "image_newline")):
            weight.data.normal_(std=0.5)
    model.save_pretrained(folder)
    made.save_pretrained(folder)
    return folder
