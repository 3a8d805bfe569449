"""The text form of schedules: what the command line takes and result files hold.

    schedule := (part {"," part} | "unpruned") {";" setting}
    setting  := "positions=" ("keep" | "compact") | "quotas=" ("each" | "shared") | "spread=" (number | "codebook")
    part     := method ["(" option "=" value {"," option "=" value} ")"] ["@" layer] [":" keep] ["+mass"]

A keep with a decimal point is a fraction of the image's tokens, one without is a count. `drop@21` needs none, nor do
methods that decide the number themselves. `+mass` is the stage's mass-preserving attention.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NoReturn

from codebook.errors import CodebookError
from codebook.pruning.methods import METHODS, Pruner

CODEBOOK = "codebook"
"""Of spread: what the codebook of the schedule's stages says."""
DROP = "drop"
UNPRUNED = "unpruned"
SETTINGS = {"positions": "keep", "quotas": "each", "spread": None}
"""Of a schedule, with their defaults."""
GRAMMAR = "method[(option=value)][@layer][:keep][+mass]"
WITH_MASS = {"seeded": "codebook-farthest"}
"""Names for methods with mass-preserving attention: `seeded` is `codebook-farthest+mass`, options, layer, keep and all.
"""

Make = Callable[[str], Pruner]


@dataclass(frozen=True)
class Part:
    """One stage as written; what the text leaves out is None. `where` names the part in error messages."""

    where: str
    method: str
    pruner: Pruner
    layer: int | None
    keep: int | float | None
    mass: bool

    def fail(self, problem: str) -> NoReturn:
        raise CodebookError(f"{self.where}: {problem}")


def needs(name: str) -> list[str]:
    """What a method cannot be made without: nothing, or `codebook`."""
    return [p.name for p in inspect.signature(METHODS[name]).parameters.values() if p.default is p.empty]


def make(name: str) -> Pruner:
    """A method's pruner with its default settings."""
    if missing := needs(name):
        raise CodebookError(f"method {name!r} needs a {' and a '.join(missing)}, which no text holds: pass make=, "
                            "which makes the pruner of a method's name")  # fmt: skip
    return METHODS[name]()


def read(text: str, make: Make, separator: str = ",", others: Iterable[str] = ()) -> tuple[list[Part], dict[str, Any]]:
    """The parts of a schedule's text and its settings.

    Parameters
    ----------
    text
        As in the module's description.
    make
        Makes the pruner of a method's name, before the text's own options are set.
    separator
        Of the parts.
    others
        Further names to suggest where a method is not found.

    Raises
    ------
    CodebookError
        Naming the part that cannot be read and the character it begins at.
    """
    (_, body), *tail = split(text, ";")
    chosen: dict[str, Any] = {}
    for start, option in tail:
        key, _, value = (word.strip() for word in option.partition("="))
        if key not in SETTINGS:
            raise CodebookError(f"cannot read {option.strip()!r} (character {start + 1}) of the schedule: write "
                                "positions=keep or positions=compact, quotas=each or quotas=shared, spread=codebook "
                                "or a number")  # fmt: skip
        chosen[key] = _spread(value) if key == "spread" else value
    if body.strip() == UNPRUNED:
        return [], chosen
    return [_part(i, *piece, make, others) for i, piece in enumerate(split(body, separator), 1)], chosen


def spell(pruner: Pruner) -> str | None:
    """A pruner's method and those of its settings that differ from the method's; None if no text says it."""
    found: list[tuple[int, str]] = []
    for name, factory in METHODS.items():
        kind, defaults = settings(factory)
        if type(pruner) is kind:
            changed = {k: v for k, default in defaults.items() if (v := getattr(pruner, k)) != default}
            if all(_is_literal(value) for value in changed.values()):
                options = ", ".join(f"{k}={v!r}" for k, v in changed.items())
                found.append((len(changed), f"{name}({options})" if options else name))
    return min(found, default=(0, None))[1]


def settings(factory: Callable[..., Pruner]) -> tuple[Any, dict[str, Any]]:
    """The class that a method's factory makes, and the defaults of its settings.

    What has no default, as a codebook, is no setting: whoever makes the pruner supplies it.
    """
    kind, args, given = factory, (), {}
    if isinstance(factory, partial):
        kind, args, given = factory.func, factory.args, factory.keywords  # type: ignore[assignment]
    bound = inspect.signature(kind).bind_partial(*args, **given)
    bound.apply_defaults()
    return kind, dict(bound.arguments)


def split(text: str, separator: str) -> list[tuple[int, str]]:
    """Cut a text at separators outside parentheses; each piece with the place it begins at. `+mass` is not cut off."""
    pieces, start, depth = [], 0, 0
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if character == separator and depth == 0 and not _MASS.match(text, i):
            pieces.append((start, text[start:i]))
            start = i + 1
    return [*pieces, (start, text[start:])]


_MASS = re.compile(r"\+\s*mass(?![\w-])")
_PART = re.compile(
    r"(?P<method>[^@:()]+?)(?P<options>\(.*\))?\s*(@(?P<layer>[^:]*?))?(:(?P<keep>.*?))?(?P<mass>\s*\+\s*mass)?",
    re.DOTALL,
)


def _part(number: int, start: int, text: str, make: Make, others: Iterable[str]) -> Part:
    start += len(text) - len(text.lstrip())
    where = f"schedule part {number}, {text.strip()!r} (character {start + 1})"
    try:
        match = _PART.fullmatch(text.strip())
        if not match:
            raise CodebookError(f"write {GRAMMAR}")
        method, layer, keep = match["method"].strip(), match["layer"], match["keep"]
        mass = match["mass"] is not None or method in WITH_MASS
        if layer is not None and not _WHOLE.fullmatch(layer):
            raise CodebookError(f"the layer {layer.strip()!r} is not a whole number: write {GRAMMAR}")
        method = WITH_MASS.get(method, method)
        pruner = _pruner(method, match["options"] or "()", make, others)
        return Part(where, method, pruner, int(layer) if layer else None, None if keep is None else _number(keep), mass)
    except CodebookError as error:
        raise CodebookError(f"{where}: {error}") from None


_WHOLE = re.compile(r"\s*\d+\s*")


def _spread(value: str) -> str | float:
    try:
        return value if value == CODEBOOK else float(value)
    except ValueError:
        raise CodebookError(f"cannot read the spread {value!r}: write spread=codebook or a number") from None


def _number(keep: str) -> int | float:
    try:
        return int(keep) if _WHOLE.fullmatch(keep) else float(keep)
    except ValueError:
        raise CodebookError(f"keep {keep.strip()!r} is not a number: write {GRAMMAR}") from None


def _pruner(method: str, options: str, make: Make, others: Iterable[str]) -> Pruner:
    if method in others and method not in METHODS:
        raise CodebookError(f"{method} is a preset and stands alone: no options, layer, keep or further stage")
    if method not in METHODS:
        near = difflib.get_close_matches(method, [*METHODS, *WITH_MASS, *others], n=2)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        also = f"; presets: {', '.join(sorted(others))}" if others else ""
        raise CodebookError(f"no method {method!r}; {hint}methods: {', '.join(sorted({*METHODS, *WITH_MASS}))}{also}")
    try:
        call = ast.parse(f"f{options}", mode="eval").body
        assert isinstance(call, ast.Call) and not call.args
        given = {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
    except (SyntaxError, ValueError, AssertionError):
        raise CodebookError(
            f"cannot read the options {options}: write (option=value, ...), strings in quotes"
        ) from None
    known = settings(METHODS[method])[1]
    for option, value in given.items():
        if option not in known:
            what = f"its options are {', '.join(known)}" if known else "it has none"
            raise CodebookError(f"{method} has no option {option!r}: {what}")
        kind = type(known[option])
        if kind not in (type(value), type(None)) and (kind, type(value)) != (float, int):
            raise CodebookError(f"option {option} of {method} must be like {known[option]!r}, not {value!r}")
    pruner = make(method)
    return replace(pruner, **given) if given else pruner  # type: ignore[type-var]


def _is_literal(value: Any) -> bool:
    try:
        return bool(ast.literal_eval(repr(value)) == value)
    except (ValueError, SyntaxError):
        return False
