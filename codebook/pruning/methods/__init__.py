"""The pruning methods, one small file each. `METHODS` is their registry: every list of methods is made from it."""

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
from codebook.pruning.methods.registry import Method
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

METHODS: dict[str, Method] = {
    "alpha": Method(Alpha),
    "cdpruner": Method(CDPruner),
    "cls": Method(Cls),
    "codebook": Method(RedundancyCodebook),
    "codebook-farthest": Method(SeededFarthestPoint),
    "codebook-threshold": Method(RedundancyThreshold),
    "dart": Method(Dart),
    "divprune": Method(DivPrune),
    "downsample": Method(Downsample),
    "drop": Method(Drop),
    "farthest": Method(FarthestPoint),
    "fastv": Method(FastV),
    "fastv-image": Method(FastV, image_only=True),
    "fastv-norope": Method(FastV, rotated=False, image_only=True),
    "fastv-reverse": Method(FastV, reverse=True),
    "fastv-vis": Method(FastV, query="visual"),
    "fastv-window": Method(Window, ranking=FastV()),
    "feather-ensemble": Method(Union, first=Uniform(), second=FastV(rotated=False, image_only=True)),
    "phi-knn": Method(DensityPeaks),
    "pool": Method(Pool),
    "random": Method(Random),
    "sparsevlm": Method(SparseVLM),
    "uniform": Method(Uniform),
    "visionzip": Method(VisionZip),
}
"""The methods by the names that schedules have for them."""
