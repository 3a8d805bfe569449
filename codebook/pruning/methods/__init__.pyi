from codebook.pruning.methods.alpha import Alpha as Alpha
from codebook.pruning.methods.anchorprune import AnchorPrune as AnchorPrune
from codebook.pruning.methods.base import FeaturePruner as FeaturePruner
from codebook.pruning.methods.base import FramePruner as FramePruner
from codebook.pruning.methods.base import Pruner as Pruner
from codebook.pruning.methods.base import ScoringPruner as ScoringPruner
from codebook.pruning.methods.cdpruner import CDPruner as CDPruner
from codebook.pruning.methods.cls import Cls as Cls
from codebook.pruning.methods.combine import Union as Union
from codebook.pruning.methods.combine import Weighted as Weighted
from codebook.pruning.methods.combine import Window as Window
from codebook.pruning.methods.coverpruner import CoverPruner as CoverPruner
from codebook.pruning.methods.dart import Dart as Dart
from codebook.pruning.methods.divprune import DivPrune as DivPrune
from codebook.pruning.methods.downsample import Downsample as Downsample
from codebook.pruning.methods.drop import Drop as Drop
from codebook.pruning.methods.evs import EVS as EVS
from codebook.pruning.methods.farthest import FarthestPoint as FarthestPoint
from codebook.pruning.methods.farthest import SeededFarthestPoint as SeededFarthestPoint
from codebook.pruning.methods.fastv import FastV as FastV
from codebook.pruning.methods.merged import Merged as Merged
from codebook.pruning.methods.phi_knn import DensityPeaks as DensityPeaks
from codebook.pruning.methods.pool import Pool as Pool
from codebook.pruning.methods.random import Random as Random
from codebook.pruning.methods.redundancy import RedundancyCodebook as RedundancyCodebook
from codebook.pruning.methods.redundancy import RedundancyThreshold as RedundancyThreshold
from codebook.pruning.methods.registry import Method as Method
from codebook.pruning.methods.scope import SCOPE as SCOPE
from codebook.pruning.methods.score import SCoRe as SCoRe
from codebook.pruning.methods.sparsevlm import SparseVLM as SparseVLM
from codebook.pruning.methods.tops import TOPS as TOPS
from codebook.pruning.methods.uniform import Uniform as Uniform
from codebook.pruning.methods.vidcom2 import VidCom2 as VidCom2
from codebook.pruning.methods.visionzip import VisionZip as VisionZip

METHODS: dict[str, Method]
"""The methods by the names that schedules have for them."""
