"""From a model as users hold it to the stock model inside, whose modules are the ones that run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from codebook.errors import CodebookError
from codebook.models.base import Model


def unwrap(model: Any) -> Model:
    """The stock transformers model inside a wrapper, ready to be hooked; a stock model itself.

    Adapters of peft and DistributedDataParallel are unwrapped: their own calls and `generate` then run the very modules
    that a context hooks.

    Raises
    ------
    CodebookError
        For anything else that is not a transformers model, and for wrappers whose calls run something other than the
        modules inside: compiled code, copies, shards, prompts with learned tokens.
    """
    model = stock(model)
    for part, module in model.named_modules():
        if _is_compiled(module):
            raise CodebookError(
                f"{part or 'the model'} is compiled, and compiled code runs without the hooks that prune: use the "
                "model without torch.compile"
            )
        if _wrapper(module):
            raise CodebookError(f"{part} is inside {_article(module)}, which hides its parts: use the model without it")
    return model


def stock(model: Any) -> Model:
    """As `unwrap`, without a look at the parts of the model: enough to read its config and weights."""
    from transformers import PreTrainedModel

    while how := _wrapper(model):
        if isinstance(how, str):
            raise CodebookError(f"{_article(model)} {how}")
        model = how(model)
    if not isinstance(model, PreTrainedModel):
        raise CodebookError(_not_a_model(model))
    return model


def _inside_peft(wrapper: Any) -> Any:
    for adapter, config in wrapper.peft_config.items():
        if config.is_prompt_learning or config.is_adaption_prompt:
            raise CodebookError(
                f"the adapter {adapter!r} ({config.peft_type.value}) adds learned tokens to the prompt, where pruning "
                "cannot tell them from the text: use an adapter of weights, such as LoRA"
            )
    return wrapper.get_base_model() if hasattr(wrapper, "get_base_model") else wrapper.base_model.model


def _inside_replicas(wrapper: Any) -> Any:
    if len(wrapper.device_ids) > 1:
        raise CodebookError(
            "DataParallel runs copies of the model in threads, which share one context: pass the model inside it, "
            "`model.module`, and call that, or use DistributedDataParallel"
        )
    return wrapper.module


SHARDED = (
    "holds pieces of weights that are whole inside its own forward only: load the model without it, with "
    "device_map='auto' if it is larger than one device"
)
WRAPPERS: dict[str, str | Callable[[Any], Any]] = {
    "peft.PeftModel": _inside_peft,
    "peft.PeftMixedModel": _inside_peft,
    "torch.DataParallel": _inside_replicas,
    "torch.DistributedDataParallel": lambda wrapper: wrapper.module,
    "torch.OptimizedModule": "is compiled, and compiled code runs without the hooks that prune: pass the model "
    "that was given to torch.compile, and call that",
    "torch.FSDPModule": SHARDED,
    "torch.FullyShardedDataParallel": SHARDED,
}
"""Known wrappers by library and class: how to get at what is inside, or why it is not pruned and what to do."""


def _wrapper(given: Any) -> str | Callable[[Any], Any] | None:
    """The entry of `WRAPPERS` for an object's class: by name, so that no library is imported for it."""
    return next((WRAPPERS[name] for name in class_names(given) if name in WRAPPERS), None)


def class_names(given: Any) -> list[str]:
    """An object's class and those that it is derived from, each by its library and name."""
    return [f"{base.__module__.partition('.')[0]}.{base.__name__}" for base in type(given).__mro__]


def _article(given: Any) -> str:
    name = type(given).__name__
    return f"an {name}" if name[0] in "AEIOU" else f"a {name}"


def _is_compiled(module: nn.Module) -> bool:
    """By `module.compile()`, or by torch.compile on its `forward`."""
    forward = module.forward
    by_forward = hasattr(forward, "_torchdynamo_orig_callable") and not hasattr(forward, "_torchdynamo_disable")
    return getattr(module, "_compiled_call_impl", None) is not None or by_forward


def _not_a_model(given: Any) -> str:
    from transformers import PreTrainedModel

    own = getattr(given, "__dict__", {})
    found = (
        name
        for name, part in {**own.get("_modules", {}), **own}.items()
        if isinstance(part, PreTrainedModel) or _wrapper(part)
    )
    inside = next(found, None)
    if isinstance(given, str):
        remedy = f"load it first: `model, processor = codebook.load({given[:40]!r})`"
    elif isinstance(given, tuple):
        remedy = "pass the model alone: `model, processor = codebook.load(...)`"
    elif inside:
        remedy = f"pass the model inside it, its `{inside}`"
    else:
        remedy = "pass one that transformers or codebook.load loaded"
    return f"{_article(given)} is not a transformers model: {remedy}"
