"""Every way in which people load a model: pruned like the masked reference of that very model, or refused by name.

bitsandbytes and torchao are not in the test extra; with them installed (CPU wheels do), their tests run too.
"""

import ast
import copy
import types

import pytest
import torch
import transformers as hf
from transformers.modeling_outputs import BaseModelOutputWithPooling

from codebook import CodebookError, models
from codebook.pruning import FastV, Random, RedundancyCodebook, Schedule, Stage
from codebook.store.codebook import Codebook
from tests import reference
from tests.cuda.choices import NAMES, N, choose, tokens
from tests.models.cells import gone_from
from tests.models.families import FAMILIES
from tests.tiny import llava

TINY = FAMILIES["llava_next"]
ROWS = [["image", 5, 6, 7], [3, "large", 8]]
BOOK = Codebook(torch.randn(7, 64, generator=torch.Generator().manual_seed(5)))
SCHEDULE = Schedule([Stage(0, 0.5, RedundancyCodebook(BOOK)), Stage(2, 0.25, FastV())])
STEPS = 2
KEPT_WHOLE = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint in float32."""
    where = tmp_path_factory.mktemp("checkpoint")
    TINY.make().save_pretrained(where)
    return where


@pytest.fixture(autouse=True)
def _no_processor(monkeypatch):
    monkeypatch.setattr(hf.AutoProcessor, "from_pretrained", lambda *_, **__: "processor")


def inputs_of(model):
    given = TINY.inputs(ROWS)
    return given | {"pixel_values": given["pixel_values"].to(model.dtype)}


@torch.no_grad()
def difference(caller, model=None, schedule=SCHEDULE):
    """How far pruned logits are from those of the masked reference, as a share of the largest; and what was kept."""
    model = caller if model is None else model
    inputs = inputs_of(model)
    with schedule(caller) as pruning:
        out = caller.generate(
            **inputs, max_new_tokens=STEPS, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    said = out.sequences[:, inputs["input_ids"].shape[1] :]
    gone = gone_from(inputs, TINY.columns(ROWS), pruning.kept, schedule.stages)
    _, expected = reference.masked(model, inputs, gone, said)
    unpruned = model(**inputs, use_cache=False).logits[:, -1]
    ours = torch.stack(out.logits, 1)
    assert ours.isfinite().all()
    assert (ours[:, 0] - unpruned).abs().max() > 0.1 * unpruned.abs().max()  # it was pruned
    return float((ours - expected).abs().max() / expected.abs().max()), pruning.kept


def same(kept, others):
    return [[x.tolist() for x in one] for one in kept] == [[x.tolist() for x in one] for one in others]


@pytest.mark.parametrize("name", ["AutoModelForImageTextToText", "AutoModelForMultimodalLM", TINY.cls])
def test_classes_that_load(name, folder):
    model = getattr(hf, name).from_pretrained(folder).eval()
    assert type(model).__name__ == TINY.cls
    assert difference(model)[0] <= 1e-5
    assert models.fingerprint(model) == models.fingerprint(TINY.make())


@pytest.mark.filterwarnings("ignore:.*device_map keys do not match")
@pytest.mark.parametrize("where", ["auto", "disk"])
def test_where_accelerate_puts_it(where, folder, tmp_path):
    """All on the one device, or the decoder on a disk, from where each layer's weights are read when it runs."""
    pytest.importorskip("accelerate")
    placed = "auto"
    if where == "disk":
        placed = dict.fromkeys(KEPT_WHOLE, "cpu") | {"model.language_model": "disk", "model.image_newline": "cpu"}
    model = hf.AutoModelForImageTextToText.from_pretrained(
        folder, device_map=placed, offload_folder=str(tmp_path / "offloaded")
    ).eval()
    assert any(p.is_meta for p in model.get_decoder().parameters()) == (where == "disk")
    found, kept = difference(model)
    assert found <= 1e-5 and same(kept, difference(TINY.make())[1])
    assert models.fingerprint(model) == models.fingerprint(TINY.make())
    assert models.identity(model) == models.identity(TINY.make())


BOUNDS = {torch.bfloat16: 0.05, torch.float16: 0.006}
"""The largest difference of logits, as a share of the largest, where kernels round between layers in another order."""


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_half_precision(dtype, folder):
    model = models.load(str(folder), "cpu", dtype)[0]
    assert model.dtype == dtype
    assert difference(model)[0] <= BOUNDS[dtype]
    assert models.same_fingerprint(models.fingerprint(model), models.fingerprint(TINY.make()))


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_method_chooses_in_half_precision_as_in_float32_on_the_same_values(name, dtype):
    index, _ = choose(name, tokens("cpu", dtype, dtype))
    expected, _ = choose(name, tokens("cpu", torch.float32, dtype))
    assert torch.equal(index, expected) and 0 < len(index) < N


@torch.no_grad()
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_a_model_in_half_precision_keeps_what_float32_keeps_of_the_same_features(dtype):
    """By a transcription of the criterion: the tokens that are least like any prototype."""
    model = llava().to(dtype)
    inputs = FAMILIES["llava"].inputs([["image", 5, 6]])
    pixels = inputs.pop("pixel_values").to(dtype)
    [features] = model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output
    book = Codebook(BOOK.prototypes[:, :48].contiguous())
    encoded = {"image": BaseModelOutputWithPooling(pooler_output=[features])}
    with Schedule([Stage(0, 9, RedundancyCodebook(book))])(model) as pruning:
        model(**inputs, mm_encoder_outputs=encoded)
    likeness = torch.cosine_similarity(features.float()[:, None], book.prototypes[None], dim=-1).amax(1)
    expected = likeness.argsort()[:9].sort().values
    assert torch.equal(pruning.kept[0][0], expected)


@torch.no_grad()
def adapted(*targets):
    """peft's wrapper with a LoRA that does something, and the plain model whose weights it stands for."""
    peft = pytest.importorskip("peft")
    wrapper = peft.get_peft_model(TINY.make(), peft.LoraConfig(target_modules=list(targets), r=4, lora_alpha=6)).eval()
    generator = torch.Generator().manual_seed(0)
    plain = TINY.make()
    weights = dict(wrapper.named_parameters())
    for name in weights:
        if "lora_B" in name:
            weights[name].normal_(std=0.3, generator=generator)
            update = weights[name] @ weights[name.replace("lora_B", "lora_A")] * 6 / 4
            path = name.removeprefix("base_model.model.").partition(".lora_B")[0]
            plain.get_submodule(path).weight.add_(update)
    return wrapper, plain


@torch.no_grad()
@pytest.mark.parametrize("how", ["on", "merged", "unloaded"])
def test_adapters_equal_the_plain_model_of_their_weights(how):
    wrapper, plain = adapted("q_proj", "v_proj", "linear_1")
    if how == "merged":
        wrapper.merge_adapter()
    caller = wrapper.merge_and_unload() if how == "unloaded" else wrapper
    found, kept = difference(caller, models.unwrap(caller))
    assert found <= 1e-5 and same(kept, difference(plain)[1])
    inputs = inputs_of(plain)
    with SCHEDULE(caller):
        ours = caller(**inputs).logits
    with SCHEDULE(plain):
        expected = plain(**inputs).logits
    assert (ours - expected).abs().max() <= 1e-4 * expected.abs().max()
    # A changed projector makes another model; what changes the language model alone does not.
    assert not models.same_fingerprint(models.fingerprint(caller), models.fingerprint(TINY.make()))


def bits(number, skipped):
    pytest.importorskip("bitsandbytes")
    precise = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32} if number == 4 else {}
    return hf.BitsAndBytesConfig(**{f"load_in_{number}bit": True}, llm_int8_skip_modules=skipped, **precise)


def int8(skipped):
    quantization = pytest.importorskip("torchao.quantization")
    return hf.TorchAoConfig(quantization.Int8WeightOnlyConfig(), modules_to_not_convert=skipped)


class Wide(type(TINY)):
    """Widths in whole blocks of 64 numbers, as kernels of bitsandbytes need them."""

    def make(self, attention="sdpa"):
        stock = self.config

        def wide():
            config = stock()
            config.text_config.intermediate_size = 128
            config.vision_config.hidden_size, config.vision_config.intermediate_size = 64, 128
            return config

        return type(TINY)(self.name, wide, self.cls).make(attention)


WIDE = Wide(TINY.name, TINY.config, TINY.cls)


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("wide")
    WIDE.make().save_pretrained(where)
    return where


QUANTISED = {
    "bitsandbytes 4 bit": (lambda skipped: bits(4, skipped), 1e-5),
    # Activations are rounded to 8 bits by their largest number, and columns with outliers looked for in what is left.
    "bitsandbytes 8 bit": (lambda skipped: bits(8, skipped), 0.05),
    "torchao int8": (int8, 1e-5),
}


@pytest.mark.filterwarnings("ignore")  # each library has its own
@pytest.mark.parametrize("what", QUANTISED)
def test_a_quantised_language_model(what, wide_folder, tmp_path):
    make, bound = QUANTISED[what]
    stock = WIDE.make()
    model, _ = models.load(str(wide_folder), "cpu", quantization_config=make(KEPT_WHOLE))
    inputs = inputs_of(model)
    assert not torch.allclose(model(**inputs).logits, stock(**inputs).logits, atol=1e-2)  # it is quantised
    found, kept = difference(model)
    assert found <= bound
    # The first stage goes by features, which are the unquantised model's.
    assert same([[one[0]] for one in kept], [[one[0]] for one in difference(stock)[1]])
    assert models.fingerprint(model) == models.fingerprint(stock)
    assert models.identity(model) != models.identity(stock)
    model.save_pretrained(tmp_path)  # a checkpoint that is quantised already
    again, _ = models.load(str(tmp_path), "cpu")
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    assert models.fingerprint(again) == models.fingerprint(stock)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", QUANTISED)
def test_a_quantised_tower_has_no_fingerprint_and_is_pruned_all_the_same(what, wide_folder):
    make, bound = QUANTISED[what]
    model, _ = models.load(str(wide_folder), "cpu", quantization_config=make(["lm_head"]))
    assert difference(model)[0] <= bound
    with pytest.raises(CodebookError, match="the vision tower is quantised, ") as caught:
        models.fingerprint(model)
    assert ast.literal_eval(str(caught.value).partition("skip_modules=")[2]) == KEPT_WHOLE
    assert models.identity(model) != models.identity(WIDE.make())


CACHES = {
    "dynamic": True, "hybrid": True, "static": False, "offloaded_static": False, "sliding_window": False,
    "quantized": False, "offloaded": False, "paged": False,
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("said", ["call", "given config", "checkpoint"])
def test_caches_that_checkpoints_and_calls_ask_for(cache, said):
    model = TINY.make()
    inputs, options = inputs_of(model), {"max_new_tokens": STEPS, "do_sample": False}
    with SCHEDULE(model):
        expected = model.generate(**inputs, **options)
    if said == "checkpoint":
        model.generation_config.cache_implementation = cache
    elif said == "call":
        options["cache_implementation"] = cache
    else:
        config = copy.deepcopy(model.generation_config)
        config.update(**options, cache_implementation=cache)
        options = {"generation_config": config}
    if CACHES[cache]:
        with SCHEDULE(model):
            assert torch.equal(model.generate(**inputs, **options), expected)
        return
    ran = []
    model.model.vision_tower.register_forward_pre_hook(lambda *_: ran.append(True))
    message = rf"^a '{cache}' cache cannot hold pruned layers: .*generation_config.cache_implementation = None`$"
    with SCHEDULE(model):
        with pytest.raises(CodebookError, match=message):
            model.generate(**inputs, **options)
        assert not ran  # before any work
        if said == "checkpoint":
            model.generation_config.cache_implementation = None
            assert torch.equal(model.generate(**inputs, **options), expected)


@torch.no_grad()
def test_an_offloaded_cache_is_refused():
    model = TINY.make()
    cache = hf.DynamicCache(config=model.config.get_text_config())
    cache.offloading = True  # made so it needs a GPU
    with SCHEDULE(model), pytest.raises(CodebookError, match="a cache that is offloaded cannot hold pruned layers"):
        model(**inputs_of(model), past_key_values=cache)


def test_continuous_batching_is_refused_by_name():
    """Also for prompts without images: it packs several into one row, each with columns of its own."""
    model = TINY.make()
    options = hf.GenerationConfig(max_new_tokens=2, do_sample=False, eos_token_id=-1, pad_token_id=0)
    with SCHEDULE(model):
        [output] = model.generate_batch([[1, 5, 6]], generation_config=options).values()
    assert output.error.startswith("a PagedAttentionCache cannot hold pruned layers")
    assert "generate, not generate_batch" in output.error and not output.generated_tokens


@pytest.fixture
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@torch.no_grad()
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize(
    "what", [pytest.param(name, marks=pytest.mark.table) for name in ("function", "base")] + ["model"]
)
def test_code_compiled_before_the_context_runs_the_model_with_its_hooks(what):
    """It is older than the hooks, and torch does not look for new ones."""
    model, inputs = llava(layers=2), FAMILIES["llava"].inputs([["image", 5, 6]])
    schedule = Schedule([Stage(0, 0.5, Random()), Stage(1, 0.25, FastV())])
    plain = model(**inputs).logits
    with schedule(model):
        pruned = model(**inputs).logits
    assert (pruned - plain).abs().max() > 0.1
    whole, base = (torch.compile(module, backend="eager") for module in (model, model.model))
    call = {
        "model": lambda: whole(**inputs).logits,
        "function": torch.compile(lambda: model(**inputs).logits, backend="eager"),
        "base": lambda: model.lm_head(base(**inputs).last_hidden_state),
    }[what]
    for _ in range(2):
        assert torch.allclose(call(), plain, atol=1e-5)
        with schedule(model) as pruning:
            assert torch.allclose(call(), pruned, atol=1e-5)
        assert pruning.statistics.images == 1
    assert torch.allclose(call(), plain, atol=1e-5)
    assert isinstance(model.forward, types.MethodType) and "forward" not in vars(model)
    assert models.unwrap(model) is model
