"""The grid: one record a cell, resumable, one noisy sum for all, nothing tuned on private images."""

import dataclasses
import json
import math
import os
import re

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel

from hyperdp_lib import cli, embedding, records
from hyperdp_lib.baselines import controls, latent_diffusion
from hyperdp_lib.baselines.direct_conditioning import ConditionedDenoiser
from hyperdp_lib.baselines.dp_embedding_sgd import EmbeddingSGDConfig
from hyperdp_lib.baselines.dp_hybrid import DPHybridConfig
from hyperdp_lib.baselines.dp_ldm import DPLdmConfig
from hyperdp_lib.baselines.dp_lora import DPLoraConfig
from hyperdp_lib.baselines.dp_mepf import DPMepfConfig
from hyperdp_lib.baselines.layer_choice import LayerSearchConfig
from hyperdp_lib.cells import NUMBERS
from hyperdp_lib.data import ImageSet, InputError, save_npz
from hyperdp_lib.embedding import EncoderConfig
from hyperdp_lib.experiments import comparison, methods, tuning
from hyperdp_lib.experiments.methods import METHODS, Bench, Settings
from hyperdp_lib.hypernetwork import HyperNetwork, HyperNetworkConfig
from hyperdp_lib.nested import NestedEncoder, NestedHyperNetwork
from hyperdp_lib.prior import Prior

QUICK = DPLoraConfig(r=1, num_steps=2)
SETTINGS = Settings(
    num_images=40, sampling_steps=2, num_nearest=2, bank_tasks=70, bank_images=8,
    configs={
        "dp_lora": {1.0: QUICK},
        "lora_non_private": {math.inf: QUICK},
        "dp_ldm": {1.0: DPLdmConfig(num_steps=2)},
        "dp_mepf": {1.0: DPMepfConfig(num_steps=2, images_per_class=2)},
        "dp_embedding_sgd": {1.0: EmbeddingSGDConfig(num_steps=2, noise_draws=1)},
        "dp_hybrid": {1.0: DPHybridConfig(num_steps=2, noise_draws=1)},
        "dp_layer_search": {1.0: LayerSearchConfig(candidates=("attention",), num_steps=2, r=1, mean_trials=1.5)},
    },
)  # fmt: skip
NOISY_SUM = ("dp_deepsets", "nearest_public", "noisy_class_means", "direct_conditioning")


class Tasks:
    def sample_tasks(self, num_tasks, images_per_task, generator):
        patterns = torch.randn(num_tasks, 1, 1, 16, 16, generator=generator)
        noise = 0.3 * torch.randn(num_tasks, images_per_task, 1, 16, 16, generator=generator)
        return (patterns + noise).clamp(-1, 1)


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    base = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=1, num_layers=1, sample_size=16,
        patch_size=4, num_embeds_ada_norm=1,
    ).eval()  # fmt: skip
    encoder = embedding.Encoder(EncoderConfig(dimension=16, width=8))
    network = HyperNetwork(encoder, base, HyperNetworkConfig(hidden=16, head_width=16, num_blocks=1)).eval()
    with torch.no_grad():
        network.head_b.weight.normal_(std=0.1)  # so that what is summed makes a difference
    return base, network.requires_grad_(False), embedding.FeatureNetwork(dimension=8).eval()


def nested_network(base, network):
    codes = embedding.FeatureNetwork(name="codes")
    encoder = NestedEncoder(network.encoder, codes, torch.zeros(79), torch.randn(79, 64))
    made = NestedHyperNetwork(encoder, base, network.config).eval().requires_grad_(False)
    made.table = {0.1: {8: 2.0, 16: 1.0, 32: 3.0, 64: 4.0}}
    made.centroids = {f"16x{count}": torch.randn(count, 16) for count in NUMBERS[1:]}
    prior = Prior.fit(made.using(16).encoder, Tasks().sample_tasks(70, 2, torch.Generator().manual_seed(6)))
    made.priors = {f"16.{part}": value for part, value in vars(prior).items()}
    return made


def public_models(models):
    """What ships with the library, in miniature and untrained."""
    base, network, _ = models
    latent = latent_diffusion.SMOKE
    autoencoder, denoiser = latent_diffusion.build_autoencoder(latent), latent_diffusion.build_denoiser(latent)
    made = {
        "dp_ldm": (autoencoder.eval(), denoiser.eval(), 1.0),
        "direct_conditioning": (network, ConditionedDenoiser(base, 16).eval()),
        "hyperdp": (nested_network(base, network),),
    }
    shipped = methods.public_models_source(base, network, lambda: torch.zeros(2, 1, 16, 16))
    return lambda method: made[method] if method in made else shipped(method)


@pytest.fixture(scope="module")
def private():
    return tuning.dressed_as_private(Tasks(), num_classes=2, per_class=20, per_class_test=10, seed=5)


def run(models, private, out, **changes):
    base, network, features = models
    arguments = dict(
        methods=list(METHODS), epsilons=[1.0], seeds=[0], hypernetwork=(base, network), feature_network=features,
        tasks=Tasks(), settings=SETTINGS, public_models=public_models(models), pair="glyphs-digits", out=out,
        command="hyperdp compare",
    )  # fmt: skip
    return comparison.compare(private, **{**arguments, **changes})


def bench_of(models, private, **changes):
    base, network, features = models
    return Bench(
        base, network, features, comparison.bank_source(Tasks(), SETTINGS), public_models(models), *private,
        private[0],
        **{"settings": SETTINGS, **changes},
    )  # fmt: skip


def test_what_needs_nested_coordinates_takes_those_of_the_hypernetwork_itself(models):
    base, network, _ = models
    nested = nested_network(base, network)
    found = methods.public_models_source(base, nested, lambda: torch.zeros(2, 1, 16, 16))
    assert found("hyperdp") == (nested,)
    ours = METHODS["hyperdp"]
    assert ours.available("drawings") and ours.available("glyphs") and not ours.available("glyphs-conditioned")
    assert not METHODS["direct_conditioning"].available("drawings")


def test_all_methods_make_records_that_say_what_they_are(models, private, tmp_path):
    paths = run(models, private, tmp_path)
    made = {(r.method, r.epsilon): r for r in records.read_records(tmp_path)}
    expected = {(name, 1.0) for name, method in METHODS.items() if method.private}
    for name, method in METHODS.items():
        expected |= {(name, None if math.isinf(epsilon) else epsilon) for epsilon in method.also}
    assert set(made) == expected and len(paths) == len(set(paths)) == len(expected)
    for (method, epsilon), record in made.items():
        assert record.scores["label"] == "research metric, not DP"
        assert "NOT PRIVATE" in record.settings["noise"]
        assert record.num_private == 40 and record.provenance["command"] == "hyperdp compare"
        assert 0 <= record.scores["accuracy"] <= 1
        if method != "noisy_class_means":
            assert record.scores["frechet_distance"] >= 0 and record.scores["features"] == "glyphnet"
        # what the certificate says belongs to the record; that of one noisy sum follows from its fields
        if METHODS[method].default is not None:
            private_run = METHODS[method].private and epsilon is not None
            assert ("NOT PRIVATE" in record.settings["certificate"]) and record.settings["ledger"]
            assert (record.num_releases > 0) or not private_run
    ours, rival = made["dp_deepsets", 1.0], made["dp_lora", 1.0]
    assert (ours.num_releases, ours.noise_dimension, ours.trained_parameters) == (1, 32, 0)
    planned = made["hyperdp", 1.0]  # two classes, sixteen coordinates and a count; a count besides, and two steps
    assert planned.noise_dimension == 2 * 17 and planned.num_releases == 3
    assert rival.num_releases == 2 and rival.trained_parameters == 2 * rival.noise_dimension
    assert made["dp_embedding_sgd", 1.0].noise_dimension < rival.noise_dimension
    assert made["public_only", 0.0].num_releases == 0
    assert made["real", None].scores["accuracy"] == 1.0
    assert len(records.load_records(tmp_path)) == len(expected)


def test_interrupted_grid_resumes_and_repeats_nothing(models, private, tmp_path, monkeypatch):
    asked = dict(methods=["dp_deepsets", "nearest_public"], seeds=[0, 1])
    calls = []
    original = METHODS["dp_deepsets"].run

    def interrupted(bench, epsilon, seed):
        calls.append((epsilon, seed))
        if seed == 1 and len(calls) < 4:
            raise KeyboardInterrupt
        return original(bench, epsilon, seed)

    replaced = {**METHODS, "dp_deepsets": dataclasses.replace(METHODS["dp_deepsets"], run=interrupted)}
    monkeypatch.setattr(comparison, "METHODS", replaced)
    with pytest.raises(KeyboardInterrupt):
        run(models, private, tmp_path, **asked)
    before = {path: (tmp_path / path).stat().st_mtime_ns for path in os.listdir(tmp_path)}
    sheets = {name for name in before if name.endswith(".png")}  # of the first seed: four cells, all done
    assert len(before) == 8 and {name[:-4] + ".json" for name in sheets} == before.keys() - sheets
    run(models, private, tmp_path, **asked)
    after = {path: (tmp_path / path).stat().st_mtime_ns for path in os.listdir(tmp_path)}
    assert len(after) == 8 + len(sheets) and {name: after[name] for name in before} == before
    assert calls == [(1.0, 0), (math.inf, 0), (1.0, 1), (1.0, 1), (math.inf, 1)]


def test_exactly_the_budgets_asked_for(models, private, tmp_path):
    asked = dict(methods=["dp_deepsets", "nearest_public", "public_only"], seeds=[3])
    (path,) = run(models, private, tmp_path, **asked | {"methods": ["dp_deepsets"]}, epsilons=[2.0], exact=True)
    assert os.listdir(tmp_path) == [path.name] and path.stem.endswith("_dp_deepsets_eps2_n40_seed3")
    cells = [("dp_deepsets", math.inf), ("nearest_public", math.inf), ("public_only", 0.0)]
    assert comparison.grid(asked["methods"], [math.inf, 0.0], exact=True) == cells
    assert comparison.grid(asked["methods"], [math.inf]) == cells


def test_a_cell_is_reproducible(models, private, tmp_path):
    asked = dict(methods=["dp_deepsets", "dp_lora", "dp_mepf", "nearest_public", "public_only"])
    for folder in ("first", "second"):
        run(models, private, tmp_path / folder, **asked)
    first, second = (
        {r.name(): r.scores for r in records.read_records(tmp_path / folder)}
        for folder in ("first", "second")
    )
    assert first == second and len(first) == 8


def test_methods_share_one_noisy_sum(models, private, monkeypatch):
    bench = bench_of(models, private)
    seen = []
    original = controls.noisy_class_sums
    monkeypatch.setattr(
        controls, "noisy_class_sums", lambda *a, **k: seen.append(original(*a, **k)) or seen[-1]
    )
    for name in NOISY_SUM:
        METHODS[name].run(bench, 1.0, 3)
    assert len(seen) == len(NOISY_SUM)
    for noisy_sum, std in seen[1:]:
        np.testing.assert_array_equal(noisy_sum, seen[0][0])
        assert std == seen[0][1]
    METHODS["dp_deepsets"].run(bench, 1.0, 4)
    assert not np.array_equal(seen[-1][0], seen[0][0])


def test_the_epsilon_zero_control_reads_no_private_image(models, private):
    other = dataclasses.replace(private[0], images=-private[0].images)
    first, second = (METHODS["public_only"].run(bench_of(models, (train, private[1])), 0.0, 1)
                     for train in (private[0], other))  # fmt: skip
    assert torch.equal(first.images, second.images)


def test_records_of_another_comparison_are_not_mixed_in(models, private, tmp_path):
    run(models, private, tmp_path, methods=["real"])
    with pytest.raises(InputError, match="other weights, delta"):
        run(models, private, tmp_path, methods=["real"], delta=1e-6)


def test_subset_is_even_and_fixed_by_its_seed(private):
    chosen = comparison.subset(private[0], 11, seed=2)
    assert sorted(torch.bincount(chosen.labels).tolist()) == [5, 6]
    assert torch.equal(chosen.images, comparison.subset(private[0], 11, seed=2).images)
    assert not torch.equal(chosen.images, comparison.subset(private[0], 11, seed=3).images)
    assert comparison.subset(private[0], 40, seed=2) is private[0]
    with pytest.raises(InputError, match="1 .. 40"):
        comparison.subset(private[0], 41, seed=0)


def test_a_few_private_images_are_scored_against_all(models, private, tmp_path):
    (path,) = run(models, private, tmp_path, methods=["public_only"], num_private=10)
    record = records.Record.from_json(path.read_text())
    assert record.num_private == 10 and record.scores["num_reference"] == 40


def test_files_are_split_into_training_and_test(models, private, tmp_path):
    save_npz(tmp_path / "mine.npz", private[0])
    (path,) = run(models, tmp_path / "mine.npz", tmp_path / "out", methods=["real"], pair=None)
    record = records.Record.from_json(path.read_text())
    assert record.pair == "mine" and record.num_private == 32
    # eight held-out images are too few for a Fréchet distance in eight features: accuracy only
    assert record.scores["frechet_distance"] is None and record.scores["accuracy"] == 1.0


def test_unlabelled_images(models, private, tmp_path):
    unlabelled = tuple(ImageSet(part.images, None, None) for part in private)
    paths = run(models, unlabelled, tmp_path, methods=["all"])
    served = {name for name in METHODS if any(f"_{name}_eps" in path.name for path in paths)}
    assert served == set(comparison._method_names(["all"])) - {"noisy_class_means"}
    assert all(json.loads(path.read_text())["scores"]["accuracy"] is None for path in paths)
    with pytest.raises(InputError, match="needs labels"):
        run(models, unlabelled, tmp_path, methods=["noisy_class_means"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ["magic"]}, "unknown method 'magic'"),
        ({"methods": []}, "unknown method"),
        ({"epsilons": [0.0]}, "must be positive"),
        ({"epsilons": [math.nan], "exact": True}, "must be positive"),
        ({"methods": ["dp_lora"], "epsilons": [math.inf], "exact": True}, "none of dp_lora runs at epsilon inf"),
        ({"num_private": 0, "methods": ["public_only"]}, "1 .. 40"),
        ({"settings": dataclasses.replace(SETTINGS, num_images=10)}, "need 16 training images"),
    ],
)
def test_bad_input_is_one_helpful_line_and_writes_nothing(models, private, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        run(models, private, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_several_processes_make_the_same_records(models, private, tmp_path):
    asked = dict(methods=["dp_deepsets", "public_only", "real"], seeds=[0, 1], public_models=None)
    alone = run(models, private, tmp_path / "one", **asked)
    assert [path.name for path in run(models, private, tmp_path / "two", jobs=2, **asked)] == [p.name for p in alone]
    scores = [
        {(r.method, r.epsilon, r.seed): r.scores for r in records.read_records(tmp_path / folder)}
        for folder in ("one", "two")
    ]
    for cell, expected in scores[0].items():
        for score in ("accuracy", "frechet_distance"):
            assert scores[1][cell][score] == pytest.approx(expected[score], rel=1e-3)
    assert len(list((tmp_path / "two").glob("*.png"))) == len(list((tmp_path / "one").glob("*.png"))) > 0
    with pytest.raises(InputError, match="jobs must be at least 1"):
        run(models, private, tmp_path / "three", jobs=0, **asked)


def test_all_are_the_methods_whose_public_models_are_there(tmp_path, monkeypatch):
    monkeypatch.setattr(methods, "WEIGHTS", tmp_path)
    without = {name for name, method in METHODS.items() if method.weights is None}
    assert set(METHODS) - without >= {"dp_ldm", "direct_conditioning", "hyperdp"}
    assert set(comparison._method_names(["all"])) == without
    (tmp_path / "glyphs-latent").mkdir()
    (tmp_path / "glyphs-latent" / "manifest.json").write_text("{}")
    assert set(comparison._method_names(["all"])) == without | {"dp_ldm"}
    # asked for: it says what is missing
    assert comparison._method_names(["direct_conditioning"]) == ("direct_conditioning",)


def test_settings_round_trip_and_pick_the_nearest_budget():
    settings = SETTINGS
    for epsilon, config in ((0.5, QUICK), (8.0, DPLoraConfig(mode="shared", expected_batch_size=16))):
        settings = settings.with_config("dp_lora", epsilon, config)
    assert Settings.from_json(settings.to_json()) == settings
    assert settings.config("dp_lora", 1.0).mode == "per_class" and settings.config("dp_lora", 4.0).mode == "shared"
    assert settings.config("dp_lora", math.inf).mode == "shared"  # nothing is tuned without noise: the nearest
    assert settings.config("lora_non_private", math.inf) == QUICK
    assert Settings().config("dp_lora", 1.0) == DPLoraConfig() and Settings().config("real", 1.0) is None
    with pytest.raises(InputError, match="not comparison settings"):
        Settings.from_json("{}")


def test_dressed_sets_are_public_stand_ins():
    train, test = tuning.dressed_as_private(Tasks(), num_classes=3, per_class=5, per_class_test=2, seed=1)
    assert len(train) == 15 and len(test) == 6 and train.class_names == ("class_0", "class_1", "class_2")
    assert torch.bincount(train.labels).tolist() == [5, 5, 5]
    again, _ = tuning.dressed_as_private(Tasks(), num_classes=3, per_class=5, per_class_test=2, seed=1)
    assert torch.equal(train.images, again.images)


def test_tuning_picks_the_best_keeps_its_trials_and_never_sees_private_images(models, tmp_path, monkeypatch):
    secret = ImageSet(torch.full((4, 1, 16, 16), 0.123), torch.tensor([0, 1, 0, 1]), ("a", "b"))
    bench = bench_of(models, (secret, secret))
    runs = []

    def quality(own, epsilon, seed):
        assert (
            not (own.private_train.images == 0.123).any() and own.private_train.labels.unique().numel() == 2
        )
        runs.append((own.settings.num_nearest, seed))
        return methods.Outcome(
            None, None, {}, scores={"frechet_distance": abs(own.settings.num_nearest - 5.2)}
        )

    monkeypatch.setitem(methods.METHODS, "nearest_public", methods.Method(quality))
    candidates = tuning.candidates_for("nearest_public", SETTINGS, 6, 1.0, 20)
    asked = dict(epsilon=1.0, num_private=40, num_classes=2, out=tmp_path, rounds=(1, 3), seed=0)
    best = tuning.tune("nearest_public", candidates, bench, Tasks(), **asked)
    assert best.num_nearest == 5
    assert len(runs) == 6 + 2 * 2  # six on one set, the best two on two more
    trials = [json.loads(path.read_text(encoding="utf-8")) for path in tmp_path.iterdir()]
    assert len(trials) == len(runs) and all("commit" in trial["provenance"] for trial in trials)
    assert tuning.tune("nearest_public", candidates, bench, Tasks(), **asked) == best
    assert len(runs) == 10  # trials on record are not run again
    candidates[0] = dataclasses.replace(candidates[0], bank_tasks=5)
    tuning.tune("nearest_public", candidates, bench, Tasks(), **asked)
    assert len(runs) == 11  # unless their settings changed


@pytest.mark.parametrize("method", tuning.TUNED)
def test_every_method_has_as_many_candidates_that_differ_and_start_with_the_present_choice(method):
    start = Settings()
    candidates = tuning.candidates_for(method, start, 12, 1.0, 144)
    texts = [candidate.to_json() for candidate in candidates]
    assert len(set(texts)) == len(texts) == 12
    first = candidates[0]
    assert first.config(method, 1.0) == start.config(method, 1.0) and first.num_nearest == start.num_nearest


def test_what_has_no_settings_is_not_tuned():
    with pytest.raises(InputError, match="nothing to tune"):
        tuning.candidates_for("real", Settings(), 3, 1.0, 144)
    tunable = {name for name, method in METHODS.items() if method.default is not None}
    assert tunable | set(tuning.KNOBS) == set(tuning.TUNED)


def test_one_class_is_rehearsed_as_an_unlabelled_set(models, private):
    asked = dict(epsilon=1.0, num_private=20, num_classes=1, seed=0)
    scores = tuning.rehearse("dp_deepsets", bench_of(models, private), Tasks(), **asked)
    assert scores["accuracy"] is None and scores["frechet_distance"] >= 0


@pytest.mark.parametrize(
    ("method", "epsilon", "delta", "message"),
    [
        ("dp_embedding_sgd", 60.0, 1e-5, "replace_one needs .* take full batches"),
        ("dp_hybrid", 1.0, 1e-13, "from delta 1e-12 on"),
        ("dp_layer_search", 1.0, 1e-13, "from delta 1e-12 on"),
        ("dp_ldm", 1.0, 1e-13, "from delta 1e-12 on"),
    ],
)
def test_budgets_out_of_range_are_one_line_before_a_model_is_loaded(
    method, epsilon, delta, message, tmp_path, monkeypatch, capsys
):
    """By the command, which ends with 2."""
    monkeypatch.setattr(comparison, "load_models", lambda *_: pytest.fail("a model is loaded"))
    monkeypatch.setattr(records, "require_commit", lambda _: None)
    arguments = ["compare", "--private", "digits", "--methods", method, "--epsilon", str(epsilon), "--exact"]
    arguments += ["--delta", str(delta), "--neighboring-relation", "replace_one", "--out", str(tmp_path / "out")]
    assert cli.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line) and "too small" not in line
    assert cli.main(["forecast", "--num-private", "1000", "--method", method, *arguments[5:7], *arguments[8:12]]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_budget_in_range_passes_the_check():
    for method in METHODS:
        for relation in ("add_or_remove_one", "replace_one"):
            comparison.check_budget(method, 8.0, 1e-5, relation, SETTINGS, 1000, 10)
            comparison.check_budget(method, math.inf, 1e-5, relation, SETTINGS, 1000, 10)
