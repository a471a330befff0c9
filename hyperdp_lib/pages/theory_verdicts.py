"""Who wins in the linear setting, by how much and until when: numbers into sentences that stay true when they change.

The functions take plain numbers, so a test can put them into any regime; `predicted_risks` collects the numbers.
Formulas are approximate to about ten per cent (see `agreement`): risks within ``TIE`` of each other are called equal.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from hyperdp_lib.data import InputError
from hyperdp_lib.theory import bounds, deepsets, rivals, subspace
from hyperdp_lib.theory.setting import Array, LinearSetting

TIE = 1.1
LABELS = {
    "dp_deepsets": "DP-DeepSets",
    "projected_dp_gd": "projected DP-GD",
    "hybrid": "hybrid",
    "dp_gd": "DP-GD",
    "noisy_statistics": "noisy statistics",
}
MEANINGS = {
    "dp_deepsets": "one noisy sum, best clip",
    "projected_dp_gd": "tuned DP-GD inside the public subspace",
    "hybrid": "one noisy sum as the start of DP-GD",
    "dp_gd": "tuned DP-GD in all d dimensions, no public data",
    "noisy_statistics": "noisy sufficient statistics with an oracle ridge, no public data",
}


def predicted_risks(
    setting: LinearSetting, num_private: ArrayLike, mu: ArrayLike, methods: Sequence[str] = tuple(LABELS)
) -> dict[str, Array]:
    """Risk by the formulas of the named private methods (keys of ``LABELS``), each of the broadcast shape.

    >>> risks = predicted_risks(LinearSetting(), 1000, 0.2681, methods=["dp_deepsets"])
    >>> float(risks["dp_deepsets"].round(4))
    0.0211
    """
    formulas = {
        "dp_deepsets": lambda *point: deepsets.risk(*point),
        "projected_dp_gd": lambda *point: rivals.projected_dp_gd(*point).risk,
        "hybrid": lambda *point: rivals.hybrid(*point).risk,
        "dp_gd": lambda *point: rivals.dp_gd(*point).risk,
        "noisy_statistics": lambda *point: rivals.noisy_statistics(*point),
    }
    return {method: np.asarray(formulas[method](setting, num_private, mu)) for method in methods}


def check_parameters(epsilon: float, delta: float, num_private: int) -> None:
    """Stop when the privacy budget cannot be drawn or means nothing.

    Raises
    ------
    InputError
        ``epsilon`` not above 0 and finite, fewer than 2 private examples, or ``delta`` outside (0, 1/n).

    >>> check_parameters(0.0, 1e-5, 1000)
    Traceback (most recent call last):
    ...
    hyperdp_lib.data.InputError: epsilon must be above 0 and finite, got 0.0
    """
    if not 0 < epsilon < math.inf:
        raise InputError(f"epsilon must be above 0 and finite, got {epsilon}")
    if num_private < 2:
        raise InputError(f"n, the number of private examples, must be at least 2, got {num_private}")
    if not 0 < delta < 1 / num_private:
        raise InputError(
            f"delta = {delta:g} must be above 0 and below 1/n = {1 / num_private:.2g}: a larger one would allow to "
            "publish one of the n records"
        )


def number(value: float) -> str:
    """Three significant digits, thousands with commas; two digits below 0.0001.

    >>> number(0.021134), number(9290.7), number(2e6), number(2.71e-5), number(float("inf"))
    ('0.0211', '9,290', '2,000,000', '2.7e-05', 'infinity')
    """
    if math.isinf(value):
        return "infinity"
    if abs(value) < 1e-4:
        return f"{value:.2g}"
    digits = 2 - math.floor(math.log10(abs(value)))
    return f"{round(value, digits):,.{max(0, digits)}f}"


def count(value: float) -> str:
    """A number of examples or tasks that only a formula knows: three significant digits, whole.

    >>> count(30.31), count(9084.5)
    ('30', '9,080')
    """
    return f"{float(f'{value:.3g}'):,.0f}" if math.isfinite(value) else "infinity"


def times(ratio: float) -> str:
    """A factor for prose: ``25``, ``3.4``, ``1.12``.

    >>> times(25.3), times(3.41), times(1.118), times(1234.0)
    ('25', '3.4', '1.12', '1,230')
    """
    if ratio >= 10:
        return number(ratio) if ratio >= 100 else f"{ratio:.0f}"
    return f"{ratio:.1f}" if ratio >= 2 else f"{ratio:.2f}"


def against(ours: float, rival: float, name: str) -> str:
    """How DP-DeepSets does against one rival: wins, loses, or too close to tell.

    >>> against(0.0211, 0.525, "tuned DP-GD")
    'wins against tuned DP-GD (0.525) by a factor of 25'
    """
    if rival > TIE * ours:
        return f"wins against {name} ({number(rival)}) by a factor of {times(rival / ours)}"
    if ours > TIE * rival:
        return f"loses to {name} ({number(rival)}) by a factor of {times(ours / rival)}"
    return f"is about equal to {name} ({number(rival)})"


def winner(risks: Mapping[str, float], trivial: float) -> str:
    """One sentence: whose risk is smallest, and who is within ``TIE`` of it.

    >>> winner({"dp_deepsets": 0.021, "dp_gd": 0.52}, trivial=1.0)
    'The smallest risk, 0.0210, is that of DP-DeepSets.'
    """
    best = min(risks, key=lambda method: risks[method])
    if risks[best] > trivial / TIE:
        return f"Nobody learns much: no risk is more than 10 % below {number(trivial)}, that of no private data."
    near = [_the(method) for method in risks if method != best and risks[method] <= TIE * risks[best]]
    tied = f"; {_listing(near)} within 10 % of it" if near else ""
    return f"The smallest risk, {number(risks[best])}, is that of {_the(best)}{tied}."


def crossing(sizes: ArrayLike, ours: ArrayLike, rival: ArrayLike) -> float:
    """The size above which the rival's risk stays below ours, log-linear between grid points; see `bounds.crossover`.

    Infinity if we are ahead at the last size, 0 if we never are.

    >>> round(crossing([10, 100, 1000], [0.1, 0.1, 0.1], [1.0, 0.2, 0.05]))
    316
    """
    x, lead = np.log(np.asarray(sizes, float)), np.log(np.asarray(rival, float) / np.asarray(ours, float))
    ahead = np.flatnonzero(lead > 1e-9)
    if not len(ahead):
        return 0.0
    last = int(ahead[-1])
    if last == len(x) - 1:
        return math.inf
    share = lead[last] / (lead[last] - lead[last + 1])
    return float(np.exp(x[last] + share * (x[last + 1] - x[last])))


def crossover_sentence(crossover: float, closed_form: float, num_private: int, floor: float, delta: float) -> str:
    """From which n on tuned DP-GD without public data is ahead, and on which side we are."""
    why = f", because it has no floor and DP-DeepSets cannot get below {number(floor)}" if floor else ""
    if math.isinf(crossover):
        return f"Tuned DP-GD does not catch up with DP-DeepSets below {bounds.MOST / 1e6:g} million private examples."
    if crossover == 0:
        return "Tuned DP-GD is at least as good as DP-DeepSets at every n."
    side = "below" if num_private < crossover else "above"
    closed = f" (closed form: {count(closed_form)})" if math.isfinite(closed_form) and closed_form > 0 else ""
    small = "" if crossover * delta < 1 else f" So many examples would also call for a δ smaller than {delta:g}."
    return (
        f"Tuned DP-GD is ahead for good from n* ≈ {count(crossover)}{closed} private examples on{why}; "
        f"the n = {num_private:,} of this chapter is {side} that.{small}"
    )


def certificate_sentence(setting: LinearSetting, num_private: int, mu: float) -> str:
    """Whether Theorem 3 proves a win here, and whether its corollary would for every n."""
    upper = float(deepsets.risk_bound(setting, num_private, mu))
    lower = float(bounds.lower_bound(setting, num_private, mu))
    if bool(bounds.certified(setting, num_private, mu)):
        given = "" if setting.subspace_error is not None else ", with η as predicted"
        first = (
            f"The certificate holds{given}: untuned DP-DeepSets has a risk of at most {number(upper)}, and no learner "
            f"without public data can get below {number(lower)}."
        )
    else:
        first = (
            f"There is no certificate here: the bound on untuned DP-DeepSets, {number(upper)}, is not below the "
            f"{number(lower)} that no learner without public data can undercut. Both are conservative, so this alone "
            "does not mean a loss."
        )
    if bool(bounds.corollary_holds(setting, mu)):
        return f"{first} By the corollary this is so for every n."
    ideal = dataclasses.replace(setting, subspace_error=0.0, off_subspace_energy=0.0)
    if setting.floor and bool(bounds.corollary_holds(ideal, mu)):
        return (
            f"{first} The corollary does not apply, as the floor {number(setting.floor)} is not 0; with an exactly "
            "known subspace and no misspecification it would, for every n."
        )
    return f"{first} The corollary fails even for an exactly known subspace: {_listing(_corollary_gaps(ideal, mu))}."


def half_risk_sentence(setting: LinearSetting, mu: float) -> str:
    """How many private examples each side needs to halve the risk of public data alone."""
    sizes = np.geomspace(2, 1e7, 34)
    target = setting.trivial_risk / 2
    need = {
        method: crossing(sizes, np.full(len(sizes), target), predicted_risks(setting, sizes, mu, [method])[method])
        for method in ("dp_deepsets", "dp_gd")
    }
    ours, theirs = need["dp_deepsets"], need["dp_gd"]
    if setting.floor >= target:
        return (
            f"DP-DeepSets cannot halve the risk of public data alone with any number of private examples: its floor is "
            f"{number(setting.floor)}."
        )
    if not (0 < ours < math.inf and 0 < theirs < math.inf):
        return "Halving the risk of public data alone takes fewer than 2 or more than 10 million private examples here."
    return (
        f"To halve the risk of public data alone, DP-DeepSets needs about {count(ours)} private examples and tuned "
        f"DP-GD {count(theirs)}, {times(theirs / ours)} times as many (d/k = {setting.d / setting.k:g})."
    )


def public_data_sentence(setting: LinearSetting) -> str:
    """Whether the public tasks are enough to learn the subspace at all."""
    if setting.subspace_error is not None:
        return f"The subspace is given, with error η = {number(setting.eta)}."
    need, have = subspace.threshold_tasks(setting), setting.num_public_tasks
    if need == 0:
        return "The subspace is the whole space: there is nothing for public tasks to teach."
    if have <= need:
        return (
            f"The {have:,} public tasks are at or below the threshold of {count(need)}: they teach nothing about the "
            "subspace, and every method that stays inside it is left with the risk of no private data at all."
        )
    return (
        f"Public tasks of {setting.examples_per_task} examples start to teach something at T ≈ {count(need)}; the "
        f"{have:,} at hand are {times(have / need)} times that and leave a subspace error of η = {number(setting.eta)}."
    )


def floor_sentence(setting: LinearSetting, risk: float) -> str:
    """How much of our risk no private example can remove."""
    if not setting.floor:
        return "There is no floor: the subspace is exact and nothing lies outside it."
    return (
        f"Of the risk {number(risk)} of DP-DeepSets, {setting.floor / risk:.0%} is floor, {number(setting.floor)}: "
        f"{number(setting.off_subspace_energy)} from misspecification and {number(setting.eta * setting.tau**2)} from "
        "the error of the public subspace."
    )


def one_shot_sentence(risks: Mapping[str, float], floor: float) -> str:
    """What one noisy sum costs against iterating in the same subspace: in all, and above the common floor."""
    ours, iterated = risks["dp_deepsets"], risks["projected_dp_gd"]
    above = (ours - floor) / max(iterated - floor, 1e-12)
    factors = times(max(ours / iterated, 1.0)), times(max(above, 1.0))
    shared = f"; above the floor that both share, {factors[1]} times as much" if floor else ""
    return (
        f"With the same public subspace, tuned DP-GD has {number(iterated)} and one noisy sum {number(ours)}, "
        f"{factors[0]} times as much{shared}."
    )


def hybrid_sentence(risks: Mapping[str, float]) -> str:
    """Whether spending part of the budget on each repairs the loss."""
    mixed, parts = risks["hybrid"], {LABELS[name]: risks[name] for name in ("dp_deepsets", "dp_gd")}
    shown = f"{number(mixed)}, against {_listing([f'{number(risk)} for {name}' for name, risk in parts.items()])}"
    best = min(parts.values())
    if best > TIE * mixed:
        return f"The hybrid beats both of its parts here: {shown}."
    if mixed > TIE * best:
        return f"The hybrid does not pay here: {shown}."
    return f"The hybrid is about equal to the better of its parts here: {shown}."


def advice(setting: LinearSetting, risks: Mapping[str, float]) -> str:
    """What to do at these parameters, for one who has the public tasks and the private examples."""
    need = subspace.threshold_tasks(setting)
    if setting.num_public_tasks <= need:
        best = "public_only" if risks["dp_gd"] > setting.trivial_risk / TIE else "dp_gd"
        then = "without them no private budget buys anything" if best == "public_only" else "until then use plain DP-GD"
        return f"Collect more public tasks first, several times the threshold of {count(need)}; {then}."
    ours, best = risks["dp_deepsets"], min(risks, key=lambda method: risks[method])
    if min(risks.values()) > setting.trivial_risk / TIE:
        return "Do not spend the budget: at this n and ε no method improves on public data alone by more than 10 %."
    if ours <= TIE * risks[best]:
        return "Take one noisy sum: nothing here is better by more than 10 %, and it needs no private iterations."
    name, factor = f"{MEANINGS[best]} ({LABELS[best]})", times(ours / risks[best])
    if risks["dp_gd"] > TIE * ours:
        return (
            f"One noisy sum is better than DP-GD from scratch, but {name} is better still, by a factor of {factor}. "
            "If private iterations are possible, use it; otherwise that factor is the price."
        )
    return (
        "There are so many private examples that one noisy sum is no better than DP-GD from scratch: "
        f"take {name}, whose risk is {factor} times smaller."
    )


def describe(setting: LinearSetting, omit: Sequence[str] = (), **more: str) -> str:
    """The parameters of a figure, for its caption, but for those that the figure varies.

    >>> describe(LinearSetting(), omit=["γ²"], n="1,000")
    'd = 200, k = 5, s = 0.5, T = 2000, m = 50, n = 1,000'
    """
    parts = {"d": setting.d, "k": setting.k, "s": f"{setting.noise_std:g}"}
    if setting.subspace_error is None:
        parts |= {"T": setting.num_public_tasks, "m": setting.examples_per_task}
    else:
        parts |= {"η": f"{setting.subspace_error:g}"}
    parts |= {"γ²": f"{setting.off_subspace_energy:g}", **more}
    return ", ".join(f"{name} = {value}" for name, value in parts.items() if name not in omit)


def _corollary_gaps(setting: LinearSetting, mu: float) -> list[str]:
    """Which conditions of the corollary fail."""
    d, k, s, sigma = setting.d, setting.k, setting.noise_std, setting.label_variance**0.5
    need = max(math.pi * (k + 2) * (sigma / s) ** 2, 4.65 * (k * (k + 2)) ** 0.5 * sigma / s) + 1
    gaps = [f"it needs μ ≤ 1/2 and μ = {mu:.2f}"] if mu > 0.5 else []
    return gaps + ([f"it needs d ≥ {math.ceil(need)} and d = {d}"] if d < need else [])


def _the(method: str) -> str:
    return f"the {LABELS[method]}" if method == "hybrid" else LABELS[method]


def _listing(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]
