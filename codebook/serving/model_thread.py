"""The one thread that the model runs on: what is queued is answered together, in order of arrival."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria, StoppingCriteriaList
from transformers.generation import BaseStreamer

from codebook.errors import CodebookError, out_of_memory
from codebook.inference.ask import Generated, generate
from codebook.inference.prompts import Prompts
from codebook.models import Image
from codebook.models.base import Model, Processor
from codebook.pruning import Schedule
from codebook.serving.errors import ServiceError, too_late
from codebook.serving.joining import alike, join
from codebook.serving.metrics import Metrics

MOST_TOGETHER = 32
"""Most prompts of one batch."""
COMPANY_SECONDS = 0.05
"""Most seconds that a batch waits for requests which have arrived and of which prompts are being made."""
TOKENS_TOGETHER = {"cpu": 2**12}
"""Most tokens of one batch with its padding, by device: on a CPU more takes memory and saves no time."""
MOST_TOKENS_TOGETHER = 2**17
"""The same elsewhere; a prompt alone may have more."""
DEVICE_ERRORS: tuple[type[Exception], ...] = (torch.AcceleratorError,) if hasattr(torch, "AcceleratorError") else ()
"""Errors after which a GPU computes nothing more for this process."""
logger = logging.getLogger(__name__)


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
        Gets each new token as it comes, or later.
    schedule
        Prunes this prompt instead of the service's own, and makes it be answered alone.
    left
        Set when nobody waits for the answer any more.
    answer
        The tokens (int64) of the answer, up to its end.
    streamed
        How many tokens the streamer was given.
    ended
        Whether the answer ended by itself, and was not cut off; set before `answer` is.
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
    streamed: int = 0
    ended: bool = False
    seen: int = 0
    kept: int = 0
    shown: list[tuple[Image, list[Tensor]]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        return int(self.prompts.inputs["input_ids"].shape[1])

    @property
    def alone(self) -> bool:
        """Whether the prompt cannot share a batch."""
        return bool(self.options) or self.schedule is not None


@dataclass(eq=False)
class Errand:
    """Any other work that needs the model; a long one looks whether `left` is set, as in a `Job`."""

    function: Callable[[], Any]
    left: threading.Event = field(default_factory=threading.Event)
    answer: Future[Any] = field(default_factory=Future)


class ModelThread:
    """Answers prompts on a thread of its own.

    A batch is what is queued when the one before ends, and what is just being made ready for it; it waits for nothing
    else. Sampling and prompts with a schedule of their own are answered alone. A batch that fails is answered again one
    by one, so that a prompt can fail only itself.

    Attributes
    ----------
    broken
        Whether nothing can be answered any more, as when the device has failed: only another process can go on.
    """

    def __init__(self, model: Model, processor: Processor, schedule: Schedule, metrics: Metrics) -> None:
        self._model, self._schedule, self._metrics = model, schedule, metrics
        self._ends = _ends(model)
        # Whether it ends where the longest answer of a batch does.
        self._forced_end = model.generation_config.forced_eos_token_id is not None
        self._pad = processor.tokenizer.pad_token_id or 0  # masked
        self._queue: deque[Job | Errand] = deque()
        self._ready = threading.Condition()
        self._expected = 0  # requests that prompts are being made of
        self._stopping = False
        self._running: list[Job | Errand] = []
        self._device_failed = False
        self._thread = threading.Thread(target=self._run, name="codebook-model", daemon=True)
        self._thread.start()

    @property
    def broken(self) -> bool:
        return self._device_failed or not self._thread.is_alive()

    def submit(self, job: Job | Errand) -> None:
        """Queue a prompt or task; its `answer` is set when it is done."""
        with self._ready:
            self._queue.append(job)
            self._metrics.waiting.set(len(self._queue))
            self._ready.notify()

    @contextmanager
    def expecting(self) -> Iterator[None]:
        """A context in which a prompt is made of a request, for which a batch waits a moment."""
        self._expect(1)
        try:
            yield
        finally:
            self._expect(-1)

    def _expect(self, more: int) -> None:
        with self._ready:
            self._expected += more
            self._ready.notify()

    def withdraw(self, job: Job | Errand) -> None:
        """Let go of what a client that has left waited for: it is not answered, or no further."""
        job.left.set()
        with self._ready:
            if job in self._queue:
                self._queue.remove(job)
                self._metrics.waiting.set(len(self._queue))
        job.answer.cancel()

    async def result_of(self, job: Job | Errand) -> Any:
        """The answer to a prompt, or what a task gives; withdrawn if nobody waits for it any more."""
        self.submit(job)
        try:
            return await asyncio.wrap_future(job.answer)
        except asyncio.CancelledError:
            self.withdraw(job)
            raise

    def stop(self) -> None:
        """End the thread, and what it is answering with it."""
        with self._ready:
            self._stopping = True
            for job in self._running:
                job.left.set()
            self._ready.notify()
        self._thread.join()

    def _run(self) -> None:
        while (work := self._next()) is not None:
            if isinstance(work, Errand):
                if work.answer.set_running_or_notify_cancel():
                    try:
                        work.answer.set_result(work.function())
                    except BaseException as error:
                        self._device_failed |= isinstance(error, DEVICE_ERRORS)
                        work.answer.set_exception(_failed(error))
            elif work:
                self._answer(work)
            work, self._running = None, []  # nothing of it is held while the next one is waited for

    def _next(self) -> Errand | list[Job] | None:
        """The next task, or prompts that can share a batch; None when the thread is to end."""
        with self._ready:
            first = None
            while first is None and not self._stopping:
                self._ready.wait_for(lambda: self._queue or self._stopping)
                self._ready.wait_for(
                    lambda: not self._expected or len(self._queue) >= MOST_TOGETHER or self._stopping, COMPANY_SECONDS
                )
                first = self._queue.popleft() if self._queue else None  # all may have been withdrawn meanwhile
            if first is None or self._stopping:
                return None
            work = first if isinstance(first, Errand) else [job for job in self._batch(first) if self._begins(job)]
            self._running = [work] if isinstance(work, Errand) else [*work]
            self._metrics.waiting.set(len(self._queue))
            return work

    def _batch(self, first: Job) -> list[Job]:
        """A prompt, and what can be answered together with it, which is taken from the queue."""
        batch, longest = [first], first.length
        if first.alone:
            return batch
        most = TOKENS_TOGETHER.get(self._model.device.type, MOST_TOKENS_TOGETHER)
        for job in [job for job in self._queue if isinstance(job, Job) and not job.alone]:
            if len(batch) == MOST_TOGETHER:
                break
            widest = max(longest, job.length)
            as_long = job.new_tokens == first.new_tokens or not self._forced_end
            if (len(batch) + 1) * widest <= most and as_long and alike(first.prompts, job.prompts):
                batch.append(job)
                self._queue.remove(job)
                longest = widest
        return batch

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
            self._device_failed |= isinstance(error, DEVICE_ERRORS)
            if len(jobs) > 1:
                for job in jobs:
                    self._answer([job])
                return
            self._metrics.generate_errors.inc()
            jobs[0].answer.set_exception(_failed(error))
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
                continue
            ends = torch.isin(tokens[: job.new_tokens], self._ends).nonzero()
            job.ended = len(ends) > 0
            # The end counts as one of the tokens; what follows it is padding.
            job.answer.set_result(tokens[: int(ends[0]) + 1 if job.ended else job.new_tokens])

    def _generate(self, jobs: list[Job]) -> Generated:
        first, processors = jobs[0], []
        prompts = join([job.prompts for job in jobs], self._pad)
        rows = Rows(jobs, prompts.inputs["input_ids"].shape[1], self._ends.tolist())
        options: dict[str, Any] = {"do_sample": False, **first.options}
        with ExitStack() as stack:
            if options["do_sample"]:
                processors.append(Finite())
                devices = [self._model.device] if self._model.device.type == "cuda" else []
                stack.enter_context(torch.random.fork_rng(devices))
                torch.manual_seed(first.seed) if first.seed is not None else torch.seed()
            return generate(
                self._model, prompts, self._schedule if first.schedule is None else first.schedule, processors,
                max_new_tokens=max(job.new_tokens for job in jobs),
                stopping_criteria=StoppingCriteriaList([rows]),
                streamer=rows if any(job.streamer for job in jobs) else None, **options,
            )  # fmt: skip


class Finite(LogitsProcessor):
    """Makes logits numbers again, for sampling, which on a GPU could not go on; that they were none is found later."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        return torch.nan_to_num(scores)


class Rows(StoppingCriteria, BaseStreamer):
    """The rows of a batch while it is generated: each ends by itself, and each stream gets the tokens of its own.

    A row ends at its own length, at its deadline, and when its client has left.
    """

    def __init__(self, jobs: list[Job], length: int, ends: Iterable[int] = ()) -> None:
        self._jobs, self._length, self._ends = jobs, length, set(ends)
        self._done = [False] * len(jobs)
        self._known: tuple[list[bool], Tensor] | None = None
        self._streams = [job.streamer is not None for job in jobs]
        self._position = -1  # the prompt comes first

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:  # type: ignore[override]
        now, new = time.monotonic(), input_ids.shape[1] - self._length
        for row, job in enumerate(self._jobs):
            self._done[row] |= new >= job.new_tokens or job.left.is_set() or now > job.deadline
        if self._known is None or self._known[0] != self._done:  # most steps change nothing, and copy nothing
            self._known = list(self._done), torch.tensor(self._done, device=input_ids.device)
        return self._known[1]

    def put(self, value: Tensor) -> None:
        """Take the prompt, and then one token of each row, whether `generate` has asked before if the row ends, or not.

        What was streamed before this batch failed with another prompt in it is not streamed again.
        """
        self._position += 1
        for row, job in enumerate(self._jobs) if self._position else ():
            if self._streams[row] and not job.left.is_set() and self._position > job.streamed:
                job.streamed += 1
                job.streamer.put(value[row : row + 1])
            # What follows is padding.
            self._streams[row] &= self._position < job.new_tokens and int(value[row]) not in self._ends

    def end(self) -> None:
        """Nothing: a stream ends when its answer is there."""


def _failed(error: BaseException) -> CodebookError:
    """The error of what the model could not answer; what is not meant for readers stays in the log."""
    if isinstance(error, CodebookError):
        return error
    logger.error("a prompt could not be answered", exc_info=error)
    if out_of_memory(error):
        return ServiceError(503, "not enough memory for this prompt: make it shorter", "out_of_memory")
    return ServiceError(500, f"the model could not answer: {type(error).__name__}", "generation_failed")


def _ends(model: Model) -> Tensor:
    """Tokens that end an answer, as `generate` knows them."""
    ends = model.generation_config.eos_token_id
    return torch.tensor([ends] if isinstance(ends, int) else list(ends or []), dtype=torch.long)
