"""Training-free visual-token pruning for vision-language models.

The public names are imported when first used, so that `import codebook` costs nothing.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "Alpha": "codebook.pruning",
    "CDPruner": "codebook.pruning",
    "Cls": "codebook.pruning",
    "Codebook": "codebook.store.codebook",
    "CodebookError": "codebook.errors",
    "Dart": "codebook.pruning",
    "DensityPeaks": "codebook.pruning",
    "DivPrune": "codebook.pruning",
    "Downsample": "codebook.pruning",
    "Drop": "codebook.pruning",
    "FarthestPoint": "codebook.pruning",
    "FastV": "codebook.pruning",
    "FeaturePruner": "codebook.pruning",
    "Pool": "codebook.pruning",
    "Pruner": "codebook.pruning",
    "Random": "codebook.pruning",
    "RedundancyCodebook": "codebook.pruning",
    "RedundancyThreshold": "codebook.pruning",
    "Schedule": "codebook.pruning",
    "ScoringPruner": "codebook.pruning",
    "SeededFarthestPoint": "codebook.pruning",
    "SparseVLM": "codebook.pruning",
    "Stage": "codebook.pruning",
    "Uniform": "codebook.pruning",
    "Union": "codebook.pruning",
    "VisionZip": "codebook.pruning",
    "VisualTokens": "codebook.pruning",
    "Weighted": "codebook.pruning",
    "Window": "codebook.pruning",
    "ask": "codebook.inference.ask",
    "build": "codebook.building",
    "load": "codebook.models",
    "prebuilt": "codebook.store.shipped",
    "remember": "codebook.pruning",
}

__all__ = sorted(_HOME)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'codebook' has no attribute {name!r}")
