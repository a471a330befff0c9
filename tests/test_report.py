"""Tables and sentences follow the records: they say better, worse or neither, and what is missing."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from hyperdp_lib import accounting, figures, report
from hyperdp_lib.certificate import DP_SGD, SEEDED_NOISE, Certificate, gaussian_certificate, ledger_certificate
from hyperdp_lib.data import InputError
from hyperdp_lib.ledger import LedgerEntry
from hyperdp_lib.mechanism import GaussianSum
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


def test_readme_table_is_replaced_between_its_markers(folder: Path, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- results:start -->\nold\n<!-- results:end -->\nafter\n", encoding="utf-8")
    assert report.main([str(readme), "--records", str(folder)]) == 0
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| DP-SGD LoRA | 0.21 ± 0.01 |" in text and "better at ε = 1" in text
    report.main([str(readme), "--records", str(folder)])
    assert readme.read_text(encoding="utf-8") == text
    readme.write_text("no markers", encoding="utf-8")
    with pytest.raises(InputError, match="put the two markers"):
        report.main([str(readme), "--records", str(folder)])


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
    from hyperdp_lib.hypernetwork import resolve

    manifest = json.loads((resolve("glyphs") / "manifest.json").read_text(encoding="utf-8"))
    assert report.training_table(manifest)


def test_every_method_has_a_label_and_a_colour_of_its_own() -> None:
    from hyperdp_lib.baselines.methods import METHODS

    assert set(METHODS) <= set(report.METHOD_LABELS) == set(figures.METHOD_COLOURS)
    colours = [tuple(round(part, 2) for part in colour) for colour in figures.METHOD_COLOURS.values()]
    assert len(set(colours)) == len(colours)
    assert set(report.OTHER_METHODS) <= set(report.METHOD_LABELS)


PRV = "DP-SGD LoRA, shared: PRV accountant with Poisson sampling"
LARGER = "the larger of the PRV and the PLD accountant; analytic Gaussian for full batches"


@pytest.fixture
def rivals(folder: Path) -> Path:
    """Two seeds of one rival beside the records of `folder`."""
    for seed, seconds in enumerate((10.0, 30.0)):
        Record(
            *(PAIR, "dp_ldm", 1.0, 1e-5, "add_or_remove_one", 100, seed),
            scores={"accuracy": 0.5, "frechet_distance": 100.0 + seed, "features": "glyphnet", "precision": 0.25},
            seconds={"train": seconds, "sample": 2.0},
            trained_parameters=5120, noise_dimension=512, num_releases=40,
            settings={"accountant": LARGER, "ledger": [PRV]},
        ).save(folder)  # fmt: skip
    return folder


def test_common_table_has_every_number_of_a_cell(rivals: Path) -> None:
    lines = report.common_table(load_records(rivals), PAIR).splitlines()
    assert "Fréchet distance (glyphnet features)" in lines[0]
    assert lines[1].count("|") == lines[0].count("|")
    (row,) = [line for line in lines if line.startswith("| DP-LDM")]
    assert row == (
        "| DP-LDM | 1 | 100 | 2 | 100.5 ± 0.7 | 0.25 ± 0.00 | – | 0.50 ± 0.00 | 5,120 | 512 | 40 | PRV and PLD | 22 |"
    )
    ours = [line for line in lines if line.startswith("| DP-DeepSets")]
    assert [line.split(" | ")[1] for line in ours] == ["1", "∞"]
    assert "| analytic Gaussian |" in ours[0] and "| none |" in ours[1]
    assert [line for line in lines if line.startswith("| DP-SGD LoRA")][0].count("not on record") == 1
    assert report.common_table(load_records(rivals), "other") == "*No records at these parameters.*"


def test_accountants_in_a_few_words() -> None:
    assert report.short_accountant(LARGER, [PRV]) == "PRV and PLD"
    full = "DP-SGD: analytic Gaussian mechanism; full batches compose exactly"
    assert report.short_accountant(LARGER, [full]) == "analytic Gaussian"
    two = "PRV accountant for add_or_remove_one with Poisson sampling; group privacy for two"
    assert report.short_accountant("PLD, and basic composition", [two]) == "PLD"
    assert report.short_accountant(LARGER, [two]) == "PRV and PLD, group privacy for two"
    search = "search among 7 subsets (Renyi accounting of Papernot & Steinke 2022)"
    assert report.short_accountant("PLD, and basic composition", [search]).startswith("Rényi")
    assert report.short_accountant("none") == "none"


def test_missing_cells_are_named_by_the_command_that_makes_them(rivals: Path) -> None:
    table = load_records(rivals)
    text = report.missing_command(table, PAIR, ["dp_deepsets", "dp_ldm", "dp_mepf"], [1.0, math.inf], 100, seeds=2)
    assert text.startswith("2 of 6 cells") and "--methods dp_mepf --epsilon 1 --num-private 100 --seeds 2" in text
    none = report.missing_command(table, PAIR, ["dp_ldm"], [1.0], 100, seeds=2)
    assert none == "*No cell is missing.*"
    assert "6 of 6" in report.missing_command(table, PAIR, ["dp_ldm"], [1.0, 4.0], 99)


def one_sum(epsilon: float = 1.0) -> Certificate:
    config = GaussianSum(dimension=8, noise_multiplier=accounting.noise_multiplier(epsilon, 1e-5))
    return gaussian_certificate(config, 1e-5, epsilon=epsilon, seeded=True)


def dp_sgd() -> Certificate:
    multiplier = 10 * accounting.noise_multiplier(1.0, 1e-5)
    charge = LedgerEntry("dp_sgd", "DP-SGD on something: full batches compose exactly", 1.0, 1e-5,
                         noise_multiplier=multiplier, steps=100)  # fmt: skip
    return ledger_certificate(
        [charge], 1e-5, method="dp_ldm", mechanism=DP_SGD, neighboring_relation="add_or_remove_one",
        rng=SEEDED_NOISE, epsilon=1.0, noise_multiplier=multiplier,
    )  # fmt: skip


def test_certificate_is_shown_with_its_ledger() -> None:
    certificate = one_sum()
    sentence, _, *lines = report.certificate_block(certificate).splitlines()
    assert sentence == f"> {certificate.sentence}" and "NOT PRIVATE" in sentence
    assert lines[2] == "| one noisy sum of embeddings | gaussian | 1 | 1e-05 | 3.731 | 1 | 1 |"


def test_choices_show_what_was_tried_and_what_is_used() -> None:
    used = {"ε = 1": {"clip_norm": 0.1, "expected_batch_size": 36.0}, "default": {"expected_batch_size": None}}
    text = report.choices_table({"clip_norm": (0.1, 1.0), "batch_share": (0.25, 1.0), "layers": (r"a\.(b|c)",)}, used)
    assert text.splitlines() == [
        "| setting | tried | ε = 1 | default |",
        "|---|---|---|---|",
        "| clip norm | 0.1, 1 | 0.1 | – |",
        "| expected batch size | 0.25 of a class, all images | 36 | all images |",
        r"| layers | `a\.(b\|c)` | – | – |",
    ]
    infinite = report.choices_table({"shape": (1.0, math.inf)}, {"ε = 1": {"shape": None}})
    assert infinite.endswith("| shape | 1, inf | inf |")
    assert report.choices_table({}, used) == "*Nothing about it is searched.*"


def test_properties_come_from_records_or_else_from_a_run(rivals: Path) -> None:
    sizes = SimpleNamespace(trained_parameters=0, noise_dimension=16, num_releases=1, config=SimpleNamespace())
    tuned = SimpleNamespace(
        trained_parameters=1, noise_dimension=1, num_releases=2, config=SimpleNamespace(mode="shared")
    )
    made = {"dp_ldm": (tuned, dp_sgd()), "direct_conditioning": (sizes, one_sum())}
    lines = report.properties_table(made, load_records(rivals)).splitlines()
    assert lines[2] == (
        "| DP-LDM | DP-SGD LoRA, shared | 40 | 512 | 5,120 | PRV and PLD | one training, jointly |"
    )
    assert lines[3] == (
        "| direct conditioning | one noisy sum of embeddings | (1) | (16) | (0) | analytic Gaussian "
        "| one row of the sum per class |"
    )
    per_class = SimpleNamespace(**(vars(tuned) | {"config": SimpleNamespace(clip_norm=0.1)}))
    trained = report.properties_table({"dp_embedding_sgd": (per_class, dp_sgd())}, load_records(rivals))
    assert trained.endswith("| one training per class |")
    empty = report.properties_table(made, load_records(rivals)[:0])
    assert "| DP-LDM | DP-SGD on something | (2) | (1) | (1) | analytic Gaussian |" in empty


def trial(folder: Path, method: str, candidate: int, number: int, distance: float) -> None:
    content = {"method": method, "epsilon": 1.0, "num_private": 1440, "num_classes": 10,
               "scores": {"frechet_distance": distance}}  # fmt: skip
    path = folder / f"{method}_eps1_candidate{candidate}_set{number}.json"
    path.write_text(json.dumps(content), encoding="utf-8")


def test_trials_say_whether_all_methods_had_as_many(tmp_path: Path) -> None:
    assert "No trials on record" in report.trials_table(tmp_path / "nowhere")
    for candidate, distance in enumerate((100.0, 50.0, 40.0)):
        trial(tmp_path, "dp_ldm", candidate, 0, distance)
    trial(tmp_path, "dp_ldm", 1, 1, 52.0)
    text = report.trials_table(tmp_path)
    # of those that met most rehearsals, not the lucky one of the first round
    assert "| DP-LDM | 1 | 3 | 4 | 1,440, 10 | 51.0 | 51.0 |" in text
    assert text.endswith("Every method on record had 3 candidates.")
    trial(tmp_path, "dp_mepf", 0, 0, 70.0)
    assert "*not* equal: 1 to 3" in report.trials_table(tmp_path)


def grid(rows: list[tuple[float | None, dict[str, float], list[str]]]) -> list[dict]:
    return [
        {"epsilon": epsilon, "best": max(mean, key=lambda name: mean[name]), "not_worse": as_good, "mean": mean,
         "std": dict.fromkeys(mean, 0.01)}
        for epsilon, mean, as_good in rows
    ]  # fmt: skip


def test_layer_grid_says_no_more_than_its_numbers(tmp_path: Path) -> None:
    head, last = {"head": 0.6, "last_block": 0.5}, {"head": 0.8, "last_block": 0.9}
    changed = grid([(0.5, head, []), (8.0, last, []), (None, last, [])])
    sentence = report.best_subset_sentence(changed, 3)
    assert sentence.startswith("The best subset changes with ε: *head* at ε = 0.5, *last block* at ε = 8")
    assert "no change is beyond" in report.best_subset_sentence(changed, 1)
    unclear = grid([(0.5, head, ["last_block"]), (8.0, last, [])])
    assert "no change is beyond" in report.best_subset_sentence(unclear, 3)
    same = grid([(0.5, head, []), (8.0, head, []), (None, last, [])])
    assert "does not show the claim" in report.best_subset_sentence(same, 3)
    assert "One budget" in report.best_subset_sentence(same[:1], 3)
    cells = {str(seed): {"subset": "head", "trained_parameters": 650, "seed": seed} for seed in (0, 1)}
    content = {"settings": {"subsets": ["head", "last_block"]}, "cells": cells, "summary": changed}
    (tmp_path / "digits.json").write_text(json.dumps(content), encoding="utf-8")
    (tmp_path / "digits-smoke.json").write_text(json.dumps(content), encoding="utf-8")
    text = report.layer_grid(tmp_path)
    assert "| 0.5 | **0.600 ± 0.010** | 0.500 ± 0.010 |" in text and text.count("digits: accuracy") == 1
    assert "head (650)" in text and "Seeds: 2." in text
    assert "No grid of layers" in report.layer_grid(tmp_path / "nowhere")


def test_standing_names_who_beats_ours(rivals: Path) -> None:
    table = load_records(rivals)
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


def test_recorded_certificates_are_shown_once(rivals: Path) -> None:
    table = load_records(rivals)
    assert report.recorded_charges(table[table["method"] == "dp_ldm"]).startswith("*No certificate")
    said = table[table["method"] == "dp_ldm"].assign(**{"settings.certificate": "demonstration."})
    assert report.recorded_charges(said) == f"> demonstration. Charged: {PRV}."
