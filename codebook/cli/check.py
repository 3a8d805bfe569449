"""`codebook check`: whether codebook knows how a model's images are laid out, tested on the model itself."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from codebook.cli.options import JsonOption, Loading, ModelOption, with_groups
from codebook.errors import CodebookError, counted

if TYPE_CHECKING:
    from codebook.models import Report


@with_groups
def check_command(model: ModelOption, loading: Loading, as_json: JsonOption = False) -> None:
    """Check whether a model's visual tokens are where they should be.

    The model is shown pictures whose patches are known; the report says what may be done with it.
    """
    from codebook import models
    from codebook.models.loading import load_untested

    loading.check(model)
    loaded, processor = load_untested(model, **loading.arguments())
    report = models.check_model(loaded, processor)
    print(json.dumps(_report_numbers(model, report)) if as_json else _report_lines(report))
    if report.reason is not None:
        raise CodebookError(report.reason)


def _report_numbers(model: str, report: Report) -> dict[str, Any]:
    return {
        "model": model,
        "model_type": report.model_type,
        "passed": report.family is not None,
        "known": report.known,
        "works": _works(report),
        "image_token": report.token,
        "pictures": [vars(shown) for shown in report.shown],
        "reason": report.reason,
    }


def _report_lines(report: Report) -> str:
    by = "a file of its own describes it" if report.known else "no file describes it; the generic family is tried"
    lines = [f"{report.model_type}: {by}", f"image token: {report.token}"]
    for shown in report.shown:
        (height, width), (rows, cols), tokens = shown.size, shown.grid, counted(shown.tokens, "image token")
        lines.append(
            f"picture of {width} x {height} pixels: {tokens}, {shown.structural} of them structural; "
            f"grid of {rows} x {cols}: {shown.right} of {rows * cols} are where their patches are"
        )
    lines.append("refused" if report.family is None else _works(report) or "")
    return "\n".join(lines)


def _works(report: Report) -> str | None:
    """What may be done with the model."""
    from codebook.models.generic import WHAT_WORKS

    if report.family is None:
        return None
    return "all that docs/models.md says of it works" if report.known else WHAT_WORKS
