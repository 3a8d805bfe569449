"""What pruning saves on a model of LLaVA-1.5-7B's shape: prefill, decoding, KV cache, peak memory.

    python -m benchmarks.cost.device --parts llava --device cpu --layers 1 --tokens 576 --batches 1

Random weights: the time does not depend on them. A prompt is 64 tokens of text around one image of 576 visual tokens or
five of them, 2880, encoded beforehand. Tokens are chosen before the LLM by a codebook of 454 prototypes, as the
released one has. A prompt of text alone, as long as what pruning leaves, is the yardstick: nothing that drops tokens
can be faster. In each round every setting prefills and then decodes on the cache that it has made, so that one cache is
held at a time; contexts are opened beforehand, as a server does.
"""

import gc
import itertools
import time
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling

from benchmarks.cost.timing import Report, clocked, quartiles
from codebook import Codebook, RedundancyCodebook, Schedule, Stage

TEXT, PROTOTYPES, IMAGE, IMAGE_TOKEN = 64, 454, 576, 32000
STEPS = 4
"""Tokens decoded in each round."""
ROUNDS = 2, 9
"""The fewest, whatever the time, and the most."""
SECONDS = 10
"""After which no further round of one number of tokens and prompts is begun."""
ANY_MISTAKE = (RuntimeError, ValueError, AssertionError, NotImplementedError)
"""What kernels and compilers raise where they cannot; `torch.OutOfMemoryError` is a RuntimeError."""


def build(layers: int, device: str, dtype: torch.dtype, attention: str = "sdpa") -> LlavaForConditionalGeneration:
    """A random LLaVA-1.5-7B of so many decoder layers."""
    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
        patch_size=14, projection_dim=768,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=32064, hidden_size=4096, intermediate_size=11008, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=32, max_position_embeddings=4096, pad_token_id=32001,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN, image_seq_length=IMAGE)
    config._attn_implementation = attention
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlavaForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(default)


class Prompts:
    """A batch of prompts under one setting, whose prefill and decoding are timed.

    Parameters
    ----------
    schedule
        What prunes the images; None where nothing does.
    tokens
        Visual tokens per prompt, a multiple of 576. With `text`, further tokens of text instead of them.
    """

    def __init__(
        self, model: LlavaForConditionalGeneration, schedule: Schedule | None, tokens: int, batch: int, text: bool
    ) -> None:
        self.model, self.schedule, self.device = model, schedule, model.device.type
        ids = torch.randint(10, 30000, (batch, TEXT + tokens), device=model.device)
        self.inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if not text:
            ids[:, TEXT // 2 : TEXT // 2 + tokens] = IMAGE_TOKEN
            features = torch.randn(IMAGE, model.config.text_config.hidden_size, device=model.device, dtype=model.dtype)
            encoded = BaseModelOutputWithPooling(pooler_output=[features] * (batch * tokens // IMAGE))
            self.inputs["mm_encoder_outputs"] = {"image": encoded}
        self.prefill: list[float] = []
        self.host: list[float] = []
        self.decode: list[float] = []
        self.peak = self.kv_bytes = self.length = 0

    def round(self) -> None:
        """Prefill and decode once, in the schedule's context."""
        with nullcontext() if self.schedule is None else self.schedule(self.model):
            seconds, said, cache = clocked(self._prefilled, self.device)
            decoding, *_ = clocked(lambda: self._decode(cache), self.device)
        self.prefill.append(seconds)
        self.host.append(said)
        self.decode.append(decoding / STEPS)

    def warm_up(self) -> None:
        """A round that is not counted, but for the memory that it takes."""
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with nullcontext() if self.schedule is None else self.schedule(self.model):
            cache = self._prefilled()
            if self.device == "cuda":
                self.peak = torch.cuda.max_memory_allocated()
            self.kv_bytes = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
            self.length = cache.layers[-1].keys.shape[2]
            self._decode(cache)

    def _prefilled(self) -> Any:
        return self.model(**self.inputs, use_cache=True, logits_to_keep=1).past_key_values

    def _decode(self, cache: Any) -> None:
        token = self.inputs["input_ids"][:, -1:]
        for _ in range(STEPS):
            self.model(input_ids=token, past_key_values=cache)

    def measured(self) -> dict[str, Any]:
        return {
            "prefill": quartiles(self.prefill), "prefill_host": quartiles(self.host), "decode": quartiles(self.decode),
            "kv_bytes": self.kv_bytes, "peak_bytes": self.peak, "length": self.length,
        }  # fmt: skip


def compare(
    report: Report, model: LlavaForConditionalGeneration, tokens: int, batch: int, keeps: list[float], ways: list[str]
) -> None:
    """Time every keep under every way, side by side, and write down after each round what is known by then.

    Ways are `codebook`; `codebook+mass`; and `text`, the prompt of text alone of the length that `codebook` leaves. At
    keep 1 the first is the model without a context, and the second is left out.
    """
    pruner = codebook_of(model)
    attention = model.get_decoder().config._attn_implementation
    settings: dict[tuple[float, str], Prompts] = {}
    for keep, way in itertools.product(keeps, ways):
        if (keep == 1 and way == "codebook+mass") or report.left < 0:
            continue
        kept = tokens // IMAGE * Stage(0, keep, pruner).count(IMAGE)
        plan = None
        if keep < 1 and way != "text":
            plan = Schedule([Stage(0, keep, pruner, mass=way == "codebook+mass")])
        try:
            made = Prompts(model, plan, kept if way == "text" else tokens, batch, way == "text")
            made.warm_up()
            settings[keep, way] = made
        except ANY_MISTAKE as error:
            report.put(row_of(attention, tokens, batch, keep, way), failed=reason(error))
        clear(model.device.type)
    start = time.monotonic()
    for done in range(ROUNDS[1]):
        late = report.left < 0 or time.monotonic() - start > SECONDS
        if (late and done >= ROUNDS[0]) or (report.left < 0 and done):
            break
        for (keep, way), prompts in list(settings.items()):
            try:
                prompts.round()
            except ANY_MISTAKE as error:  # memory is in pieces by now
                report.put(row_of(attention, tokens, batch, keep, way), failed=reason(error))
                del settings[keep, way]
                clear(model.device.type)
        for (keep, way), prompts in settings.items():
            faster = {}
            if way != "text" and (keep, "text") in settings:  # round by round: both see the same machine
                text = settings[keep, "text"].prefill
                faster = {"of_text": quartiles([a / b for a, b in zip(text, prompts.prefill, strict=True)])}
            report.put(row_of(attention, tokens, batch, keep, way), **prompts.measured(), **faster)


def codebook_of(model: LlavaForConditionalGeneration) -> RedundancyCodebook:
    """The method that prunes, with random prototypes."""
    return RedundancyCodebook(Codebook(torch.randn(PROTOTYPES, model.config.text_config.hidden_size)))


def contexts(report: Report, model: LlavaForConditionalGeneration) -> None:
    """Time to open and leave a context, which `compare` does not count."""
    schedule = Schedule([Stage(0, 0.5, codebook_of(model))])

    def opened() -> None:
        with ExitStack() as stack:
            stack.enter_context(schedule(model))

    times = [clocked(opened, model.device.type)[0] for _ in range(9)]
    report.put({"part": "context"}, seconds=quartiles(times[2:]))


def tower(report: Report, model: LlavaForConditionalGeneration) -> None:
    """Time of the vision tower and the projector for one image and for five."""
    for count in 1, 5:
        images = torch.randn(count, 3, 336, 336, device=model.device, dtype=model.dtype)
        times = [
            clocked(lambda images=images: model.get_image_features(pixel_values=images), model.device.type)[0]
            for _ in range(9)
        ]
        report.put({"part": "tower", "images": count}, seconds=quartiles(times[2:]))


def row_of(attention: str, tokens: int, batch: int, keep: float, way: str) -> dict[str, Any]:
    return {"part": "llava", "attention": attention, "tokens": tokens, "batch": batch, "keep": keep, "way": way}


def reason(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "does not fit in the memory"
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else ''}"


def clear(device: str) -> None:
    """Give back what an error's traceback, or a setting that is through, has held."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def lines(rows: list[dict[str, Any]], others: list[dict[str, Any]]) -> Iterator[str]:
    """The table, in milliseconds; rows that have no text timed beside them are compared with that of `others`."""
    yield (f"{'attention':<15}{'tokens':>6}{'batch':>6} {'keep':<6}{'way':<15}{'prefill ms':<24}{'host':>8}"
           f"{'of text':>9}  {'decode ms':<22}{'KV MiB':>9}{'peak GiB':>9}")  # fmt: skip
    for row in rows:
        head = f"{row['attention']:<15}{row['tokens']:>6}{row['batch']:>6} {row['keep']:<6}{row['way']:<15}"
        if "failed" in row:
            yield head + row["failed"]
            continue
        ratio = f"{row['of_text']['median']:.3f}" if "of_text" in row else _of_text(row, others)
        yield (head + f"{ms(row['prefill']):<24}{row['prefill_host']['median'] * 1e3:>8.1f}{ratio:>9}  "
               f"{ms(row['decode']):<22}{row['kv_bytes'] / 2**20:>9.1f}{row['peak_bytes'] / 2**30:>9.2f}")  # fmt: skip


def _of_text(row: dict[str, Any], others: list[dict[str, Any]]) -> str:
    """Speed of the prefill as a part of the text's in another process, by medians: marked as less exact."""
    same = {name: row[name] for name in ("tokens", "batch", "keep")} | {"way": "text"}
    text = next((x for x in others if same.items() <= x.items() and "prefill" in x), None)
    return (
        "" if text is None or row["way"] == "text" else f"~{text['prefill']['median'] / row['prefill']['median']:.3f}"
    )


def ms(row: dict[str, Any]) -> str:
    """Milliseconds: first quartile, median, third quartile."""
    return " ".join("-" if row[name] is None else f"{row[name] * 1e3:.2f}" for name in ("q1", "median", "q3"))
