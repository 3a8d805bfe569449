"""All survivors of a build, of which those that recur become prototypes; kept beside them, so that a build can grow."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Required

import torch
from safetensors.torch import save
from torch import Tensor
from typing_extensions import TypedDict

from codebook.building.clustering import dpc_knn
from codebook.building.presets import Settings
from codebook.building.sources import GONE
from codebook.errors import CodebookError, counted
from codebook.store.codebook import Codebook
from codebook.store.folder import IMAGE_RECORDS, OPEN, SURVIVORS, Count, TokenRecord, read_folder, tensor_of
from codebook.store.parsing import parse_lines

GROWS_BY = ("fingerprint", "dtype", "settings", "grid")
"""What `config.json` must say of a codebook that is to grow."""
STEPS = ("probed", "isolated", "P1", "JSD", "recurrent")


class ImageRecord(TypedDict, total=False):
    """A line of `images.jsonl`: an image of the build, and its survivors that did not become prototypes."""

    __pydantic_config__ = OPEN  # type: ignore[misc]
    image: Required[str]
    stamp: Required[str | int]
    funnel: dict[str, Count]
    spread: float
    error: str
    duplicate: str
    survivors: list[TokenRecord]


@dataclass(frozen=True)
class SurvivorPool:
    """The survivors of some images: tokens that are redundant and isolated in their image.

    Attributes
    ----------
    images
        For each image, by name in sorted order, `stamp` (SHA-256 of its file; see `is_digest`) and either `funnel`
        (tokens left by each step) and `spread`, or `error`, or `duplicate`: the name under which the same file counts.
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
        """Names of the images that were probed."""
        return [name for name, image in self.images.items() if "funnel" in image]

    @property
    def skipped(self) -> list[str]:
        """Names of the images that cannot be read."""
        return [name for name, image in self.images.items() if "error" in image]

    @property
    def _duplicates(self) -> dict[str, int]:
        count = sum("duplicate" in image for image in self.images.values())
        return {"duplicates": count} if count else {}

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
        """The survivors of both. An image that both have counts once, under whatever names.

        Raises
        ------
        CodebookError
            If they give one name to different images.
        """
        both = self.images.keys() & other.images.keys()
        ours, theirs = (by_image(pool.rows) for pool in (self, other))
        different = [
            name for name in sorted(both)
            if not _same(self.images[name], ours.get(name), other.images[name], theirs.get(name))
        ]  # fmt: skip
        if different:
            raise names_clash(different)
        taken = {name for name in other.images if unread(self.images.get(name, {"stamp": GONE})["stamp"])}
        images = {**self.images, **{name: other.images[name] for name in taken}}
        for name in both - taken:  # where this one knows an image by its size only, the other's digest says more
            if not is_digest(images[name]["stamp"]):
                images[name] = images[name] | {"stamp": other.images[name]["stamp"]}
        new = [i for i, row in enumerate(other.rows) if row["image"] in taken]
        features = torch.cat([self.features, other.features[new]])
        return one_of_each(SurvivorPool(images, features, [*self.rows, *(other.rows[i] for i in new)]))

    def recurring(self, settings: Settings) -> tuple[list[int], list[int]]:
        """Positions of the survivors that recur across images, and the cluster of every survivor (section 3.2).

        A cluster is kept if its members come from more than `min_image_fraction` of the images, and every member of it
        becomes a prototype.
        """
        count = settings.clusters or cluster_count(len(self.rows))
        labels = dpc_knn(self.features, count, settings.neighbours, settings.seed).tolist()
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
            "images": {"used": len(self.used), "skipped": self.skipped, **self._duplicates},
            "funnel": {**self.funnel, "recurrent": len(kept)},
            **({} if self.spread is None else {"spread": self.spread}),
        }
        book = Codebook(self.features[kept], [{**self.rows[i], "cluster": labels[i]} for i in kept], config)
        rest = sorted(set(range(len(self.rows))) - set(kept))
        others: dict[str, list[dict[str, Any]]] = {}
        for i in rest:
            row = dict(self.rows[i])
            others.setdefault(row.pop("image"), []).append(row)
        text = io.BytesIO()  # line by line: with many images, a list of them is larger than what they are made of
        for name, image in self.images.items():
            line = {"image": name, **image, **({"survivors": others[name]} if name in others else {})}
            text.write(json.dumps(line).encode() + b"\n")
        return book, {SURVIVORS: save({"features": self.features[rest]}), IMAGE_RECORDS: text.getvalue()}

    @classmethod
    def load(cls, folder: Path | str) -> tuple[Codebook, SurvivorPool]:
        """A codebook, and the survivors that it was made from.

        Raises
        ------
        CodebookError
            If the folder is no codebook, does not keep its survivors, or is damaged.
        """
        folder = Path(folder)
        config, files = read_folder(folder, (SURVIVORS, IMAGE_RECORDS))
        book = Codebook.of_files(folder, config, files)
        if not {SURVIVORS, IMAGE_RECORDS, *GROWS_BY} <= files.keys() | config.keys():
            raise CodebookError(
                f"{folder} does not keep the survivors that were not recurrent, which may recur among more images: "
                "build it again with this version"
            )
        remedy = "build the codebook again"
        lines = [line for _, line in parse_lines(folder / IMAGE_RECORDS, files[IMAGE_RECORDS], remedy, ImageRecord)]
        images = {line["image"]: {k: v for k, v in line.items() if k not in ("image", "survivors")} for line in lines}
        rest = [{"image": line["image"], **row} for line in lines for row in line.get("survivors", ())]
        features = tensor_of(folder / SURVIVORS, files[SURVIVORS], "features")
        rows = [*({k: v for k, v in row.items() if k != "cluster"} for row in book.provenance), *rest]
        fits = (
            features.dtype == torch.float32
            and features.shape == (len(rest), book.dimension)
            and len(images) == len(lines)
            and all({"image", "row", "col"} <= row.keys() and row["image"] in images for row in rows)
            and all(row["row"] < book.config["grid"][0] and row["col"] < book.config["grid"][1] for row in rows)
            and bool(features.isfinite().all())
            and all(_complete_record(image, images) for image in images.values())
        )
        if not fits:
            raise CodebookError(f"cannot read {folder / IMAGE_RECORDS}: it does not fit the prototypes; {remedy}")
        both = torch.cat([book.prototypes, features])
        return book, in_order(cls(images, both, rows))


def names_clash(names: Sequence[str]) -> CodebookError:
    """The error for names that stand for an image in one place and for another image in the other."""
    return CodebookError(
        f"different images have the same name in the two ({counted(len(names), 'name')}, {names[0]} first): rename the "
        "images of one, or give their folders a common one and build from that"
    )


def one_of_each(pool: SurvivorPool) -> SurvivorPool:
    """The same survivors, where several names of one file count as one image: under the first name in their order.

    So a build, an extension and a merger that see the same files give the same codebook.
    """
    groups: dict[str, list[str]] = {}
    for name, image in sorted(pool.images.items()):
        if is_digest(image["stamp"]):
            groups.setdefault(image["stamp"], []).append(name)
    images, owner = dict(pool.images), {name: name for name in pool.images}
    for stamp, names in groups.items():
        probed = [name for name in names if "duplicate" not in pool.images[name]]
        images |= {name: {"stamp": stamp, "duplicate": names[0]} for name in names}
        images[names[0]] = pool.images[probed[0]]
        owner |= dict.fromkeys(names, "") | {probed[0]: names[0]}  # what another name yielded, too, is left out
    kept = [i for i, row in enumerate(pool.rows) if owner[row["image"]]]
    rows = [{**pool.rows[i], "image": owner[pool.rows[i]["image"]]} for i in kept]
    return in_order(SurvivorPool(images, pool.features[kept], rows))


def by_image(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Survivors by the name of their image."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["image"], []).append(row)
    return found


def _same(a: dict[str, Any], rows_a: Any, b: dict[str, Any], rows_b: Any) -> bool:
    """Whether two records of one name are of one image; one that could not be read may be any.

    Codebooks of earlier versions know an image by its size only. There, what it yielded has to be the same, too: the
    probes' values have sixteen digits.
    """
    if unread(a["stamp"]) or unread(b["stamp"]):
        return True
    if is_digest(a["stamp"]) == is_digest(b["stamp"]) and a["stamp"] != b["stamp"]:
        return False
    if is_digest(a["stamp"]) and is_digest(b["stamp"]):
        return True
    yields = [{k: v for k, v in image.items() if k != "stamp"} for image in (a, b)]
    return yields[0] == yields[1] and rows_a == rows_b


def in_order(pool: SurvivorPool) -> SurvivorPool:
    """The same survivors, by the images' names and in raster order inside an image."""
    rows = pool.rows
    order = sorted(range(len(rows)), key=lambda i: (rows[i]["image"], rows[i]["row"], rows[i]["col"]))
    return SurvivorPool(dict(sorted(pool.images.items())), pool.features[order], [rows[i] for i in order])


def is_digest(stamp: Any) -> bool:
    """Whether a stamp is a SHA-256. Earlier versions wrote a file's size, or the fingerprint of its data set."""
    return isinstance(stamp, str) and re.fullmatch("[0-9a-f]{64}", stamp) is not None


def unread(stamp: Any) -> bool:
    """Whether a stamp is that of a file that could not be read; of earlier versions that is a size of -1."""
    return stamp in (GONE, -1)


def _complete_record(image: dict[str, Any], images: dict[str, dict[str, Any]]) -> bool:
    """Whether a record says what its image yields, or which other one does."""
    if "duplicate" in image:
        owner = images.get(image["duplicate"], {})
        return owner.get("stamp") == image["stamp"] and "duplicate" not in owner
    return "error" in image or set(STEPS[:-1]) <= image.get("funnel", {}).keys()


def images_digest(stamps: dict[str, Any]) -> str:
    """A hash that identifies a list of images: their names and stamps, sorted by name."""
    return hashlib.sha256(json.dumps(stamps).encode()).hexdigest()


def cluster_count(survivors: int) -> int:
    """The number of clusters of all survivors where none is published: that of LLaVA-1.5-7B in proportion, at most 64.

    There 1383 survivors of 500 images are in 64 clusters.
    """
    return min(max(1, round(survivors * 64 / 1383)), 64)


def recurrent(labels: Sequence[int], images: Sequence[str], total: int, fraction: float) -> list[int]:
    """Members of the clusters that come from more than `fraction` of `total` images, as sorted positions."""
    sources: dict[int, set[str]] = {}
    for label, image in zip(labels, images, strict=True):
        sources.setdefault(label, set()).add(image)
    least = int(fraction * total + 1e-9)  # 64 / 500 of 500 images is 64, whatever its binary fraction
    return [i for i, label in enumerate(labels) if len(sources[label]) > least]
