"""Settings of a build, and the published ones for each model."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from codebook import models
from codebook.building.candidates import auto
from codebook.errors import CodebookError
from codebook.models import Model
from codebook.store.parsing import fault_words

PROMPT = "What does this image show? You must provide a single word that best describes the image."


@dataclass(frozen=True)
class Settings:
    """What decides which tokens become prototypes (https://arxiv.org/abs/2503.20540); defaults: LLaVA-1.5-7B.

    Attributes
    ----------
    prompt
        The question of every probe, put into the model's own chat template.
    candidates
        Tokens probed in each image: `ranks`, `tiles`, `all` or `auto`; see `codebook.building.candidates`.
    tau_p
        A redundant token has P1 below this. None: a pilot chooses it (`codebook.building.pilot`).
    tau_j
        ... and `JSD_region + global_weight * JSD_global` below this. None as for `tau_p`.
    jsd
        `coded`: the authors' code, to which the published thresholds belong. `textbook`: nats; values are about
        ten times as large.
    clusters_per_image, max_cluster_size
        Isolated tokens are those in clusters of at most that many of the image's probed tokens.
    clusters, min_image_fraction
        Recurrent tokens are those in clusters whose members come from more than that fraction of the images. If
        `clusters` is None their number follows that of the survivors: see `codebook.building.pool`.
    neighbours, seed
        Neighbours in a point's density, and the seed of the tie-breaks, for both clusterings; also of which images a
        pilot probes and which a build sets aside.
    pad
        Token id whose word embedding takes a removed token's place. None: the model's own pad token, or what
        `codebook.building.probes.pad_token` takes for one.
    """

    __pydantic_config__ = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    prompt: str = PROMPT
    candidates: Literal["auto", "ranks", "tiles", "all"] = "auto"
    tau_p: float | None = 0.15
    tau_j: float | None = 2e-3
    global_weight: float = 16.0
    jsd: Literal["coded", "textbook"] = "coded"
    clusters_per_image: int = 8
    max_cluster_size: int = 8
    clusters: int | None = 64
    min_image_fraction: float = 64 / 500
    neighbours: int = 5
    seed: int = 0
    pad: int | None = None

    def __post_init__(self) -> None:
        if self.tau_p is not None and not 0 < self.tau_p <= 1:
            raise CodebookError(f"tau_p is {self.tau_p}: a probability above 0 and at most 1 is needed")
        if self.tau_j is not None and not 0 < self.tau_j < math.inf:
            raise CodebookError(f"tau_j is {self.tau_j}: a number above 0 is needed")
        if not 0 <= self.min_image_fraction < 1:
            raise CodebookError(f"min_image_fraction is {self.min_image_fraction}: it must be in [0, 1)")
        if not 0 <= self.global_weight < math.inf:
            raise CodebookError(f"global_weight is {self.global_weight}: a number of at least 0 is needed")
        for name in ("clusters_per_image", "max_cluster_size", "clusters", "neighbours"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise CodebookError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.pad is not None and self.pad < 0:
            raise CodebookError(f"pad is {self.pad}: a token id of at least 0 is needed")
        if not 0 <= self.seed < 2**63:
            raise CodebookError(f"seed is {self.seed}: it must be at least 0 and below 2**63")
        if not self.prompt.strip():
            raise CodebookError("the prompt is empty: write the question of every probe, or leave it out")
        if self.candidates not in ("auto", "ranks", "tiles", "all"):
            raise CodebookError(f"candidates is {self.candidates!r}: use auto, ranks, tiles or all")
        if self.jsd not in ("coded", "textbook"):
            raise CodebookError(f"jsd is {self.jsd!r}: use coded or textbook")

    @property
    def free(self) -> list[str]:
        """Names of the thresholds that a pilot has to choose."""
        return [name for name in ("tau_p", "tau_j") if getattr(self, name) is None]

    def per_image(self) -> dict[str, Any]:
        """The settings that decide what one image yields: all but those of the recurrence across images."""
        return {k: v for k, v in asdict(self).items() if k not in ("clusters", "min_image_fraction")}


def read_settings(settings: dict[str, Any], folder: Path | str) -> Settings:
    """The settings that a codebook's config holds.

    Raises
    ------
    CodebookError
        If they are not those of this version, or out of range.
    """
    try:
        return TypeAdapter(Settings).validate_json(json.dumps(settings))
    except (ValidationError, CodebookError) as error:
        wrong = str(error) if isinstance(error, CodebookError) else fault_words(error)
        raise CodebookError(
            f"the settings of {folder} are not of this version ({wrong}): build the codebook again"
        ) from None


BUILD_PRESETS = {
    "llava-1.5-7b": Settings(pad=0),
    "llava-1.5-13b": Settings(tau_p=0.077, tau_j=1.8e-3, pad=0),
    "llava-next-8b": Settings(tau_p=0.10),
    "llava-onevision-7b": Settings(
        tau_p=0.08, tau_j=1.8e-3, max_cluster_size=3, clusters=24, min_image_fraction=16 / 1200, pad=0
    ),
    # 24 of 144 tokens are probed, a quarter of 96, so clusters are smaller
    "miniature": Settings(prompt="describe.", tau_p=0.6, tau_j=0.1, max_cluster_size=3, clusters=16),
    "eyes": Settings(prompt="describe.", tau_p=0.995829, tau_j=0.0251042, max_cluster_size=3, clusters=16),
}
# parts of hub names, the most specific first
ALIASES = (
    (("llava-1.5-7b", "llava-v1.5-7b"), "llava-1.5-7b"),
    (("llava-1.5-13b", "llava-v1.5-13b"), "llava-1.5-13b"),
    (("llava-next-8b", "llama3-llava-next-8b"), "llava-next-8b"),
    (("llava-onevision-qwen2-7b", "llava-onevision-7b"), "llava-onevision-7b"),
)


def preset(name: str, **changes: Any) -> Settings:
    """The settings published for a model, some of them changed.

    Parameters
    ----------
    name
        A preset, or a model's hub name or folder whose last part contains one.
    changes
        Fields of `Settings`.
    """
    found = published(name)
    if found is None:
        raise CodebookError(
            f"no thresholds are known for {name}: choose a preset of {', '.join(BUILD_PRESETS)}, or none, and a pilot "
            "finds them"
        )
    return replace(found, **changes)


def published(name: str) -> Settings | None:
    """The settings that a model's name stands for, as `preset` finds them; None if none are published."""
    last = name.rstrip("/").rsplit("/", 1)[-1].lower()
    chosen = last if last in BUILD_PRESETS else next((p for parts, p in ALIASES if any(x in last for x in parts)), None)
    return None if chosen is None else BUILD_PRESETS[chosen]


def settings_for(model: Model) -> Settings:
    """The settings for a model that none are published for: a pilot finds the thresholds.

    What is counted in tokens is in proportion to LLaVA-1.5's: of its 96 probed tokens an isolated one is in a cluster
    of at most 8, and here of at most a twelfth of those probed.
    """
    family = models.family(model)
    kind, probed = auto(family.grid(model), family.has_cls(model))
    return Settings(
        candidates=kind, tau_p=None, tau_j=None, max_cluster_size=max(1, round(probed * 8 / 96)), clusters=None
    )
