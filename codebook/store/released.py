"""The format of the method's authors: a `.pt` file with one tensor, and a JSON list of image ids.

The only place where torch reads a pickle, with `weights_only=True`: nothing in it is executed. What could fill the
memory is refused first.
"""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from codebook.errors import CodebookError
from codebook.store.reading import LARGEST_TENSORS, cannot_read, open_regular, read_json

GIVE_PT = "give the released .pt file"


def read_released(tensor: Path, images: Path) -> tuple[Tensor, list[str]]:
    """Prototypes (N, d) in float32, and the ids of the N images that they are from.

    Raises
    ------
    CodebookError
        If a file cannot be read, or holds something else.
    """
    prototypes = _read_tensor(tensor)
    ids = read_json(images, "give the released .json file, a list of image ids", list[str | int])
    if len(ids) != len(prototypes):
        raise CodebookError(
            f"{images} has {len(ids)} records for {len(prototypes)} prototypes: give the .json file beside the .pt file"
        )
    return prototypes, [str(name) for name in ids]


def _read_tensor(path: Path) -> Tensor:
    try:
        with open(open_regular(path, LARGEST_TENSORS), "rb") as file:
            # Parts that are stored as they are, and none inside another: what is read is no more than the file holds.
            parts = zipfile.ZipFile(file).infolist()
            whole = os.fstat(file.fileno()).st_size
            if any(part.compress_type for part in parts) or sum(part.file_size for part in parts) > whole:
                raise CodebookError(f"{path} is packed, which torch.save never does: {GIVE_PT}")
            file.seek(0)
            found = torch.load(file, map_location="cpu", weights_only=True)
    except CodebookError:
        raise
    except OSError as error:
        raise cannot_read(path, error, GIVE_PT) from None
    except Exception:  # torch and zipfile raise half a dozen types, and torch advises to run what the file says
        raise CodebookError(
            f"cannot read {path}: it holds no tensor that can be read without running code; {GIVE_PT}"
        ) from None
    # A tensor may say that it is larger than its numbers, by strides of 0: it would grow when it is converted.
    plain = isinstance(found, Tensor) and found.layout == torch.strided and found.device.type == "cpu"
    if not (plain and found.is_floating_point() and found.dim() == 2 and found.is_contiguous()):
        raise CodebookError(f"{path} does not hold one tensor of floats, (N, d): {GIVE_PT}")
    return found.detach().float()
