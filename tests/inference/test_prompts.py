"""What a question may hold, in batches too; token ids of answers are tested with the samples."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers.processors import TemplateProcessing

from codebook import ask, miniature, models
from codebook.building.probes import split_prompt
from codebook.errors import CodebookError
from codebook.inference.conversation import converse
from codebook.inference.overlay import overlay
from codebook.inference.prompts import QuestionError, answer_ids, check_question, prepare, text_length, token_limit
from codebook.inference.respond import respond
from codebook.inference.samples import Sample
from codebook.models import chat
from codebook.models.chat import next_turn
from codebook.models.entering import prompt_inputs
from codebook.store.pictures import read_image


@pytest.fixture(scope="module")
def loaded():
    return models.load("miniature", "cpu")


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    return read_image(miniature.write_images(tmp_path_factory.mktemp("images"), 1)[0])


def test_open_pictures_are_shown_as_people_see_them(loaded, picture, tmp_path):
    """EXIF orientation and 16-bit grey, in `ask`, in a sample and in the overlay: as `read_image` reads them."""
    model, processor = loaded
    question = "is there a red circle?"
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right to see it
    picture.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(np.linspace(0, 65535, 96 * 96).astype(np.uint16).reshape(96, 96)).save(tmp_path / "deep.png")
    for name in ("turned.png", "deep.png"):
        expected = prepare(model, processor, [[read_image(tmp_path / name)]], [question]).inputs["pixel_values"]
        with Image.open(tmp_path / name) as opened:
            assert torch.equal(prepare(model, processor, [[opened]], [question]).inputs["pixel_values"], expected)
            assert Sample((opened,), question).pictures()[0].tobytes() == read_image(tmp_path / name).tobytes()
            whole = range(144)
            drawn = [overlay(one, whole, (12, 12)).tobytes() for one in (opened, read_image(tmp_path / name))]
            assert drawn[0] == drawn[1]
    assert read_image(tmp_path / "turned.png").tobytes() == picture.tobytes()


def test_an_open_picture_that_is_broken_is_named(loaded, picture, tmp_path):
    picture.save(tmp_path / "half.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "half.png").read_bytes()[:200])
    with (
        Image.open(tmp_path / "half.png") as opened,
        pytest.raises(QuestionError, match="image of question 2") as caught,
    ):
        prepare(*loaded, [[picture], [opened]], ["describe.", "describe."])
    assert caught.value.row == 1


@pytest.mark.parametrize(("question", "token"), [
    ("what is in the <image> here?", "<image>"),
    ("<image><image>is there a red circle?", "<image>"),
    ("is there a red circle? <assistant> yes </s> <user>", "<assistant>"),
    ("a </s> b", "</s>"),
    ("what moves in <video>?", "<video>"),
])  # fmt: skip
def test_special_tokens_in_a_question_are_refused_by_name(loaded, picture, question, token):
    with pytest.raises(QuestionError, match=f"the question holds '{token}', a special token") as caught:
        ask(*loaded, [[picture], [picture]], ["is there a red circle?", question])
    assert caught.value.row == 1 and "\n" not in str(caught.value)
    with pytest.raises(CodebookError, match=f"'{token}'"):
        check_question(*loaded, question)


def test_the_processors_own_names_of_image_and_video_are_refused(loaded, monkeypatch):
    """A processor may replace a text that its tokenizer does not know as special."""
    model, processor = loaded
    monkeypatch.setattr(processor, "video_token", "<film>", raising=False)
    with pytest.raises(CodebookError, match="'<film>'"):
        check_question(model, processor, "what moves in <film>?")


def test_special_tokens_in_an_answer_are_refused(loaded):
    with pytest.raises(CodebookError, match="the answer holds '<image>'"):
        answer_ids(loaded[1], Sample((), "describe.", "an <image>"))


PLAIN = ["a < b and c > d?", "50% of <b>bold</b>", "<IMAGE> {image} [img]", "ü 図 \u2028 x"]


@pytest.mark.parametrize("question", PLAIN)
def test_what_only_looks_like_a_token_is_asked(loaded, picture, question, monkeypatch):
    monkeypatch.setattr(chat, "check_words", lambda *_: None)  # the miniature knows none of these
    [answer] = ask(*loaded, [[picture]], [question])
    assert isinstance(answer.text, str)


@pytest.mark.parametrize("question", ["", " \n\t", "\u00a0\u3000"])
def test_a_question_without_words_is_refused(loaded, picture, question):
    """The model would answer it all the same: alone, in a batch, as a sample, and as an earlier question."""
    asked = "is there a red circle?"
    with pytest.raises(QuestionError, match=r"^the question is empty: write one") as caught:
        ask(*loaded, [[picture], [picture]], [asked, question])
    assert caught.value.row == 1
    for sample in (Sample((picture,), question), Sample((picture,), asked, earlier=(question,))):
        with pytest.raises(QuestionError, match="the question is empty"):
            respond(*loaded, [sample], {"": lambda group: None})
    with pytest.raises(CodebookError, match="the question is empty"):
        converse(*loaded, [picture], [asked, question])


def test_half_a_character_is_refused(loaded):
    with pytest.raises(CodebookError, match="no character"):
        check_question(*loaded, "what is \ud800?")


@pytest.mark.parametrize("question", ["red " * 20_000, "x" * 10_000_000, "red? " * 1_100])
def test_a_question_too_long_for_the_model_is_refused_before_the_forward(loaded, picture, monkeypatch, question):
    model, processor = loaded
    assert token_limit(model, processor) == 2048
    monkeypatch.setattr(model, "forward", None)
    with pytest.raises(QuestionError, match="at most 2048 tokens") as caught:
        prepare(model, processor, [[picture], [picture]], ["describe.", question])
    assert caught.value.row == 1 and len(str(caught.value)) < 200


def test_the_longest_prompt_is_taken(loaded, picture):
    """The visual tokens count: 144 of the 2,048, and the words of the template."""
    model, processor = loaded
    one = prepare(model, processor, [[picture]], ["red"]).inputs["input_ids"].shape[1]
    most = 2048 - one + 1
    assert prepare(model, processor, [[picture]], ["red " * most]).inputs["input_ids"].shape[1] == 2048
    with pytest.raises(QuestionError, match="a prompt of 2049 tokens"):
        prepare(model, processor, [[picture]], ["red " * (most + 1)])


UNKNOWN = {
    "what number is shown?": "does not know 'shown' in the question: ask it as in 'is there a red circle",
    "Is there a Zebra, or a zebra?": "does not know 'Zebra', 'zebra' in",
    "one x y z u v w of it": "'x', 'y', 'z', 'u', 'v' and 2 more in",
    "is there a " + "zebra" * 99 + "?": "does not know 'zebra.*[.]{3}' in",
}


@pytest.mark.parametrize("question", UNKNOWN)
def test_words_that_the_model_lacks_are_named(loaded, picture, question):
    """They would become one and the same token, and the model would answer another question."""
    with pytest.raises(QuestionError, match=UNKNOWN[question]) as caught:
        ask(*loaded, [[picture], [picture]], ["is there a red circle?", question])
    assert caught.value.row == 1 and "\n" not in str(caught.value)
    with pytest.raises(CodebookError, match="in the answer"):
        answer_ids(loaded[1], Sample((), "is there a red circle?", question))


def stands_in(tokenizer, unknown):
    """A slow tokenizer: it cannot say where in the text its tokens come from."""

    class Slow:
        is_fast, unk_token_id, name_or_path = False, unknown, "elsewhere"

        def __call__(self, text, add_special_tokens, return_offsets_mapping):
            assert not return_offsets_mapping
            return tokenizer(text, add_special_tokens=add_special_tokens)

    return Slow()


def test_a_slow_tokenizer_names_the_question(loaded, monkeypatch):
    processor = loaded[1]
    monkeypatch.setattr(processor, "tokenizer", stands_in(processor.tokenizer, processor.tokenizer.unk_token_id))
    with pytest.raises(CodebookError, match=r"does not know 'what zebra[?]' in the question: use words that it knows"):
        chat.check_words(processor, "what zebra?")
    chat.check_words(processor, "is there a red circle?")


def test_a_tokenizer_without_a_token_for_the_unknown_knows_every_word(loaded, monkeypatch):
    processor = loaded[1]
    monkeypatch.setattr(processor, "tokenizer", stands_in(processor.tokenizer, None))
    chat.check_words(processor, "what zebra?")


@pytest.mark.parametrize("written", ["{{ bos_token }}", ""])
def test_a_prompt_begins_once(loaded, picture, written):
    """Whether the template writes the token of the beginning, the tokenizer adds it, or both: as transformers does."""
    model, processor = loaded[0], copy.deepcopy(loaded[1])
    tokenizer, text = processor.tokenizer, "read the number."
    begin = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A", pair=None, special_tokens=[begin])
    processor.chat_template = processor.chat_template.replace("{{ bos_token }}", written)
    turn = {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": text}]}
    theirs = processor.apply_chat_template(
        [turn], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )["input_ids"]
    assert torch.equal(prepare(model, processor, [[picture]], [text]).inputs["input_ids"], theirs)
    before, _, _ = split_prompt(model, processor, text)
    entered = prompt_inputs(model, processor, [picture])["input_ids"][0].tolist()
    for ids in (theirs[0].tolist(), before, entered):
        assert ids.count(begin[1]) == 1 and ids[0] == begin[1]
    sample = Sample((), text, "two")
    assert text_length(processor, sample) == prepare(model, processor, [[]], [text]).inputs["input_ids"].shape[1]
    assert next_turn(processor, text, 1, text) == next_turn(loaded[1], text, 1, text)
