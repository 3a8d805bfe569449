"""Relevance to the question, as far as the language model's own embeddings tell it."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import normalize

from codebook.errors import CodebookError
from codebook.pruning.tokens import VisualTokens


def likeness_to_question(tokens: VisualTokens) -> Tensor:
    """The cosine similarity of each visual token's hidden state to the mean of the question's.

    Before the LLM it is that of its input to the mean of the question's word embeddings. What of the text after the
    image is template and what is question the model cannot tell: all of it counts.

    Returns
    -------
    (n,) float32

    Raises
    ------
    CodebookError
        If there is no text after the image.
    """
    if not len(tokens.question):
        raise CodebookError("this method needs the question's text: use it in a schedule, on a model's own forward")
    question = normalize(tokens.sequence[tokens.question].float().mean(0), dim=0)
    return normalize(tokens.hidden.float(), dim=-1) @ question
