"""Building a codebook from a folder of images: resumable, and the same bytes whatever interrupted it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from shutil import rmtree
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor

from codebook import models
from codebook.building.cascade import Survivors, survivors
from codebook.building.clustering import dpc_knn
from codebook.building.journal import FOLDER, Journal, differences
from codebook.building.presets import Settings, preset
from codebook.building.probes import Prober
from codebook.errors import CodebookError
from codebook.index import CONFIG, Codebook

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
STEPS = ("probed", "P1", "JSD", "isolated", "recurrent")
REMEDY = {
    "probed": "use larger images",
    "P1": "raise tau_p",
    "JSD": "raise tau_j",
    "isolated": "raise max_cluster_size or clusters_per_image",
    "recurrent": "use more images, or lower min_image_fraction or clusters",
}


@dataclass(frozen=True)
class Progress:
    """Where a build is.

    Attributes
    ----------
    done, total
        Images.
    resumed
        Of `done`, those that an earlier run finished.
    skipped
        Of `done`, names of those that cannot be read.
    funnel
        Tokens left by each step of `STEPS`, over the images done; `recurrent` only once all are.
    """

    done: int
    total: int
    resumed: int
    skipped: tuple[str, ...]
    funnel: dict[str, int]


def build(
    model: Any,
    processor: Any,
    images: Path | str | Sequence[Path | str],
    out: Path | str,
    *,
    model_id: str,
    settings: Settings | None = None,
    strict: bool = False,
    limit: int | None = None,
    batch_size: int = 16,
    progress: Callable[[Progress], None] | None = None,
) -> Codebook:
    """Build a codebook and save it in `out`.

    Interrupted at any moment, even killed, it continues where it was when called again, and ends with the same
    bytes. Called again once it is complete, it returns the codebook without work.

    Parameters
    ----------
    model, processor
        A stock model and its processor, as `codebook.load` returns them.
    images
        A folder, searched recursively, or a list of files.
    out
        Folder of the codebook.
    model_id
        What the codebook names as its model.
    settings
        Default: the preset that `model_id` names.
    strict
        Stop at the first image that cannot be read, instead of skipping it.
    limit
        Use only so many images, the first in order of their names.
    batch_size
        Sequences in one forward: memory against speed. It may change between interrupted runs.
    progress
        Called before the first image, after each, and at the end.

    Raises
    ------
    CodebookError
        For anything that the caller can mend. Finished images are kept in `out`.
    """
    settings, out = settings or preset(model_id), Path(out)
    root, names = list_images(images, limit)
    sizes = {name: _size(root / name) for name in names}
    family = models.family(model)
    key = {
        "model": model_id, "fingerprint": family.fingerprint(model), "dtype": str(model.dtype),
        "settings": settings.per_image(),
    }  # fmt: skip
    digest = hashlib.sha256(json.dumps(sizes).encode()).hexdigest()
    whole = {**key, "settings": asdict(settings), "images_sha256": digest}
    if (complete := _complete(out, whole)) is not None:
        if progress is not None:
            count = complete.config["images"]
            total = count["used"] + len(count["skipped"])
            progress(Progress(total, total, total, tuple(count["skipped"]), complete.config["funnel"]))
        return complete

    prober = Prober.of(model, processor, settings.prompt, family.grid(model), batch_size)
    with Journal(out, key) as journal:
        if journal.records and not any(r.get("size") == sizes.get(n) for n, r in journal.records.items()):
            raise CodebookError(
                f"{out} holds an unfinished build of other images: choose another --out, or delete {journal.folder}"
            )
        finished = {n for n in names if (r := journal.records.get(n)) and "tokens" in r and r["size"] == sizes[n]}
        resumed, done = len(finished), len(finished)
        skipped: list[str] = []

        def report(funnel: dict[str, int]) -> None:
            if progress is not None:
                progress(Progress(done, len(names), resumed, tuple(skipped), funnel))

        total = _funnel(journal, finished)
        report(total)
        for name in names:
            if name in finished:
                continue
            try:
                pixels = _pixels(root / name, family, processor)
            except Exception as error:  # damaged files make PIL's decoders raise nearly anything
                reason = f"cannot read image {root / name}: {' '.join(str(error).split())[:200]}"
                if strict:
                    raise CodebookError(
                        f"{reason}; mend or remove it and run again, finished images are kept"
                    ) from None
                journal.add(name, {"size": sizes[name], "error": reason})
                skipped.append(name)
            else:
                found = _survivors(pixels, model, family, prober, settings)
                record = {"size": sizes[name], "tokens": found.tokens, "funnel": found.funnel}
                journal.add(name, record, found.features)
                finished.add(name)
                total = {step: total[step] + found.funnel[step] for step in total}
            done += 1
            report(total)

        if not finished:
            journal.remove()
            _remove_empty(out)
            raise CodebookError(f"none of the {len(names)} images can be read, {skipped[0]} first: give whole images")
        book = assemble(journal, [n for n in names if n in finished], settings)
        total = {**total, "recurrent": 0 if book is None else len(book)}
        report(total)
        if book is None:
            raise _nothing_left(journal, out, total)
        book.config |= {**whole, "images": {"used": len(finished), "skipped": skipped}, "funnel": total}
        book.save(out)
        journal.remove()
    return book


def list_images(images: Path | str | Sequence[Path | str], limit: int | None = None) -> tuple[Path, list[str]]:
    """The images' common folder, and their sorted names relative to it."""
    if limit is not None and limit < 1:
        raise CodebookError(f"limit is {limit}: it must be at least 1")
    if isinstance(images, (str, Path)):
        root = Path(images)
        if not root.is_dir():
            raise CodebookError(f"no such folder: {root}; give a folder of images")
        files = [path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()]
    else:
        files = [Path(path).absolute() for path in images]
        if missing := [path for path in files if not path.is_file()]:
            raise CodebookError(f"no such image: {missing[0]}; check the list")
        root = _common([path.parent for path in files])
    if not files:
        raise CodebookError(f"no image in {root}: give a folder with {', '.join(sorted(SUFFIXES))} files")
    return root, sorted({path.relative_to(root).as_posix() for path in files})[:limit]


def assemble(journal: Journal, names: list[str], settings: Settings) -> Codebook | None:
    """Keep the survivors that recur across images; None if none do (section 3.2).

    A cluster is kept if its members come from more than `min_image_fraction` of the images, and every member of it
    becomes a prototype.
    """
    owners = [name for name in names if journal.records[name]["tokens"]]
    if not owners:
        return None
    features = torch.cat([journal.features(name) for name in owners])
    rows = [{"image": name, **token} for name in owners for token in journal.records[name]["tokens"]]
    labels = dpc_knn(features, settings.clusters, settings.neighbours, settings.seed)
    kept = recurrent(labels.tolist(), [row["image"] for row in rows], len(names), settings.min_image_fraction)
    if not kept:
        return None
    return Codebook(features[kept], [{**rows[i], "cluster": int(labels[i])} for i in kept])


def recurrent(labels: Sequence[int], images: Sequence[str], total: int, fraction: float) -> list[int]:
    """Members of the clusters that come from more than `fraction` of `total` images, as sorted positions."""
    sources: dict[int, set[str]] = {}
    for label, image in zip(labels, images, strict=True):
        sources.setdefault(label, set()).add(image)
    least = int(fraction * total + 1e-9)  # 64 / 500 of 500 images is 64, whatever its binary fraction
    return [i for i, label in enumerate(labels) if len(sources[label]) > least]


def _complete(out: Path, key: dict[str, Any]) -> Codebook | None:
    """The finished codebook of this very build, None if there is none yet; anything else in `out` is an error."""
    if out.exists() and not out.is_dir():
        raise CodebookError(f"{out} is a file: choose another --out")
    if (out / CONFIG).exists():
        try:
            config = json.loads((out / CONFIG).read_text())
            other = {name: config[name] for name in key}
        except (OSError, ValueError, KeyError, TypeError):
            raise CodebookError(f"{out} holds something else than a build: choose another --out") from None
        if other != key:
            raise CodebookError(
                f"{out} holds another build's codebook (another {differences(other, key)}): "
                "choose another --out, or delete it"
            )
        book = Codebook.load(out)
        rmtree(out / FOLDER, ignore_errors=True)  # killed while it was cleaning up
        return book
    if out.is_dir() and not (out / FOLDER).is_dir() and any(out.iterdir()):
        raise CodebookError(f"{out} is not empty and holds no build: choose another --out")
    return None


def _survivors(pixels: Tensor, *rest: Any) -> Survivors:
    try:
        return survivors(pixels, *rest)
    except torch.OutOfMemoryError:
        raise CodebookError("out of GPU memory: lower batch_size and run again, finished images are kept") from None


def _pixels(path: Path, family: models.Family, processor: Any) -> Tensor:
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
    return family.view(processor, upright)


def _funnel(journal: Journal, names: set[str]) -> dict[str, int]:
    return {step: sum(journal.records[name]["funnel"][step] for name in names) for step in STEPS[:-1]}


def _nothing_left(journal: Journal, out: Path, funnel: dict[str, int]) -> CodebookError:
    counts = ", ".join(f"{step} {count}" for step, count in funnel.items())
    step = next(step for step, count in funnel.items() if count == 0)
    kept = ""
    if step == "recurrent":
        kept = "; finished images are kept, only the last step is repeated"
    else:  # their records answer to these very thresholds
        journal.remove()
        _remove_empty(out)
    return CodebookError(f"no prototype left ({counts}): {REMEDY[step]}{kept}")


def _remove_empty(out: Path) -> None:
    if not any(out.iterdir()):
        out.rmdir()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1  # reading it will tell


def _common(folders: list[Path]) -> Path:
    common = folders[0] if folders else Path()
    while not all(folder.is_relative_to(common) for folder in folders):
        common = common.parent
    return common
