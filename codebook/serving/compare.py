"""`POST /v1/compare`: one question under several methods and budgets, and what each of them kept of the picture."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse
from PIL import Image as Picture
from pydantic import Field

from codebook import models
from codebook.errors import CodebookError
from codebook.pruning.kept_map import kept_map
from codebook.pruning.presets import KEEP
from codebook.serving.errors import ServiceError
from codebook.serving.limits import unless_left, whole_body
from codebook.serving.methods import Methods
from codebook.serving.model_thread import Job
from codebook.serving.preparing import Preparer
from codebook.serving.request import ChatRequest, Strict, parse_request, without_query
from codebook.serving.state import ModelState
from codebook.serving.threads import Threads

MOST_WAYS = 4
"""Ways of answering that a request compares."""
NEW_TOKENS = 64
"""Tokens of an answer, where the request does not say how many."""


class Choice(Strict):
    """A method of `GET /v1/compare`, or `unpruned`, and its budget."""

    method: str = Field(max_length=100)
    keep: float = Field(KEEP, gt=0, le=1)


class Comparison(Strict):
    """The body of `POST /v1/compare`."""

    image: str
    question: str
    ways: list[Choice] = Field(min_length=1, max_length=MOST_WAYS)
    max_tokens: int = Field(NEW_TOKENS, ge=1)

    @property
    def as_chat(self) -> ChatRequest:
        """The same question as a chat, which is held to the limits of chats."""
        content = [
            {"type": "image_url", "image_url": {"url": self.image}},
            {"type": "text", "text": self.question},
        ]
        turns = [{"role": "user", "content": content}]
        return ChatRequest.model_validate({"messages": turns, "max_tokens": self.max_tokens})


def router(state: ModelState) -> APIRouter:
    """Comparisons, and what can be compared."""
    routes, preparer = APIRouter(dependencies=[Depends(without_query)]), Preparer(state)
    methods = Methods(state.model, state.codebook, state.seed)
    threads = Threads(1, "codebook-compare")

    @routes.get("/v1/compare")
    async def offered() -> dict[str, Any]:
        return {
            "model": state.name,
            "schedule": str(state.schedule),
            "methods": [{"name": name, "about": text} for name, text in methods.offered.items()],
            "examples": state.examples,
            "largest_body": state.limits.body,
        }

    @routes.post("/v1/compare")
    async def compare(request: Request) -> Response:
        return await unless_left(request, answered(await whole_body(request)))

    def read(body: bytes, deadline: float) -> tuple[list[Choice], Job, Picture.Image]:
        asked = parse_request(body, Comparison)
        job, [picture] = preparer.prepare(asked.as_chat, deadline)
        return asked.ways, job, picture

    async def answered(body: bytes) -> Response:
        deadline = time.monotonic() + state.limits.seconds
        reading = threads.run(read, body, deadline)
        del body  # of megabytes, while the answers are waited for
        ways, job, picture = await reading
        box = models.family(state.model).shown_box(state.processor, picture.size)
        return JSONResponse({"ways": [await answer(way, job, box) for way in ways]})  # others' between two of them

    async def answer(way: Choice, job: Job, box: tuple[float, float, float, float]) -> dict[str, Any]:
        """One way's answer, or why this method cannot give one here."""
        named = {"method": way.method, "keep": way.keep}
        try:
            schedule = methods.schedule(way.method, way.keep)
            own = Job(job.prompts, job.new_tokens, job.deadline, schedule=schedule)
            tokens = await state.model_thread.result_of(own)
        except ServiceError:
            raise
        except CodebookError as error:
            return {**named, "error": str(error)}
        image, stages = own.shown[0]  # where crops are images of their own, the first is the whole picture
        return {
            **named,
            "schedule": str(schedule),
            "answer": state.processor.decode(tokens, skip_special_tokens=True).strip(),
            "seen": own.seen,
            "kept": own.kept,
            "seconds": round(own.seconds, 4),
            **kept_map(image, schedule, stages, box),
        }

    return routes
