"""Building a codebook from images: resumable, and the same bytes whatever interrupted it."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from shutil import rmtree
from typing import Any, NotRequired

import torch
from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from codebook import models
from codebook.building.pool import STEPS, SurvivorPool, images_digest, is_digest, one_of_each, unread
from codebook.building.presets import Settings, preset, read_settings
from codebook.building.sources import GONE, Images, Source, open_images
from codebook.building.worker import Options, Progress, Worker
from codebook.errors import CodebookError
from codebook.models import Model, Processor
from codebook.store.codebook import Codebook
from codebook.store.folder import CONFIG, PROBES, Count, TokenRecord, read_config
from codebook.store.journal import Journal, differences

UNFINISHED = ".build"
"""Folder inside `out` of a build's journal, until the codebook is whole."""
REMEDY = {
    "probed": "use larger images",
    "isolated": "raise max_cluster_size or clusters_per_image",
    "P1": "raise tau_p",
    "JSD": "raise tau_j",
    "recurrent": "use more images, or lower min_image_fraction or clusters",
}


Funnel = TypedDict("Funnel", dict.fromkeys(STEPS[:-1], Count))  # type: ignore[misc]


class ProbedRecord(TypedDict):
    """What the journal of a build says of an image."""

    tokens: list[TokenRecord]
    funnel: Funnel
    spread: float
    probes: NotRequired[list[TokenRecord]]


_PROBED = TypeAdapter(ProbedRecord)


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
    return _build(
        model, processor, source, source.digests(), Path(out), model_id, settings, None, Options(**options)
    )  # fmt: skip


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
    other way round. Images that it was built from are not probed again: an image is known by the SHA-256 of its file,
    whatever its name. A new image whose name is taken by another one gets the name of its folder before its own.
    Resumable like `build`, whose other parameters it takes.

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
    source, stamps = _free_names(open_images(images, limit), pool)
    settings = read_settings(book.config["settings"], folder)
    return _build(
        model, processor, source, stamps, Path(out), book.config["model"], settings, pool, Options(**options)
    )  # fmt: skip


def _free_names(source: Source, pool: SurvivorPool) -> tuple[Source, dict[str, str]]:
    """A source and its images' digests, where no image has the name of another one that the pool has."""
    digests, names = source.digests(), dict[str, str]()
    before = f"{Path(source.where).absolute().stem}/"
    for name, digest in digests.items():
        known = pool.images.get(name, {"stamp": digest})["stamp"]
        if unread(known) or digest in (GONE, known):
            names[name] = name
            continue
        if not is_digest(known) and known in (len(source.find(name)), str(known)):
            raise CodebookError(
                f"{name} may be the image of that name and size that the codebook was built from, by a version that "
                "noted no more of an image: rename it, or build the codebook again"
            )
        if (other := before + name) in digests or pool.images.get(other, {"stamp": digest})["stamp"] != digest:
            raise CodebookError(
                f"1 names, {other} first, are of different images in the two: rename the images of one, or give their "
                "folders a common one and build from that"
            )
        names[other] = name
    renamed = replace(source, names=tuple(sorted(names)), find=lambda name: source.find(names[name]))
    return renamed, {name: digests[names[name]] for name in renamed.names}


def merge(first: Path | str, second: Path | str, out: Path | str) -> Codebook:
    """Merge two codebooks that keep their survivors into one, the same as if it had been built from all their images.

    No model is needed. An image that both were built from counts once, whatever its names.
    """
    (a, pool), (b, other) = SurvivorPool.load(first), SurvivorPool.load(second)
    keys = [{k: book.config.get(k) for k in ("fingerprint", "dtype", "settings")} for book in (a, b)]
    if keys[0] != keys[1]:
        raise CodebookError(f"{first} and {second} were built with another {differences(*keys)}: they do not merge")
    both, out, settings = pool.join(other), Path(out), read_settings(a.config["settings"], first)
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
    model: Model, processor: Processor, source: Source, stamps: dict[str, str], out: Path, model_id: str,
    settings: Settings, base: SurvivorPool | None, options: Options,
) -> Codebook:  # fmt: skip
    key: dict[str, Any] = {
        "model": model_id, "fingerprint": models.fingerprint(model), "dtype": str(model.dtype),
        "settings": settings.per_image(),
    }  # fmt: skip
    if options.exhaustive:
        key["exhaustive"] = True
    known = {} if base is None else {name: image["stamp"] for name, image in base.images.items()}
    if base is not None:
        key["extends"] = base.digest
        # what could not be read before may be there now
        known = {name: stamp for name, stamp in known.items() if not unread(stamp) or not stamps.get(name)}
    whole = {k: v for k, v in key.items() if k != "extends"} | {
        "settings": asdict(settings), "images_sha256": images_digest(dict(sorted({**stamps, **known}.items()))),
    }  # fmt: skip
    if (complete := _complete(out, whole)) is not None:
        count = complete.config["images"]
        total = count["used"] + len(count["skipped"])
        options.progress(Progress(total, total, total, tuple(count["skipped"]), complete.config["funnel"]))
        return complete

    worker = Worker(model, processor, source, settings, options)
    with _journal(out, key) as journal:
        todo = _to_probe(stamps, known)
        finished, errors = _probe_all(worker, todo, journal, out)
        pool = _pool(journal, stamps, todo, errors)
        pool = one_of_each(pool) if base is None else base.join(pool)
        made = pool.codebook(settings, {**whole, "grid": list(worker.prober.grid)}) if pool.rows else None
        total = {**pool.funnel, "recurrent": 0 if made is None else len(made[0])}
        options.progress(Progress(len(todo), len(todo), finished, tuple(pool.skipped), total))
        if made is None:
            raise _nothing_left(journal, out, total)
        book, others = made
        if options.exhaustive:
            others[PROBES] = _probes(journal, todo)
        book.save(out, others)
        _forget(journal, out)
    return book


def _to_probe(stamps: dict[str, str], known: dict[str, Any]) -> dict[str, str]:
    """The images to probe, with their digests: each file once, and none that is known already."""
    seen = {stamp for stamp in known.values() if is_digest(stamp)}
    todo = {}
    for name, stamp in stamps.items():
        if stamp not in seen and (name not in known or stamp != GONE):
            todo[name] = stamp
            seen |= {stamp} - {GONE}
    return todo


def _probe_all(
    worker: Worker, stamps: dict[str, str], journal: Journal, out: Path
) -> tuple[int, dict[str, str]]:  # fmt: skip
    """Probe all images that the journal does not hold yet; how many it held, and why images cannot be read.

    The journal knows images by their digests: under another name a finished image is still finished.
    """
    options = worker.options
    if journal.records and not journal.records.keys() & set(stamps.values()):
        raise CodebookError(
            f"{out} holds an unfinished build of other images: choose another --out, or delete {out / UNFINISHED}"
        )
    held = [name for name, stamp in stamps.items() if stamp in journal]
    todo = [name for name, stamp in stamps.items() if stamp not in journal]
    total = {step: sum(journal[stamps[name]]["funnel"][step] for name in held) for step in STEPS[:-1]}
    done, errors = len(held), dict[str, str]()
    options.progress(Progress(done, len(stamps), len(held), (), dict(total)))
    for name, digest, found in options.engine(worker, todo):
        if digest != stamps[name]:
            found = "it changed while the build was running"
        if isinstance(found, str):
            if options.strict:
                raise CodebookError(
                    f"cannot read image {worker.source.where}/{name}: {found}; fix or remove it and run again, "
                    "finished images are kept"
                )
            errors[name] = found
        else:
            record: dict[str, Any] = {"tokens": found.tokens, "funnel": found.funnel, "spread": found.spread}
            if options.exhaustive:
                record["probes"] = found.probes
            journal.add(digest, record, found.features if len(found.features) else None)
            total = {step: total[step] + found.funnel[step] for step in total}
        done += 1
        options.progress(Progress(done, len(stamps), len(held), tuple(sorted(errors)), dict(total)))
    if stamps and len(errors) == len(stamps):
        first, error = next(iter(sorted(errors.items())))
        _forget(journal, out)
        raise CodebookError(f"none of the {len(stamps)} images can be read, {first} first ({error}): give whole images")
    return len(held), errors


def _pool(journal: Journal, stamps: dict[str, str], probed: dict[str, str], errors: dict[str, str]) -> SurvivorPool:
    """What all images of the source yielded; of those that were not probed, only that they are known."""
    images: dict[str, dict[str, Any]] = {
        name: {"stamp": stamp, "duplicate": ""} for name, stamp in stamps.items() if stamp != GONE
    }
    owners = []
    for name, stamp in probed.items():
        if name in errors:
            images[name] = {"stamp": stamp, "error": errors[name]}
        else:
            images[name] = {"stamp": stamp, **{k: journal[stamp][k] for k in ("funnel", "spread")}}
            owners += [name] if journal[stamp]["tokens"] else []
    rows = [{"image": name, **token} for name in owners for token in journal[stamps[name]]["tokens"]]
    features = torch.empty(0)
    start = 0
    for name in owners:  # into one tensor: all parts and their concatenation would be twice the memory
        part = journal.tensor(stamps[name])
        if not start:
            features = torch.empty(len(rows), part.shape[-1])
        if part.shape != (len(journal[stamps[name]]["tokens"]), features.shape[1]):
            raise CodebookError(f"{journal.file} is damaged: delete it and run again")
        features[start : start + len(part)] = part
        start += len(part)
    return SurvivorPool(images, features, rows)


def _probes(journal: Journal, probed: dict[str, str]) -> bytes:
    found = [(name, journal[stamp]) for name, stamp in probed.items() if stamp in journal]
    lines = [{"image": name, **row} for name, record in found for row in record.get("probes", ())]
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def _complete(out: Path, key: dict[str, Any]) -> Codebook | None:
    """The finished codebook of this very build, None if there is none yet; anything else in `out` is an error."""
    if out.exists() and not out.is_dir():
        raise CodebookError(f"{out} is a file: choose another --out")
    if (out / CONFIG).exists():
        try:
            config = read_config(out)
            other = {name: config[name] for name in key}
        except (CodebookError, KeyError):
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
    if folder.is_symlink():
        raise CodebookError(f"{folder} is a link: choose another --out, or delete it")
    if (folder / "key.json").exists():
        raise CodebookError(f"{out} holds an unfinished build of an earlier version: delete {folder} and run again")
    journal = Journal(folder / "journal.sqlite", key, output="--out")
    try:
        for record in journal.records.values():
            _PROBED.validate_python(record)
    except ValidationError:
        journal.close()
        raise CodebookError(f"the unfinished build in {folder} is damaged: delete it and run again") from None
    return journal


def _forget(journal: Journal, out: Path) -> None:
    """Delete the journal, and `out` if it holds nothing else."""
    journal.remove()
    with contextlib.suppress(OSError):
        (out / UNFINISHED).rmdir()
    if not any(out.iterdir()):
        out.rmdir()
