"""Schedules by name, with their authors' settings."""

from __future__ import annotations

import math
from dataclasses import replace

from codebook.errors import CodebookError, quoted
from codebook.pruning.text import DROP, UNPRUNED, ScheduleText, StageText, check_length, read_text, split

DEFAULT = "seeded-middle"
"""Schedule where the user says none: docs/method.md."""

KEEP = 0.2
"""Budget where neither the user nor the schedule says one."""

DEPTH = 32
"""Decoder layers of the models that the authors' layers belong to; other depths scale (`scaled`)."""

HORIZON, DROP_HORIZON = 20, 21
"""Layers of a hybrid's second stage in LLaVA-1.5-7B, where it is random and where it drops all (arXiv 2512.07580)."""

DEEP_SHARE = 1 / 7
"""Tokens of a hybrid's second stage, as a share of the first stage's. The paper's rows have 38/284, 38/252, 10/96 and
27/60: their median is 0.14."""

RESERVE = 0.2
"""Share of what `deft` drops in the end that it keeps until its second stage (arXiv 2609.34861)."""

SCHEDULE_PRESETS: dict[str, str] = {
    "deft": "cls:0.361112, fastv(query='question')@16:0.199653",
    "feather": "feather-ensemble(share=0.2941)@8:0.37723, fastv-norope@16:0.032922",
    "nuwa-2": "nuwa:0.388889, fastv@16:0.055556",
    "pyramiddrop": "fastv(own_layer=True)@8:0.5, fastv(own_layer=True)@16:0.25, fastv(own_layer=True)@24:0.125"
    "; positions=compact",
    "sparsevlm": "sparsevlm@3:0.536459, sparsevlm@7:0.354167, sparsevlm@16:0.196181; positions=compact",
    "tops-2": "tops:0.444445, tops-text@12:0.222223, tops-text@24:0.055556; positions=compact",
    "vtw": "drop@16",
}
"""The presets that are more than one method: their text, for decoders of 32 layers, as the authors report them. Shares
are the authors' counts divided by their images' tokens, rounded up at the sixth digit.

DeFT with K = 115 of N = 576 tokens, and M = K + 0.2 (N - K) = 208 until half of the layers are through: arXiv
2609.34861, from notes on the paper. Its budget is the final one, K, here 0.2 where the average over the layers is 0.28;
fitted to an average, K is solved from it. FEATHER at R = 0.7: 275 and 24 of 729 tokens, 81 of the 275 its grid (arXiv
2412.13180). Nuwa with 224 and 32 of 576 tokens, 128 on average (arXiv 2602.02951, table 10); its second stage is that
of its code, the last token's attention. PyramidDrop: arXiv 2410.17247. SparseVLM with 300, 200 and 110 of 576 tokens,
and 9, 4 and 3 averages on top; its code prunes what layers 2, 6 and 15 give, which is what layers 3, 7 and 16 get:
arXiv 2410.04417. TOPS with 256, 128 and 32 of 576 tokens: its authors call this 128, and the average is 152 (arXiv
2606.27161, table 9). The code of PyramidDrop and SparseVLM, and TOPS' algorithm, renumber positions. VTW at K = 16:
arXiv 2405.05803.
"""


DEFERRED = "deft"
"""The preset whose stages keep no fixed proportions: M follows from K."""

WITHDRAWAL = "vtw"
"""The preset whose one layer is the information horizon's."""


def scaled(layer: int, layers: int) -> int:
    """Layer of a decoder of `layers` in the place of one of 32: round(layer * layers / 32), 1 or later unless 0."""
    return max(1, (2 * layer * layers + DEPTH) // (2 * DEPTH)) if layer else 0


def expand(
    text: str, layers: int, horizon: int | None = None, deep: int | None = None, budget: float | None = None
) -> tuple[ScheduleText, bool]:
    """The stages of a schedule's text or of the preset that it names, each with layer and keep.

    Parameters
    ----------
    text
        A schedule's text; a preset of `SCHEDULE_PRESETS`; one method alone, before the LLM, or at its default layer of
        32 where it cannot stand there, unless it names its layer; or a hybrid `first+second`, two methods that may name
        their layers.
    layers
        Number of decoder layers. A preset's layers scale to it (`scaled`) and stay ascending.
    horizon
        Layer of a hybrid's second stage, or of `vtw`; default: 20 of 32, 21 to drop all, 16 for `vtw`.
    deep
        Tokens of a hybrid's second stage; default: 1/7 of the first's.
    budget
        Visual tokens averaged over the layers, as a fraction, that the schedule will be fitted to: `deft`'s keeps are
        then those that meet it, up to whole tokens. None: the authors' keeps.

    Returns
    -------
    stages and settings
    whether the keeps are proportions only, so that a budget is still to be given
    """
    name, semicolon, rest = check_length(text).partition(";")
    preset = SCHEDULE_PRESETS.get(name.strip())
    hybrid = preset is None and len(split(name, "+")) > 1
    withdrawal = name.strip() == WITHDRAWAL
    if (horizon is not None and not (hybrid or withdrawal)) or (deep is not None and not hybrid):
        raise CodebookError(f"horizon and deep are a hybrid's, as in codebook+random; {quoted(name.strip())} is none")
    if preset is not None:
        own, said = read_text(preset), read_text(UNPRUNED + semicolon + rest)
        stages = _ascending(own.stages, layers)
        if horizon is not None:
            stages = (replace(stages[0], layer=horizon),)
        if budget is not None and name.strip() == DEFERRED:
            stages = _reserved(stages, layers, budget)
        return ScheduleText(stages, own.settings | said.settings), False
    written = read_text(text, "+" if hybrid else ",", SCHEDULE_PRESETS)
    if hybrid:
        return replace(written, stages=_hybrid(written.stages, layers, horizon, deep)), True
    if len(written.stages) == 1 and _is_open(written.stages[0]):
        return replace(written, stages=(_first(written.stages[0], layers),)), True
    return written, False


def leaves_horizon(text: str, fitted: bool) -> bool:
    """Whether the layer of a text's last stage is the information horizon's, which depends on the model.

    Parameters
    ----------
    fitted
        Whether the schedule will be fitted to a budget, which moves the layer of `vtw`.
    """
    name = check_length(text).partition(";")[0]
    if name.strip() in SCHEDULE_PRESETS:
        return name.strip() == WITHDRAWAL and not fitted
    return len(split(name, "+")) > 1 and read_text(text, "+", SCHEDULE_PRESETS).stages[-1].layer is None


def needs_codebook(text: str) -> bool:
    """Whether a schedule's text, a preset or a hybrid names a method that is made with a codebook."""
    return expand(text, layers=1)[0].needs_codebook


def feather(removed: float, n: int) -> str:
    """FEATHER's text from its R, the fraction of tokens removed, for images of `n` tokens (arXiv 2412.13180).

    The first stage is the union of the top (1 - R) n by phi_-R and the stride-3 grid, n / 9, less the (1 - R) / 9 that
    both are expected to choose: 275 of 729 tokens at R = 0.7, 243 at 0.75. The second keeps (1 - R)^2 of it, cut off.
    """
    first = n * (1 - 8 * removed / 9)
    share = round(1 / (9 - 8 * removed), 4)
    return f"feather-ensemble(share={share})@8:{round(first)}, fastv-norope@16:{int(first * (1 - removed) ** 2)}"


def _is_open(stage: StageText) -> bool:
    """Whether a budget decides how many tokens the stage keeps."""
    return stage.keep is None and stage.method != DROP and not stage.entry.adaptive


def _ascending(stages: tuple[StageText, ...], layers: int) -> tuple[StageText, ...]:
    placed: list[StageText] = []
    before = -1
    for stage in stages:
        before = max(scaled(stage.layer or 0, layers), before + 1)
        placed.append(replace(stage, layer=before))
    return tuple(placed)


def _reserved(stages: tuple[StageText, ...], layers: int, budget: float) -> tuple[StageText, ...]:
    """DeFT's two stages at a budget: shares k at the end and m = k + RESERVE (1 - k) before, their average the budget.

    With f the share of the layers before the second stage, f m + (1 - f) k = budget.
    """
    first, second = stages
    before = (second.layer or 0) / layers
    final = min(1.0, (budget - before * RESERVE) / (1 - before * RESERVE))
    if final <= 0:
        least = (math.floor(10**4 * before * RESERVE) + 1) / 10**4
        raise CodebookError(
            f"keep {budget:g} is out of reach of {DEFERRED}, which keeps {RESERVE:g} and more until layer "
            f"{second.layer} of {layers}: choose from {least:g} to 1, averaged over the layers"
        )
    return replace(first, keep=final + RESERVE * (1 - final)), replace(second, keep=final)


def _first(stage: StageText, layers: int) -> StageText:
    later = stage.entry.uses_attention or stage.entry.uses_change
    default = scaled(stage.entry.kind.default_layer, layers) if later else 0
    return replace(stage, layer=default if stage.layer is None else stage.layer, keep=1.0)


def _hybrid(stages: tuple[StageText, ...], layers: int, horizon: int | None, deep: int | None) -> tuple[StageText, ...]:
    if len(stages) != 2:
        stages[-1].fail("a hybrid is two methods, first+second")
    first, second = stages
    if not _is_open(first):
        first.fail("the first method of a hybrid must leave its keep to the budget")
    drop = second.method == DROP
    if deep is not None and (drop or second.keep is not None):
        second.fail("how much it keeps is said already: leave deep out")
    if horizon is not None and second.layer is not None:
        second.fail("its layer is said already: leave horizon out")
    first = _first(first, layers)
    if second.layer is None:
        default = max(scaled(DROP_HORIZON if drop else HORIZON, layers), (first.layer or 0) + 1)
        second = replace(second, layer=default if horizon is None else horizon)
    if second.keep is None and not drop:
        second = replace(second, keep=DEEP_SHARE if deep is None else deep)
    return first, second
