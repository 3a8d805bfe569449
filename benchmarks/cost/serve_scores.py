"""What HTTP adds to redundancy scores: `codebook serve` asked by its client, and the library called in this process.

    python -m benchmarks.cost.serve_scores

576 tokens of 4096 numbers in half precision, as of LLaVA-1.5-7B, against 454 prototypes: the authors' where
CODEBOOK_RELEASED names their folder (repository DingchenYang99/RedundancyCodebook), else random ones. Both ways run
once a round, the service in a process of its own with as many threads. Ratios are taken round by round: HTTP's seconds
beyond the library's, over the library's.
"""

import contextlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from benchmarks.cost.timing import interleaved, measured, quartiles
from codebook import Client, Codebook
from codebook.serving.scores import score_features

TOKENS, WIDTH, PROTOTYPES = 576, 4096, 454
METHODS = ("codebook", "seeded")
KEEP = 0.2
TARGET = 1.0


def released() -> Codebook:
    """The authors' codebook, or a random one of its shape."""
    if "CODEBOOK_RELEASED" in os.environ:
        [file] = Path(os.environ["CODEBOOK_RELEASED"]).glob("*llava15/*numPrototypes-454.pt")
        return Codebook.from_released(file, file.with_suffix(".json"), "llava-1.5-7b")
    return Codebook(torch.randn(PROTOTYPES, WIDTH))


@contextlib.contextmanager
def served(book: Codebook) -> Iterator[Client]:
    """A client of a service of this codebook, named `book`."""
    with tempfile.TemporaryDirectory() as folder:
        book.save(folder)
        command = [sys.executable, "-m", "codebook.cli", "serve", "--codebook", f"book={folder}", "--port", "0"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            try:
                assert process.stderr is not None
                said = iter(process.stderr)
                [address] = next(found for line in said if (found := re.findall(r"http://[\d.:]+", line)))
                yield Client(address)
            finally:
                process.terminate()


def compare(seconds: float, device: str) -> list[dict]:
    book = released()
    features = torch.randn(TOKENS, WIDTH).half()
    with served(book) as client:
        tasks = {}
        for method in METHODS:
            tasks["library", method] = partial(score_features, book, features, KEEP, method)
            tasks["http", method] = partial(client.score, "book", features, KEEP, method)
            own, theirs = tasks["library", method](), tasks["http", method]()
            assert torch.equal(own["redundancy"], theirs.redundancy) and torch.equal(own["kept"], theirs.kept)
        times = interleaved(tasks, seconds, device)
    report = []
    for method in METHODS:
        library, http = times["library", method], times["http", method]
        ratio = quartiles([(b - a) / a for a, b in zip(library, http, strict=True)])
        report.append({"method": method, "library": quartiles(library), "http": quartiles(http), "ratio": ratio})
    return report


def main() -> None:
    report = measured(__doc__, compare)
    if report is None:
        return
    rounds = report["rows"][0]["ratio"]["rounds"]
    print(f"{report['machine']}, {report['threads']} threads, torch {report['torch']}, {rounds} rounds")
    print(f"{'method':<10}{'library ms':>11}{'HTTP ms':>9}{'overhead':>10}  quartiles")
    for row in report["rows"]:
        ratio = row["ratio"]
        mark = "" if ratio["median"] < TARGET else f"  not below {TARGET}"
        print(f"{row['method']:<10}{row['library']['median'] * 1e3:>11.1f}{row['http']['median'] * 1e3:>9.1f}"
              f"{ratio['median']:>10.2f}  {ratio['q1']:.2f} - {ratio['q3']:.2f}{mark}")  # fmt: skip


if __name__ == "__main__":
    main()
