"""Who wins at each budget and number of private images, and where DP-SGD overtakes: records -> cells of a map.

All scores are research metrics: they are computed on private data and are not differentially private.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from hyperdp_lib.pages.report import METHOD_LABELS, budget, contrast, order, score_name, value
from hyperdp_lib.pages.theory_verdicts import crossing

# no private method that makes images: they take no part
CONTROLS = ("noisy_class_means", "public_only", "lora_non_private", "real")
# noise at every step, on trained parameters: not in our few dimensions, nor after our sum
DP_SGD = ("dp_lora", "dp_ldm", "dp_layer_search")
BEST_DP_SGD = "the best of DP-SGD LoRA, DP-LDM and layer search"


@dataclass(frozen=True)
class Cell:
    """Who wins for one private set, number of private images and budget.

    Attributes
    ----------
    winner : str
        Method with the best mean.
    score : str
        Its mean ± standard deviation, as text.
    contestants : tuple of str
        All methods on record there, the winner included; at least two.
    level : tuple of str
        Those that seeds do not tell apart from the winner, by two standard errors or because there is only one.
    """

    pair: str
    num_private: int
    epsilon: float
    winner: str
    score: str
    contestants: tuple[str, ...]
    level: tuple[str, ...]

    @property
    def contested(self) -> bool:
        """Whether a rival takes part, and not only variants of ours and retrieval."""
        return any(not is_ours(one) and one != "nearest_public" for one in self.contestants)


@dataclass(frozen=True)
class Crossover:
    """From which budget on the best method of `DP_SGD` has the better mean, for one private set and number of images.

    Attributes
    ----------
    epsilon : float
        Interpolated between the budgets on record; infinity if ours is ahead at the last of them, 0 if at none.
    budgets : tuple of float
        Those at which both sides are on record.
    few : bool
        Whether some of these means are of a single seed.
    """

    pair: str
    num_private: int
    epsilon: float
    budgets: tuple[float, ...]
    few: bool


def pair_name(pair: str) -> str:
    """A pair of public and private data for the reader.

    >>> pair_name("glyphs-digits-3-no-lookalikes"), pair_name("drawings-mnist")
    ('digits-3 (public: glyphs)', 'mnist (public: drawings)')
    """
    public, _, private = pair.removesuffix("-no-lookalikes").partition("-")
    return f"{private} (public: {public})" if private else public


def is_ours(method: str) -> bool:
    """Whether it is DP-DeepSets or a variant of it."""
    return method == "hyperdp" or method.startswith("dp_deepsets")


def contests(scores: pd.DataFrame, score: str) -> list[Cell]:
    """Each place (pair, number of private images, finite budget) at which at least two private methods are on record.

    Parameters
    ----------
    scores
        From `records.load_records`.
    score
        `"frechet_distance"`, where less is better, or `"accuracy"`.
    """
    column, sign = f"scores.{score}", _sign(score)
    cells = []
    for (pair, size, epsilon), place in _private(scores, score).groupby(["pair", "num_private", "epsilon"]):
        values = {method: place[place["method"] == method][column] for method in order(set(place["method"]))}
        if len(values) < 2:
            continue
        winner = max(values, key=lambda method: sign * values[method].mean())
        rest = [method for method in values if method != winner]
        level = [one for one in rest if contrast((sign, values[winner]), (-sign, values[one])) != 1]
        shown = value(place[place["method"] == winner], score)
        cells.append(Cell(pair, int(size), float(epsilon), winner, shown, tuple(values), tuple(level)))
    return cells


def crossovers(
    scores: pd.DataFrame, score: str, ours: str = "dp_deepsets", rivals: Sequence[str] = DP_SGD
) -> list[Crossover]:
    """Where the best of the rivals overtakes ours, for each pair and number of private images with both on record.

    Means only, log-linear between budgets; of accuracies, the errors 1 - accuracy are compared.
    """
    found = []
    for (pair, size), rows in _private(scores, score).groupby(["pair", "num_private"]):
        budgets, mine, theirs, few = [], [], [], False
        for epsilon, place in rows.groupby("epsilon"):
            cost = _cost(place, score)
            means = cost.groupby(place["method"]).mean()
            best = [means[rival] for rival in rivals if rival in means.index]
            if ours in means.index and best:
                budgets.append(float(epsilon))
                mine.append(float(means[ours]))
                theirs.append(float(min(best)))
                compared = place[place["method"].isin((ours, *rivals))]
                few |= bool((compared.groupby("method").size() < 2).any())
        if budgets:
            found.append(Crossover(pair, int(size), crossing(budgets, mine, theirs), tuple(budgets), few))
    return found


def crossover_sentences(found: Sequence[Crossover], score: str, ours: str = "dp_deepsets") -> str:
    """One line for each private set and number of images, as a Markdown list."""
    label = METHOD_LABELS.get(ours, ours)
    lines = []
    for one in found:
        at = ", ".join(map(budget, one.budgets))
        if math.isinf(one.epsilon):
            said = f"{label} is ahead of {BEST_DP_SGD} at the largest budget on record for both"
        elif one.epsilon == 0:
            said = f"{BEST_DP_SGD} is ahead of {label} at every budget on record for both"
        else:
            said = f"{BEST_DP_SGD} is ahead of {label} from about ε = {one.epsilon:.2g} on; on record for both"
        seeds = ", some with one seed" if one.few else ""
        place = f"{pair_name(one.pair)}, n = {one.num_private:,}, {score_name(score)}"
        lines.append(f"- {place}: {said} (ε = {at}{seeds}).")
    return "\n".join(lines) or "*No budget at which both sides are on record.*"


def _private(scores: pd.DataFrame, score: str) -> pd.DataFrame:
    """Rows of private methods that have the score, at finite budgets."""
    column = f"scores.{score}"
    if scores.empty or column not in scores.columns:
        return scores.iloc[:0].reindex(columns=["pair", "num_private", "epsilon", "method", column])
    inside = (scores["epsilon"] > 0) & (scores["epsilon"] < math.inf) & scores[column].notna()
    chosen = scores[inside & ~scores["method"].isin(CONTROLS)]
    return chosen.assign(**{column: chosen[column].astype(float)})


def _cost(place: pd.DataFrame, score: str) -> pd.Series:
    """Less is better, above 0."""
    values = place[f"scores.{score}"]
    return (values if score == "frechet_distance" else 1 - values).clip(lower=1e-6)


def _sign(score: str) -> int:
    return -1 if score == "frechet_distance" else 1
