"""One cell of the compatibility table: pruned generation on a tiny model of a family against the masked reference.

`python -m tests.models.cells` (`make table`) runs all and writes the table in docs/models.md; the tests run a part.
With names of families it runs theirs, and takes it that the others are as the table has them.
"""

from __future__ import annotations

import functools
import itertools
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from codebook.errors import CodebookError
from codebook.pruning import Cls, Drop, FastV, Pool, Random, RedundancyCodebook, Schedule, SeededFarthestPoint, Stage
from codebook.store.codebook import Codebook
from tests import reference
from tests.models.families import FAMILIES

STEPS = 2
METHODS = ("features", "attention", "tower", "merging", "drop", "mass")
ATTENTIONS = ("sdpa", "eager")
BATCHES = ("one", "padded")
SHOWS = ("image", "several", "video")
POSITIONS = ("keep", "compact")
ROWS = {
    "image": [["image", 5, 6, 7], [3, 4, "large", 9, 8, 11, 12]],
    "several": [["image", 6, "large", 9], [8, "large", 5, "image", 4, 11, 12]],
    "video": [["video", 5, 6, 7], [3, "image", 4, "video", 9, 8, 11]],
    "many": [["image", 5, "large", 6] * 5, [3, "large", "image", 11]],  # not of the table: a longer prompt
}


@dataclass(frozen=True)
class Cell:
    family: str
    method: str
    attention: str
    batch: str
    show: str
    positions: str

    def __str__(self) -> str:
        return "-".join((self.family, self.method, self.attention, self.batch, self.show, self.positions))


def cells():
    return itertools.starmap(Cell, itertools.product(FAMILIES, METHODS, ATTENTIONS, BATCHES, SHOWS, POSITIONS))


def expected(cell):
    """The verdict that `check` must come to: what docs/models.md promises."""
    tiny = FAMILIES[cell.family]
    if cell.show == "video" and not tiny.videos:
        return "none"
    unknown = (cell.positions == "compact" and tiny.axes > 1) or (cell.method == "tower" and not tiny.tower)
    return "refused" if unknown else "works"


@functools.cache
def model(family, attention, device="cpu"):
    if device == "cpu" or attention != "flex_attention":
        return FAMILIES[family].make(attention).to(device)
    made = FAMILIES[family].make().to(device)
    made.get_decoder().set_attn_implementation(attention)  # compiled, it cannot do the tiny towers' heads of 8
    return made


def schedule(cell):
    width = model(cell.family, "sdpa").get_input_embeddings().weight.shape[1]
    prototypes = torch.randn(7, width, generator=torch.Generator().manual_seed(5))
    book = Codebook(prototypes)
    stages = {
        "features": [Stage(0, 0.5, RedundancyCodebook(book)), Stage(2, 0.25, Random())],
        "attention": [Stage(1, 0.5, FastV()), Stage(3, 3, FastV())],
        "tower": [Stage(0, 0.5, Cls())],
        "merging": [Stage(2, 0.25, Pool())],
        "drop": [Stage(2, 0, Drop())],
        "mass": [
            Stage(0, 0.5, SeededFarthestPoint(book), mass=True),
            Stage(1, 0.25, Random()),
            Stage(2, 0.125, Random(), mass=True),
        ],
    }
    return Schedule(stages[cell.method], positions=cell.positions)


def gone_from(inputs, columns, kept, stages):
    """(B, L) first layer that no longer sees each column."""
    gone = torch.full(inputs["input_ids"].shape, 10**6)
    for (row, _, places), survivors in zip(columns, kept, strict=True):
        for stage, index in reversed(list(zip(stages, survivors, strict=True))):
            dropped = torch.ones(len(places), dtype=torch.bool)
            dropped[index] = False
            gone[row, places[dropped]] = stage.layer
    return gone


def mass(columns, kept, stages):
    """For the reference, from each grid's own tokens; None where no stage counts."""
    units = []
    for (row, grids, places), survivors in zip(columns, kept, strict=True):
        start = 0
        for count in (rows * cols for rows, cols in grids):
            own = [index[(start <= index) & (index < start + count)] - start for index in survivors]
            units.append((row, places[start : start + count], own))
            start += count
    counts = [(stage.layer, stage.mass) for stage in stages]
    return reference.Mass(units, counts) if any(stage.mass for stage in stages) else None


def averaged(columns, kept, layer):
    """For the reference: at `layer`, each kept token is the average of 2 x 2 tokens of its grid."""

    def edit(i, hidden):
        if i != layer:
            return hidden
        new = hidden.clone()
        for (row, grids, places), survivors in zip(columns, kept, strict=True):
            tokens, values = hidden[row, places], []
            for rows, cols in grids:
                grid, tokens = tokens[: rows * cols], tokens[rows * cols :]
                cells = grid.view(rows // 2, 2, cols // 2, 2, -1).mean((1, 3))
                values.append(cells.flatten(0, 1))
            new[row, places[survivors[0]]] = torch.cat(values)
        return new

    return edit


@torch.no_grad()
def check(cell, device="cpu", tolerance=None):
    """`works`, `refused` or `none` (the family has no such input); raises if the answer is wrong.

    The pruned model runs on `device`, the reference always on the CPU; logits may differ by `tolerance` of the largest,
    by default the family's.
    """
    tiny = FAMILIES[cell.family]
    tolerance = tiny.tolerance if tolerance is None else tolerance
    if cell.show == "video" and not tiny.videos:
        return "none"
    rows = ROWS[cell.show][: 1 if cell.batch == "one" else 2]
    inputs, columns, plan = tiny.inputs(rows), tiny.columns(rows), schedule(cell)
    target, own = model(cell.family, cell.attention), model(cell.family, cell.attention, device)
    try:
        with plan(own) as pruning:
            out = own.generate(
                **{name: x.to(device) for name, x in inputs.items()},
                max_new_tokens=STEPS, do_sample=False, return_dict_in_generate=True, output_logits=True,
                suppress_tokens=list(tiny.never),
            )  # fmt: skip
    except CodebookError as error:
        assert "use" in str(error) and "\n" not in str(error)
        return "refused"
    survivors = [[index.cpu() for index in stages] for stages in pruning.kept]
    for (_, grids, places), image, kept in zip(columns, pruning.images, survivors, strict=True):
        assert [(grid.rows, grid.cols) for grid in image.layout.grids] == grids
        assert [len(index) for index in kept] == [stage.count(len(places)) for stage in plan.stages]
    gone = gone_from(inputs, columns, survivors, plan.stages)
    edit = averaged(columns, survivors, plan.stages[0].layer) if cell.method == "merging" else None
    said = out.sequences[:, inputs["input_ids"].shape[1] :].cpu()
    tokens, logits = reference.masked(
        target, inputs, gone, said, cell.positions == "compact", edit, tiny.never,
        mass=mass(columns, survivors, plan.stages),
    )  # fmt: skip
    ours = torch.stack(out.logits, 1).cpu()
    assert (ours - logits).abs().max() <= tolerance * logits.abs().max()
    assert torch.equal(said, tokens)
    return "works"


DOCS = Path(__file__).parents[2] / "docs" / "models.md"
BLOCK = re.compile(r"(?<=<!-- table -->\n).*(?=<!-- end of table -->)", re.DOTALL)


def table(results):
    """Markdown: what works for each family, kind of input and class of methods."""
    names = {"image": "an image", "several": "several images", "video": "videos"}
    lines = ["| family | input | " + " | ".join(METHODS) + " |", "|---|---|" + "---|" * len(METHODS)]
    for family, show in itertools.product(FAMILIES, SHOWS):
        row = [_entry(results, family, show, method) for method in METHODS]
        if set(row) != {"-"}:
            lines.append(f"| `{family}` | {names[show]} | " + " | ".join(row) + " |")
    count = Counter(results.values())
    lines += ["", f"{len(results)} combinations: {count['works']} work, {count['refused']} are refused, "
              f"{count['none']} are of inputs that the family does not have."]  # fmt: skip
    return "\n".join(lines) + "\n"


def _entry(results, family, show, method):
    works = [
        positions
        for positions in POSITIONS
        if all(
            results[Cell(family, method, attention, batch, show, positions)] == "works"
            for attention, batch in itertools.product(ATTENTIONS, BATCHES)
        )
    ]
    return ", ".join(works) or "-"


if __name__ == "__main__":
    torch.set_num_threads(1)
    names = sys.argv[1:] or FAMILIES
    results = {cell: check(cell) if cell.family in names else expected(cell) for cell in cells()}
    wrong = [f"{cell}: {verdict}" for cell, verdict in results.items() if verdict != expected(cell)]
    if wrong:
        sys.exit("\n".join(wrong))
    DOCS.write_text(BLOCK.sub(lambda _: table(results), DOCS.read_text()))
