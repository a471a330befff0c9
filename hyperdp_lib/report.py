"""Records -> tables and sentences, so that no number in the book or the README is typed by hand.

`python -m hyperdp_lib.report README.md` rewrites the results table between the two markers of that file.
All scores are research metrics: they are computed on private test data and are not differentially private.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import pandas as pd

from .data import InputError
from .records import load_records

# method -> what the reader sees, in the order of every table and legend
METHOD_LABELS = {
    "dp_deepsets": "DP-DeepSets",
    "dp_hybrid": "DP-DeepSets, then DP-SGD",
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
    digits = 0 if score == "frechet_distance" else 2
    text = f"{known.mean():.{digits}f}"
    return f"{text} ± {known.std():.{digits}f}" if len(known) > 1 else text


def results_table(scores: pd.DataFrame, pair: str, *, commands: bool = False) -> str:
    """One Markdown row per method and epsilon: mean ± standard deviation over seeds.

    Parameters
    ----------
    scores
        From `records.load_records`.
    pair
        Public-private pair, e.g. `"glyphs-digits"`.
    commands
        Whether to add, to each row, the command that makes its first record.
    """
    chosen = select(scores, pair)
    if chosen.empty:
        return f"*No records of {pair} yet: `hyperdp compare` makes them.*"
    head = ["method", "ε", "accuracy", "Fréchet distance", "seeds", *(["command"] if commands else [])]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for method in order(set(chosen["method"])):
        mine = chosen[chosen["method"] == method]
        for epsilon in sorted(set(mine["epsilon"])):
            rows = mine[mine["epsilon"] == epsilon].sort_values("seed")
            cells = [
                METHOD_LABELS.get(method, method),
                epsilon_label(epsilon),
                value(rows, "accuracy"),
                value(rows, "frechet_distance"),
                str(rows["seed"].nunique()),
            ]
            if commands:
                cells.append(f"`{rows['provenance.command'].iloc[0]}`")
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def comparison_sentence(scores: pd.DataFrame, score: str, ours: str, other: str, epsilon: float) -> str:
    """One sentence comparing two methods at one epsilon, its wording following from the numbers.

    "Better" and "worse" are said only when the means differ by more than two standard errors of their
    difference.
    """
    at_epsilon = scores[scores["epsilon"] == epsilon]
    mine, theirs = (at_epsilon[at_epsilon["method"] == method] for method in (ours, other))
    our_label, other_label = METHOD_LABELS.get(ours, ours), METHOD_LABELS.get(other, other)
    name = "downstream accuracy" if score == "accuracy" else SCORE_LABELS.get(score, score).split(" (")[0]
    where = f"At ε = {epsilon_label(epsilon)}"
    ours_known, others_known = _known(mine, score), _known(theirs, score)
    if ours_known.empty or others_known.empty:
        missing = our_label if ours_known.empty else other_label
        return f"{where} there is no {name} on record for {missing}."
    gap = ours_known.mean() - others_known.mean()
    error = math.sqrt(sum(float(k.var()) / len(k) for k in (ours_known, others_known) if len(k) > 1))
    if score == "frechet_distance":
        gap = -gap
    if min(len(ours_known), len(others_known)) < 2:
        verdict = "too few seeds to say which is better"
    elif abs(gap) <= 2 * error:
        verdict = "no difference beyond the spread over seeds"
    else:
        verdict = f"{our_label} is {'better' if gap > 0 else 'worse'}"
    return (
        f"{where}, the {name} is {value(mine, score)} for {our_label} and {value(theirs, score)} "
        f"for {other_label}: {verdict}."
    )


def write_table(readme: str | Path, folder: str | Path, pair: str = "glyphs-digits") -> None:
    """Replace the text between the two `results` markers of a Markdown file by the table of the records."""
    path = Path(readme)
    text = path.read_text(encoding="utf-8")
    if _START not in text or _END not in text:
        raise InputError(f"{path} has no {_START} ... {_END}: put the two markers where the table belongs")
    before, rest = text.split(_START, 1)
    after = rest.split(_END, 1)[1]
    table = results_table(load_records(folder), pair)
    path.write_text(f"{before}{_START}\n{table}\n{_END}{after}", encoding="utf-8")


def _known(scores: pd.DataFrame, score: str) -> pd.Series:
    column = f"scores.{score}"
    return scores[column].dropna() if column in scores.columns else pd.Series(dtype=float)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m hyperdp_lib.report", description=__doc__.splitlines()[0])
    parser.add_argument("readme", help="Markdown file with the two results markers, rewritten in place")
    parser.add_argument("--records", default="book/results", help="folder of records (default: %(default)s)")
    parser.add_argument("--pair", default="glyphs-digits", help="public-private pair (default: %(default)s)")
    chosen = parser.parse_args(arguments)
    write_table(chosen.readme, chosen.records, chosen.pair)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
