"""Draws of the clean mean: Gaussian algebra against an independent computation, and calibration by simulation."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from hyperdp_lib import hypernetwork, posterior, training
from hyperdp_lib.data import InputError
from hyperdp_lib.embedding import EncoderConfig
from hyperdp_lib.posterior import Prior

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
    means, covariances = posterior.posterior(sums, noise_std, prior, COUNT)
    b, w, a = (value.numpy() for value in (prior.between, prior.within, prior.mean))
    precision = np.linalg.inv(b)
    noise = np.linalg.inv(w / n + (noise_std / n) ** 2 * np.eye(K))
    covariance = np.linalg.inv(precision + noise)
    assert np.allclose(covariances[0], covariance)
    assert np.allclose(means[0], covariance @ (precision @ a + noise @ m))


def test_much_noise_leaves_the_prior_and_none_the_mean():
    prior, m = some_prior(), np.ones(K)
    sums = np.concatenate([[1e6 * COUNT], 1e6 * m])[None]
    means, covariances = posterior.posterior(sums, 0.0, prior, COUNT)
    assert np.allclose(means, m, atol=1e-3) and covariances.abs().max() < 1e-3
    narrow = Prior(prior.mean, 1e-6 * prior.between, prior.within)  # noise is never taken for more than the count
    sums = np.concatenate([[10 * COUNT], 10 * m])[None]
    means, covariances = posterior.posterior(sums, 1e6, narrow, COUNT)
    assert np.allclose(means, prior.mean, atol=1e-3) and np.allclose(covariances, narrow.between, atol=1e-8)


def test_draws_are_calibrated():
    """The truth's rank among draws is uniform; 200 data sets, chi-square on 10 bins, false alarm below 1e-6."""
    prior, g, n, noise_std = some_prior(), torch.Generator().manual_seed(3), 30.0, 12.0
    rng = np.random.default_rng(3)
    ranks = []
    for _ in range(200):
        theta = rng.multivariate_normal(prior.mean.numpy(), prior.between.numpy())
        error = rng.multivariate_normal(np.zeros(K), prior.within.numpy() / n + (noise_std / n) ** 2 * np.eye(K))
        sums = np.concatenate([[n * COUNT], n * (theta + error)])[None]
        drawn = posterior.draw(sums, noise_std, prior, 99, count_coordinate=COUNT, generator=g)[:, 0, 0].numpy()
        ranks.append((drawn < theta[0]).sum())
    counts = np.histogram(ranks, bins=np.linspace(0, 100, 11))[0]
    assert stats.chisquare(counts).pvalue > 1e-6
    crowded = np.histogram(np.array(ranks) // 2, bins=np.linspace(0, 100, 11))[0]  # the test can fail
    assert stats.chisquare(crowded).pvalue < 1e-6


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
    folder = shutil.copytree(hypernetwork.resolve("glyphs-nested"), tmp_path / "weights")
    (folder / hypernetwork.PRIORS_FILE).unlink()
    network = hypernetwork.load_pretrained(folder)[1].using(coordinates)
    with pytest.raises(InputError, match="add_public_tables makes it"):
        Prior.shipped(network)
    training.add_public_tables(folder, training.public_source("glyphs-nested").tasks(), num_tasks=300)
    made = Prior.shipped(hypernetwork.load_pretrained(folder)[1].using(coordinates))
    shipped = Prior.shipped(hypernetwork.load_pretrained("glyphs-nested")[1].using(coordinates))
    assert float((made.mean - shipped.mean).norm()) < 0.1
    for part in ("between", "within"):
        mine, theirs = getattr(made, part), getattr(shipped, part)
        assert float((mine - theirs).norm() / theirs.norm()) < 0.25
    assert float(shipped.within.trace() / shipped.between.trace()) < 1  # data sets differ by more than their images


class Recorder(nn.Module):
    """A hypernetwork that keeps what it is asked."""

    def __init__(self):
        super().__init__()
        self.encoder, self.asked = Encoder(), None

    def forward(self, sums, noise_std, names):
        self.asked = (sums, noise_std, names)
        return sums


def test_each_class_gets_its_draws_as_clean_means():
    network, prior = Recorder(), some_prior()
    means = np.random.default_rng(5).normal(size=(2, K))
    sums = 1000 * np.concatenate([np.full((2, 1), COUNT), means], 1)
    posterior.decode_draws(
        sums, 0.0, network, prior, 3, class_names=("a", "b"), generator=torch.Generator().manual_seed(0)
    )
    asked, noise_std, names = network.asked
    assert names == ("a/0", "a/1", "a/2", "b/0", "b/1", "b/2") and asked.shape == (6, K + 1)
    assert torch.allclose(asked[:, 0], torch.full((6,), 1000 * COUNT))
    assert np.allclose(asked[:, 1:] / 1000, means.repeat(3, 0), atol=0.1)
    assert torch.allclose(noise_std, torch.full((6,), 1000 * posterior.CLEAN))


def test_bad_input_is_said():
    prior = some_prior()
    with pytest.raises(InputError, match="coordinates"):
        posterior.posterior(np.ones((1, K)), 1.0, prior, COUNT)
    with pytest.raises(InputError, match="num_draws"):
        posterior.draw(
            np.ones((1, K + 1)), 1.0, prior, 0, count_coordinate=COUNT, generator=torch.Generator().manual_seed(0)
        )
    with pytest.raises(InputError, match="more tasks"):
        Prior.fit(Encoder(), torch.zeros(3, 2, K, 1, 1))


def some_adapters(count, seed=0):
    """Adapters of rank 2 of two small layers."""
    from peft import LoraConfig

    from hyperdp_lib.adapter import Adapter, lora_geometry

    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 7))
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["0", "1"])
    geometry = lora_geometry(model, config)
    factors = {m.name: (torch.randn(count, *m.a_shape), torch.randn(count, *m.b_shape)) for m in geometry.modules}
    return Adapter(config, geometry, factors, tuple(map(str, range(count))))


def updates(adapter):
    return {name: b @ a for name, (a, b) in adapter.factors.items()}


def test_the_average_is_the_best_of_its_rank():
    """Against numpy's singular values of the mean update; the average of the factors is another matter."""
    drawn = some_adapters(6)
    made = posterior.average(drawn, ("a", "b"))
    assert made.names == ("a", "b") and len(made) == 2
    for name, update in updates(made).items():
        mean = updates(drawn)[name].unflatten(0, (2, 3)).mean(1)
        rest = np.linalg.svd(mean.numpy(), compute_uv=False)[:, 2:]
        missed = (update - mean).square().sum((1, 2))
        assert np.allclose(missed, np.square(rest).sum(1), rtol=1e-3)
        a, b = (factor.unflatten(0, (2, 3)).mean(1) for factor in drawn.factors[name])
        assert ((b @ a - mean).square().sum((1, 2)) > 1.5 * missed).all()  # the test can fail


def test_the_average_of_equal_adapters_is_what_they_are():
    one = some_adapters(1)
    same = posterior.average(
        dataclasses.replace(
            one, factors={k: (a.repeat(4, 1, 1), b.repeat(4, 1, 1)) for k, (a, b) in one.factors.items()},
            names=tuple("abcd"),
        ),
        ("x",),
    )  # fmt: skip
    for name, update in updates(same).items():
        assert torch.allclose(update, updates(one)[name], atol=1e-4)


def test_the_posterior_mean_is_told_what_is_left_open():
    network, prior = Recorder(), some_prior()
    sums = 1000 * np.concatenate([np.full((1, 1), COUNT), np.ones((1, K))], 1)
    for noise_std in (50.0, 500.0):
        posterior.decode(
            sums, noise_std, network, prior, posterior.DrawsConfig(num_draws=0), generator=torch.Generator()
        )
        means, covariances = posterior.posterior(sums, noise_std, prior, COUNT)
        asked, told, names = network.asked
        assert names == ("adapter",) and np.allclose(asked[:, 1:] / 1000, means, atol=1e-5)
        assert np.allclose(told.square() / 1000**2, torch.diagonal(covariances[0]).mean(), rtol=1e-4)
        assert told < noise_std + 40  # no more than the noise, and the spread of images


def test_a_mixture_has_its_draws_side_by_side():
    network = Recorder()
    sums = 1000 * np.concatenate([np.full((2, 1), COUNT), np.ones((2, K))], 1)
    config = posterior.DrawsConfig(num_draws=3)
    posterior.decode(
        sums, 1.0, network, some_prior(), config, class_names=("a", "b"), generator=torch.Generator().manual_seed(0)
    )
    assert network.asked[2] == ("a/0", "a/1", "a/2", "b/0", "b/1", "b/2")
    assert "3 draws of the clean mean, mixed" in config.note and "no further privacy cost" in config.note
    none = posterior.DrawsConfig(0)
    assert posterior.DrawsConfig(0, average=True) == none and "posterior mean" in none.note
    with pytest.raises(InputError, match="num_draws"):
        posterior.DrawsConfig(100)
