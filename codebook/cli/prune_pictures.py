"""`codebook prune --image --ask`: one question about pictures and videos."""

from __future__ import annotations

import json
from pathlib import Path

from codebook.cli.checks import check_output_picture
from codebook.cli.options import Loading
from codebook.cli.output import describe, note, note_costs, write_picture
from codebook.inference.ask import ask
from codebook.inference.overlay import overlay
from codebook.pruning.plan import Plan
from codebook.store.pictures import read_image, read_video


def prune_pictures(
    name: str,
    plan: Plan,
    images: list[Path],
    videos: list[Path],
    question: str,
    show: Path | None,
    max_new_tokens: int,
    loading: Loading,
    as_json: bool,
) -> None:
    """Answer a question about pictures, then the frames of videos, with a model; draw what it kept of each in `show`.

    The first picture has that name, the others their numbers behind it.
    """
    pictures = [read_image(path) for path in images]
    for path in videos:
        frames = read_video(path, loading.frame_rule(name))
        pictures += [read_image(frame) if isinstance(frame, Path) else frame for frame in frames]
    shown = []
    if show is not None:
        shown = [show if i == 0 else show.with_stem(f"{show.stem}-{i + 1}") for i in range(len(pictures))]
        for path in shown:
            check_output_picture(path, [*images, *videos])
    model, processor = loading.load(name)
    schedule = plan.apply(model)
    [answer] = ask(model, processor, [pictures], [question], schedule, max_new_tokens)
    report = describe(model, schedule) | {"answer": answer.text, "kept": answer.kept}
    if shown:
        for path, picture, view, kept in zip(shown, answer.pictures, answer.images, answer.kept, strict=True):
            write_picture(overlay(picture, *view.view(kept)), path)
        report["pictures"] = [str(path) for path in shown]
    if as_json:
        print(json.dumps(report))
        return
    print(answer.text)
    note_costs(report, [len(kept) for kept in answer.kept])
    if shown:
        note(f"picture: {', '.join(map(str, shown))}")
