"""What is released, tried as a user gets it: `make release`.

    python -m benchmarks.publish.release --out dist

Builds the source distribution and, from it, the wheel; has twine check their metadata; installs each into an empty
environment and runs the demo there, in an empty folder and without the checkout. Uploading is left to a person.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from codebook import __version__

ROOT = Path(__file__).resolve().parents[2]
KINDS = {"*.tar.gz": "source distribution", "*.whl": "wheel"}
CONSTRAINTS = ROOT / "constraints.txt"
SMALL = ["--images", "12", "--questions", "2"]
"""Options of a demo that shows only that everything is there."""


def run(*command: object, cwd: Path = ROOT) -> str:
    """Run a command without the checkout's Python path; what it printed, or its errors and the end of all."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=cwd, env=clean)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return done.stdout


def environment(folder: Path, *wanted: object) -> Path:
    """An empty environment with these installed; its programs."""
    venv.create(folder, with_pip=True)
    run(folder / "bin/python", "-m", "pip", "install", "--quiet", "--constraint", CONSTRAINTS, *wanted, cwd=folder)
    return folder / "bin"


def try_out(file: Path, kind: str) -> None:
    """Install a file into an empty environment, and run there what a newcomer would."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        programs = environment(folder / "venv", f"{file}[cpu]")
        (folder / "work").mkdir()
        assert run(programs / "codebook", "--version", cwd=folder / "work").split()[-1] == __version__
        report = json.loads(run(programs / "codebook", "demo", *SMALL, "--json", cwd=folder / "work"))
        assert (folder / "work" / report["picture"]).is_file()
        print(f"{kind} {file.name}: {file.stat().st_size / 2**20:.1f} MiB, installed, demo done", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    out = parser.parse_args().out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if old := [file.name for kind in KINDS for file in out.glob(kind)]:
        sys.exit(f"{out} holds {', '.join(old)}: remove them, or choose another --out")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT)
    files = {kind: file for pattern, kind in KINDS.items() for file in out.glob(pattern)}
    assert len(files) == 2 and all(
        file.name.startswith(f"redundancy_codebook-{__version__}") for file in files.values()
    )
    with tempfile.TemporaryDirectory() as temporary:
        programs = environment(Path(temporary) / "twine", "twine")
        print(run(programs / "twine", "check", "--strict", *files.values()), end="", flush=True)
    for kind, file in files.items():
        try_out(file, kind)


if __name__ == "__main__":
    main()
