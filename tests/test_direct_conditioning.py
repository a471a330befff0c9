"""Direct conditioning: starts as the base, tells each row its own sum, releases one sum with the noise it states."""

import dataclasses
import functools
import json
import math

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel
from scipy import stats

from hyperdp_lib import accounting, diffusion
from hyperdp_lib.artefacts import file_sha256, tensors_sha256
from hyperdp_lib.baselines import controls, decoders
from hyperdp_lib.baselines import direct_conditioning as dc
from hyperdp_lib.baselines.direct_conditioning import ConditionedDenoiser, DirectConditioningConfig
from hyperdp_lib.data import InputError
from hyperdp_lib.embedding import Encoder, EncoderConfig
from hyperdp_lib.hypernetwork import HyperNetwork, HyperNetworkConfig
from hyperdp_lib.pretrained import WEIGHTS
from hyperdp_lib.public.stages import StageConfig

RELATIONS = ("add_or_remove_one", "replace_one", "zero_out")
K = 8


@functools.cache
def tiny_dit(size=16):
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=1,
        num_layers=2,
        sample_size=size,
        patch_size=4,
        num_embeds_ada_norm=1,
        norm_num_groups=1,
    )
    with torch.no_grad():  # zero-initialised output layers would hide everything
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return diffusion.use_plain_attention(model).eval()


@functools.cache
def public_models(size=16):
    base = tiny_dit(size)
    encoder = Encoder(EncoderConfig(dimension=K, width=8, image_size=size))
    return base, HyperNetwork(encoder, base, HyperNetworkConfig(hidden=8, head_width=8, num_blocks=1))


def decoder(awake=True):
    base = tiny_dit()
    torch.manual_seed(1)
    made = ConditionedDenoiser(base, K, dc.ConditionerShape(hidden=16, num_blocks=1))
    if awake:
        with torch.no_grad():
            for p in made.conditioner.parameters():
                p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    return made.eval().requires_grad_(False)


def images(count=12, seed=0, size=16):
    return torch.randn(count, 1, size, size, generator=torch.Generator().manual_seed(seed)).clamp(-1, 1)


LABELS = torch.arange(12) % 3
NAMES = ("a", "b", "c")


def release(batch=None, labels=LABELS, made=None, config=None, **changes):
    arguments = dict(epsilon=1.0, num_private_declared=12, class_names=NAMES, seed=0)
    return dc.release_direct_conditioning(
        images() if batch is None else batch,
        labels,
        public_models()[1],
        decoder() if made is None else made,
        config or DirectConditioningConfig(),
        **{**arguments, **changes},
    )


def test_the_start_is_the_base_model():
    made, x, sigma = decoder(awake=False), images(6), torch.linspace(0.1, 0.9, 6)
    told = made.conditioner(torch.randn(3, K) + 10, 1.0)
    rows = torch.arange(3).repeat_interleave(2)
    with torch.no_grad():
        same = diffusion.predict(dc.ConditionedModel(made.transformer, told), x, sigma, rows)
        assert torch.equal(same, diffusion.predict(tiny_dit(), x, sigma))


def test_every_row_hears_its_own_data_set_whatever_the_batch():
    made, x, sigma = decoder(), images(6), torch.full((6,), 0.4)
    sums = torch.randn(3, K, generator=torch.Generator().manual_seed(2)) + 5
    told = made.conditioner(sums, 1.0)
    rows = torch.tensor([2, 0, 1, 1, 0, 2])
    together = diffusion.predict(dc.ConditionedModel(made.transformer, told), x, sigma, rows)
    for i, row in enumerate(rows):
        alone = dc.ConditionedModel(made.transformer, made.conditioner(sums[row : row + 1], 1.0))
        one = diffusion.predict(alone, x[i : i + 1], sigma[i : i + 1])
        torch.testing.assert_close(one, together[i : i + 1], rtol=1e-4, atol=1e-5)
    unconditioned = diffusion.predict(made.transformer, x, sigma)  # the hooks are gone
    assert torch.equal(unconditioned, diffusion.predict(tiny_dit(), x, sigma))
    assert (together - unconditioned).abs().amax() > 0.01


@pytest.mark.parametrize("part", ["per_block", "per_patch"])
def test_both_ways_of_telling_count(part):
    made, x, sigma = decoder(), images(3), torch.full((3,), 0.4)
    told = made.conditioner(torch.full((1, K), 5.0), 1.0)
    without = dataclasses.replace(told, **{part: torch.zeros_like(getattr(told, part))})
    rows = torch.zeros(3, dtype=torch.long)
    one, other = (diffusion.predict(dc.ConditionedModel(made.transformer, c), x, sigma, rows) for c in (told, without))
    assert (one - other).abs().amax() > 1e-3


def test_guidance_is_linear_in_the_velocity():
    made, x, sigma, rows = decoder(), images(2), torch.full((2,), 0.4), torch.zeros(2, dtype=torch.long)
    told = made.conditioner(torch.full((1, K), 5.0), 1.0)
    v = {g: diffusion.predict(dc.ConditionedModel(made.transformer, told, g), x, sigma, rows) for g in (0.0, 1.0, 2.0)}
    torch.testing.assert_close(v[0.0], diffusion.predict(made.transformer, x, sigma))
    torch.testing.assert_close(v[2.0] - v[1.0], v[1.0] - v[0.0], rtol=1e-3, atol=1e-5)
    with pytest.raises(InputError, match="guidance"):
        DirectConditioningConfig(guidance=-1.0)


def test_training_lowers_the_loss_and_uses_the_sums(tmp_path):
    """Two kinds of task, told apart by the sum alone: after training, the wrong sum costs more than the right one."""
    base, network = public_models()
    made = ConditionedDenoiser(base, K, dc.ConditionerShape(hidden=16, num_blocks=1))
    kinds = torch.stack([torch.full((1, 16, 16), -0.8), torch.full((1, 16, 16), 0.8)])
    sums = torch.tensor([[5.0] + [4.0] * (K - 1), [5.0] + [-4.0] * (K - 1)])
    loss, g = dc.task_loss(made), torch.Generator().manual_seed(0)
    adam = torch.optim.Adam(made.parameters(), 3e-3)

    def value(order):
        again = torch.Generator().manual_seed(1)
        queries = kinds[:, None].expand(-1, 32, -1, -1, -1)
        with torch.no_grad():
            return float(loss(queries, sums[order], torch.ones(2), again))

    before = value([0, 1])
    for _ in range(15):
        step = loss(kinds[:, None].expand(-1, 8, -1, -1, -1), sums, torch.ones(2), g)
        adam.zero_grad()
        step.backward()
        adam.step()
    assert value([0, 1]) < 0.7 * before
    assert value([1, 0]) > 1.2 * value([0, 1])


def test_dropped_tasks_train_the_model_without_conditioning():
    made, g = decoder(), torch.Generator()
    queries, sums, std = images(6).view(3, 2, 1, 16, 16), torch.full((3, K), 5.0), torch.ones(3)
    dropped = dc.task_loss(made, dropped=1.0)(queries, sums, std, g.manual_seed(0))
    g.manual_seed(0)
    torch.rand(3, generator=g)  # what decided whom to drop
    plain = diffusion.denoising_loss(made.transformer, queries.flatten(0, 1), g).mean()
    torch.testing.assert_close(dropped, plain)


@pytest.mark.parametrize("relation", RELATIONS)
def test_the_certificate_states_the_budget_and_the_one_release(relation):
    for seed, stamp in ((None, False), (0, True)):
        made, certificate = release(epsilon=2.0, neighboring_relation=relation, seed=seed)
        assert certificate.epsilon == 2.0 and certificate.delta == 1e-5
        assert certificate.demonstration is stamp and certificate.private is not stamp
        classes, entry = certificate.ledger
        assert classes.quantity == "class names"
        assert entry.kind == "gaussian" and entry.noise_multiplier == accounting.noise_multiplier(2.0, 1e-5)
        assert certificate.sensitivity == (2.0 if relation == "replace_one" else 1.0)
        assert certificate.num_private == (None if relation == "add_or_remove_one" else 12)
        assert certificate.dimension == K and certificate.num_rows == 3 and certificate.class_names == NAMES
        assert type(certificate).from_json(certificate.to_json()) == certificate
        assert (made.trained_parameters, made.noise_dimension, made.num_releases) == (0, 3 * K, 1)
        assert certificate.base_model_sha256 == tensors_sha256(tiny_dit().state_dict())


@pytest.mark.parametrize("relation", RELATIONS)
def test_the_noise_of_the_release_is_what_the_certificate_says(relation):
    """Two-sided chi-square over 15 seeded releases of 24 numbers, and a Kolmogorov-Smirnov test: false alarm 2e-6."""
    exact = release(epsilon=math.inf)[0].noisy_sum
    found = [release(seed=seed, neighboring_relation=relation) for seed in range(15)]
    residual = np.stack([made.noisy_sum - exact for made, _ in found]).ravel() / found[0][1].noise_std
    low, high = stats.chi2(len(residual)).ppf([5e-7, 1 - 5e-7])
    assert low < float(np.square(residual).sum()) < high
    assert stats.kstest(residual, "norm").pvalue > 1e-6


def test_one_image_moves_the_exact_sum_by_at_most_the_clip_norm_in_its_own_row():
    whole = release(epsilon=math.inf)[0].noisy_sum
    for gone in range(0, 12, 2):
        kept = torch.arange(12) != gone
        less = release(images()[kept], LABELS[kept], epsilon=math.inf)[0].noisy_sum
        moved = np.linalg.norm(whole - less, axis=1)
        own = int(LABELS[gone])
        assert 0.99 < moved[own] <= 1.0 and moved[[i for i in range(3) if i != own]].max() == 0


def test_everything_sampled_depends_on_the_private_images_through_the_noisy_sum_alone():
    """Other images, the same sum and seed: the same samples, bit for bit."""
    made, _ = release(epsilon=math.inf)
    shuffled = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    again, _ = release(images()[shuffled], LABELS[shuffled], epsilon=math.inf)
    assert np.array_equal(made.noisy_sum, again.noisy_sum)
    drawn = [one.sample(6, generator=torch.Generator().manual_seed(0), num_steps=2)[0] for one in (made, again)]
    assert torch.equal(*drawn)


def test_a_decoder_that_read_the_exact_sum_would_be_caught(monkeypatch):
    """The mutant: noise left out, the certificate unchanged."""
    release_sum = controls.noisy_class_sums
    monkeypatch.setattr(
        controls, "noisy_class_sums", lambda *a, **k: release_sum(*a, **{**k, "epsilon": math.inf, "seed": 0})
    )
    with pytest.raises(AssertionError):
        test_the_noise_of_the_release_is_what_the_certificate_says("zero_out")


def test_samples_are_sorted_shared_out_and_different_by_class():
    made, _ = release(epsilon=math.inf)
    g = torch.Generator()
    drawn, labels = made.sample(6, generator=g.manual_seed(0), num_steps=2)
    assert drawn.shape == (6, 1, 16, 16) and labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert drawn.abs().amax() <= 1 and torch.isfinite(drawn).all()
    other, _ = release(labels=(LABELS + 1) % 3, epsilon=math.inf)  # the labels are respected
    assert not torch.equal(drawn, other.sample(6, generator=g.manual_seed(0), num_steps=2)[0])
    with pytest.raises(InputError, match="multiple of the 3 classes"):
        made.sample(7, generator=g)


def test_noise_is_fresh_without_a_seed_and_repeats_with_one():
    sums = [release(seed=seed)[0].noisy_sum for seed in (4, 4, None, None)]
    assert np.array_equal(sums[0], sums[1]) and not np.array_equal(sums[2], sums[3])


@pytest.mark.parametrize("seed", [None, 0])
def test_without_noise_the_certificate_says_not_private(seed):
    _, certificate = release(epsilon=math.inf, seed=seed)
    assert certificate.epsilon == math.inf and not certificate.private
    assert certificate.sentence.startswith("NOT PRIVATE")


def test_unlabelled_and_empty_sets_are_served():
    made, certificate = release(labels=None, class_names=("all",))
    assert made.noisy_sum.shape == (1, K) and certificate.class_names == ()
    nobody, _ = release(torch.zeros(0, 1, 16, 16), torch.zeros(0, dtype=torch.long))
    assert nobody.sample(3, generator=torch.Generator(), num_steps=1)[0].shape == (3, 1, 16, 16)


def test_other_image_sizes_work():
    base, network = public_models(8)
    made = ConditionedDenoiser(base, K, dc.ConditionerShape(hidden=8, num_blocks=1))
    result, _ = dc.release_direct_conditioning(
        images(size=8), None, network, made, DirectConditioningConfig(), epsilon=1.0, num_private_declared=12
    )
    assert result.sample(2, generator=torch.Generator(), num_steps=1)[0].shape == (2, 1, 8, 8)


BAD = {
    "another size": (dict(batch=images(size=8)), "shape"),
    "no batch axis": (dict(batch=images()[0]), "shape"),
    "bytes": (dict(batch=images().to(torch.uint8)), "float"),
    "not finite": (dict(batch=images() * math.nan), "finite floats"),
    "another range": (dict(batch=images() * 2), "finite floats"),
    "labels missing": (dict(labels=None), "private_labels"),
    "label out of range": (dict(labels=LABELS + 1), "lie in 0 .. 2"),
    "labels of another length": (dict(labels=LABELS[:5]), "length"),
    "classes of one name": (dict(class_names=("a", "a", "b")), "different"),
    "no epsilon": (dict(epsilon=0.0), "epsilon"),
    "no delta": (dict(delta=0.0), "delta"),
    "another relation": (dict(neighboring_relation="remove_two"), "neighboring_relation"),
    "nobody declared": (dict(num_private_declared=0), "num_private_declared"),
}


@pytest.mark.parametrize("fault", BAD)
def test_what_cannot_be_served_is_refused_before_the_mechanism(fault, monkeypatch):
    monkeypatch.setattr(controls, "noisy_class_sums", lambda *a, **k: pytest.fail("private data was read"))
    changes, message = BAD[fault]
    with pytest.raises(InputError, match=message):
        release(**changes)


def test_a_decoder_of_another_encoder_or_model_is_refused():
    made = decoder()
    made.encoder_sha256 = "0" * 64
    with pytest.raises(InputError, match="another encoder"):
        release(made=made)
    with pytest.raises(InputError, match="reads 5 numbers"):
        release(made=ConditionedDenoiser(tiny_dit(), 5))
    with pytest.raises(InputError, match="diffusion transformer"):
        ConditionedDenoiser(torch.nn.Linear(2, 2), K)


def test_training_runs_resumes_and_loads(tmp_path, monkeypatch):
    """The command in miniature, end to end; run again it takes no step and writes the same weights."""
    assert dc.main(["--out", str(tmp_path), "--smoke"]) == 0
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["steps"] == 4 and set(manifest["held_out"]) == {"direct_conditioning", "dp_deepsets", "base_alone"}
    for name, digest in manifest["checksums"].items():
        assert file_sha256(tmp_path / name) == digest
    loaded = dc.load_direct_conditioning(tmp_path)
    assert not any(p.requires_grad for p in loaded.parameters()) and loaded.encoder_sha256
    before = (tmp_path / "conditioner.safetensors").read_bytes()
    monkeypatch.setattr(decoders, "TaskPool", lambda *a: pytest.fail("trained again"))
    dc.train_direct_conditioning(tmp_path, smoke=True, stage=StageConfig(4, 4, 4, 1e-3, 0.9))
    assert (tmp_path / "conditioner.safetensors").read_bytes() == before
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"decoder": "other"}))
    with pytest.raises(InputError, match="no direct conditioning"):
        dc.load_direct_conditioning(tmp_path)


@pytest.mark.skipif(not (WEIGHTS / "glyphs-conditioned").is_dir(), reason="weights not trained yet")
def test_the_shipped_weights_are_what_their_manifest_says():
    folder = WEIGHTS / "glyphs-conditioned"
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, digest in manifest["checksums"].items():
        assert file_sha256(folder / name) == digest
    assert sum(path.stat().st_size for path in folder.rglob("*")) < 8_000_000
    assert dc.load_direct_conditioning().dimension == 64
    # the check is the method's own: its loss is found again, up to the half precision of the shipped weights
    method = json.loads((WEIGHTS / "glyphs" / "manifest.json").read_text())["stages"]["joint"]["last"]
    assert manifest["held_out"]["dp_deepsets"] == pytest.approx(method["held_out"], abs=1e-3)
    assert manifest["held_out"]["direct_conditioning"] < manifest["held_out"]["base_alone"]
