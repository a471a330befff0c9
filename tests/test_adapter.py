"""Adapters: PEFT is the oracle for one of them, the loop over adapters for many."""

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel, UNet2DModel
from diffusers.models.attention_processor import AttnProcessor
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from hyperdp_lib import adapter as adapter_module
from hyperdp_lib.adapter import (
    Adapter,
    LoraGeometry,
    apply_adapters,
    concatenate,
    load_adapter,
    lora_geometry,
    save_adapter,
)
from hyperdp_lib.data import InputError

DIT_TARGETS = (
    r"transformer_blocks\.\d+\.(attn1\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.0\.proj|ff\.net\.2|norm1\.linear)"
)
UNET_TARGETS = r".*\.(to_q|to_k|to_v|to_out\.0|conv1|conv2|conv_shortcut|conv|time_emb_proj)|conv_in|conv_out"


def make_dit() -> nn.Module:
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=1,
        out_channels=1,
        num_layers=2,
        sample_size=8,
        patch_size=4,
        num_embeds_ada_norm=4,
    )
    for block in model.transformer_blocks:
        block.attn1.set_processor(AttnProcessor())
    return model.eval()


def make_unet() -> nn.Module:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()


MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "dit": (make_dit, DIT_TARGETS),
    "unet": (make_unet, UNET_TARGETS),
}


@pytest.fixture(scope="module", params=MODELS)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, LoraConfig, LoraGeometry]:
    make, targets = MODELS[request.param]
    model, config = make(), LoraConfig(r=3, lora_alpha=5, target_modules=targets)
    return model, config, lora_geometry(model, config)


def random_adapter(config: LoraConfig, geometry: LoraGeometry, num_adapters: int) -> Adapter:
    adapter = Adapter.no_change(config, geometry, num_adapters=num_adapters)
    for a, b in adapter.factors.values():
        a.normal_(std=0.2)
        b.normal_(std=0.2)
    return adapter


def batch(num_images: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_images)
    return torch.randn(num_images, 1, 8, 8, generator=generator), torch.linspace(0, 999, num_images)


def run(model: nn.Module, images: Tensor, timesteps: Tensor) -> Tensor:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if isinstance(base, DiTTransformer2DModel):
        labels = torch.zeros(len(images), dtype=torch.long)
        return model(images, timestep=timesteps, class_labels=labels).sample
    return model(images, timesteps).sample


def relative_error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach(), expected.detach()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-12))


def has_hooks(model: nn.Module) -> bool:
    return any(
        layer._forward_hooks or layer._forward_hooks_with_kwargs or "forward" in vars(layer)
        for layer in model.modules()
    )


# ---------------------------------------------------------------- geometry


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_k": 7}},
        {"exclude_modules": ["to_v"]},
        {"init_lora_weights": "gaussian"},
    ],
)
@pytest.mark.parametrize("name", MODELS)
def test_geometry_is_what_peft_injects(name: str, options: dict) -> None:
    make, targets = MODELS[name]
    config = LoraConfig(r=4, lora_alpha=6, target_modules=targets, **options)
    geometry = lora_geometry(make(), config)
    injected = inject_adapter_in_model(copy.deepcopy(config), make())
    layers = {n: layer for n, layer in injected.named_modules() if isinstance(layer, LoraLayer)}
    assert geometry.names == tuple(layers)
    for module in geometry.modules:
        layer = layers[module.name]
        assert module.a_shape == tuple(layer.lora_A["default"].weight.shape)
        assert module.b_shape == tuple(layer.lora_B["default"].weight.shape)
        assert module.scaling == layer.scaling["default"]
        assert module.kind == ("conv2d" if len(module.a_shape) == 4 else "linear")
    trained = sum(p.numel() for n, p in injected.named_parameters() if ".lora_" in n)
    assert geometry.num_parameters == trained
    assert geometry.scaling == (6 / 2 if options.get("use_rslora") else 6 / 4)


def test_geometry_leaves_model_config_and_random_state_alone() -> None:
    model, config = make_unet(), LoraConfig(r=2, target_modules="all-linear")
    before, options, state = model.state_dict(), copy.deepcopy(config.to_dict()), torch.get_rng_state()
    lora_geometry(model, config)
    assert config.to_dict() == options
    assert torch.equal(torch.get_rng_state(), state)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize(
    "options, word",
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"lora_dropout": 0.1}, "lora_dropout"),
        ({"modules_to_save": ["conv_out"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"target_modules": ["no_such_layer"]}, "no_such_layer"),
    ],
)
def test_unsupported_options_are_errors(options: dict, word: str) -> None:
    options = {"target_modules": ["to_q"], **options}
    with pytest.raises(InputError, match=word) as caught:
        lora_geometry(make_unet(), LoraConfig(**options))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "layer, word",
    [
        (nn.Embedding(4, 8), "Embedding"),
        (nn.Conv1d(4, 4, 3), "Conv1d"),
        (nn.Conv2d(4, 4, 3, dilation=2), "dilation"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), "padding mode"),
        (nn.Conv2d(4, 4, 3, groups=4), "groups"),  # rank 2: PEFT's own limit
    ],
)
def test_unsupported_layers_are_errors(layer: nn.Module, word: str) -> None:
    with pytest.raises(InputError, match=word):
        lora_geometry(nn.Sequential(layer), LoraConfig(r=2, target_modules=["0"]))


# ---------------------------------------------------------------- applying


def test_no_change_at_initialisation(case: tuple) -> None:
    model, config, geometry = case
    images, timesteps = batch(6)
    adapter = Adapter.no_change(config, geometry, num_adapters=3, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        plain = run(model, images, timesteps)
        with apply_adapters(model, adapter):
            assert torch.equal(run(model, images, timesteps), plain)
    injected = inject_adapter_in_model(copy.deepcopy(config), copy.deepcopy(model))
    layers = dict(injected.named_modules())
    for module in geometry.modules:
        a, b = adapter.factors[module.name]
        reference = layers[module.name].lora_A["default"].weight
        fan_in = reference[0].numel()
        assert not b.any()
        assert a.abs().max() <= fan_in**-0.5 and reference.abs().max() <= fan_in**-0.5
        assert a.std() == pytest.approx((3 * fan_in) ** -0.5, rel=0.3)


def test_initialisation_is_the_generators(case: tuple) -> None:
    _, config, geometry = case

    def first(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return next(Adapter.no_change(config, geometry, generator=generator).parameters())

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))


def test_one_adapter_equals_peft(case: tuple, tmp_path: Path) -> None:
    model, config, geometry = case
    adapter = random_adapter(config, geometry, 1)
    save_adapter(adapter, tmp_path, base_model_name_or_path="base", model_card="# card")
    images, timesteps = batch(5)
    with torch.no_grad():
        plain = run(model, images, timesteps)
        with apply_adapters(model, adapter):
            ours = run(model, images, timesteps)
        peft_model = PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path)).eval()
        theirs = run(peft_model, images, timesteps)
        merged = run(peft_model.merge_and_unload(), images, timesteps)
    assert relative_error(ours, plain) > 0.05  # the comparison below is of something
    assert relative_error(ours, theirs) < 1e-5
    assert relative_error(ours, merged) < 1e-5


def test_batched_equals_loop(case: tuple) -> None:
    model, config, geometry = case
    num_adapters, share = 3, 2
    adapter = random_adapter(config, geometry, num_adapters).requires_grad_()
    images, timesteps = batch(num_adapters * share)
    images.requires_grad_()
    wanted = [images, *adapter.parameters(), *model.parameters()]
    upstream = torch.randn(len(images), 1, 8, 8)

    with apply_adapters(model, adapter):
        batched = run(model, images, timesteps)
    gradients = torch.autograd.grad(batched, wanted, upstream, allow_unused=True)
    parts = []
    for t in range(num_adapters):
        rows = slice(t * share, (t + 1) * share)
        with apply_adapters(model, adapter[t]):
            parts.append(run(model, images[rows], timesteps[rows]))
    looped = torch.cat(parts)
    expected = torch.autograd.grad(looped, wanted, upstream, allow_unused=True)

    assert relative_error(batched, looped) < 1e-5
    largest = max(float(g.norm()) for g in expected if g is not None)
    for found, reference in zip(gradients, expected, strict=True):
        assert (found is None) == (reference is None)
        # a key's bias has no gradient but rounding error: softmax does not see it
        if reference is not None and reference.norm() > 1e-6 * largest:
            assert relative_error(found, reference) < 1e-5
    assert all(g is not None and g.any() for g in gradients[: 1 + 2 * len(geometry.modules)])


class OwnLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)


layer_choices = st.one_of(
    st.builds(
        lambda *options: ("linear", options),
        st.integers(1, 5),  # in
        st.integers(1, 5),  # out
        st.sampled_from([(), (3,), (2, 2)]),  # between batch and in
        st.booleans(),  # bias
        st.booleans(),  # a subclass, which gets a hook and not the fused product
    ),
    st.builds(
        lambda *options: ("conv2d", options),
        st.integers(1, 3),  # channels in and out per group
        st.sampled_from([1, 2, 3, (1, 3), 4]),  # kernel
        st.sampled_from([1, 2, (1, 2)]),  # stride
        st.sampled_from([0, 1, (2, 0), 3, "valid", "same"]),  # padding
        st.sampled_from([1, 2]),  # groups
        st.booleans(),  # channels last
    ),
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(layer_choices, st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 99))
def test_any_layer_any_share_any_rank(choice: tuple, t: int, m: int, rank: int, seed: int) -> None:
    torch.manual_seed(seed)
    kind, options = choice
    layer: nn.Module
    if kind == "linear":
        fan_in, fan_out, middle, bias, subclass = options
        layer = (OwnLinear if subclass else nn.Linear)(fan_in, fan_out, bias=bias)
        x = torch.randn(t * m, *middle, fan_in)
    else:
        channels, kernel, stride, padding, groups, channels_last = options
        stride = 1 if padding == "same" else stride
        layer = nn.Conv2d(2 * channels, 4 * channels, kernel, stride, padding, groups=groups)
        rank *= groups
        x = torch.randn(t * m, 2 * channels, 6, 5)
        x = x.to(memory_format=torch.channels_last) if channels_last else x
    model, config = nn.Sequential(layer), LoraConfig(r=rank, lora_alpha=3, target_modules=["0"])
    adapter = random_adapter(config, lora_geometry(model, config), t).requires_grad_()
    a, b = adapter.factors["0"]
    x.requires_grad_()
    with apply_adapters(model, adapter):
        found = model(x)
    parts = []
    for i, part in enumerate(x.chunk(t)):
        if kind == "linear":
            change = part @ a[i].T @ b[i].T
        else:
            change = F.conv2d(F.conv2d(part, a[i], None, stride, padding), b[i], groups=groups)
        parts.append(layer(part) + 3 / rank * change)
    expected = torch.cat(parts)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(expected)
    wanted = [x, a, b, *layer.parameters()]
    for one, other in zip(
        torch.autograd.grad(found, wanted, upstream),
        torch.autograd.grad(expected, wanted, upstream),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernel, stride", [(1, 1), (3, 1), (3, 2)])
@pytest.mark.parametrize("num_adapters", [1, 3])
def test_channels_last_stays_channels_last(kernel: int, stride: int, num_adapters: int) -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, kernel, stride, kernel // 2))
    config = LoraConfig(r=2, target_modules=["0"])
    adapter = random_adapter(config, lora_geometry(model, config), num_adapters)
    x = torch.randn(6, 4, 8, 8)
    with torch.no_grad(), apply_adapters(model, adapter):
        contiguous = model(x)
        channels_last = model(x.to(memory_format=torch.channels_last))
    assert contiguous.is_contiguous()
    assert channels_last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(contiguous, channels_last, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name, shape", [("linear", (6, 5, 4)), ("conv2d", (6, 4, 8, 8))])
@pytest.mark.parametrize("num_adapters", [1, 3])
def test_products_stay_float32_under_autocast(name: str, shape: tuple[int, ...], num_adapters: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4) if name == "linear" else nn.Conv2d(4, 4, 3, padding=1))
    config = LoraConfig(r=2, target_modules=["0"])
    adapter = random_adapter(config, lora_geometry(model, config), num_adapters).requires_grad_()
    x = torch.randn(shape)
    nn.init.zeros_(model[0].weight)
    nn.init.zeros_(model[0].bias)  # the output is the LoRA change alone
    with apply_adapters(model, adapter):
        exact = model(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(x)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, exact.to(torch.bfloat16))  # rounded once, at the end
    gradients = torch.autograd.grad(output.float().square().sum(), list(adapter.parameters()))
    references = torch.autograd.grad(exact.square().sum(), list(adapter.parameters()))
    for gradient, reference in zip(gradients, references, strict=True):
        assert gradient.dtype == torch.float32
        assert relative_error(gradient, reference) < 0.01


def test_whole_model_under_autocast(case: tuple) -> None:
    model, config, geometry = case
    adapter = random_adapter(config, geometry, 2)
    images, timesteps = batch(4)
    with torch.no_grad(), apply_adapters(model, adapter):
        exact = run(model, images, timesteps)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = run(model, images, timesteps)
    assert relative_error(rounded.float(), exact) < 0.05


@pytest.mark.gpu
def test_gpu_equals_cpu(case: tuple) -> None:
    model, config, geometry = case
    adapter = random_adapter(config, geometry, 2)
    images, timesteps = batch(4)
    with torch.no_grad():
        with apply_adapters(model, adapter):
            expected = run(model, images, timesteps)
        on_gpu = copy.deepcopy(model).to("cuda")
        with apply_adapters(on_gpu, adapter.to("cuda")), torch.device("cuda"):
            found = run(on_gpu, images.to("cuda"), timesteps.to("cuda"))
    assert relative_error(found.cpu(), expected) < 1e-3


def test_gradient_checkpointing_inside_the_with() -> None:
    model = make_dit().train()
    config = LoraConfig(r=2, target_modules=DIT_TARGETS)
    adapter = random_adapter(config, lora_geometry(model, config), 2).requires_grad_()
    images, timesteps = batch(4)
    model.requires_grad_(False)

    def gradients() -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        with apply_adapters(model, adapter):
            loss = run(model, images, timesteps).square().mean()
            return torch.autograd.grad(loss, list(adapter.parameters()))

    expected = gradients()
    model.enable_gradient_checkpointing()
    for found, reference in zip(gradients(), expected, strict=True):
        assert relative_error(found, reference) < 1e-5


def test_several_steps_in_one_with(case: tuple) -> None:
    model, config, geometry = case
    adapter = random_adapter(config, geometry, 2).requires_grad_()
    with apply_adapters(model, adapter):
        for _ in range(2):  # each forward has a graph of its own and sees the factors as they are now
            before = run(model, *batch(4))
            gradients = torch.autograd.grad(before.square().sum(), list(adapter.parameters()))
            with torch.no_grad():
                for factor, gradient in zip(adapter.parameters(), gradients, strict=True):
                    factor -= 0.01 * gradient / gradient.norm()
                assert run(model, *batch(4)).square().sum() < before.square().sum()


def test_hooks_are_removed(case: tuple) -> None:
    model, config, geometry = case
    adapter = random_adapter(config, geometry, 2)
    images, timesteps = batch(4)
    with torch.no_grad():
        plain = run(model, images, timesteps)
        with apply_adapters(model, adapter) as same:
            assert same is model and has_hooks(model)
            assert not torch.equal(run(model, images, timesteps), plain)
        assert not has_hooks(model)
        assert torch.equal(run(model, images, timesteps), plain)
    with pytest.raises(ZeroDivisionError), apply_adapters(model, adapter):
        raise ZeroDivisionError
    assert not has_hooks(model)
    with apply_adapters(model, adapter):  # and the model counts as free again
        pass


def test_nested_use_is_an_error(case: tuple) -> None:
    model, config, geometry = case
    adapter = random_adapter(config, geometry, 2)
    with apply_adapters(model, adapter):
        with pytest.raises(InputError, match="already applied"), apply_adapters(model, adapter):
            pass
        assert has_hooks(model)  # the outer one is still on
    assert not has_hooks(model)


def test_batch_must_divide(case: tuple) -> None:
    model, config, geometry = case
    with pytest.raises(InputError, match="batch of 5 .* 2 equal shares"):
        with apply_adapters(model, random_adapter(config, geometry, 2)):
            run(model, *batch(5))
    assert not has_hooks(model)


def test_another_model_is_an_error(case: tuple) -> None:
    model, config, geometry = case
    adapter = random_adapter(config, geometry, 1)
    other = make_unet() if isinstance(model, DiTTransformer2DModel) else make_dit()
    with pytest.raises(InputError, match="another base model"), apply_adapters(other, adapter):
        pass
    adapted = get_peft_model(copy.deepcopy(model), copy.deepcopy(config)).get_base_model()
    with pytest.raises(InputError, match="another base model"), apply_adapters(adapted, adapter):
        pass


# ---------------------------------------------------------------- the stack


def test_stack_and_take_apart(case: tuple) -> None:
    _, config, geometry = case
    adapter = random_adapter(config, geometry, 3)
    named = concatenate([adapter], names=["cat", "dog", "owl"])
    assert named.num_adapters == len(named) == 3
    assert named.num_parameters == 3 * geometry.num_parameters
    assert sum(p.numel() for p in named.parameters()) == named.num_parameters
    assert named["dog"].names == named[1].names == named[-2].names == ("dog",)
    again = concatenate(list(named))
    assert again.names == named.names
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), adapter.parameters(), strict=True))
    with pytest.raises(InputError, match="fox"):
        named["fox"]
    with pytest.raises(IndexError):
        named[3]
    with pytest.raises(InputError, match="different strings"):
        concatenate([adapter, adapter])
    with pytest.raises(InputError, match="no adapter"):
        concatenate([])


def test_gradients_reach_the_stack_through_one_of_it(case: tuple) -> None:
    model, config, geometry = case
    adapter = random_adapter(config, geometry, 2).requires_grad_()
    with apply_adapters(model, adapter[1]):
        run(model, *batch(2)).square().sum().backward()
    for factor in adapter.parameters():
        assert factor.grad is not None
        assert not factor.grad[0].any() and factor.grad[1].any()
    assert not any(p.requires_grad for p in adapter.detach().parameters())
    assert all(p.dtype == torch.float64 for p in adapter.to(dtype=torch.float64).parameters())
    assert all(p.device.type == "meta" for p in adapter.to("meta").parameters())


def test_wrong_factors_are_errors(case: tuple) -> None:
    _, config, geometry = case
    factors = dict(random_adapter(config, geometry, 2).factors)
    with pytest.raises(InputError, match="LoRA A .* expected"):
        Adapter(config, geometry, factors, ("one",))
    del factors[geometry.names[0]]
    with pytest.raises(InputError, match=geometry.names[0]):
        Adapter(config, geometry, factors, ("one", "two"))


# ---------------------------------------------------------------- folders


def test_folder_round_trip(case: tuple, tmp_path: Path) -> None:
    model, config, geometry = case
    adapter = concatenate([random_adapter(config, geometry, 2)], names=["3", "7"])["7"]
    folder = tmp_path / "classes" / "7"
    save_adapter(adapter, folder, base_model_name_or_path="glyphs", model_card="# Card\n")
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert (folder / "README.md").read_text() == "# Card\n"
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "glyphs"
    loaded = load_adapter(folder, model)
    assert loaded.names == ("7",) and loaded.geometry == geometry
    assert all(torch.equal(p, q) for p, q in zip(loaded.parameters(), adapter.parameters(), strict=True))


PEFT_0_12 = (  # what LoraConfig of the oldest version promised knows; an unknown key is an error for it
    "alpha_pattern auto_mapping base_model_name_or_path bias fan_in_fan_out inference_mode init_lora_weights "
    "layer_replication layers_pattern layers_to_transform loftq_config lora_alpha lora_dropout megatron_config "
    "megatron_core modules_to_save peft_type r rank_pattern revision runtime_config target_modules task_type use_dora "
    "use_rslora"
).split()


def test_a_configuration_holds_no_key_that_an_older_peft_does_not_know(case: tuple, tmp_path: Path) -> None:
    model, config, geometry = case
    save_adapter(random_adapter(config, geometry, 1), tmp_path, base_model_name_or_path="base", model_card="card")
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert set(written) <= set(PEFT_0_12) and {"peft_type", "r", "lora_alpha", "target_modules"} <= set(written)
    assert load_adapter(tmp_path, model).lora_config.to_dict() == config.to_dict() | {
        "base_model_name_or_path": "base", "inference_mode": True
    }  # fmt: skip


def test_folder_written_by_peft_loads(case: tuple, tmp_path: Path) -> None:
    model, config, _ = case
    peft_model = get_peft_model(copy.deepcopy(model), copy.deepcopy(config)).eval()
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
        peft_model.save_pretrained(tmp_path / "theirs")
        loaded = load_adapter(tmp_path / "theirs", model)
        assert loaded.names == ("theirs",)
        with apply_adapters(model, loaded):
            ours = run(model, *batch(4))
        assert relative_error(ours, run(peft_model, *batch(4))) < 1e-5


@pytest.mark.parametrize("_", range(3))  # order by a random hash would come out right now and then
def test_same_adapter_same_bytes(_: int, tmp_path: Path) -> None:
    model = make_unet()
    names = ["to_q", "to_k", "to_v", "conv1", "conv2", "to_out.0"]
    contents = []
    for folder, order in (("one", names), ("two", names[::-1])):
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules=order)
        adapter = random_adapter(config, lora_geometry(model, config), 1)
        save_adapter(adapter, tmp_path / folder, base_model_name_or_path="base", model_card="card")
        contents.append({p.name: p.read_bytes() for p in (tmp_path / folder).iterdir()})
    assert contents[0] == contents[1]
    # sorted, not in the order of this process's string hashes
    assert json.loads(contents[0]["adapter_config.json"])["target_modules"] == sorted(names)


def test_damaged_folders_are_errors(tmp_path: Path) -> None:
    model, config = make_dit(), LoraConfig(r=2, target_modules=["to_q"])
    adapter = random_adapter(config, lora_geometry(model, config), 1)
    weights, settings_file = tmp_path / adapter_module.WEIGHTS_FILE, tmp_path / adapter_module.CONFIG_FILE

    with pytest.raises(InputError, match="No adapter_config.json"):
        load_adapter(tmp_path, model)
    save_adapter(adapter, tmp_path, base_model_name_or_path="base", model_card="card")
    content = weights.read_bytes()
    for broken in (content[:-7], content[:5], b""):
        weights.write_bytes(broken)
        with pytest.raises(InputError, match="truncated or damaged"):
            load_adapter(tmp_path, model)
    weights.write_bytes(content)
    with pytest.raises(InputError, match="another base model"):
        load_adapter(
            tmp_path, DiTTransformer2DModel(num_layers=1, num_attention_heads=2, attention_head_dim=4)
        )
    with pytest.raises(InputError, match="PEFT cannot put"):
        load_adapter(tmp_path, nn.Sequential(nn.Linear(2, 2)))
    shallow = DiTTransformer2DModel(2, 8, num_layers=1)
    with pytest.raises(InputError, match="it has no layer for"):
        load_adapter(tmp_path, shallow)
    text = settings_file.read_text()
    for broken_text in (text[:40], "[]", text.replace('"LORA"', '"IA3"')):
        settings_file.write_text(broken_text)
        with pytest.raises(InputError):
            load_adapter(tmp_path, model)
    with pytest.raises(InputError, match="holds one adapter"):
        save_adapter(
            random_adapter(config, adapter.geometry, 2), tmp_path, base_model_name_or_path="b", model_card=""
        )


# ---------------------------------------------------------------- benchmark


def test_benchmark_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load_benchmark) -> None:
    benchmark = load_benchmark("adapter_speed")
    out = tmp_path / "speed.json"
    small = [
        "--models",
        "dit",
        "--num-adapters",
        "2",
        "--share",
        "1",
        "--repetitions",
        "2",
        "--out",
        str(out),
    ]
    monkeypatch.setattr(sys, "argv", ["adapter_speed", *small])
    benchmark.main()
    record = json.loads(out.read_text())
    assert record["dit"]["adapters_ratio"] > 0 and record["dit"]["target_ratio"] == 1.25
