"""The examples run, and show what they say they show."""

import json
import runpy
from pathlib import Path

from tests.notebook import cells, executed

EXAMPLES = Path(__file__).parent.parent / "examples"


def shown(outputs):
    """The text of outputs; of pictures only that they are there, as PIL's compression differs between versions."""
    return [
        (output["output_type"], "".join(output.get("text", [])), "".join(output.get("data", {}).get("text/plain", [])))
        for output in outputs
    ], ["image/png" in output.get("data", {}) for output in outputs]


def test_notebook(tmp_path, monkeypatch):
    """Every cell gives what is stored; `python -m tests.notebook examples/quickstart.ipynb` stores it anew."""
    monkeypatch.chdir(tmp_path)
    path = EXAMPLES / "quickstart.ipynb"
    notebook, names = json.loads(path.read_text()), {}
    code = cells(notebook)
    assert len(code) == 5 and path.stat().st_size < 500_000
    for cell in code:
        assert shown(executed(cell, names)) == shown(cell["outputs"]), "".join(cell["source"])
    assert sum(any(shown(cell["outputs"])[1]) for cell in code) >= 2
    assert notebook["nbformat"] == 4 and {cell["cell_type"] for cell in notebook["cells"]} == {"code", "markdown"}


def test_custom_method(capsys):
    runpy.run_path(str(EXAMPLES / "custom_method.py"), run_name="__main__")
    question, _, rest = capsys.readouterr().out.strip().partition(". ")
    answer, _, rest = rest.partition(" (truth: ")
    truth, _, rest = rest.partition("), ")
    assert question == "read the number" and answer == truth and rest == "from 28 of 144 visual tokens"
