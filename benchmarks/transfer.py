"""Which encoder tells classes apart under noise, on tasks like the public ones and on drawings unlike them?

    HYPERDP_DATA=data python benchmarks/transfer.py    # writes book/results/benchmarks/transfer.json

Ten classes of a set, a dozen or 140 images of each, one noisy sum for each class at epsilon = 1; test images go to the
class with the nearest posterior mean (`hyperdp_lib.prior`, with the prior of the public glyphs). No image is drawn,
so this is what a sum *says*, before any hypernetwork hears it. Mean accuracy over draws of classes and noise, for the
plain encoder and for nested coordinates. Glyphs are held-out public tasks; Kuzushiji-Kanji, Quick, Draw! and Omniglot
are public drawings; the digits play the private part elsewhere and are a research metric.
"""

from __future__ import annotations

import argparse
import json
import statistics
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

from hyperdp_lib import data, embedding
from hyperdp_lib.baselines import controls
from hyperdp_lib.data import ImageSet
from hyperdp_lib.nested import COORDINATES
from hyperdp_lib.pretrained import load_pretrained
from hyperdp_lib.prior import Prior, posterior
from hyperdp_lib.progress import progress_bar
from hyperdp_lib.public.glyphs import GlyphTasks
from hyperdp_lib.records import provenance, require_commit, write_atomically

OUT = Path(__file__).resolve().parents[1] / "book" / "results" / "benchmarks" / "transfer.json"
SETS = {"glyphs": (12, 140), "kkanji": (12, 140), "quickdraw": (12, 140), "omniglot": (12,), "digits": (12, 140)}
CLASSES, TESTS = 10, 40


def draw(source: ImageSet | GlyphTasks, size: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and labels of ten random classes, ``size`` of each, and up to 40 others of each to test on."""
    g = torch.Generator().manual_seed(seed)
    if isinstance(source, GlyphTasks):
        parts = [(one[:size], one[size:]) for one in source.sample_tasks(CLASSES, size + TESTS, g)]
    else:
        assert source.labels is not None
        parts = []
        for label in torch.randperm(len(source.class_names or ()), generator=g)[:CLASSES]:
            mine = torch.nonzero(source.labels == label)[:, 0]
            mine = mine[torch.randperm(len(mine), generator=g)]
            parts.append((source.images[mine[:size]], source.images[mine[size : size + TESTS]]))
    labels = [torch.cat([torch.full((len(p[i]),), c) for c, p in enumerate(parts)]) for i in (0, 1)]
    return torch.cat([a for a, _ in parts]), labels[0], torch.cat([b for _, b in parts]), labels[1]


def accuracy(encoder, prior: Prior, drawn: tuple[Tensor, ...], epsilon: float, seed: int) -> float:
    """Of classifying by the nearest posterior mean of noisy class sums."""
    images, labels, tests, truth = drawn
    constant = encoder.config.count_coordinate
    sums, noise_std = controls.noisy_class_sums(
        images, labels, encoder, epsilon=epsilon, num_classes=CLASSES, seed=seed
    )
    means, _ = posterior(sums, noise_std, prior, constant)
    codes = embedding.embed(encoder, tests)[:, 1:].double()
    return float((torch.cdist(codes, means).argmin(1) == truth).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=12, help="draws of classes and noise; default: 12")
    parser.add_argument("--epsilon", type=float, default=1.0)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    require_commit(options.out)
    started = datetime.now(UTC)
    nested = load_pretrained("glyphs-nested")[1]
    encoders = {"plain": load_pretrained("glyphs")[1].encoder}
    encoders |= {f"nested {k}": nested.using(k).encoder for k in COORDINATES}
    typical = GlyphTasks(progress=False).sample_tasks(1500, 12, torch.Generator().manual_seed(0))
    priors = {name: Prior.fit(encoder, typical) for name, encoder in encoders.items()}
    held_out = GlyphTasks(split="held_out", progress=False)
    sources = {name: held_out if name == "glyphs" else data.load_named_or_path(name, 16, 1) for name in SETS}
    rows = []
    for name, sizes in progress_bar(SETS.items(), desc="transfer"):
        for size in sizes:
            found: dict[str, list[float]] = {encoder: [] for encoder in encoders}
            for seed in range(options.repetitions):
                drawn = draw(sources[name], size, seed)
                for which, encoder in encoders.items():
                    found[which].append(accuracy(encoder, priors[which], drawn, options.epsilon, seed))
            for which, values in found.items():
                mean, spread = statistics.fmean(values), statistics.stdev(values)
                rows.append({"set": name, "images": size, "encoder": which, "accuracy": round(mean, 4),
                             "standard_deviation": round(spread, 4)})  # fmt: skip
    content = {"epsilon": options.epsilon, "delta": 1e-5, "neighboring_relation": "add_or_remove_one",
               "classes": CLASSES, "repetitions": options.repetitions, "label": "research metric, not DP", "rows": rows,
               "provenance": provenance("python benchmarks/transfer.py", "cpu", started)}  # fmt: skip
    write_atomically(options.out, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
