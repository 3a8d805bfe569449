"""The pruning methods, one small file each. `METHODS` names them as schedules spell them."""

from collections.abc import Callable
from functools import partial

from codebook.pruning.methods.alpha import Alpha
from codebook.pruning.methods.base import FeaturePruner, Pruner, ScoringPruner
from codebook.pruning.methods.cdpruner import CDPruner
from codebook.pruning.methods.cls import Cls
from codebook.pruning.methods.combine import Union, Weighted, Window
from codebook.pruning.methods.dart import Dart
from codebook.pruning.methods.divprune import DivPrune
from codebook.pruning.methods.downsample import Downsample
from codebook.pruning.methods.drop import Drop
from codebook.pruning.methods.farthest import FarthestPoint, SeededFarthestPoint
from codebook.pruning.methods.fastv import FastV
from codebook.pruning.methods.phi_knn import DensityPeaks
from codebook.pruning.methods.pool import Pool
from codebook.pruning.methods.random import Random
from codebook.pruning.methods.redundancy import RedundancyCodebook, RedundancyThreshold
from codebook.pruning.methods.sparsevlm import SparseVLM
from codebook.pruning.methods.uniform import Uniform
from codebook.pruning.methods.visionzip import VisionZip

__all__ = [
    "METHODS",
    "Alpha",
    "CDPruner",
    "Cls",
    "Dart",
    "DensityPeaks",
    "DivPrune",
    "Downsample",
    "Drop",
    "FarthestPoint",
    "FastV",
    "FeaturePruner",
    "Pool",
    "Pruner",
    "Random",
    "RedundancyCodebook",
    "RedundancyThreshold",
    "ScoringPruner",
    "SeededFarthestPoint",
    "SparseVLM",
    "Uniform",
    "Union",
    "VisionZip",
    "Weighted",
    "Window",
]

METHODS: dict[str, Callable[..., Pruner]] = {
    "alpha": Alpha,
    "cdpruner": CDPruner,
    "cls": Cls,
    "codebook": RedundancyCodebook,
    "codebook-farthest": SeededFarthestPoint,
    "codebook-threshold": RedundancyThreshold,
    "dart": Dart,
    "divprune": DivPrune,
    "downsample": Downsample,
    "drop": Drop,
    "farthest": FarthestPoint,
    "fastv": FastV,
    "fastv-image": partial(FastV, image_only=True),
    "fastv-norope": partial(FastV, rotated=False, image_only=True),
    "fastv-reverse": partial(FastV, reverse=True),
    "fastv-vis": partial(FastV, query="visual"),
    "fastv-window": partial(Window, FastV()),
    "feather-ensemble": partial(Union, Uniform(), FastV(rotated=False, image_only=True)),
    "phi-knn": DensityPeaks,
    "pool": Pool,
    "random": Random,
    "sparsevlm": SparseVLM,
    "uniform": Uniform,
    "visionzip": VisionZip,
}
