"""Answers to questions with known answers: scoring them, and what they cost, with and without pruning."""

from codebook.evaluation.scores import Scores, compare, mean, score, scored, standard_error, table, task_means
from codebook.inference.respond import Policy, Said, respond

__all__ = [
    "Policy",
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
