"""The chat prompt of a model: the one place where a question about images becomes the text of a prompt.

In the room of the models because building and inference both make prompts, and neither imports the other.
"""

from __future__ import annotations

from codebook.errors import CodebookError
from codebook.models.base import Processor


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
        If the processor has no chat template.
    """
    if getattr(processor, "chat_template", None) is None:
        raise CodebookError("the processor has no chat template: set processor.chat_template to the model's own")
    shown = [{"type": "image"}] * images
    turns = [{"role": "user", "content": [*shown, {"type": "text", "text": question}]}]
    if answer is not None:
        turns.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return str(processor.apply_chat_template(turns, add_generation_prompt=answer is None, tokenize=False))
