"""Maps of kept tokens as JSON, one shape for every answer that has one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

from torch import Tensor

from codebook.models import Image

if TYPE_CHECKING:
    from codebook.pruning import Schedule

MAP_FORMAT = 1
"""Version of the layout of files of maps."""


def kept_map(
    image: Image,
    schedule: Schedule,
    stages: Sequence[Tensor],
    box: tuple[float, float, float, float] | None = None,
) -> dict[str, Any]:
    """Where the visual tokens of an image lie, and which of them survive each stage.

    Parameters
    ----------
    stages
        For each stage of the schedule (k,) int64, places among the image's visual tokens, as `Pruning.kept` has them.
    box
        The part of the picture that its whole view shows, as `Family.shown_box` says it; None: what the grid says.

    Returns
    -------
    `grids`: for each its kind (`view`, `crop`, `frame`), rows, cols, and `box`, the part of the picture that it shows
    (left, top, right, bottom in [0, 1], or None)
    `stages`: for each its layer, its text, and `kept`: for each grid the raster positions of its tokens that stay
    """
    grids = image.layout.grids
    bounds = list(pairwise(accumulate((grid.count for grid in grids), initial=0)))

    def by_grid(kept: list[int]) -> list[list[int]]:
        return [[token - start for token in kept if start <= token < end] for start, end in bounds]

    return {
        "grids": [
            {
                "kind": grid.kind,
                "rows": grid.rows,
                "cols": grid.cols,
                "box": (box if grid.kind == "view" else None) or grid.box,
            }
            for grid in grids
        ],
        "stages": [
            {"layer": stage.layer, "stage": str(stage), "kept": by_grid(kept.tolist())}
            for stage, kept in zip(schedule.stages, stages, strict=True)
        ],
    }
