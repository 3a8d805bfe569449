"""Answers to questions with known answers: scoring them, with and without pruning."""

from codebook.evaluation.scores import Plan, Scores, compare, family_means, mean, score, standard_error, table

__all__ = ["Plan", "Scores", "compare", "family_means", "mean", "score", "standard_error", "table"]
