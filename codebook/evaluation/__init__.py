"""Scores and cost of a model's answers to questions with known answers, with and without pruning."""

from codebook.evaluation.scores import (
    Scores,
    TaskScores,
    accuracy_table,
    compare,
    evaluate,
    mean,
    mean_text,
    scored,
    standard_error,
    task_means,
)

__all__ = [
    "Scores",
    "TaskScores",
    "accuracy_table",
    "compare",
    "evaluate",
    "mean",
    "mean_text",
    "scored",
    "standard_error",
    "task_means",
]
