"""Tests of claims: records -> checks, one for each place at which both sides of a comparison are on record.

A place is a private data set with a number of images, at a budget. A check holds, fails, or is undecided, because the
difference is not beyond two standard errors (`report.contrast`) or there are too few seeds. Tests hold rules and no
results. All scores are research metrics: they are computed on private data and are not differentially private.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from hyperdp_lib.pages.report import METHOD_LABELS, budget, contrast, order, value
from hyperdp_lib.pages.theory_verdicts import TIE, number
from hyperdp_lib.pages.winners import CONTROLS, DP_SGD, pair_name

HOLDS, FAILS, UNDECIDED = "holds", "fails", "undecided"
DISTANCE, ACCURACY = "frechet_distance", "accuracy"
PLENTY = 10_000  # private images from which on they are called plentiful
_ENOUGH = 10  # pairs of methods, none of them in opposite order, that speak against a disagreement of scores
Sources = frozenset[tuple[str, str, float]]  # name, command and seconds of the files used; seconds may be NaN


@dataclass(frozen=True)
class Check:
    """A claim at one place.

    Attributes
    ----------
    where : str
        Private data, number of images, budget.
    got : str
        What was compared, mean ± standard deviation over seeds.
    outcome : str
        `HOLDS`, `FAILS` or `UNDECIDED`.
    inside : bool
        Whether the place is in the regime for which the claim was made.
    num_private, num_images, seeds : frozenset of int
        Private images, images scored and seeds, as far as they apply.
    sources : Sources
        The records used.
    """

    where: str
    got: str
    outcome: str
    inside: bool = True
    num_private: frozenset[int] = frozenset()
    num_images: frozenset[int] = frozenset()
    seeds: frozenset[int] = frozenset()
    sources: Sources = frozenset()


@dataclass(frozen=True)
class Evidence:
    """What the tests read.

    Attributes
    ----------
    scores : pandas.DataFrame
        From `records.load_records`, of one delta and one neighbouring relation.
    folder : Path
        With the folders `theory` and `layers`.
    ours : str
        The variant of DP-DeepSets that stands for the method.
    epsilon : float
        The strict budget.
    """

    scores: pd.DataFrame
    folder: Path
    ours: str = "dp_deepsets"
    epsilon: float = 1.0

    @functools.cached_property
    def places(self) -> tuple[_Place, ...]:
        """The private data sets, each with a number of images."""
        if self.scores.empty:
            return ()
        return tuple(
            _Place(str(pair), int(size), dict(list(rows.groupby(["method", "epsilon"]))))
            for (pair, size), rows in self.scores.groupby(["pair", "num_private"])
        )


# ---- places on record ------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """All records of one private set, with one number of images."""

    pair: str
    num_private: int
    cells: Mapping[tuple[str, float], pd.DataFrame]

    @property
    def methods(self) -> list[str]:
        return order({method for method, _ in self.cells})

    def of(self, method: str, epsilon: float, score: str) -> pd.DataFrame:
        """Rows of a method at a budget that have the score."""
        rows, column = self.cells.get((method, epsilon)), f"scores.{score}"
        if rows is None or column not in rows.columns:
            return pd.DataFrame(columns=[column])
        return rows[rows[column].notna()]

    def values(self, method: str, epsilon: float, score: str) -> pd.Series:
        """The score over seeds."""
        return self.of(method, epsilon, score)[f"scores.{score}"].astype(float)

    def budgets(self, score: str, *methods: str, free: bool = False) -> list[float]:
        """Budgets at which all of the methods are on record, without 0 and, unless `free`, infinity."""
        found = []
        for epsilon in sorted({epsilon for _, epsilon in self.cells}):
            inside = epsilon > 0 and (free or epsilon < math.inf)
            if inside and all(len(self.of(method, epsilon, score)) for method in methods):
                found.append(float(epsilon))
        return found

    def check(
        self, score: str, terms: Mapping[tuple[str, float], float], inside: bool, where: str | None = None
    ) -> Check:
        """Whether a weighted sum of means over (method, epsilon) is above 0, by two standard errors."""
        chosen = {cell: self.of(*cell, score) for cell in terms}
        sign = contrast(*((weight, self.values(*cell, score)) for cell, weight in terms.items()))
        rows = pd.concat(list(chosen.values()))
        one_budget = len({epsilon for _, epsilon in terms}) == 1
        at = f", ε = {budget(next(iter(terms))[1])}" if one_budget else ""
        parts = [
            f"{METHOD_LABELS.get(one, one)}{'' if one_budget else ', ε = ' + budget(epsilon)}: {value(have, score)}"
            for (one, epsilon), have in chosen.items()
        ]
        few = [] if sign is not None else ["too few seeds"]
        return Check(
            where=where or f"{pair_name(self.pair)}{at}",
            got="; ".join([*parts, *few]),
            outcome=_outcome(sign),
            inside=inside,
            num_private=frozenset({self.num_private}),
            num_images=_images(rows),
            seeds=frozenset(int(seed) for seed in rows["seed"]),
            sources=_record_sources(rows),
        )


def _outcome(sign: int | None) -> str:
    return {1: HOLDS, -1: FAILS}.get(sign or 0, UNDECIDED)


def _images(rows: pd.DataFrame) -> frozenset[int]:
    """Numbers of samples scored; some methods make none."""
    return frozenset(int(one) for one in rows.get("scores.num_images", pd.Series(dtype=float)).dropna() if one)


def _record_sources(rows: pd.DataFrame) -> Sources:
    """Name, command and seconds of each record."""
    columns = [name for name in rows.columns if name.startswith("seconds.")]
    seconds = rows[columns].sum(axis=1, min_count=1) if columns else pd.Series(math.nan, index=rows.index)
    commands = rows.get("provenance.command", pd.Series("", index=rows.index)).fillna("")
    names = (f"{one.pair} {one.method} {one.epsilon} {one.num_private} {one.seed}" for one in rows.itertuples())
    return frozenset(zip(names, commands, seconds.astype(float), strict=True))


Test = Callable[[Evidence], list[Check]]


# ---- tests, images ------------------------------------------------------------

Regime = Callable[[int], bool]


def in_paper(size: int) -> bool:
    return size == 128


def plentiful(size: int) -> bool:
    return size >= PLENTY


def everywhere(size: int) -> bool:
    return True


def better(
    method: str | None, other: str | None, score: str, regime: Regime, at: Sequence[float] = ()
) -> Test:
    """One method better than another, at all finite budgets or the given ones; `None` is ours."""

    def test(evidence: Evidence) -> list[Check]:
        one, two, sign = method or evidence.ours, other or evidence.ours, -1 if score == DISTANCE else 1
        return [
            place.check(score, {(one, epsilon): sign, (two, epsilon): -sign}, regime(place.num_private))
            for place in evidence.places
            for epsilon in place.budgets(score, one, two)
            if not at or epsilon in at
        ]

    return test


def clearest_when_strict(evidence: Evidence) -> list[Check]:
    """The lead over DP-SGD LoRA is larger at the strict budget than at each larger one."""
    ours, rival, strict = evidence.ours, "dp_lora", evidence.epsilon
    checks = []
    for place in evidence.places:
        budgets = place.budgets(DISTANCE, ours, rival)
        for loose in (one for one in budgets if one > strict and strict in budgets):
            terms = {(rival, strict): 1.0, (ours, strict): -1.0, (rival, loose): -1.0, (ours, loose): 1.0}
            where = f"{pair_name(place.pair)}, ε = {budget(strict)} against {budget(loose)}"
            checks.append(place.check(DISTANCE, terms, in_paper(place.num_private), where))
    return checks


def twice(method: str | None, regime: Regime, more: bool) -> Test:
    """The distance at the strict budget is more (or less) than twice that at the loosest one with two seeds."""

    def test(evidence: Evidence) -> list[Check]:
        chosen, strict, checks = method or evidence.ours, evidence.epsilon, []
        for place in evidence.places:
            budgets = place.budgets(DISTANCE, chosen, free=True)
            loose = [one for one in budgets if one > strict and len(place.of(chosen, one, DISTANCE)) > 1]
            if strict in budgets and loose:
                terms = {(chosen, strict): 1.0 if more else -1.0, (chosen, loose[-1]): -2.0 if more else 2.0}
                checks.append(place.check(DISTANCE, terms, regime(place.num_private)))
        return checks

    return test


def training_over_noise(evidence: Evidence) -> list[Check]:
    """Other public training moves the distance without noise by more than the noise does."""
    ours, strict, checks = evidence.ours, evidence.epsilon, []
    for place in evidence.places:
        free = math.inf
        others = [one for one in ("dp_deepsets", "dp_deepsets_nested") if one != ours]
        if strict not in place.budgets(DISTANCE, ours) or free not in place.budgets(DISTANCE, ours, free=True):
            continue
        for other in others:
            if free in place.budgets(DISTANCE, other, free=True):
                gap = place.values(ours, free, DISTANCE).mean() - place.values(other, free, DISTANCE).mean()
                side = math.copysign(1.0, gap)  # |gap| - (with noise - without)
                terms = {(ours, strict): -1.0, (ours, free): 1.0 + side, (other, free): -side}
                checks.append(place.check(DISTANCE, terms, True))
    return checks


def best_dp_sgd(evidence: Evidence) -> list[Check]:
    """The DP-SGD method with the best mean against ours."""
    checks = []
    for place in evidence.places:
        for epsilon in place.budgets(DISTANCE, evidence.ours):
            means = {one: place.values(one, epsilon, DISTANCE).mean() for one in DP_SGD}
            known = {one: mean for one, mean in means.items() if not math.isnan(mean)}
            if known:
                best = min(known, key=lambda one: known[one])
                terms = {(best, epsilon): -1.0, (evidence.ours, epsilon): 1.0}
                checks.append(place.check(DISTANCE, terms, plentiful(place.num_private)))
    return checks


def gains(method: str, rival: str | None, score: str, regime: Regime) -> Test:
    """From ε = 1 to ε = 10 the method gains, or gains more than a rival."""

    def test(evidence: Evidence) -> list[Check]:
        low, high, checks = 1.0, 10.0, []
        for place in evidence.places:
            methods = [method, *([rival] if rival else [])]
            if {low, high} <= set(place.budgets(score, *methods)):
                terms = {(method, high): 1.0, (method, low): -1.0}
                if rival:
                    terms |= {(rival, high): -1.0, (rival, low): 1.0}
                checks.append(place.check(score, terms, regime(place.num_private)))
        return checks

    return test


def scores_disagree(evidence: Evidence) -> list[Check]:
    """Of the pairs of methods that both scores tell apart, some are in opposite order; or none of at least ten."""
    checks = []
    for place in evidence.places:
        methods = [one for one in place.methods if one not in CONTROLS]
        for epsilon in sorted({epsilon for one in methods for epsilon in place.budgets(ACCURACY, one)}):
            against: list[tuple[str, str]] = []
            agree: list[tuple[str, str]] = []
            for one, other in itertools.combinations(methods, 2):
                accuracy, distance = (
                    contrast((1, place.values(one, epsilon, score)), (-1, place.values(other, epsilon, score)))
                    for score in (ACCURACY, DISTANCE)
                )
                if accuracy and distance:  # the better accuracy is the larger, the better distance the smaller
                    (against if accuracy == distance else agree).append((one, other))
            if against or agree:
                one, other = (against or agree)[0]
                terms = {(method, epsilon): 1.0 for pair in (*against, *agree) for method in pair}
                whole = place.check(DISTANCE, terms, plentiful(place.num_private))  # for where and sources
                example = "; ".join(
                    f"{METHOD_LABELS.get(method, method)}: {value(place.of(method, epsilon, DISTANCE), DISTANCE)} and "
                    f"{value(place.of(method, epsilon, ACCURACY), ACCURACY)}"
                    for method in (one, other)
                )
                outcome = HOLDS if against else FAILS if len(agree) >= _ENOUGH else UNDECIDED
                found = f"{len(against)} of {len(against) + len(agree)} pairs; e.g. (distance and accuracy) {example}"
                checks.append(dataclasses.replace(whole, got=found, outcome=outcome))
    return checks


def layers(changes: bool) -> Test:
    """Of the grids of tuned layers: the choice matters at a budget, or the best choice changes between budgets."""

    def test(evidence: Evidence) -> list[Check]:
        checks = []
        for path in sorted((evidence.folder / "layers").glob("*.json")):
            content = json.loads(path.read_text(encoding="utf-8"))
            rows = [row for row in content.get("summary") or () if row["epsilon"] is not None]
            if path.stem.endswith("-smoke") or not rows:
                continue
            cells = content["cells"].values()
            seeds = frozenset(int(cell["seed"]) for cell in cells)
            spent = sum(cell.get("seconds") or 0.0 for cell in cells) or math.nan
            sources = frozenset({(path.name, content["provenance"]["command"], spent)})
            rest: dict[str, Any] = {"seeds": seeds, "sources": sources}
            if not changes:
                for row in rows:
                    worst = min(row["mean"], key=lambda name: row["mean"][name])
                    clear = worst not in row["not_worse"] and worst != row["best"] and len(seeds) > 1
                    got = f"best {_subset(row, row['best'])}, worst {_subset(row, worst)}"
                    where = f"{path.stem}, ε = {budget(row['epsilon'])}"
                    checks.append(Check(where, got, HOLDS if clear else UNDECIDED, **rest))
            elif len(rows) > 1:
                clear = any(_other_choice(*two) for two in itertools.combinations(rows, 2)) and len(seeds) > 1
                outcome = HOLDS if clear else FAILS if len({row["best"] for row in rows}) == 1 else UNDECIDED
                best = (f"{row['best'].replace('_', ' ')} at {budget(row['epsilon'])}" for row in rows)
                checks.append(Check(f"{path.stem}, all ε", "best: " + "; ".join(best), outcome, **rest))
        return checks

    return test


def _other_choice(low: Mapping[str, Any], high: Mapping[str, Any]) -> bool:
    """Each has its own best, clearly better there than the other's."""
    own = low["best"] != high["best"]
    return own and high["best"] not in low["not_worse"] and low["best"] not in high["not_worse"]


def _subset(row: Mapping[str, Any], name: str) -> str:
    spread = row["std"].get(name)
    return f"{name.replace('_', ' ')} {row['mean'][name]:.2f}" + ("" if spread is None else f" ± {spread:.2f}")


# ---- tests, linear setting ------------------------------------------------------------

_WORLD = {"d": 200, "off_subspace_energy": 0.0, "noise_std": 0.5}  # what a place does not say


def _simulated(
    evidence: Evidence, ours: str, rivals: Mapping[str, str | None], same: Sequence[str], clip: str | None = None
) -> list[Check]:
    """Simulated risk of ours below a rival's at the places that two sets of simulations share, each once.

    ``rivals``: file -> learner in it, if it holds several; the first that has a place is taken.
    """
    mine = _points(evidence, ours)
    checks: dict[str, Check] = {}
    for (place, (risk, error), source), (name, learner) in itertools.product(mine, rivals.items()):
        if clip is not None and place.get("clip") != clip:
            continue
        for other, (theirs, other_error), other_source in _points(evidence, name):
            if (learner is None or other.get("learner") == learner) and all(
                {**_WORLD, **place}.get(key) == {**_WORLD, **other}.get(key) for key in same
            ):
                gap, doubt = theirs - risk, 2 * math.hypot(error, other_error)
                sign = 0 if abs(gap) <= doubt else 1 if gap > 0 else -1
                got = f"{number(risk)} ± {number(error)} (s.e.) against {number(theirs)} ± {number(other_error)}"
                checks.setdefault(_at(place), _risk_check(_at(place), got, sign, place, source | other_source))
    return list(checks.values())


def linear(evidence: Evidence) -> list[Check]:
    rivals = {"dp_gd": None, "lower_bound": "DP-GD"}
    same = ("d", "off_subspace_energy", "noise_std", "n", "epsilon")
    return _simulated(evidence, "deepsets_end_to_end", rivals, same)


def projected(evidence: Evidence) -> list[Check]:
    """The rival below ours: sides exchanged, the same places."""
    swapped = {HOLDS: FAILS, FAILS: HOLDS, UNDECIDED: UNDECIDED}
    same = ("k", "d", "off_subspace_energy", "noise_std", "n", "epsilon")
    found = _simulated(evidence, "deepsets_known_subspace", {"projected_dp_gd": None}, same, clip="best")
    return [dataclasses.replace(one, outcome=swapped[one.outcome]) for one in found]


def crossover(evidence: Evidence) -> list[Check]:
    """The simulated risks are equal, within the tolerance of the file, where the formulas put the crossover."""
    checks = []
    for place, (ratio, error), source in _points(evidence, "crossover"):
        content = _theory_file(evidence, "crossover")
        low, high, z = (content["tolerance"][key] for key in ("low", "high", "z"))
        inside = low - z * error <= ratio <= high + z * error
        got = f"risk of DP-DeepSets / risk of DP-GD: {ratio:.2f} ± {error:.2f} (s.e.)"
        checks.append(_risk_check(_at(place), got, 1 if inside else -1, place, source))
    return checks


def learned(evidence: Evidence) -> list[Check]:
    """The risk of a trained hypernetwork is within ``TIE`` of that of a known subspace."""
    path = evidence.folder / "theory" / "learned.json"
    if not path.is_file():
        return []
    content, checks = json.loads(path.read_text(encoding="utf-8")), []
    command = content["provenance"]["command"]
    for name, row in content["rows"].items():
        settings, trainings = row["settings"], len(row["trainings"])
        for line in row["summary"]:
            deviation = line["deviation_over_seeds"]
            if (settings["epsilon"], settings["num_private"]) == (line["epsilon"], line["num_private"]):
                gap = TIE * line["closed_form"] - line["risk"]
                known = trainings > 1 and deviation is not None
                clear = known and abs(gap) > 2 * deviation / math.sqrt(trainings)
                tasks = settings["config"]["num_public_tasks"]
                got = f"{number(line['risk'])} against {number(line['closed_form'])} with a known subspace"
                public = "fresh" if tasks is None else f"{tasks:,}"
                where = f"ε = {budget(line['epsilon'])}, {public} public tasks ({name})"
                sign = 0 if not clear else 1 if gap > 0 else -1
                place = {"n": line["num_private"]}
                check = _risk_check(where, got, sign, place, frozenset({(path.name, command, math.nan)}), trainings)
                checks.append(check)
    return checks


def _theory_file(evidence: Evidence, name: str) -> dict[str, Any]:
    path = evidence.folder / "theory" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


_Simulation = tuple[dict[str, Any], tuple[float, float], Sources]


def _points(evidence: Evidence, name: str) -> list[_Simulation]:
    """Place, simulated mean and standard error, source of each point of a file of simulations, if it is there."""
    content = _theory_file(evidence, name)
    if not content:
        return []
    spent = content.get("cpu_seconds", math.nan)
    source = frozenset({(f"{name}.json", content["provenance"]["command"], spent)})
    return [(one["place"], (one["simulated"], one["standard_error"]), source) for one in content["points"]]


def _risk_check(
    where: str, got: str, sign: int, place: Mapping[str, Any], sources: Sources, seeds: int = 0
) -> Check:
    size = frozenset({int(place["n"])})
    return Check(where, got, _outcome(sign), True, size, seeds=frozenset(range(seeds)), sources=sources)


def _at(place: Mapping[str, Any]) -> str:
    """A place of the linear setting in words, without what is as everywhere."""
    names = {"d": "d", "k": "k", "num_public_tasks": "T", "examples_per_task": "m", "off_subspace_energy": "γ²",
             "noise_std": "s", "epsilon": "ε", "n": "n"}  # fmt: skip
    return ", ".join(f"{name} = {place[key]:g}" for key, name in names.items() if key in place)
