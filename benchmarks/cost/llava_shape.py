"""What pruning saves on a model of LLaVA-1.5-7B's shape: prefill, decoding, KV cache; and what choosing costs.

    python -m benchmarks.cost.llava_shape --layers 1
    python -m benchmarks.cost.llava_shape --device cuda --json

Random weights: the time does not depend on them. One image as the real processor prepares it (336 x 336 pixels, 576
visual tokens) and 64 tokens of text. The vision tower is timed by itself and is not part of the prefill. Tokens are
chosen before the LLM by a codebook of 454 prototypes, as the released one has. float32 on the CPU, float16 on CUDA.
`--layers` builds fewer decoder layers than 32: the prefill and the cache shrink in proportion, the embedding and the
last projection do not.
"""

import argparse
import json
from contextlib import nullcontext

import torch
from transformers import CLIPImageProcessor, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from benchmarks.cost.timing import interleaved, machine, quartiles
from codebook import Codebook, RedundancyCodebook, Schedule, Stage, VisualTokens

KEEPS = (1.0, 0.5, 0.22, 0.11)
TEXT, STEPS, PROTOTYPES, IMAGE_TOKEN = 64, 8, 454, 32000


def build(layers: int, device: str) -> LlavaForConditionalGeneration:
    """A random LLaVA-1.5-7B of so many decoder layers."""
    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
        patch_size=14, projection_dim=768,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=32064, hidden_size=4096, intermediate_size=11008, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=32, max_position_embeddings=4096, pad_token_id=32001,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN, image_seq_length=576)
    config._attn_implementation = "sdpa"
    dtype, default = (torch.float16 if device == "cuda" else torch.float32), torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlavaForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(default)


def pixels(model: LlavaForConditionalGeneration) -> torch.Tensor:
    """A random picture through LLaVA-1.5's image processor."""
    settings = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    picture = torch.randint(0, 256, (480, 640, 3), dtype=torch.uint8).numpy()
    made = CLIPImageProcessor(**settings)(images=picture, return_tensors="pt")["pixel_values"]
    return made.to(model.device, model.dtype)


class Run:
    """One setting: its prefill and its decoding, each a task of its own."""

    def __init__(self, model: LlavaForConditionalGeneration, schedule: Schedule | None, inputs: dict) -> None:
        self.model, self.schedule, self.inputs = model, schedule, inputs
        with self.context():
            self.cache = model(**inputs, use_cache=True, logits_to_keep=1).past_key_values
        self.bytes = sum(t.nbytes for layer in self.cache.layers for t in (layer.keys, layer.values))

    def context(self):
        return nullcontext() if self.schedule is None else self.schedule(self.model)

    def prefill(self) -> None:
        with self.context():
            self.model(**self.inputs, use_cache=True, logits_to_keep=1)

    def decode(self) -> None:
        token = self.inputs["input_ids"][:, -1:]
        with self.context():
            for _ in range(STEPS):
                self.model(input_ids=token, past_key_values=self.cache)
            self.cache.crop(-STEPS)


def compare(model: LlavaForConditionalGeneration, seconds: float, device: str) -> dict:
    images = pixels(model)
    encoded = {"image": model.get_image_features(pixel_values=images, return_dict=True)}
    text = torch.randint(10, 30000, (1, TEXT), device=device)
    ids = torch.cat([text[:, : TEXT // 2], text.new_full((1, 576), IMAGE_TOKEN), text[:, TEXT // 2 :]], dim=1)
    pruner = RedundancyCodebook(Codebook(torch.randn(PROTOTYPES, 4096)))
    tokens = VisualTokens.of(encoded["image"].pooler_output[0])
    schedules = {"untouched": None} | {str(keep): Schedule([Stage(0, keep, pruner)]) for keep in KEEPS}
    runs = {name: Run(model, plan, {"input_ids": ids, "mm_encoder_outputs": encoded})
            for name, plan in schedules.items()}  # fmt: skip
    tasks = {("tower", ""): lambda: model.get_image_features(pixel_values=images)}
    tasks |= {("prefill", name): run.prefill for name, run in runs.items()}
    tasks |= {("decode", name): run.decode for name, run in runs.items()}
    tasks |= {
        ("select", str(keep)): lambda keep=keep: pruner.select(tokens, round(keep * 576)) for keep in KEEPS if keep < 1
    }
    measured = {task: quartiles(values) for task, values in interleaved(tasks, seconds, device).items()}
    for (what, _), row in measured.items():
        if what == "decode":
            row |= {name: row[name] / STEPS for name in ("q1", "median", "q3")}  # a token
    return {
        "tower": measured["tower", ""],
        "rows": [
            {"keep": name, "kv_bytes": run.bytes, "select": measured.get(("select", name)),
             **{what: measured[what, name] for what in ("prefill", "decode")}}
            for name, run in runs.items()
        ],
    }  # fmt: skip


def show(report: dict) -> None:
    def ms(row: dict | None) -> str:
        return "" if row is None else " ".join(f"{row[name] * 1e3:.2f}" for name in ("q1", "median", "q3"))

    print(f"{report['machine']}, {report['threads']} threads, torch {report['torch']}, {report['dtype']}, "
          f"{report['layers']} decoder layers, {report['tower']['rounds']} rounds")  # fmt: skip
    print("milliseconds: first quartile, median, third quartile")
    print(f"vision tower and projector: {ms(report['tower'])}")
    whole = report["rows"][0]
    print(f"{'keep':<11}{'prefill':<26}{'times':>6}  {'decoding a token':<24}{'times':>6}{'KV MiB':>9}  select")
    for row in report["rows"]:
        faster = [whole[what]["median"] / row[what]["median"] for what in ("prefill", "decode")]
        print(f"{row['keep']:<11}{ms(row['prefill']):<26}{faster[0]:>6.2f}  {ms(row['decode']):<24}{faster[1]:>6.2f}"
              f"{row['kv_bytes'] / 2**20:>9.1f}  {ms(row['select'])}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--layers", type=int, default=32, help="of the decoder")
    parser.add_argument("--seconds", type=float, default=60, help="of timing; 3 rounds at least")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    with torch.inference_mode():
        model = build(options.layers, options.device)
        report = machine(options.device) | {"layers": options.layers, "dtype": str(model.dtype)}
        report |= compare(model, options.seconds, options.device)
    if options.json:
        print(json.dumps(report, indent=1))
    else:
        show(report)


if __name__ == "__main__":
    main()
