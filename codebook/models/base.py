"""What the rest of the package asks a model family."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, ClassVar, Literal

import torch
from PIL import Image as Picture
from torch import Tensor, nn

from codebook.errors import CodebookError
from codebook.models.encoded import Encoded
from codebook.models.layout import KINDS, WHOLE_PICTURE, Image, Layout, fixed_layouts, pool_patches, whole_images_error

Turned = Literal["halves", "pairs", "nothing", "other"]
"""What rotary embeddings turn together: numbers half of the turned width apart, neighbours, nothing, or not known what.

They turn the first numbers of queries and keys, as many as there are cosines.
"""

Model = Any
"""A stock transformers vision-language model.

`PreTrainedModel` would say less than it seems: towers, projectors and decoders are attributes of subclasses without a
common type, and `nn.Module.__getattr__` makes each of them `Tensor | Module`, so that every access would need a cast.
"""

Processor = Any
"""The processor that goes with a model: a `ProcessorMixin`, whose image processor and tokenizer have no common type."""


CACHE_NAMES = ("cache", "past_key_values")
"""Names of the argument that holds the KV cache: the first one from transformers 5.24 on."""


class Family:
    """One model family, stateless; subclasses are registered in `codebook.models`.

    What is written here holds for the plainest family: a tower of square views that takes one row per image, all of
    whose patches, or squares of them, become the visual tokens of one grid. Subclasses say what differs.
    """

    name: str

    since: ClassVar[str] = "5.18"
    """The first version of transformers that is tested with it."""

    clip_fps: ClassVar[float | None] = None
    """Frames per second of a clip that the model's authors show it, where its processor does not say."""

    tower_rows: ClassVar[bool] = True
    """Whether the tower takes one row per image, crop or frame, and no argument that depends on their sizes."""

    axes: ClassVar[int] = 1
    """Axes of position ids; tokens of a family with several cannot be renumbered to close gaps."""

    reusable_prefix: ClassVar[bool] = True
    """Whether keys and values of a prompt's prefix depend on the prefix alone, and so can be shared between prompts."""

    one_view: ClassVar[dict[str, Any]] = {}
    """Arguments with which the processor makes one view of an image, without crops."""

    per_token: ClassVar[tuple[str, ...]] = ()
    """Further keyword arguments of decoder layers that have an entry per token, on dimension 1."""

    window_last: ClassVar[bool] = True
    """Whether a sliding window also separates tokens of one block, which otherwise all see each other."""

    chunked: ClassVar[bool] = False
    """Whether decoder layers may attend within chunks of the prompt."""

    window_blocks: ClassVar[bool] = False
    """Whether tokens of a block see each other in layers with a sliding window only."""

    def check(self, config: Any) -> Family:
        """This family; raises a CodebookError when this variant of the family is not supported."""
        return self

    def tower(self, model: Model) -> nn.Module:
        """The vision tower."""
        return model.base_model.vision_tower

    def towers(self, model: Model) -> list[nn.Module]:
        """All towers: where videos have one of their own, it comes second."""
        return [self.tower(model)]

    def projector(self, model: Model) -> nn.Module:
        """The module that maps tower features to the LLM's input space."""
        return model.base_model.multi_modal_projector

    def tower_layers(self, model: Model) -> nn.ModuleList:
        """The tower's layers."""
        tower: Any = self.tower(model)
        return tower.encoder.layers

    def layer(self, model: Model) -> int:
        """The index of the tower's hidden state that feeds the projector, of several the deepest; 0 enters the tower.

        Negative ones count from the end.
        """
        layer = getattr(model.config, "vision_feature_layer", -1)
        count = len(self.tower_layers(model)) + 1
        return layer if isinstance(layer, int) else max(layer, key=lambda index: index % count)

    def check_attention(self) -> None:
        """Raise a CodebookError if methods cannot ask how the decoder attends."""

    def keys_layers(self, model: Model) -> list[int]:
        """For each decoder layer the one whose keys and values it attends to: itself, or an earlier one."""
        return list(range(len(decoder(model).layers)))

    def last_norm(self, model: Model) -> nn.Module:
        """The normalisation behind the decoder's last layer."""
        return decoder(model).norm

    def attention_norm(self, layer: Any) -> nn.Module:
        """The normalisation before a decoder layer's attention."""
        return layer.input_layernorm

    def vision_attention(self, model: Model) -> nn.Module:
        """The attention module of the tower's layer whose output feeds the projector."""
        layers = self.tower_layers(model)
        source = range(len(layers) + 1)[self.layer(model)] - 1
        if source < 0:
            raise CodebookError("the projector is fed by the tower's input: there is no attention before it")
        return self.attention_of(layers[source])

    def vision_attentions(self, model: Model) -> list[nn.Module]:
        """As `vision_attention`, of all towers."""
        return [self.vision_attention(model)]

    def attended(self, model: Model, encoded: Encoded) -> Sequence[tuple[int, slice | list[int]]] | None:
        """For each image or frame its row in the tower's attention, and its tokens there.

        None if the attention module is called for each, or they are its rows.
        """
        return None

    def attention_of(self, layer: Any) -> nn.Module:
        """The attention module of one of the tower's layers."""
        return layer.self_attn

    def has_cls(self, model: Model) -> bool:
        """Whether the tower puts a [CLS] token before the patches."""
        return getattr(model.config, "vision_feature_select_strategy", "full") == "default"

    def patches(self, model: Model) -> tuple[int, int]:
        """Rows and columns of the tower's patches of one view."""
        side = model.config.vision_config.image_size // model.config.vision_config.patch_size
        return side, side

    def merge(self, model: Model) -> int:
        """Patches down, and across, that make one visual token."""
        return 1

    def view_size(self, model: Model, rows: int, cols: int) -> tuple[int, int]:
        """Height and width in pixels of a picture whose whole view, of so many visual tokens, is of its own size."""
        side = patch_side(model) * self.merge(model)
        return rows * side, cols * side

    def grid(self, model: Model) -> tuple[int, int]:
        """Rows and columns of the view that a codebook is built from: a whole image, without crops."""
        (rows, cols), size = self.patches(model), self.merge(model)
        return rows // size, cols // size

    def layouts(self, model: Model, kind: str, prompts: list[list[int]], encoded: Encoded | None) -> list[list[Layout]]:
        """The images, or videos, of each prompt of a batch.

        Parameters
        ----------
        kind
            `image` or `video`.
        prompts
            Token ids, one list per row of the batch.
        encoded
            The call that encoded them, or None if it was not seen.

        Raises
        ------
        CodebookError
            If the tokens are not those of whole images.
        """
        return fixed_layouts(Layout.stacked(1, *self.grid(model), "view"), prompts, self.token(model, kind))

    def token(self, model: Model, kind: str) -> int:
        """The token id that stands in prompts for visual tokens of an `image` or `video`."""
        return int(getattr(model.config, f"{kind}_token_id"))

    def images(self, model: Model, prompts: list[list[int]], encoded: dict[str, Encoded | None]) -> list[list[Image]]:
        """The images and videos of each prompt, in order.

        Parameters
        ----------
        prompts
            Token ids, one list per row of the batch.
        encoded
            For each kind that the prompts show, the call that encoded it, or None if it was not seen.

        Returns
        -------
        For each row its images, in the order of their tokens
        """
        found: list[list[Image]] = [[] for _ in prompts]
        for kind, call in encoded.items():
            rows, visual = self.layouts(model, kind, prompts, call), self.token(model, kind)
            pieces = [sum(layout.pieces for layout in row) for row in rows]
            first = None if call is None else _first_pieces(kind, len(self.pixels(model, call)), pieces)
            for i, (ids, row) in enumerate(zip(prompts, rows, strict=True)):
                columns = [column for column, token in enumerate(ids) if token == visual]
                start, piece = 0, 0 if first is None else first[i]
                for layout in row:
                    stop, after = start + layout.length, piece + layout.pieces
                    sources = None if first is None else tuple(range(piece, after))
                    found[i].append(Image(kind, layout, tuple(columns[start:stop]), sources))
                    start, piece = stop, after
        return [sorted(row, key=lambda image: image.columns) for row in found]

    def unseen_error(self, kind: str) -> CodebookError:
        """The error for a call that was not seen, in families whose images differ in size."""
        return CodebookError(
            f"{self.name} needs to see its {kind}s encoded to know their sizes: call get_{kind}_features inside the "
            f"pruning context, or pass {KINDS[kind]}"
        )

    def pixels(self, model: Model, encoded: Encoded) -> list[Tensor]:
        """The pixels that the call encoded, one tensor per piece, the same whatever else is in the batch."""
        return list(encoded.given["pixel_values"])

    def pack(self, model: Model, encoded: Encoded, values: list[Tensor]) -> list[Tensor]:
        """Bring values of patches into the order of visual tokens, as the model does with its features.

        Parameters
        ----------
        values
            One (N, D) tensor per row of the tower or, where it has a single row, per image or frame in it.

        Returns
        -------
        One (n, D) tensor per piece: the average of each token's patches, zero for structural tokens
        """
        size = self.merge(model)
        return values if size == 1 else [pool_patches(patches, self.patches(model)[1], size) for patches in values]

    def blocks(self, model: Model, given: dict[str, Any]) -> Tensor | None:
        """Which of a forward's tokens see each other in both directions.

        Parameters
        ----------
        given
            Arguments of the base model's forward.

        Returns
        -------
        (B, L) int64, equal numbers for tokens of one block and -1 for causal ones; None if all are causal
        """
        return None

    def longest(self, model: Model) -> int | None:
        """Most tokens up to the end of a prompt that can be pruned, if there is a limit."""
        return None

    def rotary(self, given: Any) -> tuple[Tensor, Tensor]:
        """Cosines and sines (B, P, d) of the rotary embeddings that decoder layers are given."""
        cos, sin = given
        return cos, sin

    def rotary_given(self, cos: Tensor, sin: Tensor) -> Any:
        """The opposite of `rotary`: what decoder layers are given."""
        return cos, sin

    def rotary_module(self, model: Model, layer: Any) -> nn.Module:
        """The module that makes the rotary embeddings of a decoder layer."""
        return decoder(model).rotary_emb

    def turned(self, model: Model, layer: nn.Module) -> Turned:
        """What the rotary embeddings of a decoder layer turn."""
        return "halves"

    def entering(self, model: Model, embeds: Tensor, given: Mapping[str, Any]) -> Tensor:
        """What enters the decoder's first layer (B, L, d), of embeddings and the other arguments of the decoder."""
        return embeds

    @contextlib.contextmanager
    def patched_extra_inputs(self, model: Model, gather: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """A context in which inputs that deeper layers add to the hidden states are shortened as those are.

        Parameters
        ----------
        gather
            Takes (B, L, d) for the whole prompt to (B, L', d) for the tokens that are left.
        """
        yield

    def shown_box(self, processor: Processor, size: tuple[int, int]) -> tuple[float, float, float, float]:
        """The part of a picture of this width and height that its whole view shows: left, top, right, bottom in [0, 1].

        Most processors squeeze a picture into the view, or make the view of the picture's shape.
        """
        return WHOLE_PICTURE

    def view(self, processor: Processor, picture: Picture.Image) -> Tensor:
        """Pixels of the whole view of a picture, as `image_features` takes them."""
        return processor.image_processor(images=picture, return_tensors="pt", **self.one_view)["pixel_values"]

    def without_crops(self, model: Model, ids: list[int]) -> list[int]:
        """A prompt with one image, less the tokens of its crops that `one_view` leaves in."""
        return ids

    def image_features(self, model: Model, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Encode the whole views of images.

        Parameters
        ----------
        pixel_values
            (n_images, 3, H, W) float, or as the family's image processor shapes it.

        Returns
        -------
        projected : (n_images, n, width), projector outputs, in the LLM's input space; see `width`
        patches : (n_images, n, D), tower features before the projector, the average of each token's patches
        cls : (n_images, D) of the same layer, or None for towers without a [CLS] token
        """
        out = model.base_model.get_image_features(pixel_values=pixel_values, return_dict=True)
        hidden = self.tower_features(model, out)
        patches, cls = (hidden[:, 1:], hidden[:, 0]) if self.has_cls(model) else (hidden, None)
        packed = self.pack(model, Encoded("image", {"pixel_values": pixel_values}), list(patches))
        return torch.stack(list(out.pooler_output)), torch.stack(packed), cls

    def tower_features(self, model: Model, out: Any) -> Tensor:
        """(rows, N, D), the hidden state that feeds the projector, from what the tower put out."""
        return out.hidden_states[self.layer(model)] if hasattr(model.config, "vision_feature_layer") else out[0]

    def width(self, model: Model) -> int:
        """Numbers per visual token: the embedding that enters the LLM, then what deeper layers add to it."""
        return int(model.config.get_text_config().hidden_size)

    def answer(self, model: Model, embeds: Tensor, start: int, grid: tuple[int, int]) -> Tensor:
        """Logits of the first token generated after a prompt.

        Parameters
        ----------
        embeds : (b, L, width) float
            Text, the visual tokens from column `start` on, text.
        grid
            Rows and columns of the visual tokens.

        Returns
        -------
        (b, vocabulary)
        """
        arguments = self.probe_arguments(model, embeds, start, grid)
        return model(inputs_embeds=embeds, use_cache=False, logits_to_keep=1, **arguments).logits[:, -1]

    def words(self, model: Model, ids: Tensor) -> Tensor:
        """(..., hidden size), what enters the LLM for the tokens of text (...) int64 of a prompt with an image."""
        return model.get_input_embeddings()(ids)

    def probe_arguments(self, model: Model, embeds: Tensor, start: int, grid: tuple[int, int]) -> dict[str, Any]:
        """Further keyword arguments for the model's forward of a prompt that is laid out as for `answer`."""
        return {}

    def encode(self, model: Model, pixels: Tensor, rows: int, cols: int) -> Tensor:
        """Encode an image at another size.

        Parameters
        ----------
        pixels : (3, H, W) float
            One image of `pixels`.
        rows, cols
            Visual tokens of the resized image.

        Returns
        -------
        (rows * cols, d), the projector's output

        Raises
        ------
        CodebookError
            If the family's tower has one size only.
        """
        raise CodebookError(f"models of type {self.name} cannot encode an image at another size: use another method")


def cache_of(given: Mapping[str, Any]) -> Any:
    """The KV cache among the arguments of a model's forward, its decoder's or a layer's; None if there is none."""
    return next((given[name] for name in CACHE_NAMES if given.get(name) is not None), None)


def patch_side(model: Model) -> int:
    """Pixels per side of a patch, as far as the config tells: it need not be right."""
    patch = getattr(model.config.vision_config, "patch_size", None) or 14
    return int(patch if isinstance(patch, int) else patch[0])


def decoder(model: Model) -> Any:
    """The module whose `layers` are the decoder's: the model's own answer, or what has a head around it in that."""
    found = model.get_decoder()
    return found if hasattr(found, "layers") else found.model


def attention_kernel(model: Model) -> str:
    """Name of the kernel of the decoder's attention, such as `sdpa`."""
    return str(decoder(model).config._attn_implementation)


def rotary_at(rotary: nn.Module, embeds: Tensor, positions: Tensor, layer: Any) -> Any:
    """What a decoder layer is given of positions (B, P) int64 by the module of its rotary embeddings."""
    kinds = (getattr(layer.self_attn, "layer_type", None), getattr(layer, "attention_type", None))
    kind = [kinds[0] or kinds[1]] if _takes_kind(type(rotary).forward) else []
    return rotary(embeds, positions, *kind)


@cache
def _takes_kind(forward: Callable[..., Any]) -> bool:
    """Whether rotary embeddings are asked for one kind of layer at a time."""
    return "layer_type" in inspect.signature(forward).parameters


def window(layer: Any) -> int | None:
    """How far back a decoder layer with attention looks, if not to the beginning."""
    attention = layer.self_attn
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window
    # Where the attention does not know, all layers are alike.
    return None if getattr(attention.config, "layer_types", None) else getattr(attention.config, "sliding_window", None)


def chunk(layer: Any) -> int | None:
    """How long the chunks are within which a decoder layer with attention looks back, if it does so."""
    attention = layer.self_attn
    size = getattr(attention.config, "attention_chunk_size", None)
    return size if size and attention.config.layer_types[attention.layer_idx] == "chunked_attention" else None


def _first_pieces(kind: str, encoded: int, per_row: list[int]) -> list[int]:
    """For each row the first of the encoded pieces that it shows; copies of a row, such as beams, show the same."""
    total = sum(per_row)
    if not encoded or total % encoded:
        raise whole_images_error(kind, f"{total} {kind}s in the prompt, where {encoded} were encoded")
    repeats, out, start = total // encoded, [], 0
    for row, count in enumerate(per_row):
        out.append(start)
        start += count if row % repeats == repeats - 1 else 0
    return out


def special_tokens(processor: Processor, text: str) -> dict[str, bool]:
    """Options with which a prompt is tokenized: one that begins with the token of the beginning gets no second one.

    The rule of transformers' own `apply_chat_template(tokenize=True)`.
    """
    begin = processor.tokenizer.bos_token
    return {"add_special_tokens": False} if begin is not None and text.startswith(begin) else {}
