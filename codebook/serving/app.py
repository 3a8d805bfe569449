"""The app of the service: its parts, each a module with a `router`, behind the limits that hold for all."""

from __future__ import annotations

from fastapi import FastAPI

from codebook.serving import health, scores
from codebook.serving.errors import add_error_handlers
from codebook.serving.limits import Guard
from codebook.serving.state import ModelState, State

PARTS = (health, scores)
"""Modules with a function `router(state) -> fastapi.APIRouter`, of every service; `build_app` adds those of a model."""


def build_app(state: State) -> FastAPI:
    """The ASGI app of a service."""
    app = FastAPI(title="codebook", openapi_url=None, redirect_slashes=False)
    add_error_handlers(app)
    for part in PARTS:
        app.include_router(part.router(state))
    if isinstance(state, ModelState):
        from codebook.serving import chat, compare, explain, page  # they need transformers' server

        for model_part in (chat, compare, explain, page):
            app.include_router(model_part.router(state))
    app.add_middleware(Guard, state=state)
    return app
