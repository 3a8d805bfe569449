"""Redundancy scores over HTTP, for inference programs that have no Python: safetensors in, safetensors out."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal

import anyio
import torch
from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic import BaseModel, ConfigDict
from safetensors.torch import save
from torch import Tensor

from codebook.errors import CodebookError, quoted
from codebook.pruning import METHODS, Stage, VisualTokens
from codebook.pruning.presets import KEEP
from codebook.pruning.text import WITH_MASS, read_keep
from codebook.serving.errors import ServiceError
from codebook.serving.limits import unless_left, whole_body
from codebook.serving.request import without_query
from codebook.serving.state import State
from codebook.serving.wire import (
    FEATURES_NAME,
    KEPT_NAME,
    MEDIA_TYPE,
    REDUNDANCY_NAME,
    Malformed,
    Misfit,
    check_features,
)
from codebook.store.codebook import Codebook
from codebook.store.parsing import parse_tensors

SCORED_AT_ONCE = 2
"""Requests that are scored at the same time; each uses all of torch's threads, so that more would only hold memory."""

LARGEST_FEATURE = 1e15
"""Bound of features: the squares of far larger ones overflow, and with them cosine similarity."""


class Asked(BaseModel):
    """The query of a request for scores."""

    model_config = ConfigDict(extra="forbid")
    keep: str = str(KEEP)
    # Methods that need nothing but features and a codebook.
    method: Literal["seeded-middle", "seeded", "codebook"] = "seeded-middle"


class Recorder:
    """A codebook that writes down its scores while a method chooses by them, so that each is computed once."""

    def __init__(self, book: Codebook) -> None:
        self.book = book
        self.scores: list[Tensor] = []

    def redundancy(self, tokens: Tensor) -> Tensor:
        self.scores.append(self.book.redundancy(tokens))
        return self.scores[-1]


def score_features(book: Codebook, features: Tensor, keep: int | float, method: str) -> dict[str, Tensor]:
    """Redundancy of visual tokens, and which of them a method keeps; image by image, as alone.

    Parameters
    ----------
    features : (n, d) or (images, n, d) float
    keep
        A float in (0, 1]: that share of each image's tokens stays. An int: so many.

    Returns
    -------
    `redundancy` (n,) or (images, n) float32 and `kept` (k,) or (images, k) int64, ascending

    Raises
    ------
    CodebookError
        If so many cannot be kept.
    """
    images = features if features.dim() == 3 else features[None]
    recorder = Recorder(book)
    pruner = METHODS[WITH_MASS.get(method, (method, False))[0]](recorder)
    count = Stage(0, keep, pruner).count(images.shape[1])
    with torch.inference_mode():
        kept = torch.stack([pruner.select(VisualTokens.of(image), count) for image in images])
        found = {REDUNDANCY_NAME: torch.stack(recorder.scores), KEPT_NAME: kept}
    return found if features.dim() == 3 else {name: values[0] for name, values in found.items()}


def score_body(book: Codebook, body: bytes, keep: str, method: str) -> tuple[bytes, float]:
    """A body with scores for a body with features, and the seconds that scoring alone took.

    Raises
    ------
    ServiceError, CodebookError
        If the body or the keep is refused.
    """
    try:
        check_features(body, book.dimension)
        features = parse_tensors("the body", body, "send a safetensors file")[FEATURES_NAME]
    except Misfit as error:
        raise ServiceError(422, str(error), "unfit_features") from None
    except (Malformed, CodebookError) as error:
        raise ServiceError(400, str(error), "malformed_body") from None
    # Of the extremes, which NaN is both: twenty times faster than to ask of each value.
    if not all(extreme.abs() < LARGEST_FEATURE for extreme in features.aminmax()):
        raise ServiceError(
            422, f"features hold values that are NaN, infinite or beyond {LARGEST_FEATURE:.0e}: check what made them",
            "unfit_features",
        )  # fmt: skip
    try:
        share = read_keep(keep)
    except CodebookError:
        raise ServiceError(422, f"keep is {quoted(keep)}: write a share with a decimal point, as in 0.2, or a count "
                           "without one, as in 64", param="keep") from None  # fmt: skip
    start = time.perf_counter()
    found = score_features(book, features, share, method)
    return save(found), time.perf_counter() - start


def router(state: State) -> APIRouter:
    """The routes of the service's codebooks."""
    routes, shelf = APIRouter(), state.shelf
    limiter = anyio.CapacityLimiter(SCORED_AT_ONCE)

    @routes.get("/v1/codebooks", dependencies=[Depends(without_query)])
    async def codebooks() -> dict[str, Any]:
        return {"object": "list", "data": shelf.listing()}

    @routes.post("/v1/codebooks/{name}/score")
    async def score(name: str, asked: Annotated[Asked, Query()], request: Request) -> Response:
        book = shelf.find(name)
        if book is None:
            raise ServiceError(404, f"no codebook {quoted(name)}: this service has {shelf.names()}", "no_codebook")
        if len(request.query_params.multi_items()) > len(request.query_params):
            raise ServiceError(422, "an option stands twice in the address: give it once")
        work = partial(score_body, book, await whole_body(request), asked.keep, asked.method)
        return await unless_left(request, answered(name, work))

    async def answered(name: str, work: Callable[[], tuple[bytes, float]]) -> Response:
        try:
            with anyio.fail_after(state.limits.seconds):  # what is being scored is not cut off, but what waits is
                answer, seconds = await anyio.to_thread.run_sync(work, limiter=limiter)
        except TimeoutError:
            raise ServiceError(503, "not scored within the time limit: try again later", "timeout") from None
        state.metrics.score_seconds.labels(name).observe(seconds)
        return Response(answer, media_type=MEDIA_TYPE)

    return routes
