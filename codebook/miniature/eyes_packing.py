"""Training batches for `eyes`: many questions behind one scene, album or film, made by processes of their own.

A row holds the prefix of the prompt once, its visual tokens included, and its questions after it. Each question sees
the prefix and itself only, and its positions continue right after the prefix, so every logit equals that of the stock
model asked this one question. A visual token that a row loses stays in its place and is seen by nobody, so that each
row can lose other ones at another rate; that equals its removal, for the others keep their positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from codebook.miniature.eyes import MANY_IMAGES, ONE_IMAGE, asked
from codebook.miniature.scenes import FILM_FRAMES, GRID, IMAGE_SIDE, Number, Scene, Thing, album, film, scene
from codebook.miniature.tasks import (
    CELLS,
    PLACES,
    SCENE_FAMILIES,
    TASK_FAMILIES,
    Question,
    make_question,
    scenes_shown,
    tasks,
)
from codebook.models.smollm2 import END_ID, IMAGE_TOKEN_ID

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VISUAL = GRID * GRID
LABELS = (*TASK_FAMILIES, "list", "each")
"""What a question's number stands for: its family, the list of all that a scene shows, or a question about one image
of several."""

MORE = ("exist", "count", "attr", "loc", "loc", "rel", "rel", "box", "ocr", "count")
"""Families about one scene that are asked about again, after one question of each, while there is room."""


@dataclass(frozen=True)
class RowLayout:
    """The form of a batch; it is the same for all batches of a kind, so that a GPU compiles it once.

    Attributes
    ----------
    draw : scene, album or film
    images : places for images in a row; those that a row does not need are hidden
    prefix : tokens before the first question
    text : tokens for questions
    places : where in a row each image begins
    """

    draw: Callable[..., Any]
    images: int
    prefix: int
    text: int
    places: tuple[int, ...]


class Packer:
    """Makes batches; it depends on its arguments alone, so a resumed run sees the same ones.

    Parameters
    ----------
    rows : scenes in a batch; albums and films are fewer, for about the same number of tokens
    text : tokens of a row for questions; a multiple of four less than one of eight
    alone : steps at the beginning that are about scenes only
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, seed: int, rows: int, text: int = 268, alone: int = 400
    ) -> None:
        self.tokenizer, self.seed, self.rows, self.alone = tokenizer, seed, rows, alone
        self.known: dict[str, list[int]] = {}
        self.heads = {count: [self._ids(word) for word in _heads(count)] for count in range(1, FILM_FRAMES[1] + 1)}
        self.layouts = {
            "scene": self._layout(scene, 1, text),
            "album": self._layout(album, 3, text),
            "film": self._layout(film, FILM_FRAMES[1], text),
        }

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _asked(self, question: str) -> list[int]:
        if question not in self.known:  # there are some thousand
            self.known[question] = self._ids(asked(question))
        return self.known[question]

    def _layout(self, draw: Callable[..., Any], images: int, text: int) -> RowLayout:
        places, at = [], 0
        for head in self.heads[images]:
            places.append(at + len(head))
            at = places[-1] + VISUAL
        return RowLayout(draw, images, at, text + -(at + text) % 8, tuple(places))

    def kind(self, step: int) -> str:
        """What a training step is about."""
        return "scene" if step < self.alone else ("scene", "film", "scene", "album", "scene")[step % 5]

    def batch(self, step: int, split: str = "train", kind: str | None = None) -> dict[str, Any]:
        """The batch of a step.

        Returns
        -------
        kind, and arrays of R rows with N places for images and L tokens: `pixels` uint8 (R * N, 96, 96, 3);
        int64 (R, L) `tokens`, `segment` (0 the prefix, then the questions, -1 nothing), `position`, `target`
        (-100 where nothing is learned), `family` (index into LABELS, -1 for none); `hidden` bool (R, L);
        `weight` float32 (R, L), of the target in the loss; `where` int64 (T,), the places that have a target,
        counted through all rows.
        """
        kind = kind or self.kind(step)
        layout = self.layouts[kind]
        rng = np.random.Generator(np.random.PCG64([self.seed, step, 9, split == "test"]))
        whole = layout.prefix + layout.text
        count = max(1, round(self.rows * (self.layouts["scene"].prefix + self.layouts["scene"].text) / whole))
        rows = [self._row(layout, split, step, i, rng) for i in range(count)]
        made = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        made["pixels"] = made["pixels"].reshape(-1, IMAGE_SIDE, IMAGE_SIDE, 3)
        return {"kind": kind, **made, "where": np.flatnonzero(made["target"] >= 0)}

    def _row(self, layout: RowLayout, split: str, step: int, i: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        # The leading 0 keeps these streams apart from those of `tasks`, which lead with 1.
        shown = layout.draw(split, 0, self.seed + 100, step, i)
        scenes = scenes_shown(shown)
        size = layout.prefix + layout.text
        row = {
            "pixels": np.zeros((layout.images, IMAGE_SIDE, IMAGE_SIDE, 3), np.uint8),
            "tokens": np.full(size, END_ID),
            "segment": np.full(size, -1),
            "position": np.zeros(size, np.int64),
            "target": np.full(size, -100),
            "family": np.full(size, -1),
            "hidden": np.zeros(size, bool),
            "weight": np.zeros(size, np.float32),
        }
        end = 0
        lost = self._loss(rng) if split == "train" else 0
        for j, (picture, head) in enumerate(zip(scenes, self.heads[len(scenes)], strict=True)):
            row["pixels"][j] = picture.pixels
            begin = end + len(head)
            end = begin + VISUAL
            assert begin == layout.places[j]  # "Image one:" is as long as "Image two:"
            row["tokens"][begin - len(head) : begin] = head
            row["tokens"][begin:end] = IMAGE_TOKEN_ID
            row["hidden"][begin + rng.permutation(VISUAL)[:lost]] = True
        row["segment"][:end] = 0
        row["position"][:end] = np.arange(end)
        row["tokens"][end : layout.prefix] = IMAGE_TOKEN_ID  # places without an image
        place, number, seen = layout.prefix, 0, set()
        for label, question, answer in self._questions(shown, rng):
            if question in seen:
                continue
            asks, says = self._asked(question), [*self._ids(f" {answer}"), END_ID]
            stop = place + len(asks) + len(says) - 1
            if stop > size:
                continue
            seen.add(question)
            number += 1
            spot, reply = slice(place, stop), slice(place + len(asks) - 1, stop)
            row["tokens"][spot] = [*asks, *says[:-1]]
            row["segment"][spot] = number
            row["position"][spot] = np.arange(end, end + stop - place)
            row["target"][reply] = says
            row["family"][spot] = LABELS.index(label)
            # Between "every token counts the same" and "every question does".
            row["weight"][reply] = len(says) ** -0.5
            place = stop
        return row

    @staticmethod
    def _loss(rng: np.random.Generator) -> int:
        """How many visual tokens each image of a row loses: none in two rows of five, else any number up to 95%."""
        return 0 if rng.random() < 0.4 else int(rng.integers(1, int(0.95 * VISUAL)))

    def _questions(self, shown: Any, rng: np.random.Generator) -> Iterator[tuple[str, str, str]]:
        """Label, question and answer; more than fit in a row, and some more than once."""
        if isinstance(shown, Scene):
            yield "list", "list everything with its place.", _all_listed(shown)
            order = [SCENE_FAMILIES[i] for i in rng.permutation(len(SCENE_FAMILIES))]
            for family in order + [MORE[i] for i in rng.permutation(len(MORE))]:
                parts = make_question(shown, family, rng)
                if parts:
                    yield family, parts[0], parts[1]
            return
        scenes = scenes_shown(shown)
        own = "multi" if isinstance(shown, tuple) else "video"
        for i in range(24):
            if i % 3 < 2:
                parts = make_question(shown, own, rng)
                if parts:
                    yield own, parts[0], parts[1]
                continue
            j = int(rng.integers(len(scenes)))
            if i == 2:
                yield "each", f"list everything with its place in image {PLACES[j]}.", _all_listed(scenes[j])
                continue
            family = ("exist", "attr", "loc", "count", "loc", "ocr")[int(rng.integers(6))]
            parts = make_question(scenes[j], family, rng)
            if parts:
                yield "each", f"in image {PLACES[j]}, {parts[0]}", parts[1]


def held_out(family: str, count: int) -> list[Question]:
    """Questions of a family for the final measurement, as `codebook miniature evaluate` asks them."""
    return list(tasks(family, "test", 0, count))


def _heads(count: int) -> list[str]:
    """The words before each image."""
    if count == 1:
        return [ONE_IMAGE]
    return [" " * (i > 0) + MANY_IMAGES.format(place) for i, place in enumerate(PLACES[:count])]


def _all_listed(picture: Scene) -> str:
    """All that a scene shows, in reading order, each with the cell of its centre."""
    cell = IMAGE_SIDE // CELLS
    found = []
    items: list[Thing | Number] = [*picture.things, *picture.numbers]
    for item in items:
        left, top, right, bottom = item.box
        x, y = (left + right) // 2 // cell, (top + bottom) // 2 // cell
        name = f"{item.color} {item.shape}" if isinstance(item, Thing) else f"number {' '.join(item.digits)}"
        found.append((y, x, f"{name} {'abcd'[y]}{x + 1}"))
    return ", ".join(name for _, _, name in sorted(found))
