"""Search for the prototypes most like a visual token: by a matrix product on any device, or by FAISS."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from codebook.errors import CodebookError, install_command
from codebook.store.inverted import Place, Vectors, inverted_file

# Measured on 2 cores, 576 tokens, d = 160 to 4096: torch and faiss are level up to 10 000 prototypes, and at
# 20 000 faiss is 1.3 times faster for d >= 1024.
FAISS_FROM = 20_000
"""Prototypes from which `auto` searches with FAISS for tokens on the CPU, and `highest` by an inverted file."""
SIMILARITIES_HELD = 2**24
"""Similarities held at once: 64 MiB in float32, whatever the number of tokens and prototypes."""

Backend = Literal["auto", "torch", "faiss"]


class PrototypeSearch:
    """Cosine similarity of tokens to prototypes, in float32.

    Normalised prototypes are kept once per device, and FAISS's copy of them on a GPU from its first use on.

    Parameters
    ----------
    prototypes : (N, d) float32
    place
        Where an inverted file can be kept; without one every search is exact.
    """

    def __init__(self, prototypes: Tensor, place: Place | None = None) -> None:
        self.prototypes = prototypes
        self.place = place
        self._unit: dict[torch.device, Tensor] = {}
        self._on_gpu: Any = None

    def highest(self, tokens: Tensor) -> Tensor:
        """The highest cosine similarity of each token to any prototype.

        Exact, unless the tokens are on the CPU, the codebook is large and has a place on disk, and FAISS has no GPU:
        then by an inverted file, which may miss the nearest prototype of a few tokens (`codebook.store.inverted`).

        Parameters
        ----------
        tokens : (n, d) float of any precision, on any device

        Returns
        -------
        (n,) float32, on the tokens' device
        """
        index = self._inverted if self.place is not None and self._large(tokens) else None
        if index is None:
            return self.nearest(tokens, 1)[0][:, 0]
        return torch.from_numpy(index.search(_query(tokens), 1)[0][:, 0])

    def similarity(self, tokens: Tensor) -> Tensor:
        """The cosine similarity of each token to each prototype.

        Parameters
        ----------
        tokens : (n, d) float of any precision, on any device

        Returns
        -------
        (n, N) float32, on the tokens' device
        """
        with torch.autocast(tokens.device.type, enabled=False):  # whose products would be in half precision
            return normalize(tokens.float(), dim=1) @ self._on(tokens.device).T

    def nearest(self, tokens: Tensor, k: int, backend: Backend = "auto") -> tuple[Tensor, Tensor]:
        """The `k` most similar prototypes of each token, best first.

        Parameters
        ----------
        tokens : (n, d) float

        Returns
        -------
        similarity : (n, k) float32
        index : (n, k) int64, rows of the prototypes

        Raises
        ------
        CodebookError
            If the backend is unknown or not installed.
        """
        if backend not in ("auto", "torch", "faiss"):
            raise CodebookError(f"no search backend {backend!r}: use auto, torch or faiss")
        if backend == "faiss" or (backend == "auto" and self._large(tokens) and faiss_or_none() is not None):
            return self._by_faiss(tokens, k)
        return self._by_torch(tokens, k)

    def _by_torch(self, tokens: Tensor, k: int) -> tuple[Tensor, Tensor]:
        found = []
        for part in tokens.split(max(1, SIMILARITIES_HELD // len(self.prototypes))):
            similarity = self.similarity(part)
            # max is several times faster than topk, and pruning only ever asks for the first
            found.append(similarity.max(dim=1, keepdim=True) if k == 1 else similarity.topk(k, dim=1))
        if not found:
            return tokens.new_empty(0, k, dtype=torch.float32), tokens.new_empty(0, k, dtype=torch.int64)
        return torch.cat([f[0] for f in found]), torch.cat([f[1] for f in found])

    def _by_faiss(self, tokens: Tensor, k: int) -> tuple[Tensor, Tensor]:
        faiss = faiss_or_none()
        if faiss is None:
            raise CodebookError(
                f"faiss is not installed: `{install_command('cpu')}` (with CUDA `gpu`), or use backend torch"
            )
        unit = self._on(torch.device("cpu")).numpy()
        if not has_gpu(faiss):
            similarity, index = faiss.knn(_query(tokens), unit, k, faiss.METRIC_INNER_PRODUCT)
        else:
            if self._on_gpu is None:
                self._on_gpu = faiss.GpuIndexFlatIP(faiss.StandardGpuResources(), unit.shape[1])
                self._on_gpu.add(unit)
            similarity, index = self._on_gpu.search(_query(tokens), k)
        return torch.from_numpy(similarity).to(tokens.device), torch.from_numpy(index).to(tokens.device)

    def _large(self, tokens: Tensor) -> bool:
        """Whether FAISS, which gives no gradients, is the faster one."""
        learning = torch.is_grad_enabled() and tokens.requires_grad
        return tokens.device.type == "cpu" and len(self.prototypes) >= FAISS_FROM and not learning

    @cached_property
    def _inverted(self) -> Any:
        """The inverted file, or None where there is none."""
        faiss = faiss_or_none()
        if faiss is None or has_gpu(faiss) or self.place is None:
            return None
        return inverted_file(faiss, lambda: normalize(self.prototypes.cpu(), dim=1).numpy(), self.place)

    def _on(self, device: torch.device) -> Tensor:
        """The prototypes on a device, each of length 1."""
        if device not in self._unit:
            # A tensor that is first made in inference mode could not be part of a backward pass later.
            with torch.inference_mode(False), torch.no_grad():
                self._unit[device] = normalize(self.prototypes.to(device), dim=1)
        return self._unit[device]


def _query(tokens: Tensor) -> Vectors:
    return normalize(tokens.detach().float(), dim=1).cpu().numpy()


def faiss_or_none() -> Any:
    """The module `faiss`, or None where it is not installed."""
    try:
        import faiss
    except ImportError:
        return None
    return faiss


def has_gpu(faiss: Any) -> bool:
    """Whether FAISS is built for GPUs and finds one."""
    return hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0


def exact_search(faiss: Any) -> Callable[..., Any]:
    """FAISS's exact search without an index, `knn(queries, points, k, metric=...)`, on a GPU where it finds one."""
    return partial(faiss.knn_gpu, faiss.StandardGpuResources()) if has_gpu(faiss) else faiss.knn
