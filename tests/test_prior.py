"""The prior of public data sets: Gaussian algebra against an independent computation, and the fit by simulation."""

import shutil

import numpy as np
import pytest
import torch
from torch import nn

from hyperdp_lib import pretrained
from hyperdp_lib.data import InputError
from hyperdp_lib.embedding import EncoderConfig
from hyperdp_lib.prior import Prior, posterior
from hyperdp_lib.public import training

K, COUNT = 5, 0.5


def some_prior(seed=0):
    g = torch.Generator().manual_seed(seed)
    root, other = torch.randn(2, K, K, generator=g, dtype=torch.float64)
    return Prior(torch.randn(K, generator=g, dtype=torch.float64), root @ root.T + torch.eye(K), 0.1 * other @ other.T)


def test_the_formula_is_that_of_conditioning_a_joint_gaussian():
    """Of theta and m jointly Gaussian, by numpy on the joint covariance, without the gain."""
    prior, n, noise_std = some_prior(), 40.0, 20.0
    m = np.random.default_rng(1).normal(size=K)
    sums = np.concatenate([[n * COUNT], n * m])[None]
    means, covariances = posterior(sums, noise_std, prior, COUNT)
    b, w, a = (value.numpy() for value in (prior.between, prior.within, prior.mean))
    precision = np.linalg.inv(b)
    noise = np.linalg.inv(w / n + (noise_std / n) ** 2 * np.eye(K))
    covariance = np.linalg.inv(precision + noise)
    assert np.allclose(covariances[0], covariance)
    assert np.allclose(means[0], covariance @ (precision @ a + noise @ m))


def test_much_noise_leaves_the_prior_and_none_the_mean():
    prior, m = some_prior(), np.ones(K)
    sums = np.concatenate([[1e6 * COUNT], 1e6 * m])[None]
    means, covariances = posterior(sums, 0.0, prior, COUNT)
    assert np.allclose(means, m, atol=1e-3) and covariances.abs().max() < 1e-3
    narrow = Prior(prior.mean, 1e-6 * prior.between, prior.within)  # noise is never taken for more than the count
    sums = np.concatenate([[10 * COUNT], 10 * m])[None]
    means, covariances = posterior(sums, 1e6, narrow, COUNT)
    assert np.allclose(means, prior.mean, atol=1e-3) and np.allclose(covariances, narrow.between, atol=1e-8)


class Encoder(nn.Module):
    """Images are their own codes."""

    def __init__(self):
        super().__init__()
        self.config = EncoderConfig(dimension=K + 1)
        self.parameter = nn.Parameter(torch.zeros(1))

    def forward(self, images):
        return torch.cat([torch.full((len(images), 1), COUNT), images.flatten(1)], 1)


def test_the_prior_is_estimated_without_the_spread_of_images():
    """Means of 4 images spread by W have covariance B + W / 4: the fit takes W / 4 off."""
    truth, rng = some_prior(1), np.random.default_rng(4)
    theta = rng.multivariate_normal(truth.mean.numpy(), truth.between.numpy(), 20_000)
    images = theta[:, None] + rng.multivariate_normal(np.zeros(K), truth.within.numpy(), (20_000, 4))
    fitted = Prior.fit(Encoder(), torch.tensor(images, dtype=torch.float32)[:, :, None, None])
    assert np.allclose(fitted.between, truth.between, atol=0.06 * truth.between.abs().max())
    assert np.allclose(fitted.within, truth.within, atol=0.06 * truth.within.abs().max())
    assert np.allclose(fitted.mean, truth.mean, atol=0.1)


@pytest.mark.parametrize("coordinates", [8, 64])
def test_the_shipped_prior_is_that_of_public_tasks_and_training_makes_it(coordinates, tmp_path):
    """Of fewer and other tasks, so nearly."""
    folder = shutil.copytree(pretrained.resolve("glyphs-nested"), tmp_path / "weights")
    (folder / pretrained.PRIORS_FILE).unlink()
    network = pretrained.load_pretrained(folder)[1].using(coordinates)
    with pytest.raises(InputError, match="add_public_tables makes it"):
        Prior.shipped(network)
    training.add_public_tables(folder, training.public_source("glyphs-nested").tasks(), num_tasks=300)
    made = Prior.shipped(pretrained.load_pretrained(folder)[1].using(coordinates))
    shipped = Prior.shipped(pretrained.load_pretrained("glyphs-nested")[1].using(coordinates))
    assert float((made.mean - shipped.mean).norm()) < 0.1
    for part in ("between", "within"):
        mine, theirs = getattr(made, part), getattr(shipped, part)
        assert float((mine - theirs).norm() / theirs.norm()) < 0.25
    assert float(shipped.within.trace() / shipped.between.trace()) < 1  # data sets differ by more than their images


def test_bad_input_is_said():
    prior = some_prior()
    with pytest.raises(InputError, match="coordinates"):
        posterior(np.ones((1, K)), 1.0, prior, COUNT)
    with pytest.raises(InputError, match="more tasks"):
        Prior.fit(Encoder(), torch.zeros(3, 2, K, 1, 1))
