"""What a service is made of, before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from codebook.pruning.plan import Plan
from codebook.serving.metrics import Metrics
from codebook.serving.shelf import Shelf
from codebook.serving.state import ModelState, State
from codebook.store.reading import is_folder


@dataclass(frozen=True, kw_only=True)
class Blueprint:
    """A service in words: little, so that every replica of it, on whatever machine, can be sent it and make its own.

    Attributes
    ----------
    model
        As `codebook.load` takes it; None: the service scores features and has no model.
    plan
        What prunes the model's prompts; None without a model.
    books
        Folders of the codebooks that features are scored against, by their names.
    loading
        Further arguments of `codebook.load`.
    shared
        Further fields of `State`.
    examples
        Questions for the page, as in `ModelState`.
    """

    model: str | None = None
    plan: Plan | None = None
    books: dict[str, Path] = field(default_factory=dict)
    loading: dict[str, str] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)
    examples: tuple[dict[str, str], ...] = ()

    @property
    def name(self) -> str:
        """What clients call the model."""
        assert self.model is not None
        return Path(self.model).resolve().name if is_folder(Path(self.model)) else self.model

    def make(self) -> State:
        """Load everything, and begin a thread for the model.

        Raises
        ------
        CodebookError
            If a codebook or the model cannot be loaded, or the plan does not suit the model.
        """
        shelf, metrics = Shelf(self.books), Metrics()
        if self.model is None or self.plan is None:
            return State(metrics=metrics, shelf=shelf, **self.shared)
        from codebook.models.loading import load
        from codebook.serving.model_thread import ModelThread

        loaded, processor = load(self.model, **self.loading)
        schedule = self.plan.apply(loaded)
        metrics.describe(schedule, self.plan.keep)
        return ModelState(
            name=self.name, model=loaded, processor=processor, schedule=schedule,
            model_thread=ModelThread(loaded, processor, schedule, metrics), metrics=metrics, shelf=shelf,
            codebook=self.plan.codebook, seed=self.plan.seed, examples=self.examples, **self.shared,
        )  # fmt: skip
