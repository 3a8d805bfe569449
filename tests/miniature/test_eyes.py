"""The training of `eyes`: packed rows against the stock model, the projector, resuming, and what ships."""

import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from codebook.errors import CodebookError
from codebook.inference.ask import ask
from codebook.inference.prompts import prepare
from codebook.miniature import eyes_training, tasks
from codebook.miniature.eyes import asked, eyes_model, eyes_processor
from codebook.miniature.eyes_forward import Student, look
from codebook.miniature.eyes_packing import LABELS, VISUAL, Packer
from codebook.miniature.eyes_training import EyesRun, train_eyes
from codebook.miniature.scenes import SHAPES, labels, scene
from codebook.models import load
from codebook.models.gguf import read_gguf
from codebook.models.smollm2 import IMAGE_TOKEN_ID, LAYERS


@pytest.fixture(scope="module")
def gguf(language):
    return read_gguf(language)


@pytest.fixture(scope="module")
def processor(gguf):
    return eyes_processor(gguf)


@pytest.fixture(scope="module")
def built(gguf):
    """The model with two layers, and whatever tower and projector it happens to have."""
    torch.manual_seed(0)
    built = eyes_model(gguf)
    del built.model.language_model.layers[2:]
    return built.eval()


@pytest.fixture(scope="module")
def packer(processor):
    return Packer(processor.tokenizer, seed=3, rows=2, text=92)


@pytest.mark.parametrize("kind", ["scene", "album", "film"])
def test_a_packed_row_is_the_stock_model_asked_one_by_one(built, packer, kind):
    student = Student(built, 0)
    for left in student.left.values():  # zero in the beginning, which would test nothing
        torch.nn.init.normal_(left, std=0.02)
    tensors = {k: torch.from_numpy(v) for k, v in packer.batch(7, kind=kind).items() if k != "kind"}
    places = packer.layouts[kind].places
    with torch.no_grad():
        features, _ = look(student.tower, tensors["pixels"])
        logits = student(features, tensors, places, torch.float32)
        visual = student.projector(features)
        merged = student.merged(torch.float32)
    stock = Stock(built, merged)
    where = torch.stack([tensors["where"] // tensors["tokens"].shape[1], tensors["where"] % tensors["tokens"].shape[1]])
    lost = 0
    for row in range(len(tensors["tokens"])):
        segment, hidden = tensors["segment"][row], tensors["hidden"][row]
        lost += int(hidden.sum())
        vectors = built.get_input_embeddings()(tensors["tokens"][row]).detach().clone()
        for image, place in enumerate(places):
            vectors[place : place + VISUAL] = visual[row * len(places) + image]
        for number in range(1, int(segment.max()) + 1):
            kept = (segment == 0) & ~hidden | (segment == number)
            answers = tensors["target"][row][kept] >= 0
            alone = stock(vectors[kept][None], tensors["position"][row][kept][None], answers)
            mine = logits[(where[0] == row) & (segment[where[1]] == number)]
            torch.testing.assert_close(mine, alone, atol=1e-4, rtol=1e-4)
    assert lost, "no row has lost a token"


class Stock:
    """The stock language model with these matrices."""

    def __init__(self, built, merged):
        self.built, self.weights = built, {}
        for i, (qkv, out, gate_up, down) in enumerate(merged):
            query, key, value = qkv.split([576, 192, 192])
            gate, up = gate_up.chunk(2)
            names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
            names += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
            for name, matrix in zip(names, (query, key, value, out, gate, up, down), strict=True):
                self.weights[f"layers.{i}.{name}.weight"] = matrix

    @torch.no_grad()
    def __call__(self, vectors, positions, answers):
        given = {"inputs_embeds": vectors, "position_ids": positions}
        out = torch.func.functional_call(self.built.model.language_model, self.weights, (), given)
        return self.built.lm_head(out.last_hidden_state[0, answers])


@pytest.mark.parametrize("kind", ["scene", "album", "film"])
def test_a_packed_row_is_what_the_processor_makes(packer, processor, kind):
    """The prefix and a question are the tokens of the chat template, with the answer and the end behind."""
    packed = packer.batch(5, "test", kind)
    layout = packer.layouts[kind]
    segment, tokens = packed["segment"][0], packed["tokens"][0]
    images = packed["pixels"].reshape(-1, layout.images, 96, 96, 3)[0]
    count = int((tokens[segment == 0] == IMAGE_TOKEN_ID).sum()) // VISUAL
    assert count == (1 if kind == "scene" else count) and not packed["hidden"].any()
    for number in (1, int(segment.max())):
        own = tokens[segment == number]
        says = packed["target"][0][segment == number]
        question, _, _ = processor.decode(own).removeprefix("\nQuestion: ").partition("\nAnswer:")
        answer = processor.decode(says[says >= 0], skip_special_tokens=True).strip()
        shown = [{"type": "image"}] * count
        turns = [
            {"role": "user", "content": [*shown, {"type": "text", "text": question}]},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
        text = processor.apply_chat_template(turns, tokenize=False)
        inputs = processor(images=list(images[:count]), text=text, return_tensors="np")
        row = np.concatenate([tokens[segment == 0], own, says[-1:]])
        assert inputs["input_ids"][0].tolist() == row.tolist()
        position = np.concatenate([packed["position"][0][segment == 0], packed["position"][0][segment == number]])
        assert position.tolist() == list(range(len(row) - 1))
    theirs = torch.from_numpy(inputs["pixel_values"])
    assert torch.allclose(theirs, torch.from_numpy(images[:count]).permute(0, 3, 1, 2) / 127.5 - 1, atol=1e-5)


def test_batches(packer):
    one, again = packer.batch(500), packer.batch(500)
    assert all(np.array_equal(one[name], again[name]) for name in one)
    assert not np.array_equal(one["pixels"], packer.batch(505)["pixels"])
    assert {packer.kind(step) for step in range(packer.alone)} == {"scene"}
    assert {packer.kind(step) for step in range(400, 405)} == {"scene", "album", "film"}


def test_tokens_are_lost_whatever_they_show(processor):
    """As often where there is an object as elsewhere, and at every rate."""
    packer = Packer(processor.tokenizer, seed=1, rows=160)
    packed = packer.batch(0, kind="scene")
    place = packer.layouts["scene"].places[0]
    hidden = packed["hidden"][:, place : place + VISUAL]
    rates = hidden.mean(1)
    assert 0.25 < (rates == 0).mean() < 0.55 and rates.max() > 0.85 and ((rates > 0.1) & (rates < 0.3)).any()
    busy = []
    for i in range(160):
        seen = labels(scene("train", 0, 101, 0, i))
        busy.append((seen["shape"] >= 0) | (seen["digit"] >= 0))
    lost = np.array([hidden[i, own].mean() - hidden[i].mean() for i, own in enumerate(busy) if rates[i] and own.any()])
    assert abs(lost.mean()) < 4 * lost.std() / len(lost) ** 0.5 and abs(lost.mean()) < 0.03


def test_the_projector_that_is_solved_for(built, processor):
    """On fresh scenes most patches of an object are nearest to the language model's own word for its shape."""
    built = copy.deepcopy(built)
    eyes_training._take_tower(built)
    eyes_training.solve_projector(built, processor.tokenizer, seed=0, count=150)
    shown = [scene("train", 6, i, dense=True) for i in range(30)]
    pixels = torch.stack([torch.from_numpy(picture.pixels) for picture in shown])
    with torch.no_grad():
        visual = built.model.multi_modal_projector(look(built.model.vision_tower, pixels)[0]).flatten(0, 1)
        words = built.get_input_embeddings().weight
    truth = torch.cat([torch.from_numpy(labels(picture)["shape"]) for picture in shown])
    named = (words - words.mean(0))[[processor.tokenizer(f" {name}")["input_ids"][0] for name in SHAPES]]
    there = truth >= 0
    nearest = F.cosine_similarity(visual[there][:, None], named[None], dim=-1).argmax(1)
    assert (nearest == truth[there]).float().mean() > 0.85  # chance: 0.17
    nothing = ~there & (torch.cat([torch.from_numpy(labels(picture)["digit"]) for picture in shown]) < 0)
    assert visual[nothing].norm(dim=1).mean() < 0.3 * visual[there].norm(dim=1).mean()


@pytest.fixture
def small(monkeypatch, language, gguf, processor, built):
    """Training with a language model of two layers, a step of which takes a fraction of a second."""

    def solve(built, tokenizer, seed):
        torch.manual_seed(seed)
        torch.nn.init.normal_(built.model.multi_modal_projector.linear_2.weight, std=0.02)

    monkeypatch.setattr(eyes_training, "eyes_model", lambda gguf: copy.deepcopy(built))
    monkeypatch.setattr(eyes_training, "solve_projector", solve)
    monkeypatch.setattr(eyes_training, "read_gguf", lambda file: gguf)
    monkeypatch.setattr(eyes_training, "language_tokenizer", lambda gguf: processor.tokenizer)

    def run(out, steps, makers=0, **options):
        return train_eyes(
            out, language, device="cpu", makers=makers, count=0, steps=steps, rows=1, text=44, alone=100, **options
        )

    return run


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(small, tmp_path, monkeypatch, capsys):
    small(tmp_path / "whole", 3, makers=1)
    advance = EyesRun.advance

    def stopping(run, packed):
        if run.step == 2:
            run.save()
            raise KeyboardInterrupt
        return advance(run, packed)

    with monkeypatch.context() as patch:
        patch.setattr(EyesRun, "advance", stopping)
        with pytest.raises(KeyboardInterrupt):
            small(tmp_path / "parts", 3)
    small(tmp_path / "parts", 3)
    one, other = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "parts"))
    assert one["step"] == other["step"] == 3
    for name, weights in one["student"].items():
        assert torch.equal(weights, other["student"][name]), name
    with pytest.raises(CodebookError, match="is of --seed 0"):
        small(tmp_path / "parts", 3, seed=1)
    with pytest.raises(CodebookError, match="unknown training option"):
        small(tmp_path / "parts", 3, speed=1)
    log = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == 3 and set(log[-1]["held_out"]) <= set(LABELS)


def test_a_run_that_diverges_goes_back_at_half_the_rates(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(eyes_training, "WATCH", 1)
    advance = EyesRun.advance

    def spoiling(run, packed):
        loss, seen = advance(run, packed)
        if run.step == 1:
            with torch.no_grad():
                run.student.left["q_proj"].fill_(torch.nan)
            loss = loss * torch.nan
        return loss, seen

    monkeypatch.setattr(EyesRun, "advance", spoiling)
    small(tmp_path, 3, precise=False)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["calm"] == 0.5 and state["step"] == 3
    assert all(weights.isfinite().all() for weights in state["student"].values())


@pytest.fixture(scope="module")
def shipped(language):
    return load("eyes", "cpu")


def test_what_ships_answers(shipped):
    """The first held-out question of each family that a word or two can answer; chance is far below."""
    families = ("exist", "attr", "loc", "ocr", "rel", "word")
    questions = [q for family in families for q in tasks(family, "test", 0, 1)]
    answers = ask(*shipped, [q.images for q in questions], [q.question for q in questions], max_new_tokens=9)
    right = [answer.text == q.answer for answer, q in zip(answers, questions, strict=True)]
    assert sum(right) >= 5, [(q.question, q.answer, a.text) for a, q in zip(answers, questions, strict=True)]


def test_what_ships_is_a_stock_llava(shipped):
    model, processor = shipped
    assert type(model).__name__ == "LlavaForConditionalGeneration" and model.dtype == torch.float32
    assert len(model.model.language_model.layers) == LAYERS
    [question] = tasks("exist", "test", 0, 1)
    ids = prepare(model, processor, [question.images], [question.question]).inputs["input_ids"][0]
    assert (ids == IMAGE_TOKEN_ID).sum() == VISUAL
    assert processor.decode(ids[ids != IMAGE_TOKEN_ID]) == "The image shows:" + asked(question.question)


def test_a_training_that_cannot_be_is_refused_before_anything_is_fetched(refused, tmp_path, monkeypatch):
    monkeypatch.setattr("codebook.models.smollm2._fetch", lambda path: pytest.fail("fetched"))
    train = ["miniature", "train", "--out", tmp_path / "out"]
    refused(*train, "--minutes", 1, words=["--minutes", "--llm smollm2"])
    refused(*train, "--llm", "gpt2", "--minutes", 1, words=["'gpt2'", "smollm2"])
    refused(*train, "--llm", "smollm2", words=["--minutes or --steps"])
    (tmp_path / "other.gguf").write_bytes(b"GGUF")
    given = ["--llm", "smollm2", "--steps", 1, "--llm-file", tmp_path / "other.gguf"]
    refused(*train, *given, words=["other.gguf is not the file", "name another one"])
    assert [path.name for path in tmp_path.iterdir()] == ["other.gguf"]
    refused("demo", "--model", "llava", "--out", tmp_path / "demo", words=["'llava'", "miniature, eyes"])
