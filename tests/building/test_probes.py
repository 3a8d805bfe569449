import math
from dataclasses import replace

import pytest
import torch

from codebook.building.candidates import candidates
from codebook.building.cascade import survivors
from codebook.building.clustering import dpc_knn
from codebook.building.presets import BUILD_PRESETS, Settings, preset
from codebook.building.probes import Prober, jsd, p1, region, split_prompt
from codebook.errors import CodebookError
from codebook.models import family
from tests.building.tiny import settings
from tests.tiny import IMAGE, PAD, SIDE

N = SIDE * SIDE


@pytest.fixture(scope="module")
def probing(tiny):
    """The prober, one image's pixels and tokens, and the prompt's ids before and after the image."""
    model, processor = tiny
    pixels = torch.randn(1, 3, SIDE * 4, SIDE * 4, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        tokens = family(model).image_features(model, pixels)[0][0]
    prober = Prober.of(model, processor, "w5 w6 w7", (SIDE, SIDE), batch_size=4)
    return prober, pixels, tokens, split_prompt(model, processor, "w5 w6 w7")


def masked_reference(model, pixels, ids, kept, removed=()):
    """Logits of the stock model with pixel values, where only `kept` tokens are seen and `removed` are padding."""
    before, _, after = ids
    prompt = torch.tensor([[*before, *[IMAGE] * N, *after]])
    mask = torch.ones_like(prompt)
    mask[0, [len(before) + i for i in range(N) if i not in kept]] = 0
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)

    def blank(module, args, output):
        output = output.clone()
        output[:, list(removed)] = model.get_input_embeddings().weight[PAD]
        return output

    handle = model.base_model.multi_modal_projector.register_forward_hook(blank)
    try:
        with torch.inference_mode():
            return model(input_ids=prompt, pixel_values=pixels, attention_mask=mask, position_ids=positions).logits[
                :, -1
            ]
    finally:
        handle.remove()


def test_prompt_is_split_at_the_image(tiny):
    assert split_prompt(*tiny, "w5 w6") == ([10], [], [5, 6, 35])


def test_p1_by_hand():
    logits = torch.zeros(2, 100)
    logits[0, 7], logits[1, 3] = 2.0, 1.0
    expected = [math.exp(2) / (math.exp(2) + 49), math.e / (math.e + 49)]
    assert p1(logits).tolist() == pytest.approx(expected)
    assert p1(torch.zeros(1, 4)).tolist() == [0.25]  # a vocabulary below 50


def test_jsd_by_hand():
    intact, ablated = torch.full((1, 30), -50.0), torch.full((1, 30), -50.0)
    intact[0, :10] = torch.arange(10.0)
    ablated[0, :10] = torch.arange(10.0).flip(0)
    ablated[0, 20] = 99.0  # outside the intact top 10: not seen
    weights = [math.exp(i) for i in range(10)]
    p = [w / sum(weights) for w in weights]
    q = p[::-1]
    m = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    coded = sum(z * math.log(z / a) + z * math.log(z / b) for a, b, z in zip(p, q, m, strict=True)) / 10 / 2
    textbook = sum(a * math.log(a / z) + b * math.log(b / z) for a, b, z in zip(p, q, m, strict=True)) / 2
    assert jsd(intact, ablated).item() == pytest.approx(coded)
    assert jsd(intact, ablated, "textbook").item() == pytest.approx(textbook)
    assert textbook < math.log(2)
    assert jsd(intact, intact).item() == 0


def test_textbook_is_about_ten_times_as_large():
    generator = torch.Generator().manual_seed(0)
    intact = torch.randn(200, 1000, generator=generator)
    ablated = intact + 0.1 * torch.randn(200, 1000, generator=generator)
    assert (jsd(intact, ablated, "textbook") / jsd(intact, ablated)).median() == pytest.approx(10, rel=0.1)


def test_region_is_shifted_inward():
    assert region(7, (6, 6)) == [0, 1, 2, 6, 7, 8, 12, 13, 14]
    assert region(0, (6, 6)) == region(7, (6, 6))
    assert region(35, (6, 6)) == [21, 22, 23, 27, 28, 29, 33, 34, 35]
    assert region(5 * 4 + 3, (6, 4)) == [13, 14, 15, 17, 18, 19, 21, 22, 23]


def test_single_token_probe(tiny, probing):
    prober, pixels, tokens, ids = probing
    reference = [p1(masked_reference(tiny[0], pixels, ids, {i})).item() for i in (0, 14, 35)]
    with torch.inference_mode():
        assert prober.alone(tokens[[0, 14, 35]]).tolist() == pytest.approx(reference, rel=1e-4)


def test_region_probe(tiny, probing):
    prober, pixels, tokens, ids = probing
    chosen, reference = [0, 14, 35], []
    for i in chosen:
        seen = set(region(i, (SIDE, SIDE)))
        whole = masked_reference(tiny[0], pixels, ids, seen)
        reference.append(jsd(whole, masked_reference(tiny[0], pixels, ids, seen, [i])).item())
    with torch.inference_mode():
        assert prober.in_region(tokens, chosen).tolist() == pytest.approx(reference, rel=1e-3, abs=1e-7)


def test_global_probe(tiny, probing):
    prober, pixels, tokens, ids = probing
    chosen, everything = [0, 8, 14, 21, 30, 35], set(range(N))  # more than a batch
    whole = masked_reference(tiny[0], pixels, ids, everything)
    reference = [
        jsd(whole, masked_reference(tiny[0], pixels, ids, everything, region(i, (SIDE, SIDE)))).item() for i in chosen
    ]
    with torch.inference_mode():
        assert prober.in_image(tokens, chosen).tolist() == pytest.approx(reference, rel=1e-3, abs=1e-7)


def test_cascade_equals_the_plain_conjunction(tiny, probing):
    prober, pixels, tokens, _ = probing
    model, _ = tiny
    wanted = settings(max_cluster_size=6)
    found = survivors(pixels, model, family(model), prober, wanted)
    everything = list(range(N))
    with torch.inference_mode():
        confidence, near = prober.alone(tokens), prober.in_region(tokens, everything)
        far = prober.in_image(tokens, everything)
    labels = dpc_knn(tokens, wanted.clusters_per_image)
    isolated = labels.bincount()[labels] <= wanted.max_cluster_size
    redundant = (confidence < wanted.tau_p) & (near + 16 * far < wanted.tau_j)
    expected = (redundant & isolated).nonzero().flatten().tolist()
    assert [t["row"] * SIDE + t["col"] for t in found.tokens] == expected
    assert 0 < len(expected) < N
    assert torch.equal(found.features, tokens[expected])
    steps = [N, int(isolated.sum()), int((isolated & (confidence < wanted.tau_p)).sum()), len(expected)]
    assert found.funnel == dict(zip(("probed", "isolated", "P1", "JSD"), steps, strict=True))
    assert steps == sorted(set(steps), reverse=True), "each step drops some"
    assert found.tokens[0]["jsd_global"] == pytest.approx(far[expected[0]].item(), rel=1e-3)


def counted(model, run):
    """What `run()` returns, and the (sequences, tokens) of each forward of the LLM in it."""
    seen = []
    handle = model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"].shape[:2]), with_kwargs=True
    )
    try:
        return run(), [(b, b * n) for b, n in seen]
    finally:
        handle.remove()


def test_exhaustive_run_finds_the_same_and_costs_more(tiny, probing):
    prober, pixels, *_ = probing
    model, _ = tiny
    args = pixels, model, family(model), prober, settings(max_cluster_size=6)
    cascade, cheap = counted(model, lambda: survivors(*args))
    alone = survivors(pixels, model, family(model), prober.one_by_one(), settings(max_cluster_size=6), exhaustive=True)
    every, dear = counted(model, lambda: survivors(*args, exhaustive=True))
    for full in (every, alone):
        assert torch.equal(full.features, cascade.features) and full.funnel == cascade.funnel
        assert [(t["row"], t["col"]) for t in full.tokens] == [(t["row"], t["col"]) for t in cascade.tokens]
        assert len(full.probes) == N and all(len(row) == 6 for row in full.probes)
    assert cascade.probes == [] and sum(t for _, t in cheap) < sum(t for _, t in dear)
    published = replace(prober, batch_size=1, whole=True)
    _, each = counted(model, lambda: survivors(*args[:3], published, args[4], exhaustive=True))
    # each alone, each region twice, the image once and without each region; then a few again at their threshold
    assert {b for b, _ in each} == {1} and 0 <= len(each) - (N + 2 * N + N + 1) <= 8
    assert sum(t for _, t in cheap) < 0.5 * sum(t for _, t in each)


def test_nothing_isolated_costs_no_forward(tiny, probing):
    prober, pixels, *_ = probing
    found, forwards = counted(
        tiny[0], lambda: survivors(pixels, tiny[0], family(tiny[0]), prober, settings(clusters_per_image=1))
    )
    assert not forwards and found.features.shape == (0, 48) and found.funnel["isolated"] == 0


@pytest.mark.parametrize("batch_size", [1, 2, 7, 64, None])
@pytest.mark.parametrize("whole", [True, False])
def test_batch_size_changes_no_selected_token(tiny, probing, batch_size, whole):
    prober, pixels, *_ = probing
    model, _ = tiny
    # thresholds that lie on values: only a value that no batch has touched can decide them the same way each time
    known = survivors(pixels, model, family(model), prober.one_by_one(), settings())
    token = known.tokens[len(known.tokens) // 2]
    on_value = settings(tau_p=token["p1"], tau_j=token["jsd_region"] + 16 * token["jsd_global"])
    for wanted in (settings(), on_value, settings(tau_j=on_value.tau_j)):
        one = survivors(pixels, model, family(model), prober.one_by_one(), wanted)
        changed = replace(prober, batch_size=batch_size, whole=whole)
        found = survivors(pixels, model, family(model), changed, wanted)
        assert torch.equal(found.features, one.features) and found.funnel == one.funnel


class Crowded:
    """Makes a model run out of memory above so many tokens in a forward pass."""

    def __init__(self, model, tokens, error):
        self.tokens, self.error, self.refused = tokens, error, 0
        self.hook = model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, model, args, kwargs):
        batch, length, _ = kwargs["inputs_embeds"].shape
        if batch * length > self.tokens:
            self.refused += 1
            raise self.error

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.hook.remove()


ON_CPU = "[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried to allocate"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError(ON_CPU), MemoryError()])
def test_out_of_memory_halves_the_batch(tiny, probing, error):
    prober, pixels, *_ = probing
    model, _ = tiny
    args = family(model), settings()
    expected = survivors(pixels, model, args[0], prober, args[1])
    tight = replace(prober, batch_size=32)
    with Crowded(model, 2 * 41, error) as crowded:
        found = survivors(pixels, model, args[0], tight, args[1])
        assert torch.equal(found.features, expected.features) and 1 <= crowded.refused <= 6
        survivors(pixels, model, args[0], tight, args[1])
        assert crowded.refused <= 6, "what it learnt stays"
        crowded.tokens = 30
        with pytest.raises(CodebookError, match=r"one sequence of 41 tokens on cpu: take a smaller --dtype.*kept"):
            survivors(pixels, model, args[0], tight, args[1])


def test_other_errors_of_the_model_are_not_taken_for_memory(probing):
    prober, _, tokens, _ = probing
    with Crowded(prober.model, 0, RuntimeError("mat1 and mat2 shapes")), pytest.raises(RuntimeError, match="mat1"):
        prober.alone(tokens)


def test_images_do_not_depend_on_each_other(tiny, probing):
    prober, pixels, *_ = probing
    model, _ = tiny
    first = survivors(pixels, model, family(model), prober, settings())
    survivors(torch.flip(pixels, dims=[3]), model, family(model), prober, settings())
    again = survivors(pixels, model, family(model), prober, settings())
    assert first.tokens == again.tokens and torch.equal(first.features, again.features)


def test_towers_without_cls_are_probed_at_tiles():
    assert len(candidates("auto", (27, 27), torch.randn(729, 4), None)) == 81


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llava-hf/llava-1.5-7b-hf", "llava-1.5-7b"),
        ("llava-hf/llava-1.5-13b-hf", "llava-1.5-13b"),
        ("llava-hf/llama3-llava-next-8b-hf", "llava-next-8b"),
        ("llava-hf/llava-onevision-qwen2-7b-ov-hf", "llava-onevision-7b"),
        ("/models/LLaVA-1.5-7B/", "llava-1.5-7b"),
        ("miniature", "miniature"),
    ],
)
def test_presets_by_hub_name(name, expected):
    assert preset(name) == BUILD_PRESETS[expected]


def test_published_thresholds():
    assert (preset("llava-1.5-7b").tau_p, preset("llava-1.5-7b").tau_j) == (0.15, 2e-3)
    assert preset("llava-onevision-7b").max_cluster_size == 3
    assert preset("llava-1.5-7b", tau_p=0.2).tau_p == 0.2


@pytest.mark.parametrize(
    "wrong",
    [
        {"tau_p": 0}, {"tau_p": math.nan}, {"tau_j": -1}, {"tau_j": math.inf}, {"min_image_fraction": 1},
        {"clusters": 0}, {"neighbours": 0}, {"candidates": "some"}, {"jsd": "other"}, {"global_weight": -1},
    ],
)  # fmt: skip
def test_wrong_settings(wrong):
    with pytest.raises(CodebookError, match=next(iter(wrong))):
        Settings(**wrong)


def test_unknown_model_has_no_preset():
    with pytest.raises(CodebookError, match=r"choose a preset of llava-1\.5-7b"):
        preset("someone/else")
