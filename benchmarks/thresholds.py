"""How the miniature's thresholds were chosen: on training scenes and training questions only.

    python benchmarks/thresholds.py --images 60 --questions 30

The scenes' tokens are probed once; then each pair of thresholds makes a codebook of those probes, and the codebook
prunes training questions. Prints the distribution of the probes and a row for each pair.
"""

import argparse
import itertools
import statistics
from collections import Counter
from dataclasses import replace

import torch
from PIL import Image

from codebook import Codebook, RedundancyCodebook, Schedule, Stage, load, miniature
from codebook.building import preset
from codebook.building.cascade import survivors
from codebook.building.clustering import dpc_knn
from codebook.building.pool import recurrent
from codebook.building.probes import Prober
from codebook.evaluation import mean, score, standard_error
from codebook.miniature.scenes import scene
from codebook.models import family
from codebook.progress import progress

TAU_P = (0.4, 0.5, 0.6, 0.7, 0.8, 1.0)
TAU_J = (0.003, 0.01, 0.03, 0.1)
KEEPS = (0.25, 0.11)
SEED = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=60)
    parser.add_argument("--questions", type=int, default=30, help="a family")
    options = parser.parse_args()
    model, processor = load("miniature")
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

    questions = [q for f in miniature.FAMILIES for q in miniature.tasks(f, "train", SEED, options.questions)]
    full = score(model, processor, questions)
    print(f"unpruned {mean(full):.3f} ({standard_error(full):.3f}) on {len(questions)} training questions")
    print("tau_p tau_j   tokens background isolated prototypes", *(f"at keep {k}" for k in KEEPS))
    for tau_p, tau_j in itertools.product(TAU_P, TAU_J):
        passed = [i for i, t in enumerate(tokens) if t["p1"] < tau_p and t["jsd"] < tau_j]
        isolated = [i for i in passed if tokens[i]["size"] <= settings.max_cluster_size]
        row = f"{tau_p:<5} {tau_j:<7} {len(passed):<6}"
        if not isolated:
            print(row, "nothing left")
            continue
        labels = dpc_knn(features[isolated], settings.clusters, settings.neighbours, settings.seed).tolist()
        owners = [str(tokens[i]["image"]) for i in isolated]
        kept = [isolated[i] for i in recurrent(labels, owners, len(images), settings.min_image_fraction)]
        share = Counter(tokens[i]["shown"] for i in passed)[False] / len(passed)
        row += f" {share:<10.3f} {len(isolated):<8} {len(kept):<10}"
        if not kept:
            print(row, "nothing left")
            continue
        pruner = RedundancyCodebook(Codebook(features[kept]))
        for keep in KEEPS:
            scores = score(model, processor, questions, Schedule([Stage(0, keep, pruner)]))
            row += f" {mean(scores):.3f} ({standard_error(scores):.3f})"
        print(row, flush=True)


if __name__ == "__main__":
    main()
