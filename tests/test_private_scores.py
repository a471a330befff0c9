"""Scores that may be published: right without noise, as noisy as charged, one image at a time."""

import math

import numpy as np
import pytest
import torch

from hyperdp_lib import accounting, certificate, embedding
from hyperdp_lib.data import InputError
from hyperdp_lib.ledger import gaussian_charge, ledger_epsilon
from hyperdp_lib.scores import evaluation, private_scores
from hyperdp_lib.scores.private_scores import private_accuracy, private_frechet_distance

with torch.random.fork_rng():
    torch.manual_seed(0)
    NETWORK = embedding.FeatureNetwork(dimension=8).eval()  # untrained
HUGE = 1e6  # a budget at which there is next to no noise


def drawn(count, seed, shift=0.0):
    return (0.5 * torch.randn(count, 1, 16, 16, generator=torch.Generator().manual_seed(seed)) + shift).clamp(-1, 1)


def labelled(count, seed):
    """Two classes, bright and dark, hard to tell apart for a tenth of the images."""
    labels = torch.arange(count) % 2
    images = drawn(count, seed) * 0.3 + (labels * 0.5 - 0.25).view(-1, 1, 1, 1)
    wrong = torch.arange(count) % 10 < 2
    return images, torch.where(wrong, 1 - labels, labels)


def test_accuracy_without_noise_is_the_accuracy():
    samples, labels = labelled(200, 0)
    images, truth = labelled(150, 1)
    exact = evaluation.downstream_accuracy(samples, labels, images, truth)
    noisy = private_accuracy(samples, labels, images, truth, epsilon=HUGE, seed=0)
    assert noisy.value == pytest.approx(exact, abs=1e-3) and 0.6 < exact < 0.95


def test_accuracy_is_as_noisy_as_it_says_and_as_charged(monkeypatch):
    """150 scores of one set: spread within 35 % (six standard errors), mean within six of its own."""
    samples, labels = labelled(100, 0)
    images, truth = labelled(300, 1)
    fixed = evaluation.predict(samples, labels, images)
    monkeypatch.setattr(private_scores.evaluation, "predict", lambda *args: fixed)
    found = [private_accuracy(samples, labels, images, truth, epsilon=2.0) for _ in range(150)]
    values = np.array([score.value for score in found])
    said = np.mean([score.standard_error for score in found])
    exact = float((fixed == truth.numpy()).mean())
    assert abs(values.std() / said - 1) < 0.35 and abs(values.mean() - exact) < 6 * said / 150**0.5
    charge = found[0].charge
    assert charge.noise_multiplier == pytest.approx(accounting.noise_multiplier(2.0, 1e-5))
    assert charge.epsilon == pytest.approx(2.0, rel=1e-6) and not found[0].demonstration


def test_frechet_distance_without_noise_is_that_of_the_projected_features():
    samples, images = drawn(300, 0), drawn(400, 1, shift=0.1)
    noisy = private_frechet_distance(samples, images, NETWORK, epsilon=HUGE, dimensions=3, seed=0)
    ours, theirs = (evaluation.features(NETWORK, part) for part in (samples, images))
    directions = np.linalg.svd(ours - ours.mean(0), full_matrices=False)[2][:3].T
    scale = np.quantile(np.linalg.norm((ours - ours.mean(0)) @ directions, axis=1), 0.95)

    def projected(features):
        x = (features - ours.mean(0)) @ directions / scale
        x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1)
        return x.mean(0), np.cov(x.T, bias=True)

    expected = evaluation.frechet_distance_of_gaussians(*projected(theirs), *projected(ours))
    assert noisy.value == pytest.approx(expected, rel=1e-2, abs=1e-5) and expected > 1e-3
    same = private_frechet_distance(samples, samples, NETWORK, epsilon=HUGE, dimensions=3, seed=0)
    assert same.value < 1e-6


def test_a_perfect_match_reads_the_noise_floor_and_a_bad_one_more():
    samples = drawn(2000, 0)
    match = [private_frechet_distance(samples, drawn(2000, 1), NETWORK, epsilon=4.0, dimensions=2) for _ in range(12)]
    floor, error = match[0].noise_floor, match[0].standard_error
    assert abs(np.mean([score.value for score in match]) - floor) < 6 * error / math.sqrt(12) + 0.005
    far = private_frechet_distance(samples, drawn(2000, 2, shift=0.4), NETWORK, epsilon=4.0, dimensions=2)
    assert far.value > floor + 6 * error


@pytest.mark.parametrize("score", ["accuracy", "distance"])
def test_one_image_more_moves_the_sum_by_one_at_most_and_touches_no_other(score, monkeypatch):
    """Also an image that no feature was made for; bit for bit nothing else changes."""
    seen = []
    original = private_scores.mechanism.noisy_sum

    def keep(batches, config, *, seed):
        seen.append(batches[0][0])
        return original(batches, config, seed=seed)

    monkeypatch.setattr(private_scores.mechanism, "noisy_sum", keep)
    samples, labels = labelled(100, 0)
    images, truth = labelled(131, 1)
    images[-1] = torch.where(drawn(1, 5)[0] < 0, -1.0, 1.0)
    for count in (131, 130):
        if score == "accuracy":
            private_accuracy(samples, labels, images[:count], truth[:count], epsilon=1.0, seed=0)
        else:
            private_frechet_distance(samples, images[:count], NETWORK, epsilon=1.0, dimensions=4, seed=0)
    more, fewer = seen
    assert np.array_equal(more[:130], fewer) and np.linalg.norm(more, axis=1).max() <= 1 + 1e-12


def test_its_price_joins_the_ledger_of_the_release():
    samples, labels = labelled(100, 0)
    images, truth = labelled(100, 1)
    score = private_accuracy(samples, labels, images, truth, epsilon=0.5, seed=1)
    release = gaussian_charge("one noisy sum of embeddings", accounting.noise_multiplier(1.0, 1e-5), 1e-5)
    together = ledger_epsilon([release, score.charge], 1e-5, "add_or_remove_one")
    assert 1.0 < together < 1.5 and score.demonstration
    statement = certificate.ledger_certificate(
        (release, score.charge),
        1e-5,
        method="dp_deepsets",
        mechanism=certificate.GAUSSIAN_SUM,
        neighboring_relation="add_or_remove_one",
        rng=certificate.OS_NOISE,
        noise_multiplier=release.noise_multiplier,
    )
    assert statement.epsilon == pytest.approx(together) and "noisy accuracy" in statement.to_json()


@pytest.mark.parametrize(
    "changes, message", [({"dimensions": 9}, "dimensions must lie in 1 .. 8"), ({"epsilon": 0}, "epsilon")]
)
def test_bad_requests(changes, message):
    asked = {"epsilon": 1.0, "dimensions": 2} | changes
    with pytest.raises(InputError, match=message):
        private_frechet_distance(drawn(50, 0), drawn(50, 1), NETWORK, **asked)


def test_the_public_end_is_what_the_score_would_read_of_those_images():
    samples, public = drawn(300, 0), drawn(200, 1, shift=0.3)
    noisy = private_frechet_distance(samples, public, NETWORK, epsilon=HUGE, dimensions=3, seed=0)
    exact = private_scores.clipped_frechet_distance(samples, public, NETWORK, dimensions=3)
    assert exact == pytest.approx(noisy.value, rel=1e-3) and exact > 0.01


@pytest.mark.parametrize("wrong", [1e30, 1.01, math.nan, math.inf])
def test_private_images_out_of_range_are_refused_without_quoting_them(wrong):
    samples, labels = labelled(20, 0)
    images = torch.full((4, 1, 16, 16), wrong)
    for score in (
        lambda: private_accuracy(samples, labels, images, labels[:4], epsilon=1.0),
        lambda: private_frechet_distance(samples, images, NETWORK, epsilon=1.0, dimensions=3),
    ):
        with pytest.raises(InputError, match="^private_test_images|^private_images") as caught:
            score()
        assert not any(digit in str(caught.value).replace("[-1, 1]", "").replace("8-bit", "") for digit in "0123456789")
