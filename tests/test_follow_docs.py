"""Whoever follows the docs notices what is wrong in them: `tests.follow_docs` on pages that are right, and wrong."""

import re

import pytest

from tests import follow_docs
from tests.follow_docs import blocks, follow

PAGE = """
```
echo one two
echo took 3.5 s
```

<!-- varies: 9.9 s -->
```
one two
took 9.9 s
```

```
make demo
codebook prune MODEL
```

```
the table of the demo
```

<!-- first: x = 2 -->
```python
x + 1  # 3: three
print("a", x)  # a 2
str(x)  # 2
x * 1.5  # as long as it is
```

<!-- not run: hours -->
```
codebook bench MODEL
```
"""


@pytest.fixture
def page(tmp_path, monkeypatch):
    monkeypatch.setattr(follow_docs, "ROOT", tmp_path)

    def write(text):
        (tmp_path / "page.md").write_text(text)
        return follow("page.md", {})

    return write


def test_a_page_that_is_right(page):
    wrong, left_out = page(PAGE)
    assert not wrong
    assert [line.partition(": ")[2] for line in left_out] == [
        "make demo",
        "codebook prune MODEL",
        "the table of the demo",
        "hours",
    ]


@pytest.mark.parametrize(
    ("right", "wrong", "says"),
    [
        ("one two\ntook 9.9", "one 2\ntook 9.9", "the page shows 'one 2'"),
        ("varies: 9.9 s", "varies: 8.8 s", "the page shows 'took 9.9 s'"),
        ("one two\ntook 9.9 s", "took 9.9 s\none two", "the page shows 'one two'"),
        ("# 3: three", "# 4: four", "is 3"),
        ("# a 2", "# a 3", "printed 'a 2'"),
        ("str(x)  # 2", "str(x)  # 3", "is '2'"),
        ("echo took 3.5 s", "false", "ended with 1"),
        ("echo one two", "codebook nonsense", "`codebook nonsense` ended with 2"),
        ("x + 1", "y + 1", "NameError"),
    ],
)
def test_a_page_that_is_wrong(page, right, wrong, says):
    assert right in PAGE
    [found] = page(PAGE.replace(right, wrong, 1))[0]
    assert says in found


def test_marks_stand_before_blocks():
    """A mark that no block follows would be a reason for nothing."""
    for name in follow_docs.PAGES:
        path = follow_docs.ROOT / name
        marks = [block for block in blocks(path) if block.mark]
        assert len(marks) == len(re.findall("<!-- (?:not run|varies|first): ", path.read_text())), name
