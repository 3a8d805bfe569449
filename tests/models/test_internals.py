"""The list of what is touched inside transformers is whole: docs/transformers.md names the files and the tests."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/transformers.md").read_text()
# What only code that relies on the inside of a model says.
TOUCH = re.compile(
    r"\b(?:from|import) transformers|\._attn_implementation|\b_deepstack_process|\.rotary_emb\b|get_decoder\(\)\.layers"
    r"|\bget_(?:image|video)_features\(|get_text_config\(|\.base_model\b|register_forward|past_key_values"
)


def test_every_file_that_touches_a_models_inside_is_listed():
    found = {
        file.relative_to(ROOT).as_posix()
        for file in (ROOT / "codebook").rglob("*.py")
        if TOUCH.search(file.read_text()) and "miniature" not in file.parts
    }
    assert "codebook/pruning/engine/tap.py" in found  # the pattern finds something
    # What goes through a public argument of the model's own call only.
    public = {"codebook/analysis/likelihood.py", "codebook/cli/doctor.py"}
    assert sorted(found - public - set(re.findall(r"codebook/[\w/]+\.py", PAGE))) == []


def test_every_test_that_is_named_exists():
    tests = "".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", PAGE)
    assert len(named) > 40
    assert [name for name in named if f"def {name}(" not in tests] == []
