"""What mass-preserving attention costs: the same schedules with and without it, side by side, at equal kept counts.

    python -m benchmarks.cost.mass

The model and prompt of `benchmarks.cost.prefill`: 12 layers, 512 wide, 576 visual tokens and 32 of text, fp32.
Prefill holds hooks, selection, counting and cache; decoding is 8 further tokens, one by one, on a pruned cache. Every
pair runs once a round, and ratios are taken round by round.
"""

from functools import partial

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from benchmarks.cost.prefill import DECODER, IMAGE, KEEPS, SIDE, TEXT, llava
from benchmarks.cost.timing import interleaved, measured, quartiles
from codebook import Codebook, Schedule

ROWS = ("uniform", "codebook-farthest")
STEPS = 8
TARGET = 1.1


def compare(seconds: float, device: str) -> list[dict]:
    model, n, layers = llava().to(device), SIDE * SIDE, DECODER["num_hidden_layers"]
    ids = torch.randint(1, IMAGE, (1, n + TEXT), device=device)
    ids[0, 4 : 4 + n] = IMAGE
    features = torch.randn(n, DECODER["hidden_size"], device=device)
    book = Codebook(torch.randn(454, DECODER["hidden_size"]))

    def prefill(schedule: Schedule):
        encoded = {"image": BaseModelOutputWithPooling(pooler_output=[features])}
        with schedule(model):
            return model(input_ids=ids, mm_encoder_outputs=encoded, logits_to_keep=1, use_cache=True).past_key_values

    def decode(schedule: Schedule, cache) -> None:
        with schedule(model):
            for _ in range(STEPS):
                model(input_ids=ids[:, -1:], past_key_values=cache)
        cache.crop(-STEPS)

    rows = [(row, keep) for keep in KEEPS for row in ROWS]
    tasks = {}
    with torch.inference_mode():
        for row, keep in rows:
            for mass in ("", "+mass"):
                plan = Schedule.solve(row + mass, book, keep=keep, n=n, layers=layers)
                tasks["prefill", row, keep, mass] = partial(prefill, plan)
                tasks["decode", row, keep, mass] = partial(decode, plan, prefill(plan))
        times = interleaved(tasks, seconds, device)
    report = []
    for what in ("prefill", "decode"):
        for row, keep in rows:
            without, own = times[what, row, keep, ""], times[what, row, keep, "+mass"]
            ratio = quartiles([b / a for a, b in zip(without, own, strict=True)])
            report.append({"what": what, "schedule": row, "keep": keep, "without": quartiles(without),
                           "with": quartiles(own), "ratio": ratio})  # fmt: skip
    return report


def main() -> None:
    report = measured(__doc__, compare)
    if report is None:
        return
    rounds = report["rows"][0]["ratio"]["rounds"]
    print(f"{report['machine']}, {report['threads']} threads, torch {report['torch']}, {rounds} rounds")
    print(f"{'':<9}{'schedule':<19}{'keep':>5}{'ms':>8}{'+mass':>8}{'ratio':>7}  quartiles")
    for row in report["rows"]:
        ratio = row["ratio"]
        mark = "" if ratio["median"] <= TARGET else f"  above {TARGET}"
        print(f"{row['what']:<9}{row['schedule']:<19}{row['keep']:>5}{row['without']['median'] * 1e3:>8.1f}"
              f"{row['with']['median'] * 1e3:>8.1f}{ratio['median']:>7.2f}  {ratio['q1']:.2f} - {ratio['q3']:.2f}"
              f"{mark}")  # fmt: skip


if __name__ == "__main__":
    main()
