"""Building a codebook, offline: probes, conditions, clusters, and the journal that makes it resumable."""

from codebook.building.builder import build, extend, merge
from codebook.building.pool import STEPS, SurvivorPool
from codebook.building.presets import BUILD_PRESETS, Settings, preset, read_settings
from codebook.building.sources import Source, left_out_words, open_images
from codebook.building.worker import Options, Progress

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
    "left_out_words",
    "merge",
    "open_images",
    "preset",
    "read_settings",
]
