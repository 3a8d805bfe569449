"""What a model's `generation_config` forbids or favours by its prompt: in a batch with padding as alone."""

import pytest
import torch

import codebook
from codebook import Schedule
from codebook.inference.ask import generate
from codebook.inference.padding import READERS
from codebook.inference.prompts import prepare
from codebook.miniature.samples import of_miniature
from codebook.serving.joining import join


@pytest.fixture(scope="module")
def asked():
    """(model, prompts of unlike lengths, their tokens when nothing is set)."""
    model, processor = codebook.load("miniature", "cpu")
    samples = of_miniature("test", 0, 2, ["ocr", "rel"])
    alone = [prepare(model, processor, [sample.pictures()], [sample.question]) for sample in samples]
    assert len({one.inputs["input_ids"].shape[1] for one in alone}) > 1
    return model, alone, [answer(model, one)[0] for one in alone]


def answer(model, prompts):
    """The tokens of each row, up to its end."""
    end = model.generation_config.eos_token_id
    rows = generate(model, prompts, Schedule([]), max_new_tokens=8, do_sample=False).tokens.tolist()
    return [row[: row.index(end)] if end in row else row for row in rows]


SETTINGS = {
    "encoder_repetition_penalty": 100.0,
    "repetition_penalty": 100.0,
    "no_repeat_ngram_size": 1,
    "encoder_no_repeat_ngram_size": 1,
    "min_length": 150,
}


@pytest.mark.parametrize("name", READERS)
def test_each_row_of_a_padded_batch_is_answered_as_alone(asked, monkeypatch, name):
    """Also where the padding token is one that the model says, as it is where it also ends an answer."""
    model, alone, plain = asked
    shortest, longest = sorted(one.inputs["input_ids"].shape[1] for one in alone)[:: len(alone) - 1]
    value = SETTINGS[name] if name != "min_length" else (shortest + longest) // 2 + 4
    monkeypatch.setattr(model.generation_config, name, value)
    expected = [answer(model, one)[0] for one in alone]
    for padding in {token for tokens in plain for token in tokens}:
        assert answer(model, join(alone, padding)) == expected, padding


def test_a_batch_without_padding_is_left_to_generate(asked, monkeypatch):
    model, alone, _ = asked
    for name, value in SETTINGS.items():
        monkeypatch.setattr(model.generation_config, name, value)
    [tokens] = generate(model, alone[0], Schedule([]), max_new_tokens=8, do_sample=False).tokens
    with torch.inference_mode():
        stock = model.generate(**alone[0].inputs, max_new_tokens=8, do_sample=False)
    assert torch.equal(stock[0, -len(tokens) :], tokens)
