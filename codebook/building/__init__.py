"""Building a codebook, offline: probes, conditions, clusters, and the journal that makes it resumable."""

from codebook.building.builder import Options, Progress, build, extend, merge
from codebook.building.pool import STEPS, SurvivorPool
from codebook.building.presets import BUILD_PRESETS, Settings, preset
from codebook.building.sources import Source, open_images

__all__ = [
    "BUILD_PRESETS",
    "STEPS",
    "Options",
    "Progress",
    "Settings",
    "Source",
    "SurvivorPool",
    "build",
    "extend",
    "merge",
    "open_images",
    "preset",
]  # fmt: skip
