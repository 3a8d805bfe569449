"""What enters a model's decoder when it is shown pictures, and which of its parts have made it."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from PIL import Image as Picture
from torch import Tensor

from codebook.models.base import Model, Processor, decoder, special_tokens
from codebook.models.encoded import Encoded
from codebook.models.generic import Unproven, image_token
from codebook.models.replacing import replaced


class _Seen(Exception):  # no error: all that was to be seen has been seen
    """The end of a forward whose decoder is not needed."""


@dataclass(frozen=True)
class Entered:
    """What enters a decoder of prompts with one picture each.

    Attributes
    ----------
    ids : list[list[int]]
        Token ids of each prompt.
    visual : (B, L) bool
        Columns of image tokens.
    embeds : (B, L, d) float
        The embeddings.
    call
        The call that encoded the pictures, if the model made it.
    ran
        Paths, in the base model, of the modules that ran, in the order in which they ended.
    """

    ids: list[list[int]]
    visual: Tensor
    embeds: Tensor
    call: Encoded | None
    ran: list[str]

    @property
    def counts(self) -> list[int]:
        """Image tokens of each prompt."""
        return self.visual.sum(1).tolist()


def _prompt_of_a_picture(processor: Processor) -> str:
    """A prompt of one picture."""
    if getattr(processor, "chat_template", None):
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "."}]}
        return str(processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=False))
    if isinstance(token := getattr(processor, "image_token", None), str):
        return f"{token} ."
    raise Unproven("its processor has neither a chat template nor an image_token")


def prompt_inputs(model: Model, processor: Processor, pictures: Sequence[Picture.Image]) -> dict[str, Any]:
    """The model's inputs of a batch of prompts with one picture each."""
    text = _prompt_of_a_picture(processor)
    made = processor(
        images=[[picture] for picture in pictures],
        text=[text] * len(pictures),
        padding=True,
        padding_side="left",
        return_tensors="pt",
        **special_tokens(processor, text),
    )
    return dict(made.to(model.device, model.dtype))


def show(model: Model, processor: Processor, pictures: Sequence[Picture.Image]) -> Entered:
    """What enters the decoder of prompts with one of these pictures each."""
    return enter_decoder(model, prompt_inputs(model, processor, pictures))


def enter_decoder(model: Model, inputs: dict[str, Any]) -> Entered:
    """Run a model as far as its decoder."""
    base, ran = model.base_model, list[str]()
    calls, entered = list[Encoded](), list[Tensor]()

    def stop(_: Any, args: Any) -> None:
        entered.append(args[0])  # with what some decoders add before their first layer
        raise _Seen

    with contextlib.ExitStack() as undo:
        undo.callback(decoder(model).layers[0].register_forward_pre_hook(stop).remove)
        inside = {id(module) for module in model.get_decoder().modules()}
        for name, module in base.named_modules():
            if name and id(module) not in inside:
                undo.callback(module.register_forward_hook(lambda *_, name=name: ran.append(name)).remove)
        if hasattr(base, "get_image_features"):
            undo.enter_context(replaced(base, "get_image_features", partial(_noting, calls)))
        with contextlib.suppress(_Seen):
            model(**inputs)
    if not entered:
        raise Unproven("its decoder was not given embeddings")
    ids = inputs["input_ids"]
    visual = ids == image_token(model.config)
    if entered[0].shape[:2] != ids.shape:
        raise Unproven(f"a prompt of {ids.shape[1]} tokens enters the decoder with {entered[0].shape[1]}")
    return Entered(ids.tolist(), visual.cpu(), entered[0].float().cpu(), calls[-1] if calls else None, ran)


def _noting(calls: list[Encoded], stock: Callable[..., Any]) -> Callable[..., Any]:
    """The function that encodes images, with its calls noted."""
    signature = inspect.signature(stock)

    def noted(*args: Any, **kwargs: Any) -> Any:
        calls.append(Encoded("image", dict(signature.bind_partial(*args, **kwargs).arguments)))
        return stock(*args, **kwargs)

    return noted


def tower_path(model: Model) -> str:
    """The path of the vision tower: the part with the config of one."""
    wanted = type(model.config.vision_config)
    for name, module in model.base_model.named_modules():
        if name and type(getattr(module, "config", None)) is wanted:
            return name
    raise Unproven("it has no part with the config of a vision tower")


def projector_path(shot: Entered, tower: str) -> str:
    """The path of the projector: the last module to end before the decoder, besides those that hold the tower."""
    around = [name for name in shot.ran if name != tower and not tower.startswith(f"{name}.")]
    if not around:
        raise Unproven("no module of it was seen to encode a picture")
    return around[-1]
