"""The chat prompt of a model: the one place where a question about images becomes the text of a prompt.

In the room of the models because building and inference both make prompts, and neither imports the other.
"""

from __future__ import annotations

from typing import Any

from codebook.errors import CodebookError, quoted
from codebook.models.base import Processor, special_tokens
from codebook.models.layout import KINDS
from codebook.models.loading import EXAMPLES, SHIPPED_MODELS


def chat_text(processor: Processor, question: str, images: int = 1, answer: str | None = None) -> str:
    """The prompt of one question, its images before it, in the model's own chat template.

    Parameters
    ----------
    images
        How many images the question is about.
    answer
        None: the prompt ends where the model's answer begins. Otherwise the conversation with this answer in it.

    Raises
    ------
    CodebookError
        If the processor has no chat template, or a text holds a special token or words that the tokenizer lacks.
    """
    if getattr(processor, "chat_template", None) is None:
        raise CodebookError("the processor has no chat template: set processor.chat_template to the model's own")
    check_text(processor, question)
    turns = [_turn("user", question, images)]
    if answer is not None:
        check_text(processor, answer, "answer")
        turns.append(_turn("assistant", answer))
    return str(processor.apply_chat_template(turns, add_generation_prompt=answer is None, tokenize=False))


def next_turn(processor: Processor, question: str, images: int, following: str) -> list[int]:
    """The tokens that the chat template writes between an answer and the next one: its end, and a further question.

    Parameters
    ----------
    question, images
        The conversation's first question, and how many images it is about.
    following
        The further question.

    Raises
    ------
    CodebookError
        If the template does not show the conversation so far.
    """
    check_text(processor, following)
    said, tokenizer = "yes", processor.tokenizer  # it stands for any answer
    turns = [_turn("user", question, images), _turn("assistant", said), _turn("user", following)]
    answered = str(processor.apply_chat_template(turns[:2], add_generation_prompt=False, tokenize=False))
    whole = str(processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))
    end = answered.rfind(said) + len(said)
    if said not in answered or whole[:end] != answered[:end]:
        raise CodebookError("the chat template does not show earlier answers: ask each question alone")
    options = special_tokens(processor, whole)
    before, tokens = (tokenizer(text, **options)["input_ids"] for text in (whole[:end], whole))
    if tokens[: len(before)] == before:
        return list(tokens[len(before) :])
    return list(tokenizer(whole[end:], add_special_tokens=False)["input_ids"])


def _turn(role: str, text: str, images: int = 0) -> dict[str, Any]:
    """One message in the form of chat templates, its images before its text."""
    return {"role": role, "content": [*[{"type": "image"}] * images, {"type": "text", "text": text}]}


def check_text(processor: Processor, text: str, name: str = "question") -> None:
    """Refuse a text with special tokens in it: it would become those tokens, such as an image, or the end of the turn.

    Raises
    ------
    CodebookError
        Naming the token, or words that the tokenizer lacks.
    """
    check_special(processor, text, name)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CodebookError(f"the {name} holds {text[error.start]!r}, which is no character: remove it") from None
    check_words(processor, text, name)


def check_special(processor: Processor, text: str, name: str = "question") -> None:
    """Refuse a text with special tokens in it, whatever else stands there.

    Raises
    ------
    CodebookError
        Naming the token.
    """
    tokenizer = processor.tokenizer
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    special |= {*tokenizer.all_special_tokens, *(f"<{kind}>" for kind in KINDS)}
    # What a processor replaces need not be special to its tokenizer.
    special |= {str(token) for name, token in vars(processor).items() if name.endswith(("_token", "_tag")) and token}
    if found := [token for token in special if token in text]:
        first = min(found, key=lambda token: (text.index(token), -len(token)))
        raise CodebookError(f"the {name} holds {first!r}, a special token of the model: leave it out of the text")


def check_words(processor: Processor, text: str, name: str = "question") -> None:
    """Refuse a text with words that the tokenizer has no token for: the model would answer another question.

    Raises
    ------
    CodebookError
        Naming the words.
    """
    tokenizer = processor.tokenizer
    if tokenizer.unk_token_id is None:
        return
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast)
    if tokenizer.unk_token_id not in encoded["input_ids"]:
        return
    places = encoded.get("offset_mapping", [(0, len(text))] * len(encoded["input_ids"]))
    pieces = zip(encoded["input_ids"], places, strict=True)
    words = dict.fromkeys(text[start:end] for token, (start, end) in pieces if token == tokenizer.unk_token_id)
    shown = ", ".join(map(quoted, list(words)[:5])) + (f" and {len(words) - 5} more" if len(words) > 5 else "")
    shipped = next((name for name, folder in SHIPPED_MODELS.items() if str(folder) == tokenizer.name_or_path), None)
    remedy = f"ask it as in {EXAMPLES[shipped]}" if shipped else "use words that it knows"
    raise CodebookError(f"the model does not know {shown} in the {name}: {remedy}")
