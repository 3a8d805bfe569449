"""Wrapped models: pruned like the model inside, by calls through the wrapper, or refused by name."""

import copy

import pytest
import torch
import transformers as hf
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from codebook import CodebookError, FastV, Random, Schedule, Stage, ask, build, load, models, prebuilt, remember
from codebook.analysis import sweep
from codebook.analysis.explain import explain
from codebook.building import Settings
from codebook.evaluation import evaluate
from codebook.miniature import write_images
from codebook.miniature.samples import of_miniature
from tests import reference
from tests.models.cells import gone_from
from tests.models.configs import TEXT
from tests.models.families import FAMILIES

TINY = FAMILIES["llava"]
SCHEDULE = Schedule([Stage(0, 0.5, Random()), Stage(2, 0.2, FastV())])
ROWS = [["image", 5, 6, 7], [3, "image", 8]]


def adapted(*targets, seed=0):
    """A LLaVA and peft's wrapper around it, with a LoRA that does something."""
    peft = pytest.importorskip("peft")
    model = TINY.make()
    wrapper = peft.get_peft_model(model, peft.LoraConfig(target_modules=list(targets), r=4)).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, weight in wrapper.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.3, generator=generator)
    return wrapper, model


def lora():
    return adapted("q_proj", "v_proj", "mm_projector.linear_1")


def mixed():
    peft = pytest.importorskip("peft")
    model = TINY.make()
    wrapper = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]), mixed=True).eval()
    return wrapper, model


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    file = tmp_path_factory.mktemp("group") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def distributed():
    model = TINY.make()
    return DistributedDataParallel(model), model


def replicated():
    model = TINY.make()
    return nn.DataParallel(model), model


def both():
    wrapper, model = lora()
    return DistributedDataParallel(wrapper), model


def accelerated():
    """Weights that accelerate moves to the device and away again: no wrapper, but other forwards."""
    accelerate = pytest.importorskip("accelerate")
    model = TINY.make()
    return accelerate.cpu_offload(model, torch.device("cpu")), model


def bare():
    """Without a head."""
    model = TINY.make()
    return model.model, model.model


@torch.no_grad()
@pytest.mark.parametrize("wrap", [lora, mixed, distributed, replicated, both, accelerated])
def test_calls_through_a_wrapper_are_pruned(wrap, group):
    wrapper, model = wrap()
    assert models.unwrap(wrapper) is model and models.shape(wrapper) == models.shape(model)
    assert models.fingerprint(wrapper) == models.fingerprint(model)
    assert models.identity(wrapper) == models.identity(model)
    inputs = TINY.inputs(ROWS)
    plain = wrapper(**inputs).logits
    with SCHEDULE(wrapper) as pruning:
        logits = wrapper(**inputs).logits
    gone = gone_from(inputs, TINY.columns(ROWS), pruning.kept, SCHEDULE.stages)
    _, expected = reference.masked(model, inputs, gone)
    assert (logits[:, -1] - expected[:, 0]).abs().max() <= 1e-5 * expected.abs().max()
    assert (logits - plain).abs().max() > 0.1
    assert torch.equal(wrapper(**inputs).logits, plain)


@torch.no_grad()
@pytest.mark.parametrize("wrap", [lora, accelerated])
def test_generate_of_a_wrapper_is_pruned(wrap):
    wrapper, model = wrap()
    inputs = TINY.inputs(ROWS)
    options = {"max_new_tokens": 4, "do_sample": False}
    with SCHEDULE(wrapper), remember(wrapper):
        tokens = wrapper.generate(**inputs, **options)
    with SCHEDULE(model) as pruning:
        assert torch.equal(model.generate(**inputs, **options), tokens)
    gone = gone_from(inputs, TINY.columns(ROWS), pruning.kept, SCHEDULE.stages)
    said = tokens[:, inputs["input_ids"].shape[1] :]
    assert torch.equal(said, reference.masked(model, inputs, gone, said)[0])


def test_whatever_takes_a_model_takes_a_wrapper(group, tmp_path):
    """And gives what the model inside gives: adapters that are new do nothing."""
    peft = pytest.importorskip("peft")
    model, processor = load("miniature", "cpu")
    wrapper = DistributedDataParallel(
        peft.get_peft_model(model, peft.LoraConfig(target_modules=r".*language_model.*q_proj"))
    )
    samples, schedule = of_miniature("test", 0, 2, ["exist"]), Schedule.for_model(wrapper, "seeded", keep=0.2)
    images = write_images(tmp_path / "scenes", 3)
    book = build(
        wrapper, processor, images[0].parent, tmp_path / "book", model_id="miniature",
        settings=Settings(prompt="describe.", candidates="tiles", tau_p=1.0, tau_j=99.0),
    )  # fmt: skip
    assert str(schedule) == str(Schedule.for_model(model, "seeded", keep=0.2))
    assert str(prebuilt(wrapper)) == str(prebuilt(model))
    book.check(wrapper)
    for use in (
        lambda it: ask(it, processor, [s.pictures() for s in samples], [s.question for s in samples], schedule),
        lambda it: evaluate(it, processor, samples, schedule),
        lambda it: sweep(it, processor, samples)[0].pruned.tolist(),
        lambda it: explain(it, processor, book, samples[0].pictures()[0], (3, 5)),
    ):
        assert repr(use(wrapper)) == repr(use(model))


@torch.no_grad()
def test_an_adapter_can_be_changed_inside_the_context():
    wrapper, _ = lora()
    inputs = TINY.inputs(ROWS)
    with SCHEDULE(wrapper):
        adapted = wrapper(**inputs).logits
        with wrapper.disable_adapter():
            plain = wrapper(**inputs).logits
    with SCHEDULE(TINY.make()) as pruning:
        assert torch.allclose(pruning.model(**inputs).logits, plain, atol=1e-5)
    assert (adapted - plain).abs().max() > 0.1


@torch.no_grad()
def test_a_model_without_a_head_is_pruned():
    model = TINY.make()
    inputs = TINY.inputs(ROWS)
    with SCHEDULE(model):
        expected = model(**inputs).logits
    with SCHEDULE(model.model):
        hidden = model.model(**inputs).last_hidden_state
    assert torch.allclose(model.lm_head(hidden), expected, atol=1e-5)


class Plain(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.vlm = model

    def forward(self, **inputs):
        return self.vlm(**inputs)


class Object:
    def __init__(self, model):
        self.inner = model

    def __getattr__(self, name):
        return getattr(self.inner, name)


def compiled_part(path, how):
    model = TINY.make()
    module = model.get_submodule(path)
    if how == "compile":
        module.compile(backend="eager")
    elif how == "forward":
        module.forward = torch.compile(module.forward, backend="eager")
    else:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, torch.compile(module, backend="eager"))
    return model


def several():
    wrapper = nn.DataParallel(TINY.make())
    wrapper.device_ids = [0, 1]
    return wrapper


def prompt_tuned():
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, num_layers=4, token_dim=48, num_attention_heads=4
    )
    return peft.get_peft_model(TINY.make(), config)


DECODER = "model.language_model"
REFUSED = {
    "compiled": (lambda: torch.compile(TINY.make(), backend="eager"), "an OptimizedModule is compiled.*: pass"),
    "compile()": (lambda: compiled_part("", "compile"), "the model is compiled.* use the model without"),
    "forward": (lambda: compiled_part("", "forward"), "the model is compiled"),
    "decoder": (lambda: compiled_part(DECODER, "wrapper"), "model.language_model is (?:compiled|inside)"),
    "decoder()": (lambda: compiled_part(DECODER, "compile"), "model.language_model is compiled"),
    "layer": (lambda: compiled_part(f"{DECODER}.layers.1", "forward"), "layers.1 is compiled"),
    "tower": (lambda: compiled_part("model.vision_tower", "wrapper"), "model.vision_tower is"),
    "adapted": (lambda: torch.compile(lora()[0], backend="eager"), "OptimizedModule"),
    "replicas": (several, "DataParallel runs copies.*model.module"),
    "replicated part": (
        lambda: replaced("model.vision_tower", nn.DataParallel),
        "vision_tower is inside a DataParallel",
    ),
    "prompts": (prompt_tuned, "'default' .PROMPT_TUNING. adds learned tokens.*LoRA"),
    "plain": (lambda: Plain(TINY.make()), "a Plain is not a transformers model: pass the model inside it, its `vlm`"),
    "object": (lambda: Object(TINY.make()), "an Object is not.*its `inner`"),
    "wrapped twice": (lambda: Plain(lora()[0]), "a Plain is not.*its `vlm`"),
    "head": (lambda: TINY.make().lm_head, "a Linear is not a transformers model: pass one that"),
    "name": (lambda: "miniature", r"a str is not a transformers model: load it first.*load\('miniature'\)"),
    "pair": (lambda: (TINY.make(), None), "a tuple is not a transformers model: pass the model alone"),
    "nothing": (lambda: None, "a NoneType is not a transformers model"),
    "text": (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT)), "type llama are not supported; .*use one of"),
    "decoder alone": (lambda: TINY.make().get_decoder(), "type llama are not supported"),
    "tower alone": (lambda: TINY.make().model.vision_tower, "type clip_vision_model are not supported"),
}


def replaced(path, wrap):
    model = TINY.make()
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, wrap(model.get_submodule(path)))
    return model


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_pruned_is_refused_by_name(what):
    make, says = REFUSED[what]
    model = make()
    for use in (SCHEDULE, lambda model: remember(model).__enter__()):
        with pytest.raises(CodebookError, match=says) as caught:
            use(model)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_shards_are_refused(group):
    sharded = FullyShardedDataParallel(TINY.make(), device_id=torch.device("cpu"))
    with pytest.raises(CodebookError, match=r"a FullyShardedDataParallel holds pieces of weights.*device_map"):
        SCHEDULE(sharded)
    from torch.distributed.fsdp import fully_shard

    model = TINY.make()
    fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
    with pytest.raises(CodebookError, match=r"holds pieces of weights"):
        SCHEDULE(model)


def test_copies_and_subclasses_are_stock_models():
    model = TINY.make()
    other = copy.deepcopy(model)
    other.__class__ = type("Mine", (type(model),), {})
    assert models.unwrap(model) is model and models.unwrap(other) is other
