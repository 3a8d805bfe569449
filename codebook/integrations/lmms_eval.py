"""Pruned models in lmms-eval 0.7 (https://github.com/EvolvingLMMs-Lab/lmms-eval), found by its entry point:

lmms-eval --model codebook --model_args pretrained=llava-hf/llava-1.5-7b-hf,schedule=codebook,keep=0.11 --tasks gqa
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image
from tqdm import tqdm

from codebook import models
from codebook.errors import CodebookError, quoted
from codebook.inference.ask import answer_prompts
from codebook.inference.prompts import prepare
from codebook.pruning.plan import Plan
from codebook.pruning.presets import DEFAULT
from codebook.store.pictures import read_image, read_video


def manifest() -> ModelManifest:
    """The model's entry for lmms-eval, found by its entry point `lmms_eval.models`."""
    return ModelManifest(model_id="codebook", simple_class_path=f"{__name__}.PrunedModel")


class PrunedModel(lmms):
    """Any supported model under a schedule; answers are greedy.

    Parameters
    ----------
    pretrained
        Name of the model, as for `codebook.load`.
    schedule, keep, positions, codebook, seed
        Options of the same names of `codebook prune`; `unpruned` is a schedule too.
    device, dtype, batch_size
        Device of the model, its precision (such as bfloat16), and questions per batch.

    Raises
    ------
    CodebookError
        If an argument is wrong.
    """

    def __init__(
        self,
        pretrained: str = "miniature",
        schedule: str = DEFAULT,
        keep: float | None = None,
        positions: str | None = None,
        codebook: str | None = None,
        seed: int = 0,
        device: str | None = None,
        dtype: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if not (str(batch_size).isdecimal() and int(batch_size)):
            raise CodebookError(f"batch_size is {quoted(batch_size)}: give how many questions share a batch, as in 8")
        plan = Plan(schedule, keep, positions, None if codebook is None else Path(codebook), int(seed))
        self.model, self.processor = models.load(pretrained, device, dtype)
        self.schedule = plan.apply(self.model)
        self.batch_size = int(batch_size)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers, in the order of the requests."""
        tasks = [_Task(self.task_dict, *request.args) for request in requests]
        order = sorted(range(len(tasks)), key=lambda i: tasks[i].kind)
        answers: dict[int, str] = {}
        with tqdm(total=len(tasks), desc="codebook", unit="answer") as bar:
            for _, rows in groupby(order, key=lambda i: tasks[i].kind):
                own = list(rows)
                for start in range(0, len(own), self.batch_size):
                    batch = own[start : start + self.batch_size]
                    answers |= zip(batch, self._answer([tasks[i] for i in batch]), strict=True)
                    bar.update(len(batch))
        return [answers[i] for i in range(len(tasks))]

    def _answer(self, tasks: Sequence[_Task]) -> list[str]:
        pictures, questions = [task.pictures() for task in tasks], [task.question for task in tasks]
        prompts = prepare(self.model, self.processor, pictures, questions)
        options = tasks[0].generation
        found = answer_prompts(self.model, self.processor, prompts, self.schedule, options.get("max_new_tokens", 1024))
        stops = options.get("until") or []
        return [_cut(one.text, [stops] if isinstance(stops, str) else stops) for one in found]

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        raise CodebookError("tasks that compare likelihoods are not supported: take one whose answers are generated")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise CodebookError("tasks of several rounds are not supported: take one with a question and an answer")


class _Task:
    """One request: its question, its generation settings, and its pictures, which are read when they are needed."""

    def __init__(
        self, docs: Any, context: str, generation: dict[str, Any], show: Any, doc_id: int, task: str, split: str
    ) -> None:
        self.question = context.replace("<image>", "").strip()
        self.generation = generation
        self.kind = task, json.dumps(generation, sort_keys=True)  # requests of one kind can share a batch
        self._show = lambda: show(docs[task][split][doc_id])

    def pictures(self) -> list[Image.Image]:
        found: list[Image.Image] = []
        for visual in self._show() or []:
            frames = read_video(Path(visual)) if isinstance(visual, str) else (visual,)
            found += [read_image(frame) if isinstance(frame, Path) else frame for frame in frames]
        return found


def _cut(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        text = text.split(stop)[0] if stop else text
    return text.strip()
