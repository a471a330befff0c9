"""Records -> tables and sentences, so that no number in the book or the README is typed by hand.

`python -m hyperdp_lib.report README.md` rewrites the results table between the two markers of that file.
All scores are research metrics: they are computed on private test data and are not differentially private.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from .certificate import Certificate
from .data import InputError
from .records import load_records

# method -> what the reader sees, in the order of every table and legend
METHOD_LABELS = {
    "dp_deepsets": "DP-DeepSets",
    "dp_hybrid": "hybrid (sum then DP-SGD)",
    "dp_lora": "DP-SGD LoRA",
    "dp_ldm": "DP-LDM",
    "dp_mepf": "DP-MEPF",
    "dp_layer_search": "DP layer search",
    "dp_embedding_sgd": "DP-SGD on the embedding",
    "direct_conditioning": "direct conditioning",
    "adapter_mixture": "adapter mixture",
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
MAIN_PAIR = "glyphs-digits-no-lookalikes"
# the same trained weights; only the bank of the retrieval control also holds the look-alikes
LOOKALIKE_PAIR = "glyphs-digits"
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
    "dp_hybrid", "dp_lora", "dp_ldm", "dp_mepf", "dp_layer_search", "dp_embedding_sgd", "direct_conditioning",
    "adapter_mixture",
)  # fmt: skip
# methods whose whole private part is the one noisy sum of `controls.noisy_class_sums`; their records name no accountant
_ONE_SUM = ("dp_deepsets", "nearest_public", "noisy_class_means")
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
}
_START, _END = "<!-- results:start -->", "<!-- results:end -->"


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


def epsilon_label(epsilon: float) -> str:
    """`0.5`, `1`, `∞ (no noise)` or `0 (no private data)`."""
    if epsilon == 0:
        return "0 (no private data)"
    return "∞ (no noise)" if math.isinf(epsilon) else f"{epsilon:g}"


def value(scores: pd.DataFrame, score: str) -> str:
    """Mean and standard deviation over the given rows as text, `0.86 ± 0.01`; a dash if there is none."""
    known = _known(scores, score)
    if known.empty:
        return "–"
    digits = 1 if score == "frechet_distance" else 2
    text = f"{known.mean():.{digits}f}"
    return f"{text} ± {known.std():.{digits}f}" if len(known) > 1 else text


def score_table(scores: pd.DataFrame, pair: str, score: str) -> str:
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
    """
    chosen = select(scores, pair)
    chosen = chosen.loc[_known(chosen, score).index]
    if chosen.empty:
        return f"*No {score_name(score)} of {pair} on record: `hyperdp compare` makes records.*"
    budgets = sorted(set(chosen["epsilon"]))
    head = [f"{SCORE_LABELS.get(score, score)}, by ε", *("∞" if math.isinf(e) else f"{e:g}" for e in budgets)]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * len(budgets)]
    for method in order(set(chosen["method"])):
        mine = chosen[chosen["method"] == method]
        cells = [value(mine[mine["epsilon"] == epsilon], score) for epsilon in budgets]
        lines.append("| " + " | ".join([METHOD_LABELS.get(method, method), *cells]) + " |")
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


def results_block(scores: pd.DataFrame, pair: str = MAIN_PAIR) -> str:
    """What the README says about the results: two tables and, for each rival, where the method wins and loses."""
    chosen = select(scores, pair)
    if chosen.empty:
        return f"*No records of {pair} yet: `hyperdp compare` makes them.*"
    tables = [score_table(chosen, pair, score) for score in ("accuracy", "frechet_distance")]
    bullets = [f"- {verdicts(chosen, score, 'dp_deepsets', other)}" for other, score in RIVALS]
    seeds = f"Seeds: {chosen['seed'].nunique()}; private images: {_numbers(chosen['num_private'])}."
    return "\n\n".join([*tables, seeds, "\n".join(bullets)])


def common_table(scores: pd.DataFrame, pair: str) -> str:
    """Everything about every cell as a Markdown table: a row per method, epsilon and number of images.

    Scores are mean ± standard deviation over seeds; seconds are means, training or release plus sampling.

    Parameters
    ----------
    scores
        From `records.load_records`; choose rows with `select`.
    pair
        Public-private pair.
    """
    chosen = select(scores, pair)
    if chosen.empty:
        return "*No records at these parameters.*"
    features = ", ".join(sorted(set(_column(chosen, "scores.features").dropna()))) or "none named"
    head = (
        "method", "ε", "n", "seeds", f"Fréchet distance ({features} features)", "precision", "recall", "accuracy",
        "trained parameters", "noise dimension", "releases", "accountant", "seconds",
    )  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * 10 + "---|---:|"]
    for method in order(set(chosen["method"])):
        for (epsilon, size), cell in chosen[chosen["method"] == method].groupby(["epsilon", "num_private"]):
            seconds = sum(_column(cell, f"seconds.{part}").fillna(0.0) for part in ("train", "release", "sample"))
            row = (
                METHOD_LABELS.get(method, method),
                _budget(epsilon),
                f"{size:,}",
                str(cell["seed"].nunique()),
                *(value(cell, score) for score in ("frechet_distance", "precision", "recall", "accuracy")),
                *(_numbers(cell[name]) for name in ("trained_parameters", "noise_dimension", "num_releases")),
                accountant(cell),
                f"{seconds.mean():.0f}",
            )
            lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def accountant(cell: pd.DataFrame) -> str:
    """By which accounting the records of one method state their epsilon, in a few words."""
    if cell["epsilon"].isin((0.0, math.inf)).all():
        return "none"
    if set(cell["method"]) <= set(_ONE_SUM):
        return "analytic Gaussian"
    found = set()
    for conversion, charges in zip(_column(cell, "settings.accountant"), _column(cell, "settings.ledger"), strict=True):
        if isinstance(conversion, str):
            found.add(short_accountant(conversion, charges if isinstance(charges, list) else ()))
    return ", ".join(sorted(found)) or "not on record"


def short_accountant(conversion: str, charges: Iterable[str] = ()) -> str:
    """A certificate's `conversion` in a few words; the ledger's descriptions are more precise where they say it.

    >>> short_accountant("the larger of the PRV and the PLD accountant; analytic Gaussian for full batches",
    ...                  ["DP-SGD LoRA, per_class: PRV accountant with Poisson sampling"])
    'PRV and PLD'
    >>> short_accountant("analytic Gaussian mechanism with discretisation slack; rho is exact")
    'analytic Gaussian'
    """
    said = " ".join(charges)
    if "Papernot & Steinke" in said:
        return "Rényi, random number of trials"
    if conversion.startswith("the larger of"):  # which of its two routes, the charge says
        if "group privacy" in said:
            return "PRV and PLD, group privacy for two"
        return "analytic Gaussian" if "full batches compose exactly" in said else "PRV and PLD"
    return conversion.split(" mechanism")[0].split(",")[0]


def missing_command(
    scores: pd.DataFrame,
    pair: str,
    methods: Iterable[str],
    epsilons: Iterable[float],
    num_private: int,
    *,
    data_set: str = "digits",
    seeds: int = 3,
) -> str:
    """The command that makes the cells that are not on record, as Markdown; what is on record is not run again.

    Parameters
    ----------
    methods, epsilons
        The grid that should be there.
    data_set
        As after ``--private``.
    seeds
        Seeds 0 .. seeds - 1 of each cell.
    """
    budgets = sorted({epsilon for epsilon in epsilons if 0 < epsilon < math.inf})
    missing = []
    for method in order(set(methods)):
        for epsilon in budgets:
            cell = select(scores, pair, method=method, epsilon=epsilon, num_private=num_private)
            lacking = seeds - cell["seed"].nunique()
            if lacking > 0:
                missing.append((method, epsilon, lacking))
    if not missing:
        return "*No cell is missing.*"
    absent = sum(lacking for *_, lacking in missing)
    asked = " ".join(dict.fromkeys(method for method, *_ in missing))
    at = " ".join(f"{epsilon:g}" for epsilon in sorted({epsilon for _, epsilon, _ in missing}))
    command = (
        f"hyperdp compare --private {data_set} --methods {asked} --epsilon {at} --num-private {num_private} "
        f"--seeds {seeds} --out book/results"
    )
    total = len(set(methods)) * len(budgets) * seeds
    return f"{absent} of {total} cells are not on record. This makes them:\n\n```bash\n{command}\n```"


def certificate_block(certificate: Certificate) -> str:
    """A certificate's sentence and its ledger, entry by entry, as Markdown."""
    lines = ["| charged | as | ε | δ | noise multiplier | sample rate | steps |", "|---|---|---:|---:|---:|---:|---:|"]
    for entry in certificate.ledger:
        noise = "–" if entry.noise_multiplier is None else f"{entry.noise_multiplier:.4g}"
        cost = "∞" if math.isinf(entry.epsilon) else f"{entry.epsilon:.4g}"
        lines.append(
            f"| {entry.description} | {entry.kind} | {cost} | {entry.delta:g} | {noise} | {entry.sample_rate:.3g} "
            f"| {entry.steps} |"
        )
    return "\n".join([f"> {certificate.sentence}", "", *lines])


def recorded_charges(scores: pd.DataFrame) -> str:
    """Certificate and ledger of the given records, each text once, as Markdown."""
    lines = []
    for sentence, charges in zip(
        _column(scores, "settings.certificate"), _column(scores, "settings.ledger"), strict=True
    ):
        if isinstance(sentence, str):
            charged = f" Charged: {'; '.join(charges)}." if isinstance(charges, list) else ""
            lines.append(f"> {sentence}{charged}")
    return "\n\n".join(dict.fromkeys(lines)) or "*No certificate at these parameters on record.*"


def choices_table(tried: Mapping[str, Iterable[Any]], used: Mapping[str, Mapping[str, Any]]) -> str:
    """What is searched on public data, and what is used, as a Markdown table.

    Parameters
    ----------
    tried
        Setting to the values that the search draws from.
    used
        Heading (``"ε = 1"``, ``"default"``) to the configuration in use.
    """
    if not tried:
        return "*Nothing about it is searched.*"
    lines = ["| setting | tried | " + " | ".join(used) + " |", "|---|---|" + "---|" * len(used)]
    for name, values in tried.items():
        # the search knows batches by their share of a class, the configuration by their size
        key = "expected_batch_size" if name == "batch_share" else name
        shown = ", ".join(dict.fromkeys(_plain(value, name) for value in values))
        chosen = (_plain(config.get(key, ...), key) for config in used.values())
        lines.append("| " + " | ".join([key.replace("_", " "), shown, *chosen]) + " |")
    return "\n".join(lines)


def _plain(setting: Any, name: str) -> str:
    if setting is ...:
        return "–"
    if name in ("batch_share", "expected_batch_size") and (setting is None or setting == 1.0 or setting == math.inf):
        return "all images"
    if name == "batch_share" and setting < 1:
        return f"{setting:g} of a class"
    if setting is None:  # JSON has no infinity
        return "inf"
    if isinstance(setting, float):
        return f"{setting:g}"
    # a pattern of layer names has pipes, which end a table's cell
    text = str(setting).replace("|", "\\|")
    return f"`{text}`" if "\\" in text else text


def properties_table(made: Mapping[str, tuple[Any, Certificate]], scores: pd.DataFrame) -> str:
    """What each method does to private data, as a Markdown table: a row per method.

    Parameters
    ----------
    made
        Method to what a run of it returned: something with ``config``, ``trained_parameters``, ``noise_dimension`` and
        ``num_releases``, and its certificate. It says what is charged, how labels are used, and by which accountant.
    scores
        From `records.load_records`, at one budget: real runs, which go before ``made``. Without a record the sizes of
        ``made`` are given, in brackets.
    """
    head = (
        "method", "what touches private data", "releases", "noise dimension", "trained parameters", "accountant",
        "labels",
    )  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|---|---|---:|---:|---:|---|---|"]
    for method in order(set(made)):
        trained, certificate = made[method]
        record = scores[scores["method"] == method] if len(scores) else scores
        sizes = [
            _numbers(record[name]) if len(record) else f"({getattr(trained, name):,})"
            for name in ("num_releases", "noise_dimension", "trained_parameters")
        ]
        charges = [entry.description for entry in certificate.ledger]
        how = "none" if math.isinf(certificate.epsilon) else short_accountant(certificate.conversion, charges)
        mode = getattr(trained.config, "mode", None)
        if len(record):  # of the real run, where it says
            how = accountant(record)
            charges = next((found for found in _column(record, "settings.ledger") if isinstance(found, list)), charges)
            mode = next((found for found in _column(record, "settings.mode") if isinstance(found, str)), mode)
        touched = "; ".join(charge.split(": ")[0].split(";")[0] for charge in charges)
        if mode is None:  # what clips gradients trains; nothing that trains one model for all classes lacks a mode
            mode = "per_class" if hasattr(trained.config, "clip_norm") else "one row of the sum per class"
        labels = {"per_class": "one training per class", "shared": "one training, jointly"}.get(mode, mode)
        lines.append("| " + " | ".join([METHOD_LABELS.get(method, method), touched, *sizes, how, labels]) + " |")
    return "\n".join(lines)


def trials_table(folder: str | Path) -> str:
    """The search for settings, from its trial records: candidates, rehearsals and the best score, as Markdown."""
    groups: dict[tuple[str, float], dict[str, list[dict]]] = {}
    for path in sorted(Path(folder).rglob("*_candidate*_set*.json")) if Path(folder).is_dir() else ():
        trial = json.loads(path.read_text(encoding="utf-8"))
        epsilon = math.inf if trial["epsilon"] is None else float(trial["epsilon"])
        candidate = path.stem.rsplit("_set", 1)[0]
        groups.setdefault((trial["method"], epsilon), {}).setdefault(candidate, []).append(trial)
    if not groups:
        return "*No trials on record: `python -m hyperdp_lib.tuning` makes them.*"
    head = ("method", "ε", "candidates", "trials", "rehearsal: images, classes", "best Fréchet distance", "median")
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * 6]
    for method in order({method for method, _ in groups}):
        for epsilon in sorted(e for m, e in groups if m == method):
            found = groups[method, epsilon]
            longest = max(len(trials) for trials in found.values())
            means = [_mean_distance(trials) for trials in found.values()]
            best = min(_mean_distance(trials) for trials in found.values() if len(trials) == longest)
            sizes = {(trial["num_private"], trial["num_classes"]) for trials in found.values() for trial in trials}
            row = (
                METHOD_LABELS.get(method, method),
                _budget(epsilon),
                str(len(found)),
                str(sum(len(trials) for trials in found.values())),
                "; ".join(f"{images:,}, {classes}" for images, classes in sorted(sizes)),
                f"{best:.1f}",
                f"{pd.Series(means).median():.1f}",
            )
            lines.append("| " + " | ".join(row) + " |")
    counts = {len(found) for found in groups.values()}
    if len(counts) == 1:
        after = f"Every method on record had {counts.pop()} candidates."
    else:
        after = f"The numbers of candidates on record are *not* equal: {min(counts)} to {max(counts)}."
    return "\n".join([*lines, "", after])


def _mean_distance(trials: list[dict]) -> float:
    return float(pd.Series([trial["scores"]["frechet_distance"] for trial in trials]).mean())


def layer_grid(folder: str | Path) -> str:
    """Accuracy by subset of tuned layers and by epsilon, and what follows for the claim, as Markdown.

    Reads what `python -m hyperdp_lib.baselines.layer_classification` wrote.
    """
    blocks = []
    for path in sorted(Path(folder).glob("*.json")) if Path(folder).is_dir() else ():
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.get("summary") and not path.stem.endswith("-smoke"):
            blocks.append(_layer_grid(path.stem, content))
    command = "`python -m hyperdp_lib.baselines.layer_classification --out book/results/layers`"
    return "\n\n".join(blocks) or f"*No grid of layers on record: {command} makes it.*"


def _layer_grid(data_set: str, content: Mapping[str, Any]) -> str:
    subsets = content["settings"]["subsets"]
    parameters = {cell["subset"]: cell["trained_parameters"] for cell in content["cells"].values()}
    heads = [f"{subset.replace('_', ' ')} ({parameters.get(subset, 0):,})" for subset in subsets]
    seeds = len({cell["seed"] for cell in content["cells"].values()})
    lines = [f"| {data_set}: accuracy, by ε | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(subsets)]
    for row in content["summary"]:
        cells = []
        for subset in subsets:
            spread = row["std"].get(subset)
            text = "–" if subset not in row["mean"] else f"{row['mean'][subset]:.3f}"
            text += "" if spread is None else f" ± {spread:.3f}"
            mark = "**" if subset == row["best"] else "*" if subset in row["not_worse"] else ""
            cells.append(f"{mark}{text}{mark}")
        lines.append(f"| {_budget(row['epsilon'])} | " + " | ".join(cells) + " |")
    legend = (
        "In brackets: trained parameters. Bold: the best mean of its row; italic: within two standard errors of it. "
        f"Seeds: {seeds}."
    )
    return "\n".join([*lines, "", legend, "", best_subset_sentence(content["summary"], seeds)])


def best_subset_sentence(summary: Iterable[Mapping[str, Any]], seeds: int) -> str:
    """Whether the best subset of layers changes with epsilon; "clearly" only beyond two standard errors, both ways."""
    rows = [row for row in summary if row["epsilon"] is not None]
    best = {row["best"] for row in rows}
    if len(rows) < 2:
        return "One budget on record: nothing can be said about a change with ε."
    if len(best) == 1:
        same = _words(best.pop())
        return f"The best subset is {same} at every finite ε on record: this grid does not show the claim."
    for low, high in itertools.combinations(rows, 2):
        clear = high["best"] not in low["not_worse"] and low["best"] not in high["not_worse"]
        if low["best"] != high["best"] and clear and seeds > 1:
            return (
                f"The best subset changes with ε: {_words(low['best'])} at ε = {_budget(low['epsilon'])}, "
                f"{_words(high['best'])} at ε = {_budget(high['epsilon'])}, each clearly better there than the other."
            )
    found = "; ".join(f"{_words(row['best'])} at ε = {_budget(row['epsilon'])}" for row in rows)
    return f"The best mean is not always the same subset's ({found}), but no change is beyond the spread over seeds."


def _words(subset: str) -> str:
    return f"*{subset.replace('_', ' ')}*"


def _budget(epsilon: float | None) -> str:
    return "∞" if epsilon is None or math.isinf(epsilon) else f"{epsilon:g}"


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
    if _known(mine, score).empty or _known(theirs, score).empty:
        missing = our_label if _known(mine, score).empty else other_label
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
        if not _known(mine, score).empty and not _known(theirs, score).empty:
            found.setdefault(_verdict(mine, theirs, score), []).append("∞" if math.isinf(epsilon) else f"{epsilon:g}")
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
    if _known(mine, score).empty:
        return f"{where}: nothing on record for {our_label}."
    found: dict[str, list[str]] = {}
    for method in others:
        theirs = at_epsilon[at_epsilon["method"] == method]
        known = not _known(theirs, score).empty
        judged = _verdict(theirs, mine, score) if known else "not on record"
        numbers = f" ({value(theirs, score)})" if known else ""
        found.setdefault(judged, []).append(METHOD_LABELS.get(method, method) + numbers)
    heads = dict(zip(_VERDICTS, ("better than it are", "worse are", "not told apart by these seeds are"), strict=False))
    heads |= {"too few seeds to tell": "on too few seeds to tell are", "not on record": "not on record are"}
    parts = [f"{heads[key]} {', '.join(found[key])}" for key in (*_VERDICTS, "not on record") if key in found]
    return f"{where}, where {our_label} has {value(mine, score)}: {'; '.join(parts)}."


def score_name(score: str) -> str:
    """A score's name inside a sentence: `downstream accuracy`, `Fréchet distance`."""
    return SCORE_LABELS.get(score, score).split(" (")[0]


def _verdict(mine: pd.DataFrame, theirs: pd.DataFrame, score: str) -> str:
    """One of `_VERDICTS`; both sides have the score."""
    ours_known, others_known = _known(mine, score), _known(theirs, score)
    if min(len(ours_known), len(others_known)) < 2:
        return "too few seeds to tell"
    gap = float(ours_known.mean() - others_known.mean()) * (-1 if score == "frechet_distance" else 1)
    error = math.sqrt(sum(float(known.var()) / len(known) for known in (ours_known, others_known)))
    if abs(gap) <= 2 * error:
        return "no difference beyond the spread over seeds"
    return "better" if gap > 0 else "worse"


def _numbers(column: pd.Series) -> str:
    return ", ".join(f"{number:,}" for number in sorted(set(column)))


def write_table(readme: str | Path, folder: str | Path, pair: str = MAIN_PAIR) -> None:
    """Replace the text between the two `results` markers of a Markdown file by what the records say."""
    path = Path(readme)
    text = path.read_text(encoding="utf-8")
    if _START not in text or _END not in text:
        raise InputError(f"{path} has no {_START} ... {_END}: put the two markers where the table belongs")
    before, rest = text.split(_START, 1)
    after = rest.split(_END, 1)[1]
    block = results_block(load_records(folder), pair)
    path.write_text(f"{before}{_START}\n{block}\n{_END}{after}", encoding="utf-8")


def _column(scores: pd.DataFrame, name: str) -> pd.Series:
    """A column that records may lack altogether."""
    return scores[name] if name in scores.columns else pd.Series(math.nan, index=scores.index, dtype=object)


def _known(scores: pd.DataFrame, score: str) -> pd.Series:
    column = f"scores.{score}"
    return scores[column].dropna() if column in scores.columns else pd.Series(dtype=float)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m hyperdp_lib.report", description=__doc__.splitlines()[0])
    parser.add_argument("readme", help="Markdown file with the two results markers, rewritten in place")
    parser.add_argument("--records", default="book/results", help="folder of records (default: %(default)s)")
    parser.add_argument("--pair", default=MAIN_PAIR, help="public-private pair (default: %(default)s)")
    chosen = parser.parse_args(arguments)
    write_table(chosen.readme, chosen.records, chosen.pair)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
