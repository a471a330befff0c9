"""Benchmarks that simulate a release: the noise is that of the budget, and what is called a bound is one."""

import functools
import math

import pytest
import torch

from hyperdp_lib import classifier, comparison, data, diffusion, evaluation
from hyperdp_lib.baselines import methods
from hyperdp_lib.hypernetwork import features_file, load_pretrained


@pytest.fixture(scope="module")
def few_labels(load_benchmark):
    return load_benchmark("few_labels")


@pytest.fixture(scope="module")
def codes(few_labels):
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(few_labels.CLASSES).repeat_interleave(few_labels.SIZE)
    centres = torch.randn(few_labels.CLASSES, 64, generator=g, dtype=torch.double)
    return centres[labels] + 0.1 * torch.randn(len(labels), 64, generator=g, dtype=torch.double), labels


@pytest.mark.parametrize("share", [0.0, 0.2])
def test_the_noise_on_class_means_is_what_is_left_of_the_budget(few_labels, codes, share):
    """Standard deviation noise_std / sqrt(1 - share) / size of each coordinate. False alarm below 1e-6 (5 s.d.)."""
    scheme, noise_std = few_labels.Scheme("", share), 3.0
    # a radius of nothing: the pooled mean, and so the origin, is the same in every draw
    drawn = [
        few_labels.estimated(scheme, *codes, 1e-12, noise_std, torch.Generator().manual_seed(seed))[0]
        for seed in range(200)
    ]
    errors = torch.stack(drawn).sub(torch.stack(drawn).mean(0)).flatten()
    expected = noise_std / math.sqrt(1 - share) / few_labels.SIZE
    assert abs(float(errors.std()) / expected - 1) < 5 / math.sqrt(2 * len(errors)) + 1 / 200


def test_the_pooled_mean_pays_its_share(few_labels, codes):
    """Both releases compose to the whole budget: 1 / s1^2 + 1 / s2^2 = 1 / s^2."""
    noise_std, share, radius = 3.0, 0.2, 5.0
    scheme = few_labels.Scheme("", share)
    origins = torch.stack([
        few_labels.estimated(scheme, *codes, radius, noise_std, torch.Generator().manual_seed(seed))[1]
        for seed in range(400)
    ])[:, : few_labels.COORDINATES]  # fmt: skip
    first = float(origins.std(0).mean()) * len(codes[0]) / radius
    second = noise_std / math.sqrt(1 - share)
    assert 1 / first**2 + 1 / second**2 == pytest.approx(1 / noise_std**2, rel=0.05)


def test_without_noise_the_mean_of_offsets_is_exact(few_labels, codes):
    private, labels = codes
    means, origin, basis = few_labels.estimated(
        few_labels.Scheme("", given_mean=True, given_directions=True), private, labels, 1.0, 0.0,
        torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert torch.allclose(origin, private.mean(0))
    assert torch.allclose(basis.T @ basis, torch.eye(few_labels.COORDINATES, dtype=torch.double), atol=1e-9)
    offsets = torch.nn.functional.normalize((private - origin) @ basis, dim=1)
    assert torch.allclose(means[3], offsets[labels == 3].mean(0))


def test_learned_shrinkage_draws_noise_together_and_leaves_signal(few_labels, codes):
    private, labels = codes
    g = torch.Generator().manual_seed(1)
    nothing = torch.ones_like(private)  # all images alike: classes differ by noise alone
    shrunk = few_labels.estimated(few_labels.Scheme("", shrink=True), nothing, labels, 1.0, 3.0, g)[0]
    plain = few_labels.estimated(few_labels.Scheme(""), nothing, labels, 1.0, 3.0, g)[0]
    assert shrunk.std(0).mean() < 0.6 * plain.std(0).mean()
    clear, kept = (
        few_labels.estimated(scheme, private, labels, 1.0, 1e-6, torch.Generator().manual_seed(0))[0]
        for scheme in (few_labels.Scheme("", shrink=True), few_labels.Scheme(""))
    )
    assert torch.allclose(clear, kept, atol=1e-6)


@pytest.fixture(scope="module")
def released_labels(load_benchmark):
    return load_benchmark("released_labels")


def test_labels_of_a_release_are_measured_end_to_end(released_labels):
    private = data.digits("train")
    few = comparison.subset(private, 60, seed=0)
    base_model, network = load_pretrained("glyphs-nested")
    scoring = evaluation.FeatureNetwork.from_pretrained(features_file())
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
