"""How much of the speed-up that FLOPs promise arrives: prefill of a random LLaVA under several schedules.

    python -m benchmarks.cost.prefill

A 12-layer, 512-wide random Llama (8 heads, feed-forward 1376) behind a tiny tower; a prompt of 576 visual tokens and 32
of text, one image, fp32. The image is encoded beforehand: timed is the language model's prefill, with hooks, selection,
cache and all. Implied is the ratio of `Schedule.flops`, text included. Every schedule runs once a round, and so does a
prompt without image of as many tokens as a flat schedule leaves: what of the implied does not arrive there either is no
fault of pruning, but of matrices that have become small, and of a formula that counts two feed-forward matrices where
Llama has three.
"""

import statistics
from contextlib import nullcontext

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling

from benchmarks.cost.timing import interleaved, measured, quartiles
from codebook import Codebook, Schedule

SIDE, TEXT, IMAGE = 24, 32, 99
DECODER = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 12, "num_attention_heads": 8}
SCHEDULES = ("uniform", "divprune", "codebook", "divprune+random")
KEEPS = (0.5, 0.25, 0.11)
TARGET = 0.9
NO_IMAGE = "text alone"


def llava(**decoder: int) -> LlavaForConditionalGeneration:
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
            image_size=2 * SIDE, patch_size=2,
        ),
        text_config=LlamaConfig(vocab_size=IMAGE + 1, **DECODER | decoder),
        image_token_id=IMAGE, vision_feature_layer=-1, vision_feature_select_strategy="default",
        image_seq_length=SIDE * SIDE,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config).eval()


def compare(seconds: float, device: str) -> list[dict]:
    model, n = llava().to(device), SIDE * SIDE
    ids = torch.randint(1, IMAGE, (1, n + TEXT), device=device)
    ids[0, 4 : 4 + n] = IMAGE
    features = torch.randn(n, DECODER["hidden_size"], device=device)
    book = Codebook(torch.randn(454, DECODER["hidden_size"]))

    def prefill(schedule: Schedule | None) -> None:
        encoded = {"image": BaseModelOutputWithPooling(pooler_output=[features])}
        with schedule(model) if schedule else nullcontext():
            model(input_ids=ids, attention_mask=torch.ones_like(ids), mm_encoder_outputs=encoded, logits_to_keep=1)

    def short(count: int) -> None:
        prompt = ids[:, -TEXT:].repeat(1, count // TEXT + 1)[:, -count:]
        model(input_ids=prompt, attention_mask=torch.ones_like(prompt), logits_to_keep=1)

    layers = DECODER["num_hidden_layers"]
    plans = {
        (name, keep): Schedule.solve(name, book, keep=keep, n=n, layers=layers) for keep in KEEPS for name in SCHEDULES
    }
    counts = {keep: plans["uniform", keep].counts(n, layers)[0] for keep in KEEPS}
    tasks = {None: lambda: prefill(None)}
    for keep in KEEPS:
        tasks[NO_IMAGE, keep] = lambda keep=keep: short(counts[keep] + TEXT)
        tasks |= {(name, keep): lambda plan=plans[name, keep]: prefill(plan) for name in SCHEDULES}
    with torch.inference_mode():
        times = interleaved(tasks, seconds, device)
    shape = {"layers": layers, "hidden": DECODER["hidden_size"], "intermediate": DECODER["intermediate_size"]}
    unpruned = times.pop(None)
    rows = [{"schedule": "unpruned", "keep": 1.0, **quartiles(unpruned)}]
    for (name, keep), own in times.items():
        plan = plans["uniform" if name == NO_IMAGE else name, keep]
        implied = 1 / (1 - plan.flops_reduction(n, **shape, text=TEXT))
        # Round by round: what slows the machine down for a while slows both.
        speedup = [full / pruned for full, pruned in zip(unpruned, own, strict=True)]
        rows.append({
            "schedule": name, "keep": keep, "stages": "" if name == NO_IMAGE else str(plan), **quartiles(own),
            "speedup": quartiles(speedup), "implied": implied, "arrived": statistics.median(speedup) / implied,
        })  # fmt: skip
    return rows


def main() -> None:
    report = measured(__doc__, compare)
    if report is None:
        return
    full, *rows = report["rows"]
    print(f"{report['machine']}, {report['threads']} threads, torch {report['torch']}, {full['rounds']} rounds")
    print(f"unpruned: {full['median'] * 1e3:.0f} ms ({full['q1'] * 1e3:.0f} - {full['q3'] * 1e3:.0f})")
    print(
        f"{'schedule':<18}{'keep':>5}{'ms':>7}{'speed-up':>10}  {'quartiles':<14}{'implied':>8}{'arrived':>9}  stages"
    )
    for row in rows:
        spread = f"{row['speedup']['q1']:.2f} - {row['speedup']['q3']:.2f}"
        mark = "" if row["arrived"] >= TARGET else f"  below {TARGET}"
        print(f"{row['schedule']:<18}{row['keep']:>5}{row['median'] * 1e3:>7.0f}{row['speedup']['median']:>10.2f}  "
              f"{spread:<14}{row['implied']:>8.2f}{row['arrived']:>9.2f}  {row['stages']}{mark}")  # fmt: skip


if __name__ == "__main__":
    main()
