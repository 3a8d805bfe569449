"""Loading a model and its processor by name."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from logging import INFO, getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from codebook.errors import (
    CodebookError,
    check_revision,
    did_you_mean,
    is_unreachable,
    named_line,
    one_line,
    quoted,
    unknown,
)
from codebook.models.assembly import assembled
from codebook.models.base import Family, Model, Processor
from codebook.models.finite import check_weights, some
from codebook.models.foreign import foreign_type_error
from codebook.models.generic import Untested, image_token
from codebook.models.registry import check_model, family_of_config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_MINIATURE = Path(__file__).parents[1] / "miniature"
SHIPPED_MODELS = {"miniature": _MINIATURE / "weights", "eyes": _MINIATURE / "weights_eyes"}
"""Folders of the models that ship with the package, by the name that `load` takes."""

EXAMPLES = {
    "miniature": "'is there a red circle?', 'how many objects are there?', 'read the number.' (docs/miniature.md)",
}
"""Questions that a shipped model can be asked."""

READ_WHOLE = {".json", ".jinja", ".txt", ".model"}
"""Endings of a model's files that are read whole: configs, chat templates, vocabularies."""

LARGEST_MODEL_TEXT = 2**28
"""Most bytes of such a file; the largest tokenizers have 35 million."""

DTYPES = ("float32", "bfloat16", "float16", "auto")
"""Names of the dtypes that models are loaded in; `auto` is the checkpoint's own."""

DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
"""Ways in which accelerate puts a model on the devices that there are."""

OF_FILES = (
    "revision", "token", "cache_dir", "local_files_only", "force_download", "proxies", "subfolder",
)  # fmt: skip
"""Arguments of `from_pretrained` that say which files are meant: config and processor are read with them, too."""

DECIDED = ("trust_remote_code", "output_loading_info", "ignore_mismatched_sizes", "torch_dtype")
"""Arguments of `from_pretrained` that `load` itself decides."""

LFS_POINTER = b"version https://git-lfs"
"""First bytes of the file that git leaves in the place of a large one."""


def load(
    name: str, device: torch.device | str | None = None, dtype: torch.dtype | str | None = None, **options: Any
) -> tuple[Model, Processor]:
    """Load a model and its processor for inference. Code that comes with a model is never run.

    Parameters
    ----------
    name
        `miniature` or `eyes`, which ship with the package (of `eyes` the language model is fetched once, 93 MB), a
        folder, or a name on the Hugging Face Hub.
    device
        Default: `cuda` when there is one, else `cpu`.
    dtype
        A dtype or its name; `auto` is the one that the checkpoint names. Default: float32 on the CPU, elsewhere `auto`.
    **options
        Further arguments of transformers' `from_pretrained`: `revision`, `attn_implementation`, `device_map` in the
        place of `device`, `quantization_config` and so on. A quantised model is put where it is made, on `device`.

    Returns
    -------
    (model, processor)

    Raises
    ------
    CodebookError
        If the device is not there, or an argument is not possible; if the model cannot be found or read, needs code of
        its own, or is of a family that is not supported, or that no file describes and the test refuses; if its weights
        do not fit its config, or are not numbers.
    """
    model, processor = load_untested(name, device, dtype, **options)
    if isinstance(family_of_config(model.config), Untested) and (reason := check_model(model, processor).reason):
        raise CodebookError(reason)
    return model, processor


def load_untested(
    name: str, device: torch.device | str | None = None, dtype: torch.dtype | str | None = None, **options: Any
) -> tuple[Model, Processor]:
    """As `load`, without the test of a model whose family no file describes."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    device = check_loading(name, device, dtype, **options)
    with _explaining(name, options):
        folder, files, config = _located(name, options)  # before gigabytes are read
        if options.get("quantization_config") or getattr(config, "quantization_config", None):
            options.setdefault("device_map", {"": device})  # packed weights do not move afterwards
        # Without the config, the class of what also speaks is looked for.
        own = {"config": config} if str(getattr(config, "model_type", "")).endswith("_thinker") else {}
        chosen: Any = dtype or ("float32" if torch.device(device).type == "cpu" else "auto")
        # Not as a decorator, behind which type checkers see no signature.
        with torch.inference_mode(False):  # whatever the caller's: weights made in inference mode cannot be trained
            quiet = getLogger("codebook").level > INFO  # as `--quiet` sets it
            with _silent(bars=name not in SHIPPED_MODELS and not quiet):
                loaded: Any = AutoModelForImageTextToText.from_pretrained(
                    str(folder), dtype=chosen, output_loading_info=True, ignore_mismatched_sizes=True,
                    **options | files | own,
                )  # fmt: skip
            model, found = loaded
            _check_fit(name, model, found)
            if options.get("device_map") is None:
                model = model.to(device)
            model.eval()
            check_weights(name, model)
        processor = AutoProcessor.from_pretrained(str(folder), **files)
        _check_processor(name, model, processor)
        return model, processor


def check_loading(
    name: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    **options: Any,
) -> str:
    """The device that arguments of `load` mean; whatever else is wrong with them is refused, as far as it shows now.

    Raises
    ------
    CodebookError
        If there is no such device or dtype, or an argument does not go with the model, the others or this package.
    """
    if name == "":  # as a variable that is not set; it would mean the folder that we are in
        raise CodebookError("the model's name is empty: name one")
    check_dtype(dtype)
    if taken := sorted(set(options).intersection(DECIDED)):
        raise CodebookError(f"{taken[0]} is not for users to say: leave it out (for precision there is dtype)")
    check_revision(options.get("revision"))
    if options.get("revision") is not None and name is not None and (name in SHIPPED_MODELS or Path(name).is_dir()):
        raise CodebookError(
            f"models on the Hugging Face Hub have revisions, and {name} is on this machine: leave it out"
        )
    placed = options.get("device_map")
    if placed is None:
        return check_device(device)
    if device is not None:
        raise CodebookError("device and device_map both say where the model goes: leave one out")
    if isinstance(placed, str) and placed not in DEVICE_MAPS:
        raise CodebookError(f"no device_map {quoted(placed)}: use {', '.join(DEVICE_MAPS)}, or name a device instead")
    if find_spec("accelerate") is None:
        raise CodebookError("device_map needs accelerate, which is not installed: `pip install accelerate`")
    if not isinstance(placed, str):
        for place in placed.values() if isinstance(placed, Mapping) else [placed]:
            if place != "disk":  # which is no device of torch
                check_device(f"cuda:{place}" if isinstance(place, int) else place)
    return check_device(None)


def check_dtype(dtype: torch.dtype | str | None) -> None:
    """Refuse a dtype that no model is loaded in; None stands for the default."""
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        return
    if dtype is not None and dtype not in DTYPES:
        raise unknown("no dtype", str(dtype), DTYPES)


def load_processor(name: str, **options: Any) -> tuple[Family, Processor]:
    """The family and the processor of a model, without its weights; arguments and errors as in `load`."""
    from transformers import AutoProcessor

    with _explaining(name, options):
        folder, files, config = _located(name, options)
        return family_of_config(config), AutoProcessor.from_pretrained(str(folder), **files)


def read_config_of(name: str, **options: Any) -> tuple[Path, PreTrainedConfig]:
    """The config of a model that `load` could load by this name, and the folder or name on the hub where it is.

    Parameters
    ----------
    name, **options
        As `load` takes them; only the options that say which files are meant count.

    Raises
    ------
    CodebookError
        As `load` does, as far as that shows without the weights.
    """
    with _explaining(name, options):
        folder, _, config = _located(name, options)
        return folder, config


def _located(name: str, options: Mapping[str, Any]) -> tuple[Path, dict[str, Any], PreTrainedConfig]:
    """A model's folder or name on the hub, the arguments with which all its files are read, and its config."""
    if not isinstance(name, str | Path):
        raise CodebookError(f"a model is said by its name or folder, not by {quoted(name)}: name `miniature`, a folder "
                            "or OWNER/NAME")  # fmt: skip
    check_revision(options.get("revision"))
    folder = assembled(SHIPPED_MODELS.get(name, Path(name)))
    files = {"trust_remote_code": False, **{key: options[key] for key in OF_FILES if key in options}}
    if "local_files_only" not in files:
        files["local_files_only"] = folder.is_dir() or not _hub_answers(name, files)
    return folder, files, _check_config(name, folder, files)


def _hub_answers(name: str, files: Mapping[str, Any]) -> bool:
    """Whether the hub is reached, asked once. For each file that is not in the cache its client would ask six times.

    Raises
    ------
    CodebookError
        If it cannot be a name on the hub.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HFValidationError

    if Path(name).is_file():
        raise CodebookError(f"cannot load {name}: it is a file; name the folder of the model's files")
    try:
        url = hf_hub_url(name, "config.json", revision=files.get("revision"))
        get_hf_file_metadata(url, token=files.get("token"))
    except HFValidationError:
        raise CodebookError(
            f"cannot load {name}: it is no folder and no name on the Hugging Face Hub; name `miniature`, a folder or "
            "OWNER/NAME"
        ) from None
    except Exception as error:  # what else is wrong shows when the files are read
        return not is_unreachable(error)
    return True


def check_device(device: torch.device | str | None) -> str:
    """The name of a device; None stands for `cuda` if there is one, else `cpu`.

    Raises
    ------
    CodebookError
        If this machine has no device of that name, or nothing can be computed on it.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = str(device)
    try:
        if torch.device(device).type == "cpu" and device != "cpu":
            raise ValueError("all cores are one device")
        torch.zeros(1, device=device).cpu()
    except Exception as error:  # torch raises three types, by the kind of device
        there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        there += ["mps"] * torch.backends.mps.is_available()
        raise CodebookError(
            f"cannot use the device {device[:40]!r}: {one_line(error, 120)}; use {', '.join(there)}"
        ) from None
    return device


def _check_config(name: str, folder: Path, options: dict[str, Any]) -> PreTrainedConfig:
    """The model's config; refuses a model that cannot be loaded, as far as that shows without its weights."""
    from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise CodebookError(f"{name or '.'} holds no config.json: name a transformers model folder")
        for file in sorted(folder.iterdir()):
            _check_file(file)
    written, _ = PreTrainedConfig.get_config_dict(str(folder), **options)
    if isinstance(kind := written.get("model_type"), str) and kind not in CONFIG_MAPPING:
        raise foreign_type_error(name, kind)
    config = AutoConfig.from_pretrained(str(folder), **options)
    config = getattr(config, "thinker_config", None) or config  # of what also speaks, the part that sees
    family_of_config(config)
    _check_size(name, folder, config)
    return config


def _check_file(file: Path) -> None:
    """Refuse what would block a reader or fill the memory, and pointers in the place of files."""
    if file.is_dir():
        return
    if not file.is_file():
        raise CodebookError(f"{file} is no regular file, or a link to none: put the file itself there")
    size = file.stat().st_size
    if file.suffix in READ_WHOLE and size > LARGEST_MODEL_TEXT:
        raise CodebookError(
            f"{file} has {size:,} bytes, more than the {LARGEST_MODEL_TEXT:,} that are read: fetch it again"
        )
    if size < 1024 and file.read_bytes().startswith(LFS_POINTER):
        raise CodebookError(f"{file} is a pointer of git-lfs and not the file itself: run `git lfs pull` in its folder")


def _check_size(name: str, folder: Path, config: Any) -> None:
    """Refuse a config that describes more weights than the folder's files hold, before memory is taken for them."""
    from safetensors import safe_open
    from transformers import AutoModelForImageTextToText

    files = sorted(folder.glob("*.safetensors"))
    if not files or getattr(config, "quantization_config", None):  # packed weights are fewer numbers
        return
    tensors = numbers = 0
    for file in files:
        with safe_open(file, framework="pt") as held:
            sizes = [torch.Size(held.get_slice(key).get_shape()).numel() for key in held.keys()]  # noqa: SIM118
        tensors, numbers = tensors + len(sizes), numbers + sum(sizes)
    parts = (config.get_text_config(), config.vision_config)
    layers = max(getattr(part, "num_hidden_layers", 0) or getattr(part, "depth", 0) for part in parts)
    if layers <= tensors:
        with torch.device("meta"):
            described = sum(p.numel() for p in AutoModelForImageTextToText.from_config(config).parameters())
    if layers > tensors or described > 1.01 * numbers:
        what = f"{layers} layers" if layers > tensors else f"{described:,} weights"
        raise CodebookError(
            f"the config.json of {name} describes {what} and its files hold {tensors} tensors of {numbers:,} numbers: "
            "they do not belong together, or a file is missing; fetch them again"
        )


def _check_fit(name: str, model: Model, found: dict[str, Any]) -> None:
    """Refuse a model of which some weights were not in the checkpoint, or the checkpoint has layers that it lacks."""
    missing = sorted(found["missing_keys"])
    misshapen = sorted(key if isinstance(key, str) else key[0] for key in found["mismatched_keys"])
    if found["unexpected_keys"] and getattr(model.config, "auto_map", None):
        raise CodebookError(
            f"{name} comes with code of its own (auto_map in its config.json), which is never run, and holds weights "
            f"that transformers' own class has no place for: {some(sorted(found['unexpected_keys']))}; use a "
            "checkpoint that was converted for transformers"
        )
    # Of what the model has no place for, more layers are a fault; heads and buffers of other programs are not.
    surplus = sorted(key for key in found["unexpected_keys"] if _is_surplus_layer(model, key))
    for names, what in (
        (missing, "lack weights that its config.json asks for"),
        (misshapen, "hold weights of other shapes than its config.json says"),
        (surplus, "hold layers that its config.json leaves out"),
    ):
        if names:
            raise CodebookError(
                f"the files of {name} {what}: {some(names)}; they do not belong together, or a file is missing: fetch "
                "them again"
            )


def _is_surplus_layer(model: Model, key: str) -> bool:
    """Whether a tensor belongs to a layer behind the last one that the model has."""
    for number in re.finditer(r"\.(\d+)\.", key):
        try:
            layers = model.get_submodule(key[: number.start()])
        except AttributeError:
            return False
        if isinstance(layers, nn.ModuleList) and int(number[1]) >= len(layers):
            return True
    return False


def _check_processor(name: str, model: Model, processor: Processor) -> None:
    """Refuse a processor that marks images by another token than the model looks for."""
    theirs, own = getattr(processor, "image_token_id", None), image_token(model.config)
    # Some put several tokens in the place of the one that stands in a chat prompt.
    if theirs is not None and own not in (theirs, *(getattr(processor, "image_token_ids", None) or ())):
        raise CodebookError(
            f"the processor of {name} marks images by token {theirs} and its config.json by {own}: they do not belong "
            "together; fetch them again"
        )


@contextlib.contextmanager
def _explaining(name: str, options: Mapping[str, Any]) -> Iterator[None]:
    """A context whose errors are one line about this model, loaded with these options."""
    try:
        yield
    except CodebookError:
        raise
    except Exception as error:  # the libraries raise a dozen types for damaged files
        raise CodebookError(_reason(name, error, options)) from None


def _reason(name: str, error: Exception, options: Mapping[str, Any]) -> str:
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalEntryNotFoundError, RevisionNotFoundError
    from safetensors import SafetensorError

    text, revision = one_line(error), options.get("revision")
    behind = (error, error.__cause__, error.__context__)
    if any(isinstance(one, RevisionNotFoundError) for one in behind):
        return f"cannot load {name}: it has no revision {quoted(revision)}; name a branch, a tag or a commit"
    if any(isinstance(one, LocalEntryNotFoundError) for one in behind):
        why = f"{constants.ENDPOINT} is not reached: check the name and the connection"
        if constants.HF_HUB_OFFLINE or options.get("local_files_only"):
            why = "nothing may be fetched (HF_HUB_OFFLINE, local_files_only)"
        near = did_you_mean(name, SHIPPED_MODELS)
        what = "it is no folder and" if revision is None else f"its revision {quoted(revision)} is"
        return f"cannot load {name}: {near}{what} not whole in the hub's cache, and {why}"
    if isinstance(error, ImportError) and "torchvision" in text.lower():
        return (
            f"the processor of {name} needs torchvision, which is not installed: install the torchvision that goes "
            f"with torch {torch.__version__.split('+')[0]}"
        )
    if isinstance(error, SafetensorError):
        return f"cannot load {name}: its weights are damaged or not all there ({text}); fetch them again"
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return f"cannot load {name}: there is not enough memory ({text}); use a smaller model or dtype"
    if isinstance(error, OSError | ValueError | ImportError | TypeError) and options:
        return f"cannot load {name}: {text}; check the name, and {', '.join(sorted(options))}"
    if isinstance(error, OSError | ValueError | ImportError):
        return f"cannot load {name}: {text}; name `miniature`, a folder or a hub model"
    return f"cannot load {name}: {named_line(error)}; a file of it is damaged: fetch it again"


@contextlib.contextmanager
def _silent(bars: bool) -> Iterator[None]:
    """A context without transformers' report of weights that do not fit, which we check, and without its bars."""
    from huggingface_hub import constants
    from transformers.utils import logging

    level, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not bars and constants.HF_HUB_DISABLE_PROGRESS_BARS is not False:  # with 0 a user asks for bars, and it warns
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
