"""What to expect of a release, before any private image is touched.

The release is rehearsed on public stand-ins: as many classes, images and as much noise, drawn afresh from held-out
public tasks (`tuning.rehearse`). The scores of R rehearsals forecast those of one more. If that one is
drawn like the rehearsals, its rank among all R + 1 is uniform, so the interval from the l-th smallest score to the
l-th largest covers it with probability exactly

    (R + 1 - 2 l) / (R + 1),

whatever the scores' distribution (Wilks 1941): nine rehearsals and l = 1 make 80 %. It is a promise about public
tasks. Private data that look like none of them, photographs for a hypernetwork of letters, may do better or far worse,
and no public rehearsal can tell.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hyperdp_lib.baselines.controls import PublicTasks
from hyperdp_lib.data import InputError
from hyperdp_lib.experiments import tuning
from hyperdp_lib.experiments.methods import METHODS, Bench
from hyperdp_lib.progress import progress_bar
from hyperdp_lib.public.glyphs import GlyphConfig

SCORES = ("frechet_distance", "accuracy", "precision", "recall")


@dataclass(frozen=True)
class Forecast:
    """Scores of the rehearsals, and what follows from them.

    Attributes
    ----------
    method : str
    epsilon : float
    num_private, num_classes : int
        Declared, public.
    coverage : float
        Probability with which an interval covers the score of one more public task.
    num_images : int
        Samples scored in each rehearsal.
    rehearsals : tuple of mapping
        The scores of each.
    about : str
        What public data the scores speak of, and that others will do worse.
    """

    method: str
    epsilon: float
    num_private: int
    num_classes: int
    coverage: float
    num_images: int
    rehearsals: tuple[Mapping[str, Any], ...]
    about: str = "on held-out public tasks; private images unlike these will do worse"

    def expected(self, score: str) -> float | None:
        """Mean over the rehearsals; None for a score that does not apply (accuracy with one class)."""
        values = self._values(score)
        return math.fsum(values) / len(values) if values else None

    def interval(self, score: str) -> tuple[float, float] | None:
        """Bounds of the prediction interval."""
        values = self._values(score)
        return prediction_interval(values, self.coverage) if values else None

    def summary(self) -> dict[str, Any]:
        """Everything as plain values: each score's expectation and interval."""
        told: dict[str, Any] = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name != "rehearsals"
        }
        told["num_rehearsals"] = len(self.rehearsals)
        for score in SCORES:
            bounds = self.interval(score)
            told[score] = None if bounds is None else {"expected": self.expected(score), "interval": list(bounds)}
        return told

    def _values(self, score: str) -> list[float]:
        if self.num_classes == 1 and score == "accuracy":
            return []
        return [float(rehearsal[score]) for rehearsal in self.rehearsals if rehearsal.get(score) is not None]


def num_rehearsals(coverage: float) -> int:
    """The fewest rehearsals that give an interval of this coverage.

    >>> num_rehearsals(0.8), num_rehearsals(0.9)
    (9, 19)
    """
    if not 0 < coverage < 1:
        raise InputError(f"coverage must lie strictly between 0 and 1, got {coverage:g}.")
    return math.ceil(2 / (1 - coverage) - 1 - 1e-9)


def prediction_interval(values: Sequence[float], coverage: float) -> tuple[float, float]:
    """Order statistics between which one more value lies with at least the probability ``coverage``.

    Raises
    ------
    InputError
        if there are too few values.

    Examples
    --------
    >>> prediction_interval([3.0, 1.0, 2.0, 9.0, 8.0, 7.0, 6.0, 5.0, 4.0], 0.8)
    (1.0, 9.0)
    """
    needed = num_rehearsals(coverage)
    if len(values) < needed:
        raise InputError(f"an interval of {coverage:.0%} needs {needed} rehearsals, there are {len(values)}.")
    rank = math.floor((len(values) + 1) * (1 - coverage) / 2 + 1e-9)  # as far inside as the coverage allows
    ordered = sorted(values)
    return ordered[rank - 1], ordered[-rank]


def forecast(
    num_private: int,
    epsilon: float,
    *,
    num_classes: int = 1,
    method: str = "hyperdp",
    coverage: float = 0.8,
    rehearsals: int | None = None,
    num_images: int = 400,
    delta: float = 1e-5,
    neighboring_relation: str = "add_or_remove_one",
    bench: Bench | None = None,
    tasks: PublicTasks | None = None,
    about: str | None = None,
    seed: int = 50_000,
    progress: bool = False,
) -> Forecast:
    """Rehearse a release on public stand-ins.

    Parameters
    ----------
    num_private, num_classes : int
        Declared, public: images in all, and classes they are shared by.
    epsilon, delta, neighboring_relation
        The budget, as in `hyperdp_lib.planning.plan`.
    method : str
        A method of `methods.METHODS`.
    coverage : float
        Of the intervals, in (0, 1).
    rehearsals : int, optional
        Default: the fewest that ``coverage`` needs. More make the interval less a matter of luck.
    num_images : int
        Samples to score in each; the Fréchet distance depends on it.
    bench, tasks : optional
        Models with their settings, and public tasks; default those that ship, held-out glyphs.
    about : str, optional
        What the tasks are, for the reader; default: held-out glyphs, or what ``tasks`` cannot say of themselves.
    seed : int
        Of the first rehearsal; the others count up.
    """
    needed = num_rehearsals(coverage)
    count = needed if rehearsals is None else rehearsals
    if count < needed:
        raise InputError(f"an interval of {coverage:.0%} needs {needed} rehearsals, not {count}.")
    if not 1 <= num_classes <= num_private:
        raise InputError(f"num_classes must lie in 1 .. {num_private} (num_private), got {num_classes}.")
    if not epsilon > 0:
        raise InputError(f"epsilon must be positive, got {epsilon:g}.")
    if method not in METHODS:
        raise InputError(f"unknown method {method!r}: choose from {', '.join(METHODS)}.")
    bench = tuning.public_bench() if bench is None else bench
    enough = 2 * bench.feature_network.dimension
    if num_images - num_images % num_classes < enough:
        raise InputError(
            f"scores in {bench.feature_network.dimension} features need {enough} samples or more, "
            f"as many of each class: num_images must be {-(-enough // num_classes) * num_classes} or more."
        )
    if tasks is None:
        tasks, about = tuning.held_out_tasks(), about or GlyphConfig.about
    bench = dataclasses.replace(
        bench,
        settings=dataclasses.replace(bench.settings, num_images=num_images),
        delta=delta,
        neighboring_relation=neighboring_relation,
    )
    scores = [
        tuning.rehearse(
            method, bench, tasks, epsilon=epsilon, num_private=num_private, num_classes=num_classes, seed=seed + turn
        )
        for turn in progress_bar(range(count), desc="rehearse", show=progress)
    ]
    of = "held-out public tasks" if about is None else about
    told = f"on {of}; private images unlike these will do worse"
    return Forecast(method, epsilon, num_private, num_classes, coverage, num_images, tuple(scores), told)
