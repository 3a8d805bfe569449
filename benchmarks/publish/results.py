"""docs/results.md and docs/report.html from a results.json of `codebook bench`.

    python -m benchmarks.publish.results benchmarks/publish/miniature.json --report docs/report.html > docs/results.md

`make results` does that.
"""

import argparse
import json
from pathlib import Path

from codebook.cli.data import load_data
from codebook.evaluation.looks import samples_to_show
from codebook.evaluation.report import command_of, html, markdown
from codebook.pruning.presets import leaves_horizon
from codebook.pruning.text import UNPRUNED


def with_layer(method: str, schedule: str) -> str:
    """A row's method with the layer of its schedule's last stage, where the method leaves that to the horizon."""
    if method == UNPRUNED or not leaves_horizon(method, fitted=True):
        return method
    return f"{method}@{schedule.rpartition('@')[2].partition(':')[0]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="what `codebook bench` wrote")
    parser.add_argument("--report", type=Path, help="also write the report, of data that ship, to this file")
    given = parser.parse_args()
    results = json.loads(given.results.read_text())
    for row in results["rows"]:  # so that the command measures the same, wherever a horizon is known by then
        row["method"] = with_layer(row["method"], row["schedule"])
    print(f"# Results of {results['name']}\n")
    print("Written by `make results`; the table's columns are explained in [bench.md](bench.md). Measured by\n")
    print("<!-- not run: hours -->")
    print(f"```\n{command_of(results)}\n```\n")
    if "note" in results:  # benchmarks/publish/remeasure.py
        print(f"{results['note']}\n")
    print(markdown(results), end="")
    if given.report is not None:
        tasks = load_data(results["data"], next(iter(results["tasks"].values()))["samples"])
        samples = samples_to_show(tasks, len(results["samples"]))
        assert [one.question for one in samples] == [one["question"] for one in results["samples"]]
        given.report.write_text(html(results, [one.pictures() for one in samples]))


if __name__ == "__main__":
    main()
