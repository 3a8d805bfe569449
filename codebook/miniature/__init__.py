"""A small vision-language model of our own, on which visual-token pruning can be measured anywhere.

A stock ``LlavaForConditionalGeneration``, trained from scratch on procedural scenes; see
``docs/miniature.md``. Importing this module does not import torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from codebook.miniature.scenes import scene
from codebook.miniature.tasks import FAMILIES, Question, score, tasks

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

FOLDER = Path(__file__).parent / "weights"

__all__ = ["FAMILIES", "FOLDER", "Question", "load", "prompt", "score", "tasks", "write_images"]


def load(device: str = "cpu") -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Load the shipped model (float32, evaluation mode) and its processor; no network is used."""
    from codebook.miniature import model

    return model.load(FOLDER, device)


def prompt(processor: LlavaProcessor, question: str, images: int = 1) -> str:
    """Wrap a question about that many images into the chat template."""
    from codebook.models.chat import chat_text

    return chat_text(processor, question, images)


def write_images(folder: str | Path, count: int, seed: int = 0) -> list[Path]:
    """Write `count` training scenes as PNG files, for building a codebook; return their paths."""
    from PIL import Image

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i:06d}.png" for i in range(count)]
    for i, path in enumerate(paths):
        Image.fromarray(scene("train", 2, seed, i).pixels).save(path)
    return paths
