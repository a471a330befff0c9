"""Attacks on the library's own mechanism, and what they prove.

`audit` re-runs the release on neighbouring data sets many times and bounds its privacy from below, assuming nothing
about the noise; `inspect` runs every check of `checks` on a pipeline; `mutants` are broken pipelines that the checks
must catch; `attacks` and `inversion` are what a thief of adapters, samples or sums would try.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from hyperdp_lib import accounting
from hyperdp_lib.auditing import bounds, checks
from hyperdp_lib.auditing.checks import Finding
from hyperdp_lib.auditing.pipeline import INTACT, Pipeline
from hyperdp_lib.progress import progress_bar


@dataclass(frozen=True)
class Audit:
    """What a release claims, and what re-running it proves.

    Attributes
    ----------
    epsilon, delta, mu : float
        As certified.
    mu_lower_bound : float
        With probability ``confidence`` the mechanism is not mu'-GDP for any mu' below this. Above ``mu``: it is broken.
    epsilon_lower_bound : float
        The same for (epsilon, delta); far below ``epsilon`` for small delta, whatever the mechanism (see `bounds`).
    trials : int
        Runs on each of the two neighbouring data sets.
    counts : Counts
        Of the attack that bounds mu.
    """

    epsilon: float
    delta: float
    mu: float
    mu_lower_bound: float
    epsilon_lower_bound: float
    confidence: float
    trials: int
    neighboring_relation: str
    counts: bounds.Counts

    @property
    def passed(self) -> bool:
        """Whether the attack stayed within the claim."""
        return self.mu_lower_bound <= self.mu and self.epsilon_lower_bound <= self.epsilon

    def to_plain(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "passed": self.passed}


def audit(
    epsilon: float,
    *,
    delta: float = 1e-5,
    trials: int = 200_000,
    neighboring_relation: str = "add_or_remove_one",
    dimension: int = 2,
    confidence: float = 0.99,
    pipeline: Pipeline = INTACT,
    workers: int | None = None,
) -> Audit:
    """Attack the release on two neighbouring data sets, ``trials`` times each.

    Parameters
    ----------
    trials : int
        A tenth more are run to choose the thresholds.
    dimension : int
        Of the embedding. The example that differs moves the sum along one direction, the noise on all others is
        independent of it (`checks.noise_independence`), so few dimensions attack as well as many, and faster.
    confidence : float
        Of each lower bound by itself.
    workers : int, optional
        Threads that draw noise; default: one for each core.

    Examples
    --------
    >>> result = audit(1.0, trials=2000)
    >>> result.passed, 0 <= result.mu_lower_bound <= result.mu
    (True, True)
    """
    config = pipeline.config(epsilon, delta=delta, dimension=dimension, neighboring_relation=neighboring_relation)
    workers = workers or os.cpu_count() or 1
    without, having = checks.attack_scores(pipeline, config, trials + trials // 10, workers=workers)
    some = trials // 10
    for_mu = bounds.best_threshold(without[:some], having[:some])
    for_epsilon = bounds.best_threshold(without[:some], having[:some], delta)
    counts = bounds.count(without[some:], having[some:], for_mu)
    tail = bounds.count(without[some:], having[some:], for_epsilon)
    return Audit(
        epsilon,
        delta,
        1 / accounting.noise_multiplier(epsilon, delta),
        bounds.mu_lower_bound(counts, confidence),
        bounds.epsilon_lower_bound(tail, delta, confidence),
        confidence,
        trials,
        neighboring_relation,
        counts,
    )


def inspect(pipeline: Pipeline = INTACT) -> dict[str, Finding]:
    """Every check of `checks.CHECKS` on a pipeline; one that raises an error is broken, too."""
    found = {}
    for name, check in checks.CHECKS.items():
        try:
            found[name] = check(pipeline)
        except (ArithmeticError, ValueError) as error:
            found[name] = Finding(True, f"{type(error).__name__}: {error}")
    return found


def inspect_all(*, progress: bool = False) -> Mapping[str, list[str]]:
    """The names of the checks that fail: of the intact pipeline first (none, if all is well), then of every mutant."""
    from hyperdp_lib.auditing.mutants import MUTANTS

    pipelines = {"intact": INTACT, **MUTANTS}
    return {
        name: [check for check, finding in inspect(pipeline).items() if finding.broken]
        for name, pipeline in progress_bar(pipelines.items(), desc="inspect", show=progress)
    }
