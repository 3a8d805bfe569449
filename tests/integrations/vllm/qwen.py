"""Tiny random Qwen-VL models, whole folders with tokenizer and processor, as vLLM loads them."""

from __future__ import annotations

import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.models.families import FAMILIES, VIDEO
from tests.tiny import IMAGE, VOCAB

START, END = 94, 93
SPECIAL = {
    IMAGE: "<|image_pad|>", VIDEO: "<|video_pad|>", START: "<|vision_start|>", END: "<|vision_end|>",
    0: "<pad>", 1: "<s>", 2: "</s>",
}  # fmt: skip
PROCESSORS = {
    "qwen2_vl": (hf.Qwen2VLProcessor, hf.Qwen2VLVideoProcessor),
    "qwen2_5_vl": (hf.Qwen2_5_VLProcessor, hf.Qwen2VLVideoProcessor),
    "qwen3_vl": (hf.Qwen3VLProcessor, hf.Qwen3VLVideoProcessor),
}
UNIT = 8
"""Pixels per side of a visual token: 2 x 2 patches of 4 pixels."""


def save(name, folder):
    """The family's tiny model of `tests.models`, with heads of 32 channels, which vLLM's kernels ask for."""
    torch.manual_seed(0)
    config = FAMILIES[name].config()
    text = config.text_config
    text.num_attention_heads, text.num_key_value_heads, text.head_dim = 2, 1, 32
    text.rope_parameters["mrope_section"] = [6, 5, 5]
    text.max_position_embeddings, text.tie_word_embeddings = 1024, False
    config.tie_word_embeddings = False
    model = getattr(hf, FAMILIES[name].cls)(config).eval()
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({SPECIAL.get(i, f"w{i}"): i for i in range(VOCAB)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens(list(SPECIAL.values()))
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        extra_special_tokens={
            "image_token": SPECIAL[IMAGE], "video_token": SPECIAL[VIDEO],
            "vision_start_token": SPECIAL[START], "vision_end_token": SPECIAL[END],
        },
    )  # fmt: skip
    sizes = {"patch_size": 4, "size": {"shortest_edge": UNIT * UNIT, "longest_edge": 300 * UNIT * UNIT}}
    kind, video = PROCESSORS[name]
    kind(hf.Qwen2VLImageProcessor(**sizes), tokenizer, video(**sizes)).save_pretrained(folder)
    return folder
