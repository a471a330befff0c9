"""Benchmarks measure end to end what their records say."""

import functools

import pytest

from hyperdp_lib import classifier, data, diffusion, embedding
from hyperdp_lib.experiments import comparison, methods
from hyperdp_lib.pretrained import features_file, load_pretrained


@pytest.fixture(scope="module")
def released_labels(load_benchmark):
    return load_benchmark("released_labels")


def test_labels_of_a_release_are_measured_end_to_end(released_labels):
    private = data.digits("train")
    few = comparison.subset(private, 60, seed=0)
    base_model, network = load_pretrained("glyphs-nested")
    scoring = embedding.FeatureNetwork.from_pretrained(features_file())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(released_labels, "IMAGES", 200)
        patch.setattr(released_labels, "MANY", 200)
        patch.setattr(classifier, "SURPLUS", 1)
        patch.setattr(diffusion, "sample_classes", functools.partial(diffusion.sample_classes, num_steps=2))
        found = released_labels.measure(few, private, data.digits("test"), base_model, network, scoring, 0)
    assert found["samples"]["accuracy"] == found["samples that agree"]["accuracy"]  # no surplus to choose from
    assert 0 <= found["samples that agree"]["kept"] <= 1 and found["cells"] == 1
    assert set(found) == {*released_labels.WAYS, "cells"}
    read = released_labels.read(few, data.digits("test"), network, 0)
    assert read["nearest"] == found["nearest"]["accuracy"] and read[classifier.RIDGE] == found["classifier"]["accuracy"]
    told = released_labels.summary([found, found], "samples")
    assert told["accuracy_sd"] == 0 and told["frechet_distance"] > 0


def test_levers_find_no_difference_between_weights_and_themselves(load_benchmark, monkeypatch, tmp_path):
    levers = load_benchmark("levers")
    settings = tmp_path / "settings.json"
    settings.write_text(methods.Settings(num_images=128, sampling_steps=2).to_json())
    monkeypatch.setattr(comparison, "SETTINGS_FILE", str(settings))
    monkeypatch.setattr(levers, "WEIGHTS", {"glyphs": ("glyphs", "glyphs-nested")})  # the former reads the latter
    asked = ("digits/3", 30, (levers.ONCE,), tmp_path, 2)
    (first,), (second,) = (levers.measure("glyphs", training, *asked) for training in (0, 1))
    assert second.pop("training") == 1 and first.pop("training") == 0
    assert len(first["frechet_distance"]) == 2 and "accuracy" not in first
    for row in (first, second):
        assert row.pop("seconds") > 0
    assert first == second
    made = sorted(tmp_path.rglob("*.json"))
    assert levers.measure("glyphs", 1, *asked)[0]["frechet_distance"] == first["frechet_distance"]
    assert sorted(tmp_path.rglob("*.json")) == made  # what is on record is read
