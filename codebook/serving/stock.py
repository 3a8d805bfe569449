"""The chat completions of `transformers serve`: its answers and streams, made of what our worker generates.

The only module that touches `transformers.cli.serving`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import torch
from fastapi import Response
from transformers import __version__
from transformers.cli.serving import chat_completion, utils
from transformers.generation import GenerationConfig

from codebook.errors import CodebookError, install_command
from codebook.serving.errors import ServiceError, response_to
from codebook.serving.model_thread import Job
from codebook.serving.state import ModelState

USED = {
    "ChatCompletionHandler": ("_streaming", "_non_streaming", "_build_completion", "_build_chunk_sse"),
    "DirectStreamer": ("put", "end", "cancel", "_enqueue"),
    "_StreamError": (),
}
"""Names of `transformers serve` that are used here; none of them is promised to stay."""

FAILED = "failed"
STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
"""Headers of streams: what stands in between, such as nginx, is to pass each event on as it comes."""
STOCK_ERROR = f'data: {{"error": "{FAILED}"}}\n\n'
"""How the stock handler writes an error into a stream."""


def check_names(*modules: Any) -> None:
    """Refuse a transformers whose server is built in another way.

    Raises
    ------
    CodebookError
        Naming what is missing.
    """
    for name, parts in USED.items():
        found = next((getattr(module, name) for module in modules if hasattr(module, name)), None)
        missing = [name] if found is None else [f"{name}.{part}" for part in parts if not hasattr(found, part)]
        if missing:
            raise CodebookError(
                f"transformers {__version__} has no {missing[0]}, on which serving stands: install a version that the "
                f"package names, `{install_command('serve')}`"
            )


check_names(chat_completion, utils)


class Completion(chat_completion.ChatCompletionHandler):
    """The answer to one request, in the shapes of `transformers serve`.

    It is handler and generation manager at once: the stock handler asks it to generate, and it asks the worker.
    """

    def __init__(self, state: ModelState, job: Job) -> None:
        none: Any = None  # the stock handler only keeps what it would load models with
        super().__init__(model_manager=none, generation_state=none)
        self._state, self._job = state, job

    async def respond(self, request_id: str, stream: bool, include_usage: bool) -> Response:
        """The whole answer, or one that streams, whose last event is its usage if that is asked for."""
        state, job, self._include_usage = self._state, self._job, include_usage
        config = GenerationConfig(max_new_tokens=job.new_tokens)
        given: Any = (request_id, state.model, state.processor, state.name, job.prompts.inputs, config, self)
        if not stream:
            return await self._non_streaming(*given)
        response = self._streaming(*given)
        response.headers.update(STREAM_HEADERS)
        response.body_iterator = self._events(response.body_iterator)
        return response

    async def _events(self, parts: Any) -> AsyncIterator[str]:
        """The events of a stream: an error in the service's shape, and the end as OpenAI's clients know it."""
        self._state.model_thread.submit(self._job)  # not before: a stream that nobody begins to read asks for nothing
        async with contextlib.aclosing(parts):
            async for part in parts:
                if STOCK_ERROR in part:
                    ours = bytes(response_to(self._job.answer.exception() or broken_off()).body).decode()
                    yield part.replace(STOCK_ERROR, f"data: {ours}\n\n")
                    return
                yield part
        yield "data: [DONE]\n\n"

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, config: Any, request_id: str
    ) -> tuple[str, int, Any]:
        """(text, tokens of the prompt, tokens of the answer), as the stock manager gives them."""
        tokens = await self._state.model_thread.result_of(self._job)
        return processor.decode(tokens, skip_special_tokens=True), inputs["input_ids"].shape[-1], tokens

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, config: Any, request_id: str, response_parser: Any = None
    ) -> tuple[asyncio.Queue[Any], Any]:
        """(queue of texts, streamer), as the stock manager gives them."""
        loop, queue, job = asyncio.get_running_loop(), asyncio.Queue[Any](), self._job
        streamer = LateStreamer(processor.tokenizer._tokenizer, loop, queue, response_parser=response_parser)
        streamer.serve(self._state, job, plain=response_parser is None)
        job.streamer = streamer
        job.answer.add_done_callback(lambda _: streamer.finish())
        return queue, streamer

    def _build_completion(self, *args: Any, **fields: Any) -> Any:
        return super()._build_completion(*args, **self._corrected(fields))

    def _build_chunk_sse(self, request_id: str = "", *args: Any, **fields: Any) -> str:
        fields = self._corrected(fields)
        usage = fields.pop("usage", None)
        event = super()._build_chunk_sse(request_id, *args, **fields)
        if usage is None or not self._include_usage:
            return event
        last = super()._build_chunk_sse(request_id, model=self._state.name, usage=usage)
        last = json.loads(last.removeprefix("data: ")) | {"choices": []}
        return f"{event}data: {json.dumps(last)}\n\n"

    def _corrected(self, fields: dict[str, Any]) -> dict[str, Any]:
        """The fields of an answer, with what the stock handler does not know.

        That an answer as long as it may be has ended by itself; and the visual tokens of the prompt and those that were
        kept, which are part of the usage.
        """
        if fields.get("finish_reason") == "length" and self._job.ended:
            fields = {**fields, "finish_reason": "stop"}
        if (usage := fields.get("usage")) is None:
            return fields
        counts = {"seen": self._job.seen, "kept": self._job.kept}
        return {**fields, "usage": type(usage)(**usage.model_dump(), codebook=counts)}


class LateStreamer(utils.DirectStreamer):
    """The stock streamer, which ends when the answer is there: in all it streams the answer's text, or an error."""

    def serve(self, state: ModelState, job: Job, plain: bool = True) -> None:
        """Say whose tokens these are, and whether all of their text is streamed as it is."""
        self._state, self._job, self._plain = state, job, plain
        self._tokens: list[int] = []
        self._text = ""
        super().put(torch.empty(0))  # in the place of the prompt, which it leaves out

    def put(self, value: torch.Tensor) -> None:
        self._tokens += value.tolist()
        super().put(value)

    def _enqueue(self, item: Any) -> None:
        self._text += item if isinstance(item, str) else ""
        with contextlib.suppress(RuntimeError):  # the loop has ended: what was cut off is read by nobody
            super()._enqueue(item)

    def end(self) -> None:
        pass

    def finish(self) -> None:
        """Stream what the answer has beyond what was streamed, and end; with an error if there is no answer."""
        try:
            if not self._job.answer.cancelled():
                self._complete(self._job.answer.result())
            super().end()
        except Exception:  # a stream that does not end would be waited for
            self._enqueue(utils._StreamError(FAILED))

    def _complete(self, tokens: torch.Tensor) -> None:
        given = len(self._tokens)
        if tokens[:given].tolist() != self._tokens:  # it was answered again, and another time otherwise
            raise broken_off()
        self.put(tokens[given:])
        if self._plain:
            # Without the spaces that some tokenizers take out of a whole text: these have been streamed.
            kept = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
            whole = self._state.processor.decode(tokens, **kept)
            if not whole.startswith(self._text):
                raise broken_off()
            if more := whole[len(self._text) :]:  # as of a character that is cut off in the middle
                self._enqueue(more)

    def cancel(self) -> None:
        """Stop the generation: the client has left."""
        self._state.model_thread.withdraw(self._job)


def broken_off() -> ServiceError:
    """The error of a stream that cannot be made the answer any more."""
    return ServiceError(500, "what was streamed is not the answer: ask again, without a stream", "stream_broken")
