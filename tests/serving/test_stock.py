"""What is used of `transformers serve`."""

from types import SimpleNamespace

import pytest
from transformers.cli.serving import chat_completion, utils

from codebook.errors import CodebookError
from codebook.serving.stock import check_names


def test_a_missing_name_is_refused_at_the_start():
    check_names(chat_completion, utils)
    with pytest.raises(CodebookError, match="has no ChatCompletionHandler, on which"):
        check_names(utils)
    handler = SimpleNamespace(_streaming=1, _non_streaming=1, _build_completion=1)
    with pytest.raises(CodebookError, match=r"has no ChatCompletionHandler\._build_chunk"):
        check_names(SimpleNamespace(ChatCompletionHandler=handler), utils)
