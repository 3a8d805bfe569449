"""A recipe: the folder that `codebook tune` writes, with a codebook, a schedule and the report of both."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NotRequired

from pydantic import ConfigDict
from typing_extensions import TypedDict

from codebook.errors import CodebookError
from codebook.store.reading import read_json

RECIPE_PART, CODEBOOK_PART, SCHEDULE_PART, HORIZON_PART, BENCH_PART, REPORT_PART = (
    "recipe.json", "codebook", "schedule.json", "horizon", "bench", "README.md",
)  # fmt: skip
"""Names of the files and folders of a recipe."""


class RecipeRecord(TypedDict):
    """What `recipe.json` says: what was asked for, whose the labels are, and whether all steps are done.

    `first` are the methods that were tried as the first stage beside the default, where there were any. `questions` is
    the digest of what `data` says, or of the questions about images; earlier versions have none.
    """

    __pydantic_config__ = ConfigDict(strict=True, allow_inf_nan=False, extra="forbid")  # type: ignore[misc]
    format_version: Literal[1]
    model: str
    data: str | None
    keep: float
    count: int
    seed: int
    first: NotRequired[list[str]]
    questions: NotRequired[str]
    labels: Literal["given", "own", "mixed"] | None
    complete: bool


def read_recipe(folder: Path) -> dict[str, Any]:
    """The checked contents of a recipe's `recipe.json`.

    Raises
    ------
    CodebookError
        If there is none, or it is no recipe's.
    """
    record: dict[str, Any] = read_json(folder / RECIPE_PART, "name a folder made by `codebook tune`", RecipeRecord)
    return record


def recipe_parts(folder: Path, schedule: str | None, codebook: Path | None) -> tuple[str, Path]:
    """The schedule and the codebook of a recipe.

    Raises
    ------
    CodebookError
        If it is not finished, or a schedule or codebook is named beside it.
    """
    if schedule is not None or codebook is not None:
        raise CodebookError("--recipe has a schedule and a codebook of its own: leave --schedule and --codebook out")
    if not read_recipe(folder)["complete"]:
        raise CodebookError(f"the recipe in {folder} is not finished: run `codebook tune` again")
    return str(folder / SCHEDULE_PART), folder / CODEBOOK_PART
