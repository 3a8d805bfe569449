"""What a chat completion is asked with: the fields of OpenAI's API that are understood, and no others."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from fastapi import Request
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from codebook.errors import quoted
from codebook.serving.errors import ServiceError, first_fault

MOST_PARTS = 256
"""Messages of a conversation, and parts of a message."""
COLDEST = 0.01
"""Lowest temperature that is not 0: below it sampling divides by next to nothing."""


class Strict(BaseModel):
    """A part of a request: no field is ignored, no type is converted, no number is NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        """Null means that the field is not given: clients send it of what they do not use."""
        return {k: v for k, v in given.items() if v is not None} if isinstance(given, dict) else given


def _off(value: bool) -> bool:
    if value:
        raise ValueError("not offered here: leave it out, or give false")
    return value


K = TypeVar("K", bound=Strict)
Off = Annotated[bool, AfterValidator(_off)]
"""False and nothing else: a literal would take 0 for it, as it would take true for 1."""


NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (False, True),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
    "stop": ([],),
    "logit_bias": ({},),
    "metadata": ({},),
}
"""Fields that are not understood, and those of their values that change no answer here: clients send them."""


class TextPart(Strict):
    """Text of a message."""

    type: Literal["text"]
    text: str


class ImageUrl(Strict):
    """Where an image is: a data URL, or an address."""

    url: str
    detail: Literal["auto"] = "auto"


class ImagePart(Strict):
    """An image of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Turn(Strict):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: Annotated[
        list[Part],
        Field(max_length=MOST_PARTS),
        BeforeValidator(lambda given: [{"type": "text", "text": given}] if isinstance(given, str) else given),
    ]


class StreamOptions(Strict):
    """What a stream has beside the words of its answer."""

    include_usage: bool = False
    include_obfuscation: Off = False


class ChatRequest(Strict):
    """The body of `POST /v1/chat/completions`."""

    messages: list[Turn] = Field(min_length=1, max_length=MOST_PARTS)
    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    user: str | None = None
    # Fields that clients send at their neutral values; others would be ignored, and are refused. More are in `NEUTRAL`.
    n: int = Field(1, ge=1, le=1)
    frequency_penalty: float = Field(0.0, ge=0, le=0)
    presence_penalty: float = Field(0.0, ge=0, le=0)
    logprobs: Off = False
    store: Off = False

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, given: Any) -> Any:
        return {k: v for k, v in given.items() if not _is_neutral(k, v)} if isinstance(given, dict) else given

    @field_validator("max_completion_tokens")
    @classmethod
    def _one_length(cls, value: int, others: ValidationInfo) -> int:
        if others.data.get("max_tokens") not in (None, value):
            raise ValueError("another name of max_tokens, which is given with another value: leave one out")
        return value

    @field_validator("temperature")
    @classmethod
    def _not_too_cold(cls, value: float) -> float:
        if 0 < value < COLDEST:
            raise ValueError(f"must be 0, which is greedy, or at least {COLDEST}")
        return value

    @field_validator("top_p")
    @classmethod
    def _of_samples(cls, value: float, others: ValidationInfo) -> float:
        if value < 1 and others.data.get("temperature") is None:
            raise ValueError("answers without a temperature are greedy: give one too")
        return value

    @field_validator("stream_options")
    @classmethod
    def _of_streams(cls, value: StreamOptions, others: ValidationInfo) -> StreamOptions:
        if not others.data.get("stream"):
            raise ValueError("only for streams: leave it out, or ask for one")
        return value


def _is_neutral(name: str, value: Any) -> bool:
    return any(type(value) is type(one) and value == one for one in NEUTRAL.get(name, ()))  # 1 is not true


def parse_request(body: bytes, kind: type[K]) -> K:
    """A request of some kind from its JSON.

    Raises
    ------
    ServiceError
        400 if it is no JSON; 422 naming the field that is not understood, or is given twice.
    """
    try:
        asked = kind.model_validate_json(body)
        json.loads(body, object_pairs_hook=_each_once)
        return asked
    except ValidationError as error:
        faults = error.errors(include_url=False, include_input=False, include_context=False)
        if faults[0]["type"] == "json_invalid":
            raise ServiceError(400, f"the body is no JSON: {faults[0]['msg']}") from None
        message, code, param = first_fault(faults)
        raise ServiceError(422, message, code, param) from None


def _each_once(pairs: Sequence[tuple[str, Any]]) -> None:
    """Refuse an object that says one thing twice: which one holds is not the same to every reader."""
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ServiceError(422, f"{quoted(twice)} is given twice: give it once", None, twice[:200])


async def without_query(request: Request) -> None:
    """Refuse what stands after a question mark in an address that has no options: it would be ignored."""
    for name in request.query_params:
        raise ServiceError(422, f"{quoted(name)} stands in the address, which has no options: leave it out, or see "
                           "which fields of the body there are", None, name[:200])  # fmt: skip
