"""Ablations: one choice changed at a time, shared stages trained once, everything on file."""

import dataclasses
import json

import pytest
import torch

from hyperdp_lib.data import InputError
from hyperdp_lib.experiments import ablations
from hyperdp_lib.experiments.ablations import REFERENCE, VARIANTS, run, table
from hyperdp_lib.experiments.methods import Settings
from hyperdp_lib.public.stages import PRESETS

MINIATURE = PRESETS["miniature"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The reference and two variants, in miniature."""
    out, results = tmp_path_factory.mktemp("out"), tmp_path_factory.mktemp("results")
    settings = Settings(num_images=200, sampling_steps=2)
    for name in ("reference", "encoder-noiseless", "joint400"):
        with pytest.MonkeyPatch.context() as patch:
            small = {"joint400": {"joint_stage": dataclasses.replace(MINIATURE.joint_stage, steps=6)}}
            variant = VARIANTS[name]
            changed = dataclasses.replace(variant, changes=small.get(name, variant.changes))
            patch.setitem(ablations.VARIANTS, name, changed)
            run(name, out, results, reference=MINIATURE, seeds=2, settings=settings)
    return out, results


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_changes_one_thing(name):
    preset = VARIANTS[name].preset()
    changed = [f.name for f in dataclasses.fields(preset) if getattr(preset, f.name) != getattr(REFERENCE, f.name)]
    assert set(changed) == set(VARIANTS[name].changes) and len(changed) <= 2  # a bank has a size and no fresh tasks
    assert bool(changed) == (name != "reference")


def test_what_is_on_file_says_scores_seeds_and_cost(made):
    found = json.loads((made[1] / "reference.json").read_text())
    assert found["seeds"] == 2 and found["num_private"] == 1437 and found["features"] == "glyphnet"
    assert [row["epsilon"] for row in found["scores"]] == [1.0, None]
    assert all(row["accuracy"]["sd"] >= 0 for row in found["scores"])
    assert found["provenance"]["command"].endswith("--variants reference") and "not DP" in found["label"]


def test_stages_that_nothing_changed_in_are_taken_over(made):
    out, _ = made

    def state(variant, stage):
        return torch.load(out / variant / f"{stage}.pt", weights_only=True)["average"]

    for stage, variant in (("base", "encoder-noiseless"), ("encoder", "joint400")):
        ours, theirs = state(variant, stage), state("reference", stage)
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    ours, theirs = state("encoder-noiseless", "encoder"), state("reference", "encoder")
    assert not all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_variant_on_file_is_not_trained_again(made, monkeypatch):
    monkeypatch.setattr(ablations, "train", None)
    assert run("reference", *made).name == "reference.json"
    with pytest.raises(InputError, match="reference"):
        run("nothing", *made)


def test_the_table_has_a_row_for_each_variant_on_file(made, tmp_path):
    lines = table(made[1]).splitlines()
    assert len(lines) == 2 + 3 and lines[2].startswith("| reference | k = 64") and "±" in lines[2]
    assert "No records yet" in table(tmp_path)
    assert [one["variant"] for one in ablations.found(made[1])] == ["reference", "encoder-noiseless", "joint400"]
    assert ablations.found(tmp_path / "nowhere") == []
