"""Closed-loop decoding: it finds the input whose samples have the released mean, and reads nothing but the release."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn

from hyperdp_lib import diffusion, embedding, pretrained, refinement
from hyperdp_lib.data import InputError
from hyperdp_lib.embedding import EncoderConfig
from hyperdp_lib.refinement import RefinementConfig, refine

COUNT, K = 100.0, 6  # images in each class; dimensions besides the count


class Decoder(nn.Module):
    """A hypernetwork in miniature, and wrong: samples of input mean m have mean ``gain m + offset``."""

    def __init__(self, gain=0.6, offset=0.1):
        super().__init__()
        self.gain, self.offset = nn.Parameter(torch.tensor(gain)), offset
        self.encoder = nn.Identity()
        self.encoder.config = EncoderConfig(dimension=K + 1)
        self.seen = []

    def forward(self, noisy_sum, noise_std, names=None):
        self.seen.append(noisy_sum.clone())
        return self.gain * noisy_sum[:, 1:] / (noisy_sum[:, :1] / embedding.COUNT_COORDINATE) + self.offset


@pytest.fixture
def world(monkeypatch):
    """Sampling adds noise of 0.05 to each image; images are their own embedding."""

    def sample(base_model, adapter, num_images, *, generator, num_steps):
        means = adapter.repeat_interleave(num_images // len(adapter), 0)
        return means + 0.05 * torch.randn(means.shape, generator=generator)

    monkeypatch.setattr(refinement.diffusion, "sample", sample)
    monkeypatch.setattr(
        refinement.embedding, "embed", lambda encoder, images, **_: torch.cat([images[:, :1] * 0 + 0.5, images], 1)
    )


def released(classes=3, seed=0):
    means = np.random.default_rng(seed).normal(0, 0.3, size=(classes, K))
    return np.concatenate([np.full((classes, 1), COUNT * embedding.COUNT_COORDINATE), COUNT * means], 1), means


def run(decoder, noisy_sum, noise_std=0.0, seed=1, **changes):
    names = tuple(map(str, range(len(noisy_sum))))
    generator = torch.Generator().manual_seed(seed)
    return refine(
        noisy_sum, noise_std, decoder, None, RefinementConfig(**changes), class_names=names, generator=generator
    )


def test_samples_get_the_released_mean_though_the_decoder_is_wrong(world):
    noisy_sum, means = released()
    open_loop = Decoder()(torch.tensor(noisy_sum), 0.0).detach().numpy()
    closed = run(Decoder(), noisy_sum, num_rounds=40, gain=math.inf).numpy()
    assert np.abs(open_loop - means).mean() > 0.1
    # what is left: (1 - gain step_size) ** 20 of the first miss, and 0.05 / sqrt(60) of sampling noise, averaged
    assert np.abs(closed - means).max() < 0.02


def test_the_average_over_rounds_has_less_sampling_noise_than_the_last_round(world):
    noisy_sum, means = released()
    decoder = Decoder(gain=1.0, offset=0.0)
    many = dict(num_rounds=60, images_per_class=2, step_size=1.0, gain=math.inf)
    averaged = run(decoder, noisy_sum, **many)
    last = decoder.seen[-2][:, 1:] / COUNT  # the input of the last round; the very last is the average
    assert (averaged - torch.tensor(means)).square().mean() < (last - torch.tensor(means)).square().mean() / 4


@pytest.mark.parametrize("gain", [0.5, 2.0])
def test_the_input_moves_by_the_gain_times_what_is_still_missed(world, gain):
    """Fixed point of samples' mean e(x) = 0.6 x + 0.1: x = m + gain (m - e(x)), solved by hand."""
    noisy_sum, means = released()
    expected = (means * (1 + gain) - 0.1 * gain) / (1 + 0.6 * gain)
    closed = run(Decoder(), noisy_sum, num_rounds=60, gain=gain, images_per_class=500).numpy()
    assert np.abs(closed - (0.6 * expected + 0.1)).max() < 0.02


def test_a_mean_that_no_adapter_has_does_not_send_the_input_away(world):
    noisy_sum, means = released()
    moved = {}
    for gain in (1.0, math.inf):
        decoder = Decoder(gain=0.0, offset=0.0)  # whatever the input, samples have mean zero
        run(decoder, noisy_sum, num_rounds=60, gain=gain)
        moved[gain] = (decoder.seen[-1][:, 1:] / COUNT - torch.tensor(means)).norm() / np.linalg.norm(means)
    assert moved[1.0] < 1.1 and moved[math.inf] > 5


def test_a_decoder_that_is_right_is_left_alone(world):
    noisy_sum, means = released()
    assert np.abs(run(Decoder(gain=1.0, offset=0.0), noisy_sum).detach().numpy() - means).max() < 0.02


def test_the_input_keeps_the_count_and_moves_by_a_share_of_the_miss(world):
    noisy_sum, means = released(classes=1)
    decoder = Decoder(gain=0.5, offset=0.0)
    run(decoder, noisy_sum, num_rounds=2, step_size=0.4, images_per_class=20_000)
    first, second = decoder.seen[:2]
    assert torch.equal(first, torch.tensor(noisy_sum, dtype=torch.float32)) and second[0, 0] == first[0, 0]
    moved = (second - first)[0, 1:] / COUNT
    assert np.allclose(moved, 0.4 * (1 - 0.5) * means[0], atol=2e-3)


def test_a_sum_that_is_all_noise_moves_within_bounds(world):
    noisy_sum, _ = released(classes=1)
    noisy_sum[0, 0] = -3.0  # the noisy count of an almost empty class
    decoder = Decoder(gain=0.0, offset=0.0)
    run(decoder, noisy_sum, noise_std=4.0, num_rounds=3)
    moved = (decoder.seen[1] - decoder.seen[0])[0, 1:]
    assert np.allclose(moved, 0.4 * noisy_sum[0, 1:], rtol=0.2, atol=1.0)  # not divided by next to nothing


def test_the_same_generator_gives_the_same_adapter_and_the_release_is_left_as_it_was(world):
    noisy_sum, _ = released()
    before = noisy_sum.copy()
    first, second, other = (run(Decoder(), noisy_sum, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert np.array_equal(noisy_sum, before) and not first.requires_grad


def test_bad_requests_are_refused(world):
    noisy_sum, _ = released()
    with pytest.raises(InputError, match="a row for each of the 1 classes"):
        refine(noisy_sum, 0.0, Decoder(), None, generator=torch.Generator())
    for changes, message in (
        ({"num_rounds": 0}, "num_rounds"),
        ({"images_per_class": 0}, "images_per_class"),
        ({"step_size": 0.0}, "step_size"),
        ({"step_size": 1.5}, "step_size"),
        ({"gain": 0.3}, "gain"),
        ({"gain": math.nan}, "gain"),
    ):
        with pytest.raises(InputError, match=message):
            RefinementConfig(**changes)


def test_it_closes_the_gap_of_the_shipped_weights():
    """Two public characters, no noise: after six rounds the samples' means lie nearer to the released ones."""
    from hyperdp_lib.public.glyphs import GlyphConfig, GlyphTasks

    base_model, network = pretrained.load_pretrained("glyphs")
    tasks = GlyphTasks(GlyphConfig(), split="held_out").sample_tasks(4, 100, torch.Generator().manual_seed(3))
    codes = embedding.embed(network.encoder, tasks.flatten(0, 1)).view(4, 100, -1)
    names = tuple("abcd")

    def miss(adapter):
        images = diffusion.sample(base_model, adapter, 400, generator=torch.Generator().manual_seed(9), num_steps=8)
        drawn = embedding.embed(network.encoder, images).view(4, 100, -1)
        return (drawn.mean(1) - codes.mean(1)).norm(dim=1).mean()

    with torch.no_grad():
        plain = network(codes.sum(1), 0.0, names)
    config = RefinementConfig(num_rounds=6, images_per_class=40, sampling_steps=8)
    refined = refine(
        codes.sum(1), 0.0, network, base_model, config, class_names=names, generator=torch.Generator().manual_seed(0)
    )
    assert miss(refined) < 0.9 * miss(plain)
    assert dataclasses.replace(config, num_rounds=7).note.startswith("refined in 7 rounds")
