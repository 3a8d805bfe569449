"""`POST /v1/chat/completions`, pruned, and `GET /v1/models`."""

from __future__ import annotations

import asyncio
import os
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import APIRouter, Request, Response

from codebook.serving.errors import ServiceError
from codebook.serving.preparing import Preparer
from codebook.serving.request import ChatRequest, parse_request
from codebook.serving.state import ModelState

PREPARERS = min(4, os.cpu_count() or 1)
"""Threads that make prompts of requests."""


def router(state: ModelState) -> APIRouter:
    """Chat completions and the one model that there is."""
    from codebook.serving.stock import Completion

    routes, preparer = APIRouter(), Preparer(state)
    pool = ThreadPoolExecutor(PREPARERS, thread_name_prefix="codebook-prepare")
    started = int(time.time())
    model = {"id": state.name, "object": "model", "created": started, "owned_by": "codebook"}

    @routes.post("/v1/chat/completions")
    async def complete(request: Request) -> Response:
        asked = parse_request(await request.body(), ChatRequest)
        loop = asyncio.get_running_loop()
        job = await loop.run_in_executor(pool, preparer.prepare, asked)
        identity = f"chatcmpl-{uuid.uuid4().hex}"
        return await unless_left(request, Completion(state, job).respond(identity, asked.stream))

    @routes.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @routes.get("/v1/models/{name:path}")
    async def one(name: str) -> dict[str, Any]:
        if name != state.name:
            raise ServiceError(404, f"there is no such model here: the model is {state.name!r}", "model_not_found")
        return model

    return routes


async def unless_left(request: Request, answering: Any) -> Response:
    """The response, or an empty one when the client has left before; what answers is then cancelled."""
    answer = asyncio.ensure_future(answering)
    left = asyncio.ensure_future(_leaving(request))
    try:
        await asyncio.wait({answer, left}, return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            return answer.result()
        return Response(status_code=499)
    finally:
        answer.cancel()
        left.cancel()


async def _leaving(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
