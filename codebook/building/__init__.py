"""Building a codebook, offline: probes, conditions, clusters, and the journal that makes it resumable."""

from codebook.building.builder import build
from codebook.building.growing import extend, merge
from codebook.building.pilot import Pilot
from codebook.building.pool import STEPS, SurvivorPool
from codebook.building.presets import BUILD_PRESETS, Settings, preset, published, read_settings, settings_for
from codebook.building.sources import Source, left_out_words, open_images
from codebook.building.stability import Stability, is_stable
from codebook.building.unfinished import check_folder
from codebook.building.worker import Options, Progress

__all__ = [
    "BUILD_PRESETS",
    "STEPS",
    "Options",
    "Pilot",
    "Progress",
    "Settings",
    "Source",
    "Stability",
    "SurvivorPool",
    "build",
    "check_folder",
    "extend",
    "is_stable",
    "left_out_words",
    "merge",
    "open_images",
    "preset",
    "published",
    "read_settings",
    "settings_for",
]
