"""Prompts that were processed alone are joined to the batch that the processor makes of them together."""

import pytest
import torch

from codebook import Schedule, Stage, Uniform
from codebook.inference.prompts import Prompts, prepare
from codebook.miniature.samples import of_miniature
from codebook.serving.joining import alike, join
from tests.models.families import FAMILIES
from tests.tiny import PAD

ONE_BY_ONE = {"molmo2"}
"""Families whose prompts are answered alone: which patches make a token is said by their numbers among all images'."""


@pytest.mark.parametrize("families", [["ocr", "box", "rel"], ["multi"]])
def test_joined_prompts_equal_the_processors_batch(loaded, families):
    model, processor, _ = loaded
    samples = of_miniature("test", 0, 3, families)
    pictures, questions = [sample.pictures() for sample in samples], [sample.question for sample in samples]
    alone = [prepare(model, processor, [p], [q]) for p, q in zip(pictures, questions, strict=True)]
    alone = [one for one in alone if alike(alone[0], one)]
    together = [
        (p, q) for p, q in zip(pictures, questions, strict=True) if alike(alone[0], prepare(model, processor, [p], [q]))
    ]
    joined = join(alone, processor.tokenizer.pad_token_id)
    reference = prepare(model, processor, *zip(*together, strict=True))
    assert len(alone) > 1 and joined.images == reference.images
    assert joined.inputs.keys() == reference.inputs.keys()
    for name, tensor in reference.inputs.items():
        assert torch.equal(joined.inputs[name], tensor), name


def test_prompts_with_and_without_pictures_are_not_alike(loaded):
    model, processor, _ = loaded
    [sample] = of_miniature("test", 0, 1, ["ocr"])
    one, none = (prepare(model, processor, [p], [sample.question]) for p in (sample.pictures(), []))
    assert not alike(one, none) and not alike(none, one)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_every_family_answers_joined_prompts_as_alone(family):
    """Pruned, next-token logits of both rows; what cannot be joined is not alike."""
    model = family.make()
    rows = [[5, 6, "image", 7, 8, 9], [10, "image", 11, 12, 13, 14, 15, 16]]
    alone = [Prompts(family.inputs([row]), [1]) for row in rows]
    assert not alike(alone[0], Prompts(family.inputs([[5, "image", 6, "image"]]), [2]))
    assert alike(*alone) == (family.name not in ONE_BY_ONE)
    if family.name in ONE_BY_ONE:
        return
    schedule = Schedule([Stage(0, 0.5, Uniform())])

    def logits(prompts):
        with torch.inference_mode(), schedule(model):
            out = model.generate(
                **prompts.inputs, max_new_tokens=2, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
        return torch.stack(out.logits, 1)

    joined, expected = logits(join(alone, PAD)), torch.cat([logits(one) for one in alone])
    assert (joined - expected).abs().max() <= family.tolerance * expected.abs().max()
