"""Plain transcriptions of the rules that methods are published with, to time them by and to check kept sets with.

Each is written from its paper's formulas, in torch and without tricks: a sum over all that is chosen where the paper
says so, one pass per pivot where it has a loop. None asks for attention maps: of queries and keys only the rows that a
rule needs are computed. What a paper leaves open, such as a count that its grid does not divide, is taken as the
package takes it.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, conv2d, normalize, one_hot, pad

from codebook import Codebook, VisualTokens

Rule = Callable[[Codebook, Any, int], object]
"""Its second argument is an image's tokens, or a list of those of a film's frames."""


def cosines(a: Tensor, b: Tensor) -> Tensor:
    return normalize(a.float(), dim=-1) @ normalize(b.float(), dim=-1).T


def pairs(features: Tensor) -> Tensor:
    unit = normalize(features.float(), dim=-1)
    return unit @ unit.T


def top(score: Tensor, keep: int) -> Tensor:
    return score.topk(keep).indices.sort().values


def attention(tokens: VisualTokens, queries: Tensor, rotated: bool = True, image_only: bool = False) -> Tensor:
    """softmax(q k / sqrt(d)), averaged over heads, from some queries to the image's tokens."""
    own, places = tokens.attention, torch.arange(len(tokens.sequence))
    q, k = own.query[:, queries], own.key
    if not rotated:
        q, k = unrotated(q, own.cos[queries], own.sin[queries]), unrotated(k, own.cos, own.sin)
    logits = q @ k.transpose(1, 2) * own.scaling
    seen = places <= queries[:, None]
    if image_only:
        seen = seen & (places < len(tokens))
    return logits.masked_fill(~seen, -torch.inf).softmax(-1).mean(0)[:, tokens.span]


def unrotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return (x * cos - torch.cat([-right, left], -1) * sin) / (cos**2 + sin**2)


def last_text(tokens: VisualTokens, **options) -> Tensor:
    return attention(tokens, torch.tensor([len(tokens.sequence) - 1]), **options)[0]


# 2503.20540, section 3.3
def codebook(book, tokens, keep):
    return top(-cosines(tokens.features, book.prototypes).max(1).values, keep)


def codebook_threshold(book, tokens, keep):
    return (cosines(tokens.features, book.prototypes).max(1).values < 0.6).nonzero()[:, 0]


# 2403.06764, 2502.11501, 2412.13180
def fastv(book, tokens, keep):
    return top(last_text(tokens), keep)


def fastv_reverse(book, tokens, keep):
    return top(-last_text(tokens), keep)


def fastv_vis(book, tokens, keep):
    return top(attention(tokens, torch.tensor([len(tokens) - 1]))[0], keep)


def fastv_image(book, tokens, keep):
    return top(last_text(tokens, image_only=True), keep)


def fastv_norope(book, tokens, keep):
    return top(last_text(tokens, rotated=False, image_only=True), keep)


def fastv_window(book, tokens, keep):
    rows, cols = tokens.grid
    places = torch.arange(rows * cols).view(rows, cols)
    windows = [cell.flatten() for band in places.tensor_split(4, 0) for cell in band.tensor_split(4, 1)]
    score = last_text(tokens)
    return torch.cat([own[score[own].topk(keep // 16).indices] for own in windows]).sort().values


def scaled(x):
    return (x - x.min()) / (x.max() - x.min())


def alpha(book, tokens, keep):
    uniqueness = -cosines(tokens.hidden, tokens.last[None])[:, 0]
    return top(0.5 * scaled(last_text(tokens)) + 0.5 * scaled(uniqueness), keep)


def grid(tokens: VisualTokens, keep: int) -> Tensor:
    """The stride grid of 2412.13180: every s-th row and column."""
    rows, cols = tokens.grid
    stride = max(1, round((rows * cols / keep) ** 0.5))
    return torch.arange(rows * cols).view(rows, cols)[stride // 2 :: stride, stride // 2 :: stride].flatten()


def uniform(book, tokens, keep):
    return grid(tokens, keep)


def feather_ensemble(book, tokens, keep):
    own = round(keep / 3)
    ranked = last_text(tokens, rotated=False, image_only=True).topk(keep - own).indices
    return torch.cat([grid(tokens, own), ranked]).unique()


def phi_knn(book, tokens, keep):
    return top(peaks(tokens.features), keep)


def peaks(x: Tensor) -> Tensor:
    distance = torch.cdist(x.float(), x.float()) / x.shape[1] ** 0.5
    near = distance.topk(min(5, len(x)), dim=-1, largest=False).values
    density = (-(near**2).mean(-1)).exp()
    density = density + torch.rand(len(x)) * 1e-6
    denser = (density[None, :] > density[:, None]).to(x.dtype)
    farthest = distance.max()
    return (distance * denser + farthest * (1 - denser)).min(-1).values * density


# 2503.02175, algorithm 1
def divprune(book, tokens, keep):
    distance = 1 - pairs(tokens.features)
    chosen: list[int] = []
    while len(chosen) < keep:
        if chosen:
            nearest = distance[chosen].min(0).values
            nearest[chosen] = -1
        else:
            nearest = distance.topk(2, dim=0, largest=False).values[1]
        chosen.append(int(nearest.argmax()))
    return torch.tensor(sorted(chosen))


def gate(tokens: VisualTokens) -> Tensor:
    similarity = pairs(tokens.features)
    return scaled(-(similarity.sum(1) - similarity.diagonal()) / (len(tokens) - 1))


# Cen-Prune, from second-hand notes
def cen_divprune(book, tokens, keep):
    weight, distance = gate(tokens), 1 - pairs(tokens.features - tokens.features.mean(0))
    chosen: list[int] = []
    while len(chosen) < keep:
        if chosen:
            score = weight * distance[chosen].min(0).values
            score[chosen] = -1
        else:
            score = weight * distance.topk(2, dim=0, largest=False).values[1]
        chosen.append(int(score.argmax()))
    return torch.tensor(sorted(chosen))


# 2506.10967, with the greedy maximum of 1709.05135
def cdpruner(book, tokens, keep):
    return determinant(scaled(like_question(tokens)), pairs(tokens.features), keep)


def cen_cdpruner(book, tokens, keep):
    relevance = scaled(like_question(tokens)) * gate(tokens)
    return determinant(relevance, pairs(tokens.features - tokens.features.mean(0)), keep)


def like_question(tokens: VisualTokens) -> Tensor:
    question = tokens.sequence[tokens.question].float().mean(0, keepdim=True)
    return cosines(tokens.hidden, question)[:, 0]


def determinant(relevance: Tensor, similarity: Tensor, keep: int) -> Tensor:
    kernel = relevance[:, None] * similarity * relevance[None]
    gain, factor, chosen = kernel.diagonal().clone(), torch.zeros(keep, len(kernel)), []
    for i in range(keep):
        pick = int(gain.argmax())
        row = (kernel[pick] - factor[:i, pick] @ factor[:i]) / gain[pick].sqrt()
        factor[i] = row
        gain = gain - row**2
        gain[pick] = -torch.inf
        chosen.append(pick)
    return torch.tensor(sorted(chosen))


# 2502.11494
def dart(book, tokens, keep):
    norm = tokens.attention.key.float().abs().sum((0, 2))
    image = norm[tokens.span].topk(4).indices.tolist()
    text = tokens.question[norm[tokens.question].topk(4).indices].tolist()
    chosen, share = list(image), (keep - 4) // 8
    for i, pivot in enumerate([*image, *text]):
        state = tokens.hidden[pivot] if i < 4 else tokens.sequence[pivot]
        similarity = cosines(state[None], tokens.hidden)[0]
        similarity[chosen] = torch.inf
        chosen += similarity.topk(share + (i < (keep - 4) % 8), largest=False).indices.tolist()
    return torch.tensor(sorted(chosen))


# 2410.04417: raters, and recycling by density peaks
def sparsevlm(book, tokens, keep):
    n = len(tokens)
    similarity = cosines(tokens.sequence[tokens.question], tokens.hidden).mean(1)
    raters = tokens.question[similarity >= similarity.mean()]
    order = attention(tokens, raters).sum(0).argsort(descending=True)
    averages = min(keep // 2, 1 + int(0.03 * (n - keep)))
    own = keep - averages
    recycled = order[own : own + round(0.3 * (n - own))]
    hidden = tokens.hidden[recycled].float()
    centres = peaks(hidden).topk(averages).indices
    cluster = torch.cdist(hidden, hidden[centres]).argmin(1)
    member = one_hot(cluster, averages).float().T
    merged = member @ hidden / member.sum(1, keepdim=True).clamp(min=1)
    return torch.cat([order[:own], recycled[centres]]).sort().values, merged


# 2412.01818 and 2412.04467
def cls_row(tokens: VisualTokens) -> Tensor:
    own = tokens.vision
    return (own.query[:, :1] @ own.key.transpose(1, 2) * own.scaling).softmax(-1).mean(0)[0, 1:]


def cls(book, tokens, keep):
    return top(cls_row(tokens), keep)


def visionzip(book, tokens, keep):
    dominant = round(keep * 54 / 64)
    order = cls_row(tokens).argsort(descending=True)
    others = order[dominant:].sort().values
    key = normalize(tokens.vision.key[:, 1:].mean(0), dim=-1)[others]
    contextual = keep - dominant
    step = len(others) // contextual
    targets = torch.arange(contextual) * step
    rest = torch.ones(len(others), dtype=torch.bool)
    rest[targets] = False
    joins = one_hot((key[rest] @ key[targets].T).argmax(1), contextual).float()
    hidden = tokens.hidden[others].float()
    merged = hidden[targets] + joins.T @ hidden[rest] / joins.sum(0).clamp(min=1)[:, None]
    return torch.cat([order[:dominant], others[targets]]).sort().values, merged


# 2607.07033
def anchorprune(book, tokens, keep):
    ranked, distance = like_question(tokens).argsort(descending=True).tolist(), 1 - pairs(tokens.features)
    chosen, novel = ranked[: max(1, round(keep * 10 / 64))], 0
    for token in ranked[len(chosen) : keep // 2]:
        novel += bool(distance[token, chosen].min() > 0.2)
        if novel == 3:
            break
        chosen.append(token)
    importance = cls_row(tokens)
    while len(chosen) < keep:
        score = importance * distance[chosen].min(0).values
        score[chosen] = -1
        chosen.append(int(score.argmax()))
    return torch.tensor(sorted(chosen))


# 2606.27161, section 4.1
def tops(book, tokens, keep):
    return optimal_set(cls_row(tokens), tokens.features, keep)


def tops_text(book, tokens, keep):
    return optimal_set(attention(tokens, tokens.question).mean(0), tokens.hidden, keep)


def optimal_set(relevance: Tensor, states: Tensor, keep: int) -> Tensor:
    relevance, similarity = scaled(relevance), pairs(states)
    chosen = [int(relevance.argmax())]
    while len(chosen) < keep:
        covered = similarity[chosen].max(0).values
        free = torch.ones_like(covered, dtype=torch.bool)
        free[chosen] = False
        gain = (similarity - covered).clamp(min=0).sum(1)[free]
        score = relevance[free] + 0.5 * scaled(gain) + 0.5 * scaled(1 - covered[free])
        chosen.append(int(free.nonzero()[score.argmax()]))
    return torch.tensor(sorted(chosen))


# 2609.03158, from second-hand notes
def coverpruner(book, tokens, keep):
    demand = attention(tokens, tokens.question).sum(0)
    return covering(pairs(tokens.features - tokens.features.mean(0)), demand, torch.ones_like(demand), keep)


# 2510.24214
def scope(book, tokens, keep):
    saliency = cls_row(tokens)
    return covering(pairs(tokens.features), torch.ones_like(saliency), saliency, keep)


def covering(similarity: Tensor, demand: Tensor, value: Tensor, keep: int) -> Tensor:
    covered, chosen = torch.zeros_like(demand), list[int]()
    while len(chosen) < keep:
        score = (demand * (similarity - covered).clamp(min=0)).sum(1) * value
        score[chosen] = -1
        chosen.append(int(score.argmax()))
        covered = torch.maximum(covered, similarity[chosen[-1]])
    return torch.tensor(sorted(chosen))


# CVPR 2026, from second-hand notes
def score(book, tokens, keep):
    salience, distance = cls_row(tokens), 1 - pairs(tokens.features)
    chosen = [int(salience.argmax())]
    while len(chosen) < keep:
        far = salience * distance[chosen].min(0).values
        far[chosen] = -1
        chosen.append(int(far.argmax()))
    return torch.tensor(sorted(chosen))


# 2602.02951, equation 3, with the regions of its code
def nuwa(book, tokens, keep):
    rows, cols = tokens.grid
    salience = cls_row(tokens) * tokens.vision.key[:, 1:].norm(dim=(0, 2))
    places = torch.arange(rows * cols).view(rows // 2, 2, cols // 2, 2).transpose(1, 2).reshape(-1, 4)
    best = salience[places].sort(1, descending=True).indices
    ranked = places.gather(1, best).T  # the first of all regions, then the second, ...
    full, rest = divmod(keep, len(places))
    return torch.cat([ranked[:full].flatten(), ranked[full][top(salience[ranked[full]], rest)]]).sort().values


# github.com/yuanyuanjia71-spec/S2Prune
def s2prune(book, tokens, keep):
    rows, cols = tokens.grid
    grey = (tokens.pixels * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0)
    kernel = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])
    laplacian = conv2d(pad(grey[None, None], (1, 1, 1, 1), mode="replicate"), kernel[None, None])[0, 0]
    parts, (high, wide) = int((keep / 2) ** 0.5), (grey.shape[0] // rows, grey.shape[1] // cols)
    ends = [[round(i * side / parts) for i in range(parts + 1)] for side in (rows, cols)]
    regions = [(a, b, c, d) for a, b in pairwise(ends[0]) for c, d in pairwise(ends[1])]
    spread = [laplacian[a * high : b * high, c * wide : d * wide].var(correction=0) for a, b, c, d in regions]
    share = scaled(torch.stack(spread).double())
    quota = share / share.sum() * (keep - len(regions))
    counts = 1 + quota.floor()
    counts[(quota - quota.floor()).argsort(descending=True, stable=True)[: int(keep - counts.sum())]] += 1
    moved, chosen = (tokens.hidden - tokens.features).norm(dim=-1), []
    for region, count in zip(regions, counts.tolist(), strict=True):
        cells = [region]
        while len(cells) < count:
            i = max(range(len(cells)), key=lambda i: (cells[i][1] - cells[i][0]) * (cells[i][3] - cells[i][2]))
            a, b, c, d = cells[i]
            down, across = (a + b) // 2, (c + d) // 2
            halves = [(a, down, c, d), (down, b, c, d)] if b - a >= d - c else [(a, b, c, across), (a, b, across, d)]
            cells[i : i + 1] = halves
        for a, b, c, d in cells:
            own = (torch.arange(a, b)[:, None] * cols + torch.arange(c, d)).flatten()
            chosen.append(int(own[moved[own].argmax()]))
    return torch.tensor(sorted(chosen))


# 2510.14624
def evs(book, frames, keep):
    x = normalize(torch.stack([frame.whole for frame in frames]), dim=-1)
    change = torch.cat([torch.full_like(x[:1, :, 0], torch.inf), 1 - (x[1:] * x[:-1]).sum(-1)])
    return top(change.flatten(), keep)


# 2505.14454, from notes on paper and code
def vidcom2(book, frames, keep):
    x = torch.stack([frame.whole for frame in frames])
    count, n, width = x.shape
    x = normalize(x[..., x.flatten(0, 1).var(0).topk(width // 2, largest=False).indices], dim=-1)
    to_video, to_frame = (
        sum(torch.exp(-((x - centre) ** 2).sum(-1) / (2 * 2.0**power)) for power in range(-3, 2))
        for centre in (x.mean((0, 1)), x.mean(1, keepdim=True))
    )
    unusual = (-to_video.mean(1) / 0.01).softmax(0)
    scale = 1 + unusual - unusual.mean()
    quota = (keep * scale / scale.sum()).tolist()
    counts = [int(own) for own in quota]
    for i in sorted(range(count), key=lambda i: counts[i] - quota[i])[: keep - sum(counts)]:
        counts[i] += 1
    kept = [top(-own, k) + i * n for i, (own, k) in enumerate(zip(to_video + to_frame, counts, strict=True))]
    return torch.cat(kept)


# 2502.11501
def pool(book, tokens, keep):
    rows, cols = tokens.grid
    down = round((keep * rows / cols) ** 0.5)
    while keep % down:
        down -= 1
    image = tokens.hidden.T.reshape(1, -1, rows, cols)
    return adaptive_avg_pool2d(image, (down, keep // down)).flatten(2)[0].T


def random(book, tokens, keep):
    return torch.randperm(len(tokens))[:keep].sort().values


# Gonzalez, 1985
def farthest(book, tokens, keep):
    unit = normalize(tokens.features.float(), dim=-1)
    chosen = [int(cosines(tokens.features, tokens.features.mean(0, keepdim=True)).argmin())]
    nearest = unit @ unit[chosen[0]]
    while len(chosen) < keep:
        nearest[chosen] = torch.inf
        chosen.append(int(nearest.argmin()))
        nearest = torch.maximum(nearest, unit @ unit[chosen[-1]])
    return torch.tensor(sorted(chosen))


# docs/method.md
def codebook_farthest(book, tokens, keep):
    similarity, prior = pairs(tokens.features), cosines(tokens.features, book.prototypes).max(1)
    chosen: list[int] = []
    while len(chosen) < keep - 4:
        nearest = torch.maximum(prior.values, similarity[chosen].max(0).values) if chosen else prior.values.clone()
        nearest[chosen] = torch.inf
        chosen.append(int(nearest.argmin()))
    while len(chosen) < keep:
        covered = similarity[chosen].max(0).values
        gain = (similarity - covered).clamp(min=0).sum(1)
        gain[chosen] = -torch.inf
        chosen.append(int(gain.argmax()))
    return torch.tensor(sorted(chosen))


def mass(book, tokens, keep):
    similarity = cosines(tokens.hidden, tokens.hidden[:keep])
    similarity[torch.arange(keep), torch.arange(keep)] = torch.inf
    return similarity.argmax(1).bincount(minlength=keep).log()


PUBLISHED: dict[str, Rule] = {
    "alpha": alpha,
    "anchorprune": anchorprune,
    "cdpruner": cdpruner,
    "cen-cdpruner": cen_cdpruner,
    "cen-divprune": cen_divprune,
    "cls": cls,
    "codebook": codebook,
    "codebook-farthest": codebook_farthest,
    "codebook-threshold": codebook_threshold,
    "coverpruner": coverpruner,
    "dart": dart,
    "divprune": divprune,
    "evs": evs,
    "farthest": farthest,
    "fastv": fastv,
    "fastv-image": fastv_image,
    "fastv-norope": fastv_norope,
    "fastv-reverse": fastv_reverse,
    "fastv-vis": fastv_vis,
    "fastv-window": fastv_window,
    "feather-ensemble": feather_ensemble,
    "nuwa": nuwa,
    "phi-knn": phi_knn,
    "pool": pool,
    "random": random,
    "s2prune": s2prune,
    "scope": scope,
    "score": score,
    "sparsevlm": sparsevlm,
    "tops": tops,
    "tops-text": tops_text,
    "uniform": uniform,
    "vidcom2": vidcom2,
    "visionzip": visionzip,
    "+mass": mass,
}
"""By the names of the methods; `downsample` encodes the image anew, and `drop` has nothing to choose."""
SAME = ("anchorprune", "cdpruner", "cen-cdpruner", "cen-divprune", "cls", "codebook", "codebook-farthest",
        "coverpruner", "dart", "divprune", "evs", "farthest", "fastv", "fastv-image", "fastv-norope", "fastv-reverse",
        "fastv-vis", "nuwa", "s2prune", "scope", "score", "tops", "tops-text", "vidcom2")  # fmt: skip
"""Those that keep the very tokens that the method keeps; the others leave something open, or draw."""
