"""Building a codebook, offline: probes, conditions, clusters, and the journal that makes it resumable."""

from codebook.building.builder import Options, Progress, build, extend, merge
from codebook.building.pool import STEPS, Pool
from codebook.building.presets import PRESETS, Settings, preset
from codebook.building.sources import Source, open_images

__all__ = [
    "PRESETS", "STEPS", "Options", "Pool", "Progress", "Settings", "Source", "build", "extend", "merge", "open_images",
    "preset",
]  # fmt: skip
