"""Base denoiser: a stock diffusers model, a per-example loss, sampling that diffusers alone can repeat."""

import pytest
import torch
from diffusers import DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler

from hyperdp_lib import diffusion
from hyperdp_lib.adapter import Adapter
from hyperdp_lib.diffusion import (
    BaseModelConfig,
    build_base_model,
    denoising_loss,
    load_base_model,
    predict,
    sample,
    sample_classes,
)
from hyperdp_lib.hypernetwork import HyperNetworkConfig
from hyperdp_lib.lora_geometry import lora_geometry


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = build_base_model(BaseModelConfig(width=32, num_layers=1))
    for parameter in model.parameters():  # a fresh DiT's last layer is zero; give every layer something to do
        torch.nn.init.normal_(parameter, std=0.05)
    return model


def test_the_model_is_stock_and_survives_the_disk(model, tmp_path):
    assert type(model) is DiTTransformer2DModel
    model.save_pretrained(tmp_path)
    again = load_base_model(tmp_path)
    x, sigma = torch.randn(3, 1, 16, 16), torch.tensor([0.1, 0.5, 0.9])
    assert torch.equal(predict(model, x, sigma), predict(again, x, sigma))


def test_loss_is_per_example_and_equals_its_definition(model):
    images = torch.rand(5, 1, 16, 16) * 2 - 1
    loss = denoising_loss(model, images, torch.Generator().manual_seed(0))
    g = torch.Generator().manual_seed(0)
    sigma = torch.sigmoid(torch.randn(5, generator=g))
    noise = torch.randn(images.shape, generator=g)
    for i in range(5):
        noisy = (1 - sigma[i]) * images[i] + sigma[i] * noise[i]
        velocity = predict(model, noisy[None], sigma[i : i + 1])[0]
        assert torch.isclose(loss[i], (velocity - (noise[i] - images[i])).square().mean(), rtol=1e-4)


def test_several_noise_draws_average(model):
    images = torch.rand(2, 1, 16, 16) * 2 - 1
    many = denoising_loss(model, images, torch.Generator().manual_seed(1), noise_draws=3)
    single = denoising_loss(model, images.repeat_interleave(3, 0), torch.Generator().manual_seed(1))
    assert torch.allclose(many, single.view(2, 3).mean(1))


def test_a_perfect_velocity_gives_the_data_back():
    """If all data is one image, the exact velocity is (x - image) / sigma, and sampling must end at that image."""
    image = torch.linspace(-1, 1, 256).view(1, 16, 16)

    class Exact(torch.nn.Module):
        config = type("Config", (), {"in_channels": 1, "sample_size": 16})
        dummy = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x, timestep, class_labels):
            velocity = (x - image) / (timestep / 1000).view(-1, 1, 1, 1)
            return type("Output", (), {"sample": velocity})

    exact = Exact()
    exact.register_parameter("p", torch.nn.Parameter(torch.zeros(1)))
    images = sample(exact, None, 4, generator=torch.Generator().manual_seed(0), num_steps=10)
    assert torch.allclose(images, image.expand(4, 1, 16, 16), atol=1e-4)


def test_sampling_is_what_diffusers_alone_does(model):
    ours = sample(model, None, 3, generator=torch.Generator().manual_seed(4), num_steps=5)
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(5)
    x = torch.randn(1, 3, 1, 16, 16, generator=torch.Generator().manual_seed(4))[0]
    with torch.no_grad():
        for t in scheduler.timesteps:
            velocity = model(x, timestep=t.expand(3), class_labels=torch.zeros(3, dtype=torch.long)).sample
            x = scheduler.step(velocity, t, x).prev_sample
    assert torch.allclose(ours, x.clamp(-1, 1), atol=1e-6)


def test_members_share_the_images_and_batches_do_not_matter(model):
    config = HyperNetworkConfig().lora_config()
    adapter = Adapter.no_change(config, lora_geometry(model, config), num_adapters=3)
    whole = sample(model, adapter, 12, generator=torch.Generator().manual_seed(0), num_steps=3)
    pieces = sample(model, adapter, 12, generator=torch.Generator().manual_seed(0), num_steps=3, batch_size=6)
    plain = sample(model, None, 12, generator=torch.Generator().manual_seed(0), num_steps=3)
    assert whole.shape == (12, 1, 16, 16) and whole.amin() >= -1 and whole.amax() <= 1
    assert torch.allclose(whole, pieces, atol=1e-5) and torch.allclose(whole, plain, atol=1e-5)
    with pytest.raises(ValueError, match="multiple of the 3"):
        sample(model, adapter, 10, generator=torch.Generator())


@pytest.mark.parametrize("per_class", [1, 4, 6, 7])
def test_classes_get_the_images_asked_for_and_parts_share_them(model, monkeypatch, per_class):
    """Three classes of two parts: whatever the number, every class gets it, and no part more than its share."""
    config = HyperNetworkConfig(target_modules=r".*attn1\.to_q").lora_config()
    adapter = Adapter.no_change(config, lora_geometry(model, config), num_adapters=6)

    def told(base_model, adapter, num_images, *, generator, **options):
        owner = torch.arange(6).repeat_interleave(num_images // 6)  # the image says which part it is from
        return owner.view(-1, 1, 1, 1).expand(-1, 1, 16, 16).float()

    monkeypatch.setattr(diffusion, "sample", told)
    parts = sample_classes(model, adapter, 3, per_class, generator=torch.Generator().manual_seed(0))[:, 0, 0, 0]
    assert (parts.view(3, per_class) // 2 == torch.arange(3)[:, None]).all()
    assert torch.bincount(parts.long(), minlength=6).max() <= -(-per_class // 2)


def test_classes_get_numbers_of_their_own(model, monkeypatch):
    """Three classes of two parts, one of them without images: no part more than its share, and no other class's."""
    config = HyperNetworkConfig(target_modules=r".*attn1\.to_q").lora_config()
    adapter = Adapter.no_change(config, lora_geometry(model, config), num_adapters=6)

    def told(base_model, adapter, num_images, *, generator, **options):
        numbers = torch.tensor([int(name.removeprefix("adapter_")) for name in adapter.names])
        owner = numbers.repeat_interleave(num_images // len(adapter))
        return owner.view(-1, 1, 1, 1).expand(-1, 1, 16, 16).float()

    monkeypatch.setattr(diffusion, "sample", told)
    parts = sample_classes(model, adapter, 3, [4, 0, 3], generator=torch.Generator().manual_seed(0))[:, 0, 0, 0]
    assert (parts // 2).tolist() == [0] * 4 + [2] * 3
    assert torch.bincount(parts.long(), minlength=6)[:4].tolist() == [2, 2, 0, 0]
