"""What a name in the registry of methods stands for, and what can be known of it before its pruner is made."""

from __future__ import annotations

import inspect
from dataclasses import fields
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING, Any

from codebook.errors import CodebookError, quoted, unknown

if TYPE_CHECKING:  # torch is imported with the first pruner
    from codebook.pruning.methods.base import Pruner


class Method:
    """A pruner's class and the arguments that make it this method; called, it makes the pruner.

    Parameters
    ----------
    module, name
        The module in `codebook.pruning.methods`, and in it the pruner's class, a dataclass. It is imported when it is
        first needed.
    given
        Arguments of the class where they differ from its defaults, as in `Method("fastv", "FastV", reverse=True)`. A
        method among them stands for its pruner, and is no option.
    """

    def __init__(self, module: str, name: str, **given: Any) -> None:
        self.module, self.name, self._given = module, name, given

    @cached_property
    def kind(self) -> type[Pruner]:
        """The pruner's class."""
        kind: type[Pruner] = getattr(import_module(f"{__package__}.{self.module}"), self.name)
        return kind

    @cached_property
    def given(self) -> dict[str, Any]:
        """Arguments of the class where they differ from its defaults."""
        return {name: value() if isinstance(value, Method) else value for name, value in self._given.items()}

    def __call__(self, *args: Any, **options: Any) -> Pruner:
        return self.kind(*args, **{**self.given, **options})

    def __repr__(self) -> str:
        return f"Method({', '.join([self.name, *(f'{k}={v!r}' for k, v in self.given.items())])})"

    @cached_property
    def defaults(self) -> dict[str, Any]:
        """Values of the pruner's fields where nothing else is said; a codebook has none."""
        signature = inspect.signature(self.kind).parameters.values()
        return {p.name: p.default for p in signature if p.default is not p.empty} | self.given

    @property
    def options(self) -> dict[str, Any]:
        """What a schedule's text can set, with the defaults."""
        return {name: value for name, value in self.defaults.items() if not _is_pruner(value)}

    @property
    def needs_codebook(self) -> bool:
        """Whether it is made with a codebook."""
        return "codebook" in (field.name for field in fields(self.kind))  # type: ignore[arg-type]

    @property
    def draws(self) -> bool:
        """Whether it draws at random, from a seed."""
        return "seed" in self.defaults

    @property
    def adaptive(self) -> bool:
        """Whether it decides itself how many tokens stay."""
        return self.kind.adaptive

    @property
    def before_llm(self) -> bool:
        """Whether it works before the LLM only."""
        return self.kind.before_llm

    @property
    def joint(self) -> bool:
        """Whether it chooses among all frames of a film at once."""
        return self.kind.joint

    @property
    def uses_attention(self) -> bool:
        """Whether it needs the attention of the layer before: itself, or a method that it is made of."""
        return self._uses("attention")

    @property
    def uses_change(self) -> bool:
        """Whether it compares what a layer has made of the tokens with what entered the LLM: itself or a part."""
        return self._uses("change")

    def _uses(self, what: str) -> bool:
        name, parts = f"uses_{what}", (value for value in self.defaults.values() if _is_pruner(value))
        return getattr(self.kind, name) is True or any(getattr(part, name) for part in parts)

    def check(self, name: str, options: dict[str, Any]) -> None:
        """Raise a CodebookError unless these are options of the method, named `name`, with values that it takes."""
        from codebook.pruning.methods.base import check_options, is_like

        known = self.options
        for option, value in options.items():
            if option not in known:
                what = f"its options are {', '.join(known)}" if known else "it has none"
                raise unknown(f"{name} has no option", option, known, what)
            if not is_like(value, known[option]):
                raise CodebookError(f"option {option} of {name} must be like {known[option]!r}, not {quoted(value)}")
        check_options(self.kind, options)


def _is_pruner(value: Any) -> bool:
    from codebook.pruning.methods.base import Pruner

    return isinstance(value, Pruner)
