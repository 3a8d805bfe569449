"""Timing side by side, as `codebook bench` does it."""

from codebook.evaluation.timing import interleaved, machine, quartiles

__all__ = ["interleaved", "machine", "quartiles"]
