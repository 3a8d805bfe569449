"""What only reads and lists answers at once: without torch, which takes seconds to import."""

import subprocess
import sys
from pathlib import Path

import pytest

from codebook import __version__

ROOT = Path(__file__).parents[2]
QUICK = (["--version"], ["--help"], ["list"], ["list", "--json"], ["inspect", "miniature"],
         ["inspect", "indexes/miniature", "--json"], ["inspect", "nowhere"], ["prune", "--nonsense"])  # fmt: skip


def test_no_command_that_only_reads_imports_torch():
    """All in one process, which would show what any of them imports."""
    script = (
        "import sys\n"
        "from codebook.cli import main\n"
        f"for argv in {QUICK!r}:\n"
        "    try:\n"
        "        main(argv)\n"
        "    except SystemExit as ended:\n"
        "        assert ended.code == 2 and argv[-1] in ('nowhere', '--nonsense'), argv\n"
        "    found = {'torch', 'transformers', 'faiss'} & set(sys.modules)\n"
        "    assert not found, (argv, found)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"codebook {__version__}\n") and "469 prototypes" in done.stdout


def test_the_package_runs_as_its_command_does():
    done = subprocess.run([sys.executable, "-m", "codebook", "--version"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"codebook {__version__}\n", "")


@pytest.mark.parametrize(
    ("words", "expected"),
    [("codebook ins", {"inspect"}), ("codebook inspect --she", {"--sheet"}), ("codebook miniature im", {"images"})],
)
def test_a_shell_completes_commands_and_options(monkeypatch, run, words, expected):
    """As bash asks: words and the place of the cursor in the environment."""
    monkeypatch.setenv("_CODEBOOK_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
    code, out, _ = run()
    assert code == 0 and set(out.split()) == expected
