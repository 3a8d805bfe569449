"""Requests made into prompts: pictures read, the chat template applied, everything measured against the limits."""

from __future__ import annotations

import copy
import threading
from typing import Any

from jinja2 import TemplateError
from PIL import Image as Picture

from codebook.errors import CodebookError, one_line, quoted
from codebook.inference.prompts import check_question, encode_prompts, token_limit
from codebook.inference.samples import check_asked
from codebook.models.base import Processor
from codebook.models.chat import check_special
from codebook.serving.errors import ServiceError
from codebook.serving.model_thread import Job
from codebook.serving.pictures import read_pictures
from codebook.serving.request import ChatRequest, ImagePart, TextPart
from codebook.serving.state import ModelState

WHOLE = {
    "top_k": 0, "top_h": None, "min_p": None, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0,
}  # fmt: skip
"""Options of `generate` by which nothing is left out of what is drawn from, whatever the model's own defaults are."""


class Preparer:
    """The maker of jobs from requests, on any thread.

    Each thread has a copy of the processor: tokenizers must not be used by two threads at once.
    """

    def __init__(self, state: ModelState) -> None:
        self._state = state
        self._own = threading.local()

    @property
    def _processor(self) -> Processor:
        if not hasattr(self._own, "processor"):
            self._own.processor = copy.deepcopy(self._state.processor)
        return self._own.processor

    def prepare(self, asked: ChatRequest, deadline: float) -> tuple[Job, list[Picture.Image]]:
        """The job of a request that is to be answered by a time of `time.monotonic`, and its pictures.

        Raises
        ------
        ServiceError
            If the request names another model, is beyond a limit, or cannot be shown to the model.
        """
        state, limits, processor = self._state, self._state.limits, self._processor
        if asked.model not in (None, state.name):
            raise unknown_model(state)
        length = "max_tokens" if asked.max_completion_tokens is None else "max_completion_tokens"
        wanted = getattr(asked, length)
        if wanted is not None and wanted > limits.new_tokens:
            raise ServiceError(
                422, f"{length} is {wanted}, and an answer has at most {limits.new_tokens}", None, length
            )
        turns, texts, urls = _as_template_takes_them(asked)
        try:
            _check_texts(state, processor, asked, texts)
            pictures = read_pictures(urls, limits, state.allowed_hosts, deadline)
            text = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
            _check_shown(turns, text)
            prompts = encode_prompts(state.model, processor, [pictures], [text])
        except ServiceError:
            raise
        except CodebookError as error:
            raise ServiceError(422, str(error), None, "messages") from None
        except (TemplateError, ValueError) as error:
            raise ServiceError(
                422, f"the model's chat template does not take these messages: {one_line(error)}", None, "messages"
            ) from None
        room = token_limit(state.model, processor) - prompts.inputs["input_ids"].shape[1]
        if room < (wanted or 1):
            raise ServiceError(422, f"the prompt leaves room for {room} tokens: ask for fewer", None, length)
        options: dict[str, Any] = {}
        if asked.temperature:
            options = WHOLE | {"do_sample": True, "temperature": asked.temperature, "top_p": asked.top_p}
        return Job(prompts, wanted or min(limits.new_tokens, room), deadline, options, asked.seed), pictures


def unknown_model(state: ModelState) -> ServiceError:
    """The error of a request that names another model."""
    return ServiceError(404, f"there is no such model here: the model is {state.name!r}", "model_not_found", "model")


def _as_template_takes_them(asked: ChatRequest) -> tuple[list[dict[str, Any]], list[str], list[str]]:
    """The messages in the form of chat templates; and all their texts, and the URLs of their images, in order."""
    turns: list[dict[str, Any]] = []
    texts: list[str] = []
    urls: list[str] = []
    for turn in asked.messages:
        content: list[dict[str, str]] = []
        for part in turn.content:
            if isinstance(part, ImagePart):
                urls.append(part.image_url.url)
                content.append({"type": "image"})
            else:
                texts.append(part.text)
                content.append({"type": "text", "text": part.text})
        turns.append({"role": turn.role, "content": content})
    return turns, texts, urls


def _check_texts(state: ModelState, processor: Any, asked: ChatRequest, texts: list[str]) -> None:
    """Refuse a conversation that ends with nothing asked, or with texts that the model cannot be shown."""
    last = asked.messages[-1].content
    words = [part.text for part in last if isinstance(part, TextPart)]
    if words or not last:  # pictures alone are a request of their own: clients want a caption
        check_asked(" ".join(words))
    if any(text.strip() for text in texts):
        check_question(state.model, processor, " ".join(texts))
        # A template may cut off blanks and put parts side by side: no two of them may make a token together.
        check_special(processor, "".join(text.strip() for text in texts))


def _check_shown(turns: list[dict[str, Any]], text: str) -> None:
    """Refuse messages that the chat template leaves out of the prompt, or writes as lists of parts.

    Earlier answers are not looked for: some templates leave their reasoning out.
    """
    for turn in turns:
        hidden = [part["text"] for part in turn["content"] if part.get("text", "").strip() not in text]
        if turn["role"] != "assistant" and (hidden or (turn["content"] and str(turn["content"]) in text)):
            raise CodebookError(
                f"the model's chat template does not show the {turn['role']}'s message "
                f"{quoted(' '.join(part.get('text', '') for part in turn['content']))}: say it in a user's message"
            )
