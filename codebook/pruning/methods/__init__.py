"""The pruning methods, one small file each. `METHODS` is their registry: every list of methods is made from it.

Classes are imported when they are first used, so that methods can be listed without torch. `__init__.pyi` says the same
to type checkers.
"""

from importlib import import_module
from typing import Any

from codebook.pruning.methods.registry import Method

METHODS: dict[str, Method] = {
    "alpha": Method("alpha", "Alpha"),
    "anchorprune": Method("anchorprune", "AnchorPrune"),
    "cdpruner": Method("cdpruner", "CDPruner"),
    "cen-cdpruner": Method("cdpruner", "CDPruner", centred=True),
    "cen-divprune": Method("divprune", "DivPrune", centred=True),
    "cls": Method("cls", "Cls"),
    "codebook": Method("redundancy", "RedundancyCodebook"),
    "codebook-farthest": Method("farthest", "SeededFarthestPoint"),
    "codebook-middle": Method("farthest", "SeededFarthestPoint", middle=True),
    "codebook-threshold": Method("redundancy", "RedundancyThreshold"),
    "coverpruner": Method("coverpruner", "CoverPruner"),
    "dart": Method("dart", "Dart"),
    "divprune": (DIVPRUNE := Method("divprune", "DivPrune")),
    "divprune-merged": Method("merged", "Merged", first=DIVPRUNE),
    "divprune-window": Method("combine", "Window", pruner=DIVPRUNE),
    "downsample": Method("downsample", "Downsample"),
    "drop": Method("drop", "Drop"),
    "evs": Method("evs", "EVS"),
    "farthest": Method("farthest", "FarthestPoint"),
    "fastv": (FASTV := Method("fastv", "FastV")),
    "fastv-image": Method("fastv", "FastV", image_only=True),
    "fastv-norope": (NOROPE := Method("fastv", "FastV", rotated=False, image_only=True)),
    "fastv-reverse": Method("fastv", "FastV", reverse=True),
    "fastv-vis": Method("fastv", "FastV", query="visual"),
    "fastv-window": Method("combine", "Window", pruner=FASTV),
    "feather-ensemble": Method("combine", "Union", first=Method("uniform", "Uniform", phase="corner"), second=NOROPE),
    "nuwa": Method("nuwa", "Nuwa"),
    "phi-knn": Method("phi_knn", "DensityPeaks"),
    "pool": Method("pool", "Pool"),
    "random": Method("random", "Random"),
    "s2prune": Method("s2prune", "S2Prune"),
    "scope": Method("scope", "SCOPE"),
    "score": Method("score", "SCoRe"),
    "sparsevlm": Method("sparsevlm", "SparseVLM"),
    "tops": Method("tops", "TOPS"),
    "tops-text": Method("tops", "TOPS", relevance=Method("fastv", "FastV", query="question")),
    "uniform": Method("uniform", "Uniform"),
    "vidcom2": Method("vidcom2", "VidCom2"),
    "visionzip": Method("visionzip", "VisionZip"),
}
"""The methods by the names that schedules have for them."""

_PARTS = {
    "FeaturePruner": "base",
    "FramePruner": "base",
    "Pruner": "base",
    "ScoringPruner": "base",
    "Weighted": "combine",
}
"""Module of each public class that no name stands for."""
_MODULES = {method.name: method.module for method in METHODS.values()} | _PARTS

__all__ = ["METHODS"]
__all__ += sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
