"""A tiny random model of each family and prompts for it: real stock classes, hand-made pixels, nothing downloaded.

Prompts are lists of words (ids less 20), "image", "large" (an image of several crops, or simply of another size) and
"video".
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import transformers as hf
from packaging.version import Version

from codebook import models
from tests.tiny import IMAGE, PAD, VOCAB, llava

VIDEO, SEPARATOR, GLOBAL, NEWLINE = 98, 97, 96, 95
AUDIO = (90, 88, 89)
"""Tokens of audio: begin, content, end."""
TOKENS = {"image": IMAGE, "video": VIDEO}
SIGLIP = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "patch_size": 4,
}  # fmt: skip
TEXT = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2,
}  # fmt: skip


@dataclass
class Tiny:
    """One family: how to make a model, and what its prompts and pixels look like.

    Attributes
    ----------
    name, config, cls
        The `model_type`, a function that makes the config, and the name of transformers' class.
    videos
        Whether prompts may show "video".
    axes
        Axes of its position ids.
    patches
        Rows, and columns, of the patches that the tower makes of one image or crop.
    crops
        Most crops of an image, where its pixels are (1, 1 + crops, 3, H, W), the whole view first; else None.
    resizes
        Whether the tower takes images of any size, so that `downsample` works.
    tower
        Whether it has a vision tower, which methods can ask how it attends.
    never
        Tokens that are not to be generated: in a forward of the whole sequence they would mean something else.
    tolerance
        How far logits may be from the reference's, as a share of the largest.
    """

    name: str
    config: object
    cls: str
    videos: bool = False
    axes: int = 1
    seed: int = 0
    patches, crops, resizes, tower, tolerance = 8, None, False, True, 2e-5
    never = (IMAGE, VIDEO)

    @property
    def family(self):
        """The family's name."""
        return self.name.removesuffix("_e2b")

    @property
    def flexible(self):
        """Whether the stock class takes FlexAttention."""
        return self.name == "llava" or getattr(hf, self.cls)._supports_flex_attn

    def make(self, attention="sdpa"):
        torch.manual_seed(self.seed)
        config = self.config()
        config._attn_implementation = attention
        model = getattr(hf, self.cls)(config).eval()
        for name, weight in model.named_parameters():  # stock initialisation leaves these at zero
            if any(
                word in name
                for word in (
                    "mm_input_projection_weight",
                    "cls_token",
                    "position_embeddings",
                    "pos_embedding",
                    "positional_embedding",
                )
            ):
                weight.data.normal_(std=0.5)
        model.generation_config.pad_token_id, model.generation_config.eos_token_id = PAD, None  # never stops early
        return model

    def columns(self, rows):
        """For each image or video the shapes of its grids and the columns of its visual tokens, in order."""
        ids, out = self.inputs(rows)["input_ids"], []
        for i, row in enumerate(self.rows(rows)):
            parts = [self.part(part, 0) for part in row]
            start = ids.shape[1] - sum(len(part[0]) for part in parts)
            for tokens, _, *shape in parts:
                if shape:
                    grids, structural = shape
                    visual = [j for j, token in enumerate(tokens) if token in (IMAGE, VIDEO) and j not in structural]
                    assert len(visual) == sum(a * b for a, b in grids)
                    out.append((i, grids, torch.tensor([start + j for j in visual])))
                start += len(tokens)
        return out

    def rows(self, rows):
        return rows

    def inputs(self, rows):
        """Model inputs of prompts, left-padded."""
        parts = [[self.part(part, i * 10 + j) for j, part in enumerate(row)]
                 for i, row in enumerate(self.rows(rows))]  # fmt: skip
        ids = [[token for part in row for token in part[0]] for row in parts]
        longest = max(map(len, ids))
        out = {
            "input_ids": torch.tensor([[PAD] * (longest - len(row)) + row for row in ids]),
            "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids]),
        }
        return (
            out | self.collate([[part[1] for part in row if part[1]] for row in parts]) | self.types(out["input_ids"])
        )

    def part(self, part, seed):
        if isinstance(part, int):
            return [part + 20], {}
        generator = torch.Generator().manual_seed(seed)
        return getattr(self, part)(lambda *size: 2 * torch.rand(*size, generator=generator) - 1)

    def collate(self, rows):
        pieces = [piece for row in rows for piece in row]
        names = {name for piece in pieces for name in piece}
        return {name: torch.cat([piece[name] for piece in pieces if name in piece]) for name in names}

    def types(self, ids):
        return {}


class Fixed(Tiny):
    """Every image is the same: sixteen tokens."""

    side, tokens, patches = 16, 16, 4

    def image(self, draw):
        side = int(self.tokens**0.5)
        return [IMAGE] * self.tokens, {"pixel_values": draw(1, 3, self.side, self.side)}, [(side, side)], []

    large = image


class Llava(Fixed):
    side, tokens, patches, resizes = 24, 36, 6, True

    def make(self, attention="sdpa"):
        return llava(attention)


class LlavaNext(Tiny):
    """Base view of 4 x 4 tokens; a large image has two crops, of which padding takes a row away."""

    crops, patches = 2, 4

    def image(self, draw):
        pixels = torch.cat([draw(1, 1, 3, 16, 16), torch.zeros(1, self.crops, 3, 16, 16)], 1)
        pixels[:, 1] = draw(1, 3, 16, 16)
        pixels[:, 2] = draw(1, 3, 16, 16)
        # 16 x 32 pixels, 4 x 8 tokens and 4 newlines
        pieces = {"pixel_values": pixels, "image_sizes": torch.tensor([[16, 32]])}
        return [IMAGE] * (16 + 4 * 9), pieces, [(4, 4), (4, 8)], range(24, 52, 9)

    def large(self, draw):
        # 32 x 8 pixels in 32 x 16: the crops' grid loses a column on each side
        pieces = {"pixel_values": draw(1, 3, 3, 16, 16), "image_sizes": torch.tensor([[32, 8]])}
        return [IMAGE] * (16 + 8 * 3), pieces, [(4, 4), (8, 2)], range(18, 40, 3)


class Onevision(LlavaNext):
    def rows(self, rows):
        """Of several images in a sample only the whole views are shown."""
        count = [self.count(row) for row in rows]
        return [["view" if n > 1 and part in ("image", "large") else part for part in row]
                for n, row in zip(count, rows, strict=True)]  # fmt: skip

    def count(self, row):
        return sum(part in ("image", "large") for part in row)

    def inputs(self, rows):
        counts = [count for row in rows if (count := self.count(row))]
        return super().inputs(rows) | ({"batch_num_images": torch.tensor(counts)} if counts else {})

    def view(self, draw):
        pixels = torch.cat([draw(1, 1, 3, 16, 16), torch.zeros(1, 2, 3, 16, 16)], 1)
        return [IMAGE] * 17, {"pixel_values": pixels, "image_sizes": torch.tensor([[16, 32]])}, [(4, 4)], [16]

    def video(self, draw):
        return [VIDEO] * (3 * 4 + 1), {"pixel_values_videos": draw(1, 3, 3, 16, 16)}, [(2, 2)] * 3, [12]


class Qwen(Tiny):
    """Patches of 4 x 4 pixels and 2 frames; 4 x 4 tokens an image, 6 x 2 a large one, two frames of 4 x 2 a video."""

    def image(self, draw):
        return self._grid(draw, "image", 1, 8, 8)

    def large(self, draw):
        return self._grid(draw, "image", 1, 12, 4)

    def video(self, draw):
        return self._grid(draw, "video", 2, 8, 4)

    def _grid(self, draw, kind, frames, height, width):
        name = "pixel_values" if kind == "image" else "pixel_values_videos"
        ids = [IMAGE if kind == "image" else VIDEO] * (height * width // 4)
        pixels = draw(frames * height * width, 3 * 2 * 4 * 4)
        pieces = {name: pixels, f"{kind}_grid_thw": torch.tensor([[frames, height, width]])}
        return self.joined(ids, frames), pieces, [(height // 2, width // 2)] * frames, []

    def joined(self, ids, frames):
        return ids * frames

    def types(self, ids):
        return {"mm_token_type_ids": (ids == IMAGE).long() + 2 * (ids == VIDEO).long()}


class Qwen3(Qwen):
    def joined(self, ids, frames):
        return [token for i in range(frames) for token in [SEPARATOR] * (i > 0) + ids]


class Omni(Qwen):
    """Images and videos between a begin and an end, by which positions are counted; audio between its own."""

    never = (IMAGE, VIDEO, 94, 93, *AUDIO)

    def joined(self, ids, frames):
        return [94, *ids * frames, 93]

    def video(self, draw):
        ids, pieces, *rest = super().video(draw)
        return ids, pieces | {"video_second_per_grid": torch.tensor([0.5])}, *rest

    def audio(self, draw):
        begin, token, end = AUDIO
        pieces = {"input_features": draw(1, 8, 16), "feature_attention_mask": torch.ones(1, 16, dtype=torch.long)}
        return [begin, *[token] * (4 if self.name == "qwen2_5_omni_thinker" else 2), end], pieces

    def film(self, draw):
        """A video with its sound, in the order of time: half a second a frame, so that none or one is after it."""
        (_, *seen, _), pieces, *rest = self.video(draw)
        (begin, *heard, end), sound = self.audio(draw)
        after = 16 if self.name == "qwen2_5_omni_thinker" else 8  # the former counts in chunks of two seconds
        return [94, begin, *seen[:after], *heard, *seen[after:], end, 93], pieces | sound, *rest

    def types(self, ids):
        return {}


class Lfm2(Tiny):
    """Patches of 4 x 4 pixels, in rows padded to 80; 4 x 4 tokens an image, 2 x 6 a large one."""

    flexible = False  # SigLIP 2 is not

    def image(self, draw):
        return self._grid(draw, 8, 8)

    def large(self, draw):
        return self._grid(draw, 4, 12)

    def _grid(self, draw, rows, cols):
        count = rows * cols
        pieces = {
            "pixel_values": torch.nn.functional.pad(draw(1, count, 48), (0, 0, 0, 80 - count)),
            "spatial_shapes": torch.tensor([[rows, cols]]),
            "pixel_attention_mask": (torch.arange(80) < count).long()[None],
        }
        return [SEPARATOR] + [IMAGE] * (count // 4) + [SEPARATOR], pieces, [(rows // 2, cols // 2)], []


class Lfm3(Qwen3):
    def types(self, ids):
        return {}


class Mixture(Qwen3):
    """A mixture of experts: the stock model's own logits for a row differ by 1e-5 between alone and in a batch."""

    tolerance = 1e-4


class InternVL(Tiny):
    def image(self, draw):
        return [SEPARATOR] + [IMAGE] * 16 + [SEPARATOR], {"pixel_values": draw(1, 3, 32, 32)}, [(4, 4)], []

    def large(self, draw):
        return [SEPARATOR] + [IMAGE] * 48 + [SEPARATOR], {"pixel_values": draw(3, 3, 32, 32)}, [(4, 4)] * 3, []


class Idefics3(Tiny):
    """2 x 2 crops with their tags (ids 80 to 83), then the whole view."""

    def image(self, draw):
        return [SEPARATOR, GLOBAL] + [IMAGE] * 16 + [SEPARATOR], {"crops": draw(1, 3, 32, 32)}, [(4, 4)], []

    def large(self, draw):
        ids = []
        for row in range(2):
            for col in range(2):
                ids += [SEPARATOR, 80 + 2 * row + col] + [IMAGE] * 16
            ids += [NEWLINE]
        return [*ids, *self.image(draw)[0]], {"crops": draw(5, 3, 32, 32)}, [(4, 4)] * 5, []

    def collate(self, rows):
        crops = [torch.cat([piece["crops"] for piece in row]) for row in rows]
        most = max(map(len, crops))
        pad = [torch.cat([c, torch.zeros(most - len(c), *c.shape[1:])]) for c in crops]
        return {"pixel_values": torch.stack(pad)}


class Tagged(Tiny):
    """Crops after a tag token, then the whole view after another one; no tags but line breaks for Cohere2."""

    def image(self, draw, crops=0):
        ids = [SEPARATOR]
        for crop in range(crops + 1):
            if self.name == "cohere2_vision":
                ids += [IMAGE] * 16 + [NEWLINE]
            else:
                ids += [80 + crop if crop < crops else GLOBAL] + [IMAGE] * 16
        return [*ids, SEPARATOR], {"pixel_values": draw(1 + crops, 3, 32, 32)}, [(4, 4)] * (1 + crops), []

    def large(self, draw):
        return self.image(draw, 2)


class Llama4(Tiny):
    """Crops between separators, then the whole view after a tag, all of it between a begin and an end."""

    def image(self, draw, crops=0):
        ids = [SEPARATOR]
        for crop in range(crops):
            ids += [*[IMAGE] * 16, 80 + (crop == crops - 1)]
        return [*ids, GLOBAL, *[IMAGE] * 16, NEWLINE], {"pixel_values": draw(1 + crops, 3, 32, 32)}, (
            [(4, 4)] * (1 + crops)
        ), []  # fmt: skip

    def large(self, draw):
        return self.image(draw, 2)


class Ovis2(Tiny):
    """The whole view, then crops, between tokens 80 to 84 that the model embeds by a table of its own."""

    never = (IMAGE, VIDEO, *range(80, 85))

    def image(self, draw, crops=0):
        ids = [80, *[IMAGE] * 16, 81]
        for crop in range(crops):
            ids += [IMAGE] * 16 + [82] * (crop < crops - 1)
        return [*ids, 84], {"pixel_values": draw(1 + crops, 3, 32, 32)}, [(4, 4)] * (1 + crops), []

    def large(self, draw):
        return self.image(draw, 2)


class NextVideo(LlavaNext):
    def video(self, draw):
        return [VIDEO] * (3 * 4), {"pixel_values_videos": draw(1, 3, 3, 16, 16)}, [(2, 2)] * 3, []


class VideoLlava(Fixed):
    def video(self, draw):
        pixels = {"pixel_values_videos": draw(1, 3, 3, 16, 16)}
        return [VIDEO] * (3 * 17), pixels, [(4, 4)] * 3, range(0, 51, 17)


class Mistral3(Tiny):
    """Patches of 4 x 4 pixels, two by two a token, rows ended by a token of text; 4 x 4 tokens and 2 x 6."""

    def image(self, draw, rows=4, cols=4):
        ids = [token for row in range(rows) for token in [IMAGE] * cols + [NEWLINE if row < rows - 1 else SEPARATOR]]
        sizes = torch.tensor([[8 * rows, 8 * cols]])
        pixels = torch.nn.functional.pad(draw(1, 3, 8 * rows, 8 * cols), (0, 48 - 8 * cols, 0, 32 - 8 * rows))
        return ids, {"pixel_values": pixels, "image_sizes": sizes}, [(rows, cols)], []

    def large(self, draw):
        return self.image(draw, 2, 6)

    def collate(self, rows):
        given = super().collate(rows)
        if given:  # no wider than the widest
            (height, width), pixels = given["image_sizes"].amax(0).tolist(), given["pixel_values"]
            given["pixel_values"] = pixels[:, :, :height, :width]
        return given


class Glm(Qwen3):
    """Videos have the token of images, and so cannot stand beside them in a batch."""

    def rows(self, rows):
        videos = any("video" in row for row in rows)
        return [[part for part in row if not (videos and part in ("image", "large"))] for row in rows]

    def part(self, part, seed):
        self.kind = part if part == "video" else getattr(self, "kind", None)
        return super().part(part, seed)

    def inputs(self, rows):
        self.kind = None
        return super().inputs(rows)

    def _grid(self, draw, kind, frames, height, width):
        ids, *rest = super()._grid(draw, kind, frames, height, width)
        return [IMAGE if token == VIDEO else token for token in ids], *rest

    def types(self, ids):
        return {"mm_token_type_ids": (ids == IMAGE).long() * (2 if self.kind == "video" else 1)}


class Paddle(Qwen):
    def _grid(self, draw, kind, frames, height, width):
        ids, pieces, *rest = super()._grid(draw, kind, frames, height, width)
        return ids, pieces | {"pixel_values": draw(frames * height * width, 3, 4, 4)}, *rest


class Kimi(Paddle):
    def types(self, ids):
        return {}


class Ernie(Qwen):
    """Pairs of frames are merged after the tower; a begin and an end go to the experts of images too."""

    def image(self, draw):
        ids, *rest = super().image(draw)
        return [SEPARATOR, *ids, SEPARATOR], *rest

    def video(self, draw):
        ids, pieces, grids, structural = self._grid(draw, "video", 4, 8, 4)
        return ids[: len(ids) // 2], pieces, grids[:2], structural

    def _grid(self, draw, kind, frames, height, width):
        ids, pieces, *rest = super()._grid(draw, kind, frames, height, width)
        name = "pixel_values" if kind == "image" else "pixel_values_videos"
        return ids, pieces | {name: draw(frames * height * width, 3 * 4 * 4)}, *rest

    def types(self, ids):
        given = super().types(ids)
        return given | {"moe_mm_token_type_ids": given["mm_token_type_ids"] + (ids == SEPARATOR)}


class Gemma4(Tiny):
    """Patches in rows with their places, padded to the longest; 4 x 4 tokens, 6 x 2, and two frames of 4 x 2."""

    side = 2

    def image(self, draw, kind="image", frames=1, rows=4, cols=4):
        down, across = (torch.arange(self.side * count) for count in (rows, cols))
        places = torch.stack(torch.meshgrid(across, down, indexing="xy"), -1)
        count, width = len(down) * len(across), 3 * (8 // self.side) ** 2
        more = 64 - count
        pixels = torch.nn.functional.pad((draw(frames, count, width) + 1) / 2, (0, 0, 0, more))
        places = torch.nn.functional.pad(places.flatten(0, 1).expand(frames, -1, -1), (0, 0, 0, more), value=-1)
        ids = [token for i in range(frames) for token in [SEPARATOR] * (i > 0) + [TOKENS[kind]] * (rows * cols)]
        name = "pixel_values" if kind == "image" else "pixel_values_videos"
        pieces = {name: pixels, f"{kind}_position_ids": places}
        if kind == "video":
            pieces["num_frames_per_video"] = torch.tensor([frames])
        return ids, pieces, [(rows, cols)] * frames, []

    def large(self, draw):
        return self.image(draw, rows=6, cols=2)

    def collate(self, rows):
        given = super().collate(rows)
        for kind in TOKENS:
            if (places := given.get(f"{kind}_position_ids")) is not None:
                longest = int((places >= 0).all(-1).sum(-1).max())
                for name in (f"{kind}_position_ids", "pixel_values" if kind == "image" else "pixel_values_videos"):
                    given[name] = given[name][:, :longest]
        return given

    def video(self, draw):
        return self.image(draw, "video", 2, 4, 2)

    def types(self, ids):
        return {"mm_token_type_ids": (ids == IMAGE).long() + 2 * (ids == VIDEO).long()}


class Gemma4Unified(Gemma4):
    """Each patch is a token."""

    side, patches, tower = 1, 4, False


class Molmo2(Glm):
    """7 x 7 patches, two by two of them a token; a large image has two crops that overlap in two columns of patches.

    Tokens before, between and behind the rows of an image are of its block. Videos have the images' token.
    """

    patches = 7
    never = (IMAGE, *range(91, 98))

    def image(self, draw):
        return self._shown(draw, [numbered(7, 7)])

    def large(self, draw):
        left, right = numbered(7, 7), numbered(7, 7) + 49
        crops = torch.cat([left[:, :6], right[:, 1:]], 1)
        return self._shown(draw, [numbered(7, 7), crops + 49])

    def video(self, draw):
        ids, given, grids, structural = self._shown(draw, [numbered(7, 7) + 49 * i for i in range(2)])
        names = {"pixel_values": "pixel_values_videos", "image_token_pooling": "video_token_pooling"}
        given = {new: given[old] for old, new in names.items()} | {"video_grids": torch.tensor([[2, 4, 4]])}
        return ids, given, grids, structural

    def _shown(self, draw, grids):
        pooled = [self._pooled(grid) for grid in grids]
        ids = [token for part in pooled for token in self._tokens(*part.shape[:2])]
        sizes = [size for part in [*pooled, torch.zeros(0, 0)][:2] for size in part.shape[:2]]
        count = 1 + max(int(part.max()) for part in pooled) // 49
        return ids, {
            "pixel_values": draw(count, 49, 48),
            "image_token_pooling": torch.cat([part.flatten(0, 1) for part in pooled]),
            "image_grids": torch.tensor([sizes]),
        }, [part.shape[:2] for part in pooled], []  # fmt: skip

    def _pooled(self, grid):
        padded = torch.nn.functional.pad(grid, (0, grid.shape[1] % 2, 0, grid.shape[0] % 2), value=-1)
        return padded.unflatten(0, (-1, 2)).unflatten(2, (-1, 2)).transpose(1, 2).flatten(2)

    def _tokens(self, rows, cols):
        return [SEPARATOR, *[*[IMAGE] * cols, NEWLINE] * rows, 93]

    def collate(self, rows):
        """Patches are counted through the batch."""
        before = 0
        for piece in (piece for row in rows for piece in row):
            kind = "video" if "video_grids" in piece else "image"
            pooled = piece[f"{kind}_token_pooling"]
            piece[f"{kind}_token_pooling"] = torch.where(pooled < 0, -1, pooled + before)
            before += 49 * len(piece["pixel_values" if kind == "image" else "pixel_values_videos"])
        return super().collate(rows)

    def types(self, ids):
        return {"mm_token_type_ids": torch.isin(ids, torch.tensor([IMAGE, SEPARATOR, NEWLINE, 93])).long()}


def numbered(rows, cols):
    return torch.arange(rows * cols).view(rows, cols)


class MiniCPM(Tiny):
    """Patches of 4 x 4 pixels in one row, 4 x 4 of them a token; of a large image 2 x 2 crops of 2 x 2 tokens.

    For MiniCPM-OCR the tower merges none, and 2 x 2 are a token.
    """

    never = (IMAGE, VIDEO, *range(91, 96))

    def image(self, draw):
        return self.shown(draw, [(4, 4)])

    def large(self, draw):
        return self.shown(draw, [(2, 4), *[(2, 2)] * 4])

    def video(self, draw):
        return self.shown(draw, [(4, 2)] * 2, "video")

    @property
    def merge(self):
        return 2 if self.name == "minicpm_ocr" else 4

    def shown(self, draw, grids, kind="image"):
        ids = []
        for i, (rows, cols) in enumerate(grids):
            begin, end = (94, 93) if kind == "video" or not i else (92, 91)
            ids += [NEWLINE] * (i == 3) + [begin, *[TOKENS[kind]] * (rows * cols), end]
        name, sizes = ("pixel_values", "target_sizes") if kind == "image" else (
            "pixel_values_videos", "target_sizes_videos"
        )  # fmt: skip
        sides = torch.tensor(grids) * self.merge
        return ids, {name: draw(1, 3, 4, 4 * int(sides.prod(-1).sum())), sizes: sides}, grids, []

    def collate(self, rows):
        given = super().collate([[{k: v for k, v in piece.items() if "sizes" in k} for piece in row] for row in rows])
        for name in ("pixel_values", "pixel_values_videos"):
            if pixels := [piece[name] for row in rows for piece in row if name in piece]:
                given[name] = torch.cat(pixels, -1)
        return given

    def types(self, ids):
        return {"mm_token_type_ids": (ids == IMAGE).long() + 2 * (ids == VIDEO).long()} if self.axes > 1 else {}


class Gemma3(Fixed):
    side, patches = 32, 8

    def types(self, ids):
        return {"token_type_ids": (ids == IMAGE).long()}


class VipLlava(Fixed):
    resizes = True


class PaliGemma(Fixed):
    def types(self, ids):
        return {"token_type_ids": torch.zeros_like(ids)}


def _clip(side):
    return hf.CLIPVisionConfig(**SIGLIP, image_size=side, projection_dim=32)


def _siglip(side):
    return hf.SiglipVisionConfig(**SIGLIP, image_size=side, vision_use_head=False)


def _next():
    return hf.LlavaNextConfig(
        vision_config=_clip(16), text_config=hf.MistralConfig(**TEXT, sliding_window=None), image_token_index=IMAGE,
        image_grid_pinpoints=[[16, 32], [32, 16]], vision_feature_layer=-2, vision_feature_select_strategy="default",
    )  # fmt: skip


def _onevision():
    return hf.LlavaOnevisionConfig(
        vision_config=_siglip(16), text_config=hf.Qwen2Config(**TEXT), image_token_index=IMAGE, vision_feature_layer=-1,
        video_token_index=VIDEO, image_grid_pinpoints=[[16, 32], [32, 16]], vision_feature_select_strategy="full",
    )  # fmt: skip


def _qwen(cls, text, vision, interleaved=False):
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    extra = {"mrope_interleaved": True} if interleaved else {}
    ids = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": 94, "vision_end_token_id": 93}
    more = {"head_dim": 16} if extra else {}
    text = {**TEXT, "rope_parameters": rope | extra, **more, **(text or {})}
    return cls(text_config=text, vision_config=vision, **ids)


def _hybrid(cls, **more):
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


def _minicpm(cls, **more):
    vision = SIGLIP | {"image_size": 64}
    text = _hybrid(hf.Qwen3_5Config).text_config
    return cls(vision_config=vision, text_config=text, insert_layer_id=0, image_token_id=IMAGE, video_token_id=VIDEO,
               **more)  # fmt: skip


CONVOLUTIONS = {"layer_types": ["full_attention", "conv"] * 2}


def _lfm2():
    vision = hf.Siglip2VisionConfig(**SIGLIP, num_patches=64, vision_use_head=False)
    text = hf.Lfm2Config(**TEXT | CONVOLUTIONS, block_auto_adjust_ff_dim=False)
    return hf.Lfm2VlConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, projector_hidden_size=64)


def _lfm3():
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "patch_size": 4, **CONVOLUTIONS,
    }  # fmt: skip
    ids = {"image_token_id": IMAGE, "video_token_id": VIDEO}
    text = TEXT | CONVOLUTIONS
    return hf.Lfm3VlConfig(vision_config=vision, text_config=text, projector_hidden_size=64, **ids)


def _omni(config, text=None, **vision):
    audio = {"num_mel_bins": 8, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16, "d_model": 16}
    audio |= {"initializer_range": 0.4}
    audio |= {"output_dim": 64, "downsample_hidden_size": 4} if "3" in config.__name__ else {"output_dim": 64}
    begin, token, end = AUDIO
    more = {"audio_config": audio, "audio_start_token_id": begin, "audio_token_id": token, "audio_end_token_id": end}
    vision = QWEN_VISION | {"hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 64, **vision}
    return _qwen(functools.partial(config, **more), text, vision, "Qwen3" in config.__name__)


EXPERTS = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
MIXTURE = EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 32}
QWEN_VISION = {"depth": 3, "num_heads": 4, "patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2}


def _internvl():
    vision = hf.InternVLVisionConfig(
        **SIGLIP | {"patch_size": (4, 4)}, image_size=(32, 32), layer_scale_init_value=1.0, initializer_range=0.2
    )
    return hf.InternVLConfig(
        vision_config=vision, text_config=hf.Qwen2Config(**TEXT), image_token_id=IMAGE, image_seq_length=16
    )


def _idefics3(cls):
    text = hf.LlamaConfig(**TEXT)
    return cls(vision_config=SIGLIP | {"image_size": 32}, text_config=text, image_token_id=IMAGE, scale_factor=2)


def _mistral3():
    return hf.Mistral3Config(
        vision_config=hf.PixtralVisionConfig(**SIGLIP, image_size=64, initializer_range=0.3),
        text_config=hf.MistralConfig(**TEXT), image_token_index=IMAGE, spatial_merge_size=2,
    )  # fmt: skip


def _vipllava():
    return hf.VipLlavaConfig(
        vision_config=_clip(16), text_config=hf.LlamaConfig(**TEXT), image_token_index=IMAGE,
        vision_feature_layer=[-2, 1], image_seq_length=16,
    )  # fmt: skip


def _cohere(cls, **more):
    kinds = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    text = hf.Cohere2Config(**TEXT, sliding_window=12, layer_types=kinds)
    return cls(vision_config=_siglip(32), text_config=text, **more)


def _next_video():
    return hf.LlavaNextVideoConfig(
        vision_config=_clip(16), text_config=hf.LlamaConfig(**TEXT), image_token_index=IMAGE, video_token_index=VIDEO,
        image_grid_pinpoints=[[16, 32], [32, 16]],
    )  # fmt: skip


def _video_llava():
    return hf.VideoLlavaConfig(
        vision_config=_clip(16), text_config=hf.LlamaConfig(**TEXT), image_token_index=IMAGE, video_token_index=VIDEO,
    )  # fmt: skip


def _paddle():
    vision = {name: value for name, value in SIGLIP.items()} | {"image_size": 32}
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    return hf.PaddleOCRVLConfig(
        vision_config=vision, text_config=TEXT | {"head_dim": 16, "rope_parameters": rope}, image_token_id=IMAGE,
        video_token_id=VIDEO, vision_start_token_id=94, vision_end_token_id=93,
    )  # fmt: skip


def _glm(cls, **text):
    rope = {"rope_type": "default", "mrope_section": [1, 2, 1], "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    vision = {
        "depth": 3, "hidden_size": 32, "num_heads": 4, "patch_size": 4, "image_size": 32, "intermediate_size": 64,
        "out_hidden_size": 64,
    }  # fmt: skip
    ids = {"image_token_id": IMAGE, "video_token_id": VIDEO, "image_start_token_id": 94, "image_end_token_id": 93}
    ids |= {"video_start_token_id": 92, "video_end_token_id": 91}
    return cls(text_config={**TEXT, "rope_parameters": rope, **text}, vision_config=vision, **ids)


def _ernie():
    rope = {"rope_type": "default", "mrope_section": [3, 3, 2], "rope_theta": 10000.0}
    text = {"moe_intermediate_size": [32, 24], "moe_k": 2, "moe_num_experts": 4, "moe_num_shared_experts": 1}
    vision = {"depth": 3, "hidden_size": 32, "num_heads": 4, "patch_size": 4, "intermediate_size": 64}
    return hf.Ernie4_5_VLMoeConfig(
        text_config={**TEXT, "rope_parameters": rope, **text}, vision_config=vision, image_token_id=IMAGE,
        video_token_id=VIDEO, image_start_token_id=94, image_end_token_id=93, video_start_token_id=92,
        video_end_token_id=91,
    )  # fmt: skip


def _ovis2():
    vision = SIGLIP | {"image_size": 32, "hidden_stride": 2, "vocab_size": 60, "initializer_range": 0.2}
    return hf.Ovis2Config(
        vision_config=vision, text_config=hf.Qwen2Config(**TEXT), image_token_id=IMAGE, hidden_size=64,
        visual_indicator_token_ids=[80, 81, 82, 83, 84], vocab_size=VOCAB,
    )  # fmt: skip


def _molmo2(**more):
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


def _kimi():
    text = EXPERTS | {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
    text |= {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
    vision = {"patch_size": 4, "pos_emb_height": 8, "pos_emb_width": 8, "num_attention_heads": 4}
    vision |= {"num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 64}
    return hf.Kimi_K25Config(
        text_config={"model_type": "deepseek_v3", **TEXT, "num_key_value_heads": 4, **text}, vision_config=vision,
        image_token_id=IMAGE, video_token_id=VIDEO, projection_hidden_size=32,
    )  # fmt: skip


def _llama4():
    """Two layers with positions, in chunks, around two without."""
    vision = {name: value for name, value in SIGLIP.items()} | {"image_size": 32, "intermediate_size": 128}
    vision |= {"projector_input_dim": 64, "projector_output_dim": 64, "vision_output_dim": 64}
    vision |= {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "initializer_range": 0.2}
    text = TEXT | {"head_dim": 16, "intermediate_size_mlp": 96, "num_local_experts": 4, "moe_layers": [1, 3]}
    text |= {"no_rope_layers": [1, 0, 0, 1], "attention_chunk_size": 12}
    return hf.Llama4Config(text_config=text, vision_config=vision, image_token_index=IMAGE, pad_token_id=PAD)


def _deepseek_vl():
    return hf.DeepseekVLConfig(vision_config=_siglip(16), text_config=hf.LlamaConfig(**TEXT), image_token_id=IMAGE)


def _gemma3():
    text = TEXT | {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 12}
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    return hf.Gemma3Config(
        vision_config=_siglip(32), text_config=hf.Gemma3TextConfig(**text, layer_types=kinds), mm_tokens_per_image=16,
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


def _gemma4_unified():
    vision = {"patch_size": 4, "pooling_kernel_size": 2, "mm_embed_dim": 64, "mm_posemb_size": 64}
    vision |= {"output_proj_dims": 64}
    return hf.Gemma4UnifiedConfig(text_config=GEMMA4_TEXT, vision_config=vision, audio_config=None, **GEMMA4_IDS)


def _gemma4():
    text = GEMMA4_TEXT | {
        "hidden_size_per_layer_input": 0,
        "use_bidirectional_attention": "vision",
        "enable_moe_block": True,
    }
    text |= {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}
    vision = SIGLIP | {"head_dim": 8, "num_key_value_heads": 4, "pooling_kernel_size": 2, "position_embedding_size": 64}
    return hf.Gemma4Config(text_config=text, vision_config=vision, **GEMMA4_IDS)


def _gemma4_e2b():
    """Five layers with keys of their own; two that use those of layers 3 and 4."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    text = GEMMA4_TEXT | {"num_hidden_layers": 7, "num_kv_shared_layers": 2, "use_double_wide_mlp": True}
    text |= {"layer_types": [*kinds, "sliding_attention", "full_attention"], "final_logit_softcapping": 30.0}
    text |= {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB}
    vision = SIGLIP | {"head_dim": 8, "num_key_value_heads": 4, "pooling_kernel_size": 2, "position_embedding_size": 64}
    return hf.Gemma4Config(text_config=text, vision_config=vision, **GEMMA4_IDS)


def _paligemma():
    vision = _siglip(16)
    vision.projection_dim = 64
    text = hf.GemmaConfig(**TEXT, head_dim=16)
    return hf.PaliGemmaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, projection_dim=64)


INSTALLED = {name for name, family in models.FAMILIES.items() if Version(hf.__version__) >= Version(family.since)}
FAMILIES = {
    tiny.name: tiny
    for tiny in (
        Llava("llava", None, ""),
        LlavaNext("llava_next", _next, "LlavaNextForConditionalGeneration"),
        Onevision("llava_onevision", _onevision, "LlavaOnevisionForConditionalGeneration", videos=True),
        Qwen("qwen2_vl", functools.partial(
            _qwen, hf.Qwen2VLConfig, None, QWEN_VISION | {"embed_dim": 32, "hidden_size": 64}
        ), "Qwen2VLForConditionalGeneration", True, 3),
        Qwen("qwen2_5_vl", functools.partial(
            _qwen, hf.Qwen2_5_VLConfig, None,
            QWEN_VISION | {"hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 64, "window_size": 16,
                           "fullatt_block_indexes": [2]}
        ), "Qwen2_5_VLForConditionalGeneration", True, 3),
        Qwen3("qwen3_vl", functools.partial(
            _qwen, hf.Qwen3VLConfig, None,
            QWEN_VISION | {"hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 64,
                           "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1, 2]}, True
        ), "Qwen3VLForConditionalGeneration", True, 3),
        Qwen3("qwen3_vl_moe", functools.partial(
            _qwen, hf.Qwen3VLMoeConfig, EXPERTS | {"num_experts": 4},
            QWEN_VISION | {"hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 64,
                           "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1, 2]}, True
        ), "Qwen3VLMoeForConditionalGeneration", True, 3),
        Qwen3("cosmos3_omni", functools.partial(
            _qwen, getattr(hf, "Cosmos3OmniConfig", None), None,
            QWEN_VISION | {"hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 64,
                           "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1, 2]}, True
        ), "Cosmos3OmniForConditionalGeneration", True, 3),
        Omni("qwen2_5_omni_thinker", functools.partial(
            _omni, hf.Qwen2_5OmniThinkerConfig, window_size=16, fullatt_block_indexes=[2]
        ), "Qwen2_5OmniThinkerForConditionalGeneration", True, 3),
        Omni("qwen3_omni_moe_thinker", functools.partial(
            _omni, hf.Qwen3OmniMoeThinkerConfig, EXPERTS | {"num_experts": 4}, num_position_embeddings=64,
            deepstack_visual_indexes=[0, 1, 2]
        ), "Qwen3OmniMoeThinkerForConditionalGeneration", True, 3),
        Qwen3("qwen3_5", functools.partial(_hybrid, hf.Qwen3_5Config), "Qwen3_5ForConditionalGeneration", True, 3),
        Mixture("qwen3_5_moe", functools.partial(
            _hybrid, hf.Qwen3_5MoeConfig, **MIXTURE
        ), "Qwen3_5MoeForConditionalGeneration", True, 3),
        Lfm2("lfm2_vl", _lfm2, "Lfm2VlForConditionalGeneration"),
        Lfm3("lfm3_vl", _lfm3, "Lfm3VlForConditionalGeneration", videos=True),
        InternVL("internvl", _internvl, "InternVLForConditionalGeneration"),
        Idefics3("idefics3", functools.partial(_idefics3, hf.Idefics3Config), "Idefics3ForConditionalGeneration"),
        Idefics3("smolvlm", functools.partial(_idefics3, hf.SmolVLMConfig), "SmolVLMForConditionalGeneration"),
        Gemma3("gemma3", _gemma3, "Gemma3ForConditionalGeneration"),
        PaliGemma("paligemma", _paligemma, "PaliGemmaForConditionalGeneration"),
        Mistral3("mistral3", _mistral3, "Mistral3ForConditionalGeneration"),
        VipLlava("vipllava", _vipllava, "VipLlavaForConditionalGeneration"),
        Tagged("aya_vision", functools.partial(
            _cohere, hf.AyaVisionConfig, image_token_index=IMAGE
        ), "AyaVisionForConditionalGeneration"),
        Tagged("cohere2_vision", functools.partial(
            _cohere, hf.Cohere2VisionConfig, image_token_id=IMAGE, alignment_intermediate_size=64
        ), "Cohere2VisionForConditionalGeneration"),
        NextVideo("llava_next_video", _next_video, "LlavaNextVideoForConditionalGeneration", videos=True),
        VideoLlava("video_llava", _video_llava, "VideoLlavaForConditionalGeneration", videos=True),
        Glm("glm4v", functools.partial(_glm, hf.Glm4vConfig), "Glm4vForConditionalGeneration", True, 3),
        Glm("glm46v", functools.partial(_glm, hf.Glm46VConfig), "Glm46VForConditionalGeneration", True, 3),
        Glm("glmga", functools.partial(
            _glm, getattr(hf, "GlmgaConfig", None)
        ), "Glm46VForConditionalGeneration", True, 3),
        Glm("glm4v_moe", functools.partial(
            _glm, hf.Glm4vMoeConfig, **EXPERTS, n_routed_experts=4, first_k_dense_replace=1
        ), "Glm4vMoeForConditionalGeneration", True, 3),
        Paddle("paddleocr_vl", _paddle, "PaddleOCRVLForConditionalGeneration", axes=3),
        Ernie("ernie4_5_vl_moe", _ernie, "Ernie4_5_VLMoeForConditionalGeneration", True, 3),
        Gemma4("gemma4", _gemma4, "Gemma4ForConditionalGeneration", videos=True),
        Gemma4("gemma4_e2b", _gemma4_e2b, "Gemma4ForConditionalGeneration", videos=True),
        Gemma4Unified(
            "gemma4_unified", _gemma4_unified, "Gemma4UnifiedForConditionalGeneration", videos=True
        ),
        Ovis2("ovis2", _ovis2, "Ovis2ForConditionalGeneration"),
        Llama4("llama4", _llama4, "Llama4ForConditionalGeneration"),
        Molmo2("molmo2", _molmo2, "Molmo2ForConditionalGeneration", videos=True),
        Kimi("kimi_k25", _kimi, "Kimi_K25ForConditionalGeneration"),
        MiniCPM("minicpmv4_6", functools.partial(
            _minicpm, getattr(hf, "MiniCPMV4_6Config", None)
        ), "MiniCPMV4_6ForConditionalGeneration", True),
        MiniCPM("minicpm_ocr", functools.partial(
            _minicpm, getattr(hf, "MiniCPMOcrConfig", None), tie_word_embeddings=False
        ), "MiniCPMOcrForConditionalGeneration", True, seed=1),
        MiniCPM("minicpmv4_7", functools.partial(
            _minicpm, getattr(hf, "MiniCPMV4_7Config", None), image_start_id=94, image_end_id=93, slice_start_id=92,
            slice_end_id=91, newline_id=NEWLINE
        ), "MiniCPMV4_7ForConditionalGeneration", True, 3),
        Fixed("deepseek_vl", _deepseek_vl, "DeepseekVLForConditionalGeneration"),
    )
    if tiny.family in INSTALLED
}  # fmt: skip
