"""Public data sets of questions about clips, with options: MVBench and Video-MME, read from their own files on disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Required

from pydantic import Field
from typing_extensions import TypedDict

from codebook.errors import CodebookError, install_command
from codebook.evaluation.documents import CHOICE, LETTERS, read_checked
from codebook.evaluation.parquet import TEXT_CELL, TEXTS_CELL, parquet_files, read_columns
from codebook.evaluation.scorers import letter
from codebook.inference.samples import ClipPart, Sample
from codebook.store.clips import FrameRule
from codebook.store.pictures import frame_files, is_clip, spaced
from codebook.store.reading import is_folder

CLIPS = "mp4 or webm"
TVQA_FPS = 3
"""Frames per second of MVBench's one task whose clips are folders of frames."""

MVBENCH = {
    "action_sequence": ("star/Charades_v1_480", True),
    "action_prediction": ("star/Charades_v1_480", True),
    "action_antonym": ("ssv2_video", False),
    "fine_grained_action": ("Moments_in_Time_Raw/videos", False),
    "unexpected_action": ("FunQA_test/test", False),
    "object_existence": ("clevrer/video_validation", False),
    "object_interaction": ("star/Charades_v1_480", True),
    "object_shuffle": ("perception/videos", False),
    "moving_direction": ("clevrer/video_validation", False),
    "action_localization": ("sta/sta_video", True),
    "scene_transition": ("scene_qa/video", False),
    "action_count": ("perception/videos", False),
    "moving_count": ("clevrer/video_validation", False),
    "moving_attribute": ("clevrer/video_validation", False),
    "state_change": ("perception/videos", False),
    "fine_grained_pose": ("nturgbd", False),
    "character_order": ("perception/videos", False),
    "egocentric_navigation": ("vlnqa", False),
    "episodic_reasoning": ("tvqa/frames_fps3_hq", True),
    "counterfactual_inference": ("clevrer/video_validation", False),
}
"""MVBench's tasks: the folder of each one's clips below `video/`, and whether its questions are about parts of them."""


Second = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]


class ClipQuestion(TypedDict, total=False):
    """A record of MVBench."""

    video: Required[str]
    question: Required[str]
    candidates: Required[list[str]]
    answer: Required[str]
    start: Second
    end: Second


def mvbench(folder: Path, rule: FrameRule) -> Iterator[Sample]:
    """MVBench's questions, a task per file in `json/`; tasks without their file are left out (arXiv 2311.17005)."""
    for task, (videos, bounded) in MVBENCH.items():
        file = folder / "json" / f"{task}.json"
        if not file.exists():
            continue
        for number, record in enumerate(read_checked([file], list[ClipQuestion]), 1):
            if record["answer"] not in record["candidates"]:
                raise CodebookError(f"{file}, record {number}: the answer is none of the candidates; download it again")
            if bounded and record["start"] > record["end"]:
                raise CodebookError(f"{file}, record {number}: it ends before it starts; download it again")
            path = folder / "video" / videos / record["video"]
            part = (record["start"], record["end"]) if bounded else (0.0, None)
            options = [f"{LETTERS[i]}. {text}" for i, text in enumerate(record["candidates"])]
            answer = LETTERS[record["candidates"].index(record["answer"])]
            yield clip_question(path, record["question"], options, answer, f"mvbench {task}", ClipPart(rule, *part))


def clip_question(path: Path, question: str, options: Sequence[str], answer: str, task: str, part: ClipPart) -> Sample:
    """A question about a clip, or about a folder of frames, whose options are `A. text`; `answer` is a letter."""
    asked = "\n".join([question, *options]) + CHOICE
    if is_folder(path):
        stop = None if part.end is None else round(part.end * TVQA_FPS) + 1
        files = frame_files(path)[round(part.start * TVQA_FPS) : stop]
        if not files:
            raise CodebookError(f"{path} holds no frames of seconds {part.start:g} to {part.end}: unpack it again")
        return Sample(tuple(files[i] for i in spaced(len(files))), asked, answer, task, letter)
    return Sample((path,), asked, answer, task, letter, clip=part)


def videomme(folder: Path, rule: FrameRule) -> Iterator[Sample]:
    """Video-MME's questions without subtitles, a task per length of the clips (arXiv 2405.21075)."""
    columns = dict.fromkeys(("videoID", "question", "answer", "duration"), TEXT_CELL) | {"options": TEXTS_CELL}
    for file in parquet_files(folder / "videomme" if is_folder(folder / "videomme") else folder):
        for number, row in enumerate(read_columns(file, columns), 1):
            if row["answer"] not in tuple(LETTERS[: len(row["options"])]):
                raise CodebookError(f"{file}, record {number}: the answer is no option's letter; download it again")
            path = _clip_of(folder / "data", row["videoID"])
            task = f"videomme {row['duration']}"
            yield clip_question(path, row["question"], row["options"], row["answer"], task, ClipPart(rule))


def _clip_of(folder: Path, name: str) -> Path:
    name = Path(name).name
    return next((path for path in (folder / f"{name}.mp4", folder / f"{name}.webm") if path.exists()),
                folder / f"{name}.mp4")  # fmt: skip


def check_clips(samples: Sequence[Sample]) -> None:
    """Refuse clips that are not mp4 or webm, and any if PyAV is missing: before work begins, and undecoded.

    Raises
    ------
    CodebookError
        Naming the first.
    """
    paths: list[Any] = list(dict.fromkeys(sample.images[0] for sample in samples if sample.clip is not None))
    if paths and find_spec("av") is None:
        raise CodebookError(f"{paths[0]} is a video, which needs PyAV: {install_command('video')}")
    for path in paths:
        if not is_clip(path):
            raise CodebookError(f"{path} is no {CLIPS} file: convert it, or leave the file of its questions out")
