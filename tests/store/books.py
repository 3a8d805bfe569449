"""Small codebooks, and folders whose checksums are right again after a change."""

import hashlib
import json

import torch

from codebook.store.codebook import Codebook


def make(n=50, d=16, seed=0, **config):
    generator = torch.Generator().manual_seed(seed)
    provenance = [{"image": f"{i}.png", "row": i, "col": 0, "cluster": i % 3} for i in range(n)]
    return Codebook(torch.randn(n, d, generator=generator), provenance, {"model": "some/model"} | config)


def tokens(n=40, d=16, seed=1):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def reseal(folder, **changes):
    """Make the checksums right again, so that what they hide is seen."""
    config = json.loads((folder / "config.json").read_text()) | changes
    for name in config["sha256"]:
        config["sha256"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / "config.json").write_text(json.dumps(config))
