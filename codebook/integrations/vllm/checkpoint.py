"""Whether a codebook belongs to the weights that vLLM loads: by their fingerprint, while they pass by."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from codebook.errors import CodebookError
from codebook.models.fingerprint import fingerprint_of_weights, same_fingerprint, sampled_weights
from codebook.store.codebook import Codebook


class Watched:
    """The weights of a checkpoint as vLLM reads them, of which a few are noted for the fingerprint.

    vLLM joins and shards tower and projector in ways of its own, so that a loaded model does not show what they were.
    """

    def __init__(self, config: Any, books: Sequence[Codebook]) -> None:
        self._books, self._skeleton = books, _skeleton(config)
        self._wanted = {_plain(name): name for name in sampled_weights(self._skeleton)}
        self._found: dict[str, Tensor] = {}

    def passing(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The same weights, noted as they pass."""
        for name, weight in weights:
            if (own := self._wanted.get(_plain(name))) is not None:
                self._found[own] = weight.flatten()[weight.numel() // 2].float().cpu()
            yield name, weight

    def check(self) -> None:
        """Raise a CodebookError unless the codebooks were built for the weights that passed."""
        if missing := sorted(set(self._wanted.values()) - set(self._found)):
            raise CodebookError(
                f"the codebook cannot be compared with this model: its weights have no {missing[0]}; quantise the "
                "language model alone"
            )
        own = fingerprint_of_weights(self._skeleton, self._found)
        for book in self._books:
            if not same_fingerprint(book.config["fingerprint"], own):
                raise CodebookError(
                    f"the codebook was built for {book.config['model']}, and this model has another tower or "
                    "projector: build one with `codebook build`"
                )


def _skeleton(config: Any) -> Any:
    """transformers' model of a config, without weights and with one decoder layer."""
    from transformers import AutoModelForImageTextToText

    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = 1
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:1]
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


def _plain(name: str) -> str:
    """A weight's name without what versions of transformers have put in it or left out."""
    return name.removeprefix("model.").replace(".vision_model.", ".")
