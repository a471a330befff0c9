"""A dozen labelled images a class at epsilon = 1: what would a cleverer release of the class means buy?

    HYPERDP_DATA=data python benchmarks/few_labels.py    # writes book/results/benchmarks/few_labels.json, two minutes

Ten classes of a set, twelve images of each. A test image goes to the class with the nearest estimated mean, so this is
what a release *says*, before any hypernetwork hears it. Compared, all at the same budget:

* ``as released``: class sums of nested coordinates with a noisy count, posterior means (`hyperdp_lib.posterior`);
* ``declared size``: no count is released; the sum is divided by the declared, public size;
* ``learned shrinkage``: besides, classes are drawn together as far as their own spread says that they are noise;
* ``pooled mean first``: a share of the budget buys the mean of all images, which is exact, as ten times as many stand
  behind it; the rest buys class sums of *offsets* from it, scaled to the whole ball. The two Gaussian releases compose
  exactly: mu^2 = mu_1^2 + mu_2^2 (Dong, Roth & Su 2022);
* two bounds, NOT PRIVATE: the pooled mean for nothing; the pooled mean and the directions in which the private images
  differ for nothing. No release of this kind can do better than these.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transfer import CLASSES, accuracy, draw

from hyperdp_lib import data, embedding
from hyperdp_lib.baselines import controls
from hyperdp_lib.glyphs import GlyphTasks
from hyperdp_lib.hypernetwork import load_pretrained
from hyperdp_lib.posterior import Prior
from hyperdp_lib.progress import progress_bar
from hyperdp_lib.records import provenance, require_commit, write_atomically

OUT = Path(__file__).resolve().parents[1] / "book" / "results" / "benchmarks" / "few_labels.json"
SETS = ("glyphs", "kkanji", "quickdraw", "omniglot", "digits")
SIZE, EPSILON, COORDINATES = 12, 1.0, 8


@dataclass(frozen=True)
class Scheme:
    """How class means are released and read.

    Attributes
    ----------
    text : str
    share : float
        Of mu^2, spent on the pooled mean.
    shrink : bool
        Whether classes are drawn to their common mean.
    given_mean, given_directions : bool
        Known for nothing: bounds, not private.
    """

    text: str
    share: float = 0.0
    shrink: bool = False
    given_mean: bool = False
    given_directions: bool = False


SCHEMES = (
    Scheme("declared size"),
    Scheme("learned shrinkage", shrink=True),
    *(Scheme(f"pooled mean first, share {share:g}", share, shrink=True) for share in (0.05, 0.1, 0.2)),
    Scheme("NOT PRIVATE: pooled mean given", shrink=True, given_mean=True),
    Scheme("NOT PRIVATE: pooled mean and directions given", shrink=True, given_mean=True, given_directions=True),
)


def estimated(
    scheme: Scheme, codes: Tensor, labels: Tensor, radius: float, noise_std: float, g: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Class means (K, k) as directions about an origin (D,), in an orthonormal basis (D, k), of codes (N, D).

    ``noise_std`` is that of the whole budget at sensitivity one.
    """
    origin = torch.zeros(codes.shape[1], dtype=codes.dtype)
    basis = torch.eye(codes.shape[1], dtype=codes.dtype)[:, :COORDINATES]
    if scheme.given_mean:
        origin = codes.mean(0)
    elif scheme.share:
        clipped = codes * (radius / codes.norm(dim=1, keepdim=True)).clamp_max(1.0)
        noise = torch.randn(codes.shape[1], generator=g, dtype=codes.dtype)
        origin = (clipped.sum(0) + radius * noise_std / math.sqrt(scheme.share) * noise) / len(codes)
        origin = basis @ (basis.T @ origin)  # the other coordinates are not used, and would be noise
    if scheme.given_directions:
        values, vectors = torch.linalg.eigh(torch.cov(codes.T))
        basis = vectors[:, values.argsort(descending=True)[:COORDINATES]]
    offsets = F.normalize((codes - origin) @ basis, dim=1)
    spread = noise_std / math.sqrt(1 - scheme.share) / SIZE
    sums = torch.zeros(CLASSES, COORDINATES, dtype=codes.dtype).index_add_(0, labels, offsets)
    means = sums / SIZE + spread * torch.randn(sums.shape, generator=g, dtype=codes.dtype)
    if scheme.shrink:  # method of moments: what the classes differ by, beyond the noise
        signal = (means.var(0).mean() - spread**2).clamp_min(0.1 * spread**2)
        means = means.mean(0) + (means - means.mean(0)) * signal / (signal + spread**2)
    return means, origin, basis


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=30, help="draws of classes and noise; default: 30")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    require_commit(options.out)
    started = datetime.now(UTC)
    encoder = load_pretrained("glyphs-nested")[1].using(COORDINATES).encoder
    typical = GlyphTasks(progress=False).sample_tasks(1500, 12, torch.Generator().manual_seed(0))
    prior = Prior.fit(encoder, typical)
    noise_std = controls.noise_std(EPSILON)

    def codes(images: Tensor) -> Tensor:
        with torch.no_grad():
            parts = [encoder.everything(part)[:, 1:] for part in images.split(embedding.CHUNK)]
        return torch.cat(parts).double()

    radius = float(codes(typical.flatten(0, 1)).norm(dim=1).median())  # public
    held_out = GlyphTasks(split="held_out", progress=False)
    rows = []
    for name in progress_bar(SETS, desc="few labels"):
        source = held_out if name == "glyphs" else data.load_named_or_path(name, 16, 1)
        found: dict[str, list[float]] = {"as released": [], **{scheme.text: [] for scheme in SCHEMES}}
        for seed in range(options.repetitions):
            images, labels, tests, truth = drawn = draw(source, SIZE, seed)
            found["as released"].append(accuracy(encoder, prior, drawn, EPSILON, seed))
            private, asked = codes(images), codes(tests)
            for scheme in SCHEMES:
                g = torch.Generator().manual_seed(seed)
                means, origin, basis = estimated(scheme, private, labels, radius, noise_std, g)
                near = torch.cdist(F.normalize((asked - origin) @ basis, dim=1), means).argmin(1)
                found[scheme.text].append(float((near == truth).double().mean()))
        for text, values in found.items():
            error = statistics.stdev(values) / math.sqrt(len(values))
            rows.append({"set": name, "scheme": text, "accuracy": round(statistics.fmean(values), 4),
                         "standard_error": round(error, 4)})  # fmt: skip
    content = {
        "epsilon": EPSILON, "delta": 1e-5, "neighboring_relation": "add_or_remove_one", "classes": CLASSES,
        "images": SIZE, "coordinates": COORDINATES, "repetitions": options.repetitions,
        "label": "research metric, not DP", "rows": rows,
        "provenance": provenance("python benchmarks/few_labels.py", "cpu", started),
    }  # fmt: skip
    write_atomically(options.out, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
