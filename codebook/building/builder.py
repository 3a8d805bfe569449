"""Building a codebook from images: resumable, and the same bytes whatever interrupted it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from codebook import models
from codebook.building import pilot as pilots
from codebook.building.drawing import pictures
from codebook.building.pool import STEPS, SurvivorPool, images_digest, is_digest, one_of_each, unread
from codebook.building.presets import Settings, published, settings_for
from codebook.building.records import IMAGES_JOURNAL, PILOT, PILOT_CHOSEN, PILOT_JOURNAL, PROBED, pooled, probe_lines
from codebook.building.sources import GONE, Images, Source, open_images
from codebook.building.stability import Stability, agreement, is_stable, kept_tokens, set_aside, sizes
from codebook.building.unfinished import UNFINISHED, finished, forget, open_journal, requested
from codebook.building.worker import ImageTask, Options, Progress, Worker
from codebook.errors import CodebookError
from codebook.models import Model, Processor
from codebook.store.codebook import Codebook
from codebook.store.folder import PROBES
from codebook.store.horizons import put_horizon
from codebook.store.journal import Journal

REMEDY = {
    "probed": "use larger images",
    "isolated": "raise max_cluster_size or clusters_per_image",
    "P1": "raise tau_p",
    "JSD": "raise tau_j",
    "recurrent": "use more images, or lower min_image_fraction or clusters",
}
"""What to do where a step leaves no token."""


def build(
    model: Model,
    processor: Processor,
    images: Images,
    out: Path | str,
    *,
    model_id: str,
    settings: Settings | None = None,
    pilot: pilots.Pilot | None = None,
    stability: Stability | None = None,
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
        Default: the preset that `model_id` names; for other models `settings_for`.
    pilot
        How thresholds are found that the settings leave open. Default: `Pilot()`.
    stability
        Stop as soon as more images change nothing. Default: all images are used.
    limit
        Use at most this many images, the first by name.
    options
        Fields of `Options`.

    Raises
    ------
    CodebookError
        For anything that the caller can fix. Finished images are kept in `out`.
    """
    model = models.unwrap(model)
    settings = settings or published(model_id) or settings_for(model)
    source = open_images(images, limit)
    return Build(
        model, processor, source, source.digests(), Path(out), model_id, settings, Options(**options),
        pilot or pilots.Pilot(), stability,
    ).run()  # fmt: skip


class Build:
    """One build, or extension, into a folder.

    Attributes
    ----------
    stamps
        The images' digests by their names.
    settings
        Open thresholds are filled in once the pilot has found them.
    report
        What the build finds out about itself, for `config.json`.
    base, pad
        The survivors that are extended, and the token id that took a removed token's place there.
    horizon
        The horizon.json that goes along with the codebook that is extended.
    """

    def __init__(
        self, model: Model, processor: Processor, source: Source, stamps: dict[str, str], out: Path, model_id: str,
        settings: Settings, options: Options, pilot: pilots.Pilot | None = None, stability: Stability | None = None,
        report: dict[str, Any] | None = None, base: SurvivorPool | None = None, pad: int | None = None,
        horizon: bytes | None = None,
    ) -> None:  # fmt: skip
        self.model, self.processor, self.source, self.stamps, self.out = model, processor, source, stamps, out
        self.settings, self.options, self.pilot, self.stability = settings, options, pilot, stability
        self.report, self.base, self.pad, self.horizon = report or {}, base, pad, horizon
        self.about: dict[str, Any] = {
            "model": model_id, "fingerprint": models.fingerprint(model), "dtype": str(model.dtype),
            "language_model": models.decoder_fingerprint(model),
        }  # fmt: skip
        if options.exhaustive:
            self.about["exhaustive"] = True
        self.known = {} if base is None else {name: image["stamp"] for name, image in base.images.items()}
        # what could not be read before may be there now
        self.known = {name: stamp for name, stamp in self.known.items() if not unread(stamp) or not stamps.get(name)}

    def run(self) -> Codebook:
        """The codebook, from the folder if it is whole there."""
        if (complete := finished(self.out, self._asked())) is not None:
            count = complete.config["images"]
            total = count["used"] + len(count["skipped"])
            self.options.progress(Progress(total, total, total, tuple(count["skipped"]), complete.config["funnel"]))
            return complete
        todo = _to_probe(self.stamps, self.known)
        order, held = list(todo), list[str]()
        if self.stability is not None:
            order, held = set_aside(pilots.shuffled(todo, self.settings.seed))
        self.worker = Worker(self.model, self.processor, self.source, self.settings, self.options)
        if self.pad not in (None, self.worker.pad):
            raise CodebookError(
                f"the codebook was built with pad token {self.pad}, and this model's is {self.worker.pad}: load it "
                "with the processor of then"
            )
        with contextlib.ExitStack() as opened:
            self.journals: list[Journal] = []
            if self.settings.free:
                self._run_pilot({name: todo[name] for name in order}, opened)
            key = {**self.about, **self._probed_with()}
            key |= {} if self.base is None else {"extends": self.base.digest}
            journal = self._open(opened, IMAGES_JOURNAL, key, PROBED)
            if self.stability is None:
                return self._finish(journal, self._probe_all({name: todo[name] for name in order}, journal), todo)
            return self._until_stable(journal, self.stability, {name: todo[name] for name in order}, held)

    def _asked(self) -> dict[str, Any]:
        """What this build is asked for, in the words of its config."""
        asked: dict[str, Any] = {**self.about, "settings": asdict(self.settings), **self.report}
        every = images_digest(dict(sorted({**self.stamps, **self.known}.items())))
        if self.settings.free:
            asked["pilot"] = {**asdict(self.pilot or pilots.Pilot()), "chosen": self.settings.free}
        if self.stability is None:
            asked["images_sha256"] = every
        else:
            asked["stability"] = {**asdict(self.stability), "given": every}
        return requested(asked)

    def _probed_with(self) -> dict[str, Any]:
        """What the probes' values depend on beside the model, for the journals."""
        return {"settings": self.settings.per_image(), "processor": models.processor_digest(self.processor)}

    def _open(self, opened: contextlib.ExitStack, name: str, key: dict[str, Any], kind: TypeAdapter[Any]) -> Journal:
        self.journals.append(opened.enter_context(open_journal(self.out, name, key, kind)))
        return self.journals[-1]

    def _run_pilot(self, todo: dict[str, str], opened: contextlib.ExitStack) -> None:
        """Fill in the open thresholds; what the pilot's probes said is used again for its images."""
        pilot = self.pilot or pilots.Pilot()
        about = {**self.about, **self._probed_with(), "pilot": pilot.images}
        journal = self._open(opened, PILOT_JOURNAL, about, PILOT)
        if PILOT_CHOSEN not in journal:
            order = pilots.shuffled(todo, self.settings.seed)
            names = order[: pilot.images]
            while True:  # others in the place of images that cannot be read
                _, errors = self._probe_all({name: todo[name] for name in names}, journal, "pilot")
                read = [name for name in names if name not in errors]
                more = order[len(names) : len(names) + pilot.images - len(read)]
                if not more:
                    break
                names += more
            if not read:
                raise self._none_read(errors)
            journal.add(PILOT_CHOSEN, {"digests": [todo[name] for name in read]})
        digests = journal[PILOT_CHOSEN]["digests"]
        self._check_same_images(digests, todo)
        known = {digest: journal[digest]["probes"] for digest in digests}
        try:
            self.settings, self.report["pilot"] = pilots.choose_thresholds(self.settings, pilot, list(known.values()))
        except CodebookError:
            forget(self.out, self.journals)  # they answer to these very settings
            raise
        self.worker.task = ImageTask(self.settings, self.options.exhaustive, known)
        self._note(pilots.quantile_words(self.report["pilot"]))
        self._note(pilots.words(self.settings, self.report["pilot"]))

    def _probe_all(
        self, stamps: dict[str, str], journal: Journal, phase: str = "build", resumed: int | None = None
    ) -> tuple[int, dict[str, str]]:
        """Probe all images that the journal does not hold yet; how many it held, and why images cannot be read.

        The journal knows images by their digests: under another name a finished image is still finished.
        """
        options, worker, pilot = self.options, self.worker, phase == "pilot"
        if not pilot:
            self._check_same_images(journal.records, stamps)
        else:
            worker.task = ImageTask(self.settings, exhaustive=True)
        held = [name for name, stamp in stamps.items() if stamp in journal]
        todo = [name for name, stamp in stamps.items() if stamp not in journal]
        steps = STEPS[:2] if pilot else STEPS[:-1]
        total = {step: sum(journal[stamps[name]]["funnel"][step] for name in held) for step in steps}
        done, errors, before = len(held), dict[str, str](), len(held) if resumed is None else resumed

        def report() -> None:
            skipped = tuple(sorted(errors))
            options.progress(Progress(done, len(stamps), before, skipped, dict(total), phase))

        report()
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
            elif pilot:
                journal.add(digest, {"funnel": found.funnel, "probes": found.probes})
            else:
                record: dict[str, Any] = {"tokens": found.tokens, "funnel": found.funnel, "spread": found.spread}
                if options.exhaustive:
                    record["probes"] = found.probes
                journal.add(digest, record, found.features if len(found.features) else None)
            if not isinstance(found, str):
                total = {step: total[step] + found.funnel[step] for step in total}
            done += 1
            report()
        if stamps and len(errors) == len(stamps) and not pilot:
            raise self._none_read(errors)
        return before, errors

    def _until_stable(self, journal: Journal, stability: Stability, todo: dict[str, str], held: list[str]) -> Codebook:
        """Build from more and more images until the codebook keeps the same tokens of those set aside."""
        order, resumed = list(todo), sum(digest in journal for digest in todo.values())
        curve: list[dict[str, Any]] = []
        self.report["stability"] = {
            **asdict(stability), "given": self._asked()["stability"]["given"], "set_aside": len(held), "curve": curve,
        }  # fmt: skip
        before: list[set[int]] | None = None
        for count in sizes(len(order)):
            part = {name: todo[name] for name in order[:count]}
            probed = self._probe_all(part, journal, resumed=resumed)
            # the last has to be a codebook, those before it need not
            made = self._pool(journal, part, probed[1]).codebook(self.settings, {})
            book = None if made is None else made[0]
            kept, tokens = list[set[int]](), list[int]()
            for name in held if book is not None else ():
                if book is not None and (visual := self.worker.tokens(name)) is not None:
                    kept.append(kept_tokens(book, visual))
                    tokens.append(len(visual))
            point: dict[str, Any] = {"images": count, "prototypes": 0 if book is None else len(book)}
            if before and kept:
                point["agreement"] = agreement(before, kept, tokens)
            curve.append(point)
            self._note(_point_words(curve))
            if is_stable(self.report["stability"]):
                break
            before = kept
        return self._finish(journal, probed, part)

    def _finish(self, journal: Journal, probed: tuple[int, dict[str, str]], todo: dict[str, str]) -> Codebook:
        """Write the codebook of all images that were probed."""
        held, errors = probed
        pool = self._pool(journal, todo, errors)
        config = {
            **self.about, "settings": asdict(self.settings), "pad": self.worker.pad, **self.report,
            "grid": list(self.worker.prober.grid),
        }  # fmt: skip
        made = pool.codebook(self.settings, config)
        total = {**pool.funnel, "recurrent": 0 if made is None else len(made[0])}
        self.options.progress(Progress(len(todo), len(todo), held, tuple(pool.skipped), total))
        if made is None:
            raise self._nothing_left(total)
        book, others = made
        if self.options.exhaustive:
            others[PROBES] = probe_lines(journal, todo)
        finished(self.out, self._asked())  # refuses to replace what another build has finished there meanwhile
        put_horizon(self.out, self.horizon)
        book.save(self.out, {**others, **pictures(book.config)})
        forget(self.out, self.journals)
        return book

    def _pool(self, journal: Journal, todo: dict[str, str], errors: dict[str, str]) -> SurvivorPool:
        """The survivors of the probed images and of the codebook that is extended."""
        stamps = self.stamps if self.stability is None else {name: todo[name] for name in sorted(todo)}
        pool = pooled(journal, stamps, todo, errors)
        return one_of_each(pool) if self.base is None else self.base.join(pool)

    def _note(self, text: str) -> None:
        self.options.progress(Progress(0, 0, 0, (), {}, "note", text))

    def _check_same_images(self, digests: Sequence[str] | dict[str, Any], stamps: dict[str, str]) -> None:
        if digests and not set(digests) & set(stamps.values()):
            raise CodebookError(
                f"{self.out} holds an unfinished build of other images: choose another --out, or delete "
                f"{self.out / UNFINISHED}"
            )

    def _none_read(self, errors: dict[str, str]) -> CodebookError:
        forget(self.out, self.journals)
        first, error = next(iter(sorted(errors.items())))
        more = f" and {len(errors) - 1} more" if len(errors) > 1 else ""
        return CodebookError(f"no image can be read: {first} ({error}){more}; give whole images")

    def _nothing_left(self, funnel: dict[str, int]) -> CodebookError:
        counts = ", ".join(f"{step} {count}" for step, count in funnel.items())
        step = next(step for step, count in funnel.items() if count == 0)
        kept = ""
        if step == "recurrent":
            kept = "; finished images are kept, only the last step is repeated"
        else:  # their records answer to these very thresholds
            forget(self.out, self.journals)
        return CodebookError(f"no prototype left ({counts}): {REMEDY[step]}{kept}")


def _point_words(curve: list[dict[str, Any]]) -> str:
    """The last point of a stability curve in one line."""
    point = curve[-1]
    line = f"stability: {point['images']} images, {point['prototypes']} prototypes"
    if "agreement" in point:
        line += f", agreement with {curve[-2]['images']} images {point['agreement']:.3f}"
    return line


def _to_probe(stamps: dict[str, str], known: dict[str, Any]) -> dict[str, str]:
    """The images to probe, with their digests: each file once, and none that is known already."""
    seen = {stamp for stamp in known.values() if is_digest(stamp)}
    todo = {}
    for name, stamp in stamps.items():
        if stamp not in seen and (name not in known or stamp != GONE):
            todo[name] = stamp
            seen |= {stamp} - {GONE}
    return todo
