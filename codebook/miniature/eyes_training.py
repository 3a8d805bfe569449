"""Train `eyes`: a projector in closed form, then low-rank updates of the language model on packed questions.

1. The projector is solved for: its first matrix is random, its second takes the tower's features of crowded scenes to
   the language model's own words for what a patch shows, and background to nothing.
2. Then everything learns from answers: the low-rank updates fast, projector and tower slowly and later.

A step depends on the seed and its number only and the checkpoint holds everything else, so a run that was stopped
goes on as if it had not been. With a budget of time, the rates follow the clock, too.
"""

from __future__ import annotations

import copy
import json
import math
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset
from transformers.utils import logging

from codebook.errors import CodebookError, one_line
from codebook.inference.ask import ask
from codebook.miniature.eyes import apply_parts, eyes_model, eyes_processor, write_weights
from codebook.miniature.eyes_forward import Student, look
from codebook.miniature.eyes_packing import LABELS, Packer, held_out
from codebook.miniature.scenes import COLOR_NAMES, GRID, SHAPES, labels, scene
from codebook.miniature.tasks import TASK_FAMILIES, Question, score
from codebook.models.assembly import PARTS_FILE, TOWER, read_parts
from codebook.models.gguf import Gguf, read_gguf
from codebook.models.loading import SHIPPED_MODELS
from codebook.models.smollm2 import language_tokenizer
from codebook.store.files import write_text


@dataclass(frozen=True)
class EyesRecipe:
    """The settings of a run; they are written beside the checkpoint.

    Attributes
    ----------
    steps : most steps
    minutes : most minutes, also of a run in several parts; 0 for no limit
    rows : scenes in a batch
    text : tokens of a row for questions
    alone : steps at the beginning that are about scenes only
    right, left : peak rates of the low-rank factors
    projector, tower : peak rates of the others
    late : first fractions of the run over which projector and tower come up to their rates
    warm : steps until the rates are at their peak
    fade : last fraction of the run, over which the rates fade as a cosine
    precise : compute in float32 and not in bfloat16
    """

    steps: int = 1_000_000
    minutes: float = 0.0
    rows: int = 32
    text: int = 268
    alone: int = 400
    right: float = 1e-3
    left: float = 2e-3
    projector: float = 3e-4
    tower: float = 1e-4
    late: tuple[float, float] = (0.05, 0.15)
    warm: int = 30
    fade: float = 0.5
    precise: bool = False
    seed: int = 0


WATCH = 20
"""Steps between two looks at the loss, after each of which a run that diverges goes back to the one before."""

HELD_OUT = 0
"""The step whose rows, of the test split, are looked at between others."""


def train_eyes(
    out: str | Path,
    language: Path,
    *,
    device: str | None = None,
    makers: int | None = None,
    count: int = 1000,
    every: float = 60.0,
    **options: Any,
) -> Path:
    """Train, write `out/weights` and, unless `count` is 0, `out/accuracy.json`; return the folder of the weights.

    Parameters
    ----------
    out : folder for `checkpoint.pt`, `recipe.json` and `log.jsonl`, too; run again to go on
    language : SmolLM2's GGUF
    device : "cpu" or "cuda"; default a GPU if there is one
    makers : processes that draw scenes; 0 for none but this one; default: up to 12
    count : held-out questions of each family
    every : seconds between two checkpoints
    **options : fields of `EyesRecipe`

    Raises
    ------
    CodebookError
        If an option is unknown, or the run to go on with is another one.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the processes that draw are forks of this one
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    options.setdefault("precise", device == "cpu")
    try:
        recipe = EyesRecipe(**options)
    except TypeError as error:
        raise CodebookError(f"unknown training option: {error}; see EyesRecipe") from None
    if makers is None:
        makers = max(1, min(12, (os.cpu_count() or 1) - 2))
    file = read_gguf(language)
    run = EyesRun(out, recipe, file, device)
    write_text(out / "recipe.json", json.dumps(asdict(recipe), indent=1) + "\n")
    run.play(makers, every)
    if count:
        write_accuracy(out, file, count, device)
    return out / "weights"


class _Batches(Dataset):
    def __init__(self, packer: Packer) -> None:
        self.packer = packer

    def __getitem__(self, step: int) -> dict[str, Any]:
        return self.packer.batch(step)


def _as_made(made: Any) -> Any:
    return made  # as arrays: they go through a pipe and need no shared memory, of which containers have little


def _quiet(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is answered once, by the one who trains


class EyesRun:
    """The state of a run: model, optimizer, and how far it is."""

    def __init__(self, out: Path, recipe: EyesRecipe, file: Gguf, device: str) -> None:
        self.out, self.recipe, self.device = out, recipe, device
        self.dtype = torch.float32 if recipe.precise else torch.bfloat16
        if device != "cpu":
            torch.set_float32_matmul_precision("high")
        self.file, self.built = file, eyes_model(file)
        built = self.built
        tokenizer = language_tokenizer(file)
        self.packer = Packer(tokenizer, recipe.seed, recipe.rows, recipe.text, recipe.alone)
        _take_tower(built)
        solve_projector(built, tokenizer, recipe.seed)
        self.student = Student(built, recipe.seed).to(device)
        self.first = copy.deepcopy(self.student.tower).requires_grad_(False)
        self.optimizer = self._optimizer()
        self.step, self.rows, self.questions, self.elapsed, self.calm = 0, 0, 0, 0.0, 1.0
        self.checkpoint = out / "checkpoint.pt"
        if self.checkpoint.exists():
            self.load()

    def _optimizer(self) -> torch.optim.Optimizer:
        student = self.student
        groups = {
            "right": list(student.right.values()),
            "left": list(student.left.values()),
            "projector": list(student.projector.parameters()),
            "tower": list(student.tower.parameters()),
        }
        return torch.optim.AdamW(
            [{"params": own, "name": name} for name, own in groups.items()], betas=(0.9, 0.99), weight_decay=0.0
        )

    def state(self) -> dict[str, Any]:
        return {
            "student": self.student.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "rows": self.rows,
            "questions": self.questions,
            "elapsed": self.elapsed,
            "calm": self.calm,
            "seed": self.recipe.seed,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.student.load_state_dict(state["student"])
        self.optimizer.load_state_dict(state["optimizer"])

    def load(self) -> None:
        state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        if state["seed"] != self.recipe.seed:
            raise CodebookError(
                f"{self.checkpoint} is of --seed {state['seed']}: go on with that, or choose another folder"
            )
        self.restore(state)
        for name in ("step", "rows", "questions", "elapsed", "calm"):
            setattr(self, name, state[name])

    def save(self) -> None:
        """Write the checkpoint and the parts so that a kill at any moment leaves whole ones."""
        draft = self.checkpoint.with_suffix(".writing")
        torch.save(self.state(), draft)
        os.replace(draft, self.checkpoint)
        write_weights(self.built, self.file, self.student.parts(), self.out / "weights")

    def progress(self) -> float:
        budget = self.recipe.minutes * 60
        return max(self.step / self.recipe.steps, self.elapsed / budget if budget else 0.0)

    def play(self, makers: int, every: float) -> None:
        """Train to the end of the budget."""
        if self.progress() >= 1:
            return
        batches = self._batches(makers)  # the processes start before the compiler's
        if self.device != "cpu":
            self._compile()
        held = [self.packer.batch(HELD_OUT, "test", kind) for kind in ("scene", "album", "film")]
        begin = time.monotonic() - self.elapsed
        saved = told = time.monotonic()
        good, best, since = self._snapshot(), math.inf, self.step
        seen = torch.zeros(len(LABELS), 4, device=self.device)
        losses: list[tuple[bool, torch.Tensor]] = []
        done = False
        while not done:
            packed = next(batches)
            loss, told_now = self.advance(packed)
            losses.append((packed["kind"] == "scene", loss))
            seen += told_now
            self.step += 1
            self.rows += len(packed["tokens"])
            self.elapsed = time.monotonic() - begin
            if self.step % WATCH and self.progress() < 1:
                continue
            values = torch.stack([loss for _, loss in losses]).tolist()  # waits for the device
            about = [value for (simple, _), value in zip(losses, values, strict=True) if simple] or values
            mean, losses = sum(about) / len(about), []
            self.elapsed = time.monotonic() - begin
            done = self.progress() >= 1
            if not all(map(math.isfinite, values)) or mean > 2 * best + 0.5:
                self._calm_down(good, mean)
                continue
            best, good = min(best, mean), self._snapshot()
            if time.monotonic() - told > every / 4 or done:
                self._tell(mean, seen, (self.step - since) / (time.monotonic() - told), held)
                seen.zero_()
                since, told = self.step, time.monotonic()
            if time.monotonic() - saved > every:
                self.save()
                saved = time.monotonic()
        self.save()

    def _calm_down(self, good: dict[str, Any], loss: float) -> None:
        """Go back to where the loss was last seen in order, at half the rates."""
        self.calm /= 2
        self.restore(_cloned(good))
        self._log({"diverged": self.step, "loss": loss, "calm": self.calm})
        if self.calm < 1e-3:
            raise CodebookError(f"the loss stays at {loss:.2f} at every rate: use another seed")

    def _compile(self) -> None:
        """Use compiled layers, where compiling works."""
        try:
            trial = torch.ones(64, device=self.device, requires_grad=True)
            torch.compile(lambda x: (x.sin() * 2).sum())(trial).backward()
            torch._dynamo.config.suppress_errors = True
            torch._dynamo.config.recompile_limit = 64
            self.student.before = torch.compile(self.student.before)
            self.student.after = torch.compile(self.student.after)
        except Exception as error:  # no C compiler, no Triton: it works without, only slower
            self._log({"compiled": False, "reason": one_line(error)})

    def _batches(self, makers: int) -> Iterator[dict[str, Any]]:
        loader = DataLoader(
            _Batches(self.packer),
            batch_size=None,
            sampler=range(self.step, self.recipe.steps),  # type: ignore[arg-type]
            num_workers=makers,
            prefetch_factor=4 if makers else None,
            collate_fn=_as_made,
            worker_init_fn=_quiet,
        )
        return iter(loader)

    def _snapshot(self) -> dict[str, Any]:
        return _cloned({"student": self.student.state_dict(), "optimizer": self.optimizer.state_dict()})

    def advance(self, packed: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Take one step; return the loss, and (label, 4): weighted loss, weight, questions right, questions."""
        recipe, done = self.recipe, self.progress()
        fade = max(0.0, 1 - (1 - done) / recipe.fade) if recipe.fade else 0.0
        rate = self.calm * min(1.0, (self.step + 1) / recipe.warm) * (0.02 + 0.98 * math.cos(fade * math.pi / 2) ** 2)
        late = dict(zip(("projector", "tower"), recipe.late, strict=True))
        for group in self.optimizer.param_groups:
            name = group["name"]
            group["lr"] = rate * getattr(recipe, name) * min(1.0, done / late[name] if late.get(name) else 1.0)
        loss, seen = self._loss(packed)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach(), seen

    def _sent(self, tensor: torch.Tensor) -> torch.Tensor:
        # From pinned memory, or each copy would wait for the step before.
        return tensor if self.device == "cpu" else tensor.pin_memory().to(self.device, non_blocking=True)

    def _loss(self, packed: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        places = self.packer.layouts[packed["kind"]].places
        batch = {k: self._sent(torch.from_numpy(v)) for k, v in packed.items() if k != "kind"}
        features, summary = look(self.student.tower, batch["pixels"], summary=True)
        logits = self.student(features, batch, places, self.dtype)
        rows, where = len(batch["tokens"]), batch["where"]
        truth, weight, family = (batch[name].flatten()[where] for name in ("target", "weight", "family"))
        each = F.cross_entropy(logits, truth, reduction="none") * weight
        loss = each.sum() / weight.sum()
        with torch.no_grad():
            seen = torch.zeros(len(LABELS), 4, device=self.device)
            seen[:, 0].index_add_(0, family, each.detach())
            seen[:, 1].index_add_(0, family, weight)
            # A question is right if all tokens of its answer are, given those before them.
            question = (torch.arange(rows, device=self.device)[:, None] * 64 + batch["segment"]).flatten()[where]
            misses = torch.zeros(64 * rows, device=self.device)
            misses.index_add_(0, question, (logits.argmax(-1) != truth).float())
            which = torch.full((64 * rows,), -1, device=self.device)
            which[question] = family
            for i in range(len(LABELS)):
                seen[i, 2] = ((which == i) & (misses == 0)).sum()
                seen[i, 3] = (which == i).sum()
            # [CLS] stays what it was, however the layers below it learn: pruners rank by its attention.
            before = look(self.first, batch["pixels"], summary=True)[1]
        assert summary is not None and before is not None
        return loss + (1 - F.cosine_similarity(summary, before, dim=-1)).mean(), seen

    def _tell(self, mean: float, seen: torch.Tensor, pace: float, held: list[dict[str, Any]]) -> None:
        checked = torch.zeros_like(seen)
        for packed in held:  # as in training, gradients included, which spares compiling the layers once more
            checked += self._loss(packed)[1]
        self.questions += int(seen[:, 3].sum())
        self._log(
            {
                "step": self.step,
                "minutes": round(self.elapsed / 60, 2),
                "progress": round(self.progress(), 3),
                "steps_per_second": round(pace, 2),
                "rows": self.rows,
                "questions": self.questions,
                "loss": round(mean, 4),
                "losses": _by_label(seen[:, 0], seen[:, 1]),
                "right": _by_label(seen[:, 2], seen[:, 3]),
                "held_out": _by_label(checked[:, 2], checked[:, 3]),
            }
        )

    def _log(self, line: dict[str, Any]) -> None:
        with (self.out / "log.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)


def _cloned(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {k: _cloned(v) for k, v in value.items()}
    return [_cloned(v) for v in value] if isinstance(value, list) else value


def _by_label(total: torch.Tensor, count: torch.Tensor) -> dict[str, float]:
    pairs = zip(LABELS, total.tolist(), count.tolist(), strict=True)
    return {name: round(all_of_it / n, 3) for name, all_of_it, n in pairs if n}


def _take_tower(built: Any) -> None:
    """Begin with the miniature's own tower."""
    from safetensors.torch import load_file

    stored = load_file(SHIPPED_MODELS["miniature"] / "model.safetensors")
    own = {k.removeprefix(TOWER): v.float() for k, v in stored.items() if k.startswith(TOWER)}
    built.model.vision_tower.load_state_dict(own, strict=True)


@torch.no_grad()
def solve_projector(built: Any, tokenizer: Any, seed: int, count: int = 400) -> None:
    """Solve for the projector, by ridge regression of `count` crowded scenes' patches onto words and places.

    What a patch shows becomes the sum of the language model's words for its shape and colour, or for its digit, each
    without the mean of all words; and where that lies, waves of its four edges along random directions, which are at
    right angles to nearly every word. Background becomes nothing.
    """
    draw = torch.Generator().manual_seed(1000 + seed)
    projector, tower = built.model.multi_modal_projector, built.model.vision_tower
    shown = [scene("train", 5, seed, i, dense=True) for i in range(count)]
    pixels = torch.stack([torch.from_numpy(picture.pixels) for picture in shown])
    features = torch.cat([look(tower, some)[0] for some in pixels.split(50)]).flatten(0, 1)
    marks = [labels(picture) for picture in shown]
    truth = {name: torch.cat([torch.from_numpy(m[name]) for m in marks]) for name in marks[0]}
    # The first matrix: random directions of features that have mean 0 and spread 1.
    width, inner = built.config.text_config.hidden_size, projector.linear_1.out_features
    mix = torch.randn(inner, features.shape[1], generator=draw) * (0.7 / features.shape[1] ** 0.5)
    projector.linear_1.weight.copy_(mix / features.std(0))
    bias = torch.randn(inner, generator=draw) * 0.5
    projector.linear_1.bias.copy_(bias - projector.linear_1.weight @ features.mean(0))
    middle = projector.act(projector.linear_1(features)).double()
    words = built.model.language_model.embed_tokens.weight
    centred = words - words.mean(0)
    target = torch.zeros(len(features), width)
    for name, values_of in (("shape", SHAPES), ("color", COLOR_NAMES), ("digit", tuple("0123456789"))):
        ids = [tokenizer(v if name == "digit" else f" {v}", add_special_tokens=False)["input_ids"] for v in values_of]
        assert all(len(own) == 1 for own in ids), ids
        there = truth[name] >= 0
        target[there] += centred[[own[0] for own in ids]][truth[name][there]] * (1.5 if name == "digit" else 1.0)
    busy = (truth["shape"] >= 0) | (truth["digit"] >= 0)
    index = torch.arange(GRID * GRID).repeat(count)
    centre = (torch.stack([index % GRID, index // GRID] * 2, 1) + 0.5) / GRID
    edges = (truth["box"] + centre)[busy]
    waves = torch.cat([(math.pi * k * edges).cos() for k in (1, 2, 3)], 1)
    directions = F.normalize(torch.randn(waves.shape[1], width, generator=draw), dim=1)
    target[busy] += 0.6 * waves @ directions
    design = torch.cat([middle, torch.ones(len(middle), 1)], 1)
    weighted = design * torch.where(busy, 4.0, 1.0)[:, None]  # most patches are background
    gram = weighted.T @ design + 1e-6 * len(middle) * torch.eye(inner + 1)  # a ridge
    solved = torch.linalg.solve(gram, weighted.T @ target.double())
    projector.linear_2.weight.copy_(solved[:-1].T)
    projector.linear_2.bias.copy_(solved[-1])


def write_accuracy(out: Path, file: Gguf, count: int, device: str) -> dict[str, dict[str, float]]:
    """Answer held-out questions with the parts of a run, with and without the images, and write the accuracies."""
    begin = time.monotonic()
    processes = min(len(TASK_FAMILIES), os.cpu_count() or 1)
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        asking = [pool.submit(held_out, family, count) for family in TASK_FAMILIES]
        model, processor = eyes_model(file), eyes_processor(file)
        apply_parts(model, file, read_parts(out / "weights" / PARTS_FILE))
        model = model.to(device).eval()  # type: ignore[arg-type]
        found: dict[str, dict[str, float]] = {"full": {}, "no image": {}}
        for family, waiting in zip(TASK_FAMILIES, asking, strict=True):
            questions = waiting.result()
            for name, own in found.items():
                own[family] = _accuracy(model, processor, questions, blind=name == "no image")
            seconds = time.monotonic() - begin
            print(f"{family}: {found['full'][family]:.3f}, no image {found['no image'][family]:.3f}, {seconds:.0f} s")
            write_text(out / "accuracy.json", json.dumps({"questions": count, "accuracy": found}, indent=1) + "\n")
    return found


ANSWER_TOKENS = {"cap": 64, "box": 16, "ocr": 16}


def _accuracy(model: Any, processor: Any, questions: list[Question], *, blind: bool) -> float:
    size = 250 if blind or len(questions[0].images) == 1 else 60
    right = 0.0
    family = questions[0].family
    for i in range(0, len(questions), size):
        some = questions[i : i + size]
        images = [() if blind else q.images for q in some]
        answers = ask(model, processor, images, [q.question for q in some], max_new_tokens=ANSWER_TOKENS.get(family, 8))
        right += sum(score(family, answer.text, q.answer) for answer, q in zip(answers, some, strict=True))
    return right / len(questions)
