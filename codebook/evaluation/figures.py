"""The figures of a codebook's card: accuracy by budget, from a results.json of `codebook bench`."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, Field, FiniteFloat, ValidationError

from codebook.errors import CodebookError, counted, printable
from codebook.evaluation.rows import BASELINES
from codebook.inference.uncertainty import plus_minus
from codebook.models import same_fingerprint
from codebook.pruning.presets import needs_codebook
from codebook.pruning.text import UNPRUNED
from codebook.store.reading import LARGEST_LINES, read_json


class FiguresMean(BaseModel):
    """The mean of a row over its tasks, as a fraction, with its 95% interval."""

    score: FiniteFloat
    interval: tuple[FiniteFloat, FiniteFloat] | None


class FiguresRow(BaseModel):
    """A method at a budget."""

    method: str
    keep: FiniteFloat
    mean: FiguresMean


class FiguresFile(BaseModel):
    """What a card shows of a results.json."""

    name: str
    model: str
    tasks: dict[str, object]
    rows: list[FiguresRow] = Field(min_length=1)


def read_figures(path: Path, fingerprint: str | None) -> str:
    """A Markdown table of the methods that use the codebook, beside the baselines and the unpruned model.

    Parameters
    ----------
    path
        A results.json of `codebook bench`.
    fingerprint
        Fingerprint in the codebook's config: figures of another model are not its own.

    Raises
    ------
    CodebookError
        If the file is no results.json, or another model's.
    """
    remedy = "name a results.json of `codebook bench`"
    try:
        found = FiguresFile.model_validate(read_json(path, remedy, largest=LARGEST_LINES))
    except ValidationError:
        raise CodebookError(f"{path} is no results.json: {remedy}") from None
    if fingerprint is not None and not same_fingerprint(fingerprint, found.model.rpartition(":")[0]):
        raise CodebookError(f"{path} was measured on another model than the codebook's: {remedy} on that model")
    own = {row.method for row in found.rows if row.method in BASELINES or _is_with_codebook(row.method)}
    keeps = sorted({row.keep for row in found.rows if row.method != UNPRUNED}, reverse=True)
    cells = {(row.method, row.keep): _figure(row.mean) for row in found.rows}
    lines = [f"| method | {' | '.join(f'keep {keep:g}' for keep in keeps)} |", "|---" * (len(keeps) + 1) + "|"]
    for method in dict.fromkeys(row.method for row in found.rows if row.method in own):
        shown = printable(method.replace("|", "\\|"), 100)
        lines.append(f"| {shown} | {' | '.join(cells.get((method, keep), '-') for keep in keeps)} |")
    unpruned = next((_figure(row.mean) for row in found.rows if row.method == UNPRUNED), "not measured")
    return "\n".join([
        f"Accuracy in percent, mean over {counted(len(found.tasks), 'task')} with 95% intervals, by visual tokens "
        f"kept; unpruned: {unpruned}. Measured by `codebook bench` on {printable(found.name, 100)}.",
        "", *lines,
    ])  # fmt: skip


def _is_with_codebook(method: str) -> bool:
    try:
        return needs_codebook(method)
    except CodebookError:  # of another version
        return False


def _figure(mean: FiguresMean) -> str:
    half = None if mean.interval is None else 50 * (mean.interval[1] - mean.interval[0])
    return f"{100 * mean.score:.1f} {plus_minus(half)}"
