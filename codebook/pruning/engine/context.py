"""The one mechanism that prunes any supported model: plain torch hooks, gone when the last context is left.

Every stage works alike, whatever its layer: the input of that decoder layer is gathered down to the text and the kept
visual tokens, values that the pruner merged are written over theirs, and from there on each layer gets hidden states,
rotary embeddings and a mask of that shorter sequence, and stores only its keys and values. Before the LLM means layer
0. Which logical columns a cache layer stores (`KeptIndex`) is all that is needed to make any later mask: decoding,
ragged batches, continuation.

Hooks belong to the model and are shared by all of its contexts (`Attachment`); what a call needs lives with the call.
A call is one `generate`, or one forward outside of it. Which context prunes it is decided once, when it starts, and
holds until it ends, whatever contexts open and close meanwhile. While it runs, its state is in context variables: every
thread, and every asyncio task, has its own.
"""

from __future__ import annotations

import contextlib
import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NoReturn

from torch import Tensor

from codebook import models
from codebook.errors import CodebookError
from codebook.models import Image
from codebook.models.base import Model, decoder
from codebook.pruning.engine.attachment import Attachment
from codebook.pruning.engine.calls import ATTACHING, SCOPED, owner
from codebook.pruning.engine.kernels import check_attention
from codebook.pruning.engine.statistics import Statistics, Tally
from codebook.pruning.kept_map import MAP_FORMAT, kept_map
from codebook.store.files import write_json

if TYPE_CHECKING:  # a schedule makes contexts; a context only reads what a schedule says
    from codebook.pruning.schedule import Schedule

Scope = Literal["model", "thread"]


class Pruning:
    """The context in which a model's visual tokens are pruned by a schedule; made by calling the schedule.

    Parameters
    ----------
    scope
        `model`: every call of the model that starts while the context is open is pruned, whatever its thread. One such
        context can be open on a model at a time. `thread`: only calls of the thread, or asyncio task, that opened it,
        and it takes precedence there; calls elsewhere are pruned by their own contexts or not at all.

    Attributes
    ----------
    images : list[Image]
        After a forward with images: those that its prompts show, in order of rows, and how their tokens are laid out.
        The forward is the last of the asking thread; of any thread, if that one has had none.
    kept : list[list[Tensor]]
        For each of them the tokens (int64) that survived each stage, by their places among the image's visual tokens:
        `image.locate` gives grid, row and column; in an image of one grid it is the raster position.
    statistics : Statistics
        What all calls so far add up to. Reading it waits until a GPU has finished choosing; pruning itself never does.
    """

    def __init__(self, model: Model, schedule: Schedule, scope: Scope = "model") -> None:
        if scope not in ("model", "thread"):
            raise CodebookError(f"scope must be 'model' or 'thread', not {scope!r}")
        self.model, self.schedule, self.scope = model, schedule, scope
        self.family = models.family(model)
        self.lm = decoder(model)
        schedule.check_layers(len(self.lm.layers))
        self._check_reused_keys()
        check_attention(self.lm.config._attn_implementation, model.device.type)
        _check_one_device(model)
        if schedule.positions == "compact" and self.family.axes > 1:
            raise CodebookError(
                f"positions of {self.family.name} have {self.family.axes} axes and cannot be renumbered: use "
                "positions='keep', which is '; positions=keep' behind a schedule's text or a preset's name"
            )
        self.stages = {stage.layer: stage for stage in schedule.stages}
        self.open = self.enabled = False
        self.tally = Tally(len(self.lm.layers))
        self.seen_images = self.seen_prompt = False
        self.calls = 0  # in flight
        self.taps = contextlib.ExitStack()
        self.pointed = False  # whether the layers' attention adds what there is to its logits: among the taps
        self.attachment: Attachment | None = None
        self.owner: tuple[int, Any] | None = None  # the thread and task that opened it
        self._latest = _Shown([], [])
        self._own = threading.local()

    def _check_reused_keys(self) -> None:
        """Refuse stages behind a layer whose keys later ones use, too: these would go on to see what it saw."""
        last = models.shape(self.model).stages - 1
        early = [stage for stage in self.schedule.stages if stage.layer < last]
        if late := [stage for stage in self.schedule.stages if stage.layer > last]:
            instead = replace(self.schedule, stages=[*early, replace(late[0], layer=last)])
            raise CodebookError(
                f"the schedule prunes at layer {late[0].layer}, but the last layers of this {self.family.name} have no "
                f"keys and values of their own and use those of layer {last}: use layers up to {last}, as in "
                f"'{instead}'"
            )

    def __repr__(self) -> str:
        state = "enabled" if self.enabled else "open" if self.open else "closed"
        so_far = self.tally.read(wait=False)
        return f"<Pruning of {type(self.model).__name__} by '{self.schedule}', scope {self.scope}, {state}: {so_far}>"

    def __reduce_ex__(self, _: Any) -> NoReturn:
        raise CodebookError(
            "a pruning context cannot be copied or saved: copy its schedule, and write what it kept by its `save`"
        )

    def __enter__(self) -> Pruning:
        with ATTACHING:
            self.attachment = Attachment.of(self.model)
            self.attachment.add(self, owner())
        if self.scope == "thread":
            SCOPED.set((*SCOPED.get(), self))
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.attachment is None or not self.open:
            return
        calls = self.attachment.calls
        calls.end()  # a forward of this thread that was interrupted
        calls.encodings.forget(shown=False)
        elsewhere = self.scope == "thread" and self not in SCOPED.get()
        SCOPED.set(tuple(other for other in SCOPED.get() if other is not self))
        with ATTACHING:
            self.open, self.enabled, idle = False, False, not self.calls
            calls.settle(self)
        if kind is None and elsewhere:
            raise CodebookError(
                "a context of scope 'thread' was left in another thread than opened it, as of a generator that several "
                "threads drive, and does not prune calls there: open it around each call, or with scope='model'"
            )
        # What calls in flight have encoded they will still show.
        if kind is None and idle and self.seen_images and not self.seen_prompt:
            raise CodebookError(
                "images were encoded in this context, but no forward of the model showed them, so nothing was pruned: "
                f"call the {type(self.model).__name__} itself with input_ids and pixel_values, not its parts"
            )

    def is_own(self) -> bool:
        """Whether this thread opened it."""
        return self.owner is not None and self.owner[0] == threading.get_ident()

    @property
    def images(self) -> list[Image]:
        """The images of the asking thread's last forward with any, as the class says."""
        return self._shown.images

    @property
    def kept(self) -> list[list[Tensor]]:
        """For each of `images` and each stage the tokens (k,) int64 that survived it."""
        return self._shown.kept

    @property
    def statistics(self) -> Statistics:
        """What all calls of this context so far add up to."""
        return self.tally.read()

    def save(self, path: Path | str) -> None:
        """Write `images` and `kept` to the JSON file `path`, whole or not at all; docs/pruning.md says its keys.

        Raises
        ------
        CodebookError
            If no image was shown yet, or the file cannot be written.
        """
        images, kept = self._shown
        if not images:
            raise CodebookError("no image was shown in this context yet, so there is no map to save")
        maps = [
            {"kind": image.kind, **kept_map(image, self.schedule, stages)}
            for image, stages in zip(images, kept, strict=True)
        ]
        write_json(path, {"format": MAP_FORMAT, "schedule": str(self.schedule), "images": maps})

    @property
    def _shown(self) -> _Shown:
        return getattr(self._own, "last", self._latest)

    def show(self, images: list[Image], kept: list[list[Tensor]]) -> None:
        """Take the `images` of a forward, and `kept`, which its stages fill, for its thread's latest and for all's."""
        self._own.last = self._latest = _Shown(images, kept)


def _check_one_device(model: Model) -> None:
    """Refuse a model that accelerate has put on several devices; what it keeps on the CPU or a disk runs on the one."""
    placed = {str(device) for device in getattr(model, "hf_device_map", {}).values()} - {"cpu", "disk"}
    if len(placed) > 1:
        raise CodebookError(
            f"the model lies on several devices ({', '.join(sorted(placed))}), and pruning works on one: load it on "
            "one, in half precision or quantised if it is large"
        )


class _Shown(NamedTuple):
    """The images of a forward, and what its stages have left of each; both fill while it runs."""

    images: list[Image]
    kept: list[list[Tensor]]


def in_force(model: Model) -> Pruning | None:
    """The context that prunes calls which this thread starts on the model now, if there is one."""
    with ATTACHING:
        return Attachment.of(model).calls.in_force()
