"""Verdicts follow from records by rule: each claim is shown records that bear it out, that refute it, and none."""

import dataclasses
import json
from pathlib import Path

import pytest

from hyperdp_lib.pages import claims, evidence
from hyperdp_lib.pages.evidence import DISTANCE, FAILS, HOLDS, UNDECIDED, Evidence
from hyperdp_lib.records import Record, load_records

ROOT = Path(__file__).resolve().parent.parent
COMMAND = "hyperdp compare --private p --methods some"


def save(
    folder: Path, method: str, epsilon: float | None, distances: tuple[float, ...], *, size: int = 128,
    accuracy: float | None = None, pair: str = "glyphs-p",
) -> None:  # fmt: skip
    """Records of one cell, a seed for each distance; accuracies one hundredth apart."""
    for seed, distance in enumerate(distances):
        scores = {"frechet_distance": distance, "num_images": 2000}
        scores["accuracy"] = None if accuracy is None else accuracy + 0.01 * seed
        Record(
            pair, method, epsilon, 1e-5, "add_or_remove_one", size, seed, scores=scores,
            seconds={"train": 60.0, "sample": 2.0}, provenance={"command": COMMAND},
        ).save(folder)  # fmt: skip


def judged(folder: Path, title: str, **more) -> claims.Finding:
    (claim,) = [one for one in claims.CLAIMS if one.title == title]
    (finding,) = claims.judge(Evidence(load_records(folder), folder, **more), [claim])
    return finding


def outcomes(finding: claims.Finding) -> list[str]:
    return [one.outcome for one in finding.checks]


LORA = "Lower distance than DP-SGD LoRA"


@pytest.mark.parametrize(
    ("theirs", "verdict"),
    [((90.0, 92.0), claims.REPRODUCED), ((20.0, 22.0), claims.NOT), ((40.0, 64.0), claims.UNDECIDED)],
)
def test_lower_distance_in_both_directions(tmp_path: Path, theirs: tuple[float, ...], verdict: str) -> None:
    save(tmp_path, "dp_deepsets", 1.0, (50.0, 51.0))
    save(tmp_path, "dp_lora", 1.0, theirs)
    finding = judged(tmp_path, LORA)
    assert (finding.verdict, finding.elsewhere) == (verdict, "–")
    save(tmp_path, "dp_deepsets", None, (50.0, 51.0))  # without noise there is nothing to compare
    save(tmp_path, "dp_lora", None, (1.0, 1.0))
    assert judged(tmp_path, LORA).verdict == verdict


def test_verdicts_of_several_places() -> None:
    claim = next(one for one in claims.CLAIMS if one.title == LORA)
    said = {
        (): claims.NO_RECORD, (HOLDS, HOLDS): claims.REPRODUCED, (HOLDS, FAILS): claims.PARTLY,
        (HOLDS, UNDECIDED): claims.PARTLY, (FAILS, UNDECIDED): claims.NOT, (UNDECIDED,): claims.UNDECIDED,
    }  # fmt: skip
    assert {key: claims.verdict(claim, key) for key in said} == said
    assert claims.verdict(dataclasses.replace(claim, test=None), ()) == claims.NOT_TESTABLE


def test_other_numbers_of_images_count_elsewhere(tmp_path: Path) -> None:
    save(tmp_path, "dp_deepsets", 1.0, (50.0, 51.0), size=1437)
    save(tmp_path, "dp_lora", 1.0, (20.0, 22.0), size=1437)
    finding = judged(tmp_path, LORA)
    assert (finding.verdict, finding.elsewhere) == (claims.NO_RECORD, claims.NOT)
    save(tmp_path, "dp_deepsets", 1.0, (50.0,))
    save(tmp_path, "dp_lora", 1.0, (90.0,))  # one seed: nothing can be said
    finding = judged(tmp_path, LORA)
    assert finding.verdict == claims.UNDECIDED and "too few seeds" in finding.checks[0].got


def test_the_rule_is_that_of_the_report(tmp_path: Path) -> None:
    from hyperdp_lib.pages import report

    for gap in (0.5, 1.5, 3.0):
        save(tmp_path, "dp_deepsets", 1.0, (50.0, 52.0))
        save(tmp_path, "dp_lora", 1.0, (50.0 + gap, 52.0 + gap))
        sentence = report.comparison_sentence(load_records(tmp_path), DISTANCE, "dp_deepsets", "dp_lora", 1.0)
        assert ("is better" in sentence) == (outcomes(judged(tmp_path, LORA)) == [HOLDS])


def test_lead_is_largest_when_strict(tmp_path: Path) -> None:
    title = "The lead over DP-SGD LoRA is largest at strict budgets"
    for epsilon, theirs in ((1.0, 200.0), (10.0, 60.0), (100.0, 300.0)):
        save(tmp_path, "dp_deepsets", epsilon, (50.0, 51.0))
        save(tmp_path, "dp_lora", epsilon, (theirs, theirs + 2))
    finding = judged(tmp_path, title)
    assert outcomes(finding) == [HOLDS, FAILS] and finding.verdict == claims.PARTLY
    assert judged(tmp_path, title, epsilon=3.0).verdict == claims.NO_RECORD


@pytest.mark.parametrize(
    ("strict", "flat", "collapse"),
    [((60.0, 62.0), HOLDS, FAILS), ((140.0, 142.0), FAILS, HOLDS), ((90.0, 110.0), UNDECIDED, UNDECIDED)],
)
def test_flat_and_collapse_are_opposites(tmp_path: Path, strict: tuple[float, ...], flat: str, collapse: str) -> None:
    for method in ("dp_deepsets", "dp_lora"):
        save(tmp_path, method, 1.0, strict)
        save(tmp_path, method, None, (50.0, 50.0))
    assert outcomes(judged(tmp_path, "Ours hardly depends on ε")) == [flat]
    assert outcomes(judged(tmp_path, "The noise is not what costs most")) == [flat]
    assert outcomes(judged(tmp_path, "DP-SGD LoRA collapses at strict ε")) == [collapse]


def test_collapse_is_judged_against_the_loosest_budget_with_two_seeds(tmp_path: Path) -> None:
    save(tmp_path, "dp_lora", 1.0, (200.0, 202.0))
    save(tmp_path, "dp_lora", 100.0, (9.0,))
    title = "DP-SGD LoRA collapses at strict ε"
    assert judged(tmp_path, title).verdict == claims.NO_RECORD
    save(tmp_path, "dp_lora", 10.0, (150.0, 152.0))
    assert judged(tmp_path, title).verdict == claims.NOT


@pytest.mark.parametrize(("other", "outcome"), [(90.0, HOLDS), (12.0, HOLDS), (55.0, FAILS)])
def test_public_training_against_noise(tmp_path: Path, other: float, outcome: str) -> None:
    """The noise adds 10 to 50; other public weights move the 50 by 40, by 38 the other way, or by 5."""
    save(tmp_path, "dp_deepsets", 1.0, (60.0, 61.0))
    save(tmp_path, "dp_deepsets", None, (50.0, 51.0))
    save(tmp_path, "dp_deepsets_nested", None, (other, other + 1))
    assert outcomes(judged(tmp_path, "Public training decides, more than the noise")) == [outcome]


@pytest.mark.parametrize(("retrieved", "outcome"), [(20.0, HOLDS), (90.0, FAILS)])
def test_retrieval_and_variants_of_ours(tmp_path: Path, retrieved: float, outcome: str) -> None:
    save(tmp_path, "dp_deepsets_nested", 1.0, (50.0, 51.0), accuracy=0.7)
    save(tmp_path, "nearest_public", 1.0, (retrieved, retrieved + 1))
    title = "Retrieval is a strong control"
    assert judged(tmp_path, title).verdict == claims.NO_RECORD
    assert outcomes(judged(tmp_path, title, ours="dp_deepsets_nested")) == [outcome]
    table = claims.variants_table(Evidence(load_records(tmp_path), tmp_path))
    assert table.splitlines()[0] == "| claim | DP-DeepSets, nested |"


@pytest.mark.parametrize(("rival", "verdict"), [((5.0, 6.0), claims.REPRODUCED), ((80.0, 82.0), claims.NOT)])
def test_dp_sgd_with_plenty_of_images(tmp_path: Path, rival: tuple[float, ...], verdict: str) -> None:
    save(tmp_path, "dp_deepsets", 10.0, (50.0, 51.0), size=60_000)
    save(tmp_path, "dp_layer_search", 10.0, (90.0, 91.0), size=60_000)
    save(tmp_path, "dp_lora", 10.0, rival, size=60_000)
    finding = judged(tmp_path, "DP-SGD catches up where private images are plentiful")
    assert finding.verdict == verdict and "DP-SGD LoRA" in finding.checks[0].got


@pytest.mark.parametrize(("gain", "outcome"), [(0.6, HOLDS), (0.05, FAILS), (0.2, UNDECIDED)])
def test_gain_from_a_larger_budget(tmp_path: Path, gain: float, outcome: str) -> None:
    for method, low, high in (("dp_ldm", 0.3, 0.3 + gain), ("dp_lora", 0.6, 0.8)):
        for epsilon, accuracy in ((1.0, low), (10.0, high)):
            save(tmp_path, method, epsilon, (50.0, 51.0), accuracy=accuracy, size=50_000)
    finding = judged(tmp_path, "DP-LDM gains more than DP-SGD LoRA from ε = 1 to 10")
    assert outcomes(finding) == [outcome] and finding.checks[0].inside


def test_scores_that_disagree(tmp_path: Path) -> None:
    title = "FID and accuracy rank methods differently"
    methods = ("dp_deepsets", "dp_lora", "dp_ldm", "dp_mepf", "dp_hybrid")
    for rank, method in enumerate(methods):
        save(tmp_path, method, 10.0, (10.0 * rank + 5, 10.0 * rank + 6), accuracy=0.9 - 0.1 * rank, size=50_000)
        if rank == 3:
            assert judged(tmp_path, title).verdict == claims.UNDECIDED  # six pairs in the same order are not enough
    assert judged(tmp_path, title).verdict == claims.NOT
    save(tmp_path, "dp_hybrid", 10.0, (1.0, 1.2), accuracy=0.5, size=50_000)
    finding = judged(tmp_path, title)
    assert finding.verdict == claims.REPRODUCED and finding.checks[0].got.startswith("4 of 10 pairs")


def layers(folder: Path, rows: list[tuple[float, dict[str, float], list[str]]]) -> None:
    summary = [
        {"epsilon": epsilon, "best": max(mean, key=lambda name: mean[name]), "not_worse": level, "mean": mean,
         "std": dict.fromkeys(mean, 0.01)}
        for epsilon, mean, level in rows
    ]  # fmt: skip
    cells = {str(seed): {"seed": seed, "seconds": 5.0} for seed in (0, 1)}
    content = {"summary": summary, "cells": cells, "provenance": {"command": "python -m layers"}}
    (folder / "layers").mkdir(exist_ok=True)
    (folder / "layers" / "digits.json").write_text(json.dumps(content), encoding="utf-8")


def test_choice_of_layers(tmp_path: Path) -> None:
    matters, changes = "Which layers are tuned matters at a fixed budget", "The best layers change with ε"
    save(tmp_path, "dp_lora", 1.0, (9.0, 9.0))
    assert judged(tmp_path, matters).verdict == judged(tmp_path, changes).verdict == claims.NO_RECORD
    head, last = {"head": 0.6, "last_block": 0.5}, {"head": 0.8, "last_block": 0.9}
    layers(tmp_path, [(0.5, head, []), (8.0, last, [])])
    assert judged(tmp_path, matters).verdict == judged(tmp_path, changes).verdict == claims.REPRODUCED
    layers(tmp_path, [(0.5, head, ["last_block"]), (8.0, last, [])])
    assert (judged(tmp_path, matters).verdict, judged(tmp_path, changes).verdict) == (claims.PARTLY, claims.UNDECIDED)
    layers(tmp_path, [(0.5, head, []), (8.0, head, [])])
    assert judged(tmp_path, changes).verdict == claims.NOT


def simulations(folder: Path, name: str, points: list[tuple[dict, float]], **more) -> None:
    content = {
        "points": [{"place": place, "simulated": risk, "standard_error": 0.01} for place, risk in points],
        "cpu_seconds": 3.0, "provenance": {"command": f"python -m theory {name}"}, **more,
    }  # fmt: skip
    (folder / "theory").mkdir(exist_ok=True)
    (folder / "theory" / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


def test_linear_setting_compares_the_places_that_both_were_simulated_at(tmp_path: Path) -> None:
    save(tmp_path, "dp_lora", 1.0, (9.0, 9.0))
    title = "Higher utility than DP-SGD in a linear setting"
    assert judged(tmp_path, title).verdict == claims.NO_RECORD
    world = {"k": 5, "off_subspace_energy": 0.0}
    ours = [({**world, "d": 200, "n": n, "epsilon": 1}, 0.2) for n in (100, 1000, 5000, 7)]
    simulations(tmp_path, "deepsets_end_to_end", ours)
    others = [({"d": 200, "n": n, "epsilon": 1, "learner": "DP-GD"}, risk) for n, risk in ((100, 0.9), (1000, 0.21))]
    ignored = [({"d": 200, "n": 7, "epsilon": 1, "learner": "one step"}, 0.0)]
    simulations(tmp_path, "lower_bound", others + ignored)
    many = [({"d": 200, "n": 5000, "epsilon": 1}, 0.01), ({"d": 50, "n": 100, "epsilon": 1}, 0.0)]
    simulations(tmp_path, "dp_gd", many)
    finding = judged(tmp_path, title)
    assert outcomes(finding) == [HOLDS, UNDECIDED, FAILS] and finding.verdict == claims.PARTLY
    assert "3 records, 9 s" in claims.details(finding)


def test_subspace_crossover_and_learned_hypernetwork(tmp_path: Path) -> None:
    save(tmp_path, "dp_lora", 1.0, (9.0, 9.0))
    place = {"k": 3, "n": 300, "epsilon": 0.5}
    clips = [({**place, "clip": clip}, risk) for clip, risk in (("best", 0.5), ("mild", 0.1))]
    simulations(tmp_path, "deepsets_known_subspace", clips)
    for risk, outcome in ((0.2, HOLDS), (0.8, FAILS)):
        simulations(tmp_path, "projected_dp_gd", [(place, risk)])
        assert outcomes(judged(tmp_path, "It is the public subspace, not the single shot")) == [outcome]
    for ratio, outcome in ((1.1, HOLDS), (1.5, FAILS)):
        simulations(tmp_path, "crossover", [(place, ratio)], tolerance={"low": 0.8, "high": 1.2, "z": 3})
        assert outcomes(judged(tmp_path, "The crossover is where the formulas say")) == [outcome]
    settings = {"epsilon": 1.0, "num_private": 200, "config": {"num_public_tasks": None}}
    learned = {"settings": settings, "trainings": [1, 2]}
    for risk, outcome in ((0.08, HOLDS), (0.2, FAILS), (0.111, UNDECIDED)):
        line = {"epsilon": 1.0, "num_private": 200, "risk": risk, "deviation_over_seeds": 0.01, "closed_form": 0.1}
        elsewhere = {**line, "epsilon": 8.0, "risk": 99.0}
        made = {"command": "learned.py --out x"}
        content = {"rows": {"one": {**learned, "summary": [line, elsewhere]}}, "provenance": made}
        (tmp_path / "theory" / "learned.json").write_text(json.dumps(content), encoding="utf-8")
        finding = judged(tmp_path, "The hypernetwork learns the shared structure")
        assert outcomes(finding) == [outcome]
    assert "\nlearned.py --out x\n" in claims.details(finding)  # as it is on record
    assert "time not recorded" in claims.details(finding)


def test_details_have_numbers_command_and_compute(tmp_path: Path) -> None:
    save(tmp_path, "dp_deepsets", 1.0, (50.0, 51.0))
    save(tmp_path, "dp_lora", 1.0, (90.0, 92.0))
    finding = judged(tmp_path, LORA)
    text = claims.details(finding)
    assert "DP-DeepSets: 50.5 ± 0.7; DP-SGD LoRA: 91.0 ± 1.4 | 128 | 2,000 | 2 | holds |" in text
    assert "Made by (4 records, 4 min):" in text and text.count(COMMAND) == 1
    (row,) = claims.summary_table([finding]).splitlines()[2:]
    assert row == f"| {LORA} | Nishikawa et al. 2026 | **reproduced** | 1, 0, 0 | 128 | 2 | 4 min |"


def test_long_lists_show_first_what_does_not_hold() -> None:
    checks = [evidence.Check(str(i), "got", HOLDS) for i in range(30)] + [evidence.Check("odd", "got", FAILS)]
    claim = claims.CLAIMS[0]
    text = claims.details(claims.Finding(claim, tuple(checks)))
    assert "| odd | got |" in text and "Not listed, 15 more (hold, fail, undecided): 15, 0, 0." in text


def test_nothing_on_record_gives_no_verdict(tmp_path: Path) -> None:
    findings = claims.judge(Evidence(load_records(tmp_path), tmp_path))
    assert {one.verdict for one in findings} == {claims.NO_RECORD, claims.NOT_TESTABLE}
    assert all((one.verdict == claims.NOT_TESTABLE) == (one.claim.test is None) for one in findings)
    assert "No record of our method" in claims.variants_table(Evidence(load_records(tmp_path), tmp_path))


def test_every_claim_is_said_once_and_belongs_to_a_group() -> None:
    titles = [one.title for one in claims.CLAIMS]
    assert len(set(titles)) == len(titles) and {one.group for one in claims.CLAIMS} == set(claims.GROUPS)
    assert all(bool(one.rule) == (one.test is not None) for one in claims.CLAIMS)


def test_the_book_s_records_can_be_judged() -> None:
    folder = ROOT / "book" / "results"
    if not folder.is_dir():
        pytest.skip("no records in book/results yet")
    table = load_records(folder)
    findings = claims.judge(Evidence(table, folder))
    known = {claims.REPRODUCED, claims.PARTLY, claims.NOT, claims.UNDECIDED, claims.NO_RECORD, claims.NOT_TESTABLE}
    assert {one.verdict for one in findings} <= known
    assert any(one.checks for one in findings)
    assert claims.summary_table(findings).count("\n") == len(findings) + 1
