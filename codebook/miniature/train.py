"""Train the miniature from scratch: first its eyes, then its words, then places and several images.

1. Vision: crowded scenes, every patch says what it shows, [CLS] what is in the picture, and the projected
   tokens are drawn towards the words for it.
2. Words: many questions behind each scene; the loss is on the answers.
3. Places: where things are, too, and albums and films; projected tokens are drawn towards the words for places,
   and background away from all words. Begun with this, words are not learned: after 600 steps no colour was.

The rate of learning is warmed up, held, and in some stages faded over the last part. Until it fades a step does not
depend on how many are to come, so a run can be made longer or shorter while it holds.

A batch depends on the seed, the step and the workers only and the checkpoint holds everything else, so a run that
was stopped goes on as if it had not been.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from transformers.utils import logging

from codebook.errors import CodebookError
from codebook.miniature import model as architecture
from codebook.miniature import packing
from codebook.miniature.optimizer import Muon
from codebook.miniature.packing import IDS, PackedBatch
from codebook.miniature.scenes import COLOR_NAMES, GRID, IMAGE_SIDE, SHAPES
from codebook.miniature.tasks import BINS, CELLS, TASK_FAMILIES
from codebook.store.files import write_text

NAMES = {"shape": SHAPES, "color": COLOR_NAMES, "digit": tuple("0123456789")}
STUDIES = {"vision": packing.CROWDED, "words": packing.SCENES, "places": packing.ALL}
FINE = 0.005  # half a pixel: errors of a pixel or two must still pull, or boxes stay blunt
BIN_IDS = [IDS[f"p{b}"] for b in range(BINS)]
CELL_NAMES = tuple(f"{row}{column + 1}" for row in "abcd" for column in range(CELLS))
STAGES = ("vision", "words", "places")


@dataclass(frozen=True)
class Recipe:
    """The settings of a training run; they are written beside the checkpoint.

    Attributes
    ----------
    steps : steps of each stage (vision, words, places)
    batch : images per step and worker, for each stage
    muon, adam : peak learning rates of each stage
    fade : last fraction of each stage, over which the rate fades as a cosine
    warm : steps of a stage until the rate is at its peak
    slow : factors on muon for vision tower and projector in the last stage, or they forget digits
    drop : let batches after the vision stage lose visual tokens
    align : weight of the pull towards words in each stage; in the last it fades with the rate
    """

    steps: tuple[int, int, int] = (300, 400, 2600)
    batch: tuple[int, int, int] = (24, 16, 16)
    muon: tuple[float, float, float] = (0.02, 0.02, 0.008)
    adam: tuple[float, float, float] = (2e-3, 2e-3, 8e-4)
    fade: tuple[float, float, float] = (0.5, 0.0, 0.35)
    warm: int = 25
    slow: tuple[float, float] = (0.3, 0.3)
    drop: bool = True
    align: tuple[float, float, float] = (1.0, 0.3, 0.5)
    seed: int = 0


class Heads(nn.Module):
    """Linear readers that exist in training only: what they must read off, the vision tower has to know."""

    def __init__(self):
        super().__init__()
        width = architecture.VISION["hidden_size"]
        self.patch = nn.ModuleDict({name: nn.Linear(width, len(v) + 1) for name, v in NAMES.items()})
        self.box = nn.Linear(width, 4)
        text = architecture.TEXT["hidden_size"]
        self.align_box = nn.Linear(text, 4)
        self.edges = nn.Linear(text, 4 * text, bias=False)
        self.summary = nn.Linear(width, sum(len(v) for v in NAMES.values()))


def train(
    out: str | Path,
    *,
    steps: int | None = None,
    seed: int = 0,
    device: str | None = None,
    workers: int | None = None,
    **options,
) -> Path:
    """Train a miniature and return the folder of its weights, `out/weights`.

    Parameters
    ----------
    out : folder for `checkpoint.pt`, from which a run goes on, `recipe.json`, `log.jsonl` and `weights/`
    steps : steps of the last stage; the others take no more than that
    device : "cpu" or "cuda"; default a GPU if there is one
    workers : processes of one thread each (on a CPU, two of one thread are faster than one of two); default: 1 on a
        GPU, else up to 2
    **options : fields of `Recipe`

    Raises
    ------
    CodebookError
        If an option is unknown, or the run to go on with has another seed or number of workers.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    if steps is not None:
        options["steps"] = (*(min(steps, usual) for usual in Recipe.steps[:2]), steps)
    try:
        recipe = Recipe(seed=seed, **options)
    except TypeError as error:
        raise CodebookError(f"unknown training option: {error}; see codebook.miniature.train.Recipe") from None
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    workers = workers or (1 if device == "cuda" else min(2, os.cpu_count() or 1))
    _check(out / "checkpoint.pt", seed=seed, workers=workers)
    write_text(out / "recipe.json", json.dumps(asdict(recipe), indent=1) + "\n")
    if workers == 1:
        _worker(0, 1, out, recipe, device, "")
    else:
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        with tempfile.TemporaryDirectory() as meeting:
            arguments = (workers, out, recipe, device, f"file://{meeting}/store")
            with _ignoring_interrupts():  # which the processes inherit: Ctrl-C is answered here, once
                context = torch.multiprocessing.spawn(_worker, arguments, nprocs=workers, join=False)
            try:
                while not context.join():
                    pass
            finally:
                for process in context.processes:
                    process.terminate()
                    process.join()
    return out / "weights"


@contextlib.contextmanager
def _ignoring_interrupts() -> Iterator[None]:
    """A context in which Ctrl-C has no effect; outside the main thread, which alone hears of it, it does nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _check(file: Path, **own: int) -> None:
    """Refuse to go on with a run of another seed or number of workers: its batches are others."""
    state = torch.load(file, map_location="cpu", weights_only=True, mmap=True) if file.exists() else {}
    for name, value in own.items():
        if state.get(name, value) != value:
            raise CodebookError(f"{file} is of --{name} {state[name]}: go on with that, or choose another folder")


def _worker(rank: int, workers: int, out: Path, recipe: Recipe, device: str, meeting: str) -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if workers > 1:
        threading.Thread(target=_end_with_parent, daemon=True).start()
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=workers)
    run = Run(out, recipe, device, rank, workers)
    for stage in STAGES[STAGES.index(run.stage) :]:
        run.play(stage)
    run.save(export=True)
    if workers > 1:
        dist.destroy_process_group()


def _end_with_parent() -> None:
    """End this process when the one that started it has ended, however: it would go on writing the checkpoint."""
    if (parent := torch.multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


class Run:
    """One worker's state: model, heads, optimizers, and how far it is."""

    def __init__(self, out: Path, recipe: Recipe, device: str = "cpu", rank: int = 0, workers: int = 1):
        self.out, self.recipe, self.device, self.rank, self.workers = out, recipe, device, rank, workers
        self.model = architecture.model(recipe.seed).to(torch.device(device))  # type: ignore[arg-type]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.heads = Heads().to(device)
        self.stage, self.step, self.elapsed = STAGES[0], 0, 0.0
        self._optimizers()
        self.file = out / "checkpoint.pt"
        if self.file.exists():
            self.load()

    def _optimizers(self) -> None:
        inner = ("vision_tower.encoder", "language_model.layers", "multi_modal_projector")
        named = [*self.model.named_parameters(), *self.heads.named_parameters()]
        self.parameters = [p for _, p in named]
        matrices = [p for n, p in named if p.dim() == 2 and any(part in n for part in inner)]
        chosen = {id(p) for p in matrices}
        rest = [p for p in self.parameters if id(p) not in chosen]
        share = (self.rank, self.workers)
        self.muon = Muon(matrices, share=share, merge=self._sum)
        eyes, projector = self.recipe.slow
        names = [n for n, p in named if id(p) in chosen]
        self.slow = [eyes if "vision" in n else projector if "projector" in n else 1.0 for n in names]
        self.adam = torch.optim.AdamW(rest, betas=(0.9, 0.95), weight_decay=0.0)

    def _sum(self, x: torch.Tensor) -> torch.Tensor:
        if self.workers > 1:
            dist.all_reduce(x)
        return x

    def load(self) -> None:
        state = torch.load(self.file, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])
        self.stage, self.step, self.elapsed = state["stage"], state["step"], state["elapsed"]

    def save(self, *, export: bool = False) -> None:
        """Write the checkpoint so that a kill at any moment leaves a whole one."""
        if self.rank:
            return
        state = {
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "muon": self.muon.state_dict(),
            "adam": self.adam.state_dict(),
            "stage": self.stage,
            "step": self.step,
            "elapsed": self.elapsed,
            "seed": self.recipe.seed,
            "workers": self.workers,
        }
        draft = self.file.with_suffix(".writing")
        torch.save(state, draft)
        os.replace(draft, self.file)
        if export:
            architecture.save(self.model, self.out / "weights")

    def play(self, stage: str, every: float = 150.0) -> None:
        """Run one stage to the end of its budget; every 150 seconds leave a checkpoint."""
        which = STAGES.index(stage)
        if self.stage != stage:
            self.stage, self.step, self.elapsed = stage, 0, 0.0
            if stage == "places":
                self._settle()
        steps = self.recipe.steps[which]
        begin = time.monotonic() - self.elapsed
        saved = told = time.monotonic()
        tally: dict[str, list[float]] = {}
        if self.device == "cpu" and steps > 100 and shutil.which("g++"):
            # A quarter less time per step; not worth the minute of compilation in a run of a few steps.
            packing.answer_layer = torch.compile(packing.plain_layer, dynamic=True)
        while self.step < steps:
            progress, now = self.step / steps, time.monotonic()
            self.elapsed = now - begin
            for name, (total, count) in self.advance().items():
                entry = tally.setdefault(name, [0.0, 0.0])
                entry[0] += total
                entry[1] += count
            self.step += 1
            if now - told > 30 or self.step == steps:
                self._tell(progress, tally)
                told, tally = now, {}
            if now - saved > every:
                self.save(export=True)
                saved = now
        self.save(export=True)

    @torch.no_grad()
    def _settle(self) -> None:
        """Scale the projector, so that visual tokens enter the language model with a mean norm of 12.

        The vision stage asks for directions only and leaves norms near 100: far more than what a layer
        adds, so the layers could not change a visual token.
        """
        packed = packing.batch(32, self.recipe.seed, 0, 0).to(self.device)
        projector = self.model.model.multi_modal_projector
        factor = 12 / projector(packing.see(self.model, packed.pixels)[0]).norm(dim=-1).mean()
        projector.linear_2.weight.mul_(factor)
        projector.linear_2.bias.mul_(factor)

    def _tell(self, progress: float, tally: dict[str, list[float]]) -> None:
        if self.rank:
            return
        means = {name: round(total / max(count, 1), 3) for name, (total, count) in tally.items()}
        left = self.elapsed / 60 * (1 / max(progress, 1e-9) - 1)
        line = {"stage": self.stage, "step": self.step, "minutes": round(self.elapsed / 60, 1), **means}
        with (self.out / "log.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")
        print(f"{progress:5.1%}, {left:.0f} min left", line, flush=True)

    def advance(self) -> dict[str, tuple[float, float]]:
        """Take one step; return the sum and count of each measurement."""
        which = STAGES.index(self.stage)
        size, seed = self.recipe.batch[which], self.recipe.seed
        packed = packing.batch(
            size, len(STAGES) * seed + which, self.step, self.rank, STUDIES[self.stage], drop=self.recipe.drop
        ).to(self.device)
        left, last = 1 - self.step / self.recipe.steps[which], self.recipe.fade[which]
        fade = max(0.0, 1 - left / last) if last else 0.0
        rate = min(1.0, (self.step + 1) / self.recipe.warm) * (0.02 + 0.98 * math.cos(fade * math.pi / 2) ** 2)
        pull = self.recipe.align[which] * (1 - 0.8 * fade * (self.stage == "places"))
        loss, seen = self._vision(packed, pull) if self.stage == "vision" else self._answers(packed, pull)
        loss.backward()
        self._reduce()
        self.muon.step(self.recipe.muon[which] * rate, self.slow if self.stage == "places" else None)
        for group in self.adam.param_groups:
            group["lr"] = self.recipe.adam[which] * rate
        self.adam.step()
        for parameter in self.parameters:
            parameter.grad = None
        return {"loss": (loss.item(), 1.0), **seen}

    def _reduce(self) -> None:
        """Average gradients over the workers and clip what AdamW gets (Muon ignores the scale)."""
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.workers > 1:
            flat = self._sum(torch.cat([p.grad.flatten() for p in self.parameters])) / self.workers
            sizes = [p.numel() for p in self.parameters]
            for parameter, part in zip(self.parameters, flat.split(sizes), strict=True):
                parameter.grad = part.view_as(parameter)
        nn.utils.clip_grad_norm_(self.adam.param_groups[0]["params"], 1.0)

    def _vision(self, packed: PackedBatch, pull: float) -> tuple[torch.Tensor, dict[str, tuple[float, float]]]:
        features, summary = packing.see(self.model, packed.pixels, summary=True)
        assert summary is not None
        loss = self._summarise(packed, summary) + pull * self._align(packed, features)
        seen = {}
        for name in NAMES:
            truth = getattr(packed, name)
            logits = self.heads.patch[name](features)
            weight = torch.ones(logits.shape[-1], device=logits.device)
            weight[0] = 0.1  # most patches are background
            loss = loss + F.cross_entropy(logits.flatten(0, 1), truth.flatten() + 1, weight)
            there = truth >= 0
            right = (logits.argmax(-1) == truth + 1)[there]
            seen[name] = (float(right.sum()), float(there.sum()))
        busy = (packed.shape >= 0) | (packed.digit >= 0)
        loss = loss + 10 * F.smooth_l1_loss(self.heads.box(features)[busy], packed.box[busy], beta=0.05)
        return loss, seen

    def _summarise(self, packed: PackedBatch, summary: torch.Tensor) -> torch.Tensor:
        """[CLS] says which shapes, colours and digits are in the picture."""
        truth = torch.cat([F.one_hot(getattr(packed, n) + 1, len(v) + 1).amax(1)[:, 1:] for n, v in NAMES.items()], 1)
        return F.binary_cross_entropy_with_logits(self.heads.summary(summary), truth.float())

    def _align(self, packed: PackedBatch, features: torch.Tensor) -> torch.Tensor:
        """Pull each projected token towards the words for what it shows, and keep its box readable."""
        projected = self.model.model.multi_modal_projector(features)
        words = self.model.model.language_model.embed_tokens.weight
        busy = (packed.shape >= 0) | (packed.digit >= 0)
        place = _edges(packed.box)
        places = self.stage == "places"
        error = self.heads.align_box(projected)[busy] - place[busy]
        loss = 5 * F.smooth_l1_loss(error, torch.zeros_like(error), beta=FINE if places else 0.05)
        if places:
            # Through one matrix an edge, the bins' own words: what an answering layer has to do.
            edges = self.heads.edges(projected[busy]).unflatten(-1, (4, -1)) @ self.model.lm_head.weight[BIN_IDS].T
            pixels = (place[busy] * IMAGE_SIDE).round().long() - torch.tensor([0, 0, 1, 1], device=place.device)
            loss = loss + 0.5 * F.cross_entropy(edges.flatten(0, 1), (pixels // (IMAGE_SIDE // BINS)).flatten())
        truths = {name: (getattr(packed, name), values) for name, values in NAMES.items()}
        if places:
            # Without this pull, localization stays at chance for a tenth of the training.
            centre = ((place[..., :2] + place[..., 2:]) * 0.5 * CELLS).long().clamp(0, CELLS - 1)
            truths["cell"] = torch.where(busy, centre[..., 1] * CELLS + centre[..., 0], -1), CELL_NAMES
        unit = F.normalize(projected, dim=-1)
        for truth, values in truths.values():
            chosen = words[torch.tensor([IDS[v] for v in values], device=words.device)]
            cosine = unit @ F.normalize(chosen, dim=-1).T
            there = truth >= 0
            if there.any():
                loss = loss + F.cross_entropy(16 * cosine[there], truth[there])
            if places:
                # Background names nothing, or every place there is would drown those of the objects.
                loss = loss + cosine[~busy].square().sum(-1).mean()
        return loss

    def _answers(self, packed: PackedBatch, pull: float) -> tuple[torch.Tensor, dict[str, tuple[float, float]]]:
        often = self.step % 4 == 0  # keeps [CLS] in step with the layers below it
        features, summary = packing.see(self.model, packed.pixels, summary=often)
        visual = self.model.model.multi_modal_projector(features)
        logits = packing.answer_logits(self.model, visual, packed)
        there = packed.target >= 0
        truth, weight = packed.target[there], packed.weight[there]
        loss = (F.cross_entropy(logits, truth, reduction="none") * weight).sum() / weight.sum()
        if pull:
            loss = loss + pull * self._align(packed, features)
        if summary is not None:
            loss = loss + 0.5 * self._summarise(packed, summary)
        wrong = torch.zeros_like(packed.target)
        wrong[there] = (logits.argmax(-1) != truth).long()
        return loss, _by_family(packed, wrong)


def _edges(box: torch.Tensor) -> torch.Tensor:
    """Turn distances from each patch's centre (B, 144, 4) into edges in the image, in 0..1."""
    index = torch.arange(box.shape[1], device=box.device)
    centre = torch.stack([index % GRID, index // GRID] * 2, 1)
    return box + (centre + 0.5) / GRID


def _by_family(packed: PackedBatch, wrong: torch.Tensor) -> dict[str, tuple[float, float]]:
    """Count the questions of each family whose every answer token was right, given those before it."""
    rows = torch.arange(len(wrong), device=wrong.device)[:, None] * packing.LENGTH
    key = (rows + packed.segment.clamp(min=0)).flatten()
    misses = torch.zeros(len(wrong) * packing.LENGTH, device=wrong.device)
    misses.index_add_(0, key, wrong.flatten().float())
    family = torch.full_like(misses, -1).long()
    family[key] = torch.where(packed.segment >= 0, packed.family, -1).flatten()
    family[rows.flatten()] = -1  # segment 0 holds the padding
    return {
        name: (float(((family == i) & (misses == 0)).sum()), float((family == i).sum()))
        for i, name in enumerate(TASK_FAMILIES)
    }
