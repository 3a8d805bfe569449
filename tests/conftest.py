"""Running the command line in tests, each process on one thread.

On models this small threads only wait for each other, and several workers of pytest-xdist share the cores.
"""

import logging
import os
from collections import Counter

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; processes that tests start inherit it

import pytest

from codebook import cli
from tests import isolation  # noqa: F401  # before anything imports the hub's client

LONG = {"test_wheel", "test_ray", "test_faults"}
"""Files whose few tests take long."""


def pytest_collection_modifyitems(items):
    """Long files first, then those of many tests: workers take whole files, and none is left with a long one."""
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path.stem not in LONG, -tests[item.path], str(item.path)))


@pytest.fixture
def run(capfd):
    """Run the command line in this process; returns exit code, stdout, stderr."""

    def call(*argv):
        try:
            cli.main([str(a) for a in argv])
            code = 0
        except SystemExit as exit:
            code = exit.code or 0
        out, err = capfd.readouterr()
        return code, out, err

    yield call
    logging.getLogger("codebook").setLevel(logging.NOTSET)  # of which a command takes what --quiet said


@pytest.fixture
def refused(run):
    """Assert that a command is refused by one line that says all of `words`."""

    def call(*argv, words):
        code, out, err = run(*argv)
        assert code == 2 and not out
        last = err.strip().splitlines()[-1]
        assert last.startswith("error: ") and all(word in last for word in words), err
        assert "Traceback" not in err

    return call


@pytest.fixture(scope="session")
def language():
    """SmolLM2's file, which `codebook prune eyes` puts into the cache; no test fetches 93 MB."""
    from codebook.models.caching import cache_folder
    from codebook.models.smollm2 import GGUF_SHA256, MEMBER, language_file

    path = cache_folder() / f"{os.path.basename(MEMBER)[:-5]}-{GGUF_SHA256[:8]}.gguf"
    if not path.exists():
        pytest.skip("the language model of `eyes` is not in the cache")
    return language_file()
