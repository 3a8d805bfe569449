"""The thread that the model runs on: batches, failures, deadlines, clients that leave."""

import asyncio
import contextlib
import threading
import time
from concurrent.futures import CancelledError

import pytest
import torch

from codebook.errors import CodebookError
from codebook.inference.ask import ask
from codebook.inference.prompts import prepare
from codebook.miniature.samples import of_miniature
from codebook.serving import model_thread
from codebook.serving.errors import ServiceError
from codebook.serving.metrics import Metrics
from codebook.serving.model_thread import Errand, Job, ModelThread


@pytest.fixture
def thread(loaded):
    made = ModelThread(*loaded, Metrics())
    yield made
    made.stop()


@pytest.fixture
def held(thread):
    """The thread, busy until the event is set."""
    event = threading.Event()
    errand = Errand(lambda: event.wait(30))
    thread.submit(errand)
    while not errand.answer.running():
        time.sleep(0.001)
    yield event
    event.set()


SAMPLES = of_miniature("test", 3, 1, ["ocr", "cap", "exist", "multi", "box"])


def job(loaded, sample, **fields):
    model, processor, _ = loaded
    prompts = prepare(model, processor, [sample.pictures()], [sample.question])
    return Job(prompts, **{"new_tokens": 32, "deadline": time.monotonic() + 60} | fields)


def sizes(thread):
    """(number of batches, prompts in them) so far."""
    read = thread._metrics.registry.get_sample_value
    return read("codebook_batch_size_count"), read("codebook_batch_size_sum")


def test_what_is_queued_is_one_batch_and_each_answer_is_the_one_alone(loaded, thread, held):
    """Answers of different lengths, and one cut short; three images are too long to be padded to."""
    model, processor, schedule = loaded
    jobs = [job(loaded, sample) for sample in SAMPLES]
    jobs.append(job(loaded, SAMPLES[1], new_tokens=2))
    for one in jobs:
        thread.submit(one)
    assert thread._metrics.registry.get_sample_value("codebook_waiting_requests") == len(jobs)
    held.set()
    texts = [processor.decode(one.answer.result(60), skip_special_tokens=True) for one in jobs]
    for one, text, sample in zip(jobs, texts, SAMPLES, strict=False):
        [expected] = ask(model, processor, [sample.pictures()], [sample.question], schedule)
        assert text == expected.text
        assert (one.seen, one.kept) == tuple(sum(c[i] for c in expected.counts) for i in (0, -1))
        assert one.answer.result()[-1] in thread._ends and len(one.answer.result()) <= 32
    assert texts[-1] == " ".join(texts[1].split()[:2]) and len(jobs[-1].answer.result()) == 2
    assert sizes(thread) == (2, len(jobs))


def test_a_prompt_fails_alone(loaded, thread, held, monkeypatch):
    """A batch that fails is answered one by one; of the one that fails again the others know nothing."""
    bad = job(loaded, SAMPLES[0])
    good = [job(loaded, sample) for sample in SAMPLES[1:3]]
    stock = ModelThread._generate

    def failing(self, jobs):
        if bad in jobs:
            raise RuntimeError("secret detail")
        return stock(self, jobs)

    monkeypatch.setattr(ModelThread, "_generate", failing)
    for one in (good[0], bad, good[1]):
        thread.submit(one)
    held.set()
    assert all(len(one.answer.result(60)) for one in good)
    with pytest.raises(ServiceError, match=r"the model could not answer: RuntimeError$") as caught:
        bad.answer.result(60)
    assert caught.value.status == 500 and not thread.broken
    assert thread._metrics.registry.get_sample_value("codebook_generate_errors_total") == 1


class Written:
    """A streamer that keeps what it is given."""

    def __init__(self):
        self.tokens = []

    def put(self, value):
        self.tokens += value.tolist()


def test_a_batch_that_is_answered_again_streams_no_token_twice(loaded, thread, held, monkeypatch):
    """Nor the prompt: it fails when all is generated, as of outputs that are no numbers."""
    stock = ModelThread._generate

    def failing(self, jobs):
        found = stock(self, jobs)
        if len(jobs) > 1:
            raise RuntimeError("in the end")
        return found

    monkeypatch.setattr(ModelThread, "_generate", failing)
    jobs = [job(loaded, sample, streamer=Written()) for sample in SAMPLES[:2]]
    for one in jobs:
        thread.submit(one)
    held.set()
    assert [one.streamer.tokens for one in jobs] == [one.answer.result(60).tolist() for one in jobs]
    assert all(one.ended and one.streamed == len(one.streamer.tokens) > 1 for one in jobs)


def test_outputs_that_are_no_numbers_are_an_error_also_when_sampled(loaded, thread):
    hook = loaded[0].lm_head.register_forward_hook(lambda _, __, logits: logits * torch.nan)
    try:
        for options in ({}, {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}):
            one = job(loaded, SAMPLES[0], options=options, new_tokens=3)
            thread.submit(one)
            with pytest.raises(CodebookError, match="NaN"):
                one.answer.result(60)
    finally:
        hook.remove()


@pytest.mark.parametrize("work", ["prompt", "errand"])
def test_after_a_failure_of_the_device_only_another_process_can_go_on(loaded, thread, monkeypatch, work):
    def failing(*_):
        raise KeyError("the device")

    monkeypatch.setattr(model_thread, "DEVICE_ERRORS", (KeyError,))
    monkeypatch.setattr(ModelThread, "_generate", failing)
    one = job(loaded, SAMPLES[0]) if work == "prompt" else Errand(failing)
    assert not thread.broken
    thread.submit(one)
    assert one.answer.exception(60) is not None and thread.broken


def test_an_end_that_is_forced_is_at_the_length_of_each_answer(loaded, monkeypatch):
    """A batch has one length, that of its longest answer."""
    model, *_ = loaded
    end, [sample] = model.generation_config.eos_token_id, of_miniature("test", 0, 1, ["ocr"])  # of three words
    monkeypatch.setattr(model.generation_config, "forced_eos_token_id", end)
    thread, wait = ModelThread(*loaded, Metrics()), threading.Event()
    try:
        thread.submit(Errand(lambda: wait.wait(30)))
        jobs = [job(loaded, sample, new_tokens=length) for length in (2, 3, 2)]
        for one in jobs:
            thread.submit(one)
        wait.set()
        answers = [one.answer.result(60).tolist() for one in jobs]
        assert [(len(own), own[-1]) for own in answers] == [(2, end), (3, end), (2, end)]
        assert sizes(thread) == (2, 3)
    finally:
        thread.stop()


def test_a_deadline_ends_what_waits_and_what_runs(loaded, thread, held):
    waiting = job(loaded, SAMPLES[0], deadline=time.monotonic() - 1)
    thread.submit(waiting)
    held.set()
    with pytest.raises(ServiceError, match="no answer within the time limit") as caught:
        waiting.answer.result(60)
    assert caught.value.status == 503 and sizes(thread) == (0, 0)
    running = job(loaded, SAMPLES[1], new_tokens=500, deadline=time.monotonic() + 0.001)
    thread._answer([running])
    with pytest.raises(ServiceError, match="no answer within the time limit"):
        running.answer.result(0)


def test_a_client_that_leaves_is_not_answered(loaded, thread, held):
    left, stays = job(loaded, SAMPLES[0]), job(loaded, SAMPLES[0])
    thread.submit(left)
    thread.submit(stays)
    thread.withdraw(left)
    assert thread._metrics.registry.get_sample_value("codebook_waiting_requests") == 1
    held.set()
    stays.answer.result(60)
    with pytest.raises(CancelledError):
        left.answer.result(0)
    assert sizes(thread) == (1, 1)


def test_a_task_that_nobody_waits_for_is_let_go(thread, held):
    """While it waits, and in the middle of it; also when the thread is to end."""

    async def leave():
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(thread.result_of(Errand(lambda: pytest.fail("it was done"))), 0.01)

    asyncio.run(leave())
    assert not thread._queue
    long = Errand(lambda: long.left.wait(30))
    thread.submit(long)
    held.set()
    while not long.answer.running():
        time.sleep(0.001)
    thread.stop()
    assert long.answer.result(0)


def test_all_clients_may_leave_while_a_batch_waits_for_company(loaded, thread):
    left, stays = job(loaded, SAMPLES[0]), job(loaded, SAMPLES[0])
    with thread.expecting():
        thread.submit(left)
        time.sleep(0.01)
        thread.withdraw(left)
        time.sleep(0.1)
    thread.submit(stays)
    assert len(stays.answer.result(60)) and not thread.broken and sizes(thread) == (1, 1)


def test_a_client_that_leaves_ends_the_generation(loaded, thread):
    """Of an answer that would have hundreds of tokens, the first ones alone are made."""
    model = loaded[0]
    seen = []

    class Leaving:
        def put(self, value):
            seen.append(value)
            if len(seen) == 2:
                thread.withdraw(one)

    one = job(loaded, SAMPLES[1], new_tokens=400, streamer=Leaving())
    ends, model.generation_config.eos_token_id = model.generation_config.eos_token_id, None
    try:
        thread.submit(one)
        company = job(loaded, SAMPLES[1], new_tokens=6)
        thread.submit(company)
        assert len(company.answer.result(60)) <= 6
    finally:
        model.generation_config.eos_token_id = ends
    assert len(seen) == 2 and len(one.answer.result(60)) < 10


def test_sampling_is_alone_and_repeats_with_its_seed(loaded, thread, held):
    options = {"do_sample": True, "temperature": 2.0, "top_p": 1.0, "top_k": 0}
    before = torch.random.get_rng_state()
    jobs = [job(loaded, SAMPLES[1], options=options, seed=seed) for seed in (1, 1, 2)]
    for one in jobs:
        thread.submit(one)
    held.set()
    first, again, other = (one.answer.result(60).tolist() for one in jobs)
    assert first == again != other and sizes(thread) == (3, 3)
    assert torch.equal(torch.random.get_rng_state(), before)  # nobody else's draws are changed
