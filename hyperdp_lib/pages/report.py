"""Records -> tables and sentences, so that no number in the book or the README is typed by hand.

All scores are research metrics: they are computed on private test data and are not differentially private.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from hyperdp_lib.pages import marks

# method -> what the reader sees, in the order of every table and legend
METHOD_LABELS = {
    "hyperdp": "HyperDP, as planned",
    "dp_deepsets": "DP-DeepSets",
    "dp_deepsets_refined": "DP-DeepSets, refined",
    "dp_deepsets_nested": "DP-DeepSets, nested",
    "dp_deepsets_nested_refined": "DP-DeepSets, nested and refined",
    "dp_deepsets_looks": "DP-DeepSets, two steps",
    "dp_deepsets_looks_refined": "DP-DeepSets, two steps and refined",
    "dp_deepsets_cells": "DP-DeepSets, cells",
    "dp_deepsets_cells_refined": "DP-DeepSets, cells and refined",
    "dp_hybrid": "hybrid (sum then DP-SGD)",
    "dp_lora": "DP-SGD LoRA",
    "dp_ldm": "DP-LDM",
    "dp_mepf": "DP-MEPF",
    "dp_layer_search": "DP layer search",
    "dp_embedding_sgd": "DP-SGD on the embedding",
    "direct_conditioning": "direct conditioning",
    "nearest_public": "nearest public data",
    "noisy_class_means": "nearest noisy class mean",
    "public_only": "noise alone, no private data",
    "lora_non_private": "LoRA, not private",
    "real": "real private images",
}
SCORE_LABELS = {
    "accuracy": "downstream accuracy (higher is better)",
    "frechet_distance": "Fréchet distance (lower is better)",
    "precision": "precision",
    "recall": "recall",
}
# the comparison in which neither the method nor any control has seen a letter that looks like a digit
NUMERALS_NOTE = (  # said wherever scores of the weights `drawings` on digits stand
    "Among the public drawings are nine Kanji numerals, one of them a single stroke, turned and mirrored too: "
    "these scores on MNIST profit by them."
)
MAIN_PAIR = "glyphs-digits-no-lookalikes"
# the same trained weights; only the bank of the retrieval control also holds the look-alikes
LOOKALIKE_PAIR = "glyphs-digits"
# one unlabelled private set of ``FEW`` images, the paper's regime: pair -> what the reader sees
FEW = 128
GLYPH_SETS = {
    "glyphs-digits-3-no-lookalikes": "one digit",
    "glyphs-digits-all-no-lookalikes": "all digits",
    "glyphs-fashion-mnist-T-shirt-no-lookalikes": "T-shirts",
}
DRAWING_SETS = {
    "drawings-mnist-3": "one digit of MNIST",
    "drawings-mnist-all": "all digits of MNIST",
    "drawings-fashion-mnist-T-shirt": "T-shirts",
}
PHOTOGRAPH_SETS = {
    "photographs-cifar10-jpeg-horse": "horses (JPEG)",
    "photographs-cifar10-jpeg-all": "all ten classes (JPEG)",
}
# what the method is judged against, and by which score; the last makes no images
RIVALS = (
    ("dp_lora", "accuracy"),
    ("dp_lora", "frechet_distance"),
    ("nearest_public", "accuracy"),
    ("nearest_public", "frechet_distance"),
    ("noisy_class_means", "accuracy"),
)
# every other private method that makes images: what the chapter on rivals compares ours with
OTHER_METHODS = (
    "hyperdp", "dp_deepsets_refined", "dp_deepsets_nested", "dp_deepsets_nested_refined", "dp_deepsets_looks",
    "dp_deepsets_looks_refined", "dp_deepsets_cells", "dp_deepsets_cells_refined", "dp_hybrid", "dp_lora", "dp_ldm",
    "dp_mepf", "dp_layer_search", "dp_embedding_sgd",
    "direct_conditioning",
)  # fmt: skip
_VERDICTS = (
    "better",
    "worse",
    "no difference beyond the spread over seeds",
    "too few seeds to tell",
)
# names in the training's log -> words
_LOGGED = {
    "held_out": "loss on held-out tasks",
    "held_out_no_adapter": "without adapters",
    "classify": "classification loss",
    "redraw": "redrawing loss",
    "error": "squared error",
    "kl": "KL divergence",
    "held_out_error": "squared error on held-out tasks",
    "held_out_unlabelled": "without labels",
}


def select(
    scores: pd.DataFrame,
    pair: str,
    *,
    method: str | None = None,
    epsilon: float | None = None,
    num_private: int | None = None,
) -> pd.DataFrame:
    """The rows of one pair, and of one method, epsilon (0 is a value here) or number of private images."""
    chosen = scores[scores["pair"] == pair]
    for column, wanted in (("method", method), ("epsilon", epsilon), ("num_private", num_private)):
        if wanted is not None:
            chosen = chosen[chosen[column] == wanted]
    return chosen


def order(methods: set[str]) -> list[str]:
    """Methods in the order of every table and legend; unknown ones last, by name."""
    known = [method for method in METHOD_LABELS if method in methods]
    return known + sorted(methods - set(known))


def budget(epsilon: float | None) -> str:
    """`0.5`, `1`, and `∞` for no noise, which records hold as no number."""
    return "∞" if epsilon is None or math.isinf(epsilon) else f"{epsilon:g}"


def epsilon_label(epsilon: float) -> str:
    """`0.5`, `1`, `∞ (no noise)` or `0 (no private data)`."""
    if epsilon == 0:
        return "0 (no private data)"
    return "∞ (no noise)" if math.isinf(epsilon) else f"{epsilon:g}"


def no_record(scores: pd.DataFrame, epsilon: float) -> str:
    """One line of Markdown: that these rows have no record at this epsilon, and at which finite ones they have."""
    known = sorted({one for one in scores.get("epsilon", ()) if 0 < one < math.inf} - {epsilon})
    where = f"on record: ε = {', '.join(map(budget, known))}" if known else "nor at any other"
    return f"*No record at ε = {budget(epsilon)}; {where}.*"


def value(scores: pd.DataFrame, score: str) -> str:
    """Mean and standard deviation over the given rows as text, `0.86 ± 0.01`; a dash if there is none."""
    known = on_record(scores, score)
    if known.empty:
        return "–"
    digits = 1 if score == "frechet_distance" else 2
    text = f"{known.mean():.{digits}f}"
    return f"{text} ± {known.std():.{digits}f}" if len(known) > 1 else text


def score_table(scores: pd.DataFrame, pair: str, score: str, *, against: str | None = None) -> str:
    """One score as a Markdown table: a row per method, a column per epsilon, mean ± standard deviation over seeds.

    Parameters
    ----------
    scores
        From `records.load_records`.
    pair
        Public-private pair, e.g. `"glyphs-digits"`.
    score
        `"accuracy"`, `"frechet_distance"`, `"precision"` or `"recall"`. Methods without it (a classifier has no
        Fréchet distance) get no row.
    against
        Method that the others are marked against in every column, see `marks`.
    """
    chosen = select(scores, pair)
    chosen = chosen.loc[on_record(chosen, score).index]
    if chosen.empty:
        return f"*No {score_name(score)} of {pair} on record: `hyperdp compare` makes records.*"
    places = {budget(epsilon): select(chosen, pair, epsilon=epsilon) for epsilon in sorted(set(chosen["epsilon"]))}
    return _side_by_side(f"{SCORE_LABELS.get(score, score)}, by ε", places, score, against)


def sets_table(
    scores: pd.DataFrame,
    pairs: Mapping[str, str],
    epsilons: Iterable[float],
    *,
    num_private: int = FEW,
    score: str = "frechet_distance",
    against: str | None = None,
) -> str:
    """One score of several private sets side by side: a row per method, a column per set and epsilon.

    Parameters
    ----------
    pairs
        Public-private pair -> name of its columns.
    against
        Method that the others are marked against in every column, see `marks`.
    """
    chosen = scores[(scores["num_private"] == num_private) & scores["pair"].isin(tuple(pairs))]
    if chosen.empty:
        return "*No records at these parameters.*"
    asked = list(dict.fromkeys(epsilons))
    budgets = [epsilon for epsilon in asked if (chosen["epsilon"] == epsilon).any()]
    absent = [no_record(chosen, epsilon) for epsilon in asked if epsilon not in budgets]
    if not budgets:
        return "\n\n".join(absent)
    places = {
        pairs[one] + (f", ε = {budget(epsilon)}" if len(asked) > 1 else ""): select(chosen, one, epsilon=epsilon)
        for one, epsilon in itertools.product(pairs, budgets)
    }
    return "\n\n".join([_side_by_side("method", places, score, against), *absent])


def seeds_range(scores: pd.DataFrame, pairs: Iterable[str]) -> tuple[int, int]:
    """Smallest and largest number of seeds in a cell of `sets_table`; (0, 0) if there is none."""
    shown = scores[scores["pair"].isin(tuple(pairs)) & (scores["num_private"] == FEW)].fillna({"epsilon": math.inf})
    seeds = shown.groupby(["pair", "method", "epsilon"])["seed"].nunique()
    return (int(seeds.min()), int(seeds.max())) if len(seeds) else (0, 0)


def _side_by_side(head: str, places: Mapping[str, pd.DataFrame], score: str, against: str | None) -> str:
    """A row per method, a column per place."""
    rows = [{method: place[place["method"] == method] for method in set(place["method"])} for place in places.values()]
    found: list[dict[str, str]] = [{} for _ in rows]
    if against is not None:
        values = [{method: on_record(mine, score) for method, mine in column.items()} for column in rows]
        found = marks.marks(values, against, [score] * len(rows))
    lines = [f"| {' | '.join([head, *places])} |", "|---|" + "---:|" * len(places)]
    for method in order({method for column in rows for method in column}):
        cells = [
            value(column[method], score) + marked.get(method, "") if method in column else "–"
            for column, marked in zip(rows, found, strict=True)
        ]
        lines.append(f"| {' | '.join([METHOD_LABELS.get(method, method), *cells])} |")
    return "\n".join(lines)


def settings_table(scores: pd.DataFrame, columns: Mapping[str, str]) -> str:
    """What the records were made with, each combination once, as a Markdown table.

    Parameters
    ----------
    scores
        From `records.load_records`, of one method.
    columns
        Column of `scores` to heading; a column that no record has stays empty. A missing number is written as a dash.
    """
    if scores.empty:
        return "*No records at these parameters.*"
    chosen = scores.reindex(columns=list(columns)).drop_duplicates().sort_values(next(iter(columns)))
    lines = ["| " + " | ".join(columns.values()) + " |", "|" + "---|" * len(columns)]
    for row in chosen.itertuples(index=False):
        cells = (e if isinstance(e, str) else "–" if pd.isna(e) else f"{e:g}" for e in row)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def commands(scores: pd.DataFrame) -> str:
    """The commands that made the given records, each once, as a Markdown code block."""
    if "provenance.command" not in scores.columns:
        return "*No records.*"
    return "\n".join(["```bash", *dict.fromkeys(scores["provenance.command"].dropna()), "```"])


def training_table(manifest: Mapping[str, Any]) -> str:
    """The public training as Markdown: a row per stage, then device, and what the adapters do on held-out tasks.

    Parameters
    ----------
    manifest
        Of trained weights (`manifest.json`), written by `hyperdp train`.
    """
    stages = manifest.get("stages")
    if not stages:
        return "*The manifest of these weights does not say how they were trained.*"
    lines = ["| stage | steps | tasks x images in a step | minutes | at the last log |", "|---|---:|---:|---:|---|"]
    for name, log in stages.items():
        batch = manifest["preset"][f"{name}_stage"]
        numbers = ", ".join(
            f"{_LOGGED.get(key, key)} {number:.3f}"
            for key, number in log["last"].items()
            if key not in ("step", "seconds")
        )
        size = f"{batch['tasks']} x {batch['images']}"
        lines.append(f"| {name} | {log['steps']:,} | {size} | {log['seconds'] / 60:.0f} | {numbers} |")
    total = sum(log["seconds"] for log in stages.values()) / 60
    after = f"Together {total:.0f} minutes on {manifest['device']}, by `{manifest['command']}`."
    last = stages["joint"]["last"] if "joint" in stages else {}
    if {"held_out", "held_out_no_adapter"} <= last.keys():
        adapted, alone = last["held_out"], last["held_out_no_adapter"]
        after += (
            f" On held-out tasks of 128 images, with the noise of ε = 1, the denoising loss is {adapted:.3f} with "
            f"adapters and {alone:.3f} without: {abs(1 - adapted / alone):.0%} "
            f"{'lower' if adapted < alone else 'higher'}."
        )
    return "\n".join([*lines, "", after])


def comparison_sentence(scores: pd.DataFrame, score: str, ours: str, other: str, epsilon: float) -> str:
    """One sentence comparing two methods at one epsilon, its wording following from the numbers.

    "Better" and "worse" are said only when the means differ by more than two standard errors of their
    difference.
    """
    at_epsilon = scores[scores["epsilon"] == epsilon]
    mine, theirs = (at_epsilon[at_epsilon["method"] == method] for method in (ours, other))
    our_label, other_label = METHOD_LABELS.get(ours, ours), METHOD_LABELS.get(other, other)
    name = score_name(score)
    where = f"At ε = {epsilon_label(epsilon)}"
    if on_record(mine, score).empty or on_record(theirs, score).empty:
        missing = our_label if on_record(mine, score).empty else other_label
        return f"{where} there is no {name} on record for {missing}."
    judged = _verdict(mine, theirs, score)
    verdict = f"{our_label} is {judged}" if judged in ("better", "worse") else judged
    return (
        f"{where}, the {name} is {value(mine, score)} for {our_label} and {value(theirs, score)} "
        f"for {other_label}: {verdict}."
    )


def verdicts(scores: pd.DataFrame, score: str, ours: str, other: str) -> str:
    """One sentence over all budgets on record for both methods: where ours is better, where worse, where neither.

    Judged as in `comparison_sentence`.
    """
    our_label, other_label = METHOD_LABELS.get(ours, ours), METHOD_LABELS.get(other, other)
    found: dict[str, list[str]] = {}
    for epsilon in sorted(set(scores["epsilon"])):
        at_epsilon = scores[scores["epsilon"] == epsilon]
        mine, theirs = (at_epsilon[at_epsilon["method"] == method] for method in (ours, other))
        if not on_record(mine, score).empty and not on_record(theirs, score).empty:
            found.setdefault(_verdict(mine, theirs, score), []).append(budget(epsilon))
    start = f"{score_name(score).capitalize()}, {our_label} against {other_label}"
    if not found:
        return f"{start}: nothing on record."
    parts = (f"{judged} at ε = {', '.join(found[judged])}" for judged in _VERDICTS if judged in found)
    return f"{start}: {'; '.join(parts)}."


def standing(scores: pd.DataFrame, score: str, ours: str, others: Iterable[str], epsilon: float) -> str:
    """One sentence: which of the other methods beat ours at one epsilon, which it beats, and which are not on record.

    Judged as in `comparison_sentence`, seen from the others' side.
    """
    at_epsilon = scores[scores["epsilon"] == epsilon]
    mine = at_epsilon[at_epsilon["method"] == ours]
    our_label = METHOD_LABELS.get(ours, ours)
    where = f"{score_name(score).capitalize()} at ε = {epsilon_label(epsilon)}"
    if on_record(mine, score).empty:
        return f"{where}: nothing on record for {our_label}."
    found: dict[str, list[str]] = {}
    for method in others:
        theirs = at_epsilon[at_epsilon["method"] == method]
        known = not on_record(theirs, score).empty
        judged = _verdict(theirs, mine, score) if known else "not on record"
        numbers = f" ({value(theirs, score)})" if known else ""
        found.setdefault(judged, []).append(METHOD_LABELS.get(method, method) + numbers)
    heads = dict(zip(_VERDICTS, ("better than it are", "worse are", "not told apart by these seeds are"), strict=False))
    heads |= {"too few seeds to tell": "on too few seeds to tell are", "not on record": "not on record are"}
    parts = [f"{heads[key]} {', '.join(found[key])}" for key in (*_VERDICTS, "not on record") if key in found]
    return f"{where}, where {our_label} has {value(mine, score)}: {'; '.join(parts)}."


def levers_table(rows: Sequence[Mapping[str, Any]], score: str) -> str:
    """Levers in two trainings of the same weights as Markdown; the last column judges, see `twice`.

    Parameters
    ----------
    rows
        Of ``benchmarks/levers.json``, made by an earlier version. A set's first lever is what its others are compared
        with; in its own row the second training is compared with the first: what luck of training does.
    score
        ``"accuracy"`` or ``"frechet_distance"``; sets without it are left out.
    """
    digits = 3 if score == "accuracy" else 1
    lines = [
        f"| private set | *n* | decoded | {score_name(score)}, as shipped | second training | | numbers released |",
        "|---|---:|---|---:|---:|---|---:|",
    ]
    for (public, private, size), levers in _levers(rows, score).items():
        start = levers[0][1]
        for lever, found, sizes in levers:
            if found is start:
                luck = _judge(found[1], found[0], score)
                judged = {"better": "the second is better", "worse": "the first is better"}.get(luck, "–")
            else:
                judged = twice(start, found, score)
            told = " | ".join(f"{one.mean():.{digits}f} ± {one.std():.{digits}f}" for one in found)
            label = METHOD_LABELS[lever].removeprefix("DP-DeepSets, ")
            released = " and ".join(f"{number:,}" for number in dict.fromkeys(sizes))
            lines.append(f"| {private} (public: {public}) | {size:,} | {label} | {told} | {judged} | {released} |")
    return "\n".join(lines)


def levers_sentences(rows: Sequence[Mapping[str, Any]], score: str) -> list[str]:
    """One sentence for each lever: on how many sets it is better in both trainings, in one, and so on.

    The last compares the second training with the first: what luck of training does.
    """
    found: dict[str, list[str]] = {}
    luck: list[str] = []
    for (_, start, _), *others in _levers(rows, score).values():
        luck.append({"better": "better", "worse": "worse"}.get(_judge(start[1], start[0], score), "not told apart"))
        for lever, scores, _ in others:
            found.setdefault(lever, []).append(twice(start, scores, score))
    told = {METHOD_LABELS[lever]: judged for lever, judged in found.items()}
    told |= {"The second training against the first": luck} if luck else {}
    return [
        f"{what}, {score_name(score)}, on {len(judged)} set{'s' if len(judged) > 1 else ''}: "
        + ", ".join(f"{judged.count(words)} {words}" for words in sorted(set(judged)))
        + "."
        for what, judged in told.items()
    ]


def twice(starts: Sequence[pd.Series], scores: Sequence[pd.Series], score: str) -> str:
    """How a lever does against a start, in words, judged in each of two trainings as in `contrast`.

    Examples
    --------
    >>> low, high = pd.Series([1.0, 1.1]), pd.Series([3.0, 3.2])
    >>> twice((high, high), (low, low), "frechet_distance"), twice((high, low), (low, low), "frechet_distance")
    ('better in both', 'better in one')
    """
    judged = [_judge(mine, theirs, score) for theirs, mine in zip(starts, scores, strict=True)]
    told = [one for one in judged if one in ("better", "worse")]
    if len(told) == 2:
        return f"{told[0]} in both" if told[0] == told[1] else "better in one, worse in the other"
    return f"{told[0]} in one" if told else "no difference"


def _levers(
    rows: Sequence[Mapping[str, Any]], score: str
) -> dict[tuple[str, str, int], list[tuple[str, list[pd.Series], list[int]]]]:
    """Weights, set and size -> levers, each with scores and numbers released in both trainings; none without both."""
    found: dict[tuple[str, str, int], dict[str, list[Mapping[str, Any]]]] = {}
    for row in sorted(rows, key=lambda row: row["training"]):
        if score in row:
            place = found.setdefault((row["weights"], row["set"], row["num_private"]), {})
            place.setdefault(row["lever"], []).append(row)
    return {
        place: [
            (lever, [pd.Series(row[score]) for row in both], [row["numbers_released"] for row in both])
            for lever, both in levers.items()
        ]
        for place, levers in found.items()
        if all(len(both) == 2 for both in levers.values())
    }


def score_name(score: str) -> str:
    """A score's name inside a sentence: `downstream accuracy`, `Fréchet distance`."""
    return SCORE_LABELS.get(score, score).split(" (")[0]


def _verdict(mine: pd.DataFrame, theirs: pd.DataFrame, score: str) -> str:
    """One of `_VERDICTS`; both sides have the score."""
    return _judge(on_record(mine, score), on_record(theirs, score), score)


def _judge(mine: pd.Series, theirs: pd.Series, score: str) -> str:
    """One of `_VERDICTS`."""
    sign = -1 if score == "frechet_distance" else 1
    judged = contrast((sign, mine), (-sign, theirs))
    if judged is None:
        return "too few seeds to tell"
    if judged == 0:
        return "no difference beyond the spread over seeds"
    return "better" if judged > 0 else "worse"


def contrast(*terms: tuple[float, pd.Series]) -> int | None:
    """Sign of a weighted sum of means: 1 or -1 if it is more than two of its standard errors from 0, else 0.

    Parameters
    ----------
    *terms
        Weight, and the values over seeds; `None` is returned if one of them has fewer than two.

    Examples
    --------
    >>> contrast((1, pd.Series([3.0, 3.2])), (-1, pd.Series([1.0, 1.1])))
    1
    >>> contrast((1, pd.Series([3.0, 3.2])), (-2, pd.Series([1.5, 1.7])))
    0
    """
    if min(len(values) for _, values in terms) < 2:
        return None
    total = sum(weight * float(values.mean()) for weight, values in terms)
    error = math.sqrt(sum(weight**2 * float(values.var()) / len(values) for weight, values in terms))
    return 0 if abs(total) <= 2 * error else int(math.copysign(1, total))


def numbers(column: pd.Series) -> str:
    """The different whole numbers of a column, in order: `640` or `144, 1,437`."""
    return ", ".join(f"{number:,}" for number in sorted(set(column)))


def on_record(scores: pd.DataFrame, score: str) -> pd.Series:
    """The values of a score in the given rows, without those that have none."""
    column = f"scores.{score}"
    return scores[column].dropna() if column in scores.columns else pd.Series(dtype=float)
