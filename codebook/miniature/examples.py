"""Scenes with a question each, for people who have no picture that the miniature can read."""

from __future__ import annotations

import base64
import io
from itertools import islice

from codebook.miniature.tasks import tasks

CHOSEN = (("ocr", 6), ("attr", 2), ("rel", 7), ("count", 9), ("cap", 0), ("loc", 5))
"""Task family and number of each example, in the order in which they are shown."""
SEED = 7


def examples() -> tuple[dict[str, str], ...]:
    """Training scenes: for each a `question`, its right `answer`, and `image`, a PNG as a data URL."""
    found = []
    for family, number in CHOSEN:
        question = next(islice(tasks(family, "train", SEED, number + 1), number, None))
        buffer = io.BytesIO()
        question.images[0].save(buffer, "PNG")
        image = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        found.append({"question": question.question, "answer": question.answer, "image": image})
    return tuple(found)
