"""What is pruned in vLLM: `codebook_config` of the model's config. The one place there that calls the pruners."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from codebook import __version__
from codebook.errors import CodebookError, quoted, unknown
from codebook.models.finite import damage
from codebook.models.layout import Image, Layout
from codebook.pruning.engine.prompt import Unit
from codebook.pruning.engine.selection import choose, targets
from codebook.pruning.methods.base import beyond_features
from codebook.pruning.ownership import codebooks_of
from codebook.pruning.schedule import Schedule
from codebook.pruning.stage import Stage, check_keep
from codebook.pruning.text import DROP, StageText, read_text
from codebook.pruning.tokens import VisualTokens, digests, mix
from codebook.store.codebook import Codebook
from codebook.store.known import find_named

CONFIG_KEY = "codebook_config"
"""Name of the settings in the model's config, which vLLM passes on to all of its processes."""
KEYS = ("method", "keep", "codebook")
HOW = "copy the arguments that `codebook vllm-args MODEL --method codebook --keep 0.2` prints"


@dataclass(frozen=True)
class VllmSettings:
    """One pruner before the LLM and what it keeps of every image.

    Attributes
    ----------
    stage
        At layer 0; its pruner needs projector outputs alone.
    """

    stage: Stage

    @classmethod
    def read(cls, hf_config: Any) -> VllmSettings:
        """The settings in a model's config.

        Parameters
        ----------
        hf_config
            The config that vLLM has of the model, `--hf-overrides` included.

        Raises
        ------
        CodebookError
            If there are none, one is missing, unknown or cannot be read, vLLM cannot do what they say, or the codebook
            is not there or of another dimension than the model.
        """
        given = getattr(hf_config, CONFIG_KEY, None)
        if given is None:
            raise CodebookError(f"the model's config has no {CONFIG_KEY}: {HOW}")
        settings = cls.of(given)
        width = hf_config.get_text_config().hidden_size
        for book in codebooks_of(settings.stage.pruner):
            if book.dimension != width:
                raise CodebookError(
                    f"the codebook {quoted(given['codebook'])}, for {book.config['model']}, has dimension "
                    f"{book.dimension}, and the visual tokens of this model have {width}: build one with `codebook "
                    "build`"
                )
        return settings

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> VllmSettings:
        """The settings that a dictionary of `method`, `keep` and `codebook` says, whatever the model."""
        if not isinstance(given, Mapping):
            raise CodebookError(f"{CONFIG_KEY} is {quoted(given)}: it must be a dictionary of {', '.join(KEYS)}")
        for key in given:
            if key not in KEYS:
                raise unknown(f"{CONFIG_KEY} has an unknown key", str(key), KEYS, f"its keys: {', '.join(KEYS)}")
        for key in KEYS[:2]:
            if given.get(key) is None:
                raise CodebookError(f"{CONFIG_KEY} lacks {key!r}: {HOW}")
        part = _read_method(given["method"])
        entry = part.entry  # asked before it is made at layer 0 with a keep, whose refusal names what vLLM has not
        for need, needed in (
            ("attention", entry.uses_attention),
            ("a layer's hidden states", entry.uses_change),
            ("to say how many tokens stay", entry.adaptive),
            ("a later layer", part.method == DROP),
        ):
            if needed:
                raise _beyond(part, need)
        try:
            check_keep(given["keep"])
        except CodebookError as error:
            raise CodebookError(f"{CONFIG_KEY}: {error}") from None
        stage = Schedule.parse(f"{given['method']}:1.0", _read_codebook(part, given.get("codebook"))).stages[0]
        if need := beyond_features(stage.pruner):
            raise _beyond(part, need)
        return cls(replace(stage, keep=given["keep"]))

    @cached_property
    def digest(self) -> str:
        """16 hexadecimal digits that differ where other tokens may be kept: by settings, codebook or version."""
        said = hashlib.sha256(json.dumps([__version__, str(self.stage)]).encode())
        for book in codebooks_of(self.stage.pruner):
            said.update(book.prototypes.numpy().tobytes())
        return said.hexdigest()[:16]

    def kept(self, layout: Layout) -> int:
        """Tokens that an image has in the prompt: the visual ones that stay, and its structural ones.

        A function of the image's size and the settings alone: vLLM needs it before the image is encoded.
        """
        return layout.length - layout.count + self.stage.count(layout.count)

    def choose(self, features: Sequence[Tensor], layouts: Sequence[Layout], pixels: Sequence[Tensor]) -> list[Tensor]:
        """Which tokens of several images stay; of each image the same as of that image alone.

        Parameters
        ----------
        features
            For each image (layout.length, d) float, what would enter the LLM for it: projector outputs and structural
            tokens.
        layouts
            How each image's tokens are laid out.
        pixels
            For each image its pixels, by which methods draw that draw at random.

        Returns
        -------
        For each image (kept(layout),) int64, ascending, on the features' device
        """
        images = [Image("image", layout, ()) for layout in layouts]
        units, places = [], []
        keys = cache(lambda: [mix(key) for key in digests(pixels)])
        for number, (image, own) in enumerate(zip(images, features, strict=True)):
            if len(own) != image.layout.length:
                raise CodebookError(
                    f"an image has {len(own)} visual tokens where {image.layout.length} were expected: this version of "
                    "vLLM is not supported"
                )
            for i, (grid, index) in enumerate(image.units(shared=False)):
                places.append(index.to(own.device))
                units.append(_unit(number, i, grid, own[places[-1]], keys))
        counts = targets(self.stage, images, units, ())
        chosen = choose(self.stage.pruner, units, counts, lambda number: _tokens(units[number]))
        kept = [torch.ones(len(own), dtype=torch.bool, device=own.device) for own in features]
        for unit, place, some in zip(units, places, chosen, strict=True):
            if some is not None:
                kept[unit.image][place] = torch.zeros_like(place, dtype=torch.bool).index_fill(0, some, True)
        return [
            torch.nonzero_static(mask, size=self.kept(image.layout)).flatten()
            for mask, image in zip(kept, images, strict=True)
        ]


def surviving(tokens: Tensor, index: Tensor) -> Tensor:
    """The tokens (keep, d) of an image (n, d) that stay; all NaN if one of them, dropped or not, is not finite.

    Methods choose anything among such values, and an answer from what they chose would hide the damage, which vLLM
    itself would show.
    """
    return tokens[index] + damage(tokens).sum()


def _unit(image: int, number: int, grid: tuple[int, int], features: Tensor, keys: Any) -> Unit:
    ordinal = torch.arange(len(features), device=features.device)
    return Unit(
        image=image,
        film=image,
        row=0,
        columns=ordinal,
        text=ordinal[:0],
        offset=0,
        grid=grid,
        ordinal=ordinal,
        key=lambda: keys()[image].to(features.device) ^ mix(torch.tensor(number, device=features.device)),
        features=features,
        whole=features,
        vision=None,
        encode=None,
    )


def _tokens(unit: Unit) -> VisualTokens:
    every = slice(0, unit.count)
    return VisualTokens(
        unit.features, unit.features, unit.features, every, unit.text, unit.ordinal, unit.grid, unit.key()
    )


def _beyond(part: StageText, need: str) -> CodebookError:
    return CodebookError(
        f"{CONFIG_KEY}: {part.method} needs {need}, and vLLM prunes where images are encoded, by projector outputs "
        "alone: use codebook-farthest, or farthest without a codebook"
    )


def _read_method(text: Any) -> StageText:
    """The stage that a method's text says, if it is a method with its options and no more."""
    written = read_text(text)
    if len(written.stages) != 1 or written.settings:
        raise CodebookError(f"{CONFIG_KEY}: method is {quoted(text)}: name one method, with its options if need be")
    part = written.stages[0]
    if part.layer:
        raise CodebookError(f"{CONFIG_KEY}: {quoted(text)} prunes at layer {part.layer}, and vLLM before the LLM only")
    if part.keep is not None:
        raise CodebookError(f"{CONFIG_KEY}: {quoted(text)} says its keep: leave it out, and say it as keep")
    if part.mass:
        raise CodebookError(
            f"{CONFIG_KEY}: {quoted(text)} has mass-preserving attention, which vLLM's attention cannot do: use "
            f"{part.method}, the same without it"
        )
    return part


def _read_codebook(part: StageText, name: Any) -> Codebook | None:
    if not part.entry.needs_codebook:
        if name is not None:
            raise CodebookError(f"{CONFIG_KEY}: {part.method} needs no codebook: leave it out")
        return None
    if name is None:
        raise CodebookError(f"{CONFIG_KEY} lacks 'codebook', which {part.method} needs: {HOW}")
    if not isinstance(name, str):
        raise CodebookError(f"{CONFIG_KEY}: codebook is {quoted(name)}: give a folder, or a name of `codebook list`")
    return Codebook.load(find_named(Path(name)))
