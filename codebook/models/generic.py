"""The family of a model that no file here describes: what is believed of its images, and a test found true.

`codebook/models/trial.py` finds the belief and tests it, once per model.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, NoReturn

from PIL import Image as Picture
from torch import Tensor, nn

from codebook.errors import CodebookError
from codebook.models.any_size import VIEW_SIDE
from codebook.models.base import Family, Model, Processor
from codebook.models.encoded import Encoded
from codebook.models.layout import KINDS, Grid, Layout, fixed_layouts, layouts_per_row

TOKEN_NAMES = ("image_token_id", "image_token_index")
"""Names under which configs say which token stands for visual tokens."""

WHAT_WORKS = "pre-LLM pruning by projector outputs works, attention and tower methods are not known"
"""What may be done with a model that has passed the test."""


class Unproven(Exception):
    """A belief that the test does not bear out; whoever asked for the test is told by a CodebookError."""


class Around(NamedTuple):
    """How many structural tokens stand before a grid, after each of its rows, and behind it."""

    head: int = 0
    newline: int = 0
    tail: int = 0


NOTHING_AROUND = Around()

AROUND = sorted(itertools.starmap(Around, itertools.product((0, 1), repeat=3)), key=sum)
"""What is tried."""


@dataclass(frozen=True)
class Belief:
    """How the tokens of an image are laid out: one grid, and perhaps structural tokens around it.

    Attributes
    ----------
    sizes
        The argument of `get_image_features` that ends in the height and width of each image; None where all images,
        or crops, have the same grid.
    unit
        How many of its units make one token, down and across.
    pixels
        Whether that unit is a pixel; else it is a patch.
    grid
        Rows and columns, where all are the same.
    shape
        Shape of the pixels of one image, where all are the same.
    around
        Structural tokens.
    """

    sizes: str | None = None
    unit: int = 1
    pixels: bool = False
    grid: tuple[int, int] = (VIEW_SIDE, VIEW_SIDE)
    shape: tuple[int, ...] = ()
    around: Around = NOTHING_AROUND

    def layout(self, rows: int, cols: int) -> Layout:
        """The layout of an image of that many rows and columns of tokens."""
        head, newline, tail = self.around
        return Layout(head + rows * (cols + newline) + tail, (Grid(head, rows, cols, "view", cols + newline),))

    def encoded_sizes(self, given: dict[str, Any]) -> list[tuple[int, int]]:
        """Rows and columns of the tokens of each image that a call was given."""
        assert self.sizes is not None
        sizes = given[self.sizes]
        return [(height // self.unit, width // self.unit) for *_, height, width in sizes.tolist()]


class Untested(Family):
    """A family that no file describes, of which a config is known and no model: it has a name, and nothing else."""

    def __init__(self, name: str) -> None:
        self.name = name


class Generic(Family):
    """A family known by what its config, its processor and a test of them say.

    It prunes by what enters the LLM. How its tower and its decoder attend is not known, so methods that ask for it are
    refused, and so are videos and building.

    Parameters
    ----------
    name
        The `model_type`.
    belief
        How the tokens of its images are laid out, as the test found it.
    tower, projector
        Paths of these modules in the base model.
    axes
        Axes of its position ids.
    """

    tower_rows: ClassVar[bool] = False
    reusable_prefix: ClassVar[bool] = False

    def __init__(self, name: str, belief: Belief, tower: str, projector: str, axes: int) -> None:
        self.name, self.belief, self._tower, self._projector = name, belief, tower, projector
        self.axes = axes  # type: ignore[misc]

    def tower(self, model: Model) -> nn.Module:
        return model.base_model.get_submodule(self._tower)

    def projector(self, model: Model) -> nn.Module:
        return model.base_model.get_submodule(self._projector)

    def check_attention(self) -> None:
        raise self.unknown("methods that need attention are", "use one that compares features, such as divprune")

    def tower_layers(self, model: Model) -> NoReturn:
        raise self.unknown("methods that ask the vision tower are", "use one that compares features, such as divprune")

    def vision_attention(self, model: Model) -> NoReturn:
        self.tower_layers(model)

    def grid(self, model: Model) -> tuple[int, int]:
        return self.belief.grid

    def token(self, model: Model, kind: str) -> int:
        if kind == "video":
            raise self.unknown("videos are", "show their frames as images")
        return image_token(model.config)

    def layouts(self, model: Model, kind: str, prompts: list[list[int]], encoded: Encoded | None) -> list[list[Layout]]:
        token = self.token(model, kind)
        if self.belief.sizes is not None:
            if encoded is None:
                raise self.unseen_error(kind)
            layouts = [self.belief.layout(*size) for size in self.belief.encoded_sizes(encoded.given)]
            return layouts_per_row(kind, layouts, [ids.count(token) for ids in prompts])
        self._check_shape(encoded)
        return fixed_layouts(self.belief.layout(*self.belief.grid), prompts, token)

    def _check_shape(self, encoded: Encoded | None) -> None:
        """Refuse pixels of another size than was tested: their grid would be another one."""
        pixels = None if encoded is None else encoded.given.get("pixel_values")
        if pixels is not None and tuple(pixels.shape[1:]) != self.belief.shape:
            raise CodebookError(
                f"images of {' x '.join(map(str, pixels.shape[1:]))} pixels were not tested with {self.name}, whose "
                f"processor makes {' x '.join(map(str, self.belief.shape))}: use these"
            )

    def pixels(self, model: Model, encoded: Encoded) -> list[Tensor]:
        pixels, belief = encoded.given[KINDS[encoded.kind]], self.belief
        if belief.sizes is None:
            return list(pixels)
        sizes = encoded.given[belief.sizes].tolist()
        if belief.pixels:  # without padding
            return [image[..., :height, :width] for image, (*_, height, width) in zip(pixels, sizes, strict=True)]
        patches = [height * width * (more[0] if more else 1) for *more, height, width in sizes]
        if len(pixels) == len(sizes) and sum(patches) != len(pixels):
            return [row[:count] for row, count in zip(pixels, patches, strict=True)]
        return list(pixels.split(patches))

    def merge(self, model: Model) -> int:
        return self.belief.unit

    def view(self, processor: Processor, picture: Picture.Image) -> NoReturn:
        raise self.unknown("codebooks of it are", "use a method without one, such as divprune(middle=True)+mass")

    def unknown(self, what: str, remedy: str) -> CodebookError:
        """The error for what a test cannot know."""
        return CodebookError(
            f"{what} not known for models of type {self.name}, which no file of codebook describes: {remedy}"
        )


def image_token(config: Any) -> int:
    """The token id that stands in prompts for visual tokens of images."""
    return next(value for name in TOKEN_NAMES if isinstance(value := getattr(config, name, None), int))


def may_be_generic(config: Any) -> bool:
    """Whether a config says enough for a test: it has a vision tower, a decoder, and a token of images."""
    has_token = any(isinstance(getattr(config, name, None), int) for name in TOKEN_NAMES)
    return has_token and getattr(config, "vision_config", None) is not None and config.get_text_config() is not config
