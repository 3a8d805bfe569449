"""Chat completions: every answer is the one that `ask` gives to the same question alone."""

import pytest
from openai import OpenAI

from codebook.inference.ask import ask
from codebook.miniature.samples import of_miniature
from tests.serving.running import body


@pytest.fixture(scope="module")
def client(service):
    with OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.mark.parametrize("family", ["ocr", "multi", "video"])
def test_answers_equal_ask(client, loaded, family):
    """One picture, three and six; whole and as a stream."""
    model, processor, schedule = loaded
    for sample in of_miniature("test", 0, 1, [family]):
        [expected] = ask(model, processor, [sample.pictures()], [sample.question], schedule)
        whole = client.chat.completions.create(**body(sample))
        assert whole.choices[0].message.content == expected.text
        chunks = list(client.chat.completions.create(**body(sample), stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected.text
        counts = {"seen": sum(c[0] for c in expected.counts), "kept": sum(c[-1] for c in expected.counts)}
        assert whole.usage.codebook == counts == chunks[-1].usage.codebook
