"""DP-LDM: what is tuned, right gradients, a clip bound that holds, noise as promised, public models."""

import dataclasses
import functools
import json
import math
from unittest import mock

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel
from scipy import stats

from hyperdp_lib import artefacts, diffusion, pretrained
from hyperdp_lib.baselines import dp_ldm, dp_sgd, latent_diffusion
from hyperdp_lib.baselines.dp_ldm import DPLdmConfig
from hyperdp_lib.baselines.latent_diffusion import SMOKE, build_autoencoder, build_denoiser
from hyperdp_lib.data import InputError
from hyperdp_lib.embedding import CHUNK
from hyperdp_lib.public.glyphs import GlyphTasks
from hyperdp_lib.public.stages import StageConfig

RELATIONS = ("add_or_remove_one", "replace_one", "zero_out")
SCALE = 0.7
NAMES = ("a", "b", "c")
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])
TINY = dataclasses.replace(SMOKE, num_layers=2)


@functools.cache
def models():
    """A tiny autoencoder and a tiny denoiser whose zero-initialised output layers are not zero; never changed."""
    torch.manual_seed(0)
    autoencoder, denoiser = build_autoencoder(TINY), build_denoiser(TINY)
    with torch.no_grad():
        for p in denoiser.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return autoencoder.requires_grad_(False), denoiser.requires_grad_(False)


def images(count=6, seed=0):
    return torch.randn(count, 1, 16, 16, generator=torch.Generator().manual_seed(seed)).clamp(-1, 1)


def fixed_loss(model, latents, *, generator=None, labels=None):
    """A flow-matching loss whose noise is a function of the latent: the same alone and in a batch."""
    noise, level = latents.roll(1, -1) + 0.3 * latents.flip(-2), torch.full((len(latents),), 0.4)
    predicted = diffusion.predict(model, 0.6 * latents + 0.4 * noise, level, labels)
    return (predicted - (noise - latents)).square().flatten(1).mean(1)


def train(config=None, private_images=None, private_labels=LABELS, autoencoder=None, denoiser=None, **changes):
    config = DPLdmConfig(num_steps=1) if config is None else config
    private_images = images() if private_images is None else private_images
    arguments = dict(epsilon=1.0, num_private_declared=6, class_names=NAMES, loss_function=fixed_loss)
    return dp_ldm.train_dp_ldm(
        private_images,
        private_labels,
        models()[0] if autoencoder is None else autoencoder,
        models()[1] if denoiser is None else denoiser,
        SCALE,
        config,
        **{**arguments, **changes},
    )


def flat(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def trained_names(model):
    return [name for name, p in model.named_parameters() if p.requires_grad]


# --- what is tuned ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("conditioner", [False, True])
@pytest.mark.parametrize("frozen", [0, 1])
def test_only_attention_and_the_conditioner_are_tuned(conditioner, frozen):
    model = dp_ldm.tunable_denoiser(models()[1], DPLdmConfig(num_frozen_blocks=frozen), 3, conditioner=conditioner)
    names = trained_names(model)
    attention = [name for name in names if ".attn1." in name]
    rest = set(names) - set(attention)
    assert {int(name.split(".")[1]) for name in attention} == set(range(frozen, 2))
    assert len(attention) == 8 * (2 - frozen)  # weight and bias of four projections
    assert all("class_embedder.embedding_table" in name for name in rest) and len(rest) == 2 * conditioner
    assert not any(module.training for module in model.modules() if type(module).__name__ == "LabelEmbedding")


def test_rows_of_private_classes_start_from_the_public_row_of_no_label():
    public = models()[1]
    model = dp_ldm.tunable_denoiser(public, DPLdmConfig(), 3, conditioner=True)
    z, sigma = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0.2, 0.5, 0.8])
    with torch.no_grad():
        unconditional = diffusion.predict(public, z, sigma, torch.full((3,), TINY.pseudo_labels))
        torch.testing.assert_close(diffusion.predict(model, z, sigma, torch.arange(3)), unconditional)
        other = diffusion.predict(public, z, sigma, torch.zeros(3, dtype=torch.long))
    assert not torch.allclose(other, unconditional, atol=1e-3)


@pytest.mark.parametrize("mode", ["shared", "per_class"])
def test_training_changes_nothing_else(mode):
    before = [{k: v.clone() for k, v in model.state_dict().items()} for model in models()]
    trained, _ = train(DPLdmConfig(mode=mode, num_steps=2, num_frozen_blocks=1), seed=0)
    for model, old in zip(models(), before, strict=True):
        assert all(torch.equal(value, old[key]) for key, value in model.state_dict().items())
    for denoiser in trained.denoisers:
        for key, value in denoiser.state_dict().items():
            if "class_embedder" in key:
                assert torch.equal(value[-1], before[1][key][-1])  # the public row is still there, untouched
            else:
                tuned = key.startswith("transformer_blocks.1.attn1")
                assert torch.equal(value, before[1][key]) is not tuned, key


def test_feed_forward_layers_are_tuned_when_asked_for():
    config = DPLdmConfig(num_frozen_blocks=1, feed_forward=True)
    names = trained_names(dp_ldm.tunable_denoiser(models()[1], config, 1, conditioner=False))
    assert {name.split(".")[2] for name in names} == {"attn1", "ff"} and len(names) == 8 + 4
    assert {name.split(".")[1] for name in names} == {"1"}


# --- gradients -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["shared", "per class", "unlabelled", "feed-forward"])
def test_per_example_gradients_are_those_of_one_example_at_a_time(kind):
    classes = 3 if kind == "shared" else 1
    config = DPLdmConfig(feed_forward=kind == "feed-forward")
    model = dp_ldm.tunable_denoiser(models()[1], config, classes, conditioner=kind != "unlabelled")
    labels = LABELS if kind == "shared" else None
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    latents = latent_diffusion.encode(models()[0], images(), SCALE)
    rows = []
    for i in range(len(latents)):
        own = None if labels is None else labels[i : i + 1]
        rows.append(torch.autograd.grad(fixed_loss(model, latents[i : i + 1], labels=own).sum(), parameters.values()))
    dp_sgd.ExampleGradients(model, fixed_loss).backward(latents, labels, torch.Generator())
    assert len(parameters) == 16 + 2 * (kind != "unlabelled") + 8 * config.feed_forward
    for (name, p), expected in zip(parameters.items(), zip(*rows, strict=True), strict=True):
        oracle = torch.stack(expected)
        assert p.grad_sample.shape == (6, *p.shape)
        if name.endswith("to_k.bias"):  # a softmax does not feel it: the true gradient is zero
            assert p.grad_sample.abs().max() < 1e-6 and oracle.abs().max() < 1e-6
        else:
            assert oracle.norm() > 1e-6
            assert (p.grad_sample - oracle).norm() < 1e-4 * oracle.norm(), name


# --- one example moves a step by at most the clip norm; noise is what the certificate says ------------------------


@pytest.fixture
def plain_descent(monkeypatch):
    """Gradient descent in AdamW's place, so that a step can be read from the trained parameters."""
    monkeypatch.setattr(torch.optim, "AdamW", lambda parameters, lr, **_: torch.optim.SGD(parameters, lr=1.0))


STEP = DPLdmConfig(num_steps=1, ema_decay=0.0, clip_norm=1e-2, learning_rate=1.0)


def released_sum(config=STEP, **arguments):
    """The noisy gradient sums of the only step, one for each denoiser, read from the result; and the certificate."""
    trained, certificate = train(config, seed=0, **arguments)
    names = arguments.get("class_names", NAMES)
    per_class = len(trained.denoisers) > 1 or len(names) == 1
    start = dp_ldm.tunable_denoiser(models()[1], config, 1 if per_class else len(names), conditioner=len(names) > 1)
    sums = []
    for denoiser in trained.denoisers:
        after = dict(denoiser.named_parameters())
        moves = []
        for name, p in start.named_parameters():
            if name.endswith("shift.weight"):  # tuned in units of the gain, from the public row on
                rows = after[name.replace("shift.", "")]
                moves.append((rows[-1:] - rows[:-1]).flatten() / config.conditioner_gain)
            elif p.requires_grad:
                moves.append((p - after[name]).detach().flatten())
        sums.append(torch.cat(moves).double() * trained.plan.denominator)
    return torch.stack(sums), certificate


def largest_move(mode):
    """How far the noise-free part of a step's sum moves when one example is taken away, or made blank; both ways.

    The seed gives both runs the same noise, so their difference is the examples' part alone.
    """
    config = dataclasses.replace(STEP, mode=mode)
    outlier = images()
    outlier[-1] = torch.where(outlier[-1] > 0, 1.0, -1.0)
    whole, _ = released_sum(config, private_images=outlier)
    fewer, _ = released_sum(config, private_images=outlier[:5], private_labels=LABELS[:5])
    blank = outlier.clone()
    blank[-1] = -1.0
    zeroed, _ = released_sum(config, private_images=blank)
    return float((whole - fewer).norm()), float((whole - zeroed).norm())


def respects_the_clip_norm(mode):
    removed, replaced = largest_move(mode)
    # reached, since raw gradients are far longer; parameters are float32, hence the tolerance
    assert 0.9 * STEP.clip_norm < removed <= STEP.clip_norm * (1 + 1e-3)
    assert replaced <= 2 * STEP.clip_norm * (1 + 1e-3)


@pytest.mark.parametrize("mode", ["shared", "per_class"])
def test_one_example_moves_a_step_by_at_most_the_clip_norm(plain_descent, mode):
    respects_the_clip_norm(mode)


def test_latents_scaled_by_private_statistics_are_caught(plain_descent, monkeypatch):
    """The mutant: one example changes the latents of all, as LDM's scale factor from its first batch would."""

    def with_batch_statistics(autoencoder, private_images, scale):
        latents = latent_diffusion.encode(autoencoder, private_images, 1.0)
        return (latents - latents.mean(0)) / latents.std(0)

    monkeypatch.setattr(dp_ldm, "encode", with_batch_statistics)
    with pytest.raises(AssertionError):
        respects_the_clip_norm("shared")


def noise_is_as_certified(mode, relation, count):
    config = dataclasses.replace(STEP, mode=mode)
    private = dict(private_images=images()[:count], private_labels=LABELS[:count], neighboring_relation=relation)
    # declared far more images than there are: the parameters, float32, must not drown the noise in rounding
    noisy, certificate = released_sum(config, num_private_declared=30, **private)
    clean = torch.zeros_like(noisy)
    if count:
        with mock.patch.object(dp_sgd, "gaussian_noise", lambda shape, generator: torch.zeros(shape).double()):
            clean = released_sum(config, num_private_declared=30, **private)[0]
    residual = ((noisy - clean) / certificate.noise_std).flatten()
    low, high = stats.chi2(len(residual)).ppf([5e-7, 1 - 5e-7])
    assert low < float(residual.square().sum()) < high
    assert stats.kstest(residual.numpy(), "norm").pvalue > 1e-6


@pytest.mark.parametrize(
    ("mode", "relation", "count"),
    [("shared", "add_or_remove_one", 6), ("per_class", "replace_one", 6), ("shared", "zero_out", 0)],
)
def test_noise_is_as_certified(plain_descent, mode, relation, count):
    """Two-sided chi-square and Kolmogorov-Smirnov tests on the released coordinates; false alarm at most 2e-6."""
    noise_is_as_certified(mode, relation, count)


@pytest.mark.parametrize("factor", [0.9, 1.1])  # the test's resolution, with 8,000 coordinates, is 4%
def test_a_tenth_less_or_more_noise_is_caught(plain_descent, monkeypatch, factor):
    real = dp_sgd.gaussian_noise
    monkeypatch.setattr(dp_sgd, "gaussian_noise", lambda shape, generator: factor * real(shape, generator))
    with pytest.raises(AssertionError):
        noise_is_as_certified("shared", "add_or_remove_one", 0)


# --- latents ---------------------------------------------------------------------------------------------------


def test_a_latent_depends_on_its_own_image_to_the_last_bit():
    autoencoder, _ = models()
    many = images(CHUNK + 2)
    together = latent_diffusion.encode(autoencoder, many, SCALE)
    assert together.shape == (len(many), 4, 4, 4)
    assert torch.equal(together[1:4], latent_diffusion.encode(autoencoder, many[1:4], SCALE))
    assert torch.equal(together[-1:], latent_diffusion.encode(autoencoder, many[-1:], SCALE))
    torch.testing.assert_close(together, SCALE * autoencoder.encode(many).latent_dist.mean)


# --- labels, modes, seeds ---------------------------------------------------------------------------------------


def test_per_class_training_sees_its_class_only(monkeypatch):
    """Parallel composition: changing class c's images leaves the other denoisers as they are, bit for bit."""
    monkeypatch.setattr(dp_sgd, "_sampled_multiplier", lambda *_: 1.0)  # some noise; how much costs seconds to say
    config = DPLdmConfig(mode="per_class", num_steps=3, expected_batch_size=1.5, noise_draws=2)
    changed = images()
    changed[LABELS == 2] = images(2, seed=9)
    first, second = (train(config, batch, seed=3)[0].denoisers for batch in (images(), changed))
    assert len(first) == 3
    assert torch.equal(flat(first[0]), flat(second[0])) and torch.equal(flat(first[1]), flat(second[1]))
    assert not torch.equal(flat(first[2]), flat(second[2]))


def test_a_class_without_images_keeps_its_public_row():
    trained, _ = train(
        DPLdmConfig(num_steps=3, learning_rate=0.05), private_labels=LABELS.clamp(max=1), epsilon=math.inf, seed=0
    )
    (denoiser,) = trained.denoisers
    rows = [p for name, p in denoiser.named_parameters() if "class_embedder" in name]
    for row in rows:
        assert torch.equal(row[2], row[3]) and not torch.equal(row[0], row[3]) and not torch.equal(row[1], row[0])


def test_seeded_training_repeats_and_unseeded_does_not():
    def parameters(seed):
        return flat(train(seed=seed)[0].denoisers[0])

    assert torch.equal(parameters(1), parameters(1))
    assert not torch.equal(parameters(None), parameters(None))


@pytest.mark.parametrize("mode", ["per_class", "shared"])
def test_non_private_training_learns_and_samples(mode):
    config = DPLdmConfig(mode=mode, num_steps=40, learning_rate=1e-2)
    trained, certificate = train(config, epsilon=math.inf, seed=0)
    latents = latent_diffusion.encode(models()[0], images(), SCALE)
    with torch.no_grad():
        old = fixed_loss(models()[1], latents, labels=torch.full((6,), TINY.pseudo_labels)).mean()
        if mode == "per_class":
            losses = [fixed_loss(model, latents[LABELS == c]) for c, model in enumerate(trained.denoisers)]
            new = torch.cat(losses).mean()
        else:
            new = fixed_loss(trained.denoisers[0], latents, labels=LABELS).mean()
    assert new < 0.8 * old
    assert certificate.sentence.startswith("NOT PRIVATE") and certificate.epsilon == math.inf
    assert trained.num_releases == 0 and trained.seconds > 0
    samples, labels = trained.sample(6, generator=torch.Generator().manual_seed(0), num_steps=2, batch_size=4)
    assert samples.shape == (6, 1, 16, 16) and labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert torch.isfinite(samples).all() and samples.abs().max() <= 1
    again, _ = trained.sample(6, generator=torch.Generator().manual_seed(0), num_steps=2, batch_size=4)
    assert torch.equal(samples, again)
    with pytest.raises(InputError, match="multiple of the 3 classes"):
        trained.sample(7, generator=torch.Generator())


def test_unlabelled_images_tune_attention_only():
    trained, certificate = train(private_labels=None, class_names=("all",), seed=0)
    attention = 2 * 4 * (32 * 32 + 32)
    assert trained.trained_parameters == trained.noise_dimension == certificate.dimension == attention
    samples, labels = trained.sample(3, generator=torch.Generator(), num_steps=1)
    assert len(samples) == 3 and labels.tolist() == [0, 0, 0] and certificate.class_names == ()


@pytest.mark.parametrize("mode", ["shared", "per_class"])
def test_tuned_denoisers_are_plain_diffusers_models(mode, tmp_path):
    trained, _ = train(DPLdmConfig(mode=mode, num_steps=2), seed=0)
    denoiser = trained.denoisers[-1]
    denoiser.save_pretrained(tmp_path)
    again = DiTTransformer2DModel.from_pretrained(tmp_path).eval()
    latents = latent_diffusion.encode(models()[0], images(), SCALE)
    labels = LABELS if mode == "shared" else None
    with torch.no_grad():
        torch.testing.assert_close(
            *[fixed_loss(one, latents, labels=labels) for one in (again, denoiser)], rtol=1e-4, atol=1e-6
        )


# --- certificate ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize("mode", ["shared", "per_class"])
def test_the_certificate_states_the_budget_and_the_noise(relation, mode):
    config = DPLdmConfig(mode=mode, num_steps=2, clip_norm=0.25)
    for seed, stamp in ((None, False), (0, True)):
        trained, certificate = train(
            config, epsilon=2.0, num_private_declared=60, neighboring_relation=relation, seed=seed
        )
        assert certificate.method == "dp_ldm" and certificate.mechanism == "DP-SGD"
        assert certificate.epsilon == 2.0 and certificate.delta == 1e-5
        assert certificate.demonstration is stamp and certificate.private is not stamp
        assert certificate.sensitivity == (0.5 if relation == "replace_one" else 0.25)
        assert certificate.noise_std == pytest.approx(trained.plan.noise_std * 0.25)
        assert certificate.dimension == trained.noise_dimension
        assert trained.trained_parameters == trained.noise_dimension * len(trained.denoisers)
        classes, declared, entry = certificate.ledger
        assert classes.quantity == "class names" and declared.kind == "declared_public"
        assert (entry.steps, entry.sample_rate, trained.num_releases) == (2, 1.0, 2)
        assert certificate.num_private == (None if relation == "add_or_remove_one" else 60)
        assert type(certificate).from_json(certificate.to_json()) == certificate
        # full batches are one Gaussian mechanism: its epsilon, computed here from the noise itself
        mu, normal = math.sqrt(2) * certificate.sensitivity / certificate.noise_std, stats.norm
        spent = normal.cdf(mu / 2 - 2.0 / mu) - math.exp(2.0) * normal.cdf(-mu / 2 - 2.0 / mu)
        assert 0.97e-5 < spent <= 1e-5 * (1 + 1e-9)


def test_the_certificate_names_both_public_models():
    _, one = train(seed=0)
    other = build_autoencoder(TINY).requires_grad_(False)
    _, two = train(seed=0, autoencoder=other)
    assert one.base_model_sha256 != two.base_model_sha256


# --- requests that cannot be served -----------------------------------------------------------------------------


BAD_REQUESTS = {
    "epsilon": (dict(epsilon=0.0), "epsilon > 0"),
    "nan": (dict(epsilon=math.nan), "epsilon > 0"),
    "delta": (dict(delta=1.0), "delta < 1"),
    "relation": (dict(neighboring_relation="swap"), "zero_out"),
    "size": (dict(num_private_declared=0), "num_private_declared"),
    "no class": (dict(class_names=()), "class_names is empty"),
    "no labels": (dict(private_labels=None), "no private_labels"),
    "few labels": (dict(private_labels=LABELS[:4]), "differ in length"),
    "unknown label": (dict(class_names=("a", "b")), "must lie in 0 .. 1"),
    "wrong size": (dict(private_images=torch.zeros(6, 1, 28, 28)), "resize"),
    "colour": (dict(private_images=torch.zeros(6, 3, 16, 16)), "resize"),
    "not finite": (dict(private_images=images() * math.nan), "finite floats"),
    "large batch": (dict(config=DPLdmConfig(expected_batch_size=7)), "exceeds the 6 images"),
    "large batch of a class": (
        dict(config=DPLdmConfig(mode="per_class", expected_batch_size=3)),
        "exceeds the 2 images declared for each class",
    ),
    "all frozen": (dict(config=DPLdmConfig(num_frozen_blocks=2)), "below the 2 attention modules"),
    "no denoiser": (dict(denoiser=torch.nn.Linear(2, 2)), "DiTTransformer2DModel"),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_a_bad_request_is_refused_before_any_image_is_encoded(case, monkeypatch):
    monkeypatch.setattr(dp_ldm, "encode", lambda *_: pytest.fail("a private image was read"))
    changes, message = BAD_REQUESTS[case]
    with pytest.raises(InputError, match=message):
        train(**changes)


def test_public_faults_are_found_without_looking_at_private_values():
    """Of an image set nothing but its shape is needed to refuse."""
    for changes in (dict(config=DPLdmConfig(expected_batch_size=7)), dict(epsilon=-1.0), dict(delta=2.0)):
        with pytest.raises(InputError):
            train(private_images=torch.empty(6, 1, 16, 16, device="meta"), private_labels=None, **changes)


@pytest.mark.parametrize(
    "wrong",
    [
        {"mode": "both"},
        {"num_frozen_blocks": -1},
        {"conditioner_gain": 0.0},
        {"clip_norm": 0.0},
        {"ema_decay": 1.0},
        {"num_steps": 0},
    ],
)
def test_bad_settings(wrong):
    with pytest.raises(InputError):
        DPLdmConfig(**wrong)


# --- the public models --------------------------------------------------------------------------------------------


def public_tasks():
    rng = np.random.default_rng(0)
    fields = rng.integers(-100, 100, (12, 2, 40, 40)).astype(np.int8)
    return GlyphTasks.from_fields(fields, [f"stroke {i}" for i in range(12)])


def test_public_training_resumes_and_writes_a_folder_diffusers_reads(tmp_path):
    short = dataclasses.replace(SMOKE, denoiser_stage=dataclasses.replace(SMOKE.denoiser_stage, steps=3))
    tasks = (public_tasks(), public_tasks())
    folder = latent_diffusion.train_latent_models(short, tmp_path / "run", tasks=tasks)
    first = (tmp_path / "run" / "autoencoder.pt").stat().st_mtime_ns
    weights = artefacts.folder_sha256(folder)
    latent_diffusion.train_latent_models(short, tmp_path / "run", tasks=tasks)  # finished: nothing is trained again
    assert (tmp_path / "run" / "autoencoder.pt").stat().st_mtime_ns == first
    assert artefacts.folder_sha256(folder) == weights
    with pytest.raises(InputError, match="another preset"):
        latent_diffusion.train_latent_models(SMOKE, tmp_path / "run", tasks=tasks)

    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["stages"]["denoiser"]["steps"] == 3 and manifest["stages"]["autoencoder"]["steps"] == 6
    assert {k: v for k, v in weights.items() if "/" in k} == manifest["sha256"]
    assert (folder / "README.md").read_text().startswith("# Weights")
    autoencoder, denoiser, scale = dp_ldm.load_latent_models(folder)
    assert isinstance(autoencoder, AutoencoderKL) and isinstance(denoiser, DiTTransformer2DModel)
    assert scale == pytest.approx(manifest["scale"]) and not any(p.requires_grad for p in denoiser.parameters())
    public = public_tasks().sample_tasks(32, 8, torch.Generator().manual_seed(1)).flatten(0, 1)
    assert 0.8 < latent_diffusion.encode(autoencoder, public, scale).std() < 1.25
    trained, _ = train(autoencoder=autoencoder, denoiser=denoiser, loss_function=None, seed=0)
    samples, _ = trained.sample(3, generator=torch.Generator(), num_steps=2)
    assert torch.isfinite(samples).all()
    with pytest.raises(InputError, match="no latent models"):
        dp_ldm.load_latent_models(tmp_path / "nothing")


def test_clusters_are_means_of_the_tasks_nearest_to_them():
    preset = dataclasses.replace(SMOKE, cluster_tasks=60, pseudo_labels=3)
    autoencoder = models()[0]
    centres = latent_diffusion.task_clusters(preset, public_tasks(), autoencoder, 1.0)
    assert centres.shape == (3, 4 * 4 * 4) and len(torch.unique(centres, dim=0)) == 3
    assert torch.equal(centres, latent_diffusion.task_clusters(preset, public_tasks(), autoencoder, 1.0))


@pytest.mark.parametrize("name", latent_diffusion.PRESETS)
def test_shipped_models_are_those_of_their_manifest_and_redraw_a_stroke(name):
    folder = pretrained.WEIGHTS / f"{name}-latent"
    manifest = json.loads((folder / "manifest.json").read_text())
    files = artefacts.folder_sha256(folder)
    assert {k: v for k, v in files.items() if "/" in k} == manifest["sha256"]
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 5 * 2**20
    # A stage's field that is younger than the models had its default when they were trained.
    stages = {k: dataclasses.asdict(StageConfig(**v)) for k, v in manifest["preset"].items() if k.endswith("_stage")}
    assert json.loads(json.dumps(dataclasses.asdict(latent_diffusion.PRESETS[name]))) == manifest["preset"] | stages
    assert not manifest["public_data"].get("lookalikes") and manifest["name"] == folder.name
    autoencoder, denoiser, scale = dp_ldm.load_latent_models(folder.name)
    stroke = torch.full((1, manifest["preset"]["image_channels"], 16, 16), -1.0)
    stroke[..., 3:13, 6:8] = 1.0
    latent = latent_diffusion.encode(autoencoder, stroke, scale)
    assert (latent_diffusion.decode(autoencoder, latent, scale) - stroke).square().mean() < 0.05
    none = torch.full((4,), manifest["preset"]["pseudo_labels"])
    latents = latent_diffusion.sample_latents(denoiser, none, generator=torch.Generator().manual_seed(0), num_steps=8)
    assert 0.5 < latents.std() < 1.5
