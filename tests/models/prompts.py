"""Prompts for a tiny model of each family: words, hand-made pixels, and where their visual tokens are.

Prompts are lists of words (ids less 20), "image", "large" (an image of several crops, or simply of another size) and
"video".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import transformers as hf

from tests.tiny import IMAGE, PAD, llava

VIDEO, SEPARATOR, GLOBAL, NEWLINE = 98, 97, 96, 95
AUDIO = (90, 88, 89)
"""Tokens of audio: begin, content, end."""
TOKENS = {"image": IMAGE, "video": VIDEO}


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

    crops, patches, side = 2, 4, 16

    def image(self, draw):
        side = self.side
        pixels = torch.cat([draw(1, 1, 3, side, side), torch.zeros(1, self.crops, 3, side, side)], 1)
        pixels[:, 1] = draw(1, 3, side, side)
        pixels[:, 2] = draw(1, 3, side, side)
        # two views wide, 4 x 8 tokens and 4 newlines
        pieces = {"pixel_values": pixels, "image_sizes": torch.tensor([[side, 2 * side]])}
        return [IMAGE] * (16 + 4 * 9), pieces, [(4, 4), (4, 8)], range(24, 52, 9)

    def large(self, draw):
        # two views high and half of one wide: the crops' grid loses a column on each side
        side = self.side
        sizes = torch.tensor([[2 * side, side // 2]])
        pieces = {"pixel_values": draw(1, 3, 3, side, side), "image_sizes": sizes}
        return [IMAGE] * (16 + 8 * 3), pieces, [(4, 4), (8, 2)], range(18, 40, 3)


class Granite(LlavaNext):
    """Two by two patches a token."""

    patches, side = 8, 32


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
