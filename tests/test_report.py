"""Tables and sentences follow the records: they say better, worse or neither, and what is missing."""

import math
from pathlib import Path

import pytest

from hyperdp_lib import report
from hyperdp_lib.data import InputError
from hyperdp_lib.records import Record, load_records

ACCURACY = {
    ("dp_deepsets", 1.0): (0.80, 0.82),
    ("dp_lora", 1.0): (0.20, 0.22),
    ("dp_deepsets", None): (0.81, 0.83),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for (method, epsilon), values in ACCURACY.items():
        for seed, accuracy in enumerate(values):
            Record(
                *("glyphs-digits", method, epsilon, 1e-5, "add_or_remove_one", 100, seed),
                scores={"accuracy": accuracy, "frechet_distance": 500 - 100 * accuracy},
                provenance={"command": f"hyperdp compare --methods {method}"},
            ).save(tmp_path)
    return tmp_path


def test_table_has_a_row_per_method_and_epsilon(folder: Path) -> None:
    lines = report.results_table(load_records(folder), "glyphs-digits", commands=True).splitlines()
    assert lines[2:] == [
        "| DP-DeepSets | 1 | 0.81 ± 0.01 | 419 ± 1 | 2 | `hyperdp compare --methods dp_deepsets` |",
        "| DP-DeepSets | ∞ (no noise) | 0.82 ± 0.01 | 418 ± 1 | 2 "
        "| `hyperdp compare --methods dp_deepsets` |",
        "| DP-SGD LoRA | 1 | 0.21 ± 0.01 | 479 ± 1 | 2 | `hyperdp compare --methods dp_lora` |",
    ]
    assert "No records of other yet" in report.results_table(load_records(folder), "other")


def test_sentence_follows_the_numbers(folder: Path) -> None:
    table = load_records(folder)
    ours_first = report.comparison_sentence(table, "accuracy", "dp_deepsets", "dp_lora", 1.0)
    assert ours_first == (
        "At ε = 1, the downstream accuracy is 0.81 ± 0.01 for DP-DeepSets and 0.21 ± 0.01 for DP-SGD LoRA: "
        "DP-DeepSets is better."
    )
    reverse = report.comparison_sentence(table, "accuracy", "dp_lora", "dp_deepsets", 1.0)
    assert reverse.endswith("DP-SGD LoRA is worse.")
    distance = report.comparison_sentence(table, "frechet_distance", "dp_deepsets", "dp_lora", 1.0)
    assert distance.endswith("DP-DeepSets is better.")  # the smaller distance
    same = report.comparison_sentence(table, "accuracy", "dp_deepsets", "dp_deepsets", 1.0)
    assert same.endswith("no difference beyond the spread over seeds.")
    first = table[table["seed"] == 0]
    one_seed = report.comparison_sentence(first, "accuracy", "dp_deepsets", "dp_lora", 1.0)
    assert one_seed.endswith("too few seeds to say which is better.")
    missing = report.comparison_sentence(table, "accuracy", "dp_deepsets", "nearest_public", 1.0)
    assert missing == "At ε = 1 there is no downstream accuracy on record for nearest public data."


def test_select_keeps_epsilon_zero_and_infinity_apart(folder: Path) -> None:
    table = load_records(folder)
    assert len(report.select(table, "glyphs-digits", method="dp_deepsets", epsilon=math.inf)) == 2
    assert report.select(table, "glyphs-digits", epsilon=0.0).empty


def test_readme_table_is_replaced_between_its_markers(folder: Path, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- results:start -->\nold\n<!-- results:end -->\nafter\n", encoding="utf-8")
    assert report.main([str(readme), "--records", str(folder)]) == 0
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| DP-SGD LoRA | 1 | 0.21 ± 0.01 |" in text
    report.main([str(readme), "--records", str(folder)])
    assert readme.read_text(encoding="utf-8") == text
    readme.write_text("no markers", encoding="utf-8")
    with pytest.raises(InputError, match="put the two markers"):
        report.main([str(readme), "--records", str(folder)])
