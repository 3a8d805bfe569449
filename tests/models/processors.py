"""A processor for the tiny model of each family: the stock image processor, and a text side of a few words."""

from types import SimpleNamespace

import numpy as np
import torch
import transformers as hf

from tests.tiny import IMAGE, PAD


class Lfm2VlImages:
    """As transformers', which needs torchvision, makes a picture that is small enough: patches in rows, and padding."""

    encoder_patch_size, downsample_factor = 4, 2

    def __call__(self, images, return_tensors, do_image_splitting):
        assert not do_image_splitting
        width, height = images.size
        pixels = torch.from_numpy(np.array(images)).float().view(height // 4, 4, width // 4, 4, 3) / 127.5 - 1
        patches = pixels.permute(0, 2, 1, 3, 4).reshape(1, -1, 48)
        return {
            "pixel_values": torch.nn.functional.pad(patches, (0, 0, 0, 16)),
            "spatial_shapes": torch.tensor([[height // 4, width // 4]]),
        }


class KimiImages:
    """As transformers', which needs torchvision, makes a picture of a size that it keeps: patches line by line."""

    patch_size, merge_size = 4, 2

    def __call__(self, images, return_tensors):
        width, height = images.size
        pixels = torch.from_numpy(np.array(images)).float().view(height // 4, 4, width // 4, 4, 3) / 127.5 - 1
        grid = torch.tensor([[1, height // 4, width // 4]])
        return {"pixel_values": pixels.permute(0, 2, 4, 1, 3).flatten(0, 1), "image_grid_thw": grid}


class UnifiedImages:
    """As transformers', which needs torchvision, makes a picture of a size that it keeps: 8 x 8 pixels a token."""

    patch_size, pooling_kernel_size = 4, 2

    def __call__(self, images, return_tensors, do_resize=False, max_soft_tokens=280):
        width, height = images.size
        pixels = torch.from_numpy(np.array(images)).float().view(height // 8, 8, width // 8, 8, 3) / 255
        patches = pixels.transpose(1, 2).reshape(1, -1, 8 * 8 * 3)
        across, down = torch.arange(width // 8), torch.arange(height // 8)
        places = torch.stack(torch.meshgrid(across, down, indexing="xy"), -1).view(1, -1, 2)
        return {
            "pixel_values": torch.nn.functional.pad(patches, (0, 0, 0, 16)),
            "image_position_ids": torch.nn.functional.pad(places, (0, 0, 0, 16), value=-1),
        }


class Molmo2Images:
    """As transformers', which needs torchvision, makes the whole view of a picture: patches line by line, colours last.

    Where its crops would be, the view again.
    """

    def __call__(self, images, return_tensors, max_crops=1):
        assert max_crops == 1
        pixels = torch.from_numpy(np.array(images.resize((28, 28)))).float().view(7, 4, 7, 4, 3) / 127.5 - 1
        places = torch.nn.functional.pad(torch.arange(49).view(7, 7), (0, 1, 0, 1), value=-1)
        pooled = places.view(4, 2, 4, 2).transpose(1, 2).reshape(16, 4)
        return {
            "pixel_values": pixels.transpose(1, 2).reshape(1, 49, 48).repeat(2, 1, 1),
            "image_token_pooling": torch.cat([pooled, torch.where(pooled < 0, -1, pooled + 49)]),
            "image_grids": torch.tensor([[4, 4, 4, 4]]),
        }


SQUARE = {"height": 16, "width": 16}
PATCHES = {"patch_size": 4, "size": {"shortest_edge": 64, "longest_edge": 10**6}}
PROCESSORS = {
    "llava": lambda: hf.CLIPImageProcessor(size={"height": 24, "width": 24}, do_center_crop=False),
    "llava_next": lambda: hf.LlavaNextImageProcessor(
        size={"shortest_edge": 16}, crop_size=16, image_grid_pinpoints=[[16, 32], [32, 16]]
    ),
    "granite4_vision": lambda: hf.LlavaNextImageProcessor(
        size={"shortest_edge": 32}, crop_size=32, image_grid_pinpoints=[[32, 64], [64, 32]]
    ),
    "llava_onevision": lambda: hf.LlavaOnevisionImageProcessor(size=SQUARE, image_grid_pinpoints=[[16, 32], [32, 16]]),
    "qwen2_vl": lambda: hf.Qwen2VLImageProcessor(patch_size=4, min_pixels=64, max_pixels=10**6),
    "qwen2_5_vl": lambda: hf.Qwen2VLImageProcessor(patch_size=4, min_pixels=64, max_pixels=10**6),
    **dict.fromkeys(
        ("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"),
        lambda: hf.Qwen2VLImageProcessor(patch_size=4, min_pixels=64, max_pixels=10**6),
    ),
    "qwen3_vl": lambda: hf.Qwen2VLImageProcessor(patch_size=4, min_pixels=64, max_pixels=10**6),
    "cosmos3_omni": lambda: hf.Qwen2VLImageProcessor(patch_size=4, min_pixels=64, max_pixels=10**6),
    "qwen3_5": lambda: hf.Qwen2VLImageProcessor(patch_size=4, min_pixels=64, max_pixels=10**6),
    "qwen3_5_moe": lambda: hf.Qwen2VLImageProcessor(patch_size=4, min_pixels=64, max_pixels=10**6),
    "lfm2_vl": Lfm2VlImages,
    "lfm3_vl": lambda: hf.Qwen2VLImageProcessor(patch_size=4, min_pixels=64, max_pixels=10**6),
    "qwen3_vl_moe": lambda: hf.Qwen2VLImageProcessor(patch_size=4, min_pixels=64, max_pixels=10**6),
    "internvl": lambda: hf.GotOcr2ImageProcessor(size={"height": 32, "width": 32}),
    "idefics3": lambda: hf.Idefics3ImageProcessor(size={"longest_edge": 64}, max_image_size={"longest_edge": 32}),
    "smolvlm": lambda: hf.SmolVLMImageProcessor(size={"longest_edge": 64}, max_image_size={"longest_edge": 32}),
    **dict.fromkeys(("gemma4", "gemma4_e2b"), lambda: hf.Gemma4ImageProcessor(patch_size=4, pooling_kernel_size=2)),
    "gemma4_unified": UnifiedImages,
    "gemma3": lambda: hf.Gemma3ImageProcessor(size={"height": 32, "width": 32}),
    "mistral3": lambda: hf.PixtralImageProcessor(size={"longest_edge": 10000}),
    "vipllava": lambda: hf.CLIPImageProcessor(size=SQUARE, do_center_crop=False),
    # Cohere's own and Llama's need torchvision; the former crops by the same rule.
    **dict.fromkeys(
        ("aya_vision", "cohere2_vision", "llama4"),
        lambda: hf.GotOcr2ImageProcessor(size={"height": 32, "width": 32}),
    ),
    "llava_next_video": lambda: PROCESSORS["llava_next"](),
    "video_llava": lambda: hf.VideoLlavaImageProcessor(size={"shortest_edge": 16}, crop_size=SQUARE),
    **dict.fromkeys(("glm4v", "glm4v_moe"), lambda: hf.Glm4vImageProcessor(**PATCHES)),
    "glm46v": lambda: hf.Glm46VImageProcessor(**PATCHES),
    "glmga": lambda: hf.GlmgaImageProcessor(**PATCHES),
    "paddleocr_vl": lambda: hf.PaddleOCRVLImageProcessor(patch_size=4, min_pixels=64, max_pixels=10**6),
    "ernie4_5_vl_moe": lambda: hf.Ernie4_5_VLMoeImageProcessor(**PATCHES),
    "kimi_k25": KimiImages,
    **dict.fromkeys(
        ("minicpmv4_6", "minicpmv4_7"), lambda: hf.MiniCPMV4_6ImageProcessor(patch_size=4, scale_resolution=64)
    ),
    "minicpm_ocr": lambda: hf.MiniCPMV4_6ImageProcessor(patch_size=4, scale_resolution=64, downsample_mode="4x"),
    "molmo2": Molmo2Images,
    "ovis2": lambda: hf.Ovis2ImageProcessor(size={"height": 32, "width": 32}),
    "deepseek_vl": lambda: hf.DeepseekVLImageProcessor(size=SQUARE),
    "paligemma": lambda: hf.SiglipImageProcessor(size=SQUARE),
}
MOLMO2 = [*[IMAGE] * 4, 95] * 4
IMAGE_TOKENS = {"molmo2": [97, *MOLMO2, 93, 96, *MOLMO2, 93]}
"""What stands for a picture in a prompt, where that is no image token alone."""


class TinyProcessor:
    """What building asks of a processor; every word of a prompt is the token of its length."""

    chat_template = "stock"

    def __init__(self, name: str) -> None:
        self.image_processor, self.image = PROCESSORS[name](), IMAGE_TOKENS.get(name, [IMAGE])
        self.patch_size, self.spatial_merge_size = 4, 2  # Mistral 3's processor says so to its image processor
        self.tokenizer = SimpleNamespace(
            pad_token_id=PAD, bos_token=None, unk_token_id=None, added_tokens_decoder={},
            all_special_tokens=["<image>"],
        )  # fmt: skip

    def apply_chat_template(self, turns, **options):
        [turn] = turns
        words = ("<image>" if part["type"] == "image" else part["text"] for part in turn["content"])
        return f"user {' '.join(words)} assistant"

    def __call__(self, images, text, return_tensors, **options):
        words = [self.image if word == "<image>" else [20 + len(word)] for word in text.split()]
        return {"input_ids": torch.tensor([[token for word in words for token in word]])}
