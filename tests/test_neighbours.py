"""Training on public neighbours: the right images are found, the adapter moves towards them, nothing else is read."""

import dataclasses

import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch import nn

from hyperdp_lib import embedding, neighbours, refinement
from hyperdp_lib.adapter import Adapter
from hyperdp_lib.baselines.controls import PublicBank
from hyperdp_lib.data import InputError, from_levels
from hyperdp_lib.embedding import EncoderConfig
from hyperdp_lib.hypernetwork import HyperNetwork, HyperNetworkConfig
from hyperdp_lib.neighbours import NeighboursConfig
from hyperdp_lib.training import adapted_loss

QUICK = NeighboursConfig(num_sets=2, num_steps=3, images_per_step=4, sampling_steps=2)


class Corner(nn.Module):
    """Images are told by their first two pixels."""

    def __init__(self):
        super().__init__()
        self.config = EncoderConfig(dimension=3)
        self.parameter = nn.Parameter(torch.zeros(1))

    def forward(self, images):
        return torch.cat([torch.full((len(images), 1), 0.5), images.flatten(1)[:, :2]], 1)


def bank_of(levels):
    """Data sets with constant images of these 8-bit levels (T, M)."""
    pixels = torch.as_tensor(levels, dtype=torch.uint8)[:, :, None, None, None].expand(-1, -1, 1, 16, 16).contiguous()
    codes = embedding.embed(Corner(), from_levels(pixels.flatten(0, 1))).unflatten(0, pixels.shape[:2])
    return PublicBank(codes.mean(1), pixels)


def test_images_of_the_nearest_sets_come_nearest_first():
    bank = bank_of([[0, 20, 40], [100, 120, 140], [200, 220, 240]])
    target = from_levels(torch.tensor([[105, 105], [235, 235]], dtype=torch.uint8))
    found = neighbours.nearest_images(target, bank, Corner(), NeighboursConfig(num_sets=1))
    levels = ((found[:, :, 0, 0, 0] + 1) * 127.5).round().int().tolist()
    assert levels == [[100, 120, 140], [240, 220, 200]]
    two = neighbours.nearest_images(target, bank, Corner(), NeighboursConfig(num_sets=2, share=0.5))
    assert two.shape == (2, 3, 1, 16, 16)  # half of the images of two sets, from either of them
    assert ((two[0, :, 0, 0, 0] + 1) * 127.5).round().int().tolist() == [100, 120, 140]
    with pytest.raises(InputError, match="size of the bank"):
        neighbours.nearest_images(target, bank, Corner(), NeighboursConfig(num_sets=4))


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    base = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=1, num_layers=1, sample_size=16,
        patch_size=4, num_embeds_ada_norm=1,
    ).eval().requires_grad_(False)  # fmt: skip
    encoder = embedding.Encoder(EncoderConfig(dimension=4, width=8))
    network = HyperNetwork(encoder, base, HyperNetworkConfig(hidden=16, head_width=16, num_blocks=1)).eval()
    with torch.no_grad():
        network.head_b.weight.normal_(std=0.1)
    return base, network.requires_grad_(False)


def start_of(network):
    return Adapter.no_change(
        network.lora_config, network.geometry, num_adapters=2, generator=torch.Generator().manual_seed(0)
    )


def test_each_adapter_learns_its_own_images_and_nothing_else_changes(models):
    base, network = models
    before = {name: value.clone() for name, value in base.state_dict().items()}
    start = start_of(network)
    public = torch.stack([torch.full((6, 1, 16, 16), -0.9), torch.full((6, 1, 16, 16), 0.9)])
    config = dataclasses.replace(QUICK, num_steps=60, own_share=0.0, learning_rate=1e-2)
    made = neighbours.fine_tune(start, public, base, config, generator=torch.Generator().manual_seed(1))

    def loss(adapter, images):
        return float(adapted_loss(base, adapter, images.repeat(1, 8, 1, 1, 1), torch.Generator().manual_seed(2)))

    assert loss(made, public) < 0.8 * loss(start, public)
    assert loss(made, public) < 0.8 * loss(made, public.flip(0))  # it can fail: not everybody's images
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert not any(factor.requires_grad for factor in made.parameters()) and made.names == start.names
    assert all(float(factor.abs().max()) == 0 for factor in [pair[1] for pair in start.factors.values()])


def test_own_samples_hold_it_back(models):
    base, network = models
    public = torch.full((2, 6, 1, 16, 16), 0.9)
    moved = {}
    for share in (0.0, 0.75):
        config = dataclasses.replace(QUICK, num_steps=30, own_share=share, learning_rate=1e-2, images_per_step=16)
        made = neighbours.fine_tune(start_of(network), public, base, config, generator=torch.Generator().manual_seed(1))
        moved[share] = float(adapted_loss(base, made, public.repeat(1, 8, 1, 1, 1), torch.Generator().manual_seed(2)))
    assert moved[0.0] < moved[0.75]


def test_a_release_is_decoded_from_the_sum_and_public_data_alone(models):
    base, network = models
    g = torch.Generator().manual_seed(3)
    bank = PublicBank.build(Patterns(), network.encoder, num_tasks=40, images_per_task=12)
    sums = torch.randn(2, 4, generator=g) + 20
    shared = dict(bank=lambda encoder: bank, class_names=("a", "b"))
    one, again, other = (
        refinement.decode_again(
            sums.numpy(), 1.0, network, base, QUICK, **shared, generator=torch.Generator().manual_seed(seed)
        )
        for seed in (0, 0, 1)
    )
    factors = [next(iter(adapter.factors.values()))[1] for adapter in (one, again, other)]
    assert one.names == ("a", "b") and torch.equal(factors[0], factors[1])
    assert not torch.equal(factors[0], factors[2])
    with pytest.raises(InputError, match="give a bank"):
        refinement.decode_again(sums, 1.0, network, base, QUICK, class_names=("a", "b"), generator=g)
    assert QUICK.note.startswith("trained for 3 steps") and "no further privacy cost" in QUICK.note


class Patterns:
    def sample_tasks(self, num_tasks, images_per_task, generator):
        patterns = torch.randn(num_tasks, 1, 1, 16, 16, generator=generator)
        return (patterns + 0.3 * torch.randn(num_tasks, images_per_task, 1, 16, 16, generator=generator)).clamp(-1, 1)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_sets": 0}, {"num_steps": 0}, {"images_per_step": 0}, {"share": 0.0}, {"share": 1.5}, {"own_share": 1.0},
        {"learning_rate": 0.0},
    ],
)  # fmt: skip
def test_bad_requests_are_refused(changes):
    with pytest.raises(InputError, match=next(iter(changes))):
        NeighboursConfig(**changes)
