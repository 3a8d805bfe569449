"""All survivors of a build, of which those that recur become prototypes; kept beside them, so that a build can grow."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from codebook.building.clustering import dpc_knn
from codebook.building.presets import Settings
from codebook.errors import CodebookError
from codebook.store.codebook import Codebook, verify
from codebook.store.files import read_lines

STEPS = ("probed", "isolated", "P1", "JSD", "recurrent")
SURVIVORS, IMAGE_RECORDS = "survivors.safetensors", "images.jsonl"


@dataclass(frozen=True)
class SurvivorPool:
    """The survivors of some images: tokens that are redundant and isolated in their image.

    Attributes
    ----------
    images
        For each image, by name in sorted order, `stamp` and either `funnel` (tokens left by each step) and `spread` or
        `error`.
    features : (M, d) float32
        In the order of the images' names, raster order inside an image.
    rows
        For each survivor `image`, `row`, `col`, `p1`, `jsd_region`, `jsd_global`.
    """

    images: dict[str, dict[str, Any]]
    features: Tensor
    rows: list[dict[str, Any]]

    @property
    def used(self) -> list[str]:
        return [name for name, image in self.images.items() if "funnel" in image]

    @property
    def skipped(self) -> list[str]:
        return [name for name, image in self.images.items() if "error" in image]

    @property
    def funnel(self) -> dict[str, int]:
        """Tokens left by each step before recurrence, over all images."""
        return {step: sum(self.images[name]["funnel"][step] for name in self.used) for step in STEPS[:-1]}

    @property
    def spread(self) -> float | None:
        """The images' mean spread (`codebook.store.spread`); None if that of one is not known."""
        known = [self.images[name]["spread"] for name in self.used if "spread" in self.images[name]]
        return round(sum(known) / len(known), 6) if len(known) == len(self.used) > 0 else None

    @property
    def digest(self) -> str:
        """A hash that identifies the images, by names and stamps."""
        return images_digest({name: image["stamp"] for name, image in self.images.items()})

    def join(self, other: SurvivorPool) -> SurvivorPool:
        """The survivors of both. Of an image that both have, this one's count.

        Raises
        ------
        CodebookError
            If they give one name to different images.
        """
        same = self.images.keys() & other.images.keys()
        if different := sorted(name for name in same if self.images[name]["stamp"] != other.images[name]["stamp"]):
            raise CodebookError(
                f"{len(different)} names, {different[0]} first, are of different images in the two: rename the images "
                "of one, or give their folders a common one and build from that"
            )
        new = [i for i, row in enumerate(other.rows) if row["image"] not in same]
        rows = [*self.rows, *(other.rows[i] for i in new)]
        order = sorted(range(len(rows)), key=lambda i: (rows[i]["image"], rows[i]["row"], rows[i]["col"]))
        features = torch.cat([self.features, other.features[new]])[order]
        return SurvivorPool(dict(sorted({**other.images, **self.images}.items())), features, [rows[i] for i in order])

    def recurring(self, settings: Settings) -> tuple[list[int], list[int]]:
        """Positions of the survivors that recur across images, and the cluster of every survivor (section 3.2).

        A cluster is kept if its members come from more than `min_image_fraction` of the images, and every member of it
        becomes a prototype.
        """
        labels = dpc_knn(self.features, settings.clusters, settings.neighbours, settings.seed).tolist()
        images = [row["image"] for row in self.rows]
        return recurrent(labels, images, len(self.used), settings.min_image_fraction), labels

    def codebook(self, settings: Settings, config: dict[str, Any]) -> tuple[Codebook, dict[str, bytes]] | None:
        """The codebook of the survivors that recur, and the files that keep the others; None if none do."""
        kept, labels = self.recurring(settings)
        if not kept:
            return None
        config = {
            **config,
            "images_sha256": self.digest,
            "images": {"used": len(self.used), "skipped": self.skipped},
            "funnel": {**self.funnel, "recurrent": len(kept)},
            **({} if self.spread is None else {"spread": self.spread}),
        }
        book = Codebook(self.features[kept], [{**self.rows[i], "cluster": labels[i]} for i in kept], config)
        rest = sorted(set(range(len(self.rows))) - set(kept))
        others: dict[str, list[dict[str, Any]]] = {}
        for i in rest:
            row = dict(self.rows[i])
            others.setdefault(row.pop("image"), []).append(row)
        lines = [
            {"image": name, **image, **({"survivors": others[name]} if name in others else {})}
            for name, image in self.images.items()
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        return book, {SURVIVORS: save({"features": self.features[rest]}), IMAGE_RECORDS: text.encode()}

    @classmethod
    def load(cls, folder: Path | str) -> tuple[Codebook, SurvivorPool]:
        """A codebook, and the survivors that it was made from.

        Raises
        ------
        CodebookError
            If the folder is no codebook, does not keep its survivors, or is damaged.
        """
        folder = Path(folder)
        book = Codebook.load(folder)
        if not {SURVIVORS, IMAGE_RECORDS} <= book.config["sha256"].keys():
            raise CodebookError(
                f"{folder} does not keep the survivors that were not recurrent, which may recur among more images: "
                "build it again with this version"
            )
        verify(folder, book.config, (SURVIVORS, IMAGE_RECORDS))
        try:
            lines = [line for _, line in read_lines(folder / IMAGE_RECORDS, "build the codebook again")]
            rest = [{"image": line["image"], **row} for line in lines for row in line.get("survivors", ())]
            images = {
                line["image"]: {k: v for k, v in line.items() if k not in ("image", "survivors")} for line in lines
            }
            features = load_file(folder / SURVIVORS)["features"]
            own = [{k: v for k, v in row.items() if k != "cluster"} for row in book.provenance]
            rows = [*own, *rest]
            if len(features) != len(rest) or not {row["image"] for row in rows} <= images.keys():
                raise ValueError("it does not fit the prototypes")
            order = sorted(range(len(rows)), key=lambda i: (rows[i]["image"], rows[i]["row"], rows[i]["col"]))
            both = torch.cat([book.prototypes, features])[order]
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise CodebookError(f"cannot read {folder / IMAGE_RECORDS}: {error}; build the codebook again") from None
        return book, cls(dict(sorted(images.items())), both, [rows[i] for i in order])


def images_digest(stamps: dict[str, Any]) -> str:
    """A hash that identifies a list of images: their names and stamps, sorted by name."""
    return hashlib.sha256(json.dumps(stamps).encode()).hexdigest()


def recurrent(labels: Sequence[int], images: Sequence[str], total: int, fraction: float) -> list[int]:
    """Members of the clusters that come from more than `fraction` of `total` images, as sorted positions."""
    sources: dict[int, set[str]] = {}
    for label, image in zip(labels, images, strict=True):
        sources.setdefault(label, set()).add(image)
    least = int(fraction * total + 1e-9)  # 64 / 500 of 500 images is 64, whatever its binary fraction
    return [i for i, label in enumerate(labels) if len(sources[label]) > least]
