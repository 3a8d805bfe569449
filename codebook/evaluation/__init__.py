"""Answers to questions with known answers: scoring them, with and without pruning."""

from codebook.evaluation.scores import Scores, family_means, mean, score, standard_error

__all__ = ["Scores", "family_means", "mean", "score", "standard_error"]
