"""What the search for the nearest prototype costs, by codebook size: torch, FAISS exact, FAISS by an inverted file.

    python -m benchmarks.cost.search
    python -m benchmarks.cost.search --counts 100000 --seconds 20 --json

576 tokens of dimension 1024 against synthetic codebooks of 200 clusters, on the CPU, with one thread and with two.
`agree` is the share of keep decisions that equal those of the exact search, at the worst of nine keep ratios, over 4608
tokens that the codebook does not hold: half are further members of its clusters, half are means of two such members.
`made` is the time to make the index and to measure how many lists a search needs, `opened` the time to open it from the
cache, its SHA-256 included. Memory is what the first search adds: private, and of the mapped file; torch and FAISS
share one normalised copy of the prototypes. Where the exact search is as fast, there is no index.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import torch

from benchmarks.cost.build import clustered
from benchmarks.cost.timing import interleaved, machine, quartiles
from codebook import Codebook
from codebook.models.caching import cache_folder
from codebook.store.inverted import Place, inverted_file
from codebook.store.search import PrototypeSearch

IMAGES, TOKENS = 8, 576
THREADS = (1, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--seconds", type=float, default=30, help="of rounds, per size and number of threads")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    report = machine("cpu") | {"faiss": faiss.__version__, "sizes": []}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        for count in options.counts:
            report["sizes"].append(compare(count, Path(folder) / str(count), options.seconds))
            if not options.json:
                show(report["sizes"][-1])
    if options.json:
        print(json.dumps(report, indent=1))


def compare(count: int, folder: Path, seconds: float) -> dict[str, Any]:
    use(1)
    tokens = codebook_and_tokens(count, folder)
    book = Codebook.load(folder)
    place = Place(folder, book.config["sha256"]["prototypes.safetensors"])
    _, made = timed(lambda: inverted_file(faiss, lambda: unit(book.prototypes), place))
    before = memory()
    index, opened = timed(lambda: inverted_file(faiss, lambda: unit(book.prototypes), place))
    [record] = [json.loads(path.read_text()) for path in cache_folder().glob(f"{place.digest}*.json")]
    exact = PrototypeSearch(book.prototypes)
    ways: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "inverted file": lambda own: torch.from_numpy(index.search(unit(own), 1)[0][:, 0]),
        "torch": lambda own: exact.nearest(own, 1, "torch")[0][:, 0],
        "faiss": lambda own: exact.nearest(own, 1, "faiss")[0][:, 0],
    }
    if index is None:
        del ways["inverted file"]
    held = {}
    for way, search in ways.items():
        search(tokens[0])
        after = memory()
        held[way], before = [round(b - a) for a, b in zip(before, after, strict=True)], after
    rows = []
    for threads in THREADS:
        use(threads)
        tasks = {way: lambda search=search: search(tokens[0]) for way, search in ways.items()}
        times = {way: quartiles(values) for way, values in interleaved(tasks, seconds, "cpu").items()}
        rows += [
            {"way": way, "threads": threads, "of_faiss": row["median"] / times["faiss"]["median"], **row}
            for way, row in times.items()
        ]
    agree = None
    if index is not None:
        both = [kept(torch.stack([ways[way](own) for own in tokens])) for way in ("inverted file", "faiss")]
        agree = (both[0] == both[1]).float().mean(dim=(1, 2)).min().item()
    return {
        "prototypes": count, **record, "made": made, "opened": None if index is None else opened, "agree": agree,
        "memory_mib": held, "rows": rows,
    }  # fmt: skip


def codebook_and_tokens(count: int, folder: Path) -> torch.Tensor:
    """Write a codebook, and give images of tokens that it does not hold: (images, tokens, d)."""
    x = clustered(count + 3 * IMAGES * TOKENS // 2)
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(1))]
    Codebook(x[:count].clone()).save(folder)
    near, a, b = (part.reshape(IMAGES, TOKENS // 2, -1) for part in x[count:].chunk(3))
    return torch.cat([near, (a + b) / 2], dim=1)


def unit(vectors: torch.Tensor) -> Any:
    return torch.nn.functional.normalize(vectors, dim=1).numpy()


def kept(similarity: torch.Tensor) -> torch.Tensor:
    """At nine keep ratios, which tokens of each image stay: those least like any prototype."""
    rank = similarity.argsort(dim=1, stable=True).argsort(dim=1)
    return torch.stack([rank < TOKENS * tenths // 10 for tenths in range(1, 10)])


def memory() -> tuple[float, float]:
    """MiB of this process: private, and of mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {line.split()[0]: int(line.split()[1]) / 1024 for line in lines if line.startswith("Rss")}
    return found["RssAnon:"], found["RssFile:"]


def timed(task: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    return task(), time.perf_counter() - start


def use(threads: int) -> None:
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)


def show(size: dict[str, Any]) -> None:
    found = "the exact search is as fast"
    if size["searched"]:
        found = (f"{size['searched']} searched, agreement at least {size['agreement']:.4f} when made, "
                 f"{size['agree']:.4f} here; opened in {size['opened']:.2f} s")  # fmt: skip
    print(f"\n{size['prototypes']:,} prototypes, {size['lists']} lists, made in {size['made']:.1f} s: {found}")
    print(f"{'way':<15}{'threads':>8}{'ms':>9}  {'quartiles':<18}{'of faiss':>9}{'MiB private, mapped':>22}")
    for row in size["rows"]:
        spread = f"{row['q1'] * 1e3:.1f} - {row['q3'] * 1e3:.1f}"
        held = ", ".join(map(str, size["memory_mib"][row["way"]]))
        print(f"{row['way']:<15}{row['threads']:>8}{row['median'] * 1e3:>9.1f}  {spread:<18}{row['of_faiss']:>9.2f}"
              f"{held:>22}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
