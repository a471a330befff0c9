"""Tables of the chapter on rivals: each number from a record, a certificate or a trial, and no more than they say."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from hyperdp_lib import accounting
from hyperdp_lib.certificate import DP_SGD, SEEDED_NOISE, Certificate, gaussian_certificate, ledger_certificate
from hyperdp_lib.ledger import LedgerEntry
from hyperdp_lib.mechanism import GaussianSum
from hyperdp_lib.pages import comparison_tables as tables
from hyperdp_lib.pages import report
from hyperdp_lib.records import Record, load_records

PAIR = report.MAIN_PAIR
PRV = "DP-SGD LoRA, shared: PRV accountant with Poisson sampling"
LARGER = "the larger of the PRV and the PLD accountant; analytic Gaussian for full batches"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two seeds of ours at epsilon 1 and without noise, and of an old record of DP-LoRA that names no accountant."""
    for method, epsilon, accuracy in (("dp_deepsets", 1.0, 0.8), ("dp_deepsets", None, 0.81), ("dp_lora", 1.0, 0.2)):
        for seed in range(2):
            scores = {"accuracy": accuracy + 0.02 * seed, "frechet_distance": 400.0}
            Record(PAIR, method, epsilon, 1e-5, "add_or_remove_one", 100, seed, scores=scores).save(tmp_path)
    return tmp_path


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
    lines = tables.common_table(load_records(rivals), PAIR).splitlines()
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
    assert tables.common_table(load_records(rivals), "other") == "*No records at these parameters.*"


def test_accountants_in_a_few_words() -> None:
    assert tables.short_accountant(LARGER, [PRV]) == "PRV and PLD"
    full = "DP-SGD: analytic Gaussian mechanism; full batches compose exactly"
    assert tables.short_accountant(LARGER, [full]) == "analytic Gaussian"
    two = "PRV accountant for add_or_remove_one with Poisson sampling; group privacy for two"
    assert tables.short_accountant("PLD, and basic composition", [two]) == "PLD"
    assert tables.short_accountant(LARGER, [two]) == "PRV and PLD, group privacy for two"
    search = "search among 7 subsets (Renyi accounting of Papernot & Steinke 2022)"
    assert tables.short_accountant("PLD, and basic composition", [search]).startswith("Rényi")
    assert tables.short_accountant("none") == "none"


def test_missing_cells_are_named_by_the_command_that_makes_them(rivals: Path) -> None:
    table = load_records(rivals)
    text = tables.missing_command(table, PAIR, ["dp_deepsets", "dp_ldm", "dp_mepf"], [1.0, math.inf], 100, seeds=2)
    assert text.startswith("2 of 6 cells") and "--methods dp_mepf --epsilon 1 --num-private 100 --seeds 2" in text
    none = tables.missing_command(table, PAIR, ["dp_ldm"], [1.0], 100, seeds=2)
    assert none == "*No cell is missing.*"
    assert "6 of 6" in tables.missing_command(table, PAIR, ["dp_ldm"], [1.0, 4.0], 99)


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
    sentence, _, *lines = tables.certificate_block(certificate).splitlines()
    assert sentence == f"> {certificate.sentence}" and "NOT PRIVATE" in sentence
    assert lines[2] == "| one noisy sum of embeddings | gaussian | 1 | 1e-05 | 3.731 | 1 | 1 |"


def test_choices_show_what_was_tried_and_what_is_used() -> None:
    used = {"ε = 1": {"clip_norm": 0.1, "expected_batch_size": 36.0}, "default": {"expected_batch_size": None}}
    text = tables.choices_table({"clip_norm": (0.1, 1.0), "batch_share": (0.25, 1.0), "layers": (r"a\.(b|c)",)}, used)
    assert text.splitlines() == [
        "| setting | tried | ε = 1 | default |",
        "|---|---|---|---|",
        "| clip norm | 0.1, 1 | 0.1 | – |",
        "| expected batch size | 0.25 of a class, all images | 36 | all images |",
        r"| layers | `a\.(b\|c)` | – | – |",
    ]
    infinite = tables.choices_table({"shape": (1.0, math.inf)}, {"ε = 1": {"shape": None}})
    assert infinite.endswith("| shape | 1, inf | inf |")
    assert tables.choices_table({}, used) == "*Nothing about it is searched.*"


def test_properties_come_from_records_or_else_from_a_run(rivals: Path) -> None:
    sizes = SimpleNamespace(trained_parameters=0, noise_dimension=16, num_releases=1, config=SimpleNamespace())
    tuned = SimpleNamespace(
        trained_parameters=1, noise_dimension=1, num_releases=2, config=SimpleNamespace(mode="shared")
    )
    made = {"dp_ldm": (tuned, dp_sgd()), "direct_conditioning": (sizes, one_sum())}
    lines = tables.properties_table(made, load_records(rivals)).splitlines()
    assert lines[2] == (
        "| DP-LDM | DP-SGD LoRA, shared | 40 | 512 | 5,120 | PRV and PLD | one training, jointly |"
    )
    assert lines[3] == (
        "| direct conditioning | one noisy sum of embeddings | (1) | (16) | (0) | analytic Gaussian "
        "| one row of the sum per class |"
    )
    per_class = SimpleNamespace(**(vars(tuned) | {"config": SimpleNamespace(clip_norm=0.1)}))
    trained = tables.properties_table({"dp_embedding_sgd": (per_class, dp_sgd())}, load_records(rivals))
    assert trained.endswith("| one training per class |")
    empty = tables.properties_table(made, load_records(rivals)[:0])
    assert "| DP-LDM | DP-SGD on something | (2) | (1) | (1) | analytic Gaussian |" in empty


def trial(folder: Path, method: str, candidate: int, number: int, distance: float) -> None:
    content = {"method": method, "epsilon": 1.0, "num_private": 1440, "num_classes": 10,
               "scores": {"frechet_distance": distance}}  # fmt: skip
    path = folder / f"{method}_eps1_candidate{candidate}_set{number}.json"
    path.write_text(json.dumps(content), encoding="utf-8")


def test_trials_say_whether_all_methods_had_as_many(tmp_path: Path) -> None:
    assert "No trials on record" in tables.trials_table(tmp_path / "nowhere")
    for candidate, distance in enumerate((100.0, 50.0, 40.0)):
        trial(tmp_path, "dp_ldm", candidate, 0, distance)
    trial(tmp_path, "dp_ldm", 1, 1, 52.0)
    text = tables.trials_table(tmp_path)
    # of those that met most rehearsals, not the lucky one of the first round
    assert "| DP-LDM | 1 | 3 | 4 | 1,440, 10 | 51.0 | 51.0 |" in text
    assert text.endswith("Every method on record had 3 candidates.")
    trial(tmp_path, "dp_mepf", 0, 0, 70.0)
    assert "*not* equal: 1 to 3" in tables.trials_table(tmp_path)


def grid(rows: list[tuple[float | None, dict[str, float], list[str]]]) -> list[dict]:
    return [
        {"epsilon": epsilon, "best": max(mean, key=lambda name: mean[name]), "not_worse": as_good, "mean": mean,
         "std": dict.fromkeys(mean, 0.01)}
        for epsilon, mean, as_good in rows
    ]  # fmt: skip


def test_layer_grid_says_no_more_than_its_numbers(tmp_path: Path) -> None:
    head, last = {"head": 0.6, "last_block": 0.5}, {"head": 0.8, "last_block": 0.9}
    changed = grid([(0.5, head, []), (8.0, last, []), (None, last, [])])
    sentence = tables.best_subset_sentence(changed, 3)
    assert sentence.startswith("The best subset changes with ε: *head* at ε = 0.5, *last block* at ε = 8")
    assert "no change is beyond" in tables.best_subset_sentence(changed, 1)
    unclear = grid([(0.5, head, ["last_block"]), (8.0, last, [])])
    assert "no change is beyond" in tables.best_subset_sentence(unclear, 3)
    same = grid([(0.5, head, []), (8.0, head, []), (None, last, [])])
    assert "does not show the claim" in tables.best_subset_sentence(same, 3)
    assert "One budget" in tables.best_subset_sentence(same[:1], 3)
    cells = {str(seed): {"subset": "head", "trained_parameters": 650, "seed": seed} for seed in (0, 1)}
    content = {"settings": {"subsets": ["head", "last_block"]}, "cells": cells, "summary": changed}
    (tmp_path / "digits.json").write_text(json.dumps(content), encoding="utf-8")
    (tmp_path / "digits-smoke.json").write_text(json.dumps(content), encoding="utf-8")
    text = tables.layer_grid(tmp_path)
    assert "| 0.5 | **0.600 ± 0.010** | 0.500 ± 0.010 |" in text and text.count("digits: accuracy") == 1
    assert "head (650)" in text and "Seeds: 2." in text
    assert "No grid of layers" in tables.layer_grid(tmp_path / "nowhere")


def test_recorded_certificates_are_shown_once(rivals: Path) -> None:
    table = load_records(rivals)
    assert tables.recorded_charges(table[table["method"] == "dp_ldm"]).startswith("*No certificate")
    said = table[table["method"] == "dp_ldm"].assign(**{"settings.certificate": "demonstration."})
    assert tables.recorded_charges(said) == f"> demonstration. Charged: {PRV}."
