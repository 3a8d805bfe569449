"""Runs a notebook's cells as a kernel would, by Python alone: `python -m tests.notebook FILE` stores outputs."""

import ast
import base64
import contextlib
import io
import json
import re
import sys
from pathlib import Path


def cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def executed(cell, names):
    """The outputs of a cell: what it prints, and what its last expression shows."""
    tree, printed = ast.parse("".join(cell["source"])), io.StringIO()
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, "<cell>", "exec"), names)
        value = None if last is None else eval(compile(ast.Expression(last.value), "<cell>", "eval"), names)
    outputs = []
    if text := printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": text.splitlines(keepends=True)})
    if value is not None:
        data = {"text/plain": re.sub(" at 0x[0-9A-Fa-f]+", "", repr(value)).splitlines(keepends=True)}
        if (png := getattr(value, "_repr_png_", lambda: None)()) is not None:
            data["image/png"] = base64.b64encode(png).decode()
        outputs.append({"output_type": "display_data", "metadata": {}, "data": data})
    return outputs


def main(path):
    notebook, names = json.loads(path.read_text()), {}
    for number, cell in enumerate(cells(notebook), 1):
        cell["outputs"], cell["execution_count"] = executed(cell, names), number
    path.write_text(json.dumps(notebook, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
