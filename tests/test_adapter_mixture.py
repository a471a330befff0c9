"""Mixture of public adapters: exactly the sum of products it says, the right one if hard, one release, its noise."""

import functools
import json
import math

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel
from scipy import stats

from hyperdp_lib import accounting, diffusion
from hyperdp_lib.adapter import apply_adapters, load_adapter, save_adapter
from hyperdp_lib.artefacts import file_sha256, tensors_sha256
from hyperdp_lib.baselines import adapter_mixture as am
from hyperdp_lib.baselines import controls, decoders
from hyperdp_lib.baselines.adapter_mixture import AdapterMixture, AdapterMixtureConfig, MixtureShape
from hyperdp_lib.data import InputError
from hyperdp_lib.embedding import Encoder, EncoderConfig
from hyperdp_lib.hypernetwork import WEIGHTS, HyperNetwork, HyperNetworkConfig, summary

K = 8
NAMES = ("a", "b", "c")
LABELS = torch.arange(12) % 3


@functools.cache
def tiny_dit():
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=1,
        num_layers=2,
        sample_size=16,
        patch_size=4,
        num_embeds_ada_norm=1,
        norm_num_groups=1,
    )
    with torch.no_grad():  # zero-initialised output layers would hide everything
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return diffusion.use_plain_attention(model).eval()


@functools.cache
def network():
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig(dimension=K, width=8))
    return HyperNetwork(encoder, tiny_dit(), HyperNetworkConfig(hidden=8, head_width=8, num_blocks=1))


def mixture(count=5, awake=True):
    base = tiny_dit()
    torch.manual_seed(1)
    made = AdapterMixture(base, K, MixtureShape(num_adapters=count, r=2, hidden=8))
    if awake:
        with torch.no_grad():
            for p in (*made.b, *made.gate.parameters(), *made.correction.parameters()):
                p.add_(0.3 * torch.randn_like(p))
    return made.eval().requires_grad_(False)


def images(count=12, seed=0):
    return torch.randn(count, 1, 16, 16, generator=torch.Generator().manual_seed(seed)).clamp(-1, 1)


def release(batch=None, labels=LABELS, made=None, hard=False, **changes):
    arguments = dict(epsilon=1.0, num_private_declared=12, class_names=NAMES, seed=0)
    return am.release_adapter_mixture(
        images() if batch is None else batch,
        labels,
        network(),
        mixture() if made is None else made,
        AdapterMixtureConfig(hard=hard),
        **{**arguments, **changes},
    )


def products(adapter):
    """Layer -> (T, out, in), the change of its weights."""
    return {module.name: module.scaling * (b @ a) for module in adapter.geometry.modules
            for a, b in [adapter.factors[module.name]]}  # fmt: skip


def test_the_mixture_is_the_weighted_sum_of_products_and_not_of_factors():
    made = mixture()
    weights = torch.rand(3, 5, generator=torch.Generator().manual_seed(0)).softmax(1)
    singles = products(made.choose(torch.eye(5)))  # adapter k by itself
    mixed = products(made.mix(weights))
    for name, change in mixed.items():
        expected = torch.einsum("tk,koi->toi", weights, singles[name])
        torch.testing.assert_close(change, expected, rtol=1e-4, atol=1e-6)
    layer = made.mix(weights).geometry.modules[0]
    a, b = (torch.einsum("tk,kxy->txy", weights, f[0]) for f in (made.a, made.b))
    assert (b @ a - mixed[layer.name]).abs().amax() > 1e-3  # mixing factors would be something else


def test_one_hot_weights_give_that_adapter_soft_or_hard():
    made, best = mixture(), torch.tensor([3, 0])
    weights = torch.nn.functional.one_hot(best, 5).float()
    for name, change in products(made.mix(weights)).items():
        torch.testing.assert_close(change, products(made.choose(weights))[name], rtol=1e-4, atol=1e-6)
    assert made.choose(weights).lora_config.r == 2 and made.mix(weights).lora_config.r == 10


def test_hard_choice_takes_the_largest_weight():
    made = mixture()
    weights = torch.tensor([[0.1, 0.2, 0.3, 0.25, 0.15], [0.4, 0.3, 0.1, 0.1, 0.1]])
    module = made.choose(weights).geometry.modules[0]
    a, b = made.choose(weights).factors[module.name]
    assert torch.equal(a, made.a[0][[2, 0]]) and torch.equal(b, made.b[0][[2, 0]])


def test_full_matrices_compute_what_the_adapter_does_forward_and_backward():
    made = mixture().requires_grad_(True)
    x, sigma = images(6), torch.linspace(0.2, 0.8, 6)
    sums = torch.randn(3, K, generator=torch.Generator().manual_seed(2)) + 5
    results = []
    for way in ("adapter", "merged"):
        made.zero_grad()
        weights = made.weights(sums, 1.0)
        inside = made.merged(weights) if way == "merged" else apply_adapters(made.base_model, made.mix(weights))
        with inside:
            velocity = diffusion.predict(made.base_model, x, sigma)
        velocity.square().sum().backward()
        results.append((velocity.detach(), [p.grad.clone() for p in (*made.a, *made.b, made.gate.weight)]))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-5)
    for one, other in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=1e-4)
    with torch.no_grad():  # and the base model is itself again
        assert torch.equal(diffusion.predict(made.base_model, x, sigma), diffusion.predict(tiny_dit(), x, sigma))


def test_the_start_changes_nothing_and_weighs_all_the_same():
    made = mixture(awake=False)
    weights = made.weights(torch.randn(4, K) + 5, 1.0)
    torch.testing.assert_close(weights, torch.full((4, 5), 0.2))
    assert all(float(change.abs().amax()) == 0 for change in products(made.mix(weights)).values())


def test_the_gate_starts_from_clusters_of_public_means():
    """At a cluster's centre its own adapter has the largest weight, and weights are a softmin of squared distance."""
    made, g = mixture(awake=False), torch.Generator().manual_seed(0)
    centres = 0.6 * torch.nn.functional.normalize(torch.randn(5, K - 1, generator=g), dim=1)
    points = centres.repeat_interleave(20, 0) + 0.02 * torch.randn(100, K - 1, generator=g)
    made.start_from(points)
    sums = torch.cat([torch.full((5, 1), 0.5), centres], 1) * 100  # sums of 100 images, noise of 0.01
    weights = made.weights(sums, 0.01)
    assert sorted(weights.argmax(1).tolist()) == [0, 1, 2, 3, 4]
    torch.testing.assert_close(weights.sum(1), torch.ones(5))
    features = summary(sums, torch.full((5,), 0.01))[0]
    own = made.gate.weight[:, : K - 1] / 0.2  # the centres found, in the features' scale
    expected = (-0.1 * torch.cdist(features, own).square()).softmax(1)
    torch.testing.assert_close(weights, expected, rtol=1e-3, atol=1e-4)


def test_training_tells_two_kinds_of_task_apart():
    made = mixture(count=2, awake=False)
    for p in (*made.a, *made.b, *made.gate.parameters(), *made.correction.parameters()):
        p.requires_grad_(True)
    kinds = torch.stack([torch.full((1, 16, 16), -0.8), torch.full((1, 16, 16), 0.8)])
    sums = torch.tensor([[5.0] + [4.0] * (K - 1), [5.0] + [-4.0] * (K - 1)])
    loss, g = am.task_loss(made), torch.Generator().manual_seed(0)
    adam = torch.optim.Adam([p for p in made.parameters() if p.requires_grad], 1e-2)

    def value(order):
        with torch.no_grad():
            queries = kinds[:, None].expand(-1, 32, -1, -1, -1)
            return float(loss(queries, sums[order], torch.ones(2), torch.Generator().manual_seed(1)))

    before = value([0, 1])
    for _ in range(60):
        step = loss(kinds[:, None].expand(-1, 8, -1, -1, -1), sums, torch.ones(2), g)
        adam.zero_grad()
        step.backward()
        adam.step()
    assert value([0, 1]) < 0.8 * before
    assert value([1, 0]) > 1.1 * value([0, 1])


@pytest.mark.parametrize("relation", ["add_or_remove_one", "replace_one", "zero_out"])
def test_the_certificate_states_the_budget_and_the_one_release(relation):
    made, certificate = release(epsilon=2.0, neighboring_relation=relation, seed=None)
    assert certificate.epsilon == 2.0 and certificate.private and certificate.method == "adapter_mixture"
    classes, entry = certificate.ledger
    assert classes.quantity == "class names"
    assert entry.kind == "gaussian" and entry.noise_multiplier == accounting.noise_multiplier(2.0, 1e-5)
    assert certificate.sensitivity == (2.0 if relation == "replace_one" else 1.0)
    assert certificate.base_model_sha256 == tensors_sha256(tiny_dit().state_dict())
    assert (made.trained_parameters, made.noise_dimension, made.num_releases) == (0, 3 * K, 1)
    assert release(seed=0)[1].demonstration


def test_the_noise_of_the_release_is_what_the_certificate_says():
    """Two-sided chi-square over 15 seeded releases of 24 numbers, and a Kolmogorov-Smirnov test: false alarm 2e-6."""
    exact = release(epsilon=math.inf)[0].noisy_sum
    found = [release(seed=seed) for seed in range(15)]
    residual = np.stack([made.noisy_sum - exact for made, _ in found]).ravel() / found[0][1].noise_std
    low, high = stats.chi2(len(residual)).ppf([5e-7, 1 - 5e-7])
    assert low < float(np.square(residual).sum()) < high
    assert stats.kstest(residual, "norm").pvalue > 1e-6


def test_weights_made_of_the_exact_sum_would_be_caught(monkeypatch):
    """The mutant: noise left out, the certificate unchanged."""
    release_sum = controls.noisy_class_sums
    monkeypatch.setattr(
        controls, "noisy_class_sums", lambda *a, **k: release_sum(*a, **{**k, "epsilon": math.inf, "seed": 0})
    )
    with pytest.raises(AssertionError):
        test_the_noise_of_the_release_is_what_the_certificate_says()


def test_one_image_moves_the_exact_sum_by_at_most_the_clip_norm_in_its_own_row():
    whole = release(epsilon=math.inf)[0].noisy_sum
    for gone in range(4):
        kept = torch.arange(12) != gone
        less = release(images()[kept], LABELS[kept], epsilon=math.inf)[0].noisy_sum
        moved = np.linalg.norm(whole - less, axis=1)
        own = int(LABELS[gone])
        assert 0.99 < moved[own] <= 1.0 and moved[[i for i in range(3) if i != own]].max() == 0


def test_weights_and_samples_are_functions_of_the_noisy_sum():
    decoder = mixture()
    made, certificate = release(made=decoder, seed=5)
    again = decoder.weights(torch.from_numpy(made.noisy_sum).float(), certificate.noise_std)
    assert torch.equal(made.weights, again) and made.adapter.names == NAMES
    other = release(made=decoder, labels=(LABELS + 1) % 3, epsilon=math.inf)[0]  # the labels are respected
    assert np.array_equal(other.noisy_sum, np.roll(release(epsilon=math.inf)[0].noisy_sum, 1, axis=0))


@pytest.mark.parametrize("hard", [False, True])
def test_samples_are_sorted_and_a_member_is_a_standard_adapter(hard, tmp_path):
    made, _ = release(hard=hard)
    drawn, labels = made.sample(6, generator=torch.Generator().manual_seed(0), num_steps=2)
    assert drawn.shape == (6, 1, 16, 16) and labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert drawn.abs().amax() <= 1 and torch.isfinite(drawn).all()
    with pytest.raises(InputError, match="multiple of the 3 classes"):
        made.sample(7, generator=torch.Generator())
    save_adapter(made.adapter["b"], tmp_path / "b", base_model_name_or_path="base", model_card="")
    loaded = load_adapter(tmp_path / "b", tiny_dit())
    assert all(torch.equal(x, y) for x, y in zip(loaded.parameters(), made.adapter["b"].parameters(), strict=True))


def test_without_noise_the_certificate_says_not_private_and_seeds_repeat():
    for seed in (None, 0):
        assert release(epsilon=math.inf, seed=seed)[1].sentence.startswith("NOT PRIVATE")
    sums = [release(seed=seed)[0].noisy_sum for seed in (4, 4, None, None)]
    assert np.array_equal(sums[0], sums[1]) and not np.array_equal(sums[2], sums[3])


def test_unlabelled_and_empty_sets_are_served():
    assert release(labels=None, class_names=("all",))[0].adapter.names == ("all",)
    nobody, _ = release(torch.zeros(0, 1, 16, 16), torch.zeros(0, dtype=torch.long))
    assert nobody.sample(3, generator=torch.Generator(), num_steps=1)[0].shape == (3, 1, 16, 16)


BAD = {
    "another size": (dict(batch=torch.zeros(12, 1, 8, 8)), "shape"),
    "labels missing": (dict(labels=None), "private_labels"),
    "label out of range": (dict(labels=LABELS + 1), "lie in 0 .. 2"),
    "no epsilon": (dict(epsilon=0.0), "epsilon"),
    "another relation": (dict(neighboring_relation="remove_two"), "neighboring_relation"),
}


@pytest.mark.parametrize("fault", BAD)
def test_what_cannot_be_served_is_refused_before_the_mechanism(fault, monkeypatch):
    monkeypatch.setattr(controls, "noisy_class_sums", lambda *a, **k: pytest.fail("private data was read"))
    changes, message = BAD[fault]
    with pytest.raises(InputError, match=message):
        release(**changes)


def test_a_mixture_of_another_encoder_or_shape_is_refused():
    made = mixture()
    made.encoder_sha256 = "0" * 64
    with pytest.raises(InputError, match="another encoder"):
        release(made=made)
    with pytest.raises(InputError, match="num_adapters"):
        AdapterMixture(tiny_dit(), K, MixtureShape(num_adapters=0))
    with pytest.raises(InputError, match="linear layers"):
        AdapterMixture(torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3)), K, MixtureShape(target_modules="0"))


def test_training_runs_resumes_and_loads(tmp_path, monkeypatch):
    """The command in miniature, end to end; run again it takes no step and writes the same weights."""
    assert am.main(["--out", str(tmp_path), "--smoke"]) == 0
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["steps"] == 4 and manifest["shape"]["num_adapters"] == 4
    assert set(manifest["held_out"]) == {
        "adapter_mixture", "adapter_mixture, hard choice", "dp_deepsets", "base_alone",
    }  # fmt: skip
    for name, digest in manifest["checksums"].items():
        assert file_sha256(tmp_path / name) == digest
    loaded = am.load_adapter_mixture(tmp_path)
    assert not any(p.requires_grad for p in loaded.parameters()) and loaded.encoder_sha256
    before = (tmp_path / "mixture.safetensors").read_bytes()
    monkeypatch.setattr(decoders, "TaskPool", lambda *a: pytest.fail("trained again"))
    am.train_adapter_mixture(tmp_path, smoke=True)
    assert (tmp_path / "mixture.safetensors").read_bytes() == before
    with pytest.raises(InputError, match="another base model"):
        am.load_adapter_mixture(tmp_path, tiny_dit())


@pytest.mark.skipif(not (WEIGHTS / "glyphs-mixture").is_dir(), reason="weights not trained yet")
def test_the_shipped_weights_are_what_their_manifest_says():
    folder = WEIGHTS / "glyphs-mixture"
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, digest in manifest["checksums"].items():
        assert file_sha256(folder / name) == digest
    assert sum(path.stat().st_size for path in folder.rglob("*")) < 8_000_000
    assert am.load_adapter_mixture().shape.num_adapters == manifest["shape"]["num_adapters"]
    assert manifest["held_out"]["adapter_mixture"] < manifest["held_out"]["base_alone"]
