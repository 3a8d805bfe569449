"""Codebooks out of others: one that more images are added to, and two that are joined."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from codebook import models
from codebook.building.builder import REMEDY, Build
from codebook.building.drawing import pictures
from codebook.building.pool import SurvivorPool, is_digest, names_clash, unread
from codebook.building.presets import read_settings
from codebook.building.records import IMAGES_JOURNAL, PROBED
from codebook.building.sources import GONE, Images, Source, open_images
from codebook.building.unfinished import finished, forget, open_journal, requested
from codebook.building.worker import Options
from codebook.errors import CodebookError, counted
from codebook.models import Model, Processor
from codebook.store.codebook import Codebook
from codebook.store.horizons import carried_horizon, put_horizon
from codebook.store.journal import differences


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
    model, processor, images, out, limit, options
        As `build` takes them.

    Raises
    ------
    CodebookError
        If the codebook is another model's, or was built in another precision or grid; else as `build` does.
    """
    model, (book, pool) = models.unwrap(model), SurvivorPool.load(folder)
    book.check(model)
    if book.config["dtype"] != str(model.dtype):
        raise CodebookError(
            f"{folder} was built in {book.config['dtype']} and the model is {model.dtype}: change --dtype"
        )
    decoder = models.decoder_fingerprint(model)
    if book.config.get("language_model", decoder) != decoder:  # earlier versions do not say
        raise CodebookError(
            f"{folder} was built with another language model behind this vision tower, whose answers chose its tokens: "
            "build one of all images with this model"
        )
    grid = models.family(model).grid(model)
    if book.config["grid"] != list(grid):
        raise CodebookError(
            f"{folder} was built with {' x '.join(map(str, book.config['grid']))} visual tokens of an image, and this "
            f"model makes {grid[0]} x {grid[1]}: load it with the image size of then"
        )
    if Path(out).resolve() == Path(folder).resolve():
        raise CodebookError(f"{out} is the codebook to extend: choose another --out")
    horizon = carried_horizon(Path(folder), book.config["fingerprint"])
    source, stamps = _free_names(open_images(images, limit), pool)
    settings, found = read_settings(book.config["settings"], folder), book.config.get("pilot")
    return Build(
        model, processor, source, stamps, Path(out), book.config["model"], settings, Options(**options),
        report={} if found is None else {"pilot": found}, base=pool, pad=book.config.get("pad"), horizon=horizon,
    ).run()  # fmt: skip


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
            raise names_clash([other])
        names[other] = name
    renamed = replace(source, names=tuple(sorted(names)), find=lambda name: source.find(names[name]))
    return renamed, {name: digests[names[name]] for name in renamed.names}


def merge(first: Path | str, second: Path | str, out: Path | str) -> Codebook:
    """Merge two codebooks that keep their survivors into one, the same as if it had been built from all their images.

    No model is needed. An image that both were built from counts once, whatever its names.

    Parameters
    ----------
    first, second
        Folders of codebooks, which stay as they are.
    out
        Folder of the result.

    Raises
    ------
    CodebookError
        If the two were built with other settings or for other models, or no prototype is left.
    """
    (a, pool), (b, other) = SurvivorPool.load(first), SurvivorPool.load(second)

    def stated(book: Codebook, name: str) -> Any:  # earlier versions do not say
        return next((one.config[name] for one in (book, a, b) if name in one.config), None)

    keys = [
        {
            "model": book.config["model"], "fingerprint": book.config["fingerprint"], "dtype": book.config["dtype"],
            "language_model": stated(book, "language_model"),
            "settings": asdict(read_settings(book.config["settings"], folder)), "pad": stated(book, "pad"),
            "grid": book.config["grid"],
        } for book, folder in ((a, first), (b, second))
    ]  # fmt: skip
    keys[1]["model"] = keys[0]["model"]  # only a name
    if keys[0] != keys[1]:
        raise CodebookError(
            f"{first} and {second} were built with another {differences(*keys)}: they do not merge; build the images "
            f"of one with the settings of the other, or add them to it with `codebook extend`"
        )
    carried = [carried_horizon(Path(folder), a.config["fingerprint"]) for folder in (first, second)]
    found = [book.config["pilot"] for book in (a, b) if "pilot" in book.config]
    report = {"pilot": found[0]} if found and found[0] == found[-1] else {}
    both, out, settings = pool.join(other), Path(out), read_settings(a.config["settings"], first)
    grid = keys[0].pop("grid")
    config = {k: v for k, v in keys[0].items() if v is not None} | report
    key = {**config, "images_sha256": both.digest}
    if (complete := finished(out, requested(key))) is not None:
        return complete
    with open_journal(out, IMAGES_JOURNAL, key, PROBED) as journal:
        made = both.codebook(settings, {**config, "grid": grid})
        if made is None:
            forget(out, [journal])
            raise CodebookError(f"no prototype left of {counted(len(both.rows), 'survivor')}: {REMEDY['recurrent']}")
        put_horizon(out, carried[0] or carried[1])
        made[0].save(out, {**made[1], **pictures(made[0].config)})
        forget(out, [journal])
    return made[0]
