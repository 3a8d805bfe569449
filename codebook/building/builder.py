"""Building a codebook from images: resumable, and the same bytes whatever interrupted it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from shutil import rmtree
from typing import Any

import torch
from PIL import UnidentifiedImageError
from torch import Tensor

from codebook import models
from codebook.building.cascade import Survivors, survivors
from codebook.building.pool import STEPS, SurvivorPool, images_digest
from codebook.building.presets import Settings, preset
from codebook.building.probes import Prober
from codebook.building.sources import Images, Source, open_images
from codebook.errors import CodebookError
from codebook.models import Model, Processor
from codebook.store.codebook import CONFIG, Codebook
from codebook.store.files import read_json
from codebook.store.journal import Journal, differences

PROBES = "probes.jsonl"
UNFINISHED = ".build"
"""Folder inside `out` of a build's journal, until the codebook is whole."""
REMEDY = {
    "probed": "use larger images",
    "isolated": "raise max_cluster_size or clusters_per_image",
    "P1": "raise tau_p",
    "JSD": "raise tau_j",
    "recurrent": "use more images, or lower min_image_fraction or clusters",
}

Outcome = tuple[str, Survivors | str]
"""Name of an image, and what it yields or why it cannot be read."""
Engine = Callable[["Worker", list[str]], Iterable[Outcome]]
"""Function that probes the named images, in any order."""


@dataclass(frozen=True)
class Progress:
    """How far a build has come.

    Attributes
    ----------
    done, total
        Numbers of images.
    resumed
        How many of the images done were finished by an earlier run.
    skipped
        Names of the images done that cannot be read.
    funnel
        Tokens left by each step of `STEPS`, over the images done; `recurrent` only once all are.
    """

    done: int
    total: int
    resumed: int
    skipped: tuple[str, ...]
    funnel: dict[str, int]


@dataclass(frozen=True)
class Options:
    """How a build runs. Apart from `exhaustive` it may change between interrupted runs.

    Attributes
    ----------
    strict
        Stop at the first image that cannot be read, instead of skipping it.
    batch_size
        Sequences per forward pass; None: chosen automatically. It is halved when memory runs out.
    exhaustive
        Run every probe on every candidate token, and write their values to `probes.jsonl`. This is slow and serves
        analysis only; the prototypes are the same.
    progress
        Called before the first image, after each image, and at the end.
    engine
        Probes the images; by default one after the other in this process.
    """

    strict: bool = False
    batch_size: int | None = None
    exhaustive: bool = False
    progress: Callable[[Progress], None] = field(default=lambda state: None)
    engine: Engine = field(default=lambda worker, names: map(worker, names))


@dataclass
class Worker:
    """Callable that reads and probes an image, given its name."""

    model: Model
    processor: Processor
    source: Source
    settings: Settings
    options: Options

    def __post_init__(self) -> None:
        self.family = models.family(self.model)
        grid = self.family.grid(self.model)
        self.prober = Prober.of(self.model, self.processor, self.settings.prompt, grid, self.options.batch_size)

    def __call__(self, name: str) -> Outcome:
        try:
            pixels = self.family.view(self.processor, self.source.read(name))
        except UnidentifiedImageError:
            return name, "not an image"
        except Exception as error:  # damaged files make PIL's decoders raise nearly anything
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__  # no paths of this machine
            return name, " ".join(reason.split())[:200]
        return name, self.probe(pixels)

    def probe(self, pixels: Tensor) -> Survivors:
        try:
            return survivors(
                pixels, self.model, self.family, self.prober, self.settings, exhaustive=self.options.exhaustive
            )
        except torch.OutOfMemoryError:  # in the vision tower, which sees one image at a time
            raise CodebookError(
                "out of memory with one image: take a smaller --dtype or another device and run again, finished "
                "images are kept"
            ) from None


def build(
    model: Model,
    processor: Processor,
    images: Images,
    out: Path | str,
    *,
    model_id: str,
    settings: Settings | None = None,
    limit: int | None = None,
    **options: Any,
) -> Codebook:
    """Build a codebook and save it in `out`.

    Interrupted at any moment, even killed, it continues where it was when called again, and ends with the same
    bytes. Called again once it is complete, it returns the codebook without work.

    Parameters
    ----------
    model, processor
        A stock model and its processor, as `codebook.load` returns them.
    images
        A folder, a list of files, a JSONL file, tar shards, a saved data set, or what `open_images` made of one.
    out
        Folder of the codebook.
    model_id
        What the codebook names as its model.
    settings
        Default: the preset that `model_id` names.
    limit
        Use at most this many images, the first by name.
    options
        Fields of `Options`.

    Raises
    ------
    CodebookError
        For anything that the caller can fix. Finished images are kept in `out`.
    """
    model, settings = models.unwrap(model), settings or preset(model_id)
    source = open_images(images, limit)
    return _build(model, processor, source, Path(out), model_id, settings, None, Options(**options))


def extend(
    model: Model,
    processor: Processor,
    folder: Path | str,
    images: Images,
    out: Path | str,
    *,
    limit: int | None = None,
    **options: Any,
) -> Codebook:
    """Add images to a codebook and save the result in `out`, the same as if it had been built from all of them.

    Its survivors and those of the new images are clustered together, so tokens that did not recur may now, and the
    other way round. Images that it was built from, by name and size, are not probed again. New ones whose names are
    taken by others get the name of their own folder before theirs. Resumable like `build`, whose other parameters it
    takes.

    Parameters
    ----------
    folder
        A codebook that keeps its survivors, built for this model; it stays as it is.
    """
    model, (book, pool) = models.unwrap(model), SurvivorPool.load(folder)
    book.check(model)
    if book.config["dtype"] != str(model.dtype):
        raise CodebookError(
            f"{folder} was built in {book.config['dtype']} and the model is {model.dtype}: change --dtype"
        )
    if Path(out).resolve() == Path(folder).resolve():
        raise CodebookError(f"{out} is the codebook to extend: choose another --out")
    source = open_images(images, limit)
    if any(pool.images[name]["stamp"] != stamp for name, stamp in source.stamps.items() if name in pool.images):
        before = f"{Path(source.where).absolute().stem}/"
        stamps = {before + name: stamp for name, stamp in source.stamps.items()}
        find = source.find
        source = Source(source.where, stamps, lambda name: find(name.removeprefix(before)))
        pool.join(SurvivorPool({name: {"stamp": stamp} for name, stamp in stamps.items()}, pool.features[:0], []))
    settings = Settings(**book.config["settings"])
    return _build(model, processor, source, Path(out), book.config["model"], settings, pool, Options(**options))


def merge(first: Path | str, second: Path | str, out: Path | str) -> Codebook:
    """Merge two codebooks that keep their survivors into one, the same as if it had been built from all their images.

    No model is needed. An image that both were built from, by name and size, counts once.
    """
    (a, pool), (b, other) = SurvivorPool.load(first), SurvivorPool.load(second)
    keys = [{k: book.config.get(k) for k in ("fingerprint", "dtype", "settings")} for book in (a, b)]
    if keys[0] != keys[1]:
        raise CodebookError(f"{first} and {second} were built with another {differences(*keys)}: they do not merge")
    both, out, settings = pool.join(other), Path(out), Settings(**a.config["settings"])
    key = {**keys[0], "model": a.config["model"], "images_sha256": both.digest}
    if (complete := _complete(out, key)) is not None:
        return complete
    with _journal(out, key) as journal:
        made = both.codebook(settings, {**key, "grid": a.config["grid"]})
        if made is None:
            _forget(journal, out)
            raise CodebookError(f"no prototype left of {len(both.rows)} survivors: {REMEDY['recurrent']}")
        made[0].save(out, made[1])
        _forget(journal, out)
    return made[0]


def _build(
    model: Model, processor: Processor, source: Source, out: Path, model_id: str, settings: Settings,
    base: SurvivorPool | None, options: Options,
) -> Codebook:  # fmt: skip
    key: dict[str, Any] = {
        "model": model_id, "fingerprint": models.fingerprint(model), "dtype": str(model.dtype),
        "settings": settings.per_image(),
    }  # fmt: skip
    if options.exhaustive:
        key["exhaustive"] = True
    stamps = source.stamps
    if base is not None:
        key["extends"] = base.digest
        stamps = {name: stamp for name, stamp in stamps.items() if name not in base.images}
    known = {} if base is None else {name: image["stamp"] for name, image in base.images.items()}
    whole = {k: v for k, v in key.items() if k != "extends"} | {
        "settings": asdict(settings), "images_sha256": images_digest(dict(sorted({**known, **stamps}.items()))),
    }  # fmt: skip
    if (complete := _complete(out, whole)) is not None:
        count = complete.config["images"]
        total = count["used"] + len(count["skipped"])
        options.progress(Progress(total, total, total, tuple(count["skipped"]), complete.config["funnel"]))
        return complete

    worker = Worker(model, processor, source, settings, options)
    with _journal(out, key) as journal:
        finished = _probe_all(worker, stamps, journal, out)
        pool = _pool(journal, stamps)
        if base is not None:
            pool = base.join(pool)
        made = pool.codebook(settings, {**whole, "grid": list(worker.prober.grid)}) if pool.rows else None
        total = {**pool.funnel, "recurrent": 0 if made is None else len(made[0])}
        options.progress(Progress(len(stamps), len(stamps), finished, tuple(pool.skipped), total))
        if made is None:
            raise _nothing_left(journal, out, total)
        book, others = made
        if options.exhaustive:
            others[PROBES] = _probes(journal, stamps)
        book.save(out, others)
        _forget(journal, out)
    return book


def _probe_all(worker: Worker, stamps: dict[str, Any], journal: Journal, out: Path) -> int:
    """Probe all images that the journal does not hold yet, and return how many it held."""
    records, options = journal.records, worker.options
    if records and not any(record.get("stamp") == stamps.get(name) for name, record in records.items()):
        raise CodebookError(
            f"{out} holds an unfinished build of other images: choose another --out, or delete {out / UNFINISHED}"
        )
    held = {name for name, stamp in stamps.items() if _finished(records.get(name), stamp)}
    todo = [name for name in stamps if name not in held]
    total = {step: sum(records[name]["funnel"][step] for name in held) for step in STEPS[:-1]}
    done, skipped = len(held), list[str]()
    options.progress(Progress(done, len(stamps), len(held), (), dict(total)))
    for name, found in options.engine(worker, todo):
        record: dict[str, Any] = {"stamp": stamps[name]}
        if isinstance(found, str):
            if options.strict:
                raise CodebookError(
                    f"cannot read image {worker.source.where}/{name}: {found}; fix or remove it and run again, "
                    "finished images are kept"
                )
            journal.add(name, {**record, "error": found})
            skipped.append(name)
        else:
            record |= {"tokens": found.tokens, "funnel": found.funnel, "spread": found.spread}
            if options.exhaustive:
                record["probes"] = found.probes
            journal.add(name, record, found.features if len(found.features) else None)
            total = {step: total[step] + found.funnel[step] for step in total}
        done += 1
        options.progress(Progress(done, len(stamps), len(held), tuple(sorted(skipped)), dict(total)))
    if stamps and len(skipped) == len(stamps):
        first, error = skipped[0], records[skipped[0]]["error"]
        _forget(journal, out)
        raise CodebookError(f"none of the {len(stamps)} images can be read, {first} first ({error}): give whole images")
    return len(held)


def _finished(record: dict[str, Any] | None, stamp: Any) -> bool:
    return record is not None and {"tokens", "spread"} <= record.keys() and record["stamp"] == stamp


def _pool(journal: Journal, stamps: dict[str, Any]) -> SurvivorPool:
    records = {name: journal.records[name] for name in stamps}
    public = {"stamp", "funnel", "spread", "error"}
    images = {name: {k: v for k, v in record.items() if k in public} for name, record in records.items()}
    owners = [name for name, record in records.items() if record.get("tokens")]
    rows = [{"image": name, **token} for name in owners for token in records[name]["tokens"]]
    features = torch.empty(0)
    start = 0
    for name in owners:  # into one tensor: all parts and their concatenation would be twice the memory
        part = journal.tensor(name)
        if not start:
            features = torch.empty(len(rows), part.shape[1])
        features[start : start + len(part)] = part
        start += len(part)
    return SurvivorPool(images, features, rows)


def _probes(journal: Journal, stamps: dict[str, Any]) -> bytes:
    lines = [{"image": name, **row} for name in stamps for row in journal.records[name].get("probes", ())]
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def _complete(out: Path, key: dict[str, Any]) -> Codebook | None:
    """The finished codebook of this very build, None if there is none yet; anything else in `out` is an error."""
    if out.exists() and not out.is_dir():
        raise CodebookError(f"{out} is a file: choose another --out")
    if (out / CONFIG).exists():
        try:
            config = read_json(out / CONFIG)
            other = {name: config[name] for name in key}
        except (CodebookError, KeyError, TypeError):
            raise CodebookError(f"{out} holds something else than a build: choose another --out") from None
        if other != key:
            raise CodebookError(
                f"{out} holds another build's codebook (another {differences(other, key)}): "
                "choose another --out, or delete it"
            )
        book = Codebook.load(out)
        rmtree(out / UNFINISHED, ignore_errors=True)  # killed while it was cleaning up
        return book
    if out.is_dir() and not (out / UNFINISHED).is_dir() and any(out.iterdir()):
        raise CodebookError(f"{out} is not empty and holds no build: choose another --out")
    return None


def _nothing_left(journal: Journal, out: Path, funnel: dict[str, int]) -> CodebookError:
    counts = ", ".join(f"{step} {count}" for step, count in funnel.items())
    step = next(step for step, count in funnel.items() if count == 0)
    kept = ""
    if step == "recurrent":
        kept = "; finished images are kept, only the last step is repeated"
    else:  # their records answer to these very thresholds
        _forget(journal, out)
    return CodebookError(f"no prototype left ({counts}): {REMEDY[step]}{kept}")


def _journal(out: Path, key: dict[str, Any]) -> Journal:
    """The journal of an unfinished build into `out`."""
    folder = out / UNFINISHED
    if (folder / "journal.sqlite").exists():
        raise CodebookError(f"{out} holds an unfinished build of an earlier version: delete {folder} and run again")
    return Journal(folder / "journal.jsonl", key, output="--out")


def _forget(journal: Journal, out: Path) -> None:
    """Delete the journal, and `out` if it holds nothing else."""
    journal.remove()
    with contextlib.suppress(OSError):
        (out / UNFINISHED).rmdir()
    if not any(out.iterdir()):
        out.rmdir()
