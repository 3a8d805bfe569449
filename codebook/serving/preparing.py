"""Requests made into prompts: pictures read, the chat template applied, everything measured against the limits."""

from __future__ import annotations

import base64
import binascii
import copy
import threading
import time
from typing import Any

from jinja2 import TemplateError
from PIL import Image as Picture

from codebook.errors import CodebookError
from codebook.inference.prompts import encode_prompts, token_limit
from codebook.models.chat import check_text
from codebook.serving.errors import ServiceError
from codebook.serving.model_thread import Job
from codebook.serving.request import ChatRequest, ImagePart
from codebook.serving.state import ModelState
from codebook.store.files import one_line
from codebook.store.pictures import decode_image


class Preparer:
    """Makes jobs of requests, on any thread.

    Each thread has a copy of the processor: tokenizers must not be used by two threads at once.
    """

    def __init__(self, state: ModelState) -> None:
        self._state = state
        self._own = threading.local()

    @property
    def _processor(self) -> Any:
        if not hasattr(self._own, "processor"):
            self._own.processor = copy.deepcopy(self._state.processor)
        return self._own.processor

    def prepare(self, asked: ChatRequest) -> Job:
        """The job of a request.

        Raises
        ------
        ServiceError
            If the request names another model, or is beyond a limit.
        CodebookError
            If its pictures or texts cannot be shown to the model.
        """
        state, limits, processor = self._state, self._state.limits, self._processor
        deadline = time.monotonic() + limits.seconds
        if asked.model not in (None, state.name):
            raise ServiceError(
                404, f"there is no such model here: the model is {state.name!r}", "model_not_found", "model"
            )
        wanted = asked.max_completion_tokens or asked.max_tokens
        if wanted is not None and wanted > limits.new_tokens:
            raise ServiceError(
                422, f"max_tokens is {wanted}, and an answer has at most {limits.new_tokens}", None, "max_tokens"
            )
        turns, pictures = self._turns(asked)
        try:
            text = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
            prompts = encode_prompts(state.model, processor, [pictures], [text])
        except (TemplateError, ValueError) as error:
            raise ServiceError(
                422, f"the model's chat template cannot show these messages: {one_line(error)}", None, "messages"
            ) from None
        room = token_limit(state.model, processor) - prompts.inputs["input_ids"].shape[1]
        if room < 1 or (wanted is not None and wanted > room):
            raise ServiceError(422, f"the prompt leaves room for {room} tokens: ask for fewer", None, "max_tokens")
        options: dict[str, Any] = {}
        if asked.temperature > 0:
            options = {"do_sample": True, "temperature": asked.temperature}
            if asked.top_p is not None:
                options["top_p"] = asked.top_p
        return Job(prompts, wanted or min(limits.new_tokens, room), deadline, options, asked.seed)

    def _turns(self, asked: ChatRequest) -> tuple[list[dict[str, Any]], list[Picture.Image]]:
        """The messages as a chat template takes them, and their pictures in order."""
        turns: list[dict[str, Any]] = []
        pictures: list[Picture.Image] = []
        pixels = 0
        for turn in asked.messages:
            content: list[dict[str, str]] = []
            for part in turn.parts:
                if isinstance(part, ImagePart):
                    if len(pictures) == self._state.limits.images:
                        raise ServiceError(
                            422, f"more than {self._state.limits.images} images: send fewer", None, "messages"
                        )
                    pictures.append(self._picture(part.image_url.url))
                    pixels += pictures[-1].width * pictures[-1].height
                    if pixels > self._state.limits.pixels:
                        raise ServiceError(
                            422, f"more than {self._state.limits.pixels:,} pixels: scale the images down", None,
                            "messages",
                        )  # fmt: skip
                    content.append({"type": "image"})
                else:
                    check_text(self._processor, part.text, "text")
                    content.append({"type": "text", "text": part.text})
            turns.append({"role": turn.role, "content": content})
        return turns, pictures

    def _picture(self, url: str) -> Picture.Image:
        head, comma, data = url.partition(",")
        if not (head.startswith("data:") and head.endswith(";base64") and comma):
            raise ServiceError(
                422, "an image must come as a data URL, `data:image/png;base64,...`", "image_url", "messages"
            )
        try:
            return decode_image(base64.b64decode(data, validate=True))
        except (binascii.Error, ValueError) as error:
            raise CodebookError(f"cannot read an image: {one_line(error)}") from None
