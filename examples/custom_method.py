"""A pruning method of your own, without touching the package: `python examples/custom_method.py`.

It keeps the tokens that differ most from the image's mean token. CONTRIBUTING.md says how a method gets a name for the
command line.
"""

from dataclasses import dataclass

from torch import Tensor

from codebook import Schedule, Stage, VisualTokens, ask, load
from codebook.miniature.samples import of_miniature
from codebook.pruning.methods.base import ScoringPruner


@dataclass(frozen=True)
class FarFromMean(ScoringPruner):
    """Keeps the tokens that are farthest from the mean of the image's features."""

    def score(self, tokens: VisualTokens) -> Tensor:
        features = tokens.features.float()
        return (features - features.mean(0)).norm(dim=-1)


def main() -> None:
    model, processor = load("miniature")
    [sample] = of_miniature("test", 0, 1, ["ocr"])
    schedule = Schedule([Stage(0, 0.2, FarFromMean(), mass=True)])
    [answer] = ask(model, processor, [sample.pictures()], [sample.question], schedule)
    print(f"{sample.question} {answer.text} (truth: {sample.answer}), from {len(answer.kept[0])} of 144 visual tokens")


if __name__ == "__main__":
    main()
