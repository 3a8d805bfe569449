"""Why a token is dropped: the prototypes that it resembles, and the probes that made them prototypes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from codebook import models
from codebook.errors import CodebookError
from codebook.inference.overlay import comparison, enlarged, marked, score_picture
from codebook.models.base import Model, Processor
from codebook.store.codebook import Codebook
from codebook.store.pictures import read_image


@dataclass(frozen=True)
class Explanation:
    """A visual token compared with a codebook.

    Attributes
    ----------
    patch, grid
        Row and column of the token; rows and columns of the image's tokens.
    similarity : float
        Cosine to the nearest prototype: the token's redundancy.
    rank : int
        Place of the token among the image's tokens, the most redundant first: number 1 is dropped first.
    neighbours : list[dict]
        The nearest prototypes: for each its `similarity`, its provenance, and `cluster_size`, the number of prototypes
        in its cluster.
    redundancy : list[float]
        `similarity` of all of the image's tokens, in raster order.
    """

    patch: tuple[int, int]
    grid: tuple[int, int]
    similarity: float
    rank: int
    neighbours: list[dict[str, Any]]
    redundancy: list[float] = field(default_factory=list, repr=False)

    @property
    def tokens(self) -> int:
        """Number of the image's visual tokens."""
        return self.grid[0] * self.grid[1]

    def kept(self, count: int) -> bool:
        """Whether the token stays when `count` of the image's tokens do."""
        return self.rank > self.tokens - count


def explain(
    model: Model,
    processor: Processor,
    book: Codebook,
    picture: Image.Image,
    patch: tuple[int, int],
    neighbours: int = 5,
) -> Explanation:
    """Compare one visual token of the whole view of a picture with a codebook's prototypes.

    Raises
    ------
    CodebookError
        If the image has no such patch.
    """
    model = models.unwrap(model)
    family = models.family(model)
    rows, cols = family.grid(model)
    row, col = patch
    if not (0 <= row < rows and 0 <= col < cols):
        raise CodebookError(f"no patch {row},{col}: rows are 0 to {rows - 1}, columns 0 to {cols - 1}")
    pixels = family.view(processor, read_image(picture)).to(model.device, model.dtype)
    with torch.inference_mode():
        features = family.image_features(model, pixels)[0][0]
    [found] = explain_tokens(book, features, (rows, cols), [row * cols + col], neighbours)
    return found


def explain_tokens(
    book: Codebook, features: Tensor, grid: tuple[int, int], tokens: Sequence[int], neighbours: int = 5
) -> list[Explanation]:
    """Compare visual tokens of one image with a codebook's prototypes.

    Parameters
    ----------
    features : (n, width) float
        Projector outputs of the image; what deeper layers add, behind the codebook's dimension, plays no part.
    grid
        Rows and columns of the n tokens.
    tokens
        Raster positions of those that are explained.
    neighbours
        Prototypes to name for each; at most as many as there are.
    """
    with torch.inference_mode():
        features = features[:, : book.dimension]
        redundancy = book.redundancy(features)
        chosen = features[list(tokens)]
        similarity, index = book.search(chosen, min(neighbours, len(book)))
    # Of equal tokens the last counts as dropped first; topk, by which the pruner keeps, may break the tie either way.
    order = redundancy.flip(0).argsort(descending=True, stable=True)
    ranks = torch.empty_like(order)
    ranks[len(order) - 1 - order] = torch.arange(1, len(order) + 1, device=order.device)
    whole, rank = redundancy.tolist(), ranks.tolist()
    sizes = Counter(record["cluster"] for record in book.provenance)
    out = []
    for token, values, places in zip(tokens, similarity.tolist(), index.tolist(), strict=True):
        near = [
            {"similarity": value, **book.provenance[i], "cluster_size": sizes[book.provenance[i]["cluster"]]}
            for value, i in zip(values, places, strict=True)
        ]
        out.append(Explanation(divmod(token, grid[1]), grid, whole[token], rank[token], near, whole))
    return out


def explanation_text(found: Explanation, config: dict[str, Any], kept: int | None = None) -> str:
    """The explanation as plain text.

    Parameters
    ----------
    config
        The codebook's config.
    kept
        How many of the image's tokens stay; None: the text names no budget.
    """
    (row, col), n = found.patch, found.tokens
    lines = [
        f"patch {row},{col} of {found.grid[0]} x {found.grid[1]}: cosine {found.similarity:.3f} to its nearest "
        f"prototype, number {found.rank} of {n} of the image's tokens by redundancy"
    ]
    if kept is not None:
        verb = "kept" if found.kept(kept) else "dropped"
        lines.append(f"`codebook` would have it {verb} where {kept} of {n} stay, and kept from {n - found.rank + 1} on")
    else:
        lines.append(f"`codebook` keeps it only where {n - found.rank + 1} or more of {n} stay")
    settings = config.get("settings", {})
    if {"tau_p", "tau_j"} <= set(settings):
        weight = settings.get("global_weight", 16.0)
        lines.append(
            f"prototypes are tokens with P1 < {settings['tau_p']:g} and JSD_region + {weight:g} JSD_global < "
            f"{settings['tau_j']:g} that recur across images; the nearest:"
        )
    head = ("cosine", "P1", "JSD region", "JSD global", "cluster", "patch", "image")
    rows = []
    for one in found.neighbours:
        place = f"{one['row']},{one['col']}" if {"row", "col"} <= one.keys() else "-"
        figures = [f"{one[key]:.3g}" if key in one else "-" for key in ("p1", "jsd_region", "jsd_global")]
        cluster = f"{one['cluster']} ({one['cluster_size']})"
        rows.append((f"{one['similarity']:.3f}", *figures, cluster, place, str(one.get("image", "-"))))
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for line in (head, *rows):
        lines.append("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    return "\n".join(lines)


def explanation_picture(picture: Image.Image, found: Explanation, kept: int) -> Image.Image:
    """The picture with the patch framed, beside its redundancy: yellow tokens are the most like a prototype.

    Parameters
    ----------
    picture
        The part of it that the model was shown.
    kept
        How many of its tokens stay: they are framed in white.
    """
    token = found.patch[0] * found.grid[1] + found.patch[1]
    # As `explain_tokens` ranks them: of equal tokens the last is dropped first.
    order = sorted(range(found.tokens), key=lambda i: (found.redundancy[i], i))
    heat = score_picture(picture, dict(enumerate(found.redundancy)), order[:kept], found.grid)
    plain = enlarged(picture, found.grid)
    row, col = found.patch
    heading = f"patch {row},{col}: {'kept' if found.kept(kept) else 'dropped'} where {kept} of {found.tokens} stay"
    drawn = [
        (heading, f"cosine {found.similarity:.3f} to its nearest prototype", marked(plain, token, found.grid)),
        ("redundancy: yellow is most like a prototype", "framed: kept", marked(heat, token, found.grid)),
    ]
    return comparison(drawn)
