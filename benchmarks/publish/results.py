"""docs/results.md from a results.json of `codebook bench`.

    python -m benchmarks.publish.results benchmarks/publish/miniature.json > docs/results.md

`make results` does that.
"""

import argparse
import json
from pathlib import Path

from codebook.evaluation.report import markdown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="what `codebook bench` wrote")
    results = json.loads(parser.parse_args().results.read_text())
    rows, [counts] = results["rows"], {task["samples"] for task in results["tasks"].values()}
    options = {
        "methods": f'"{",".join(dict.fromkeys(row["method"] for row in rows[1:]))}"',
        "keep": ",".join(f"{keep:g}" for keep in results["keeps"]),
        "count": counts, "seeds": max(row["seeds"] for row in rows), "seed": results["seed"],
        **({"against": f'"{results["against"]}"'} if results.get("against") else {}), "out": "bench",
    }  # fmt: skip
    command = " ".join(f"--{name} {value}" for name, value in options.items())
    print(f"# Results of {results['name']}\n")
    print("Written by `make results`; the table's columns are explained in [bench.md](bench.md). Measured by\n")
    print(f"```\ncodebook bench {results['name']} {command}\n```\n")
    if "note" in results:  # benchmarks/publish/remeasure.py
        print(f"{results['note']}\n")
    print(markdown(results), end="")


if __name__ == "__main__":
    main()
