"""Visual tokens without a model, and a ranking of them, for examples that are worked out by hand."""

import torch

from codebook.pruning import ScoringPruner, VisualTokens


def tokens(rows, cols, features=None, key=0, text=None, **options):
    """An image's tokens, and after them in the sequence the text (T, d), by default one word of zeros."""
    n = rows * cols
    features = torch.zeros(n, 2) if features is None else features
    text = features.new_zeros(1, features.shape[1]) if text is None else text
    sequence, question = torch.cat([features, text]), n + torch.arange(len(text))
    return VisualTokens(
        features, features, sequence, slice(0, n), question, torch.arange(n), (rows, cols), torch.tensor(key), **options
    )


class Ranking(ScoringPruner):
    """Scores as given."""

    def __init__(self, *scores):
        self.scores = torch.tensor(scores, dtype=torch.float32)

    def score(self, tokens):
        return self.scores[tokens.ordinal].clone()
