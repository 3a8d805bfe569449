"""The kinds of files that the package reads: how a good example of each is made, and how it is read as a user would."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file

from codebook import Codebook, CodebookError, building, models
from codebook.cli import main as codebook
from codebook.evaluation.datasets import COGNITION, PERCEPTION, load_tasks
from codebook.miniature import write_images
from codebook.store.journal import Journal
from codebook.store.pictures import read_image, read_video

CANARY = "CODEBOOK_CANARY"
"""Environment variable with the file that code makes if it runs although it is only data."""


@dataclass(frozen=True)
class Subject:
    """One kind of file.

    Attributes
    ----------
    make
        Writes a good example into a folder.
    files
        Glob of the files in it that are spoiled.
    read
        Reads the folder. Raises a CodebookError, or ends with exit code 2, where something is wrong.
    weight
        How often it is drawn, against the others.
    sealed
        Folder in it whose config.json holds checksums: half of the cases write them anew, to get past them.
    """

    make: Callable[[Path], None]
    files: str
    read: Callable[[Path], object]
    weight: int
    sealed: str | None = None


@contextlib.contextmanager
def miniature_once() -> Iterator[None]:
    """Commands that load the miniature get the same one each time: reading its weights is a subject of its own."""
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # a thread's OpenMP pool does not survive the fork
    real = models.load
    once = cache(lambda: real("miniature", "cpu"))

    def load(name: str, *args: Any, **kwargs: Any) -> Any:
        return once() if name == "miniature" else real(name, *args, **kwargs)

    once()
    models.load = load
    try:
        yield
    finally:
        models.load = real


def run(line: str, *more: str) -> None:
    """Run a command line of plain words, and more that may hold blanks; raises SystemExit unless it ends well."""
    try:
        codebook([*line.split(), *more])
    except SystemExit as end:
        if end.code:
            raise


SMALL = "--tau-p 0.99 --tau-j 0.9 --clusters 4 --min-image-fraction 0.3 --max-cluster-size 144"
ASK = "--ask describe. --max-new-tokens 1 --device cpu"


def make_book(folder: Path) -> None:
    """A codebook and its images; made once, and copied for the next subjects."""
    made = folder.parent / ".book"
    if not made.exists():
        write_images(made / "images", 3)
        run(f"build miniature --images {made}/images --out {made}/book --device cpu {SMALL}")
    shutil.copytree(made, folder, dirs_exist_ok=True)


def read_book(folder: Path) -> None:
    book = Codebook.load(folder / "book")
    book.redundancy(torch.ones(2, book.dimension))
    run(f"inspect {folder}/book --json")
    run(f"inspect {folder}/book --sheet {folder}/sheet.png --images {folder}/images")
    picture = f"{folder}/images/000000.png"
    run(f"explain miniature --image {picture} --patch 3,5 --codebook {folder}/book --device cpu")


def make_books(folder: Path) -> None:
    make_book(folder)
    shutil.copytree(folder / "book", folder / "other")


def read_survivors(folder: Path) -> None:
    run(f"merge {folder}/other {folder}/book --out {folder}/merged")


def make_extended(folder: Path) -> None:
    make_book(folder)
    (folder / "more").mkdir()
    shutil.copyfile(folder / "images" / "000001.png", folder / "more" / "new.png")


def read_extended(folder: Path) -> None:
    run(f"extend {folder}/book --images {folder}/more --out {folder}/out --device cpu")


def make_unfinished(folder: Path) -> None:
    """A build that was stopped after its last image, before it was put together."""
    write_images(folder / "images", 3)

    class Stop(Exception):
        pass

    def stop(state: building.Progress) -> None:
        if state.done == 3:
            raise Stop

    model, processor = models.load("miniature", "cpu")
    with contextlib.suppress(Stop):
        building.build(
            model, processor, folder / "images", folder / "book", model_id="miniature", settings=SETTINGS, progress=stop
        )


SETTINGS = building.Settings(
    **building.preset("miniature").__dict__
    | {"tau_p": 0.99, "tau_j": 0.9, "clusters": 4, "min_image_fraction": 0.3, "max_cluster_size": 144}
)


def read_unfinished(folder: Path) -> None:
    run(f"build miniature --images {folder}/images --out {folder}/book --device cpu {SMALL}")


def make_schedule(folder: Path) -> None:
    write_images(folder, 1)
    text = "codebook:0.5, random@8:0.25+mass; positions=compact"
    (folder / "schedule.json").write_text(json.dumps({"format": 1, "schedule": text}))


def read_schedule(folder: Path) -> None:
    run(f"prune miniature --image {folder}/000000.png --schedule {folder}/schedule.json {ASK}")


def make_text(folder: Path) -> None:
    write_images(folder, 1)
    text = "seeded:0.5+mass, fastv(query='visual', reverse=True)@3:20, random(seed=7)@8:0.05; positions=compact"
    (folder / "schedule.txt").write_text(text)


def read_text(folder: Path) -> None:
    """The text as an argument of the command line; a missing file is none."""
    path = folder / "schedule.txt"
    text = path.read_text(errors="replace") if path.is_file() and path.stat().st_size < 2**20 else ""
    run(f"prune miniature --image {folder}/000000.png {ASK}", f"--schedule={text}".replace("\x00", ""))


def make_samples(folder: Path) -> None:
    write_images(folder / "film", 3)
    lines = [
        {"image": "film/000000.png", "question": "exist?", "answers": ["red", "red", "blue"], "task": "t"},
        {"images": ["film/000001.png", "film/000002.png"], "question": "what?", "answer": "7"},
        {"video": "film", "question": "where?", "answer": "left", "task": "v"},
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def read_samples(folder: Path) -> None:
    for task in load_tasks([str(folder / "samples.jsonl")]):
        for sample in task.samples:
            sample.pictures()
            sample.score("red")


def make_questions(folder: Path) -> None:
    write_images(folder, 2)
    lines = [{"image": f"00000{i}.png", "question": "read the number.", "id": i} for i in range(2)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def read_questions(folder: Path) -> None:
    out = f"--output {folder}/answers.jsonl --max-new-tokens 1 --device cpu --keep 0.1"
    run(f"prune miniature --input {folder}/questions.jsonl {out}")


def make_answered(folder: Path) -> None:
    """A job that was done, and is asked again."""
    make_questions(folder)
    read_questions(folder)


def make_tokens(folder: Path) -> None:
    tokens = {"a": torch.randn(12, 160, generator=torch.Generator().manual_seed(0)), "b": torch.ones(3, 160).half()}
    save_file(tokens, folder / "tokens.safetensors")


def read_tokens(folder: Path) -> None:
    run(
        f"prune --tokens {folder}/tokens.safetensors --codebook {SHIPPED} --keep 0.2 --output {folder}/kept.safetensors"
    )


SHIPPED = Path(building.__file__).parents[2] / "indexes" / "miniature"


def make_pictures(folder: Path) -> None:
    picture = Image.linear_gradient("L").resize((24, 18)).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    for suffix in ("png", "jpg", "gif", "webp", "bmp", "tiff", "ppm"):
        picture.save(folder / f"a.{suffix}", **({"exif": exif} if suffix in ("jpg", "webp", "png", "tiff") else {}))
    picture.convert("P").save(folder / "palette.png")
    Image.new("I;16", (9, 9), 40_000).save(folder / "gray.png")
    Image.new("CMYK", (9, 9)).save(folder / "cmyk.jpg")
    Image.new("LA", (9, 9)).save(folder / "alpha.png")
    picture.save(folder / "film.gif", save_all=True, append_images=[picture.rotate(90), picture.rotate(180)])


def read_pictures(folder: Path) -> None:
    """Every picture, alone and as a film: what one says does not hide the next."""
    first: CodebookError | None = None
    for path in sorted(folder.glob("*")):
        for read in (read_image, read_video):
            try:
                read(path)
            except CodebookError as error:
                first = first or error
    if first:
        raise first


def make_sources(folder: Path) -> None:
    write_images(folder / "images", 2)
    (folder / "list.jsonl").write_text('{"image": "images/000000.png"}\n"images/000001.png"\n')
    with tarfile.open(folder / "shard.tar", "w") as tar:
        tar.add(folder / "images" / "000000.png", "a.png")
        tar.add(folder / "images" / "000001.png", "sub/b.png")


def read_sources(folder: Path) -> None:
    """Every picture of every source. What is no picture a build counts and goes on, whatever PIL says of it."""
    for name in ("list.jsonl", "shard.tar", "images"):
        source = building.open_images(folder / name)
        for image in source.names:
            with contextlib.suppress(Exception):
                source.read(image)


def make_journal(folder: Path) -> None:
    with Journal(folder / "answers.sqlite", {"model": "m", "seed": 0}) as journal:
        for i in range(4):
            journal.add(f"{i}", {"text": "red", "kept": [1, 2], "score": 0.5}, torch.ones(2))


def read_journal(folder: Path) -> None:
    with Journal(folder / "answers.sqlite", {"model": "m", "seed": 0}) as journal:
        for name in journal.records:
            journal.tensor(name)
        journal.add("more", 1)


def make_released(folder: Path) -> None:
    torch.save(torch.randn(5, 8, generator=torch.Generator().manual_seed(0)).half(), folder / "book.pt")
    (folder / "images.json").write_text(json.dumps(["a", "b", "c", "d", "e"]))


def read_released(folder: Path) -> None:
    Codebook.from_released(folder / "book.pt", folder / "images.json").save(folder / "saved")


def make_datasets(folder: Path) -> None:
    """A question or two of each data set, in its own files."""

    def put(name: str, value: object = None) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if value is None:
            Image.new("RGB", (8, 8)).save(path)
        else:
            path.write_text(value if isinstance(value, str) else json.dumps(value))

    ten = [{"answer": "red"}] * 7 + [{"answer": "blue"}] * 3
    put("vqav2/val2014/COCO_val2014_000000000042.jpg")
    put("vqav2/v2_OpenEnded_mscoco_val2014_questions.json",
        {"questions": [{"question_id": 1, "image_id": 42, "question": "What color?"}]})  # fmt: skip
    put("vqav2/v2_mscoco_val2014_annotations.json",
        {"annotations": [{"question_id": 1, "image_id": 42, "answers": ten}]})  # fmt: skip
    put("gqa/images/n1.jpg")
    put("gqa/testdev_balanced_questions.json", {"1": {"imageId": "n1", "question": "Is it?", "answer": "yes"}})
    put("textvqa/train_images/x.jpg")
    put("textvqa/TextVQA_0.5.1_val.json", {"data": [{"question": "q", "image_id": "x", "answers": ["a"] * 10}]})
    put("vizwiz/val/v.jpg")
    put("vizwiz/val.json", [{"image": "v.jpg", "question": "What?", "answers": ten}])
    put("pope/val2014/p.jpg")
    for split in ("random", "popular", "adversarial"):
        put(f"pope/coco_pope_{split}.json", json.dumps({"image": "p.jpg", "text": "Is there?", "label": "yes"}) + "\n")
    for category in (*PERCEPTION, *COGNITION):
        put(f"mme/{category}/1.jpg")
        put(f"mme/{category}/1.txt", "Is there a dog?\tYes\nIs there a cat?\tNo\n")
    put("refcoco/train2014/r.jpg")
    put("refcoco/finetune_refcoco_val.json", {
        "images": [{"id": 0, "file_name": "r.jpg", "height": 480, "width": 640, "caption": "bowl"}],
        "annotations": [{"image_id": 0, "bbox": [64, 48, 128, 96]}],
    })  # fmt: skip
    put("ai2d/images/0.png")
    put("ai2d/ai2d_test_ids.csv", "0\n")
    put("ai2d/questions/0.png.json",
        {"questions": {"C?": {"answerTexts": ["leaf", "root", "stem", "bud"], "correctAnswer": 1}}})  # fmt: skip
    put("docvqa/documents/d.png")
    put("docvqa/val_v1.0_withQT.json", {"data": [{"question": "q", "image": "documents/d.png", "answers": ["red"]}]})
    put("chartqa/test/png/c.png")
    for part in ("human", "augmented"):
        put(f"chartqa/test/test_{part}.json", [{"imgname": "c.png", "query": "q", "label": "7"}])
    put("ocrbench/OCRBench_Images/o.png")
    put("ocrbench/OCRBench.json", [{"dataset_name": "svt", "image_path": "o.png", "question": "q", "answers": ["red"]}])
    put("chair/val2014/1.jpg")
    put("chair/instances_val2014.json", {
        "images": [{"id": 1, "file_name": "1.jpg"}], "categories": [{"id": 2, "name": "cat"}],
        "annotations": [{"image_id": 1, "category_id": 2}],
    })  # fmt: skip
    put("chair/captions_val2014.json", {"annotations": [{"image_id": 1, "caption": "a cat"}]})
    put("chair/synonyms.txt", "cat, kitten\n")


def read_datasets(folder: Path) -> None:
    for kind in sorted(path.name for path in folder.iterdir()):
        for task in load_tasks([f"{kind}:{folder}/{kind}"], count=1):
            [sample.score("red") for sample in task.samples]


EVIL = f"""import os
open(os.environ["{CANARY}"], "w")
class Config: pass
"""


def make_model(folder: Path) -> None:
    """The miniature's own weights, and a module that nothing may import."""
    shutil.copytree(Path(models.__file__).parents[1] / "miniature" / "weights", folder, dirs_exist_ok=True)
    (folder / "evil.py").write_text(EVIL)


def read_model(folder: Path) -> None:
    models.load(str(folder), "cpu")


SUBJECTS = {
    "codebook": Subject(make_book, "book/[!R]*", read_book, 30, sealed="book"),
    "survivors": Subject(make_books, "book/[!R]*", read_survivors, 20, sealed="book"),
    "extend": Subject(make_extended, "book/[!R]*", read_extended, 5, sealed="book"),
    "unfinished": Subject(make_unfinished, "book/.build/**/*", read_unfinished, 10),
    "schedule": Subject(make_schedule, "schedule.json", read_schedule, 10),
    "text": Subject(make_text, "schedule.txt", read_text, 10),
    "samples": Subject(make_samples, "samples.jsonl", read_samples, 20),
    "questions": Subject(make_questions, "questions.jsonl", read_questions, 8),
    "answers": Subject(make_answered, "*answers.jsonl*", read_questions, 8),
    "journal": Subject(make_journal, "**/*.*", read_journal, 20),
    "tokens": Subject(make_tokens, "tokens.safetensors", read_tokens, 20),
    "pictures": Subject(make_pictures, "*", read_pictures, 20),
    "sources": Subject(make_sources, "*.*", read_sources, 5),
    "released": Subject(make_released, "*", read_released, 20),
    "datasets": Subject(make_datasets, "**/*.*", read_datasets, 20),
    "model": Subject(make_model, "[!e]*", read_model, 3),
}
