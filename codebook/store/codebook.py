"""The codebook of redundancy prototypes: what building writes and pruning reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from codebook.errors import CodebookError, counted
from codebook.models import Model, adapter_words, fingerprint, same_fingerprint, shape
from codebook.store.card import make_card
from codebook.store.fetching import pull
from codebook.store.folder import (
    CONFIG,
    PROTOTYPES,
    check_lengths,
    packed,
    parse_book,
    read_folder,
    sealed,
    whole_config,
    write_folder,
)
from codebook.store.hub import push_files
from codebook.store.inverted import Place
from codebook.store.reading import is_file
from codebook.store.released import read_released
from codebook.store.search import Backend, PrototypeSearch


class Codebook:
    """Prototypes of redundant visual tokens, and where each came from (https://arxiv.org/abs/2503.20540).

    Attributes
    ----------
    prototypes : (N, d) float32
        Raw projector outputs, neither normalised nor averaged; a copy of those given. They stay as they are.
    provenance : list of N dicts
        For each prototype `image`, `row`, `col`, `p1`, `jsd_region`, `jsd_global`, `cluster`.
    config : dict
        What `config.json` holds: model, fingerprint, settings, funnel. See `docs/format.md`.
    folder : Path or None
        Where it was read from; None if it was made.

    Raises
    ------
    CodebookError
        If the prototypes are not of that shape and type, one is no number or all zeros, or the provenance has another
        length. Wherever tokens are compared: if they are not floats, or their d is not the prototypes'. Wherever the
        prototypes are used: if they were changed in place.
    """

    folder: Path | None = None

    def __init__(
        self,
        prototypes: Tensor,
        provenance: Sequence[dict[str, Any]] | None = None,
        config: dict[str, Any] | None = None,
    ) -> None:
        if not _are_rows(prototypes) or not prototypes.numel() or prototypes.dtype != torch.float32:
            raise CodebookError(f"prototypes are {_described(prototypes)}: they must be (N, d) float32, N >= 1")
        check_lengths(torch.linalg.vector_norm(prototypes.detach(), dim=1))
        rows = list(provenance) if provenance is not None else [{"cluster": 0} for _ in prototypes]
        if len(rows) != len(prototypes):
            raise CodebookError(
                f"provenance has {len(rows)} records for {len(prototypes)} prototypes: give one for each"
            )
        with torch.inference_mode(False):  # or writes to them would not be counted
            self._prototypes = prototypes.detach().clone(memory_format=torch.contiguous_format)
        self._written = self._prototypes._version
        self.provenance = rows
        self.config = whole_config(prototypes, config)
        self._search = PrototypeSearch(self.prototypes)

    def __len__(self) -> int:
        return len(self._prototypes)

    def __repr__(self) -> str:
        clusters = len({row["cluster"] for row in self.provenance})
        used = self.config.get("images", {}).get("used")
        images = f", from {counted(used, 'image')}" if used else ""
        kinds = f"{counted(len(self), 'prototype')} of dimension {self.dimension} in {counted(clusters, 'cluster')}"
        return f"<Codebook for {self.config['model']}: {kinds}{images}>"

    def __getstate__(self) -> dict[str, Any]:
        self._check_unchanged()
        return vars(self).copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _written=state["_prototypes"]._version)  # to be made counts as a write

    @property
    def prototypes(self) -> Tensor:
        """The prototypes, as the class says."""
        self._check_unchanged()
        return self._prototypes

    def _check_unchanged(self) -> None:
        if self._prototypes._version != self._written:
            raise CodebookError(
                "the prototypes of this codebook were changed in place, and its searches hold the former ones: make "
                "another one, `Codebook(prototypes, provenance, config)`, of a changed copy"
            )

    @property
    def spread(self) -> float | None:
        """Mean spread of the images that it was built from (`codebook.store.spread`); None if it does not say."""
        return self.config.get("spread")

    @property
    def dimension(self) -> int:
        """Numbers per prototype, d."""
        return self._prototypes.shape[1]

    # Similarity

    def redundancy(self, tokens: Tensor) -> Tensor:
        """The highest cosine similarity of each token to any prototype (section 3.3).

        For tokens on the CPU and codebooks of 20 000 prototypes or more, loaded from a folder, FAISS searches a part of
        the codebook: at least 0.999 of all keep decisions are those of the exact search (docs/building.md).

        A token is like nothing if its length is below 1e-12, or above 1e18, whose square float32 may not hold. To scale
        such tokens first would copy all tokens of every image; the normalisation of a decoder takes them for zeros too.

        Parameters
        ----------
        tokens : (..., d) float of any precision, on any device

        Returns
        -------
        (...) float32, on the tokens' device
        """
        self._check_tokens(tokens)
        return self._search.highest(tokens.reshape(-1, self.dimension)).reshape(tokens.shape[:-1])

    def similarity(self, tokens: Tensor) -> Tensor:
        """The cosine similarity of each token (n, d) to each prototype: (n, N) float32, on the tokens' device."""
        self._check_tokens(tokens, rows=True)
        return self._search.similarity(tokens)

    def search(self, tokens: Tensor, k: int = 1, backend: Backend = "auto") -> tuple[Tensor, Tensor]:
        """The `k` most similar prototypes of each token, by exact cosine similarity in float32.

        Parameters
        ----------
        tokens : (n, d) float
        k
            From 1 to the number of prototypes.
        backend
            `torch` works everywhere, on the tokens' device; `faiss` searches on the CPU, or on a GPU if faiss-gpu
            finds one. `auto` takes faiss for tokens on the CPU and large codebooks, when it is installed.

        Returns
        -------
        similarity : (n, k) float32, highest first
        index : (n, k) int64, rows of `prototypes`

        Raises
        ------
        CodebookError
            If `k` is none of these, or faiss is asked for and not installed.
        """
        self._check_tokens(tokens, rows=True)
        if not 1 <= k <= len(self):
            raise CodebookError(f"k is {k}: it must be from 1 to the {len(self)} prototypes of this codebook")
        return self._search.nearest(tokens, k, backend)

    def _check_tokens(self, tokens: Tensor, *, rows: bool = False) -> None:
        """Refuse tokens that are not (..., d), or with `rows` not (n, d), floats."""
        self._check_unchanged()
        if not isinstance(tokens, Tensor) or not tokens.is_floating_point():
            raise CodebookError(f"tokens are {_described(tokens)}: give projector outputs, a tensor (n, d) of floats")
        if tokens.dim() < 1 or tokens.shape[-1] != self.dimension or (rows and tokens.dim() != 2):
            raise CodebookError(
                f"tokens are {tuple(tokens.shape)} but this codebook, built for {self.config['model']}, has dimension "
                f"{self.dimension}: use projector outputs of that model, or `codebook build` one for yours"
            )

    # Making

    def extend(self, prototypes: Tensor, provenance: Sequence[dict[str, Any]] | None = None) -> Codebook:
        """A new codebook with more prototypes after these; this one stays as it is.

        Parameters
        ----------
        prototypes : (M, d) float
        provenance : M dicts; by default they name no image

        Raises
        ------
        CodebookError
            If d is another one, or the provenance has another length.
        """
        if not _are_rows(prototypes) or prototypes.shape[1] != self.dimension:
            raise CodebookError(
                f"cannot extend a codebook of dimension {self.dimension} with prototypes {_described(prototypes)}: "
                "take projector outputs of the same model"
            )
        more = Codebook(prototypes.detach().float().to(self.prototypes.device), provenance)
        # without the images' digest `codebook build` does not take the result for its own
        config = {k: v for k, v in self.config.items() if k not in ("images_sha256", "sha256")}
        config["extended_by"] = self.config.get("extended_by", 0) + len(more)
        return Codebook(torch.cat([self.prototypes, more.prototypes]), self.provenance + more.provenance, config)

    @classmethod
    def from_released(cls, tensor: Path | str, images: Path | str, model: str = "unknown") -> Codebook:
        """Read the format of the paper's authors: a half-precision `.pt` tensor and a JSON list of image ids.

        Parameters
        ----------
        tensor
            File with one tensor (N, d); read with `weights_only=True`, nothing is executed.
        images
            File with a list of N image ids.
        model
            What to name as the model; the files do not say.

        Raises
        ------
        CodebookError
            If a file is missing, damaged or of another form, or their lengths differ.
        """
        prototypes, ids = read_released(Path(tensor), Path(images))
        provenance = [{"image": name, "cluster": 0} for name in ids]
        return cls(prototypes, provenance, {"model": model, "source": Path(tensor).name})

    # Files

    def check(self, model: Model) -> None:
        """Raise a CodebookError unless this codebook was built for the model's tower and projector.

        Where a codebook has no fingerprint, as an imported one, only its dimension is checked.
        """
        own = self.config["fingerprint"]
        if own is not None and not same_fingerprint(own, fingerprint(model)):
            raise CodebookError(
                f"this codebook was built for {self.config['model']} (dimension {self.dimension}), and this model has "
                f"another tower or projector{adapter_words(model)}: build one with `codebook build`"
            )
        if self.dimension != (width := shape(model).hidden):
            raise CodebookError(
                f"this codebook, for {self.config['model']}, has dimension {self.dimension}, and the visual tokens of "
                f"this model have {width}: build one with `codebook build`"
            )

    def save(self, path: Path | str, others: Mapping[str, bytes] | None = None) -> None:
        """Write the folder described in `docs/format.md`; the same codebook gives the same bytes.

        Each file is replaced as a whole, and `config.json` last: it holds the others' SHA-256, so whoever reads
        meanwhile gets the old codebook or the new one. Other writers wait.

        Parameters
        ----------
        path
            The folder; made if it is not there.
        others
            More files for the folder, by name, such as the survivors of a build.

        Raises
        ------
        CodebookError
            If the folder cannot be written.
        """
        files = {**packed(self.prototypes, self.provenance), **(others or {})}
        self.config = write_folder(Path(path), self.config, files)

    def save_pretrained(self, save_directory: Path | str) -> None:
        """`save` into the folder `save_directory`, by the name that PEFT, sentence-transformers and others have."""
        self.save(save_directory)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str | None = None,
        licence: str | None = None,
    ) -> str:
        """Push the codebook and its card to a repository of the Hugging Face Hub; `codebook push` pushes a folder.

        Parameters
        ----------
        repo_id, private, token, commit_message
            As `codebook.store.hub.push_files` takes them.
        licence
            Licence of the codebook, in the Hub's words, such as apache-2.0.

        Returns
        -------
        Address of the commit.

        Raises
        ------
        CodebookError
            As `codebook.store.hub.push_files` does.
        """
        files = packed(self.prototypes, self.provenance)
        files = sealed(self.config, files, make_card(self.config, licence))
        return push_files(files, repo_id, private=private, token=token, commit_message=commit_message)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: Path | str,
        revision: str | None = None,
        *,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> Codebook:
        """Read a codebook's folder, or one that ships, or fetch it: from the registry, or the Hugging Face Hub.

        Parameters
        ----------
        name_or_path
            A folder, a name that `codebook list` shows, or `OWNER/NAME` on the hub.
        revision, token, local_files_only
            As `codebook.store.hub.pull_repository` takes them.

        Raises
        ------
        CodebookError
            If there is none, it cannot be fetched, or it is damaged.
        """
        path = Path(name_or_path)
        if is_file(path / CONFIG):
            if revision is not None:
                raise CodebookError(f"{path} is on this machine and has one revision: leave the revision out")
        else:
            # A text as it stands: ./a/b is a folder that is not there, and no repository a/b.
            name = name_or_path if isinstance(name_or_path, str) else path.as_posix()
            path = pull(name, revision, token=token, local_files_only=local_files_only)
        return cls.load(path)

    @classmethod
    def load(cls, path: Path | str) -> Codebook:
        """Read the codebook in the folder `path`, checking every file.

        Raises
        ------
        CodebookError
            If a file is missing, damaged, or of a format this version does not know.
        """
        path = Path(path)
        return cls.of_files(path, *read_folder(path))

    @classmethod
    def of_files(cls, path: Path, config: dict[str, Any], files: Mapping[str, bytes]) -> Codebook:
        """The codebook of the folder `path`, whose `config` and `files` `read_folder` has read."""
        prototypes, rows = parse_book(path, config, files)
        book = cls(torch.from_numpy(prototypes), rows, config)
        book.folder = path
        book._search = PrototypeSearch(book.prototypes, Place(path.absolute(), config["sha256"][PROTOTYPES]))
        return book


def _are_rows(given: Any) -> bool:
    """Whether it is a tensor (n, d) of floats."""
    return isinstance(given, Tensor) and given.dim() == 2 and given.is_floating_point()


def _described(given: Any) -> str:
    return f"{tuple(given.shape)} {given.dtype}" if isinstance(given, Tensor) else f"of type {type(given).__name__}"
