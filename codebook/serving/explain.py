"""`POST /v1/explain`: an answer, which patches of its picture were kept, and what those that were dropped are like."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse
from PIL import Image as Picture
from pydantic import Field
from torch import Tensor
from transformers import StoppingCriteriaList

from codebook import models
from codebook.analysis.explain import explain_tokens
from codebook.errors import CodebookError
from codebook.inference.ask import generate
from codebook.inference.overlay import SIZE, overlay, shown_part
from codebook.models import Image
from codebook.models.base import Model
from codebook.pruning import Schedule
from codebook.pruning.kept_map import kept_map
from codebook.pruning.ownership import codebooks_of
from codebook.serving.errors import ServiceError, too_late
from codebook.serving.limits import unless_left, whole_body
from codebook.serving.model_thread import Errand, Job, Rows
from codebook.serving.preparing import Preparer
from codebook.serving.request import MOST_PARTS, ChatRequest, ImagePart, Strict, Turn, parse_request, without_query
from codebook.serving.state import ModelState
from codebook.serving.threads import Threads
from codebook.store.codebook import Codebook
from codebook.store.folder import PROTOTYPES

LONGEST_OVERLAY = 1024
"""Pixels of the longer side of a picture that is drawn on; larger ones are scaled down."""
LARGEST_OVERLAY = 2**24
"""Pixels of a drawing: small pictures are enlarged for it, and long ones would grow without end."""


class ExplainRequest(Strict):
    """The body of `POST /v1/explain`: messages as of a chat completion, with one image in them."""

    messages: list[Turn] = Field(min_length=1, max_length=MOST_PARTS)
    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    method: str | None = Field(None, pattern=r"^[a-z][a-z0-9-]{0,63}$")
    keep: int | float | None = None
    patches: int = Field(16, ge=0, le=100)
    neighbours: int = Field(3, ge=1, le=10)


@dataclass(frozen=True)
class Explained:
    """An answer, and what was dropped for it.

    Attributes
    ----------
    tokens
        (n,) int64: the tokens of the answer.
    image
        Where the picture's visual tokens are, and how they are laid out.
    stages
        For each stage of the schedule the visual tokens (int64) that it left, by their places among the image's.
    dropped
        The dropped patches that are most like a prototype, the most redundant first; None without a codebook.
    """

    tokens: Tensor
    image: Image
    stages: list[Tensor]
    dropped: list[dict[str, Any]] | None

    @property
    def kept(self) -> list[int]:
        """The visual tokens that were kept to the end."""
        return self.stages[-1].tolist() if self.stages else list(range(self.image.count))


def explain_job(
    model: Model, job: Job, schedule: Schedule, book: Codebook | None, patches: int, neighbours: int
) -> Explained:
    """Answer a prompt with one picture, greedily, and explain what the schedule dropped of it.

    Parameters
    ----------
    book
        Prototypes with which dropped patches are compared; None: with none.
    patches
        Most patches that are compared.
    neighbours
        Prototypes that are named for each.

    Raises
    ------
    ServiceError
        If the job's time is over.
    """
    if time.monotonic() > job.deadline:
        raise too_late()
    with _entering(model) as entered:
        generated = generate(
            model, job.prompts, schedule, max_new_tokens=job.new_tokens, do_sample=False,
            stopping_criteria=StoppingCriteriaList([Rows([job], job.length)]),
        )  # fmt: skip
    if time.monotonic() > job.deadline:
        raise too_late()
    [[(image, stages)]] = generated.shown
    found = Explained(generated.tokens[0].cpu(), image, [kept.cpu() for kept in stages], None)
    if book is None:
        return found
    features = entered[0][0, list(image.columns)].cpu()
    return Explained(found.tokens, image, found.stages, _dropped(found, features, book, patches, neighbours))


def _dropped(found: Explained, features: Tensor, book: Codebook, patches: int, neighbours: int) -> list[dict[str, Any]]:
    """Each grid's most redundant patches that were not kept, those of all grids in one order."""
    kept, first = set(found.kept), 0
    out: list[dict[str, Any]] = []
    for number, grid in enumerate(found.image.layout.grids):
        own = features[grid.index]
        gone = [token for token in range(grid.count) if first + token not in kept]
        redundancy = book.redundancy(own[:, : book.dimension])[gone]
        worst = [gone[i] for i in redundancy.topk(min(patches, len(gone))).indices.tolist()]
        for one in explain_tokens(book, own, (grid.rows, grid.cols), worst, neighbours):
            out.append({
                "grid": number, "row": one.patch[0], "col": one.patch[1], "similarity": one.similarity,
                "rank": one.rank, "neighbours": one.neighbours,
            })  # fmt: skip
        first += grid.count
    return sorted(out, key=lambda patch: -patch["similarity"])[:patches]


@contextlib.contextmanager
def _entering(model: Model) -> Iterator[list[Tensor]]:
    """A context that notes what enters the decoder's first layer (B, L, d) first: that of the prompt."""
    seen: list[Tensor] = []

    def note(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if not seen:
            seen.append(models.family(model).entering(model, kwargs["inputs_embeds"], kwargs))

    hook = model.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()


def report(
    state: ModelState, found: Explained, schedule: Schedule, book: Codebook | None, text: str,
    box: tuple[float, float, float, float],
) -> dict[str, Any]:  # fmt: skip
    """The answer as JSON."""
    return {
        "object": "explanation",
        "model": state.name,
        "schedule": str(schedule),
        "answer": text,
        **kept_map(found.image, schedule, found.stages, box),
        "codebook": None if book is None else {
            "model": book.config["model"],
            "prototypes": len(book),
            "sha256": book.config.get("sha256", {}).get(PROTOTYPES),
        },
        "dropped": found.dropped,
    }  # fmt: skip


def drawing(picture: Picture.Image, found: Explained) -> bytes:
    """PNG of the picture beside itself, with what was dropped of its whole view darkened."""
    picture = picture.copy()
    picture.thumbnail((LONGEST_OVERLAY, LONGEST_OVERLAY))
    shorter, longer = sorted(picture.size)
    if 2 * longer * shorter * max(1, -(-SIZE // shorter)) ** 2 > LARGEST_OVERLAY:
        raise ServiceError(422, "the picture is too long to be drawn: cut it, or ask for JSON", "too_large", "messages")
    file = io.BytesIO()
    overlay(picture, *found.image.view(found.kept)).save(file, "PNG")
    return file.getvalue()


def chosen_schedule(state: ModelState, method: str | None, keep: int | float | None) -> Schedule:
    """The service's schedule, or that of another method or budget, with the same codebook.

    Raises
    ------
    CodebookError
        If there is no such method, or it cannot meet the budget.
    """
    own = state.schedule
    if method is None and keep is None:
        return own
    size = models.shape(state.model)
    if keep is None and not own.varies:
        keep = own.budget(size.tokens, size.layers)
    book = _codebook(own) or state.codebook
    return Schedule.for_model(state.model, method or str(own), keep, book, seed=state.seed)


def _codebook(schedule: Schedule) -> Codebook | None:
    return next((book for stage in schedule.stages for book in codebooks_of(stage.pruner)), None)


def router(state: ModelState) -> APIRouter:
    """Explanations, as JSON or as a picture."""
    routes, preparer = APIRouter(dependencies=[Depends(without_query)]), Preparer(state)
    threads = Threads(1, "codebook-explain")

    def prepare(body: bytes, deadline: float) -> tuple[ExplainRequest, Job, Schedule, Picture.Image]:
        asked = parse_request(body, ExplainRequest)
        parts = [part for turn in asked.messages for part in turn.content if isinstance(part, ImagePart)]
        if len(parts) != 1:
            raise ServiceError(422, f"{len(parts)} images: an explanation is of one", None, "messages")
        shared = {"messages": asked.messages, "model": asked.model, "max_tokens": asked.max_tokens}
        chat = ChatRequest.model_validate(shared)
        job, [picture] = preparer.prepare(chat, deadline)
        try:
            schedule = chosen_schedule(state, asked.method, asked.keep)
        except CodebookError as error:
            raise ServiceError(422, str(error), None, "keep" if asked.method is None else "method") from None
        return asked, job, schedule, picture

    @routes.post("/v1/explain")
    async def explain_answer(request: Request) -> Response:
        wants_picture = "image/png" in request.headers.get("accept", "")
        return await unless_left(request, answered(await whole_body(request), wants_picture))

    async def answered(body: bytes, wants_picture: bool) -> Response:
        reading = threads.run(prepare, body, time.monotonic() + state.limits.seconds)
        del body  # of megabytes, while the answer is waited for
        asked, job, schedule, picture = await reading
        book = _codebook(schedule)
        explain = partial(explain_job, state.model, job, schedule, book, asked.patches, asked.neighbours)
        found = await state.model_thread.result_of(Errand(explain, job.left))
        box = models.family(state.model).shown_box(state.processor, picture.size)
        if wants_picture:
            return Response(await threads.run(drawing, shown_part(picture, box), found), media_type="image/png")
        text = state.processor.decode(found.tokens, skip_special_tokens=True).strip()
        return JSONResponse(report(state, found, schedule, book, text, box))

    return routes
