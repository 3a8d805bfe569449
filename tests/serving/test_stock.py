"""What is used of `transformers serve`."""

from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
from transformers.cli.serving import chat_completion, utils

from codebook.errors import CodebookError
from codebook.serving.model_thread import Job
from codebook.serving.stock import LateStreamer, check_names


def test_a_missing_name_is_refused_at_the_start():
    check_names(chat_completion, utils)
    with pytest.raises(CodebookError, match="has no ChatCompletionHandler, on which"):
        check_names(utils)
    handler = SimpleNamespace(_streaming=1, _non_streaming=1, _build_completion=1)
    with pytest.raises(CodebookError, match=r"has no ChatCompletionHandler\._build_chunk"):
        check_names(SimpleNamespace(ChatCompletionHandler=handler), utils)


@pytest.fixture
def stream():
    """A function: what is streamed of an answer, or of None, after some tokens; the texts, and the event at the end.

    The tokens are a, a euro sign in three bytes, b, and a full stop behind a space, which the tokenizer takes out of
    whole texts.
    """
    tokenizer = Tokenizer(WordLevel({"a": 0, "<0xE2>": 1, "<0x82>": 2, "<0xAC>": 3, "b": 4, " .": 5}))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    processor = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=True)
    assert processor.decode([0, 5]) == "a."

    def start(early, answer):
        items, job = [], Job(None, 9, 0.0)
        loop = SimpleNamespace(call_soon_threadsafe=lambda function, item: function(item))
        streamer = LateStreamer(tokenizer, loop, SimpleNamespace(put_nowait=items.append))
        streamer.serve(SimpleNamespace(processor=processor), job)
        job.answer.add_done_callback(lambda _: streamer.finish())
        for token in early:
            streamer.put(torch.tensor([token]))
        if answer is None:
            job.answer.set_exception(ValueError("no answer"))
        else:
            job.answer.set_result(torch.tensor(answer))
            assert streamer.total_tokens == max(len(early), len(answer))
        return "".join(items[:-1]), items[-1]

    return start


@pytest.mark.parametrize(
    ("answer", "text"),
    [([0, 1, 2, 3, 4], "a€b"), ([0, 1, 2], "a\ufffd\ufffd"), ([0, 1], "a\ufffd"), ([0, 5, 4], "a .b"), ([], "")],
)
def test_all_of_an_answer_is_streamed_in_the_end(stream, answer, text):
    """Whatever was streamed of it before, and if it is cut off in the middle of a character."""
    for early in range(len(answer) + 1):
        assert stream(answer[:early], answer) == (text, None)


def test_a_stream_that_cannot_become_the_answer_ends_with_an_error(stream):
    for early, answer in (([0, 4], [0, 0]), ([0, 4], [0]), ([0], None)):
        assert isinstance(stream(early, answer)[1], utils._StreamError)
