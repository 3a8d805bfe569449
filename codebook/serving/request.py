"""What a chat completion is asked with: the fields of OpenAI's API that are understood, and no others."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

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


K = TypeVar("K", bound=Strict)


class TextPart(Strict):
    type: Literal["text"]
    text: str


class ImageUrl(Strict):
    url: str
    detail: Literal["auto", "low", "high"] = "auto"


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Turn(Strict):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str | Annotated[list[Part], Field(max_length=MOST_PARTS)]
    name: str | None = None

    @property
    def parts(self) -> list[TextPart | ImagePart]:
        return [TextPart(type="text", text=self.content)] if isinstance(self.content, str) else list(self.content)


class StreamOptions(Strict):
    include_usage: bool = True
    include_obfuscation: Literal[False] = False


class ChatRequest(Strict):
    """The body of `POST /v1/chat/completions`."""

    messages: list[Turn] = Field(min_length=1, max_length=MOST_PARTS)
    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(0.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    # Fields that clients send at their neutral values; others would be ignored, and are refused.
    n: Literal[1] = 1
    frequency_penalty: float = Field(0.0, ge=0, le=0)
    presence_penalty: float = Field(0.0, ge=0, le=0)
    logprobs: Literal[False] = False
    store: Literal[False] = False

    @field_validator("temperature")
    @classmethod
    def _not_too_cold(cls, value: float) -> float:
        if 0 < value < COLDEST:
            raise ValueError(f"must be 0, which is greedy, or at least {COLDEST}")
        return value


def parse_request(body: bytes, kind: type[K]) -> K:
    """A request of some kind from its JSON.

    Raises
    ------
    ServiceError
        400 if it is no JSON; 422 naming the field that is not understood.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_input=False, include_context=False)
        if faults[0]["type"] == "json_invalid":
            raise ServiceError(400, f"the body is no JSON: {faults[0]['msg']}") from None
        message, code, param = first_fault(faults)
        raise ServiceError(422, message, code, param) from None
