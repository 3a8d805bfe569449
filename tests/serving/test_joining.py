"""Prompts that were processed alone are joined to the batch that the processor makes of them together."""

import pytest
import torch

from codebook.inference.prompts import prepare
from codebook.miniature.samples import of_miniature
from codebook.serving.joining import alike, join


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
