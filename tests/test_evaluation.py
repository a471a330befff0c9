"""The scores agree with independent implementations and refuse to be computed from too little."""

import copy

import numpy as np
import pytest
import torch
from scipy import linalg

from hyperdp_lib import embedding
from hyperdp_lib.data import InputError
from hyperdp_lib.scores import evaluation

RNG = np.random.default_rng(0)


def correlated(count, dimension, shift=0.0, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, dimension)) @ rng.normal(size=(dimension, dimension)) + shift


def test_frechet_distance_agrees_with_scipy_matrix_square_root():
    a, b = correlated(200, 12, seed=1), correlated(150, 12, 0.5, seed=2)
    covariance_a, covariance_b = np.cov(a.T), np.cov(b.T)
    trace = np.trace(linalg.sqrtm(covariance_a @ covariance_b)).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(covariance_a + covariance_b) - 2 * trace
    assert evaluation.frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_agrees_with_torchmetrics():
    from torchmetrics.image.fid import FrechetInceptionDistance

    torch.manual_seed(0)
    network = embedding.FeatureNetwork(dimension=16)
    a, b = torch.rand(80, 1, 16, 16) * 2 - 1, torch.rand(90, 1, 16, 16) ** 2 * 2 - 1
    extractor = copy.deepcopy(network)
    extractor.num_features = 16
    metric = FrechetInceptionDistance(feature=extractor, normalize=False, input_img_size=(1, 16, 16))
    metric.update(a, real=True)
    metric.update(b, real=False)
    ours = evaluation.frechet_distance(evaluation.features(network, a), evaluation.features(network, b))
    assert ours == pytest.approx(float(metric.compute()), rel=2e-3)  # torchmetrics keeps float32 sums


def test_frechet_distance_of_known_gaussians():
    mean, scale = np.array([3.0, -4.0]), np.diag([1.0, 4.0])
    closed_form = 25 + (1 - 3) ** 2 + (2 - 1) ** 2  # |difference|^2 + sum (standard deviations' difference)^2
    distance = evaluation.frechet_distance_of_gaussians(np.zeros(2), scale, mean, np.diag([9.0, 1.0]))
    assert distance == pytest.approx(closed_form, rel=1e-12)


def test_frechet_distance_is_zero_on_itself_and_symmetric():
    a, b = correlated(100, 8, seed=3), correlated(120, 8, 1.0, seed=4)
    assert evaluation.frechet_distance(a, a) == pytest.approx(0.0, abs=1e-9)
    assert evaluation.frechet_distance(a, b) == pytest.approx(evaluation.frechet_distance(b, a), rel=1e-9)


def test_singular_covariance_is_no_trouble():
    a = correlated(60, 6, seed=5)
    a[:, 5] = a[:, 4]
    assert np.isfinite(evaluation.frechet_distance(a, a + 1))


def test_moments_do_not_depend_on_the_batches():
    rows = correlated(100, 5, 1e4, seed=6)  # far from zero: naive sums of squares would lose digits
    whole = evaluation.Moments(5).update(rows).compute()
    parts = evaluation.Moments(5)
    for batch in np.array_split(rows, 7):
        parts.update(batch)
    np.testing.assert_allclose(parts.compute()[0], whole[0], rtol=1e-12)
    np.testing.assert_allclose(parts.compute()[1], np.cov(rows.T), rtol=1e-8)


def test_too_few_images_are_an_error():
    with pytest.raises(InputError, match="at least 16 images.*of the samples there are 15"):
        evaluation.frechet_distance(correlated(15, 8), correlated(100, 8))
    with pytest.raises(InputError, match="at least 16 images.*of the reference images there are 15"):
        evaluation.frechet_distance(correlated(100, 8), correlated(15, 8))
    with pytest.raises(InputError, match="more than 3"):
        evaluation.precision_recall(np.zeros((3, 2)), np.zeros((9, 2)))
    with pytest.raises(InputError, match="of the reference images there are 2"):
        evaluation.precision_recall(np.zeros((9, 2)), np.zeros((2, 2)))


def test_not_finite_features_are_an_error():
    rows = correlated(50, 4)
    rows[3, 2] = np.nan
    with pytest.raises(InputError, match="NaN"):
        evaluation.frechet_distance(rows, rows)


def test_precision_and_recall_tell_collapse_from_noise():
    reference = RNG.uniform(-1, 1, size=(400, 2))
    collapsed = RNG.uniform(-0.05, 0.05, size=(400, 2))  # real-looking, but one corner of the data only
    spread = RNG.uniform(-8, 8, size=(4000, 2))  # covers the data, but mostly rubbish
    precision, recall = evaluation.precision_recall(collapsed, reference)
    assert precision > 0.9 and recall < 0.1
    precision, recall = evaluation.precision_recall(spread, reference)
    assert precision < 0.1 and recall > 0.9


def test_precision_and_recall_of_many_rows_use_some_of_them(monkeypatch):
    reference, samples = RNG.normal(size=(900, 2)), RNG.normal(size=(300, 2)) * 1.5
    exact = evaluation.precision_recall(samples, reference)
    monkeypatch.setattr(evaluation, "MOST_NEIGHBOURS", 600)
    some = evaluation.precision_recall(samples, reference)
    assert some == evaluation.precision_recall(samples, reference)  # the same ones every time
    assert some != exact and np.allclose(some, exact, atol=0.12)


def test_precision_counts_by_hand():
    reference = np.array([[0.0], [1.0], [2.0], [3.0]])
    samples = np.array([[0.5], [1.5], [10.0], [11.0]])  # with one neighbour every ball has radius 1
    assert evaluation.precision_recall(samples, reference, neighbours=1) == (0.5, 0.75)


def halves(count, seed):
    """Class 0 is bright on the left, class 1 on the right."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    images = 0.3 * torch.randn(count, 1, 16, 16, generator=generator)
    images[labels == 0, :, :, :8] += 0.6
    images[labels == 1, :, :, 8:] += 0.6
    return images.clamp(-1, 1), labels


def test_downstream_accuracy():
    samples, labels = halves(60, 1)
    test_images, test_labels = halves(40, 2)
    assert evaluation.downstream_accuracy(samples, labels, test_images, test_labels) == 1.0
    assert evaluation.downstream_accuracy(samples, 1 - labels, test_images, test_labels) == 0.0
    with pytest.raises(InputError, match="one class only"):
        evaluation.downstream_accuracy(samples, labels * 0, test_images, test_labels)
    with pytest.raises(InputError, match="differ in length"):
        evaluation.downstream_accuracy(samples, labels[:-1], test_images, test_labels)


def test_memorisation_sees_copies_and_ignores_set_size():
    train, test = RNG.normal(size=(900, 3)), RNG.normal(size=(300, 3))
    copied = evaluation.memorisation(train[:200], train[:300], test)
    assert copied["distance_ratio"] == 0.0 and copied["closer_to_train"] == 1.0
    fresh = evaluation.memorisation(RNG.normal(size=(500, 3)), train, test)
    assert 0.85 < fresh["distance_ratio"] < 1.15 and 0.35 < fresh["closer_to_train"] < 0.65


def test_evaluate_labels_every_score():
    torch.manual_seed(0)
    network = embedding.FeatureNetwork(dimension=8)
    samples, labels = halves(60, 1)
    train, train_labels = halves(64, 2)
    test, test_labels = halves(30, 3)
    scores = evaluation.evaluate(samples, labels, train, train_labels, test, test_labels, network)
    assert scores["label"] == "research metric, not DP" and scores["features"] == "glyphnet"
    assert scores["num_images"] == 60 and scores["accuracy"] == 1.0
    assert scores["frechet_distance_per_class"] > 0
    unlabelled = evaluation.evaluate(samples, None, train, None, test, None, network)
    assert unlabelled["accuracy"] is None and unlabelled["frechet_distance"] == scores["frechet_distance"]


def test_feature_network_is_small_reads_one_image_at_a_time_and_round_trips(tmp_path):
    torch.manual_seed(0)
    network = embedding.FeatureNetwork()
    assert sum(p.numel() for p in network.parameters()) < 300_000
    images, _ = halves(12, 4)
    together = evaluation.features(network, images)
    alone = np.concatenate([evaluation.features(network, images[i : i + 1]) for i in range(12)])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    network.save(tmp_path / "features.safetensors", dtype=torch.float32)
    again = embedding.FeatureNetwork.from_pretrained(tmp_path / "features.safetensors")
    assert again.name == "glyphnet" and not again.training
    np.testing.assert_array_equal(evaluation.features(again, images), together)
    network.save(tmp_path / "half.safetensors")
    half = tmp_path / "half.safetensors"
    assert half.stat().st_size < 600_000
    (tmp_path / "ordinary").touch()
    assert half.stat().st_mode == (tmp_path / "ordinary").stat().st_mode  # others may read what is shipped
    with pytest.raises(InputError, match="no feature network"):
        embedding.FeatureNetwork.from_pretrained(tmp_path / "absent.safetensors")
    with pytest.raises(InputError, match="resize"):
        network(torch.zeros(2, 3, 16, 16))


def test_bytes_and_nan_are_refused():
    network = embedding.FeatureNetwork()
    with pytest.raises(InputError, match="to_model_range"):
        evaluation.features(network, torch.full((4, 1, 16, 16), 255.0))
    with pytest.raises(InputError, match="NaN"):
        evaluation.features(network, torch.full((4, 1, 16, 16), torch.nan))


def test_inception_without_weights_is_one_helpful_line(tmp_path):
    images, _ = halves(4, 1)
    with pytest.raises(InputError, match="no Inception weights"):
        evaluation.inception_frechet_distance(images, images, tmp_path / "none.pth")
