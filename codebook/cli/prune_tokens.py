"""`codebook prune --tokens`: projector outputs pruned without a model."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from codebook.errors import CodebookError, printable
from codebook.pruning import RedundancyCodebook, Stage, VisualTokens
from codebook.pruning.stage import check_keep
from codebook.store.codebook import Codebook
from codebook.store.files import replacing
from codebook.store.known import find_named
from codebook.store.parsing import parse_tensors
from codebook.store.reading import read_tensor_bytes


def prune_tokens(source: Path, book: Path, keep: float, output: Path, as_json: bool) -> None:
    """Prune the tensors of a safetensors file by a codebook, and write what stays, and which tokens those are."""
    check_keep(keep)
    pruner = RedundancyCodebook(Codebook.load(find_named(book)))
    remedy = "give a safetensors file"
    tensors = parse_tensors(source, read_tensor_bytes(source, remedy), remedy)
    if not tensors:
        raise CodebookError(f"{source} holds no tensors: save projector outputs of (n, d) in it")
    for name in tensors:
        if (indices := f"{name}.index") in tensors:
            raise CodebookError(
                f"{source} has tensors {name!r} and {indices!r}, but the output needs the latter name for the indices "
                "kept of the former: rename one of them"
            )
    kept: dict[str, Tensor] = {}
    report = {}
    dimension = pruner.codebook.prototypes.shape[1]
    for name, tokens in tensors.items():
        if tokens.dim() != 2 or not tokens.is_floating_point() or tokens.shape[1] != dimension or not len(tokens):
            raise CodebookError(
                f"tensor {name!r} of {source} is {tuple(tokens.shape)} {tokens.dtype}: this codebook prunes floats of "
                f"(n, {dimension}), projector outputs of the model that it was built for"
            )
        if not tokens.float().isfinite().all():
            raise CodebookError(f"tensor {name!r} of {source} has values that are NaN or infinite: check what wrote it")
        index = pruner.select(VisualTokens.of(tokens), Stage(0, keep, pruner).count(len(tokens)))
        kept |= {name: tokens[index].contiguous(), f"{name}.index": index}
        report[name] = {"tokens": len(tokens), "kept": len(index)}
    with replacing(output) as temporary:
        temporary.write_bytes(save(kept))
    if as_json:
        print(json.dumps(report))
        return
    for name, found in report.items():
        print(f"{printable(name)}: {found['kept']} of {found['tokens']}")
