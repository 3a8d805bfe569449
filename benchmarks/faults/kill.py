"""kill -9 at random moments: nothing half-written stays, and the same command goes on to the same bytes.

    python -m benchmarks.faults.kill                      # 50 kills of each command
    python -m benchmarks.faults.kill merge prune --kills 200

Commands run in forks of one process that has imported everything, so that the kills fall into their work and not into
imports. A killed command is run again in the folder it left, up to five times killed, then to its end; what lies there
must be what an uninterrupted run leaves: the same names, hidden ones too, and the same bytes; of journals, the same
records. Of a benchmark's results, times do not count.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sqlite3
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image

from codebook import load
from codebook.cli import main as codebook
from codebook.miniature.scenes import scene

SEED = 0
IN_A_ROW = 5
TIMES = {"cost", "machine", "seconds"}
"""Keys of results.json that differ from run to run."""

# Words of each command line; {given} is the folder of what it reads, {out} that of what it writes.
COMMANDS = {
    "build": "build miniature --images {given}/images --out {out}/book --device cpu",
    "extend": "extend {given}/first --images {given}/more --out {out}/book --device cpu",
    "merge": "merge {given}/first {given}/second --out {out}/book",
    "prune": "prune miniature --input {given}/images/questions.jsonl --output {out}/answers.jsonl --keep 0.2 --batch 4 "
    "--max-new-tokens 4 --device cpu",
    "bench": "bench miniature --methods codebook --keep 0.2 --count 2 --seconds 0 --show 2 --max-new-tokens 4 "
    "--out {out}/bench --device cpu",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commands", nargs="*", metavar="command", help=f"{', '.join(COMMANDS)}; default: all")
    parser.add_argument("--kills", type=int, default=50, help="of each command")
    parser.add_argument("--images", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(1)  # bit for bit the same after a kill
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # a thread's OpenMP pool does not survive a fork
    load("miniature", "cpu")
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name), options.images)
        for command in options.commands or COMMANDS:
            start = time.perf_counter()
            ends = kill(COMMANDS[command], Path(name), options.kills, random.Random(f"{SEED} {command}"))
            print(f"{command}: {options.kills} kills, {ends} runs to the end, identical bytes, no stray files, "
                  f"{time.perf_counter() - start:.0f} s", flush=True)  # fmt: skip


def prepare(folder: Path, count: int) -> None:
    """Pictures, questions about them, and two codebooks of half of them each."""
    for name, numbers in {"images": range(count), "more": range(count // 2, count)}.items():
        (folder / name).mkdir()
        for i in numbers:
            Image.fromarray(scene("train", 2, SEED, i).pixels).save(folder / name / f"{i:06d}.png")
    questions = [{"image": f"{i:06d}.png", "question": "read the number."} for i in range(count)]
    (folder / "images" / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in questions))
    build = f"build miniature --images {folder}"
    run(f"{build}/images --limit {count // 2} --out {folder}/first --device cpu".split())
    run(f"{build}/more --out {folder}/second --device cpu".split())


def kill(command: str, folder: Path, count: int, draw: random.Random) -> int:
    """Kill the command `count` times; how many runs came to their end and were compared."""
    straight, out = folder / "straight", folder / "out"
    straight.mkdir()
    start = time.perf_counter()
    run(command.format(given=folder, out=straight).split())
    whole, expected = time.perf_counter() - start, contents(straight)
    words, kills, ends = command.format(given=folder, out=out).split(), 0, 0
    while kills < count:
        out.mkdir()
        for _ in range(min(IN_A_ROW, count - kills)):
            if run(words, draw.uniform(0, whole)):
                break
            kills += 1
        else:
            run(words)
        found = contents(out)
        if found != expected:
            names = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
            raise SystemExit(f"after kill {kills} of `{' '.join(words)}` these differ: {', '.join(names)}")
        shutil.rmtree(out)
        ends += 1
    shutil.rmtree(straight)
    return ends


def run(words: list[str], seconds: float | None = None) -> bool:
    """Run a command line in a fork, killed after so many seconds; whether it came to its end, a good one."""
    with tempfile.TemporaryFile() as said:
        child = os.fork()
        if not child:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
            code: object = 1
            try:
                codebook(words)
                code = 0
            except SystemExit as end:
                code = end.code
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code if isinstance(code, int) else 0 if code is None else 1)
        if seconds is not None:
            time.sleep(seconds)
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        if os.WIFSIGNALED(status):
            return False
        if os.WEXITSTATUS(status):
            said.seek(0)
            raise SystemExit(f"`{' '.join(words)}` ended with {os.WEXITSTATUS(status)}: {said.read().decode()[-2000:]}")
        return True


def contents(folder: Path) -> dict[str, object]:
    """What each file holds: its bytes, its values without times, its records; of files about times alone, nothing."""
    found: dict[str, object] = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.name == "results.json":
            found[name] = untimed(json.loads(path.read_text()))
        elif path.name == "report.html" or path.name.startswith("timing-"):
            found[name] = None
        elif path.suffix == ".sqlite":  # where a record lies in it depends on what was written before and after a kill
            with contextlib.closing(sqlite3.connect(path)) as database:
                found[name] = database.execute("SELECT key, value FROM records ORDER BY key").fetchall()
        else:
            found[name] = path.read_bytes() if path.is_file() else "folder"
    return found


def untimed(value: object) -> object:
    if isinstance(value, dict):
        return {key: untimed(part) for key, part in value.items() if key not in TIMES}
    return [untimed(part) for part in value] if isinstance(value, list) else value


if __name__ == "__main__":
    main()
