"""An independent reference for pruning: no cache, nothing removed, dropped columns masked from a layer on.

Written against stock layers only; it shares no code with `codebook.pruning`. `masked` is for any family: there the
stock model runs with eager attention, and its own masks get the dropped columns added. A recurrent layer, which no mask
can make forget, runs row by row on the columns that are left.
"""

import contextlib
import math
from collections import Counter

import torch


class Mass:
    """How many tokens each column stands for at each layer, counted one by one from the kept sets.

    `units` has for each image, crop or frame its row, its columns (n,), and for each stage which of its tokens are
    left, as places in it; `stages` has the layer of each stage and whether it counts.
    """

    def __init__(self, units, stages):
        self.units, self.stages = units, stages

    def __call__(self, layer, hidden):
        """What is added to the logits towards each column (B, L) from this layer on; asked in order of layers."""
        if layer == 0:
            self.mass = [Counter({i: 1 for i in range(len(columns))}) for _, columns, _ in self.units]
        for number, (at, counts) in enumerate(self.stages):
            if at == layer:
                self.mass = [self._left(*unit, number, counts, mass, hidden)
                             for unit, mass in zip(self.units, self.mass, strict=True)]  # fmt: skip
        bias = torch.zeros(hidden.shape[:2])
        for (row, columns, _), mass in zip(self.units, self.mass, strict=True):
            bias[row, columns[list(mass)]] = torch.tensor([math.log(count) for count in mass.values()])
        return bias

    def _left(self, row, columns, kept, number, counts, mass, hidden):
        left = [int(i) for i in kept[number]]
        after = Counter({i: mass[i] for i in left})
        for i in sorted(set(mass) - set(left)) if counts and left else ():
            likeness = torch.cosine_similarity(hidden[row, columns[i]][None], hidden[row, columns[left]])
            after[left[int(likeness.argmax())]] += mass[i]
        return after


class Far:
    """What `Mass` says, with RESTORE's calibration: log(s (2 - D(distance))) for the prompt's queries, else log s.

    `angles(layer)` (B, T, J) has the angle of each rotary frequency at each of the prompt's T columns, None where the
    layer has no positions. In layer 0 all tokens of a unit have the same size. All stages are calibrated.
    """

    def __init__(self, mass, angles):
        self.mass, self.angles = mass, angles

    def __call__(self, layer, hidden):
        """(B, L, L) for queries and keys."""
        bias = self.mass(layer, hidden)
        units = [(row, columns[list(sizes)], len(columns))
                 for (row, columns, _), sizes in zip(self.mass.units, self.mass.mass, strict=True)]  # fmt: skip
        first = self.mass.stages[0][0]
        if layer == first == 0:
            for row, keys, count in units:
                bias[row, keys] = math.log(count / len(keys))
        bias, angles = bias[:, None].repeat(1, hidden.shape[1], 1), self.angles(layer)
        if angles is None or layer < first:
            return bias
        prompt = angles.shape[1]
        for row, keys, _ in units:
            decay = torch.cos(angles[row, :, None] - angles[row, keys]).mean(-1)
            bias[row, :prompt, keys] += torch.log(2 - decay)
        return bias


def _by_query(bias):
    """(B, 1, 1 or L, L) of what is added towards each column, (B, L) for all queries alike or (B, L, L)."""
    return bias[:, None] if bias.dim() == 3 else bias[:, None, None]


@contextlib.contextmanager
def _dropping(model, valid, gone_from, compact, edit, mass):
    lm = model.get_decoder()
    lm = lm if hasattr(lm, "layers") else lm.model  # Llama 4's has a head around it
    low = torch.finfo(model.dtype).min

    def before(i, layer):
        def hook(_, args, kwargs):
            hidden, stays = args[0], valid.bool() & (gone_from > i)
            bias = torch.zeros(1, 1) if mass is None else mass(i, hidden)
            if edit is not None:
                hidden = edit(i, hidden)
            mask = kwargs["attention_mask"] + _by_query(bias).where(stays[:, None, None], low)
            changed = {"attention_mask": mask.clamp(min=low)}
            if compact:
                positions = (stays.cumsum(1) - 1).clamp(min=0)
                by_layer = model.config.model_type in ("gemma3", "gemma4", "gemma4_unified", "lfm3_vl")
                kind = [layer.self_attn.layer_type] if by_layer else []
                plain = "unscaled" in getattr(lm, "rope_types", [None] * (i + 1))[i : i + 1]  # of Molmo 2
                changed["position_embeddings"] = (lm.rotary_emb_unscaled if plain else lm.rotary_emb)(
                    hidden, positions, *kind
                )
            return (hidden, *args[1:]), kwargs | changed

        return hook

    def alone(i, layer):
        stock = layer.forward

        def forward(hidden, *args, attention_mask=None, **kwargs):
            if mass is not None:
                mass(i, hidden)  # counts; only attention hears of it
            hidden = hidden.clone() if edit is None else edit(i, hidden).clone()
            for row, stays in enumerate(valid.bool() & (gone_from > i)):
                hidden[row, stays] = stock(hidden[row, stays][None], *args, attention_mask=None, **kwargs)[0]
            return hidden

        return forward

    hooks, recurrent = [], []
    for i, layer in enumerate(lm.layers):
        if hasattr(layer, "self_attn"):
            hooks.append(layer.register_forward_pre_hook(before(i, layer), with_kwargs=True))
        else:
            layer.forward = alone(i, layer)
            recurrent.append(layer)
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()
        for layer in recurrent:
            del layer.forward


def masked(model, inputs, gone_from, said=None, compact=False, edit=None, suppress=(), mass=None):
    """Greedy tokens (B, steps) and each step's logits of any family, from one full forward.

    A step comes after the prompt and the tokens `said` (B, steps) before it: these are greedy if they are what is
    returned. None: the first step alone. `gone_from` (B, L), `edit` and `mass` are as in `logits`; tokens of `suppress`
    are never chosen.
    """
    stock, inputs = model.config._attn_implementation, dict(inputs)
    before, steps = _before_last(said, gone_from)
    more = {"input_ids": before, "attention_mask": torch.ones_like(before)}
    more["mm_token_type_ids"] = more["moe_mm_token_type_ids"] = torch.zeros_like(before)
    more["token_type_ids"] = torch.full_like(before, int(model.config.model_type == "paligemma"))
    inputs |= {name: torch.cat([inputs[name], more[name]], 1) for name in more if name in inputs}
    valid, positions = inputs["attention_mask"], {}
    # As generate() makes them; Qwen's are made from the token types, of omni models from the tokens.
    if "mm_token_type_ids" not in inputs and "omni" not in model.config.model_type:
        first = 1 if model.config.model_type == "paligemma" else 0
        positions["position_ids"] = (valid.cumsum(1) - 1).clamp(min=0) + first
    model.set_attn_implementation("eager")
    with _dropping(model, valid, _stay(gone_from, before), compact, edit, mass):
        scores = model(**inputs, **positions, use_cache=False).logits[:, -steps:]
    model.set_attn_implementation(stock)
    allowed = scores.clone()
    allowed[..., list(suppress)] = -torch.inf
    return allowed.argmax(-1), scores


def _before_last(said, ids):
    """The tokens (B, steps - 1) before the last step, and the number of steps."""
    return (ids[:, :0], 1) if said is None else (said[:, :-1], said.shape[1])


def _stay(gone_from, more):
    """`gone_from` with columns behind it that are never dropped."""
    return torch.cat([gone_from, torch.full_like(more, 10**6)], 1)


def followed(inputs, more):
    """(inputs, positions) of whole prompts: the processor's, each with the text `more` (b, t) behind it."""
    whole = {
        **inputs,
        "input_ids": torch.cat([inputs["input_ids"], more], 1),
        "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(more)], 1),
        "mm_token_type_ids": torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(more)], 1),
    }
    return whole, (whole["attention_mask"].cumsum(1) - 1).clamp(min=0)


def merged(model, input_ids, pixel_values):
    """Embeddings (B, L, d) with the images' features in place."""
    embeds = model.get_input_embeddings()(input_ids)
    if pixel_values is not None:
        features = torch.cat(list(model.get_image_features(pixel_values=pixel_values, return_dict=True).pooler_output))
        embeds = embeds.masked_scatter((input_ids == model.config.image_token_id)[..., None], features)
    return embeds


def logits(model, embeds, valid, gone_from, positions=None, edit=None, mass=None, steps=None):
    """Last-position logits (B, V) with eager attention, or those of the last `steps` positions (B, steps, V).

    `gone_from` (B, L) is the first layer that no longer sees a column (a large number for columns never dropped).
    `edit(layer, hidden)` gives what enters each layer in place of `hidden` (B, L, d), `mass(layer, hidden)` what is
    added to the logits towards each column (B, L).
    """
    lm, (batch, length) = model.get_decoder(), valid.shape
    if positions is None:
        positions = (valid.cumsum(1) - 1).clamp(min=0)  # as generate() makes them
    rotary = lm.rotary_emb(embeds, positions)
    causal = torch.ones(length, length).tril().bool()
    hidden = embeds
    for i, layer in enumerate(lm.layers):
        bias = 0.0 if mass is None else _by_query(mass(i, hidden))
        hidden = hidden if edit is None else edit(i, hidden)
        seen = causal & (valid.bool() & (gone_from > i))[:, None]
        seen = seen | torch.eye(length).bool()  # rows without a visible column would be NaN; no one reads them
        mask = torch.zeros(batch, 1, length, length).add(bias)
        mask = mask.masked_fill(~seen[:, None], torch.finfo(embeds.dtype).min)
        hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary)
    scores = model.lm_head(lm.norm(hidden))
    return scores[:, -1] if steps is None else scores[:, -steps:]


def generate(model, input_ids, pixel_values, valid, gone_from, said, edit=None, mass=None):
    """Greedy tokens (B, steps) and each step's logits, of a LLaVA, as `masked` has them."""
    before, steps = _before_last(said, input_ids)
    embeds = torch.cat([merged(model, input_ids, pixel_values), model.get_input_embeddings()(before)], 1)
    valid = torch.cat([valid, torch.ones_like(before)], 1)
    scores = logits(model, embeds, valid, _stay(gone_from, before), edit=edit, mass=mass, steps=steps)
    return scores.argmax(-1), scores
