"""Public training: a miniature from fonts to loadable weights, resumable; simulated sums have the release's law."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from hyperdp_lib.data import ImageSet, InputError
from hyperdp_lib.embedding import COUNT_COORDINATE, Encoder, FeatureNetwork
from hyperdp_lib.experiments import comparison, tuning
from hyperdp_lib.hypernetwork import simulate_sums
from hyperdp_lib.pretrained import load_pretrained
from hyperdp_lib.public.stages import PRESETS, STAGES, Loop, StageConfig, TaskPool, embedded
from hyperdp_lib.public.training import public_source, train


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("training")
    return out, train("miniature", out=out)


def test_the_miniature_trains_end_to_end(trained):
    out, weights = trained
    base, hypernetwork = load_pretrained(weights)
    adapter = hypernetwork(torch.rand(2, 16) * 20, 1.0)
    assert any(b.abs().sum() > 0 for _, b in adapter.factors.values())  # the heads have learned something
    manifest = json.loads((weights / "manifest.json").read_text())
    assert manifest["command"] == "hyperdp train --preset miniature"
    assert {stage: log["steps"] for stage, log in manifest["stages"].items()} == {
        "features": 8, "encoder": 12, "base": 12, "joint": 12,
    }  # fmt: skip
    card = (weights / "README.md").read_text()
    assert "sha256" in card and "No digits" in card
    assert (weights / "features.safetensors").is_file()


def test_running_again_takes_no_step_and_gives_the_same_weights(trained):
    out, weights = trained
    before = {p.name: p.read_bytes() for p in weights.glob("*.safetensors")}
    stamps = {p.name: p.stat().st_mtime_ns for p in out.glob("*.pt")}
    train("miniature", out=out)
    assert {p.name: p.read_bytes() for p in weights.glob("*.safetensors")} == before
    assert {p.name: p.stat().st_mtime_ns for p in out.glob("*.pt")} == stamps


def test_a_folder_of_another_preset_is_refused(trained):
    with pytest.raises(InputError, match="another preset"):
        train("glyphs", out=trained[0])
    with pytest.raises(InputError, match="another preset or seed"):
        train("miniature", out=trained[0], seed=1)
    with pytest.raises(InputError, match="no preset 'glyhps'"):
        train("glyhps")


def test_the_loop_learns_and_resumes_where_it_stopped(tmp_path):
    target = torch.tensor([1.0, -2.0])

    def loop(steps):
        torch.manual_seed(0)
        return Loop("toy", [(torch.nn.Linear(1, 2), 1.0)], StageConfig(steps, 1, 1, 0.1, 0.9), tmp_path)

    def run(loop):
        def loss(step):
            value = (loop.modules[0](torch.ones(1, 1))[0] - target).square().sum()
            return value, {"loss": value.detach()}

        loop.run(loss, every=10)

    first = loop(60)
    first.config = StageConfig(30, 1, 1, 0.1, 0.9)  # stopped half way
    run(first)
    second = loop(60)
    assert second.step == 30 and not second.done
    run(second)
    assert second.step == 60 and [row["step"] for row in second.history] == [10, 20, 30, 40, 50, 60]
    assert second.history[-1]["loss"] < 0.1 * second.history[0]["loss"]


def test_a_short_stage_is_logged_four_times(trained):
    for stage in STAGES:
        rows = json.loads(torch.load(trained[0] / f"{stage}.pt", weights_only=True)["history"])
        steps = getattr(PRESETS["miniature"], f"{stage}_stage").steps
        assert [row["step"] for row in rows] == [steps * quarter // 4 for quarter in (1, 2, 3, 4)]


def test_simulated_sums_have_the_law_of_a_release():
    g = torch.Generator().manual_seed(0)
    codes = torch.zeros(4000, 6, 3)
    codes[:, :, 0] = COUNT_COORDINATE
    codes[:, :, 1] = 0.25
    sizes, std = torch.full((4000,), 500.0), torch.full((4000,), 3.0)
    sums, stated = simulate_sums(codes, sizes, std, g)
    assert torch.equal(stated, std)
    mean, spread = sums.mean(0), sums.std(0)
    # 4000 draws of std 3: the mean has std 0.047, the std 0.034; six of them: false alarm below 1e-8 each
    assert torch.allclose(mean, torch.tensor([250.0, 125.0, 0.0]), atol=6 * 0.047)
    assert torch.allclose(spread, torch.full((3,), 3.0), atol=6 * 0.034)


def test_small_sets_use_only_as_many_images_as_they_have():
    codes = torch.arange(5.0)[None, :, None].expand(1, 5, 2)
    sums, _ = simulate_sums(codes, torch.tensor([2.0]), torch.zeros(1), torch.Generator())
    assert torch.allclose(sums, torch.full((1, 2), 1.0))


def test_presets_train_at_the_sizes_and_noise_they_will_meet():
    """A hypernetwork used at a set size or noise it was not trained for is badly wrong."""
    preset = PRESETS["glyphs"]
    low, high = preset.mean_noise
    for num_private, noise_multiplier in [(12, 3.73), (128, 7.03), (144, 3.73), (6000, 3.73), (144, 1.08)]:
        assert preset.set_size[0] <= num_private <= preset.set_size[1]
        assert low <= noise_multiplier / num_private <= high


TWO = """
import sys
from pathlib import Path

import torch

from hyperdp_lib.public import stages, training
from hyperdp_lib.public.stages import Loop, StageConfig

torch.set_num_threads(1)
training._join("cpu")
number, count = stages.rank()
assert count == 2 and stages.own_seed(5) != 5 or number == 0
torch.manual_seed(0)
loop = Loop("toy", [(torch.nn.Linear(3, 2), 1.0)], StageConfig(5, 1, 1, 0.1, 0.5), Path(sys.argv[1]))
g = torch.Generator().manual_seed(7)


def loss(step):
    both = torch.randn(2, 4, 3, generator=g)  # each process takes its half
    value = loop.modules[0](both[number]).square().mean()
    return value, {"loss": value.detach()}


loop.run(loss)
torch.save([p.detach() for p in loop.parameters], Path(sys.argv[1]) / f"{number}.pt")
"""


def test_two_processes_take_the_steps_of_one_with_both_their_batches(tmp_path):
    """Gradients are averaged: both end with the same parameters, those of one process that saw all images."""
    script = tmp_path / "two.py"
    script.write_text(TWO)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    subprocess.run([*launch, str(script), str(tmp_path)], check=True, capture_output=True, timeout=300)
    first, second = (torch.load(tmp_path / f"{number}.pt", weights_only=True) for number in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert (tmp_path / "toy.pt").is_file()

    torch.manual_seed(0)
    (tmp_path / "alone").mkdir()
    loop = Loop("toy", [(torch.nn.Linear(3, 2), 1.0)], StageConfig(5, 2, 1, 0.1, 0.5), tmp_path / "alone")
    g = torch.Generator().manual_seed(7)

    def loss(step):
        value = loop.modules[0](torch.randn(2, 4, 3, generator=g).flatten(0, 1)).square().mean()
        return value, {"loss": value.detach()}

    loop.run(loss)
    for alone, together in zip(loop.parameters, first, strict=True):
        assert torch.allclose(alone, together, atol=1e-5)


@pytest.mark.parametrize(("warm_up", "first", "full"), [(0.05, 0.025, 39), (0.0, 1.0, 0), (0.5, 1 / 300, 299)])
def test_the_rate_warms_up_over_its_share_of_the_steps(warm_up, first, full, tmp_path):
    config = StageConfig(800, 1, 1, 0.1, warm_up=warm_up)
    loop = Loop("toy", [(torch.nn.Linear(1, 2), 1.0)], config, tmp_path)
    assert loop.learning_rate(0) == pytest.approx(first) and loop.learning_rate(full) == 1.0
    assert loop.learning_rate(full + 2) < 1.0 and loop.learning_rate(800) == pytest.approx(0.0)


def test_another_seed_trains_every_part_anew(tmp_path):
    preset = dataclasses.replace(PRESETS["miniature"], nested=True)
    first, second = (train(preset, out=tmp_path / str(seed), seed=seed) for seed in (0, 1))
    for file in ("base/diffusion_pytorch_model.safetensors", "features.safetensors", "hypernetwork.safetensors"):
        assert (first / file).read_bytes() != (second / file).read_bytes()
    ours, other = (load_file(folder / "encoder.safetensors") for folder in (first, second))
    moved = {key for key in ours if not torch.equal(ours[key], other[key])}
    for part in ("encoder.", "features.", "projection"):  # the nested features, too
        assert any(key.startswith(part) for key in moved)
    assert json.loads((second / "manifest.json").read_text())["command"] is None
    assert "--preset custom" not in (second / "README.md").read_text()
    assert FeatureNetwork.from_pretrained(first / "features.safetensors").name.startswith("glyphnet-")
    assert public_source(first) == preset.public_data and not load_pretrained(first)[1].priors == {}


@dataclasses.dataclass(frozen=True)
class Borrowed:
    """A public source of one's own, with a path in its configuration."""

    folder: pathlib.Path

    def tasks(self, split="train"):
        return PRESETS["miniature"].public_data.tasks(split, progress=False)


def test_weights_of_an_own_source_never_take_the_shipped_public_data(tmp_path):
    preset = dataclasses.replace(PRESETS["miniature"], public_data=Borrowed(tmp_path))
    weights = train(preset, out=tmp_path / "out")
    private = ImageSet(torch.zeros(140, 1, 16, 16)), ImageSet(torch.zeros(140, 1, 16, 16))
    asked = dict(methods=["dp_deepsets", "nearest_public"], exact=True, out=tmp_path / "records", hypernetwork=weights)
    for ask in (
        lambda: tuning.held_out_tasks(weights),
        lambda: comparison.bank_source(None, comparison.Settings(), weights)(load_pretrained(weights)[1].encoder),
        lambda: comparison.compare(private, settings=comparison.Settings(num_images=140), pair="own", **asked),
    ):
        with pytest.raises(InputError, match="a source of one's own .*Borrowed"):
            ask()
    assert not (tmp_path / "records").exists()
    manifest = json.loads((weights / "manifest.json").read_text())
    del manifest["public_source"]
    (weights / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="name no public data"):
        public_source(weights)


def test_absent_public_files_are_said_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setenv("HYPERDP_DATA", str(tmp_path))
    for name in ("drawings", "photographs"):
        with pytest.raises(InputError, match="HYPERDP_DATA"):
            public_source(name)
    assert public_source("glyphs-nested") == public_source("glyphs") == PRESETS["glyphs"].public_data


def test_the_miniature_trains_in_bfloat16(tmp_path):
    preset = dataclasses.replace(PRESETS["miniature"], precision="bfloat16")
    _, hypernetwork = load_pretrained(train(preset, out=tmp_path))
    assert all(torch.isfinite(value).all() for value in hypernetwork.state_dict().values())
    with pytest.raises(InputError, match="float32, bfloat16"):
        train(dataclasses.replace(preset, precision="int8"), out=tmp_path / "other")


def test_a_fixed_bank_stays_as_it_is():
    source = PRESETS["miniature"].public_data.tasks(progress=False)
    for fresh, same in ((0, True), (4, False)):
        preset = dataclasses.replace(PRESETS["miniature"], fresh_tasks=fresh)
        pool = TaskPool(preset, lambda images: images.flatten(1)[:, :16], source, 5, "cpu")
        before = pool.images.clone()
        pool.refresh()
        assert torch.equal(before, pool.images) == same


def test_the_pool_embeds_in_the_background_what_it_holds():
    preset = PRESETS["miniature"]
    source = preset.public_data.tasks(progress=False)
    encoder = Encoder(preset.encoder).eval()
    pool = TaskPool(preset, encoder, source, 5, "cpu")
    for _ in range(2):
        expected = embedded(encoder, pool.images)
        assert torch.allclose(pool.codes, expected, atol=1e-5) and pool.codes.shape[:2] == pool.images.shape[:2]
        pool.refresh()
    told = TaskPool(preset, lambda images: torch.full((len(images), 1), float(os.getpid())), source, 5, "cpu")
    assert (told.codes != os.getpid()).all()  # another process made them
