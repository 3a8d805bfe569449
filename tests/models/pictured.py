"""Processors of the tiny models that take pictures: stock image processors, and a text side that counts for them."""

from types import SimpleNamespace

import torch
import transformers as hf

from tests.models.processors import PROCESSORS
from tests.models.prompts import NEWLINE, SEPARATOR
from tests.tiny import IMAGE, PAD

TEXT = [21, 22, 23]
ARGUMENTS = {
    "pixel_values", "image_sizes", "image_grid_thw", "spatial_shapes", "pixel_attention_mask", "image_position_ids",
    "target_sizes", "image_merge_sizes", "high_res_pixel_values", "image_token_pooling", "image_grids",
}  # fmt: skip
OPTIONS = {
    "lfm2_vl": {"do_image_splitting": False},
    "mistral3": {"patch_size": 8},
    **{name: {"crop_to_patches": True} for name in ("internvl", "aya_vision", "cohere2_vision", "llama4", "ovis2")},
}
"""What their processors tell the image processors of some families."""


class Pictured:
    """The processor of a tiny model: prompts of one picture each, with as many image tokens as the model encodes."""

    image_token, chat_template = "<image>", None
    tokenizer = SimpleNamespace(bos_token=None)

    def __init__(self, tiny, target, images=None):
        self.tiny, self.target, self.known = tiny, target, {}
        tiny.kind = "image"  # GLM's
        self.image_processor = (images or PROCESSORS[tiny.name])()

    def __call__(self, images, text, padding, padding_side, return_tensors):
        made = [self._one(picture) for [picture] in images]
        longest = max(len(ids) for ids, _ in made)
        ids = torch.tensor([[PAD] * (longest - len(one)) + one for one, _ in made])
        given = {
            "input_ids": ids,
            "attention_mask": (ids != PAD).long(),
            **self._joined([given for _, given in made]),
        }
        return hf.BatchFeature(given | self.tiny.types(ids))

    def _joined(self, made):
        """What pictures are made of, of a batch."""
        if self.tiny.name == "molmo2":
            return self.tiny.collate([made])
        row = self.tiny.name.startswith("minicpm")
        return {
            name: torch.cat([given[name] for given in made], -1 if row and name == "pixel_values" else 0)
            for name in made[0]
        }

    def _one(self, picture):
        given = dict(self.image_processor(images=picture, return_tensors="pt", **OPTIONS.get(self.tiny.name, {})))
        if self.tiny.name == "lfm2_vl":
            given["pixel_values"] = given["pixel_values"][:, :-16]  # pictures of several sizes are not in one batch
            given["pixel_attention_mask"] = torch.ones(given["pixel_values"].shape[:2], dtype=torch.long)
        given = {name.replace("_values_images", "_values"): torch.as_tensor(value) for name, value in given.items()}
        given = {name: value for name, value in given.items() if name in ARGUMENTS}
        return [*TEXT, *self.tokens(given), *TEXT], given

    def tokens(self, given):
        """The tokens of a picture; what is asked once is the same for all pictures of that shape."""
        key = tuple((name, *(value.flatten().tolist() if "pixel" not in name else value.shape))
                    for name, value in given.items())  # fmt: skip
        if key not in self.known:
            self.known[key] = self._tokens(given)
        return self.known[key]

    @torch.no_grad()
    def _tokens(self, given):
        draw, base = torch.zeros, self.target.base_model
        pieces = given["pixel_values"].shape[:2][given["pixel_values"].dim() == 5]
        if self.tiny.name in ("aya_vision", "cohere2_vision", "llama4", "ovis2"):
            return self.tiny.image(draw, pieces - 1)[0]
        if self.tiny.name in ("idefics3", "smolvlm"):
            crops = [token for _ in range(pieces - 1) for token in [SEPARATOR, 80] + [IMAGE] * 16]
            return [*crops, NEWLINE, *self.tiny.image(draw)[0]]
        if "target_sizes" in given:
            return self.tiny.shown(draw, (given["target_sizes"] // self.tiny.merge).tolist())[0]
        out = base.get_image_features(**given, return_dict=True)
        features = out.deepstack_features[0][1] if self.tiny.name == "granite4_vision" else out.pooler_output
        parts = features if isinstance(features, list | tuple) else features.flatten(0, -2)[None]
        count = sum(len(part.flatten(0, -2)) for part in parts)
        if self.tiny.name == "mistral3":
            rows, cols = (side // 8 for side in given["image_sizes"][0].tolist())
            return [token for _ in range(rows) for token in [IMAGE] * cols + [NEWLINE]]
        return [SEPARATOR] + [IMAGE] * count + [SEPARATOR]
