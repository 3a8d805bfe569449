"""What a chat completion is asked with: the fields of OpenAI's API that are understood, and no others."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from fastapi import Request
from pydantic import (
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
from codebook.store.parsing import RepeatedKeyError, each_once

MOST_PARTS = 256
"""Messages of a conversation, and parts of a message."""
COLDEST = 0.01
"""Lowest temperature that is not 0: below it sampling divides by next to nothing."""


@dataclass(frozen=True)
class Anything:
    """In the place of a neutral value: any of a type."""

    kind: type


class Strict(BaseModel):
    """A part of a request: no field is ignored, no type is converted, no number is NaN.

    Attributes
    ----------
    neutral
        Fields that are not understood, and those of their values that change no answer here: clients send them. Values
        are compared with their types: 1 is not true.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, given: Any) -> Any:
        """Null, too, means that a field is not given: clients send it of what they do not use."""
        if not isinstance(given, dict):
            return given
        return {k: v for k, v in given.items() if not any(_exactly(v, one) for one in (None, *cls.neutral.get(k, ())))}


def _exactly(value: Any, one: Any) -> bool:
    return isinstance(value, one.kind) if isinstance(one, Anything) else type(value) is type(one) and value == one


K = TypeVar("K", bound=Strict)


class PromptPart(Strict):
    """A part of a message, which may end what a client wants to be kept of a prompt for another: nothing is here."""

    neutral: ClassVar = {"prompt_cache_breakpoint": (Anything(dict),)}


class TextPart(PromptPart):
    """Text of a message."""

    type: Literal["text"]
    text: str


class ImageUrl(Strict):
    """Where an image is: a data URL, or an address."""

    neutral: ClassVar = {"detail": ("auto", "high")}  # all that the model can be shown of it
    url: str


class ImagePart(PromptPart):
    """An image of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Turn(Strict):
    """One message of a conversation."""

    neutral: ClassVar = {"tool_calls": ([],), "annotations": ([],)}
    role: Annotated[
        Literal["system", "user", "assistant"],
        BeforeValidator(lambda given: "system" if given == "developer" else given),  # what OpenAI calls it by now
    ]
    content: Annotated[
        list[Part],
        Field(max_length=MOST_PARTS),
        BeforeValidator(lambda given: [{"type": "text", "text": given}] if isinstance(given, str) else given),
    ]


class StreamOptions(Strict):
    """What a stream has beside the words of its answer."""

    neutral: ClassVar = {"include_obfuscation": (False,)}
    include_usage: bool = False


class ChatRequest(Strict):
    """The body of `POST /v1/chat/completions`."""

    neutral: ClassVar = {
        "n": (1,),
        "frequency_penalty": (0, 0.0),
        "presence_penalty": (0, 0.0),
        "logprobs": (False,),
        "top_logprobs": (0,),
        "store": (False,),
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "parallel_tool_calls": (False, True),
        "reasoning_effort": ("none",),
        "verbosity": ("medium",),
        "response_format": ({"type": "text"},),
        "modalities": (["text"],),
        "service_tier": ("auto", "default"),
        "stop": ([],),
        "logit_bias": ({},),
        # Who asks, what for, and how long a prompt may be kept for another one: no answer depends on it.
        "metadata": (Anything(dict),),
        "user": (Anything(str),),
        "safety_identifier": (Anything(str),),
        "prompt_cache_key": (Anything(str),),
        "prompt_cache_options": (Anything(dict),),
        "prompt_cache_retention": (Anything(str),),
    }
    messages: list[Turn] = Field(min_length=1, max_length=MOST_PARTS)
    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

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


def parse_request(body: bytes, kind: type[K]) -> K:
    """A request of some kind from its JSON.

    Raises
    ------
    ServiceError
        400 if it is no JSON; 422 naming the field that is not understood, or is given twice.
    """
    try:
        asked = kind.model_validate_json(body)
        json.loads(body, object_pairs_hook=each_once)
        return asked
    except RepeatedKeyError as error:
        raise ServiceError(422, str(error), None, error.key[:200]) from None
    except ValidationError as error:
        faults = error.errors(include_url=False, include_input=False, include_context=False)
        if faults[0]["type"] == "json_invalid":
            raise ServiceError(400, f"the body is no JSON: {faults[0]['msg']}") from None
        message, code, param = first_fault(faults)
        raise ServiceError(422, message, code, param) from None


async def without_query(request: Request) -> None:
    """Refuse what stands after a question mark in an address that has no options: it would be ignored."""
    for name in request.query_params:
        raise ServiceError(422, f"{quoted(name)} stands in the address, which has no options: leave it out, or see "
                           "which fields of the body there are", None, name[:200])  # fmt: skip
