"""One stage of each method on tiny LLaVAs, their models, and a batch to prune."""

import torch

from codebook import Codebook
from codebook.pruning import METHODS, Pruner, Schedule, Stage
from tests.prompts import prompt
from tests.tiny import SIDE, llava

KEEP = 9
ROWS = [["image", 7, 8, 9, 10], [5, 6, 11, "image", 12, "image", 13, 4]]
SINGLE = [name for name, method in METHODS.items() if not method.joint]
"""The methods that choose of each image for itself; tests/pruning/test_frames.py has the others."""
TOWERS, ATTENTIONS = ("clip", "siglip"), ("sdpa", "eager")
MODELS = {(tower, attention): llava(attention, tower=tower) for tower in TOWERS for attention in ATTENTIONS}
BATCH = prompt(MODELS["clip", "sdpa"], ROWS)


def features(tower, pixels):
    with torch.no_grad():
        out = MODELS[tower, "sdpa"].get_image_features(pixel_values=pixels, return_dict=True)
    return torch.cat(list(out.pooler_output))


def schedule(name: str, tower: str) -> Schedule:
    """One stage of a method: nine tokens, or as many as it likes, from layer 2 on where it cannot stand before."""
    settings = {}
    if METHODS[name].needs_codebook:
        pixels = torch.rand(2, 3, 4 * SIDE, 4 * SIDE, generator=torch.Generator().manual_seed(9))
        settings["codebook"] = Codebook(features(tower, pixels)[::5].contiguous())
    if name == "codebook-threshold":  # half-way between two of the tokens' scores, lest rounding decides
        scores = settings["codebook"].redundancy(features(tower, BATCH["pixel_values"])).sort().values
        settings["threshold"] = float(scores[40:42].mean())
    pruner: Pruner = METHODS[name](**settings)
    layer = 2 if pruner.uses_attention or pruner.uses_change or name == "drop" else 0
    return Schedule([Stage(layer, None if pruner.adaptive else 0 if name == "drop" else KEEP, pruner)])
