"""An independent reference for pruning: no cache, nothing removed, dropped columns masked from a layer on.

Written against stock layers only; it shares no code with `codebook.pruning`.
"""

import torch


def merged(model, input_ids, pixel_values):
    """Embeddings (B, L, d) with the images' features in place."""
    embeds = model.get_input_embeddings()(input_ids)
    if pixel_values is not None:
        features = torch.cat(list(model.get_image_features(pixel_values=pixel_values, return_dict=True).pooler_output))
        embeds = embeds.masked_scatter((input_ids == model.config.image_token_id)[..., None], features)
    return embeds


def logits(model, embeds, valid, gone_from, positions=None, edit=None):
    """Last-position logits (B, V) with eager attention.

    `gone_from` (B, L) is the first layer that no longer sees a column (a large number for columns never dropped).
    `edit(layer, hidden)` gives what enters each layer in place of `hidden` (B, L, d).
    """
    lm, (batch, length) = model.get_decoder(), valid.shape
    if positions is None:
        positions = (valid.cumsum(1) - 1).clamp(min=0)  # as generate() makes them
    rotary = lm.rotary_emb(embeds, positions)
    causal = torch.ones(length, length).tril().bool()
    hidden = embeds
    for i, layer in enumerate(lm.layers):
        hidden = hidden if edit is None else edit(i, hidden)
        seen = causal & (valid.bool() & (gone_from > i))[:, None]
        seen = seen | torch.eye(length).bool()  # rows without a visible column would be NaN; no one reads them
        mask = torch.zeros(batch, 1, length, length).masked_fill(~seen[:, None], torch.finfo(embeds.dtype).min)
        hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary)
    return model.lm_head(lm.norm(hidden))[:, -1]


def generate(model, input_ids, pixel_values, valid, gone_from, steps, edit=None):
    """Greedy tokens (B, steps) and each step's logits, from a full forward a step."""
    embeds, tokens, scores = merged(model, input_ids, pixel_values), [], []
    for _ in range(steps):
        scores.append(logits(model, embeds, valid, gone_from, edit=edit))
        tokens.append(scores[-1].argmax(-1, keepdim=True))
        embeds = torch.cat([embeds, model.get_input_embeddings()(tokens[-1])], 1)
        valid = torch.cat([valid, torch.ones_like(tokens[-1])], 1)
        gone_from = torch.cat([gone_from, torch.full_like(tokens[-1], 10**6)], 1)
    return torch.cat(tokens, 1), torch.stack(scores, 1)
