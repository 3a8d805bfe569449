"""Training-free visual-token pruning for vision-language models.

    from codebook import Schedule, ask, load

    model, processor = load("miniature")
    schedule = Schedule.for_model(model, "seeded-middle", keep=0.2)
    [answer] = ask(model, processor, [[picture]], ["read the number."], schedule)

Around a call of your own: `with schedule(model): model.generate(**inputs)`. What a user has done wrong is a
`CodebookError`, whose one line says what to do. docs/pruning.md has the methods and what else there is.
"""

# Public names are imported when first used, so that `import codebook` costs nothing. `__init__.pyi` says the same to
# type checkers and editors.

from importlib import import_module
from typing import Any

_HOME = {
    "Client": "codebook.serving.client",
    "Codebook": "codebook.store.codebook",
    "CodebookError": "codebook.errors",
    "ask": "codebook.inference.ask",
    "build": "codebook.building",
    "check_model": "codebook.models",
    "disable": "codebook.pruning",
    "enable": "codebook.pruning",
    "load": "codebook.models",
    "prebuilt": "codebook.store.shipped",
    "remember": "codebook.pruning",
}
"""Module of each public name that is not one of `codebook.pruning`'s classes."""

__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    if name == "__all__":
        return sorted({*_HOME, *import_module("codebook.pruning").__all__})
    # Only capitals: asking `codebook.pruning` for every name would import it for `from codebook import models`, which
    # it does itself.
    if name[0].isupper() and name in (pruning := import_module("codebook.pruning")).__all__:
        return getattr(pruning, name)
    raise AttributeError(f"module 'codebook' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__getattr__("__all__"), "__version__"]
