"""Calls of several threads and tasks on one model: each is pruned by the context that it started in, and is right."""

import asyncio
import contextlib
import copy
import io
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from codebook.errors import CodebookError
from codebook.pruning import DivPrune, FastV, Random, Schedule, Stage, VisionZip, remember
from tests.prompts import ONE, RAGGED, prompt
from tests.tiny import llava

SCHEDULES = [
    None,
    Schedule([Stage(0, 0.3, Random())]),
    Schedule([Stage(0, 0.5, DivPrune(), mass=True), Stage(2, 4, FastV())]),
    Schedule([Stage(0, 0.4, VisionZip())]),
    Schedule([Stage(1, 0.3, FastV()), Stage(3, 0.1, Random(1))]),
]
THREADS, CALLS = 8, 12  # benchmarks/faults/threads.py makes 200 calls per thread


@pytest.fixture(scope="module")
def model():
    return llava()


@pytest.fixture(scope="module")
def prompts(model):
    return [prompt(model, ONE), prompt(model, RAGGED), prompt(model, [[9, "image", 4, 4]])]


def under(schedule, model, scope="model"):
    return contextlib.nullcontext() if schedule is None else schedule(model, scope)


def generated(model, inputs, steps=4, **options):
    with torch.no_grad():
        return model.generate(**inputs, max_new_tokens=steps, do_sample=False, **options)


@pytest.fixture(scope="module")
def solo(model, prompts):
    """Each schedule's answers to each prompt, alone; some differ."""
    answers = {}
    for i, schedule in enumerate(SCHEDULES):
        with under(schedule, model):
            for j, inputs in enumerate(prompts):
                answers[i, j] = generated(model, inputs)
    assert any(not torch.equal(answers[0, j], answers[i, j]) for i, j in answers)
    return answers


class Pause:
    """A streamer that holds a generation before its first token, until it may go on."""

    def __init__(self, started, resume):
        self.started, self.resume = started, resume

    def put(self, value):
        self.started.set()
        assert self.resume.wait(60)

    def end(self):
        pass


def run(function, count=THREADS):
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(function, range(count)))


@pytest.mark.parametrize("remembered", [False, True])
def test_schedules_and_plain_calls_side_by_side(model, prompts, solo, remembered):
    """Each thread under a schedule of its own, or none, changing from call to call."""

    def work(thread):
        wrong = 0
        for call in range(CALLS):
            i, j = (thread + call) % len(SCHEDULES), (thread * CALLS + call) % len(prompts)
            with under(SCHEDULES[i], model, "thread"), remember(model) if remembered else contextlib.nullcontext():
                wrong += not torch.equal(generated(model, prompts[j]), solo[i, j])
        return wrong

    assert run(work) == [0] * THREADS
    assert not model._forward_pre_hooks and "generate" not in vars(model)


@pytest.mark.parametrize("i", range(1, len(SCHEDULES)))
def test_all_threads_in_one_context(model, prompts, solo, i):
    """Some threads have a schedule of their own inside the model's context."""
    with SCHEDULES[i](model):

        def work(thread):
            wrong, own = 0, SCHEDULES[1 + thread % (len(SCHEDULES) - 1)] if thread % 2 else None
            for call in range(CALLS // 2):
                j = (thread + call) % len(prompts)
                with under(own, model, "thread"):
                    expected = solo[i if own is None else SCHEDULES.index(own), j]
                    wrong += not torch.equal(generated(model, prompts[j]), expected)
            return wrong

        assert run(work) == [0] * THREADS


def test_forwards_side_by_side(model, prompts):
    """The same for single forwards, whose state is not in a generation."""

    def logits(schedule, inputs, scope):
        with torch.no_grad(), under(schedule, model, scope):
            return model(**inputs).logits

    alone = {(i, j): logits(s, p, "model") for i, s in enumerate(SCHEDULES) for j, p in enumerate(prompts)}

    def work(thread):
        pairs = [((thread + call) % len(SCHEDULES), call % len(prompts)) for call in range(CALLS)]
        return all(torch.equal(logits(SCHEDULES[i], prompts[j], "thread"), alone[i, j]) for i, j in pairs)

    assert all(run(work))


def test_each_thread_sees_what_its_own_call_kept(model, prompts):
    schedule = SCHEDULES[1]
    counts = [len(RAGGED[0]) and sum(row.count("image") for row in rows) for rows in (ONE, RAGGED)]
    ready = threading.Barrier(2)
    with schedule(model) as pruning:

        def work(thread):
            generated(model, prompts[thread])
            ready.wait()  # both have answered
            return len(pruning.kept), len(pruning.images)

        assert run(work, 2) == [(counts[0],) * 2, (counts[1],) * 2]
        assert len(pruning.kept) in counts  # of a thread that made no call: the latest of all


def test_a_streaming_thread_outlives_the_context(model, prompts, solo):
    """Leaving lets a generation end as it began; then no hook is left. What starts later is plain."""
    started, left = threading.Event(), threading.Event()
    inputs, found = prompts[1], []

    one = {name: value[:1] for name, value in prompts[0].items()}
    thread = threading.Thread(target=lambda: found.append(generated(model, one, streamer=Pause(started, left))))
    with SCHEDULES[2](model):
        thread.start()
        assert started.wait(60)
    plain = generated(model, inputs)  # while the other still runs
    left.set()
    thread.join()
    assert torch.equal(plain, solo[0, 1]) and torch.equal(found[0], solo[2, 0])
    assert not model._forward_pre_hooks and "generate" not in vars(model)


def test_a_plain_generation_stays_plain(model, prompts, solo):
    """A context that opens meanwhile does not prune the rest of it."""
    started, opened, found = threading.Event(), threading.Event(), []

    one = {name: value[:1] for name, value in prompts[0].items()}
    with SCHEDULES[3](model, "thread"):  # another thread's call: plain
        thread = threading.Thread(
            target=lambda: found.append(generated(model, one, streamer=Pause(started, opened), use_cache=False))
        )
        thread.start()
        assert started.wait(60)
        with SCHEDULES[2](model):
            opened.set()
            thread.join()
    assert torch.equal(found[0], solo[0, 0])


@pytest.mark.parametrize("cached", [True, False])
def test_a_generation_that_began_before_there_was_any_context_stays_plain(model, prompts, cached):
    """Without a cache every step shows the images again; a call inside it is pruned by a context of its own."""
    started, opened, found = threading.Event(), threading.Event(), []
    one = {name: value[:1] for name, value in prompts[1].items()}
    with torch.no_grad():
        plain = model(**one).logits

        class Asking(Pause):
            def put(self, value):
                super().put(value)
                with SCHEDULES[4](model, "thread"):
                    found.append(model(**one).logits)

    def work():
        found.append(generated(model, one, 6, streamer=Asking(started, opened), use_cache=cached))

    expected = generated(model, one, 6)
    thread = threading.Thread(target=work)
    thread.start()
    assert started.wait(60)
    with SCHEDULES[4](model):
        opened.set()
        thread.join()
        with torch.no_grad():
            pruned = model(**one).logits
    assert torch.equal(found.pop(), expected)
    assert all(torch.equal(logits, pruned) for logits in found) and not torch.equal(pruned, plain)


def test_a_generator_that_several_threads_drive_is_told_that_they_are_not_in_its_context(model, prompts, solo):
    def answers():
        with SCHEDULES[1](model, "thread"):
            yield generated(model, prompts[0])

    generator = answers()
    assert torch.equal(next(generator), solo[1, 0])
    with pytest.raises(CodebookError, match=r"left in another thread than opened it.* open it around each call"):
        run(lambda _: next(generator), 1)
    assert not model._forward_pre_hooks and "generate" not in vars(model)
    assert torch.equal(generated(model, prompts[0]), solo[0, 0])


def test_tasks_have_contexts_of_their_own(model, prompts, solo):
    async def work(i):
        with under(SCHEDULES[i], model, "thread"):
            answers = []
            for j in range(len(prompts)):
                await asyncio.sleep(0)  # the other tasks' contexts are open now
                answers.append(generated(model, prompts[j]))
        return [torch.equal(answer, solo[i, j]) for j, answer in enumerate(answers)]

    async def main():
        return await asyncio.gather(*map(work, range(len(SCHEDULES))))

    assert all(all(row) for row in asyncio.run(main()))


def test_features_encoded_in_another_thread_are_known(model, prompts):
    """Random pruning goes by the pixels: it keeps the same tokens as when the forward encodes them."""
    inputs, schedule = dict(prompts[1]), SCHEDULES[1]
    with torch.no_grad(), schedule(model) as pruning:
        model(**inputs)
        expected = pruning.kept
        pixels = inputs.pop("pixel_values")

        def encode(_):
            with torch.no_grad():
                return model.base_model.get_image_features(pixel_values=pixels, return_dict=True)

        model(**inputs, mm_encoder_outputs={"image": run(encode, 1)[0]})
        assert all(torch.equal(a, b) for x, y in zip(expected, pruning.kept, strict=True)
                   for a, b in zip(x, y, strict=True))  # fmt: skip


def test_contexts_that_do_not_go_together(model):
    schedule = SCHEDULES[1]
    with schedule(model) as first:
        with pytest.raises(CodebookError, match="instead of nesting"):
            schedule(model).__enter__()
        with pytest.raises(CodebookError, match="open already"):
            first.__enter__()

        def other(_):
            with pytest.raises(CodebookError, match="scope='thread'"):
                schedule(model).__enter__()

        run(other, 1)
    with schedule(model, "thread"), pytest.raises(CodebookError, match="instead of nesting"):
        schedule(model, "thread").__enter__()
    with pytest.raises(CodebookError, match="'model' or 'thread'"):
        schedule(model, "process")
    assert not model._forward_pre_hooks and "generate" not in vars(model)


def test_what_an_interrupted_forward_leaves(model, prompts, solo):
    """An error or Ctrl-C in the middle of a forward neither spoils the next one nor keeps hooks alive."""
    for error in (RuntimeError, KeyboardInterrupt):
        with SCHEDULES[2](model):

            def stop(*_, error=error):
                raise error

            handle = model.get_decoder().layers[2].register_forward_pre_hook(stop)
            with pytest.raises(error):
                generated(model, prompts[0])
            with pytest.raises(error), torch.no_grad():
                model(**prompts[0])
            handle.remove()
            assert torch.equal(generated(model, prompts[1]), solo[2, 1])
        assert not model._forward_pre_hooks and "generate" not in vars(model)
    assert torch.equal(generated(model, prompts[1]), solo[0, 1])


def test_images_that_no_forward_shows_are_an_error(model, prompts):
    """A program that calls the model's parts would not be pruned: it is told so."""
    pixels, ids = prompts[0]["pixel_values"], prompts[0]["input_ids"]
    with torch.no_grad():
        with pytest.raises(CodebookError, match="nothing was pruned"), SCHEDULES[1](model):
            model.base_model.get_image_features(pixel_values=pixels)
        with pytest.raises(CodebookError, match="nothing was pruned"), SCHEDULES[1](model):
            model.base_model.vision_tower(pixels)
        with pytest.raises(CodebookError, match="call the LlavaForConditionalGeneration itself"), SCHEDULES[1](model):
            model.get_decoder()(inputs_embeds=model.get_input_embeddings()(ids))


COPIES = {"deepcopy": copy.deepcopy, "pickle": pickle.dumps, "torch.save": lambda it: torch.save(it, io.BytesIO())}


@pytest.mark.parametrize("copied", COPIES)
def test_a_model_inside_a_context_is_not_copied(prompts, copied):
    """Nor are its parts. After a forward stock models hold hooks of transformers' own, which no pickle takes."""
    model, context = llava(), SCHEDULES[1](llava())
    parts = [model, model.model, model.get_decoder(), model.get_decoder().layers[1]]
    for opened, own in ((SCHEDULES[1](model), parts), (remember(model), [model, model.model.vision_tower])):
        with opened:
            for part in own:
                with pytest.raises(CodebookError, match="leave the context first"):
                    COPIES[copied](part)
    for part in parts:
        COPIES[copied](part)
    with pytest.raises(CodebookError, match="a pruning context cannot be copied or saved: copy its schedule"):
        COPIES[copied](context)
    assert torch.equal(generated(copy.deepcopy(model), prompts[0]), generated(model, prompts[0]))


def test_weights_saved_inside_a_context_are_the_models(model, prompts, tmp_path):
    with SCHEDULES[2](model):
        generated(model, prompts[0])
        model.save_pretrained(tmp_path)
    read = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(read(**prompts[0]).logits, model(**prompts[0]).logits)


@pytest.mark.parametrize("under_grad", ["remember", "prune"])
def test_nothing_from_inference_mode_breaks_a_later_backward(model, prompts, under_grad):
    schedule = SCHEDULES[3]
    with schedule(model), remember(model):
        with torch.inference_mode():
            model(**prompts[0])
        if under_grad == "prune":
            prompts = [{**prompts[0], "pixel_values": prompts[0]["pixel_values"] + 0.1}]
        model(**prompts[0]).logits.sum().backward()
    model.zero_grad()


def whole(model):
    model.gradient_checkpointing_enable()


def one_layer(model):
    """Of a decoder that says of itself that it does not learn."""
    model.gradient_checkpointing_enable()
    for i, layer in enumerate(model.get_decoder().layers):
        layer.gradient_checkpointing = i == 2
    model.get_decoder().training = False


def wrapper(model):
    layers = model.get_decoder().layers
    layers[1] = checkpoint_wrapper(layers[1])


@pytest.mark.parametrize("how", [whole, one_layer, wrapper])
def test_gradient_checkpointing_is_refused(prompts, how):
    """Layers would run again in the backward pass, without what attention adds. Without gradients nothing does."""
    model = llava().train()
    how(model)
    with SCHEDULES[1](model):
        with pytest.raises(CodebookError, match="gradient_checkpointing_disable"):
            model(**prompts[0], use_cache=False)
        with torch.no_grad():
            model(**prompts[0], use_cache=False)
        if how is not wrapper:
            model.gradient_checkpointing_disable()
            model(**prompts[0]).logits.sum().backward()
