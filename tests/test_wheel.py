"""The wheel, in an empty environment away from the checkout: what a user gets."""

import json
import os
import subprocess
import sys
from pathlib import Path

from codebook import __version__

ROOT = Path(__file__).parent.parent


def run(*command, **kwargs):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_wheel_runs_the_demo(tmp_path):
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, ROOT)
    [wheel] = tmp_path.glob("*.whl")
    assert wheel.name.startswith(f"redundancy_codebook-{__version__}-")  # on PyPI `codebook` is another project
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt", f"{wheel}[cpu]")
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    program = tmp_path / "venv" / "bin" / "codebook"

    [_, shipped] = json.loads(run(program, "list", "--json", cwd=tmp_path, env=clean))["codebooks"]
    assert shipped["name"] == "miniature" and shipped["prototypes"] > 0
    assert str(tmp_path / "venv") in shipped["folder"]

    report = json.loads(run(program, "doctor", "--json", cwd=tmp_path, env=clean))
    assert report["codebook"] == __version__ and report["extras"]["cpu"]["installed"]

    small = ["--images", "12", "--questions", "2", "--json"]
    report = json.loads(run(program, "demo", *small, cwd=tmp_path, env=clean))
    assert [(row["method"], row["keep"]) for row in report["accuracy"]][:3] == [
        ("unpruned", 1.0),
        ("seeded-middle", 0.5),
        ("codebook", 0.5),
    ]
    assert (tmp_path / report["picture"]).is_file()
    assert report["example"]["question"] == "read the number." and report["example"]["kept"] == 36
