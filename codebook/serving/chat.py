"""`POST /v1/chat/completions`, pruned, and `GET /v1/models`."""

from __future__ import annotations

import os
import time
import uuid
from typing import Any

from fastapi import APIRouter, Depends, Request, Response

from codebook.serving.limits import unless_left, whole_body
from codebook.serving.model_thread import Job
from codebook.serving.preparing import Preparer, unknown_model
from codebook.serving.request import ChatRequest, parse_request, without_query
from codebook.serving.state import ModelState
from codebook.serving.threads import Threads

PREPARERS = min(4, os.cpu_count() or 1)
"""Threads that make prompts of requests."""


def router(state: ModelState) -> APIRouter:
    """Chat completions and the one model that there is."""
    from codebook.serving.stock import Completion

    routes, preparer = APIRouter(dependencies=[Depends(without_query)]), Preparer(state)
    threads = Threads(PREPARERS, "codebook-prepare")
    started = int(time.time())
    model = {"id": state.name, "object": "model", "created": started, "owned_by": "codebook"}

    def read(body: bytes, deadline: float) -> tuple[Job, ChatRequest]:
        asked = parse_request(body, ChatRequest)
        return preparer.prepare(asked, deadline)[0], asked

    async def answered(body: bytes) -> Response:
        deadline = time.monotonic() + state.limits.seconds
        with state.model_thread.expecting():
            reading = threads.run(read, body, deadline)
            del body  # of megabytes, while the answer is waited for
            job, asked = await reading
        name = f"chatcmpl-{uuid.uuid4().hex}"
        return await Completion(state, job).respond(name, asked.stream, asked.stream_options.include_usage)

    @routes.post("/v1/chat/completions")
    async def complete(request: Request) -> Response:
        return await unless_left(request, answered(await whole_body(request)))

    @routes.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @routes.get("/v1/models/{name:path}")
    async def one(name: str) -> dict[str, Any]:
        if name != state.name:
            raise unknown_model(state)
        return model

    return routes
