"""Building a codebook, offline: probes, conditions, clusters, and the journal that makes it resumable."""

from codebook.building.builder import STEPS, Progress, build, list_images
from codebook.building.presets import PRESETS, Settings, preset

__all__ = ["PRESETS", "STEPS", "Progress", "Settings", "build", "list_images", "preset"]
