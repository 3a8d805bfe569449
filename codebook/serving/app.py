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
    routers = [part.router(state) for part in PARTS]
    if isinstance(state, ModelState):
        from codebook.serving import chat, compare, explain, page  # they need transformers' server

        routers += [model_part.router(state) for model_part in (chat, compare, explain, page)]
    for router in routers:
        app.include_router(router)
    app.add_middleware(Guard, state=state, routes=[route for router in routers for route in router.routes])
    return app
