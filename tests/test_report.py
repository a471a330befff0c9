"""Tables and sentences follow the records: they say better, worse or neither, and what is missing."""

import json
import math
from pathlib import Path

import pytest

from hyperdp_lib.pages import figures, report
from hyperdp_lib.records import Record, load_records

PAIR = report.MAIN_PAIR
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
                *(PAIR, method, epsilon, 1e-5, "add_or_remove_one", 100, seed),
                scores={"accuracy": accuracy, "frechet_distance": 500 - 100 * accuracy},
                provenance={"command": f"hyperdp compare --methods {method}"},
            ).save(tmp_path)
    return tmp_path


def test_table_has_a_row_per_method_and_a_column_per_epsilon(folder: Path) -> None:
    table = load_records(folder)
    assert report.score_table(table, PAIR, "accuracy").splitlines() == [
        "| downstream accuracy (higher is better), by ε | 1 | ∞ |",
        "|---|---:|---:|",
        "| DP-DeepSets | 0.81 ± 0.01 | 0.82 ± 0.01 |",
        "| DP-SGD LoRA | 0.21 ± 0.01 | – |",
    ]
    assert "418.0 ± 1.4" in report.score_table(table, PAIR, "frechet_distance")
    assert report.score_table(table, "other", "accuracy").startswith("*No downstream accuracy of other on record")
    assert report.score_table(table, PAIR, "recall").startswith("*No recall")


def test_method_without_a_score_has_no_row(folder: Path) -> None:
    classifier = Record(PAIR, "noisy_class_means", 1.0, 1e-5, "add_or_remove_one", 100, 0, scores={"accuracy": 0.7})
    classifier.save(folder)
    table = load_records(folder)
    assert "nearest noisy class mean" in report.score_table(table, PAIR, "accuracy")
    assert "nearest noisy class mean" not in report.score_table(table, PAIR, "frechet_distance")


def test_settings_are_listed_once_each(folder: Path) -> None:
    table = load_records(folder).assign(**{"settings.r": 4.0, "settings.mode": "shared"})
    columns = {"epsilon": "ε", "settings.r": "r", "settings.mode": "adapters", "settings.unknown": "batch"}
    assert report.settings_table(table, columns).splitlines() == [
        "| ε | r | adapters | batch |",
        "|---|---|---|---|",
        "| 1 | 4 | shared | – |",
        "| inf | 4 | shared | – |",
    ]
    assert report.settings_table(table[:0], columns) == "*No records at these parameters.*"


def test_commands_are_listed_once_each(folder: Path) -> None:
    assert report.commands(load_records(folder)).splitlines() == [
        "```bash",
        "hyperdp compare --methods dp_deepsets",
        "hyperdp compare --methods dp_lora",
        "```",
    ]


def test_verdicts_say_where_ours_wins_and_loses(folder: Path) -> None:
    for seed, accuracy in enumerate((0.9, 0.92)):
        for method, here in (("dp_deepsets", 0.5), ("dp_lora", accuracy)):
            scores = {"accuracy": here, "frechet_distance": 300.0}
            Record(PAIR, method, 10.0, 1e-5, "add_or_remove_one", 100, seed, scores=scores).save(folder)
    table = load_records(folder)
    assert report.verdicts(table, "accuracy", "dp_deepsets", "dp_lora") == (
        "Downstream accuracy, DP-DeepSets against DP-SGD LoRA: better at ε = 1; worse at ε = 10."
    )
    distance = report.verdicts(table, "frechet_distance", "dp_deepsets", "dp_lora")
    assert distance.endswith("better at ε = 1; no difference beyond the spread over seeds at ε = 10.")
    assert report.verdicts(table, "accuracy", "dp_deepsets", "nearest_public").endswith("nothing on record.")
    one_seed = report.verdicts(table[table["seed"] == 0], "accuracy", "dp_deepsets", "dp_lora")
    assert one_seed.endswith("too few seeds to tell at ε = 1, 10.")


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
    assert one_seed.endswith("too few seeds to tell.")
    missing = report.comparison_sentence(table, "accuracy", "dp_deepsets", "nearest_public", 1.0)
    assert missing == "At ε = 1 there is no downstream accuracy on record for nearest public data."


def test_select_keeps_epsilon_zero_and_infinity_apart(folder: Path) -> None:
    table = load_records(folder)
    assert len(report.select(table, PAIR, method="dp_deepsets", epsilon=math.inf)) == 2
    assert report.select(table, PAIR, epsilon=0.0).empty


def test_training_table_reads_the_manifest() -> None:
    stage = {"tasks": 64, "images": 8}
    last = {"step": 4000, "seconds": 600, "loss": 0.25, "held_out": 0.24, "held_out_no_adapter": 0.32}
    manifest = {
        "command": "hyperdp train --preset glyphs",
        "device": "CPU (x86_64)",
        "preset": {"base_stage": stage, "joint_stage": stage},
        "stages": {
            "base": {"steps": 1200, "seconds": 300, "last": {"step": 1200, "seconds": 300, "loss": 0.35}},
            "joint": {"steps": 4000, "seconds": 600, "last": last},
        },
    }
    text = report.training_table(manifest)
    assert "| base | 1,200 | 64 x 8 | 5 | loss 0.350 |" in text
    assert "| joint | 4,000 | 64 x 8 | 10 | loss 0.250, loss on held-out tasks 0.240, without adapters 0.320 |" in text
    assert "Together 15 minutes on CPU (x86_64), by `hyperdp train --preset glyphs`." in text
    assert "0.240 with adapters and 0.320 without: 25% lower." in text
    assert "does not say" in report.training_table({"name": "untold"})


def test_shipped_manifest_makes_a_table() -> None:
    from hyperdp_lib.pretrained import resolve

    manifest = json.loads((resolve("glyphs") / "manifest.json").read_text(encoding="utf-8"))
    assert report.training_table(manifest)


def test_every_method_has_a_label_and_a_colour_of_its_own() -> None:
    from hyperdp_lib.experiments.methods import METHODS

    assert set(METHODS) <= set(report.METHOD_LABELS) == set(figures.METHOD_COLOURS)
    colours = [tuple(round(part, 2) for part in colour) for colour in figures.METHOD_COLOURS.values()]
    assert len(set(colours)) == len(colours)
    assert set(report.OTHER_METHODS) <= set(report.METHOD_LABELS)


def test_sets_stand_side_by_side_marked_against_one_method(folder: Path) -> None:
    for seed, distance in enumerate((50.0, 52.0)):
        for method, shift in (("dp_deepsets", 0), ("dp_mepf", 1), ("dp_ldm", -30)):
            scores = {"accuracy": None, "frechet_distance": distance + shift}
            Record("p-other", method, 1.0, 1e-5, "add_or_remove_one", 100, seed, scores=scores).save(folder)
    Record("p-other", "dp_lora", 1.0, 1e-5, "add_or_remove_one", 7, 0, scores=scores).save(folder)
    table, pairs = load_records(folder), {PAIR: "digits", "p-other": "others"}
    asked = dict(num_private=100, against="dp_deepsets")
    assert report.sets_table(table, pairs, (1.0, math.inf, 1.0), **asked).splitlines() == [
        "| method | digits, ε = 1 | digits, ε = ∞ | others, ε = 1 | others, ε = ∞ |",
        "|---|---:|---:|---:|---:|",
        "| DP-DeepSets | 419.0 ± 1.4 | 418.0 ± 1.4 | 51.0 ± 1.4 | – |",
        "| DP-SGD LoRA | 479.0 ± 1.4 ▼ | – | – | – |",
        "| DP-LDM | – | – | 21.0 ± 1.4 ▲ | – |",
        "| DP-MEPF | – | – | 52.0 ± 1.4 | – |",  # not told apart
    ]
    off = report.sets_table(table, pairs, (8.0, math.inf), **asked).splitlines()
    assert off[0] == "| method | digits, ε = ∞ | others, ε = ∞ |"
    assert off[-1] == "*No record at ε = 8; on record: ε = 1.*"
    assert report.sets_table(table, pairs, (8.0,), **asked) == off[-1]
    assert report.no_record(table[:0], 8.0) == "*No record at ε = 8; nor at any other.*"
    one = report.sets_table(table, pairs, (1.0,), num_private=100).splitlines()
    assert one[0] == "| method | digits | others |" and not any(sign in line for line in one for sign in "▲▼")
    assert "No records" in report.sets_table(table, {PAIR: "digits"}, (1.0,), num_private=3)


def test_standing_names_who_beats_ours(folder: Path) -> None:
    for seed in range(2):
        scores = {"accuracy": 0.5, "frechet_distance": 100.0 + seed}
        Record(PAIR, "dp_ldm", 1.0, 1e-5, "add_or_remove_one", 100, seed, scores=scores).save(folder)
    table = load_records(folder)
    others = ("dp_lora", "dp_ldm", "dp_mepf")
    assert report.standing(table, "frechet_distance", "dp_deepsets", others, 1.0) == (
        "Fréchet distance at ε = 1, where DP-DeepSets has 419.0 ± 1.4: better than it are DP-LDM (100.5 ± 0.7); "
        "worse are DP-SGD LoRA (479.0 ± 1.4); not on record are DP-MEPF."
    )
    one_seed = report.standing(table[table["seed"] == 0], "accuracy", "dp_deepsets", others[:1], 1.0)
    assert one_seed.endswith("where DP-DeepSets has 0.80: on too few seeds to tell are DP-SGD LoRA (0.20).")
    same = report.standing(table, "accuracy", "dp_deepsets", ["dp_deepsets"], 1.0)
    assert same.endswith("not told apart by these seeds are DP-DeepSets (0.81 ± 0.01).")
    assert report.standing(table, "accuracy", "dp_deepsets", others, 4.0).endswith("nothing on record for DP-DeepSets.")


def _lever(lever: str, training: int, *distances: float, **more: list[float]) -> dict:
    place = {"weights": "glyphs", "set": "digits/3", "num_private": 128, "training": training}
    scores = {"frechet_distance": list(distances), "numbers_released": 17 + 16 * training, **more}
    return {**place, "lever": lever, **scores}


def test_levers_are_judged_in_both_trainings() -> None:
    rows = [
        _lever("dp_deepsets_nested", 0, 50.0, 51.0), _lever("dp_deepsets_nested_refined", 0, 40.0, 41.0),
        _lever("dp_deepsets_looks", 0, 60.0, 61.0), _lever("dp_deepsets_cells", 0, 50.0, 51.0),
        _lever("dp_deepsets_nested", 1, 45.0, 46.0), _lever("dp_deepsets_nested_refined", 1, 40.0, 41.0),
        _lever("dp_deepsets_looks", 1, 40.0, 41.0), _lever("dp_deepsets_cells", 1, 60.0, 61.0),
    ]  # fmt: skip
    table = report.levers_table(rows, "frechet_distance").splitlines()[2:]
    assert table[0] == (
        "| digits/3 (public: glyphs) | 128 | nested | 50.5 ± 0.7 | 45.5 ± 0.7 | the second is better | 17 and 33 |"
    )
    assert [line.split("|")[-3].strip() for line in table[1:]] == [
        "better in both", "better in one, worse in the other", "worse in one",
    ]  # fmt: skip
    assert report.levers_sentences(rows, "frechet_distance")[0] == (
        "DP-DeepSets, nested and refined, Fréchet distance, on 1 set: 1 better in both."
    )
    assert report.levers_sentences(rows, "frechet_distance")[-1] == (
        "The second training against the first, Fréchet distance, on 1 set: 1 better."
    )
    assert report.levers_table(rows, "accuracy").count("\n") == 1 and not report.levers_sentences(rows, "accuracy")
    assert report.levers_table(rows[:4], "frechet_distance").count("\n") == 1  # trained once: nothing to judge
    higher = {"accuracy": [0.9, 0.91]}, {"accuracy": [0.8, 0.81]}
    rows = [_lever(name, turn, 1.0, 1.0, **one) for turn in (0, 1)
            for name, one in zip(("dp_deepsets_nested", "dp_deepsets_looks"), higher, strict=True)]  # fmt: skip
    assert "worse in both" in report.levers_table(rows, "accuracy")
