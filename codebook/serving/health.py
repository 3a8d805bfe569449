"""`GET /health`, `GET /ready` and `GET /metrics`."""

from __future__ import annotations

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from codebook.serving.errors import ServiceError
from codebook.serving.state import ModelState, State


def router(state: State) -> APIRouter:
    """Whether the service lives, whether it takes requests, and what it has counted."""
    routes = APIRouter()

    def check_model() -> None:
        if isinstance(state, ModelState) and state.model_thread.broken:
            raise ServiceError(503, "the model cannot answer any more: start the service anew", "broken")

    @routes.head("/health")
    @routes.get("/health")
    async def health() -> dict[str, str]:
        check_model()
        return {"status": "ok"}

    @routes.head("/ready")
    @routes.get("/ready")
    async def ready() -> dict[str, str]:
        if state.draining:
            raise ServiceError(503, "the service is about to end: ask another one", "draining")
        check_model()
        return {"status": "ready"}

    @routes.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(state.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return routes
