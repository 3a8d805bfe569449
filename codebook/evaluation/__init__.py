"""Answers to questions with known answers: scoring them, and what they cost, with and without pruning."""

from codebook.evaluation.scores import (
    Plan,
    Said,
    Scores,
    compare,
    mean,
    respond,
    score,
    scored,
    standard_error,
    table,
    task_means,
)

__all__ = [
    "Plan",
    "Said",
    "Scores",
    "compare",
    "mean",
    "respond",
    "score",
    "scored",
    "standard_error",
    "table",
    "task_means",
]
