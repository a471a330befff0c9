"""Benchmarks measure end to end what their records say."""

import functools
import math

import pytest
import torch

from hyperdp_lib import classifier, data, diffusion, embedding
from hyperdp_lib.baselines import controls
from hyperdp_lib.experiments import comparison
from hyperdp_lib.pretrained import features_file, load_pretrained
from hyperdp_lib.two_steps import TwoStepsConfig


@pytest.fixture(scope="module")
def released_labels(load_benchmark):
    return load_benchmark("released_labels")


@pytest.fixture(scope="module")
def few():
    return comparison.subset(data.digits("train"), 60, seed=0)


@pytest.mark.parametrize("num_steps", [1, 2])
def test_labels_of_a_release_are_measured_end_to_end(released_labels, few, num_steps):
    private = data.digits("train")
    base_model, network = load_pretrained("glyphs-nested")
    scoring = embedding.FeatureNetwork.from_pretrained(features_file())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(released_labels, "IMAGES", 200)
        patch.setattr(released_labels, "MANY", 200)
        patch.setattr(diffusion, "sample_classes", functools.partial(diffusion.sample_classes, num_steps=2))
        found = released_labels.measure(few, private, data.digits("test"), base_model, network, scoring, 0, num_steps)
    # no more of them than the first
    assert found["samples"] == found["many samples"] and found["samples relabelled"]["agreed"] < 1
    assert found["samples relabelled"]["accuracy"] == found["many relabelled"]["accuracy"]
    assert 0 <= found["samples relabelled"]["agreed"] and found["cells"] == 1
    assert set(found) == {*released_labels.WAYS, "cells"}
    told = released_labels.summary([found, found], "samples")
    assert told["accuracy_sd"] == 0 and told["frechet_distance"] > 0
    if num_steps == 1:
        read = released_labels.read(few, data.digits("test"), network, 0)
        assert read["nearest"] == found["nearest"]["accuracy"]
        assert read[classifier.RIDGE] == found["classifier"]["accuracy"]


def test_the_first_of_each_class_are_taken(load_benchmark):
    first_of_each = load_benchmark("cells").first_of_each
    assert first_of_each(torch.tensor([1, 0, 1, 1, 0, 2]), 2).tolist() == [1, 4, 0, 2, 5]


@pytest.mark.parametrize("labelled", [False, True])
def test_two_steps_measure_what_one_sum_does(load_benchmark, few, labelled):
    benchmark = load_benchmark("two_steps")
    network = load_pretrained("glyphs-nested")[1].using(8)
    labels = few.labels if labelled else None
    wide = TwoStepsConfig(reach=10.0)  # no offset is cut off
    sums, noise_std = benchmark.both_steps(few.images, labels, network, 1e4, 0, wide)
    clean, _ = controls.noisy_class_sums(
        few.images, labels, network.encoder, epsilon=math.inf, num_classes=len(sums), seed=0
    )
    means, expected = (one[:, 1:] / one[:, :1] for one in (sums, torch.as_tensor(clean)))
    assert len(sums) == (10 if labelled else 1) and noise_std < 0.1
    assert (means - expected).abs().max() < 0.2


def test_a_release_and_its_parts_are_timed(load_benchmark, few):
    seconds = load_benchmark("release_speed").time_release(few, *load_pretrained("glyphs"), epsilon=1.0, repetitions=1)
    assert set(seconds) == {"release", "embedding", "noisy_sum", "decoding"} and min(seconds.values()) > 0
