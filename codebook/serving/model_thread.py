"""The one thread that the model runs on: what is queued is answered together, in order of arrival."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from codebook.errors import CodebookError
from codebook.inference.ask import generate
from codebook.inference.prompts import Prompts
from codebook.models import Image
from codebook.models.base import Model, Processor
from codebook.pruning import Schedule
from codebook.serving.errors import ServiceError
from codebook.serving.joining import alike, join
from codebook.serving.metrics import Metrics

MOST_TOGETHER = 16
"""Most prompts of one batch."""

R = TypeVar("R")


@dataclass(eq=False)
class Job:
    """A prompt that waits for its answer.

    Attributes
    ----------
    prompts
        One prompt, as the processor made it.
    new_tokens
        Most tokens of the answer.
    deadline
        When to give up, by `time.monotonic`.
    options
        Options of `generate` for this prompt alone, such as those of sampling; {} is greedy, and can share a batch.
    seed
        Seed of sampling; None: another one each time.
    streamer
        Gets each token as it comes, and makes the prompt be answered alone.
    schedule
        Prunes this prompt instead of the service's own, and makes it be answered alone.
    left
        Set when nobody waits for the answer any more.
    answer
        The tokens (int64) of the answer, up to its end.
    seen, kept
        Visual tokens of the prompt, and those that were kept to the last layer; set before `answer` is.
    shown
        The images of the prompt, each with the tokens that survived each stage; set before `answer` is.
    seconds
        How long the batch of this prompt took in the model; set before `answer` is.
    """

    prompts: Prompts
    new_tokens: int
    deadline: float
    options: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    streamer: Any = None
    schedule: Schedule | None = None
    left: threading.Event = field(default_factory=threading.Event)
    answer: Future[Tensor] = field(default_factory=Future)
    seen: int = 0
    kept: int = 0
    shown: list[tuple[Image, list[Tensor]]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def alone(self) -> bool:
        return bool(self.options) or self.streamer is not None or self.schedule is not None


@dataclass(eq=False)
class Errand:
    """Any other work that needs the model."""

    function: Callable[[], Any]
    answer: Future[Any] = field(default_factory=Future)


class ModelThread:
    """Answers prompts on a thread of its own.

    There is no delay that waits for company: while a batch runs the next one gathers. Streams, sampling and prompts
    with a schedule of their own are answered alone. A batch that fails is answered again one by one, so that a prompt
    can fail only itself.
    """

    def __init__(self, model: Model, processor: Processor, schedule: Schedule, metrics: Metrics) -> None:
        self._model, self._schedule, self._metrics = model, schedule, metrics
        self._ends = _ends(model)
        self._pad = processor.tokenizer.pad_token_id or 0  # masked
        self._queue: deque[Job | Errand] = deque()
        self._ready = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="codebook-model", daemon=True)
        self._thread.start()

    def submit(self, job: Job | Errand) -> None:
        """Queue a prompt or task; its `answer` is set when it is done."""
        with self._ready:
            self._queue.append(job)
            self._metrics.waiting.set(len(self._queue))
            self._ready.notify()

    async def run(self, function: Callable[[], R]) -> R:
        """The result of a function that needs the model, called between two batches."""
        import asyncio

        errand = Errand(function)
        self.submit(errand)
        return await asyncio.wrap_future(errand.answer)

    def stop(self) -> None:
        """End the thread after the batch that runs."""
        with self._ready:
            self._stopping = True
            self._ready.notify()
        self._thread.join()

    def _run(self) -> None:
        while (work := self._next()) is not None:
            if isinstance(work, Errand):
                if work.answer.set_running_or_notify_cancel():
                    try:
                        work.answer.set_result(work.function())
                    except BaseException as error:
                        work.answer.set_exception(error)
            elif work:
                self._answer(work)
            del work  # nothing of it is held while the next one is waited for

    def _next(self) -> Errand | list[Job] | None:
        """The next task, or prompts that can share a batch; None when the thread is to end."""
        with self._ready:
            self._ready.wait_for(lambda: self._queue or self._stopping)
            if self._stopping:
                return None
            first = self._queue.popleft()
            batch = [first] if isinstance(first, Job) else []
            if batch and not batch[0].alone:
                for job in list(self._queue):
                    if len(batch) == MOST_TOGETHER:
                        break
                    if isinstance(job, Job) and not job.alone and alike(batch[0].prompts, job.prompts):
                        batch.append(job)
                        self._queue.remove(job)
            self._metrics.waiting.set(len(self._queue))
        return first if isinstance(first, Errand) else [job for job in batch if self._begins(job)]

    def _begins(self, job: Job) -> bool:
        """Whether a prompt is to be answered: not if its client left, or has waited too long."""
        if not job.answer.set_running_or_notify_cancel() or job.left.is_set():
            return False
        if time.monotonic() > job.deadline:
            job.answer.set_exception(too_late())
            return False
        return True

    def _answer(self, jobs: list[Job]) -> None:
        start = time.monotonic()
        try:
            generated = self._generate(jobs)
        except Exception as error:
            if len(jobs) > 1:
                for job in jobs:
                    self._answer([job])
                return
            self._metrics.generate_errors.inc()
            jobs[0].answer.set_exception(error)
            return
        seconds = time.monotonic() - start
        self._metrics.generate_seconds.observe(seconds)
        self._metrics.batch_size.observe(len(jobs))
        for job, tokens, shown in zip(jobs, generated.tokens.cpu(), generated.shown, strict=True):
            job.shown, job.seconds = shown, seconds
            job.seen = sum(image.count for image, _ in shown)
            job.kept = sum(len(stages[-1]) if stages else image.count for image, stages in shown)
            self._metrics.visual_tokens.labels("seen").inc(job.seen)
            self._metrics.visual_tokens.labels("kept").inc(job.kept)
            if time.monotonic() > job.deadline:
                job.answer.set_exception(too_late())
            else:
                job.answer.set_result(self._cut(tokens[: job.new_tokens]))

    def _generate(self, jobs: list[Job]) -> Any:
        first = jobs[0]
        prompts = join([job.prompts for job in jobs], self._pad)
        options: dict[str, Any] = {"do_sample": False, **first.options}
        with ExitStack() as stack:
            if options["do_sample"]:
                devices = [self._model.device] if self._model.device.type == "cuda" else []
                stack.enter_context(torch.random.fork_rng(devices))
                torch.manual_seed(first.seed) if first.seed is not None else torch.seed()
            return generate(
                self._model, prompts, self._schedule if first.schedule is None else first.schedule,
                max_new_tokens=max(job.new_tokens for job in jobs),
                stopping_criteria=StoppingCriteriaList([RowsDone(jobs, prompts.inputs["input_ids"].shape[1])]),
                streamer=first.streamer, **options,
            )  # fmt: skip

    def _cut(self, tokens: Tensor) -> Tensor:
        """The tokens of one answer up to its end, which counts as one of them; what follows is padding."""
        ends = torch.isin(tokens, self._ends).nonzero()
        return tokens if not len(ends) else tokens[: int(ends[0]) + 1]


class RowsDone(StoppingCriteria):
    """Ends single rows of a batch: at their own length, at their deadline, or when their client has left."""

    def __init__(self, jobs: list[Job], length: int) -> None:
        self._jobs, self._length = jobs, length
        self._known: tuple[list[bool], Tensor] | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:  # type: ignore[override]
        now, new = time.monotonic(), input_ids.shape[1] - self._length
        done = [new >= job.new_tokens or job.left.is_set() or now > job.deadline for job in self._jobs]
        if self._known is None or self._known[0] != done:  # most steps change nothing, and copy nothing to a device
            self._known = done, torch.tensor(done, device=input_ids.device)
        return self._known[1]


def too_late() -> CodebookError:
    return ServiceError(503, "no answer within the time limit: ask for fewer tokens, or try again later", "timeout")


def _ends(model: Model) -> Tensor:
    """Tokens that end an answer, as `generate` knows them."""
    ends = model.generation_config.eos_token_id
    return torch.tensor([ends] if isinstance(ends, int) else list(ends or []), dtype=torch.long)
