"""Do the intervals of `hyperdp forecast` cover what they promise? Counted on many held-out public tasks.

    python benchmarks/forecast_coverage.py    # writes book/results/benchmarks/forecast_coverage.json

A rehearsal is a release, samples and their scores on a public stand-in nobody trained on. Hundreds of them, of
independent seeds, are told apart in three ways, for intervals from R rehearsals at epsilon = 1:

* **one more**: disjoint groups of R + 1, the last of each is the one to cover. A binomial count, with the exact
  interval of Clopper & Pearson (1934);
* **R more**: disjoint groups of 2 R, the second half of each is to be covered. The unit is the group, the interval
  Student's t over groups: as honest and, for as many rehearsals, narrower;
* **all splits**: the share over every choice of R rehearsals and one more. Without ties it is the promise itself,
  whatever the scores: it is no evidence for it, but tells what ties add.

The scores take few samples, and differ from those of a real forecast by that; the promise is about any score. The
last part forecasts with as many samples as the records of the book have, for the page that holds them against the
scores of private data, which nobody promised to cover. Needs ``HYPERDP_DATA``, for the public drawings; forty minutes
on one core.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from hyperdp_lib.experiments import forecast, tuning
from hyperdp_lib.progress import progress_bar
from hyperdp_lib.records import provenance, require_commit, write_atomically
from hyperdp_lib.scores import evaluation

OUT = Path(__file__).resolve().parents[1] / "book" / "results" / "benchmarks" / "forecast_coverage.json"
EPSILON = 1.0
SEED = 300_000  # of the first rehearsal; tuning and forecasts start elsewhere
INTERVALS = ((9, 0.8), (19, 0.8), (39, 0.8), (19, 0.9))  # rehearsals, and coverage promised
LEVEL = 0.95  # of the intervals about measured shares


@dataclass(frozen=True)
class Setting:
    """What is rehearsed: weights, method, number of classes, images in all; ``count`` rehearsals."""

    weights: str
    method: str
    classes: int
    images: int
    count: int


SETTINGS = (
    Setting("glyphs", "dp_deepsets", 1, 128, 720),
    Setting("glyphs", "dp_deepsets", 10, 1437, 252),
    Setting("glyphs", "hyperdp", 1, 128, 180),
)
# as the records of the book: what private data sets of these sizes are held against
FORECASTS = (
    Setting("glyphs", "dp_deepsets", 10, 1437, 9),
    Setting("glyphs", "dp_deepsets", 10, 128, 9),
    Setting("glyphs", "dp_deepsets", 1, 128, 9),
    Setting("glyphs", "hyperdp", 1, 128, 9),
    Setting("drawings", "dp_deepsets", 1, 128, 9),
)


def one_more(values: Sequence[float], count: int, coverage: float) -> tuple[int, int]:
    """How many disjoint groups of ``count + 1`` have their last value covered by the others, and how many there are."""
    groups = [values[start : start + count + 1] for start in range(0, len(values) - count, count + 1)]
    hits = 0
    for group in groups:
        low, high = forecast.prediction_interval(group[:count], coverage)
        hits += low <= group[count] <= high
    return hits, len(groups)


def many_more(values: Sequence[float], count: int, coverage: float) -> list[float]:
    """For each disjoint group of ``2 count``: the share of its second half that the first half's interval covers."""
    shares = []
    for start in range(0, len(values) - 2 * count + 1, 2 * count):
        low, high = forecast.prediction_interval(values[start : start + count], coverage)
        later = values[start + count : start + 2 * count]
        shares.append(sum(low <= value <= high for value in later) / count)
    return shares


def all_splits(values: Sequence[float], count: int, coverage: float) -> float:
    """The share covered over every choice of ``count`` values and one more, exactly.

    A value is missed below if fewer than l of the others that are drawn are no larger: a hypergeometric probability.

    >>> all_splits(range(50), 9, 0.8), all_splits([1.0] * 50, 9, 0.8)
    (0.8, 1.0)
    """
    rank = int(forecast.prediction_interval(range(1, count + 1), coverage)[0])
    array = np.asarray(values, float)
    others = len(array) - 1
    no_larger = (array[None] <= array[:, None]).sum(1) - 1
    no_smaller = (array[None] >= array[:, None]).sum(1) - 1
    missed = sum(stats.hypergeom.cdf(rank - 1, others, marked, count) for marked in (no_larger, no_smaller))
    return round(float(1 - np.mean(missed)), 6)


def binomial_interval(hits: int, trials: int) -> list[float]:
    """Clopper-Pearson."""
    found = stats.binomtest(hits, trials).proportion_ci(LEVEL, method="exact")
    return [round(float(bound), 4) for bound in (found.low, found.high)]


def mean_interval(shares: Sequence[float]) -> list[float]:
    """Student's t over two groups or more, cut to [0, 1]."""
    half = float(stats.sem(shares) * stats.t.ppf((1 + LEVEL) / 2, len(shares) - 1))
    mean = float(np.mean(shares))
    return [round(max(mean - half, 0.0), 4), round(min(mean + half, 1.0), 4)]


def measured(values: Sequence[float], count: int, coverage: float) -> dict[str, Any] | None:
    """All three counts of one score of one setting; None if there are too few values."""
    hits, groups = one_more(values, count, coverage)
    shares = many_more(values, count, coverage)
    if len(shares) < 2:
        return None
    tied = sum(times for times in Counter(values).values() if times > 1)
    return {
        "rehearsals": count, "promised": coverage,
        "groups": groups, "covered": hits, "covered_interval": binomial_interval(hits, groups),
        "forecasts": len(shares), "share": round(float(np.mean(shares)), 4), "share_interval": mean_interval(shares),
        "all_splits": round(all_splits(values, count, coverage), 4), "tied": round(tied / len(values), 4),
    }  # fmt: skip


def rehearsals(setting: Setting, num_images: int) -> list[dict[str, Any]]:
    """Scores of ``setting.count`` rehearsals, as `forecast.forecast` makes them."""
    bench = tuning.public_bench(setting.weights)
    bench = dataclasses.replace(bench, settings=dataclasses.replace(bench.settings, num_images=num_images))
    tasks = tuning.held_out_tasks(setting.weights)
    asked = {"epsilon": EPSILON, "num_private": setting.images, "num_classes": setting.classes}
    return [
        tuning.rehearse(setting.method, bench, tasks, seed=SEED + turn, **asked)
        for turn in progress_bar(range(setting.count), desc=f"{setting.method}, {setting.images} images")
    ]


def values_of(scores: Sequence[dict[str, Any]], setting: Setting) -> dict[str, list[float]]:
    """Score to values, in the order of the rehearsals; accuracy for several classes only."""
    names = [name for name in forecast.SCORES if name in scores[0] and (setting.classes > 1 or name != "accuracy")]
    return {name: [round(float(one[name]), 5) for one in scores] for name in names}


def rows_of(found: Sequence[tuple[Setting, dict[str, list[float]]]]) -> Iterable[dict[str, Any]]:
    """A row for each setting, score and interval. Settings share stand-ins, so their counts cannot be added up."""
    for setting, values in found:
        for score, mine in values.items():
            for count, coverage in INTERVALS:
                if told := measured(mine, count, coverage):
                    yield {**dataclasses.asdict(setting), "score": score, **told}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--share", type=float, default=1.0, help="of the rehearsals; default: 1")
    parser.add_argument("--num-images", type=int, default=130, help="samples of a rehearsal; default: 130")
    parser.add_argument("--forecast-images", type=int, default=2000, help="samples of a forecast; default: 2000")
    parser.add_argument("--settings", type=int, default=len(SETTINGS), help="how many; default: all")
    parser.add_argument("--forecasts", type=int, default=len(FORECASTS), help="how many; default: all")
    options = parser.parse_args()
    require_commit(options.out)
    started = datetime.now(UTC)
    found = []
    for setting in SETTINGS[: options.settings]:
        setting = dataclasses.replace(setting, count=round(options.share * setting.count))
        found.append((setting, values_of(rehearsals(setting, options.num_images), setting)))
    forecasts = []
    for setting in FORECASTS[: options.forecasts]:
        scores = tuple(rehearsals(setting, options.forecast_images))
        made = forecast.Forecast(
            setting.method, EPSILON, setting.images, setting.classes, 0.8, options.forecast_images, scores
        )
        forecasts.append({"weights": setting.weights, **made.summary()})
    content = {
        "epsilon": EPSILON, "delta": 1e-5, "neighboring_relation": "add_or_remove_one", "samples": options.num_images,
        "level": LEVEL, "label": evaluation.NOT_DP, "rows": list(rows_of(found)), "forecasts": forecasts,
        "values": [{**dataclasses.asdict(setting), "scores": values} for setting, values in found],
        "provenance": provenance("python benchmarks/forecast_coverage.py", "cpu", started),
    }  # fmt: skip
    write_atomically(options.out, json.dumps(content) + "\n")


if __name__ == "__main__":
    main()
