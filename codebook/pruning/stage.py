"""One stage of a schedule: from the input of one decoder layer on, only some visual tokens stay."""

from __future__ import annotations

import math
from dataclasses import dataclass

from codebook.errors import CodebookError, quoted
from codebook.pruning.methods import Method, Pruner
from codebook.pruning.text import DROP, MASSES, Mass, spell, spell_mass

Keep = int | float
"""Number of visual tokens that stay: a count, or a fraction of the image's."""


def whole(tokens: float) -> int:
    """The whole tokens in a number of tokens, never more: 28 in 28.8. Float rounding, 1e-6 of a token, is tolerated."""
    return math.floor(tokens + 1e-6)


def tokens_kept(share: float, total: int) -> int:
    """How many of `total` tokens a fraction of them keeps: no more than it says, and at least one."""
    return max(1, whole(share * total))


@dataclass(frozen=True)
class Stage:
    """One stage of pruning: from the input of one decoder layer on, only some visual tokens stay.

    Attributes
    ----------
    layer
        Decoder layer, 0-based, whose input loses the tokens; layers before it see them all. 0 prunes before the LLM.
    keep
        A float in (0, 1]: that fraction of each image's unpruned tokens, never more, but at least one. An int: that
        many tokens of each image; 0, at layer 1 or later, drops them all (VTW, arXiv 2405.05803). None, the only choice
        of `adaptive` pruners: as many as the pruner decides for each image.
    pruner
        Chooses the tokens.
    mass
        Whether each kept token also stands for the dropped ones that are most like it: from this layer on, the
        logarithm of how many tokens it stands for is added to every attention logit towards it. "distance": with
        RESTORE's calibration, which adds more the further the query is.

    Notes
    -----
    With `mass` attention is proportional to size, as in ToMe (arXiv 2210.09461), without merging. Most like is the
    highest cosine similarity of hidden states at the layer's input, before any merging, in the same image, crop or
    frame. A later stage passes on what its dropped tokens stood for, if it has `mass`, and forgets it otherwise.

    RESTORE (arXiv 2606.01711) adds log(s (2 - D(t))) for a token that stands for s and is t positions away
    (`codebook.pruning.distance`) while the prompt that shows the image is read, and log s from there on. In the
    decoder's first layer s is the image's, crop's or frame's mean for all of its tokens.
    """

    layer: int
    keep: Keep | None
    pruner: Pruner
    mass: Mass = False

    def __post_init__(self) -> None:
        if not isinstance(self.pruner, Pruner):
            raise CodebookError(f"a stage's pruner is an object, such as Random(), not {quoted(self.pruner)}")
        check_stage(self.layer, self.keep, self.mass, self.pruner, type(self.pruner).__name__)

    @property
    def adaptive(self) -> bool:
        """Whether the pruner decides how many tokens stay."""
        return self.pruner.adaptive

    @property
    def joint(self) -> bool:
        """Whether the pruner chooses among all frames of a film at once."""
        return self.pruner.joint

    def count(self, total: int) -> int:
        """Tokens that stay of an image that had `total` unpruned.

        Raises
        ------
        CodebookError
            If the image has fewer than that, or the pruner decides the number.
        """
        if self.keep is None:
            name = type(self.pruner).__name__
            raise CodebookError(f"{name} at layer {self.layer} decides how many tokens stay: known only after running")
        if isinstance(self.keep, float):
            return tokens_kept(self.keep, total)
        if self.keep > total:
            raise CodebookError(f"cannot keep {self.keep} tokens of an image that has {total}: lower the count")
        return self.keep

    def effect(self) -> tuple[str, str]:
        """How many tokens stay and from where on, in words."""
        if self.keep is None:
            amount = "as many as its method decides"
        else:
            amount = str(self.keep) if isinstance(self.keep, int) else f"{100 * self.keep:.3g}%"
        return amount if self.keep != 0 else "none", f"from layer {self.layer} on" if self.layer else "before the LLM"

    def __repr__(self) -> str:
        return f"Stage({str(self)!r})"

    def __str__(self) -> str:
        at = f"@{self.layer}" if self.layer else ""
        if self.keep == 0:
            return DROP + at
        method = spell(self.pruner) or repr(self.pruner)
        return method + at + ("" if self.keep is None else f":{self.keep}") + spell_mass(self.mass)


def check_stage(layer: int, keep: Keep | None, mass: Mass, pruner: Pruner | Method, name: str) -> None:
    """Raise a CodebookError unless these make a stage; `name` is the pruner's class in the message.

    A method stands for its pruner, so that a text is checked before there is a codebook to make the pruner with.
    """
    if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
        raise CodebookError(f"a stage's layer must be 0 (before the LLM) or a later decoder layer, not {quoted(layer)}")
    if pruner.adaptive != (keep is None):
        if pruner.adaptive:
            raise CodebookError(f"{name} decides how many tokens stay: leave keep out")
        raise CodebookError(f"say how many tokens {name} keeps, or fit its schedule to a budget (Schedule.solve)")
    drops = layer and isinstance(keep, int) and not isinstance(keep, bool) and keep == 0
    if keep is not None and not drops:
        check_keep(keep)
    if mass not in MASSES:
        raise CodebookError(f"mass must be True, False or 'distance', not {quoted(mass)}")
    if mass and drops:
        raise CodebookError("a stage that drops all tokens leaves none to stand for them: leave mass out")
    if layer == 0 and pruner.uses_attention:
        raise CodebookError(f"{name} needs the attention of the layer before: use it at layer 1 or later")
    if layer == 0 and pruner.uses_change:
        raise CodebookError(f"{name} needs what a layer has made of the tokens: use it at layer 1 or later")
    if layer and pruner.before_llm:
        raise CodebookError(
            f"{name} encodes the image anew, and works before the LLM only: leave it out of later layers"
        )


def check_keep(keep: Keep) -> None:
    """Raise unless `keep` is a fraction in (0, 1] or a count of at least 1."""
    fraction = isinstance(keep, float) and math.isfinite(keep) and 0 < keep <= 1
    count = isinstance(keep, int) and not isinstance(keep, bool) and keep >= 1
    if not fraction and not count:
        # On the command line a keep is a float whatever is written.
        count = isinstance(keep, float) and keep >= 1 and keep.is_integer()
        how = f"; a count is said in a schedule, without a point, as in random:{keep:.0f}" if count else ""
        raise CodebookError(
            f"keep must be a fraction in (0, 1] or a count of tokens, 1 or more; not {quoted(keep)}{how}"
        )
