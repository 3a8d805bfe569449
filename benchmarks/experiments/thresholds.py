"""How the miniature's thresholds were chosen: on training scenes and training questions only.

    python -m benchmarks.experiments.thresholds --images 60 --questions 30 [--model runs/miniature/weights]

The scenes' tokens are probed once; then each pair of thresholds makes a codebook of those probes, and each codebook
prunes the same training questions. Prints the distribution of the probes and a row for each pair.
"""

import argparse
import itertools
import statistics
from collections import Counter
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from PIL import Image

from codebook import Codebook, RedundancyCodebook, Schedule, Stage, load
from codebook.building import preset
from codebook.building.cascade import survivors
from codebook.building.clustering import dpc_knn
from codebook.building.pool import recurrent
from codebook.building.probes import Prober
from codebook.cli.output import progress
from codebook.evaluation import compare, mean_text
from codebook.miniature.samples import of_miniature
from codebook.miniature.scenes import scene
from codebook.models import family

TAU_P = (0.4, 0.6, 0.8, 1.0)
TAU_J = (0.03, 0.1, 0.3, 1.0)
KEEPS = (0.25, 0.11)
SEED = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=60)
    parser.add_argument("--questions", type=int, default=30, help="a family; 0: probes only")
    parser.add_argument("--model", default="miniature", help="or the weights of another run of its training")
    options = parser.parse_args()
    model, processor = load(options.model)
    kind, settings = family(model), preset("miniature")
    loose = replace(settings, tau_p=1.0, tau_j=1e9, max_cluster_size=10**9)
    prober = Prober.of(model, processor, settings.prompt, kind.grid(model), 16)
    cols = kind.grid(model)[1]
    images = []
    with progress("probe", options.images, "images") as tick:
        for i in range(options.images):
            picture = scene("train", 2, SEED, i)
            pixels = processor.image_processor(images=Image.fromarray(picture.pixels), return_tensors="pt")
            found = survivors(pixels["pixel_values"], model, kind, prober, loose)
            shown = {p for item in [*picture.things, picture.number] if item is not None for p in item.patches}
            labels = dpc_knn(found.features, settings.clusters_per_image, settings.neighbours, settings.seed)
            sizes = labels.bincount()[labels].tolist()
            for token, size in zip(found.tokens, sizes, strict=True):
                token |= {"image": i, "shown": token["row"] * cols + token["col"] in shown, "size": size}
                token["jsd"] = token["jsd_region"] + settings.global_weight * token["jsd_global"]
            images.append(found)
            tick(i + 1)
    tokens = [token for found in images for token in found.tokens]
    features = torch.cat([found.features for found in images])
    for shown in (True, False):
        own = [t for t in tokens if t["shown"] == shown]
        for value in ("p1", "jsd"):
            tenths = statistics.quantiles([t[value] for t in own], n=10)
            print(f"{'object' if shown else 'background':<11}{value:<4}", *(f"{x:.4f}" for x in tenths))

    described: dict[str, str] = {}
    plans: dict[str, Any] = {"unpruned": lambda asked: None}
    print("tau_p tau_j   tokens background isolated prototypes")
    for tau_p, tau_j in itertools.product(TAU_P, TAU_J):
        passed = [i for i, t in enumerate(tokens) if t["p1"] < tau_p and t["jsd"] < tau_j]
        isolated = [i for i in passed if tokens[i]["size"] <= settings.max_cluster_size]
        name = f"{tau_p:<5} {tau_j:<7}"
        kept: list[int] = []
        if isolated:
            labels = dpc_knn(features[isolated], settings.clusters, settings.neighbours, settings.seed).tolist()
            owners = [str(tokens[i]["image"]) for i in isolated]
            kept = [isolated[i] for i in recurrent(labels, owners, len(images), settings.min_image_fraction)]
        share = Counter(tokens[i]["shown"] for i in passed)[False] / max(len(passed), 1)
        described[name] = f"{name} {len(passed):<6} {share:<10.3f} {len(isolated):<8} {len(kept)}"
        print(described[name], flush=True)
        if kept:
            pruner = RedundancyCodebook(Codebook(features[kept]))
            for keep in KEEPS:
                plans[f"{name} {keep}"] = partial(_always, Schedule([Stage(0, keep, pruner)]))

    if not options.questions:
        return
    questions = of_miniature("train", SEED, options.questions)
    with progress("answer", len(questions) * len(plans), "answers") as tick:
        scores = compare(model, processor, questions, plans, done=tick)
    cells = {name: mean_text(found) for name, found in scores.items()}
    print(f"unpruned {cells['unpruned']} on {len(questions)} training questions; at keep", *KEEPS)
    for name, text in described.items():
        print(text, *(cells.get(f"{name} {keep}", "-") for keep in KEEPS))


def _always(schedule: Schedule, asked: Any) -> Schedule:
    return schedule


if __name__ == "__main__":
    main()
