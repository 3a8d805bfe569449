"""The text form of schedules: what the command line takes and result files hold.

    schedule := (part {"," part} | "unpruned") {";" setting}
    setting  := "positions=" ("keep" | "compact") | "quotas=" ("each" | "shared") | "spread=" (number | "codebook")
    part     := method ["(" option "=" value {"," option "=" value} ")"] ["@" layer] [":" keep] ["+mass" | "+distance"]

A keep with a decimal point is a fraction of the image's tokens, one without is a count. `drop@21` needs none, nor do
methods that decide the number themselves. `+mass` is the stage's mass-preserving attention, `+distance` is that with
RESTORE's distance calibration.

Reading gives plain parts, checked as far as they can be without a model or a codebook. Pruners are made from them
later (`Schedule`).
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from codebook.errors import CodebookError, quoted, unknown
from codebook.pruning.methods import METHODS, Method

if TYPE_CHECKING:
    from codebook.pruning.methods import Pruner

FROM_CODEBOOK = "codebook"
"""Value of `spread` that means: take it from the codebook of the schedule's stages."""
DROP = "drop"
"""Method that keeps no token, and so has no keep."""
UNPRUNED = "unpruned"
"""Text of the schedule without stages."""
SETTINGS: dict[str, Any] = {"positions": "keep", "quotas": "each", "spread": None}
"""Settings of a schedule and their defaults."""
GRAMMAR = "method[(option=value)][@layer][:keep][+mass or +distance]"
LONGEST_TEXT = 10_000
"""Most characters of a schedule's text. 80 stages, one per layer of the deepest models, have half as many."""
MOST_DIGITS = 9
"""Most digits of a layer or a count."""
DISTANCE: Literal["distance"] = "distance"
"""Value of `Stage.mass` that means: with RESTORE's distance calibration."""
Mass = bool | Literal["distance"]
MASSES: tuple[Mass, ...] = (False, True, DISTANCE)
"""Values of `Stage.mass`, each with all that those before it do."""
WITH_MASS: dict[str, tuple[str, Mass]] = {
    "restore": ("divprune-merged", DISTANCE),
    "seeded": ("codebook-farthest", True),
    "seeded-middle": ("codebook-middle", True),
}
"""Names for methods with mass-preserving attention: `seeded` is `codebook-farthest+mass`, options, layer, keep and all.
`seeded-middle` keeps the middle of what each of its tokens stands for: docs/method.md.
`restore` is RESTORE (arXiv 2606.01711) on DivPrune, from notes on the paper: docs/pruning.md has what differs.
"""


@dataclass(frozen=True)
class StageText:
    """One stage as written.

    Attributes
    ----------
    where
        The part's name in error messages: its number, its text and the character that it begins at.
    method
        A name in `METHODS`.
    options
        The method's options that the text gives, with values that the method takes.
    layer, keep
        As in `Stage`; None where the text leaves them out.
    mass
        As in `Stage`.
    """

    where: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    layer: int | None = None
    keep: int | float | None = None
    mass: Mass = False

    @property
    def entry(self) -> Method:
        """The method in the registry."""
        return METHODS[self.method]

    @property
    def adaptive(self) -> bool:
        """Whether the method decides itself how many tokens stay."""
        return self.entry.adaptive

    @property
    def joint(self) -> bool:
        """Whether the method chooses among all frames of a film at once."""
        return self.entry.joint

    def fail(self, problem: str) -> NoReturn:
        """Raise a CodebookError that names the part and what is wrong with it."""
        raise CodebookError(f"{self.where}: {problem}")


@dataclass(frozen=True)
class ScheduleText:
    """A schedule as written: its stages and those of its settings that it gives."""

    stages: tuple[StageText, ...]
    settings: dict[str, Any]

    @property
    def needs_codebook(self) -> bool:
        """Whether a stage's pruner is made with a codebook."""
        return any(stage.entry.needs_codebook for stage in self.stages)


def read_text(text: str, separator: str = ",", others: Iterable[str] = ()) -> ScheduleText:
    """The stages and settings of a schedule's text.

    Parameters
    ----------
    text
        As in the module's description.
    separator
        Character between the parts.
    others
        Further names to suggest where a method is not found.

    Raises
    ------
    CodebookError
        If a part cannot be read: names it and the character it begins at.
    """
    (_, body), *tail = split(check_length(text), ";")
    chosen: dict[str, Any] = {}
    for start, setting in tail:
        key, _, value = (word.strip() for word in setting.partition("="))
        if key in chosen:
            raise CodebookError(f"the schedule says {key} twice (character {start + 1}): say it once")
        if key not in SETTINGS:
            raise CodebookError(f"cannot read {quoted(setting.strip())} (character {start + 1}) of the schedule: write "
                                "positions=keep or positions=compact, quotas=each or quotas=shared, spread=codebook "
                                "or a number")  # fmt: skip
        chosen[key] = _read_spread(value) if key == "spread" else value
    if body.strip() == UNPRUNED:
        return ScheduleText((), chosen)
    stages = [_read_stage(i, *piece, others) for i, piece in enumerate(split(body, separator), 1)]
    return ScheduleText(tuple(stages), chosen)


def check_length(text: str) -> str:
    """The text, if it is one and no longer than any schedule needs to be; otherwise a CodebookError."""
    if not isinstance(text, str):
        raise CodebookError(f"a schedule's text is a string, not {quoted(text)}: write {GRAMMAR}")
    if len(text) > LONGEST_TEXT:
        raise CodebookError(
            f"the schedule's text has {len(text)} characters: write at most {LONGEST_TEXT}, or make it of Stages"
        )
    return text


def spell(pruner: Pruner) -> str | None:
    """A pruner's method and those of its settings that differ from the method's; None if no text says it."""
    found: list[tuple[int, str]] = []
    for name, method in METHODS.items():
        if type(pruner) is method.kind:
            changed = {k: v for k, default in method.defaults.items() if (v := getattr(pruner, k)) != default}
            if all(_is_literal(value) for value in changed.values()):
                options = ", ".join(f"{k}={v!r}" for k, v in changed.items())
                found.append((len(changed), f"{name}({options})" if options else name))
    return min(found, default=(0, None))[1]


def split(text: str, separator: str) -> list[tuple[int, str]]:
    """Cut a text at separators outside parentheses; each piece with the place it begins at.

    `+mass` and `+distance` are not cut off.
    """
    pieces, start, depth = [], 0, 0
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if character == separator and depth == 0 and not _MASS.match(text, i):
            pieces.append((start, text[start:i]))
            start = i + 1
    return [*pieces, (start, text[start:])]


def cut_mass(text: str) -> tuple[str, Mass]:
    """A stage's text without what it says of its `mass` at its end, and that."""
    for word, said in (("mass", True), (DISTANCE, DISTANCE)):
        if text.endswith(word) and (before := text[: -len(word)].rstrip()).endswith("+"):
            return before[:-1].rstrip(), said
    return text, False


def spell_mass(mass: Mass) -> str:
    """What a stage's text says of its `mass`, at its end."""
    return ("+distance" if mass == DISTANCE else "+mass") if mass else ""


_MASS = re.compile(r"\+\s*(mass|distance)(?![\w-])")
_WHOLE = re.compile(r"[0-9]+")


def _read_stage(number: int, start: int, text: str, others: Iterable[str]) -> StageText:
    start += len(text) - len(text.lstrip())
    where = f"schedule part {number}, {quoted(text.strip())} (character {start + 1})"
    try:
        method, options, layer, keep, mass = _cut_stage(text.strip())
        method, own = WITH_MASS.get(method, (method, False))
        mass = max(mass, own, key=MASSES.index)
        _check_known(method, others)
        values = _read_options(options) if options else {}
        METHODS[method].check(method, values)
        return StageText(
            where,
            method,
            values,
            None if layer is None else _read_layer(layer),
            None if keep is None else read_keep(keep),
            mass,
        )
    except CodebookError as error:
        raise CodebookError(f"{where}: {error}") from None


def _cut_stage(text: str) -> tuple[str, str, str | None, str | None, Mass]:
    """Method, options with their parentheses, layer, keep and mass of a stage's text, each as written.

    Every step looks for one character or one end of what is left: a regular expression for the whole would try all ways
    to share blanks between its parts.
    """
    text, mass = cut_mass(text)
    end = next((i for i, character in enumerate(text) if character in "(@:"), len(text))
    method, rest = text[:end].strip(), text[end:]
    options = ""
    if rest.startswith("("):
        options, closed, rest = rest.rpartition(")")
        options, rest = options + closed, rest.lstrip()
    if not method or ")" in method or (text[end:].startswith("(") and not options) or (rest and rest[0] not in "@:"):
        raise CodebookError(f"write {GRAMMAR}")
    before_keep, colon, keep = rest.partition(":")
    layer = before_keep[1:].strip() if before_keep else None
    return method, options, layer, keep.strip() if colon else None, mass


def _check_known(method: str, others: Iterable[str]) -> None:
    if method in METHODS:
        return
    if method in others:
        raise CodebookError(f"{method} is a preset and stands alone: no options, layer, keep or further stage")
    raise unknown("no method", method, [*METHODS, *WITH_MASS, *others], "`codebook list` names all")


def _read_options(text: str) -> dict[str, Any]:
    refused = CodebookError(f"cannot read the options {quoted(text)}: write (option=value, ...), strings in quotes")
    if "\\" in text:  # no option needs escapes, and Python warns of those that it does not know
        raise refused
    try:
        call = ast.parse(f"f{text}", mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            raise refused
        names = [str(word.arg) for word in call.keywords]
        values = {str(word.arg): ast.literal_eval(word.value) for word in call.keywords if word.arg}
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):  # of what is no literal, or nested deeply
        raise refused from None
    if len(values) < len(names):
        raise CodebookError(f"cannot read the options {quoted(text)}: give each option once, as option=value")
    return values


def _read_layer(layer: str) -> int:
    if not _WHOLE.fullmatch(layer):
        raise CodebookError(f"the layer {quoted(layer)} is not a whole number: write {GRAMMAR}")
    return _read_whole(layer, "layer")


def read_keep(keep: str) -> int | float:
    """The count, or with a decimal point the fraction, that a text writes; raises a CodebookError if it is neither."""
    if _WHOLE.fullmatch(keep):
        return _read_whole(keep, "keep")
    if (number := _read_float(keep)) is None:
        raise CodebookError(f"keep {quoted(keep)} is not a number: write {GRAMMAR}")
    return number


def _read_whole(digits: str, what: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise CodebookError(f"the {what} {quoted(digits)} is too large: write at most {MOST_DIGITS} digits")
    return int(digits)


def _read_spread(value: str) -> str | float:
    if value == FROM_CODEBOOK:
        return value
    if (number := _read_float(value)) is None:
        raise CodebookError(f"cannot read the spread {quoted(value)}: write spread=codebook or a number")
    return number


def _read_float(text: str) -> float | None:
    """The number that a text writes in ASCII, not all that Python takes for one; None if there is none."""
    try:
        return float(text) if text.isascii() and "_" not in text else None
    except ValueError:
        return None


def _is_literal(value: Any) -> bool:
    try:
        return bool(ast.literal_eval(repr(value)) == value)
    except (ValueError, SyntaxError):
        return False
