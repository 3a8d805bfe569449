"""The codebook of redundancy prototypes: what building writes and pruning reads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from codebook.errors import CodebookError
from codebook.models import Model, fingerprint, same_fingerprint
from codebook.store.files import cannot_write, one_line, read_json, read_lines, sha256, write_files
from codebook.store.search import Backend, PrototypeSearch

FORMAT_VERSION = 1
CONFIG, PROTOTYPES, PROVENANCE, CARD = "config.json", "prototypes.safetensors", "provenance.jsonl", "README.md"
REQUIRED = ("format_version", "model", "fingerprint", "dimension", "prototypes", "sha256")


class Codebook:
    """Prototypes of redundant visual tokens, and where each came from (https://arxiv.org/abs/2503.20540).

    Attributes
    ----------
    prototypes : (N, d) float32
        Raw projector outputs, neither normalised nor averaged.
    provenance : list of N dicts
        For each prototype `image`, `row`, `col`, `p1`, `jsd_region`, `jsd_global`, `cluster`.
    config : dict
        What `config.json` holds: model, fingerprint, settings, funnel. See `docs/format.md`.
    """

    def __init__(
        self,
        prototypes: Tensor,
        provenance: Sequence[dict[str, Any]] | None = None,
        config: dict[str, Any] | None = None,
    ) -> None:
        if prototypes.dim() != 2 or not prototypes.numel() or prototypes.dtype != torch.float32:
            raise CodebookError(
                f"prototypes are {tuple(prototypes.shape)} {prototypes.dtype}: they must be (N, d) float32, N >= 1"
            )
        if not bool(prototypes.isfinite().all()):
            raise CodebookError("prototypes hold NaN or infinite values: rebuild with `codebook build`")
        rows = list(provenance) if provenance is not None else [{"cluster": 0} for _ in prototypes]
        if len(rows) != len(prototypes):
            raise CodebookError(
                f"provenance has {len(rows)} records for {len(prototypes)} prototypes: give one for each"
            )
        self.prototypes = prototypes.detach().contiguous()
        self.provenance = rows
        self.config = {
            "format_version": FORMAT_VERSION, "model": "unknown", "fingerprint": None,
            **(config or {}),
            "dimension": prototypes.shape[1], "prototypes": len(prototypes),
        }  # fmt: skip
        self._search = PrototypeSearch(self.prototypes)

    def __len__(self) -> int:
        return len(self.prototypes)

    def __repr__(self) -> str:
        return f"Codebook({len(self)} prototypes of dimension {self.dimension}, for {self.config['model']})"

    @property
    def spread(self) -> float | None:
        """Mean spread of the images that it was built from (`codebook.store.spread`); None if it does not say."""
        return self.config.get("spread")

    @property
    def dimension(self) -> int:
        return self.prototypes.shape[1]

    # Similarity

    def redundancy(self, tokens: Tensor) -> Tensor:
        """The highest cosine similarity of each token to any prototype (section 3.3).

        Parameters
        ----------
        tokens : (..., d) float of any precision, on any device

        Returns
        -------
        (...) float32, on the tokens' device
        """
        similarity, _ = self.search(tokens.reshape(-1, tokens.shape[-1]))
        return similarity.reshape(tokens.shape[:-1])

    def similarity(self, tokens: Tensor) -> Tensor:
        """The cosine similarity of each token (n, d) to each prototype: (n, N) float32, on the tokens' device."""
        self._check_dimension(tokens)
        return self._search.similarity(tokens)

    def search(self, tokens: Tensor, k: int = 1, backend: Backend = "auto") -> tuple[Tensor, Tensor]:
        """The `k` most similar prototypes of each token, by exact cosine similarity in float32.

        Parameters
        ----------
        tokens : (n, d) float
        backend
            `torch` works everywhere, on the tokens' device; `faiss` searches on the CPU. `auto` takes faiss for
            tokens on the CPU and large codebooks, when it is installed.

        Returns
        -------
        similarity : (n, k) float32, highest first
        index : (n, k) int64, rows of `prototypes`
        """
        self._check_dimension(tokens)
        if not 1 <= k <= len(self):
            raise CodebookError(f"k is {k}: it must be from 1 to the {len(self)} prototypes of this codebook")
        return self._search.nearest(tokens, k, backend)

    def _check_dimension(self, tokens: Tensor) -> None:
        if tokens.dim() != 2 or tokens.shape[1] != self.dimension:
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
        """
        if prototypes.dim() != 2 or prototypes.shape[1] != self.dimension:
            raise CodebookError(
                f"cannot extend a codebook of dimension {self.dimension} with prototypes {tuple(prototypes.shape)}: "
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
        """
        try:
            prototypes = torch.load(tensor, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises half a dozen types for a file that is no tensor
            raise CodebookError(f"cannot read {tensor}: {one_line(error)}; give the released .pt file") from None
        ids = read_json(Path(images))
        if not isinstance(prototypes, Tensor) or not prototypes.is_floating_point():
            raise CodebookError(f"{tensor} does not hold one tensor of floats: give the released .pt file")
        if not isinstance(ids, list):
            raise CodebookError(f"{images} does not hold a list of image ids: give the released .json file")
        provenance = [{"image": str(name), "cluster": 0} for name in ids]
        return cls(prototypes.detach().float(), provenance, {"model": model, "source": Path(tensor).name})

    # Files

    def check(self, model: Model) -> None:
        """Raise a CodebookError unless this codebook was built for the model's tower and projector.

        A codebook without a fingerprint, such as an imported one, is not refused.
        """
        own = self.config["fingerprint"]
        if own is not None and not same_fingerprint(own, fingerprint(model)):
            raise CodebookError(
                f"this codebook was built for {self.config['model']} (dimension {self.dimension}), and this model has "
                "another tower or projector: build one with `codebook build`"
            )

    def save(self, path: Path | str, others: Mapping[str, bytes] | None = None) -> None:
        """Write the folder described in `docs/format.md`; the same codebook gives the same bytes.

        Each file is replaced as a whole, `config.json` last: it holds the others' SHA-256, so that a folder caught
        half-way is recognised as such.

        Parameters
        ----------
        others
            More files for the folder, by name, such as the survivors of a build.
        """
        path = Path(path)
        tensors = save({"prototypes": self.prototypes.cpu()})
        rows = "".join(json.dumps(record) + "\n" for record in self.provenance).encode()
        files = {PROTOTYPES: tensors, PROVENANCE: rows, **(others or {})}
        config = {**self.config, "sha256": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}}
        text = (json.dumps(config, indent=2) + "\n").encode()
        try:
            path.mkdir(parents=True, exist_ok=True)
            write_files(path, {**files, CARD: _card(config).encode(), CONFIG: text})
        except OSError as error:
            raise cannot_write(path, error) from None
        self.config = config

    @classmethod
    def load(cls, path: Path | str) -> Codebook:
        """Read a codebook's folder, checking every file.

        Raises
        ------
        CodebookError
            If a file is missing, damaged, or of a format this version does not know.
        """
        path = Path(path)
        if not path.is_dir():
            raise CodebookError(f"no such folder: {path}; name a codebook, or make one with `codebook build`")
        config = read_json(path / CONFIG)
        if not isinstance(config, dict) or not isinstance(config.get("format_version"), int):
            raise CodebookError(f"{path / CONFIG} is not a codebook's: name a folder made by `codebook build`")
        if config["format_version"] != FORMAT_VERSION:
            raise CodebookError(
                f"{path} has format version {config['format_version']} and this package reads {FORMAT_VERSION}: "
                "upgrade the package, or rebuild with `codebook build`"
            )
        missing = [key for key in REQUIRED if key not in config]
        if missing or not isinstance(config["sha256"], dict):
            raise CodebookError(
                f"{path / CONFIG} lacks {', '.join(missing) or 'checksums'}: rebuild with `codebook build`"
            )
        verify(path, config, (PROTOTYPES, PROVENANCE))
        try:
            tensors = load_file(path / PROTOTYPES)
        except (SafetensorError, OSError, ValueError) as error:
            raise CodebookError(
                f"cannot read {path / PROTOTYPES}: {one_line(error)}; rebuild with `codebook build`"
            ) from None
        if set(tensors) != {"prototypes"}:
            raise CodebookError(
                f"{path / PROTOTYPES} must hold one tensor named prototypes: rebuild with `codebook build`"
            )
        prototypes = tensors["prototypes"]
        rows = []
        for number, row in read_lines(path / PROVENANCE, "rebuild with `codebook build`"):
            if not isinstance(row, dict):
                raise CodebookError(
                    f"cannot read {path / PROVENANCE}: line {number} is not a JSON object; "
                    "rebuild with `codebook build`"
                )
            rows.append(row)
        try:
            book = cls(prototypes, rows, config)
        except CodebookError as error:
            raise CodebookError(f"{path}: {error}") from None
        if (config["prototypes"], config["dimension"]) != tuple(prototypes.shape):
            raise CodebookError(
                f"{path}: prototypes are {tuple(prototypes.shape)} but {CONFIG} says "
                f"({config['prototypes']}, {config['dimension']}); rebuild with `codebook build`"
            )
        return book


def _card(config: dict[str, Any]) -> str:
    """A model card with the YAML front matter that the Hugging Face Hub reads."""
    funnel = config.get("funnel", {})
    lines = [
        "---",
        "library_name: codebook",
        "tags: [visual-token-pruning, vision-language-model]",
        "---",
        f"# Redundancy codebook for {config['model']}",
        "",
        f"{config['prototypes']} prototypes of dimension {config['dimension']}: projector outputs that were redundant "
        "in the images they come from and recur across images (https://arxiv.org/abs/2503.20540). "
        "Visual tokens most like them are pruned first.",
        "",
        "```python",
        "from codebook import Codebook",
        "book = Codebook.load(folder)",
        "scores = book.redundancy(tokens)  # prune the highest",
        "```",
    ]
    if funnel:
        lines += ["", "| step | tokens |", "|---|---|", *(f"| {k} | {v} |" for k, v in funnel.items())]
    return "\n".join(lines) + "\n"


def verify(folder: Path, config: dict[str, Any], names: Sequence[str]) -> None:
    """Raise a CodebookError unless these files of a codebook have the SHA-256 that its config gives."""
    for name in names:
        if sha256(folder / name) != config["sha256"].get(name):
            raise CodebookError(
                f"{folder / name} is damaged (its SHA-256 differs from the one in {CONFIG}): "
                "restore the file, or rebuild with `codebook build`"
            )
