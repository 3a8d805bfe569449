"""How vLLM is told to prune a model: its arguments, made and checked without vLLM."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codebook.errors import CodebookError
from codebook.integrations.vllm import ARCHITECTURES
from codebook.integrations.vllm.settings import CONFIG_KEY, VllmSettings
from codebook.models.loading import read_config_of
from codebook.models.registry import family_of_config
from codebook.pruning.text import WITH_MASS, read_text
from codebook.store.known import find_named
from codebook.store.shipped import named_for


@dataclass(frozen=True)
class Launch:
    """A model and what is pruned, as vLLM takes them.

    Attributes
    ----------
    model
        A folder, or a name on the Hugging Face Hub.
    overrides
        What `--hf-overrides` changes in the model's config.
    without_mass
        Whether the method was named with mass-preserving attention, which vLLM's attention cannot do, and runs without.
    """

    model: str
    overrides: dict[str, Any]
    without_mass: bool

    @classmethod
    def of(cls, model: str, method: str, keep: int | float, codebook: Path | str | None = None) -> Launch:
        """The arguments for a model.

        Parameters
        ----------
        model
            As `codebook.load` takes it.
        method, keep
            A method with its options, and what stays of each image: a fraction or a number.
        codebook
            Folder of a codebook or a name of `codebook list`; default: the one that is known by the model's name.

        Raises
        ------
        CodebookError
            If vLLM would refuse to start with them, as far as that shows without the model's weights.
        """
        place, config = read_config_of(model)
        kind = family_of_config(config)
        if kind.name not in ARCHITECTURES:
            there = ", ".join(sorted(ARCHITECTURES))
            raise CodebookError(f"models of type {kind.name} are not pruned in vLLM; use one of: {there}")
        name = method.partition("(")[0].strip()
        plain = WITH_MASS.get(name, (name, False))[0] + method.strip()[len(name) :]
        given: dict[str, Any] = {"method": plain, "keep": keep}
        if codebook is not None:
            given["codebook"] = str(find_named(codebook).absolute())
        elif read_text(plain).needs_codebook:
            given["codebook"] = str(named_for(model).absolute())
        setattr(config, CONFIG_KEY, given)
        VllmSettings.read(config)
        architectures = [ARCHITECTURES[kind.name][1]]
        return cls(str(place), {"architectures": architectures, CONFIG_KEY: given}, name in WITH_MASS)

    @property
    def json(self) -> str:
        """The value of `--hf-overrides`."""
        return json.dumps(self.overrides)
