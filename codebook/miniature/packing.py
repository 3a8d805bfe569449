"""Training batches: many questions behind one scene, album or film, and the forward pass that shares its prefix.

A row holds the visual prefix once and its questions after it. Each question sees the prefix and itself only, and its
positions continue right after the prefix, so every logit equals that of the stock model asked this one question.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import LlavaForConditionalGeneration

from codebook.miniature import model as architecture
from codebook.miniature.model import ASSISTANT_ID, BOS_ID, EOS_ID, PAD_ID, USER_ID, WORDS
from codebook.miniature.scenes import FILM_FRAMES, GRID, album, film, labels, scene
from codebook.miniature.tasks import PLACES, SCENE_FAMILIES, TASK_FAMILIES, make_question, scenes_shown

IMAGE_TOKENS = GRID * GRID
PREFIX = 2  # tokens before the visual ones: <s> <user>
LENGTH = 112  # most text tokens in a row


@dataclass(frozen=True)
class Study:
    """The mix of questions in the batches of a stage.

    Attributes
    ----------
    extra : families asked about a scene after one question of each; none: no questions at all
    emphasis : weights of families in the loss, where they are not 1
    crowded : fraction of crowded scenes
    shares : how many of 100 steps are about scenes, and about scenes or albums; the others are about films
    """

    extra: tuple[str, ...] = ()
    emphasis: dict[str, float] = field(default_factory=dict)
    crowded: float = 0.0
    shares: tuple[int, int] = (100, 100)


CROWDED = Study(crowded=0.75)
SCENES = Study(extra=("exist", "exist", "rel", "count", "attr", "ocr"))
ALL = Study(
    extra=("exist", "count", "attr", "loc", "loc", "rel", "rel", "box", "ocr"),
    # Places are learned last: sixteen answers, each seen once in a hundred questions.
    emphasis={"loc": 2.0, "rel": 2.0, "box": 1.5, "ocr": 1.5, "count": 1.5},
    shares=(70, 84),
)
IDS = {word: i for i, word in enumerate(WORDS)}


@dataclass
class PackedBatch:
    """A packed batch of B rows of N images; text arrays are (B, L), as long as the longest row needs.

    Attributes
    ----------
    pixels : float (B * N, 3, 96, 96)
    shape, color, digit : int (B * N, 144), what each patch shows, -1 for nothing
    box : float (B * N, 144, 4)
    kept : int (B * N, K), ascending; the visual tokens that the language model is given
    tokens, segment, position, target : int; segment -1 is padding, target -100 is not learned
    family : int, the row of TASK_FAMILIES
    weight : float, of the target in the loss
    """

    pixels: torch.Tensor
    shape: torch.Tensor
    color: torch.Tensor
    digit: torch.Tensor
    box: torch.Tensor
    kept: torch.Tensor
    tokens: torch.Tensor
    segment: torch.Tensor
    position: torch.Tensor
    target: torch.Tensor
    family: torch.Tensor
    weight: torch.Tensor

    def to(self, device: str) -> PackedBatch:
        return PackedBatch(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


def tokenize(text: str) -> list[int]:
    """The ids of a text's tokens, as the model's own tokenizer has them."""
    return [IDS[word] for word in re.findall(r"\w+|[^\w\s]+", text.lower())]


def batch(size: int, seed: int, step: int, worker: int, study: Study = ALL, *, drop: bool = True) -> PackedBatch:
    """The batch of a step; it depends on the arguments alone, so a resumed run sees the same ones.

    Parameters
    ----------
    size : images; steps about albums and films have as many rows as fit into that
    drop : let most of the batches lose visual tokens
    """
    rng = np.random.Generator(np.random.PCG64([seed, step, worker, 7]))
    # The same choices on every worker, for they wait for each other.
    shared = np.random.Generator(np.random.PCG64([seed, step, 8]))
    draw, count = _subject(study, shared)
    more = {} if draw is scene else {"count": count}
    rows: list[dict[str, np.ndarray]] = []
    marks: list[dict[str, np.ndarray]] = []
    for i in range(max(1, size // count)):
        crowded = {"dense": True} if rng.random() < study.crowded else more
        shown = draw("train", 0, seed, step, worker, i, **crowded)
        marks += [{"pixels": picture.pixels, **labels(picture)} for picture in scenes_shown(shown)]
        rows.append(_questions(shown, _order(study, draw, rng), study.emphasis, rng))
    used = max(16, *(int((row["segment"] >= 0).sum()) for row in rows))
    text = {name: torch.from_numpy(np.stack([row[name][:used] for row in rows])) for name in rows[0]}
    text["position"] += PREFIX + count * (IMAGE_TOKENS + (count > 1))
    seen = {name: torch.from_numpy(np.stack([mark[name] for mark in marks])) for name in marks[0]}
    seen["pixels"] = seen["pixels"].permute(0, 3, 1, 2).float() / 127.5 - 1
    busy = (seen["shape"] >= 0) | (seen["digit"] >= 0)
    return PackedBatch(**seen, **text, kept=_kept_tokens(busy, shared if drop else None))


def _subject(study: Study, rng: np.random.Generator) -> tuple[Callable[..., Any], int]:
    kind, count = int(rng.integers(100)), int(rng.integers(FILM_FRAMES[0], FILM_FRAMES[1] + 1))
    if kind < study.shares[0]:
        return scene, 1
    return (album, 2 + (kind % 10 >= 7)) if kind < study.shares[1] else (film, count)


def _kept_tokens(busy: torch.Tensor, rng: np.random.Generator | None) -> torch.Tensor:
    """The visual tokens (B * N, K) that a batch keeps.

    Four of ten batches keep all, three lose background only, three lose tokens at random: losing
    background alone would teach the model to favour pruners that keep objects.
    """
    kind = 0 if rng is None else int(rng.integers(10))
    if rng is None or kind < 4:
        return torch.arange(IMAGE_TOKENS).expand(len(busy), -1)
    count = int(rng.integers(48, 101)) if kind < 7 else int(rng.integers(104, 137))
    order = torch.from_numpy(rng.random(tuple(busy.shape)))
    if kind < 7:
        order += 2 * busy
    return order.topk(count, dim=1).indices.sort(1).values


def _order(study: Study, draw: Callable[..., Any], rng: np.random.Generator) -> list[str]:
    """The families to ask about, in turn; more than fit in a row."""
    if draw is not scene:
        return ["multi"] * 10 if draw is album else ["video"] * 24
    if not study.extra:
        return []
    order = [SCENE_FAMILIES[i] for i in rng.permutation(len(SCENE_FAMILIES))]
    if study.emphasis and rng.random() < 0.5:
        order.remove("cap")  # as long as three other questions
    return order + [study.extra[i] for i in rng.permutation(len(study.extra))]


def _questions(
    shown: Any, order: list[str], emphasis: dict[str, float], rng: np.random.Generator
) -> dict[str, np.ndarray]:
    row = {
        "tokens": np.full(LENGTH, PAD_ID),
        "segment": np.full(LENGTH, -1),
        "position": np.zeros(LENGTH, np.int64),
        "target": np.full(LENGTH, -100),
        "family": np.full(LENGTH, -1),
        "weight": np.zeros(LENGTH, np.float32),
    }
    seen: set[str] = set()
    start = 0
    for family in order:
        parts = make_question(shown, family, rng)
        if parts is None or parts[0] in seen:
            continue
        seen.add(parts[0])
        question, answer = tokenize(parts[0]), tokenize(parts[1])
        end = start + len(question) + 1 + len(answer)
        if end > LENGTH:
            continue
        spot, reply = slice(start, end), slice(start + len(question), end)
        row["tokens"][spot] = [*question, ASSISTANT_ID, *answer]
        row["segment"][spot] = len(seen)
        row["position"][spot] = np.arange(end - start)
        row["target"][reply] = [*answer, EOS_ID]
        row["family"][spot] = TASK_FAMILIES.index(family)
        # Between "every token counts the same" and "every question does".
        row["weight"][reply] = emphasis.get(family, 1.0) * (len(answer) + 1) ** -0.5
        start = end
    return row


def see(
    built: LlavaForConditionalGeneration, pixels: torch.Tensor, *, summary: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What the vision tower makes of pictures.

    Returns
    -------
    features, float (B, 144, 128): of the layer that LLaVA reads; and with `summary` the normalised
    [CLS] of the last layer, float (B, 128)
    """
    tower = built.model.vision_tower
    hidden = tower.pre_layrnorm(tower.embeddings(pixels))
    for layer in tower.encoder.layers[:-1]:
        hidden = layer(hidden, None)
    if not summary:
        return hidden[:, 1:], None
    last = tower.encoder.layers[-1](hidden, None)
    return hidden[:, 1:], tower.post_layernorm(last[:, 0])


def answer_logits(built: LlavaForConditionalGeneration, visual: torch.Tensor, packed: PackedBatch) -> torch.Tensor:
    """What the language model answers to packed questions.

    Parameters
    ----------
    visual : float (B * N, 144, 160), the projected tokens; those not in `packed.kept` are left out

    Returns
    -------
    float (T, vocabulary): logits at the T places that have a target, in row-major order
    """
    language = built.model.language_model
    size, count = len(packed.tokens), len(visual) // len(packed.tokens)
    visual = visual.gather(1, packed.kept[..., None].expand(-1, -1, visual.shape[-1]))
    embed, kept = language.embed_tokens, packed.kept
    head = torch.tensor([BOS_ID, USER_ID], device=visual.device).expand(size, -1)
    start = torch.arange(PREFIX, device=visual.device).expand(size, -1)
    if count > 1:  # the template counts them aloud
        words = torch.tensor([IDS[place] for place in PLACES[:count]], device=visual.device).repeat(size)
        visual = torch.cat([embed(words)[:, None], visual], 1)
        kept = F.pad(kept + 1, (1, 0)) + torch.arange(count, device=visual.device).repeat(size)[:, None] * (
            IMAGE_TOKENS + 1
        )
    hidden = torch.cat([embed(head), visual.reshape(size, -1, visual.shape[-1]), embed(packed.tokens)], 1)
    positions = torch.cat([start, PREFIX + kept.reshape(size, -1), packed.position], 1)
    cos, sin = (part[:, :, None] for part in language.rotary_emb(hidden, positions))
    prefix = hidden.shape[1] - packed.tokens.shape[1]
    mask = _packed_mask(packed.segment, prefix)
    for layer in language.layers[:-1]:
        hidden = answer_layer(layer, hidden, cos, sin, mask, prefix, 0)
    # Nobody reads the prefix after the last layer.
    hidden = answer_layer(language.layers[-1], hidden, cos, sin, mask, prefix, prefix)
    return built.lm_head(language.norm(hidden[packed.target >= 0]))


def _packed_mask(segment: torch.Tensor, prefix: int) -> torch.Tensor:
    """Additive mask (B, 1, T, prefix + T): the prefix, and earlier tokens of the same question."""
    same = segment[:, :, None] == segment[:, None]
    causal = torch.ones(same.shape[1:], dtype=torch.bool, device=segment.device).tril()
    block = torch.zeros(same.shape, device=segment.device).masked_fill_(~(same & causal), float("-inf"))
    return F.pad(block, (prefix, 0))[:, None]


def plain_layer(layer, hidden, cos, sin, mask, prefix: int, start: int) -> torch.Tensor:
    """One Llama layer; only rows from `start` on are returned."""
    attention, mlp = layer.self_attn, layer.mlp
    size, length, width = hidden.shape
    shape = (size, length, -1, attention.head_dim)
    normed = _norm(layer.input_layernorm, hidden)
    weights = (attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight)
    query, key, value = F.linear(normed, torch.cat(weights)).chunk(3, -1)
    query, key = rotate_halves(query.view(shape), cos, sin), rotate_halves(key.view(shape), cos, sin)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value.view(shape)))
    text = F.scaled_dot_product_attention(query[:, :, prefix:], key, value, attn_mask=mask)
    if not start:
        first = F.scaled_dot_product_attention(
            query[:, :, :prefix], key[:, :, :prefix], value[:, :, :prefix], is_causal=True
        )
        text = torch.cat([first, text], 2)
    mixed = text.transpose(1, 2).reshape(size, length - start, width)
    hidden = hidden[:, start:] + attention.o_proj(mixed)
    normed = _norm(layer.post_attention_layernorm, hidden)
    gate, up = F.linear(normed, torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight))).chunk(2, -1)
    return hidden + mlp.down_proj(F.silu(gate) * up)


answer_layer = plain_layer  # training on a CPU replaces it by its compiled form


def _norm(norm, hidden: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(hidden, norm.weight.shape, norm.weight, norm.variance_epsilon)


def rotate_halves(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Queries or keys (..., d) with rotary embeddings: numbers half of d apart turn together."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


assert architecture.TEXT["hidden_size"] % architecture.TEXT["num_attention_heads"] == 0
