"""Later questions on an image that the first one has pruned, against plain loops of the stock model."""

import pytest
import torch

from codebook import CodebookError, Schedule, Stage, Uniform, load
from codebook.cli.data import load_data, load_samples
from codebook.inference.conversation import answer_sample, common_start, converse, shorten_cache
from codebook.inference.prompts import prepare
from codebook.inference.samples import read_samples, samples_digest
from codebook.models.chat import next_turn
from codebook.pruning.methods import FastV
from tests import reference
from tests.models.cells import model as model_of
from tests.models.families import FAMILIES

NEW = 6


@pytest.fixture(scope="module")
def loaded():
    model, processor = load("miniature", "cpu")
    first, later = load_data(["miniature:turns"], 8, seed=5)
    return model, processor, first.samples, later.samples


def test_the_same_questions_are_asked_alone_and_later(loaded):
    _, _, first, later = loaded
    for row, (one, two) in enumerate(zip(first, later, strict=True)):
        assert (one.question, one.answer, one.images) == (two.question, two.answer, two.images)
        assert two.earlier == (first[row ^ 1].question,) and first[row ^ 1].images == one.images and not one.earlier
    tasks = load_data(["miniature:turns"], 7)
    assert [task.name for task in tasks] == ["turn 1", "turn 2"] and [len(task.samples) for task in tasks] == [7, 7]
    assert tasks[0].groups == tasks[1].groups == [[0, 1], [2, 3], [4, 5], [6]]
    assert samples_digest(first) != samples_digest(later)


def test_unpruned_a_fresh_question_is_answered_as_if_alone(loaded):
    model, processor, first, later = loaded
    for one, two in zip(first[:4], later[:4], strict=True):
        inputs = prepare(model, processor, [one.pictures()], [one.question]).inputs
        with torch.no_grad():
            ids = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        alone = processor.decode(ids, skip_special_tokens=True).strip()
        assert answer_sample(model, processor, two, None, NEW).text == alone


def masked_greedy(model, inputs, gone):
    """A plain loop without a cache: dropped columns are hidden from every later column of the layers they left."""
    ids, made = inputs["input_ids"], []
    end = model.generation_config.eos_token_id
    embeds = reference.merged(model, ids, inputs["pixel_values"])
    for _ in range(NEW):
        token = reference.logits(model, embeds, torch.ones_like(gone), gone).argmax(-1, keepdim=True)
        made.append(int(token))
        if made[-1] == end:
            break
        embeds = torch.cat([embeds, model.get_input_embeddings()(token)], 1)
        gone = torch.cat([gone, torch.full((1, 1), 10**6)], 1)
    return made


def gone_of(model, ids, kept, layer):
    """For each column the first layer that does without it."""
    columns = (ids[0] == model.config.image_token_id).nonzero()[:, 0]
    gone = torch.full_like(ids, 10**6)
    gone[0, columns] = layer
    gone[0, columns[kept]] = 10**6
    return gone


@torch.no_grad()
@pytest.mark.parametrize(("pruner", "layer"), [(FastV(), 2), (Uniform(), 0)], ids=["fastv", "uniform"])
def test_a_fresh_question_sees_what_the_first_one_left(loaded, pruner, layer):
    """Against the stock model on the second prompt, with the tokens hidden that the FIRST prompt's attention drops."""
    model, processor, _, later = loaded
    schedule = Schedule([Stage(layer, 12, pruner)])
    differ = 0
    for row in range(3):
        two = later[row]
        pictures = two.pictures()
        prompts = [prepare(model, processor, [pictures], [q]).inputs for q in (*two.earlier, two.question)]
        kept = []
        for inputs in prompts:
            with schedule(model) as pruning:
                model(**inputs)
            kept.append(pruning.kept[0][-1])
        answer = answer_sample(model, processor, two, schedule, NEW)
        assert answer.kept == [kept[0].tolist()] and answer.counts == [[144, 12]]
        differ += not torch.equal(*kept)
        ids = masked_greedy(model, prompts[1], gone_of(model, prompts[1]["input_ids"], kept[0], layer))
        assert answer.text == processor.decode(ids, skip_special_tokens=True).strip()
    assert (differ > 0) == isinstance(pruner, FastV)  # FastV asks the question, an even grid does not


@torch.no_grad()
def test_a_conversation_is_the_stock_models_own(loaded):
    """With history: each turn against the stock model that reads the whole conversation anew."""
    model, processor, first, _ = loaded
    questions = [first[0].question, first[1].question, first[0].question]
    answers = converse(model, processor, first[0].pictures(), questions, None, NEW)
    turns = []
    for i, question in enumerate(questions):
        shown = [{"type": "image"}] if i == 0 else []
        turns.append({"role": "user", "content": [*shown, {"type": "text", "text": question}]})
        text = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        inputs = processor(images=first[0].pictures(), text=text, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        said = processor.decode(ids, skip_special_tokens=True).strip()
        assert answers[i].text == said
        turns.append({"role": "assistant", "content": [{"type": "text", "text": said}]})


@torch.no_grad()
@pytest.mark.parametrize("name", ["llava_next", "internvl", "idefics3"])
def test_a_cache_taken_back_to_the_images_of_other_families(name):
    """A second prompt on the first one's cache: the logits of the stock model that reads the second alone."""
    tiny, target = FAMILIES[name], model_of(name, "sdpa")
    first, second = tiny.inputs([[3, "image", 8, 9, 10]]), tiny.inputs([[3, "image", 12, 13]])
    length = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with Schedule([])(target, "thread"):
        cache = target.generate(**first, **length).past_key_values
        ids = second["input_ids"]
        shorten_cache(cache, common_start(target, first["input_ids"], ids))
        ours = target.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **length
        ).logits
    theirs = target.generate(**second, **length).logits
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


def test_what_is_between_two_answers(loaded):
    _, processor, _, _ = loaded
    ids = next_turn(processor, "describe.", 1, "read the number.")
    assert processor.decode(ids).split() == ["</s>", "<user>", "read", "the", "number", ".", "<assistant>"]
    plain = processor.chat_template
    try:
        processor.chat_template = "{{ bos_token }}{{ messages[-1]['content'][0]['text'] }}"
        with pytest.raises(CodebookError, match="does not show earlier answers"):
            next_turn(processor, "describe.", 1, "read the number.")
    finally:
        processor.chat_template = plain


def test_a_file_with_earlier_questions(loaded, tmp_path):
    _, _, first, _ = loaded
    first[0].pictures()[0].save(tmp_path / "a.png")
    file = tmp_path / "data.jsonl"
    file.write_text('{"image": "a.png", "question": "describe.", "answer": "x", "earlier": ["read the number."]}')
    [sample] = read_samples(file)
    assert sample.earlier == ("read the number.",) and not sample.fresh
    with pytest.raises(CodebookError, match="earlier questions, which `codebook bench` alone asks"):
        load_samples(str(file))


def test_a_family_without_a_reusable_prefix_is_refused(loaded, monkeypatch):
    model, processor, _, later = loaded
    monkeypatch.setattr("codebook.models.llava.Llava.reusable_prefix", False)
    with pytest.raises(CodebookError, match="llava cannot keep what it has read of an image"):
        answer_sample(model, processor, later[0], None, NEW)
