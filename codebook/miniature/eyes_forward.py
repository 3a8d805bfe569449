"""The forward pass of `eyes` over packed rows, with low-rank updates that can be trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlavaForConditionalGeneration

from codebook.miniature.eyes import RANK, SHAPES_OF
from codebook.miniature.eyes_packing import VISUAL
from codebook.miniature.packing import rotate_halves
from codebook.models.assembly import LORA, PROJECTOR, TOWER
from codebook.models.smollm2 import HEADS, LLM_WIDTH, MATRICES, SHARED_HEADS

HEAD_WIDTH = LLM_WIDTH // HEADS


class Student(nn.Module):
    """The model in training: what is trained are parameters, the language model is buffers.

    Parameters
    ----------
    built : of `eyes_model`; its language model is taken over
    seed : of the low-rank factors; the left ones begin at zero
    """

    words: torch.Tensor
    norm: torch.Tensor
    input_layernorm: torch.Tensor
    post_attention_layernorm: torch.Tensor

    def __init__(self, built: LlavaForConditionalGeneration, seed: int) -> None:
        super().__init__()
        language: Any = built.model.language_model
        self.tower, self.projector = built.model.vision_tower, built.model.multi_modal_projector
        self.rotary, self.eps = language.rotary_emb, language.norm.variance_epsilon
        self.register_buffer("words", language.embed_tokens.weight.detach().clone(), persistent=False)
        self.register_buffer("norm", language.norm.weight.detach().clone(), persistent=False)
        layers = list(language.layers)
        for name in ("input_layernorm", "post_attention_layernorm"):
            self._keep(name, [getattr(layer, name).weight for layer in layers])
        for name, (part, _) in MATRICES.items():
            self._keep(name, [getattr(getattr(layer, part), name).weight for layer in layers])
        draw = torch.Generator().manual_seed(seed)
        self.right, self.left = nn.ParameterDict(), nn.ParameterDict()
        for name, (rows, columns) in SHAPES_OF.items():
            self.right[name] = nn.Parameter(torch.randn(len(layers), RANK, columns, generator=draw) * columns**-0.5)
            self.left[name] = nn.Parameter(torch.zeros(len(layers), rows, RANK))
        self.before: Callable[..., Any] = _before
        self.after: Callable[..., Any] = _after

    def _keep(self, name: str, weights: list[torch.Tensor]) -> None:
        self.register_buffer(name, torch.stack([w.detach() for w in weights]), persistent=False)

    def parts(self) -> dict[str, torch.Tensor]:
        """What is trained, by the names of `merged`."""
        found = {TOWER + k: v for k, v in self.tower.state_dict().items()}
        found |= {PROJECTOR + k: v for k, v in self.projector.state_dict().items()}
        found |= {f"{LORA}{k}.a": v.detach() for k, v in self.right.items()}
        found |= {f"{LORA}{k}.b": v.detach() for k, v in self.left.items()}
        return {k: v for k, v in found.items() if not k.endswith("position_ids")}

    def merged(self, dtype: torch.dtype) -> list[tuple[torch.Tensor, ...]]:
        """The matrices of each layer with their updates: of queries, keys and values; of the output; of the MLP."""
        whole = {name: getattr(self, name) + self.left[name] @ self.right[name] for name in MATRICES}
        joined = (
            torch.cat([whole["q_proj"], whole["k_proj"], whole["v_proj"]], 1),
            whole["o_proj"],
            torch.cat([whole["gate_proj"], whole["up_proj"]], 1),
            whole["down_proj"],
        )
        return list(zip(*(matrix.to(dtype).unbind() for matrix in joined), strict=True))

    def forward(
        self, features: torch.Tensor, packed: dict[str, torch.Tensor], places: tuple[int, ...], dtype: torch.dtype
    ) -> torch.Tensor:
        """Logits (T, vocabulary), float32, at the T places that have a target, in row-major order.

        Parameters
        ----------
        features : of all images of all rows
        packed : the arrays of `Packer.batch` as tensors
        places : where in a row each image begins
        dtype : of the matrix products; the sums between the layers stay in float32
        """
        tokens = packed["tokens"]
        hidden = F.embedding(tokens, self.words)
        visual = self.projector(features).to(hidden.dtype).view(len(tokens), len(places), VISUAL, LLM_WIDTH)
        for i, place in enumerate(places):
            hidden[:, place : place + VISUAL] = visual[:, i]
        cos, sin = (part[:, :, None].to(dtype) for part in self.rotary(hidden, packed["position"]))
        mask = row_mask(packed["segment"], packed["hidden"], dtype)
        for i, (qkv, out, gate_up, down) in enumerate(self.merged(dtype)):
            query, key, value = self.before(hidden, self.input_layernorm[i], qkv, cos, sin, self.eps)
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
            hidden = self.after(hidden, mixed, out, self.post_attention_layernorm[i], gate_up, down, self.eps)
        chosen = F.rms_norm(hidden.flatten(0, 1)[packed["where"]], (LLM_WIDTH,), self.norm, self.eps)
        return F.linear(chosen.to(dtype), self.words.to(dtype)).float()


def look(tower: nn.Module, pixels: torch.Tensor, *, summary: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Features (B, 144, 128) of uint8 pixels (B, 96, 96, 3), and with `summary` [CLS] behind the last layer."""
    parts: Any = tower
    hidden = parts.pre_layrnorm(parts.embeddings(pixels.permute(0, 3, 1, 2).float() / 127.5 - 1))
    *first, last = parts.encoder.layers
    for layer in first:
        hidden = layer(hidden, None)
    return hidden[:, 1:], parts.post_layernorm(last(hidden, None)[:, 0]) if summary else None


def row_mask(segment: torch.Tensor, hidden: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Additive mask (R, 1, L, L): the prefix without what is hidden, and earlier tokens of the same question."""
    length = segment.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segment.device).tril()
    own = (segment[:, None] == 0) | (segment[:, None] == segment[:, :, None])
    # Whatever is hidden sees at least itself, for a row of nothing but minus infinity would be no number.
    itself = torch.eye(length, dtype=torch.bool, device=segment.device)
    seen = (causal & own & ~hidden[:, None]) | itself
    return torch.zeros(seen.shape, dtype=dtype, device=segment.device).masked_fill_(~seen, float("-inf"))[:, None]


def _before(hidden, norm, qkv, cos, sin, eps: float):
    rows, length, _ = hidden.shape
    normed = F.rms_norm(hidden, (LLM_WIDTH,), norm, eps).to(qkv.dtype)
    query, key, value = F.linear(normed, qkv).split(
        [LLM_WIDTH, SHARED_HEADS * HEAD_WIDTH, SHARED_HEADS * HEAD_WIDTH], -1
    )
    query = rotate_halves(query.view(rows, length, HEADS, HEAD_WIDTH), cos, sin)
    key = rotate_halves(key.view(rows, length, SHARED_HEADS, HEAD_WIDTH), cos, sin)
    key, value = (
        x[:, :, :, None].expand(-1, -1, -1, HEADS // SHARED_HEADS, -1).reshape(rows, length, HEADS, HEAD_WIDTH)
        for x in (key, value.view(rows, length, SHARED_HEADS, HEAD_WIDTH))
    )
    return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


def _after(hidden, mixed, out, norm, gate_up, down, eps: float):
    hidden = hidden + F.linear(mixed.transpose(1, 2).flatten(2), out)
    gate, up = F.linear(F.rms_norm(hidden, (LLM_WIDTH,), norm, eps).to(out.dtype), gate_up).chunk(2, -1)
    return hidden + F.linear(F.silu(gate) * up, down)
