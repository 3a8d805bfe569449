"""A model whose outputs are NaN says so, wherever it is asked."""

import pytest
import torch

from codebook import Schedule, ask, models
from codebook.analysis import likelihood, sweep, token_information
from codebook.errors import CodebookError
from codebook.inference.prompts import prepare_samples
from codebook.inference.respond import respond
from codebook.miniature.samples import of_miniature
from codebook.models.finite import check_logits

WRONG = "not numbers \\(NaN\\)"


@pytest.fixture(scope="module")
def samples():
    return of_miniature("test", 0, 2, ["exist"])


@pytest.fixture(params=["tower", "decoder", "head"])
def damaged(request):
    """The miniature with one weight that is no number."""
    model, processor = models.load("miniature", "cpu")
    parts = {"tower": model.base_model.multi_modal_projector, "decoder": model.get_decoder(), "head": model.lm_head}
    with torch.no_grad():
        next(p for p in parts[request.param].parameters() if p.dim() > 1)[-1, -1] = torch.nan
    if request.param == "decoder":  # its first weights are the words' embeddings
        with torch.no_grad():
            model.get_decoder().layers[-1].mlp.down_proj.weight[0, 0] = torch.nan
    return model, processor


def test_answers(damaged, samples):
    damaged[0].generation_config.remove_invalid_values = True  # replaces them, unless told not to
    with pytest.raises(CodebookError, match=WRONG):
        ask(*damaged, [samples[0].pictures()], [samples[0].question])
    with pytest.raises(CodebookError, match=WRONG):
        respond(*damaged, samples, {"": lambda asked: Schedule.parse("uniform:0.5")})


def test_analysis(damaged, samples):
    with pytest.raises(CodebookError, match=WRONG):
        sweep(*damaged, samples)
    with pytest.raises(CodebookError, match=WRONG):
        sweep(*damaged, samples, "generated")
    inputs = prepare_samples(*damaged, samples[:1]).inputs
    with pytest.raises(CodebookError, match=WRONG):
        token_information(damaged[0], inputs, [1], window=6)
    [batch] = likelihood.answer_batches(*damaged, samples[:1])
    with pytest.raises(CodebookError, match=WRONG):
        likelihood.mean_probabilities(damaged[0], batch, Schedule([]))


def test_infinity_is_no_number_and_minus_infinity_rules_a_token_out():
    for value in (torch.nan, torch.inf):
        with pytest.raises(CodebookError, match=WRONG):
            check_logits(torch.tensor([[0.0, value, 1.0]]))
    check_logits(torch.tensor([0.0, -torch.inf, 1e38]))


def test_a_check_does_not_change_what_is_generated(samples):
    """Nor does it stay in the model."""
    model, processor = models.load("miniature", "cpu")
    inputs = prepare_samples(model, processor, samples[:1]).inputs
    plain = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    [answer] = ask(model, processor, [samples[0].pictures()], [samples[0].question], max_new_tokens=8)
    assert answer.text == processor.decode(plain[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert torch.equal(plain, model.generate(**inputs, max_new_tokens=8, do_sample=False))
