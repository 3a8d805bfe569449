"""Where in a model visual tokens matter: token information, the information horizon, calibrated schedules."""

from codebook.analysis.calibration import Calibration, calibrate
from codebook.analysis.horizon import Horizon, horizons
from codebook.analysis.information import Information, token_information
from codebook.analysis.layer_sweep import Sweep, sweep
from codebook.analysis.onset import Onset, agreements, onsets
from codebook.analysis.prefill import Prefill

__all__ = [
    "Calibration",
    "Horizon",
    "Information",
    "Onset",
    "Prefill",
    "Sweep",
    "agreements",
    "calibrate",
    "horizons",
    "onsets",
    "sweep",
    "token_information",
]
