"""Where the host waits for the device: to find the images in a prompt, once, and nowhere after it.

The host writes the queue that the device works off. Where it waits, the queue runs empty.
"""

import contextlib
import traceback
import warnings
from pathlib import Path

import pytest
import torch

import codebook
from codebook.pruning import METHODS, FastV, Random, Schedule, SeededFarthestPoint, Stage
from codebook.store.codebook import Codebook
from tests.cuda.choices import NAMES, choose, tokens
from tests.cuda.device import CUDA, DEVICE, moved
from tests.models.cells import ROWS, model
from tests.models.families import FAMILIES

pytestmark = CUDA
PACKAGE = str(Path(codebook.__file__).parent)
STOCK = {
    "attachment.py:wrapper",
    "calls.py:encode",
    "calls.py:generate",
    "tap.py:forward",
    "memory.py:_forward",
}
"""Functions of the package that call the stock model's own."""
ADAPTIVE = [name for name, method in METHODS.items() if method.adaptive]
"""How many tokens these keep the host cannot know without asking."""
WAITING = [*ADAPTIVE, "s2prune"]
"""Methods for which the host waits: s2prune divides the tokens by what the picture's regions are like."""


@contextlib.contextmanager
def mode(name):
    if DEVICE != "cuda":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode(name)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@torch.inference_mode()
@pytest.mark.parametrize("name", [name for name in NAMES if name not in WAITING])
def test_no_selection_waits(name):
    given = tokens(DEVICE)
    choose(name, given)  # what is made once: prototypes on the device, kernels
    with mode("error"):
        choose(name, given)


@contextlib.contextmanager
def watched():
    """For each wait the functions of the package that are running, innermost first; none where stock code waits."""
    found = []

    def note(message, *_, **__):
        if "synchroniz" in str(message):
            frames = [f for f in traceback.extract_stack() if f.filename.startswith(PACKAGE)]
            names = [f"{Path(f.filename).name}:{f.name}" for f in reversed(frames)]
            found.append([] if STOCK.issuperset(names) else names)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        with mode("warn"):
            yield found


@torch.inference_mode()
@pytest.mark.parametrize("name", FAMILIES)
def test_a_pruned_forward_waits_only_to_find_its_images(name, capsys):
    target, inputs = model(name, "sdpa", DEVICE), moved(FAMILIES[name].inputs(ROWS["several"][:1]))
    width = target.get_input_embeddings().weight.shape[1]
    book = Codebook(torch.randn(7, width, generator=torch.Generator().manual_seed(5)))
    schedule = Schedule(
        [Stage(0, 0.5, SeededFarthestPoint(book), mass=True), Stage(1, 0.4, FastV()), Stage(2, 0.25, Random())]
    )
    step = {"input_ids": inputs["input_ids"][:, -1:]}

    def run():
        with schedule(target), watched() as prefill:
            cache = target(**inputs, use_cache=True).past_key_values
            with watched() as decoding:
                target(**step, past_key_values=cache)
        return prefill, decoding

    run()
    prefill, decoding = run()
    own = [frames for frames in prefill if frames]
    with capsys.disabled():
        innermost = sorted({frames[0] for frames in own})
        print(f"\n{name}: {len(prefill)} waits in a prefill, {len(own)} of the package: {', '.join(innermost) or '-'}")
    assert [frames for frames in own if "prompt.py:find" not in frames] == []
    assert [frames for frames in decoding if frames] == []
