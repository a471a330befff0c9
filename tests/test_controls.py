"""The controls read the same noisy sum as the method, and know nothing else."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from hyperdp_lib import accounting, embedding
from hyperdp_lib.baselines import controls
from hyperdp_lib.data import InputError
from hyperdp_lib.embedding import EncoderConfig

K = 16


class Encoder(nn.Module):
    """A fixed random projection to norm 1, coordinate 0 constant."""

    def __init__(self):
        super().__init__()
        self.config = EncoderConfig(dimension=K)
        self.projection = nn.Parameter(
            torch.randn(256, K - 1, generator=torch.Generator().manual_seed(0)), requires_grad=False
        )

    def forward(self, images):
        rest = nn.functional.normalize(images.flatten(1) @ self.projection, dim=1)
        constant = torch.full((len(images), 1), embedding.COUNT_COORDINATE)
        return torch.cat([constant, rest * math.sqrt(1 - embedding.COUNT_COORDINATE**2)], 1)


class Tasks:
    """Task t is its own random pattern plus a little noise; the patterns do not depend on the draw."""

    patterns = torch.randn(30, 1, 16, 16, generator=torch.Generator().manual_seed(7)).clamp(-1, 1)

    def __init__(self):
        self.next = 0

    def sample_tasks(self, num_tasks, images_per_task, generator):
        chosen = self.patterns[self.next : self.next + num_tasks, None]
        self.next += num_tasks
        noise = 0.1 * torch.randn(num_tasks, images_per_task, 1, 16, 16, generator=generator)
        return (chosen + noise).clamp(-1, 1)


@pytest.fixture(scope="module")
def bank():
    return controls.PublicBank.build(Tasks(), Encoder(), num_tasks=30, images_per_task=8, seed=1)


def private(per_class=120, tasks=(4, 21, 9)):
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(len(tasks)).repeat_interleave(per_class)
    patterns = Tasks.patterns[torch.tensor(tasks)].repeat_interleave(per_class, 0)
    noise = 0.2 * torch.randn(patterns.shape, generator=generator)
    return (patterns + noise).clamp(-1, 1), labels


def sums(epsilon, seed=0):
    return controls.noisy_class_sums(*private(), Encoder(), epsilon=epsilon, num_classes=3, seed=seed)


def test_bank_is_reproducible_and_embeds_what_it_shows(bank):
    again = controls.PublicBank.build(Tasks(), Encoder(), num_tasks=30, images_per_task=8, seed=1)
    assert torch.equal(bank.pixels, again.pixels) and torch.equal(bank.embeddings, again.embeddings)
    shown = bank.images(5, 8, torch.Generator().manual_seed(0))
    torch.testing.assert_close(Encoder()(shown).mean(0), bank.embeddings[5], rtol=1e-4, atol=1e-5)


def test_bank_repeats_no_image_before_all_were_shown(bank):
    shown = bank.images(2, 16, torch.Generator().manual_seed(0))
    assert len(torch.unique(shown.flatten(1), dim=0)) == 8
    assert len(torch.unique(shown[:8].flatten(1), dim=0)) == 8


def test_no_noise_gives_the_exact_sum():
    noisy_sum, noise_std = sums(math.inf)
    images, labels = private()
    embeddings = Encoder()(images).double()
    expected = torch.stack([embeddings[labels == c].sum(0) for c in range(3)])
    assert noise_std == 0.0
    np.testing.assert_allclose(noisy_sum, expected, atol=120 * 2**-20 * 2)


def test_noise_is_that_of_the_budget():
    """Chi-square over 60 seeded sums, false alarm 1e-6."""
    from scipy import stats

    exact, _ = sums(math.inf)
    assert sums(1.0)[1] == pytest.approx(accounting.noise_multiplier(1.0, 1e-5))
    noise = np.stack([(sums(1.0, seed)[0] - exact) / sums(1.0, seed)[1] for seed in range(60)])
    low, high = stats.chi2(noise.size).ppf([5e-7, 1 - 5e-7])
    assert low < np.square(noise).sum() < high


def test_the_same_seed_gives_the_same_noisy_sum():
    np.testing.assert_array_equal(sums(1.0, 5)[0], sums(1.0, 5)[0])
    assert not np.array_equal(sums(1.0, 5)[0], sums(1.0, 6)[0])
    assert not np.array_equal(sums(1.0, None)[0], sums(1.0, None)[0])


def test_noisy_means_divide_by_the_noisy_count():
    sum_of_four = np.array([[2.0, 4.0, -8.0], [-1.0, 3.0, 3.0]])  # counts 4 and "-2", taken as 1
    np.testing.assert_allclose(controls.noisy_means(sum_of_four), [[0.5, 1, -2], [-1, 3, 3]])


def test_nearest_public_finds_the_task_it_came_from(bank):
    images, labels = controls.nearest_public(
        sums(4.0)[0], bank, num_nearest=1, num_images=24, generator=torch.Generator().manual_seed(0)
    )
    assert images.shape == (24, 1, 16, 16) and labels.tolist() == [c for c in range(3) for _ in range(8)]
    for c, task in enumerate((4, 21, 9)):
        assert {tuple(x.flatten().tolist()) for x in images[labels == c]} == {
            tuple(x.flatten().tolist()) for x in bank.pixels[task].float() / 127.5 - 1
        }


def test_nearest_public_shares_the_images(bank):
    images, labels = controls.nearest_public(
        sums(4.0)[0], bank, num_nearest=5, num_images=24, generator=torch.Generator()
    )
    assert len(images) == 24 and torch.bincount(labels).tolist() == [8, 8, 8]
    with pytest.raises(InputError, match="1 .. 30"):
        controls.nearest_public(sums(4.0)[0], bank, num_nearest=31, num_images=24, generator=torch.Generator())
    with pytest.raises(InputError, match="multiple of the 3"):
        controls.nearest_public(sums(4.0)[0], bank, num_nearest=1, num_images=25, generator=torch.Generator())


def test_nearest_mean_accuracy():
    images, labels = private(per_class=10)
    assert controls.nearest_mean_accuracy(sums(math.inf)[0], Encoder(), images, labels) == 1.0
    assert controls.nearest_mean_accuracy(sums(math.inf)[0][[1, 2, 0]], Encoder(), images, labels) == 0.0


def test_public_only_sees_noise_and_the_declared_count():
    seen = []

    class HyperNetwork:
        encoder = Encoder()

        def __call__(self, noisy_sum, noise_std):
            seen.append((noisy_sum, noise_std))
            return "adapter"

    for seed in (0, 0, 1):
        made = controls.public_only(
            HyperNetwork(),
            2.0,
            dimension=K,
            num_classes=500,
            declared_per_class=100,
            generator=torch.Generator().manual_seed(seed),
        )
        assert made == "adapter"
    (first, std), (again, _), (other, _) = seen
    assert std == 2.0 and first.shape == (500, K)
    assert torch.equal(first, again) and not torch.equal(first, other)
    centred = first.clone()
    centred[:, 0] -= 50
    assert abs(float(centred.mean())) < 5 * 2 / math.sqrt(500 * K)
    assert float(centred.std()) == pytest.approx(2.0, rel=0.05)


def test_a_bank_must_fit_together():
    with pytest.raises(InputError, match="same T"):
        controls.PublicBank(torch.zeros(3, K), torch.zeros(2, 4, 1, 16, 16, dtype=torch.uint8))


@pytest.mark.parametrize("relation", ["add_or_remove_one", "replace_one"])
def test_the_controls_read_the_sum_that_the_product_releases(relation):
    """Same seed, same budget: `release` and the comparison's noisy sum agree bit for bit."""
    from hyperdp_lib import diffusion, hypernetwork
    from hyperdp_lib.auditing.pipeline import release

    base = diffusion.build_base_model(diffusion.BaseModelConfig(width=32, num_layers=1))
    network = hypernetwork.HyperNetwork(embedding.Encoder(embedding.EncoderConfig(dimension=K)), base)
    images, labels = private(per_class=10)
    budget = dict(epsilon=1.0, neighboring_relation=relation, seed=3)
    names = ("a", "b", "c")
    released = release(images, network, private_labels=labels, class_names=names, **budget)
    noisy_sum, noise_std = controls.noisy_class_sums(images, labels, network.encoder, num_classes=3, **budget)
    np.testing.assert_array_equal(released.noisy_sum, noisy_sum)
    assert released.certificate.noise_std == noise_std
