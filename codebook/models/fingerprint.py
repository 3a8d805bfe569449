"""Fingerprints: short strings that identify a model's weights."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import struct
from collections.abc import Hashable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from codebook.errors import CodebookError
from codebook.models.base import Model, Processor
from codebook.models.finite import plain_tensors
from codebook.models.registry import family
from codebook.models.wrappers import class_names, stock

FINGERPRINT_SAMPLES = 32
"""Weights sampled from each of tower and projector."""

FINGERPRINT = re.compile(r"\w+(:[0-9]+-([0-9a-f]{4})*){2,3}")
"""Form of a fingerprint: the family, then for tower, projector and perhaps decoder the number of weights and some."""

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Types of weights that are not quantised."""

ADAPTER = "peft.BaseTunerLayer"
"""Class of the layers in which peft puts adapters."""

OF_A_PLACE = ("name_or_path", "processor_class", "auto_map", "transformers_version", "_from_model_config")
"""Settings of processors and of `generate` that say where they come from, and not what they do."""

PACKED = ("qweight", "weight_packed", "W_q")
"""Buffers of quantised weights, as GPTQ, AWQ, compressed-tensors and HQQ name them."""


def fingerprint(model: Model) -> str:
    """A string that identifies tower and projector: their sizes and sampled weights, in whatever dtype they are loaded.

    Returns
    -------
    `family:SIZE-WEIGHTS:SIZE-WEIGHTS`, tower first: the number of parameters, and the middle weight of up to 32
    matrices, each as the four hexadecimal digits of its bfloat16

    Raises
    ------
    CodebookError
        If the family is not supported, or tower or projector are quantised: their weights are then others than those
        that a codebook was built with.
    """
    model = stock(model)
    for name, module in _parts(model).items():
        if _is_quantised(module):
            whole = [*(_path(model, part) for part in _parts(model).values()), "lm_head"]
            raise CodebookError(
                f"the {name} is quantised, and codebooks belong to the weights before that: load the model with its "
                f"language model alone quantised, in bitsandbytes by llm_int8_skip_modules={whole}"
            )
    return _stored(model)


def weights_stamp(module: nn.Module) -> Hashable:
    """What differs once a module's weights are others than they were: which tensors, and how often written.

    It is fast enough to ask at every call. What is written past torch's counting, by `.data`, it does not tell.
    """
    held = (part for value in (*module.parameters(), *module.buffers()) for part in plain_tensors(value))
    # Weights that accelerate keeps elsewhere are other tensors after each forward.
    return tuple(
        None if part.is_meta else (id(part), part.data_ptr(), 0 if part.is_inference() else part._version)
        for part in held
    )


def codebook_stamp(model: Model) -> Hashable:
    """The `weights_stamp` of the modules that a codebook belongs to."""
    return tuple(weights_stamp(part) for part in _parts(stock(model)).values())


def adapter_words(model: Model) -> str:
    """A few words about an adapter in tower or projector, for an error about a missing codebook; empty without one.

    Their outputs are others than those of the weights alone, so that the codebook of these is not theirs.
    """
    for name, module in _parts(stock(model)).items():
        if any(ADAPTER in class_names(part) for part in module.modules()):
            return f": its {name} has an adapter"
    return ""


def _parts(model: Model) -> dict[str, nn.Module]:
    """The modules that a codebook belongs to, by their names for people."""
    kind = family(model)
    return {"vision tower": kind.tower(model), "projector": kind.projector(model)}


def _stored(model: Model) -> str:
    """The fingerprint of the weights as they are stored, quantised or not."""
    return fingerprint_of_weights(model, {name: _middle(model, name) for name in sampled_weights(model)})


def sampled_weights(model: Model) -> list[str]:
    """The names of the model's parameters that its fingerprint looks at; its weights may be on the meta device."""
    return [name for module in _parts(model).values() for name in _sampled(model, module)]


def fingerprint_of_weights(model: Model, middles: Mapping[str, Tensor]) -> str:
    """The fingerprint of weights that are not in the model itself, which gives their sizes and names.

    Parameters
    ----------
    middles
        For each name of `sampled_weights` the middle number of that weight, a float32 scalar.
    """
    parts = [_spelled(module, [middles[name] for name in _sampled(model, module)]) for module in _parts(model).values()]
    return ":".join([family(model).name, *parts])


def whole_fingerprint(model: Model) -> str:
    """A `fingerprint` with the decoder as its third part, for what belongs to the whole model.

    Quantised parts count with the numbers that are stored: they are other weights than the unquantised ones.
    """
    return f"{_stored(stock(model))}:{decoder_fingerprint(model)}"


def decoder_fingerprint(model: Model) -> str:
    """The part of `whole_fingerprint` that is the decoder's."""
    model = stock(model)
    decoder = model.get_decoder()
    return _spelled(decoder, [_middle(model, name) for name in _sampled(model, decoder)])


def _spelled(module: nn.Module, middles: Sequence[Tensor]) -> str:
    """A module's part of a fingerprint, from the middle numbers of its sampled weights."""
    hexed = torch.stack([*middles]).to(torch.bfloat16).view(torch.int16).numpy().astype(">i2").tobytes().hex()
    return f"{sum(p.numel() for p in module.parameters())}-{hexed}"


def _sampled(model: Model, module: nn.Module) -> list[str]:
    """The names, in the model, of some of a part's matrices."""
    prefix = _path(model, module)
    weights = [f"{prefix}.{name}" for name, p in module.named_parameters() if p.dim() > 1]
    return weights[:: max(1, len(weights) // FINGERPRINT_SAMPLES)][:FINGERPRINT_SAMPLES]


def _path(model: Model, module: nn.Module) -> str:
    """The name of a part in the model."""
    return next(name for name, other in model.named_modules() if other is module)


def same_fingerprint(a: str, b: str) -> bool:
    """Whether two fingerprints are of the same weights, up to the rounding of half-precision types.

    A text that is no fingerprint, as in a damaged or foreign file, is that of no model.
    """
    if not (FINGERPRINT.fullmatch(a) and FINGERPRINT.fullmatch(b)):
        return False
    parts_a, parts_b = a.split(":"), b.split(":")
    if len(parts_a) != len(parts_b) or parts_a[0] != parts_b[0]:
        return False
    for part_a, part_b in zip(parts_a[1:], parts_b[1:], strict=True):
        (size_a, hex_a), (size_b, hex_b) = part_a.split("-"), part_b.split("-")
        if size_a != size_b or len(hex_a) != len(hex_b):
            return False
        if not torch.allclose(_weights(hex_a), _weights(hex_b), rtol=2**-6, atol=1e-6):
            return False
    return True


def identity(model: Model) -> str:
    """A string that identifies a model as it computes: its fingerprint, a hash of one weight per parameter of the
    decoder, and its dtype."""
    model = stock(model)
    decoder = model.get_decoder()
    sampled = torch.stack([_middle(decoder, name) for name, _ in decoder.named_parameters()])
    digest = hashlib.sha256(sampled.numpy().tobytes()).hexdigest()[:16]
    return f"{_stored(model)}:{digest}:{str(model.dtype).removeprefix('torch.')}"


def identities(model: Model, processor: Processor) -> dict[str, str]:
    """What answers depend on beside the questions, for journals: the model's identity, a hash of its settings of
    `generate`, and the processor's digest."""
    settings = getattr(stock(model), "generation_config", None)
    given = {} if settings is None else settings.to_dict()
    return {
        "model": identity(model),
        "generation": _hash_of({key: value for key, value in given.items() if key not in OF_A_PLACE}),
        "processor": processor_digest(processor),
    }


def processor_digest(processor: Processor) -> str:
    """A short hash of a processor's settings and chat template: how pictures are resized, and what the prompt is."""
    said: list[object] = [getattr(processor, "chat_template", None)]
    for part in (processor, *(getattr(processor, name, None) for name in ("image_processor", "video_processor"))):
        settings = part.to_dict() if hasattr(part, "to_dict") else {}
        said.append(
            {key: value for key, value in settings.items() if not key.startswith("_") and key not in OF_A_PLACE}
        )
    return _hash_of(said)


def _hash_of(said: object) -> str:
    text = json.dumps(said, sort_keys=True, default=lambda value: type(value).__name__)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _middle(module: nn.Module, name: str) -> Tensor:
    """The middle number of a parameter, a float32 scalar on the CPU."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    with _present(owner, name):
        weight = plain_tensors(getattr(owner, leaf).detach())[0]
        return weight.flatten()[weight.numel() // 2].float().cpu()


@contextlib.contextmanager
def _present(owner: nn.Module, name: str) -> Iterator[None]:
    """A context in which weights that accelerate keeps elsewhere (`device_map`, offloading) are there."""
    if not any(p.is_meta for p in owner.parameters(recurse=False)):
        yield
    elif hasattr(owner, "_hf_hook"):
        from accelerate.utils import align_module_device

        with align_module_device(owner):
            yield
    else:
        raise CodebookError(f"the model has no weights yet: {name} is on the meta device; load its checkpoint")


def _is_quantised(module: nn.Module) -> bool:
    """Whether weights are stored as packed or scaled numbers."""
    if any(p.dtype not in FLOATS or hasattr(p, "__tensor_flatten__") for p in module.parameters()):
        return True
    return any(name.rpartition(".")[2] in PACKED for name, _ in module.named_buffers())


def _weights(text: str) -> Tensor:
    """The weights in a fingerprint's hexadecimal digits, float32."""
    bits = struct.unpack(f">{len(text) // 4}h", bytes.fromhex(text))
    return torch.tensor(bits, dtype=torch.int16).view(torch.bfloat16).float()
