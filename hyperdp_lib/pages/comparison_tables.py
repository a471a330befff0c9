"""Tables of the chapter on rivals: every number of every cell, ledgers, searches, and the grid of layers.

Like `hyperdp_lib.pages.report` they turn records into Markdown, so that no number in the book is typed by hand.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from hyperdp_lib.certificate import Certificate
from hyperdp_lib.pages.report import METHOD_LABELS, budget, numbers, order, select, value
from hyperdp_lib.records import read_trials

# methods whose whole private part is noisy sums of embeddings, mostly one; their records name no accountant
_SUMS = (
    "hyperdp", "dp_deepsets", "dp_deepsets_refined", "dp_deepsets_nested", "dp_deepsets_nested_refined",
    "dp_deepsets_looks", "dp_deepsets_looks_refined", "dp_deepsets_cells", "dp_deepsets_cells_refined",
    "nearest_public", "noisy_class_means",
)  # fmt: skip


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
                budget(epsilon),
                f"{size:,}",
                str(cell["seed"].nunique()),
                *(value(cell, score) for score in ("frechet_distance", "precision", "recall", "accuracy")),
                *(numbers(cell[name]) for name in ("trained_parameters", "noise_dimension", "num_releases")),
                accountant(cell),
                f"{seconds.mean():.0f}",
            )
            lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def accountant(cell: pd.DataFrame) -> str:
    """By which accounting the records of one method state their epsilon, in a few words."""
    if cell["epsilon"].isin((0.0, math.inf)).all():
        return "none"
    if set(cell["method"]) <= set(_SUMS):
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
    """The commands that make the cells that are not on record, as Markdown, and publish them.

    What is on record at the same methods and budgets is made again and takes the place of the old.

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
        f"--seeds {seeds} --out runs/missing"
    )
    total = len(set(methods)) * len(budgets) * seeds
    made = f"```bash\n{command}\npython -m hyperdp_lib.records runs/missing book/results\n```"
    return f"{absent} of {total} cells are not on record. This makes them:\n\n{made}"


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
            numbers(record[name]) if len(record) else f"({getattr(trained, name):,})"
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
    for trial in read_trials(folder):
        epsilon = math.inf if trial["epsilon"] is None else float(trial["epsilon"])
        candidate = trial["trial"].rsplit("_set", 1)[0]
        groups.setdefault((trial["method"], epsilon), {}).setdefault(candidate, []).append(trial)
    if not groups:
        return "*No trials on record: `python -m hyperdp_lib.experiments.tuning` makes them.*"
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
                budget(epsilon),
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

    Reads what `python -m hyperdp_lib.baselines.layer_grid` wrote.
    """
    blocks = []
    for path in sorted(Path(folder).glob("*.json")) if Path(folder).is_dir() else ():
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.get("summary") and not path.stem.endswith("-smoke"):
            blocks.append(_layer_grid(path.stem, content))
    command = "`python -m hyperdp_lib.baselines.layer_grid --out book/results/layers`"
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
        lines.append(f"| {budget(row['epsilon'])} | " + " | ".join(cells) + " |")
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
                f"The best subset changes with ε: {_words(low['best'])} at ε = {budget(low['epsilon'])}, "
                f"{_words(high['best'])} at ε = {budget(high['epsilon'])}, each clearly better there than the other."
            )
    found = "; ".join(f"{_words(row['best'])} at ε = {budget(row['epsilon'])}" for row in rows)
    return f"The best mean is not always the same subset's ({found}), but no change is beyond the spread over seeds."


def _words(subset: str) -> str:
    return f"*{subset.replace('_', ' ')}*"


def _column(scores: pd.DataFrame, name: str) -> pd.Series:
    """A column that records may lack altogether."""
    return scores[name] if name in scores.columns else pd.Series(math.nan, index=scores.index, dtype=object)
