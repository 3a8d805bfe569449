"""Prompts that were processed alone are joined to the batch that the processor makes of them together."""

import torch

from codebook.inference.prompts import prepare
from codebook.miniature.samples import of_miniature
from codebook.serving.joining import alike, join


def test_joined_prompts_equal_the_processors_batch(loaded):
    model, processor, _ = loaded
    samples = of_miniature("test", 0, 1, ["ocr", "multi", "box"])
    pictures, questions = [sample.pictures() for sample in samples], [sample.question for sample in samples]
    alone = [prepare(model, processor, [p], [q]) for p, q in zip(pictures, questions, strict=True)]
    assert all(alike(alone[0], other) for other in alone)
    joined, together = join(alone, processor.tokenizer.pad_token_id), prepare(model, processor, pictures, questions)
    assert joined.images == together.images == [1, 3, 1]
    assert joined.inputs.keys() == together.inputs.keys()
    for name, tensor in together.inputs.items():
        assert torch.equal(joined.inputs[name], tensor), name


def test_prompts_with_and_without_pictures_are_not_alike(loaded):
    model, processor, _ = loaded
    [sample] = of_miniature("test", 0, 1, ["ocr"])
    one, none = (prepare(model, processor, [p], [sample.question]) for p in (sample.pictures(), []))
    assert not alike(one, none) and not alike(none, one)
