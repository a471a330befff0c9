"""A release with classes as a classifier: the densities it says it uses, and samples chosen or labelled by it."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from torch import nn

from hyperdp_lib import classifier, data, embedding, pretrained
from hyperdp_lib.auditing.pipeline import release
from hyperdp_lib.baselines import controls
from hyperdp_lib.cells import CellHyperNetwork
from hyperdp_lib.classifier import Classifier
from hyperdp_lib.data import InputError
from hyperdp_lib.embedding import EncoderConfig
from hyperdp_lib.hypernetwork import noisy_count
from hyperdp_lib.prior import Prior
from hyperdp_lib.public.glyphs import GlyphConfig, GlyphTasks

K = 3
COUNT = embedding.COUNT_COORDINATE


class Network(nn.Module):
    """Images (N, K) are their own vectors; nothing is ever decoded."""

    def __init__(self):
        super().__init__()
        self.encoder, self.base_model_sha256, self.priors = nn.Identity(), None, {}
        self.encoder.config = EncoderConfig(dimension=K + 1)


@pytest.fixture
def own_vectors(monkeypatch):
    monkeypatch.setattr(classifier.embedding, "embed", lambda _, images, **__: torch.cat([images[:, :1], images], 1))


@pytest.fixture(scope="module")
def network():
    """The shipped weights and a release of digits at epsilon = 1 that was made with them."""
    train = data.digits("train")
    base_model, found = pretrained.load_pretrained("glyphs")
    labelled = dict(private_labels=train.labels, class_names=train.class_names)
    made = release(train.images, found, epsilon=1.0, seed=0, **labelled)
    return found, dataclasses.replace(made, base_model=base_model)


def some_prior(seed=0):
    g = torch.Generator().manual_seed(seed)
    root, other = (torch.randn(K, K, generator=g, dtype=torch.float64) for _ in range(2))
    return Prior(torch.zeros(K, dtype=torch.float64), root @ root.T, 0.1 * other @ other.T + 0.01 * torch.eye(K))


def sums_of(counts, means):
    return torch.tensor([[COUNT * n, *(n * x for x in mean)] for n, mean in zip(counts, means, strict=True)])


def test_an_image_goes_where_its_vector_is_likeliest(own_vectors):
    """Against densities from SciPy, of the Gaussian posterior written down here once more."""
    prior, noise_std, counts = some_prior(), 6.0, (40.0, 80.0)
    sums = sums_of(counts, ([0.4, -0.2, 0.1], [-0.3, 0.1, 0.2]))
    images = 0.6 * torch.randn(300, K, generator=torch.Generator().manual_seed(1))
    b, w = prior.between.numpy(), prior.within.numpy()
    spread = 0.7 * w + 0.3 * np.trace(w) / K * np.eye(K)
    log_likelihood = []
    for row, n in zip(sums.double().numpy(), counts, strict=True):
        precision = np.linalg.inv(b) + np.linalg.inv(w / n + (noise_std / n) ** 2 * np.eye(K))
        left = np.linalg.inv(precision)
        mean = left @ np.linalg.inv(w / n + (noise_std / n) ** 2 * np.eye(K)) @ (row[1:] / n)
        log_likelihood.append(multivariate_normal(mean, left + spread).logpdf(images.numpy()))
    told = Classifier.of(sums, noise_std, Network(), prior)(images)
    assert told.tolist() == np.argmax(log_likelihood, 0).tolist() and 0 < told.sum() < len(told)


def test_of_cells_each_counts_as_released_and_stands_for_its_class(own_vectors):
    prior, cells = some_prior(2), CellHyperNetwork(Network(), torch.eye(K)[:2])
    # two classes of two cells; the last holds almost nothing, and is left out
    parts = (80.0, [0.1] * K), (20.0, [-0.2] * K), (100.0, [-0.1] * K), (0.4, [3.0] * K)
    sums = sums_of(*zip(*parts, strict=True)).view(2, -1)
    found = Classifier.of(sums, 1.0, cells, prior, ridge=1.0)
    assert found.classes.tolist() == [0, 0, 1]
    assert torch.allclose(found.means[:, 0], torch.tensor([0.1, -0.2, -0.1], dtype=torch.float64))
    error = prior.within / 20 + torch.eye(K) / 20**2
    assert torch.allclose(found.roots[1] @ found.roots[1].T, error + torch.eye(K) * prior.within.trace() / K)
    images = torch.tensor([[0.09], [-0.11], [-0.35]]).expand(3, K)
    assert found(images).tolist() == [0, 1, 0]


def test_weights_without_a_prior_say_what_makes_one():
    with pytest.raises(InputError, match="add_public_tables makes it"):
        Classifier.of(sums_of([10.0], [[0.1] * K]), 1.0, Network())


def test_a_spread_that_cannot_be_inverted_is_refused():
    sums, flat = sums_of([10.0], [[0.1] * K]), torch.diag(torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64))
    prior = Prior(torch.zeros(K, dtype=torch.float64), torch.eye(K, dtype=torch.float64), flat)
    with pytest.raises(InputError, match="larger ridge"):
        Classifier.of(sums, 0.0, Network(), prior, ridge=0.0)
    assert Classifier.of(sums, 0.0, Network(), prior).classes.tolist() == [0]
    for ridge in (-1.0, 2.0):
        with pytest.raises(InputError, match=r"ridge must lie in \[0, 1\]"):
            Classifier.of(sums, 1.0, Network(), prior, ridge=ridge)


def test_it_is_better_than_the_nearest_released_mean():
    """Held-out public glyphs, ten data sets as classes, a dozen images of each at epsilon = 1: on average."""
    network = pretrained.load_pretrained("glyphs-nested")[1].using(16)
    source, gain = GlyphTasks(GlyphConfig(), split="held_out"), []
    for seed in range(20):
        drawn = source.sample_tasks(10, 42, torch.Generator().manual_seed(seed))
        labels, truth = (torch.arange(10).repeat_interleave(each) for each in (12, 30))
        private, asked = drawn[:, :12].flatten(0, 1), drawn[:, 12:].flatten(0, 1)
        released, noise_std = controls.noisy_class_sums(
            private, labels, network.encoder, epsilon=1.0, num_classes=10, seed=seed
        )
        sums = torch.from_numpy(released).float()
        counts = noisy_count(sums, noise_std, network.encoder.config.count_coordinate)
        near = torch.cdist(embedding.embed(network.encoder, asked)[:, 1:], sums[:, 1:] / counts[:, None]).argmin(1)
        told = Classifier.of(sums, noise_std, network)(asked)
        gain.append(float((told == truth).double().mean() - (near == truth).double().mean()))
    assert np.mean(gain) > 3 * np.std(gain, ddof=1) / len(gain) ** 0.5


def test_samples_are_relabelled_as_the_release_would(network):
    found, made = network
    drawn, told, agreed = classifier.sample_relabelled(
        made, found, 60, generator=torch.Generator().manual_seed(0), num_steps=6
    )
    test = data.digits("test")
    classify = Classifier.of(made.noisy_sum, made.certificate.noise_std, found)
    assert float((classify(test.images) == test.labels).double().mean()) > 0.85
    assert drawn.shape == (600, 1, 16, 16) and 0.5 < agreed < 1
    assert torch.equal(told, Classifier.of(made.noisy_sum, made.certificate.noise_std, found)(drawn))
    assert float((told == torch.arange(10).repeat_interleave(60)).double().mean()) == pytest.approx(agreed)


def test_what_cannot_be_told_apart_is_refused(network):
    found, made = network
    asked = dict(per_class=4, generator=torch.Generator().manual_seed(0))
    alone = release(data.digits("train").images, found, epsilon=1.0, seed=0)
    with pytest.raises(InputError, match="at least two classes"):
        classifier.sample_relabelled(alone, found, **asked)
    with pytest.raises(InputError, match="this hypernetwork's encoder"):
        classifier.sample_relabelled(made, pretrained.load_pretrained("drawings")[1], **asked)
