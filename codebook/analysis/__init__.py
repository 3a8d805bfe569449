
from codebook.analysis.information import Information, token_information
from codebook.analysis.prefill import Prefill

__all__ = [
    "Information",
    "Prefill",
    "token_information",
]
