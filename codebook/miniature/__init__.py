"""A small vision-language model of our own, on which visual-token pruning can be measured anywhere.

A stock `LlavaForConditionalGeneration`, trained from scratch on procedural scenes; see `docs/miniature.md`.
`codebook.load("miniature")` loads it. Importing this module does not import torch.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from codebook.miniature.scenes import scene
from codebook.miniature.tasks import TASK_FAMILIES, Question, score, tasks

if TYPE_CHECKING:
    from transformers import LlavaProcessor

__all__ = ["TASK_FAMILIES", "Question", "prompt", "score", "tasks", "write_images"]


def prompt(processor: LlavaProcessor, question: str, images: int = 1) -> str:
    """The prompt of a question about so many images: the model's own chat template, with both put in."""
    from codebook.models.chat import chat_text

    return chat_text(processor, question, images)


def write_images(folder: str | Path, count: int, seed: int = 0) -> list[Path]:
    """Write `count` training scenes as PNG files, for building a codebook; return their paths."""
    from PIL import Image

    from codebook.store.files import remove_stale, write_files
    from codebook.store.locks import WRITER_PATIENCE, writing

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    remove_stale(folder)
    paths = [folder / f"{i:06d}.png" for i in range(count)]
    with writing(folder, WRITER_PATIENCE):
        for i, path in enumerate(paths):
            png = io.BytesIO()
            Image.fromarray(scene("train", 2, seed, i).pixels).save(png, "PNG")
            write_files(folder, {path.name: png.getvalue()})
    return paths
