"""What `ask` and its kin are given: taken as meant, or refused by name before the model runs."""

import copy
import io

import numpy as np
import pytest
import torch
from PIL import Image

import codebook
from codebook.errors import CodebookError
from codebook.inference.conversation import converse
from codebook.pruning import Random, Schedule, Stage

QUESTION = "read the number."
PICTURE = Image.new("RGB", (96, 96), "white")


@pytest.fixture(scope="module")
def loaded():
    return codebook.load("miniature", "cpu")


@pytest.mark.parametrize(
    ("images", "questions", "says"),
    [
        ([[PICTURE]], QUESTION, r"questions are a list of texts, not 'read the number.': write \[question\]"),
        ([[PICTURE]], [None], r"questions are a list of texts, not \[None\]"),
        ([[PICTURE]], [QUESTION.encode()], "a list of texts, not"),
        ([], [], "no question: give at least one"),
        (PICTURE, [QUESTION], r"images are a list .*: write \[\[image\]\]"),
        ([PICTURE], [QUESTION], r"images are a list with a list for each question, not .*: write \[\[image\]\]"),
        ("a.png", [QUESTION], r"a list for each question, not 'a.png'"),
        ([[PICTURE], [PICTURE]], [QUESTION], "1 question cannot have 2 lists of images: give each its own"),
        ([["a.png"]], [QUESTION], r"an image of question 1 is a str: open files by PIL.Image.open"),
        ([[PICTURE], [None]], [QUESTION] * 2, "an image of question 2 is a NoneType"),
        ([[np.zeros((9, 9, 3))]], [QUESTION], r"is a ndarray: .* arrays pictures by PIL.Image.fromarray$"),
        ([[torch.zeros(3, 9, 9)]], [QUESTION], "is a Tensor: "),
        ([[Image.new("RGB", (0, 5))]], [QUESTION], "image of question 1: 0 x 5 pixels, which show nothing: give"),
        (
            [[Image.new("L", (1, 999))]],
            [QUESTION],
            r"of question 1: 1 x 999 pixels, and one side may be 200 .*: cut it$",
        ),
    ],
)
def test_what_are_no_questions_about_pictures(loaded, images, questions, says):
    with pytest.raises(CodebookError, match=says) as caught:
        codebook.ask(*loaded, images, questions)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize("count", [0, -1, "5", 2.5])
def test_answers_of_no_length(loaded, count):
    for ask in (
        lambda: codebook.ask(*loaded, [[PICTURE]], [QUESTION], max_new_tokens=count),
        lambda: converse(*loaded, [PICTURE], [QUESTION], max_new_tokens=count),
    ):
        with pytest.raises(CodebookError, match=r"max_new_tokens is .*: give a whole number, 1 or more"):
            ask()


def test_what_is_no_processor_and_no_schedule(loaded):
    model, processor = loaded
    for other in (None, processor.tokenizer, processor.image_processor):
        with pytest.raises(CodebookError, match=r"the model's processor is needed, not a \w+: model, processor ="):
            codebook.ask(model, other, [[PICTURE]], [QUESTION])
    for use in (
        lambda: codebook.ask(model, processor, [[PICTURE]], [QUESTION], "farthest"),
        lambda: converse(model, processor, [PICTURE], [QUESTION], "farthest"),
        lambda: codebook.enable(model, "farthest"),
    ):
        with pytest.raises(CodebookError, match=r"a schedule is a Schedule, not 'farthest': make one .*for_model"):
            use()
    with pytest.raises(CodebookError, match=r"questions are a list of texts, not 'read"):
        converse(model, processor, [PICTURE], QUESTION)


@pytest.mark.parametrize("stages", ["random:0.5", Stage(0, 0.5, Random()), ["random:0.5"], None])
def test_what_are_no_stages(stages):
    with pytest.raises(
        CodebookError, match=r"made of a list of Stages, not of .*: make one of a text by Schedule.for_"
    ):
        Schedule(stages)


def test_what_is_no_pruner_layer_or_keep():
    for pruner in (Random, "random", None):
        with pytest.raises(CodebookError, match=r"a stage's pruner is an object, such as Random\(\), not "):
            Stage(0, 0.5, pruner)
    for keep, shown in (("0.5", "'0.5'"), (np.float32(0.5), r"np.float32\(0.5\)"), (torch.tensor(3), r"tensor\(3\)")):
        with pytest.raises(CodebookError, match=rf"keep must be a fraction .*; not {shown}$"):
            Stage(0, keep, Random())
    with pytest.raises(CodebookError, match=r"a stage's layer must be .*, not '3'$"):
        Stage("3", 0.5, Random())


def test_one_answer_per_question_whatever_the_models_generation_config_says(loaded):
    model, processor = loaded
    file = io.BytesIO()
    PICTURE.save(file, "PNG")
    schedule = Schedule([Stage(0, 0.5, Random())])
    asked = [[PICTURE], [Image.open(file)]], [QUESTION, "how many objects are red?"]
    expected = [answer.text for answer in codebook.ask(model, processor, *asked, schedule)]
    talk = [answer.text for answer in converse(model, processor, asked[0][0], asked[1], schedule)]
    config = model.generation_config
    before = {name: getattr(config, name) for name in ("num_beams", "num_return_sequences", "return_dict_in_generate")}
    try:
        config.num_beams, config.num_return_sequences, config.return_dict_in_generate = 3, 2, True
        assert [answer.text for answer in codebook.ask(model, processor, *asked, schedule)] == expected
        assert [answer.text for answer in converse(model, processor, asked[0][0], asked[1], schedule)] == talk
    finally:
        for name, value in before.items():
            setattr(config, name, value)


def test_a_model_in_training_mode():
    """Which is the same as in use where nothing drops numbers; its answers were any."""
    model, processor = codebook.load("miniature", "cpu")
    [answer] = codebook.ask(model, processor, [[PICTURE]], [QUESTION])
    model.train()
    assert codebook.ask(model, processor, [[PICTURE]], [QUESTION])[0].text == answer.text
    model.get_decoder().layers[1].self_attn.attention_dropout = 0.1
    for ask in (
        lambda: codebook.ask(model, processor, [[PICTURE]], [QUESTION]),
        lambda: converse(model, processor, [PICTURE], [QUESTION]),
    ):
        with pytest.raises(CodebookError, match=r"in training mode, in which .*layers.1.self_attn changes .*eval\(\)"):
            ask()
    assert codebook.ask(model.eval(), processor, [[PICTURE]], [QUESTION])[0].text == answer.text


def test_another_models_processor(loaded):
    model, processor = loaded
    other = copy.copy(processor)
    other.image_token_id = 3
    with pytest.raises(CodebookError, match=r"marks images by token 3 and the model by \d+: give the model's own proc"):
        codebook.ask(model, other, [[PICTURE]], [QUESTION])
