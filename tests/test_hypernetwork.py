"""Hypernetwork: no change at the start, bounded on pure noise, one network for all noise levels, safe files."""

import json

import pytest
import torch

from hyperdp_lib.adapter import apply_adapters
from hyperdp_lib.data import InputError
from hyperdp_lib.diffusion import BaseModelConfig, build_base_model, predict
from hyperdp_lib.embedding import COUNT_COORDINATE, Encoder, EncoderConfig
from hyperdp_lib.hypernetwork import LARGEST_SET, LEAST_NOISE, HyperNetwork, HyperNetworkConfig, summary
from hyperdp_lib.pretrained import load_pretrained, resolve, save_pretrained

TINY = HyperNetworkConfig(hidden=16, head_width=8, num_blocks=1)


def tiny(seed=0):
    torch.manual_seed(seed)
    base = build_base_model(BaseModelConfig(width=32, num_layers=2))
    for parameter in base.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return base, HyperNetwork(Encoder(EncoderConfig(dimension=16, width=8)), base, TINY)


def test_a_new_hypernetwork_changes_nothing():
    base, hypernetwork = tiny()
    adapter = hypernetwork(torch.randn(3, 16) * 10, 3.0)
    x, sigma = torch.randn(6, 1, 16, 16), torch.rand(6)
    with torch.no_grad():
        plain = predict(base, x, sigma)
        with apply_adapters(base, adapter):
            assert torch.equal(predict(base, x, sigma), plain)


def test_gradients_reach_the_decoder_and_not_the_encoder():
    base, hypernetwork = tiny()
    with apply_adapters(base, hypernetwork(torch.randn(2, 16) * 10, 3.0)):
        predict(base, torch.randn(4, 1, 16, 16), torch.rand(4)).square().sum().backward()
    assert hypernetwork.head_b.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in hypernetwork.encoder.parameters())
    assert not hypernetwork.train().encoder.training


def test_every_linear_layer_of_the_blocks_is_adapted():
    base, hypernetwork = tiny()
    assert len(hypernetwork.geometry.modules) == 2 * 7
    linear = [
        n for n, m in base.named_modules()
        if isinstance(m, torch.nn.Linear) and n.startswith("transformer_blocks") and ".emb." not in n
    ]  # fmt: skip
    assert sorted(hypernetwork.geometry.names) == sorted(linear)


def test_summary_recovers_mean_noise_and_count():
    mean = torch.tensor([[0.3, -0.4, 0.1]])
    noisy_sum = torch.cat([torch.tensor([[COUNT_COORDINATE]]), mean], 1) * 200
    features = summary(noisy_sum, torch.tensor([4.0]))
    assert torch.allclose(features[0], 8 * mean)
    assert torch.isclose(features[1], (torch.tensor(4.0 / 200).log() + 4) / 2)
    assert torch.isclose(features[2], (torch.tensor(200.0).log() - 4) / 2)


def test_summary_tells_nothing_that_training_never_saw():
    """No noise at all, and a set of millions: told as the least noise and the largest set of public training."""
    for size in (LARGEST_SET, 1e7):
        noisy_sum = torch.cat([torch.tensor([[COUNT_COORDINATE]]), torch.tensor([[0.3, -0.4]])], 1) * size
        _, noise, count = summary(noisy_sum, torch.tensor([0.0]))
        assert torch.isclose(noise, (torch.tensor(LEAST_NOISE).log() + 4) / 2)
        assert torch.isclose(count, (torch.tensor(float(LARGEST_SET)).log() - 4) / 2)


@pytest.mark.parametrize("value", [0.0, -1e6, 1e6])
@pytest.mark.parametrize("std", [0.0, 1e-3, 1e4])
def test_summary_is_bounded_whatever_was_released(value, std):
    """A sum that is all noise, or a negative noisy count, must not blow up."""
    for features in summary(torch.full((2, 16), value), torch.full((2,), std)):
        assert torch.isfinite(features).all() and features.abs().max() < 50


def test_noise_level_reaches_the_output():
    _, hypernetwork = tiny()
    torch.nn.init.normal_(hypernetwork.head_b.weight)
    sums = torch.rand(1, 16) * 50
    a, b = hypernetwork(sums, 0.5), hypernetwork(sums, 8.0)
    assert not torch.allclose(*(next(iter(x.factors.values()))[1] for x in (a, b)))


def test_saved_and_loaded_is_the_same_up_to_half_precision(tmp_path):
    base, hypernetwork = tiny()
    torch.nn.init.normal_(hypernetwork.head_b.weight, std=0.1)
    save_pretrained(tmp_path / "w", base, hypernetwork, {"name": "tiny"})
    assert not list((tmp_path / "w").rglob("*.bin")) and not list((tmp_path / "w").rglob("*.pt"))
    base_2, again = load_pretrained(tmp_path / "w")
    sums = torch.rand(2, 16) * 50
    for name, (a, b) in hypernetwork(sums, 1.0).factors.items():
        a_2, b_2 = again(sums, 1.0).factors[name]
        assert torch.allclose(a, a_2, atol=5e-3) and torch.allclose(b, b_2, atol=2e-2)
    assert len(again.base_model_sha256) == 64
    assert json.loads((tmp_path / "w" / "manifest.json").read_text())["encoder"]["dimension"] == 16
    x, sigma = torch.randn(2, 1, 16, 16), torch.rand(2)
    assert torch.allclose(predict(base, x, sigma), predict(base_2, x, sigma), atol=2e-2)


def test_unknown_names_are_one_helpful_line():
    with pytest.raises(InputError, match="no hypernetwork 'nothing'"):
        resolve("nothing")
