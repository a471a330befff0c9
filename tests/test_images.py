"""Public images of one's own: tasks in styles, groups held out, errors before work, and weights used like any other."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

from hyperdp_lib import cli, data, pretrained
from hyperdp_lib.data import InputError
from hyperdp_lib.experiments import comparison, tuning
from hyperdp_lib.nested import NestedHyperNetwork
from hyperdp_lib.public import image_training, stages, training
from hyperdp_lib.public import images as public_images
from hyperdp_lib.public.image_training import Rates, plan, preset_for, train_on_images
from hyperdp_lib.public.images import ImageConfig, settled

CLASSES, PER_CLASS = ("abdomen", "chest", "hand", "head", "hip", "knee"), 100


def pictures(classes=6, per_class=PER_CLASS, side=16, channels=1, seed=0):
    """Each class a bright blob of its own, of changing width, on a grey ramp: (N, S, S[, 3]) uint8, and labels."""
    rng = np.random.default_rng(seed)
    labels = np.arange(classes).repeat(per_class)
    centres = np.random.default_rng(9).uniform(0.2, 0.8, (classes, 2))
    y, x = np.mgrid[:side, :side] / side
    at = centres[labels] + rng.normal(0, 0.05, (len(labels), 2))
    width = rng.uniform(0.08, 0.25, (len(labels), 1, 1))
    blob = np.exp(-(np.square(y - at[:, :1, None]) + np.square(x - at[:, 1:, None])) / (2 * width**2))
    levels = 60 + 20 * x + 100 * blob + rng.normal(0, 3, blob.shape)
    levels = levels.clip(0, 255).astype(np.uint8)
    return (levels if channels == 1 else np.stack([levels, levels // 2, 255 - levels], -1)), labels


def archive(path, **how):
    levels, labels = pictures(**how)
    np.savez(path, images=levels, labels=labels, class_names=np.array(CLASSES)[: labels.max() + 1])
    return str(path)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return archive(tmp_path_factory.mktemp("public") / "films.npz")


@pytest.fixture(scope="module")
def tasks(source):
    return ImageConfig((source,)).tasks()


# ---- tasks -----------------------------------------------------------------------------------------------


def test_tasks_have_the_shape_and_range_of_images(tasks):
    drawn = tasks.sample_tasks(40, 12, torch.Generator().manual_seed(0))
    assert drawn.shape == (40, 12, 1, 16, 16) and drawn.dtype == torch.float32
    assert drawn.min() >= -1 and drawn.max() <= 1 and torch.isfinite(drawn).all()
    assert drawn.std(1).mean() > 0.05  # not one image many times


def test_the_generator_decides_what_is_drawn(tasks):
    first, same, other = (tasks.sample_tasks(6, 5, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, same) and not torch.equal(first, other)
    mirrored, plain = (ImageConfig(tasks.config.sources, mirror=mirror).tasks() for mirror in (True, False))
    left = [torch.Generator().manual_seed(3) for _ in range(2)]
    for one, g in zip((mirrored, plain), left, strict=True):
        one.sample_tasks(6, 5, g)
    assert torch.equal(left[0].get_state(), left[1].get_state())  # as many numbers whatever the style


def test_held_out_groups_are_never_trained_on(source, tasks):
    held_out = ImageConfig((source,)).tasks("held_out")
    assert held_out.num_classes >= 2 and not set(tasks.group_names) & set(held_out.group_names)
    both = [set(public_images.image_hashes(one.pixels).tolist()) for one in (tasks, held_out)]
    assert not both[0] & both[1] and len(both[0] | both[1]) == len(CLASSES) * PER_CLASS
    again = ImageConfig((source,)).tasks("held_out")
    assert again.group_names == held_out.group_names and torch.equal(again.pixels, held_out.pixels)
    told = tasks.describe()
    assert told["held_out_groups"] == held_out.num_classes and told["groups"] == 30  # classes of 100 in fives
    assert told["images_per_class"] == {f"films/{name}": PER_CLASS for name in CLASSES}


def test_a_group_holds_images_of_one_class_that_look_alike(tasks):
    for number, name in enumerate(tasks.group_names):
        mine = tasks._members[number]
        assert len(mine) >= public_images.FEWEST and name.startswith("films/")
    spread = torch.stack([tasks._looks[mine].var(0).sum() for mine in tasks._members]).mean()
    whole = torch.stack([
        tasks._looks[torch.cat([tasks._members[one] for one in relatives])].var(0).sum()
        for relatives in tasks._relatives
    ]).mean()  # fmt: skip
    assert spread < 0.7 * whole


def test_the_class_of_a_task_is_as_asked(tasks):
    """In no style: a task of a group holds images of this group only."""
    g = torch.Generator().manual_seed(0)
    for group in (0, tasks.num_classes - 1):
        rows = tasks._choose(200, g, group)
        assert set(rows.tolist()) <= set(tasks._members[group].tolist())


def test_all_kinds_of_tasks_are_drawn(tasks):
    """A group alone, several, and far more than one class: by the number of classes that a task touches."""
    owner = torch.empty(len(tasks.pixels), dtype=torch.long)
    kind = torch.empty(len(tasks.pixels), dtype=torch.long)
    for number, mine in enumerate(tasks._members):
        owner[mine], kind[mine] = number, tasks._relatives[number].min()
    g = torch.Generator().manual_seed(0)
    drawn = [tasks._choose(60, g, None) for _ in range(300)]
    groups = torch.tensor([len(owner[rows].unique()) for rows in drawn])
    classes = torch.tensor([len(kind[rows].unique()) for rows in drawn])
    assert 0.2 < (groups == 1).float().mean() < 0.45 and (classes == 1).float().mean() > 0.5
    assert (classes >= 4).any()


def test_images_are_mirrored_only_where_that_is_allowed(tmp_path):
    """All brighter on the left: a style moves and bends this, only a mirror turns it round."""
    rng = np.random.default_rng(0)
    levels = np.linspace(220, 20, 16)[None, None] + rng.normal(0, 12, (600, 16, 16))
    np.savez(tmp_path / "ramps.npz", images=levels.clip(0, 255).astype(np.uint8))
    for mirror in (False, True):
        source = ImageConfig((str(tmp_path / "ramps.npz"),), mirror=mirror).tasks()
        drawn = source.sample_tasks(60, 10, torch.Generator().manual_seed(0)).flatten(0, 1)
        turned = (drawn[..., :8].mean((1, 2, 3)) < drawn[..., 8:].mean((1, 2, 3))).float().mean()
        assert (0.2 < turned < 0.8) if mirror else turned == 0


def test_colour_folders_and_several_sources_are_read_together(tmp_path):
    levels, labels = pictures(channels=3, side=20)
    for number, label in enumerate(labels):
        place = tmp_path / "photos" / CLASSES[label]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(levels[number]).save(place / f"{number}.png")
    more, _ = pictures(classes=1, channels=3, side=20, seed=5)
    np.savez(tmp_path / "more.npz", images=more)
    config = settled(ImageConfig((str(tmp_path / "photos"), str(tmp_path / "more.npz"))))
    assert (config.size, config.channels) == (20, 3)
    tasks = config.tasks()
    assert tasks.sample_tasks(2, 3, torch.Generator()).shape == (2, 3, 3, 20, 20)
    assert set(tasks.describe()["images_per_class"]) == {*(f"photos/{name}" for name in CLASSES), "more"}
    grey = settled(dataclasses.replace(config, size=16, channels=1, sha256=""))
    assert grey.tasks().pixels.shape[1:] == (1, 16, 16)


def test_labels_without_names_say_here_which_classes_there_are(tmp_path):
    levels, labels = pictures()
    np.savez(tmp_path / "med.npz", train_images=levels, train_labels=labels[:, None])
    told = ImageConfig((str(tmp_path / "med.npz"),)).tasks().describe()
    assert set(told["images_per_class"]) == {f"med/{number}" for number in range(6)}


def test_copies_are_left_out_and_other_images_under_the_same_name_are_refused(tmp_path):
    levels, labels = pictures()
    path = tmp_path / "films.npz"
    np.savez(path, images=np.concatenate([levels, levels[:50]]))
    config = settled(ImageConfig((str(path),)))
    assert config.tasks().describe()["copies"] == 50 and config.tasks().describe()["images"] == 600
    np.savez(path, images=levels[:550])
    public_images._KEPT.clear()
    with pytest.raises(InputError, match="not those that the weights were trained on"):
        config.tasks()


# ---- errors before anything is trained -------------------------------------------------------------------


def test_what_cannot_be_trained_on_is_said_at_once(tmp_path):
    levels, labels = pictures()
    few, tiny, odd = (str(tmp_path / name) for name in ("few.npz", "tiny.npz", "odd.npz"))
    np.savez(few, images=np.concatenate([levels[:490], levels[:20]]))
    np.savez(tiny, images=levels, labels=np.arange(600) // 6, class_names=np.array([f"c{k}" for k in range(100)]))
    np.savez(odd, images=np.zeros((600, 18, 18), np.uint8))
    colour = archive(tmp_path / "colour.npz", channels=3)
    grey = archive(tmp_path / "grey.npz")
    (tmp_path / "mixed" / "a").mkdir(parents=True)
    Image.fromarray(levels[0]).save(tmp_path / "mixed" / "a" / "0.png")
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(tmp_path / "mixed" / "a" / "1.png")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "0.png").write_bytes(b"no image")
    for config, message in (
        (ImageConfig((few,)), r"490 different public images \(20 more are copies\) are too few: give 10 more"),
        (ImageConfig((tiny,)), "make 0 groups of 8 images or more, 8 are needed"),
        (ImageConfig((odd,)), "--size must be a multiple of 4"),
        (ImageConfig((grey,), size=12), "from 16 to 32"),
        (ImageConfig((grey,), size=68), "of 8 to 64"),
        (ImageConfig((grey,), channels=2), "--channels must be 1"),
        (ImageConfig((grey, colour)), "grey and colour .*give --channels 1 or 3"),
        (ImageConfig((str(tmp_path / "mixed"),)), "grey and colour images; give --channels"),
        (ImageConfig((grey, archive(tmp_path / "large.npz", side=20))), "differ in size.* --size"),
        (ImageConfig((str(tmp_path / "broken"),)), "cannot be read as an image"),
        (ImageConfig((str(tmp_path / "absent"),)), "'.*absent' are not there"),
        (ImageConfig(), "no public images"),
    ):
        with pytest.raises(InputError, match=message):
            train_on_images(config, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_wants_one_source_of_public_data(tmp_path, capsys):
    for words, message in (
        ([], "exactly one of --preset"),
        (["--preset", "glyphs", "--public", "x"], "exactly one of --preset"),
        (["--preset", "glyphs", "--minutes", "4"], "--minutes is for --public"),
        (["--preset", "glyphs", "--no-stretch"], "--no-stretch is for --public"),
        (["--public", str(tmp_path / "absent")], "are not there"),
        (["--public", "x", "--minutes", "0"], "--minutes must be a positive number"),
    ):
        assert cli.main(["train", *words, "--out", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ---- the time there is -----------------------------------------------------------------------------------

RATES = Rates({"features": 0.4, "codes": 0.4, "encoder": 1.0, "base": 0.6, "joint": 0.9}, 0.02, 2e-4, 1e-3)


@pytest.mark.parametrize("minutes", [10.0, 45.0, 180.0])
def test_the_minutes_are_shared_by_the_stages(minutes):
    preset = preset_for(ImageConfig(("x",), size=28, channels=1))
    made = plan(preset, RATES, minutes)
    total = sum(made.seconds.values())
    assert 0.97 * 60 * minutes < total <= 60 * minutes
    trained = {name: made.steps[name] * RATES.step[name] for name in image_training.SHARES}
    for name, share in image_training.SHARES.items():
        assert trained[name] / sum(trained.values()) == pytest.approx(share, abs=0.02)
    assert 64 <= made.pool_tasks <= preset.pool_tasks
    sized = image_training.sized(preset, made)
    assert sized.joint_stage.steps == made.steps["joint"] and sized.pool_tasks == made.pool_tasks


def test_too_few_minutes_say_how_many_are_needed():
    preset = preset_for(ImageConfig(("x",), size=28, channels=1))
    with pytest.raises(InputError, match="--minutes 1 are too few on this machine: ([0-9]+) are the least") as refused:
        plan(preset, RATES, 1.0)
    least = int(str(refused.value).split("machine: ")[1].split()[0])
    assert min(plan(preset, RATES, least).steps.values()) >= image_training.LEAST_STEPS
    assert plan(preset, RATES, None).steps["joint"] == preset.joint_stage.steps


def test_shares_add_up_and_patches_fit():
    assert sum(image_training.SHARES.values()) == pytest.approx(1.0)
    for size in (*range(16, 33, 4), *range(40, 65, 8)):
        base = preset_for(ImageConfig(("x",), size=size, channels=3)).base
        assert base.image_size % base.patch_size == 0 and (base.image_size // base.patch_size) ** 2 in (16, 64)


# ---- contrast --------------------------------------------------------------------------------------------


def test_contrast_is_stretched_image_by_image():
    levels, _ = pictures()
    images = data.to_model_range(levels[:40])
    together = data.stretched(images)
    alone = torch.cat([data.stretched(one[None]) for one in images])
    assert torch.equal(together, alone)  # no image sways another: sensitivity is what it was
    assert torch.equal(together, data.from_levels(data.to_levels(together)))
    assert (together.flatten(1).amin(1) == -1).all() and (together.flatten(1).amax(1) == 1).all()
    again = data.stretched(together)
    assert (again - together).abs().mean() < 0.02
    flat = torch.full((1, 1, 16, 16), -0.25)
    assert torch.allclose(data.stretched(flat), flat, atol=0.01)
    assert len(data.stretched(images[:0])) == 0


# ---- from images to weights ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(source, tmp_path_factory):
    """The whole command in miniature."""
    miniature = stages.PRESETS["drawings-miniature"]
    small = dataclasses.replace(
        miniature, joint_stage=stages.StageConfig(8, 8, 4, 1e-3, 0.9), feature_network="ownnet"
    )
    out = tmp_path_factory.mktemp("own")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_training, "PRESET", small)
        command = ["train", "--public", source, "--licence", "CC BY 4.0", "--out", str(out)]
        assert cli.main(command) == 0
        yield out, command


def test_one_command_makes_all_that_weights_hold(trained, source):
    out, _ = trained
    names = {file.relative_to(out / "weights").as_posix() for file in (out / "weights").rglob("*") if file.is_file()}
    assert names >= {
        "base/config.json", "encoder.safetensors", "hypernetwork.safetensors", "features.safetensors",
        "priors.safetensors", "cells.safetensors", "public_images.safetensors", "manifest.json", "README.md",
    }  # fmt: skip
    base_model, network = pretrained.load_pretrained(out)  # the training's folder will do
    assert isinstance(network, NestedHyperNetwork) and network.table and network.priors and network.centroids
    assert pretrained.geometry(out) == (16, 1) and pretrained.stretches(out)
    card = (out / "weights" / "README.md").read_text()
    told = "films.npz", "CC BY 4.0", "600 public images", "6 classes", "30 groups", "seed 0", "contrast stretched"
    assert [text for text in told if text not in card] == []
    assert "hyperdp train --public films.npz --licence 'CC BY 4.0'" in card and "white on black" not in card
    assert training.public_source(out) == settled(ImageConfig((source,), licence="CC BY 4.0"))


def test_running_again_resumes_and_other_settings_are_refused(trained, capsys):
    out, command = trained
    (out / "features.pt").unlink()  # stopped before this stage: it is taken again, no other is
    stamps = {path.name: path.stat().st_mtime_ns for path in out.glob("*.pt")}
    before = (out / "weights" / "hypernetwork.safetensors").read_bytes()
    assert cli.main(command) == 0
    now = {path.name: path.stat().st_mtime_ns for path in out.glob("*.pt")}
    assert now.pop("features.pt") and now == stamps
    assert (out / "weights" / "hypernetwork.safetensors").read_bytes() == before
    assert "in all: features" in capsys.readouterr().err
    for more in (["--mirror"], ["--minutes", "30"], ["--seed", "3"], ["--no-stretch"]):
        assert cli.main([*command, *more]) == 2
        assert "choose another --out" in capsys.readouterr().err


def test_the_weights_are_used_like_shipped_ones(trained, tmp_path, capsys):
    out, _ = trained
    private = tmp_path / "films_of_mine.npz"
    levels, _ = pictures(classes=2, per_class=40, seed=7)
    np.savez(private, images=levels)
    made = tmp_path / "release"
    weights = ["--weights", str(out)]
    asked = ["release", str(private), "--epsilon", "1", *weights, "--no-refine"]
    assert cli.main([*asked, "--public-size", "80", "--seed", "0", "--out", str(made)]) == 0
    assert "stretched each image's contrast" in capsys.readouterr().err
    assert cli.main(["verify", str(made)]) == 0
    drawn = tmp_path / "drawn.npz"
    assert cli.main(["sample", str(made), *weights, "--num-images", "6", "--num-steps", "2", "--out", str(drawn)]) == 0
    assert data.load_images(drawn, 16, 1).images.shape == (6, 1, 16, 16)


def test_private_images_that_are_public_are_counted(trained, source, tmp_path, capsys):
    out, _ = trained
    levels, _ = pictures()
    others, _ = pictures(seed=7)
    np.savez(tmp_path / "mine.npz", images=np.concatenate([others[:40], levels[:13]]))
    asked = ["release", str(tmp_path / "mine.npz"), "--epsilon", "1", "--weights", str(out), "--dry-run"]
    assert cli.main(asked) == 0
    assert "advice: 13 of these images are among the public ones" in capsys.readouterr().out
    np.savez(tmp_path / "mine.npz", images=others[:40])
    assert cli.main(asked) == 0 and "among the public" not in capsys.readouterr().out


def test_forecast_rehearses_on_held_out_groups(trained, capsys, monkeypatch):
    out, _ = trained
    assert tuning.held_out_tasks(out).group_names == training.public_source(out).tasks("held_out").group_names
    asked = ["forecast", "--num-private", "40", "--epsilon", "1", "--num-images", "128", "--weights", str(out)]
    assert cli.main([*asked, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert "held out from training" in told["about"] and told["frechet_distance"]["expected"] > 0
    monkeypatch.delenv("HYPERDP_DATA", raising=False)
    manifest = out / "weights" / "manifest.json"
    kept = manifest.read_text()
    manifest.write_text(kept.replace("films.npz", "gone.npz"))
    try:
        assert cli.main(asked) == 2
        assert "gone.npz' are not there" in capsys.readouterr().err
    finally:
        manifest.write_text(kept)


def test_compare_reads_private_images_as_the_weights_do(trained, tmp_path):
    out, _ = trained
    levels, _ = pictures(seed=7)
    np.savez(tmp_path / "mine.npz", images=levels)
    seen = {}
    for stretch in (True, False):
        train, _, _ = comparison.private_sets(tmp_path / "mine.npz", 16, 1, stretch)
        seen[stretch] = train.images
    assert torch.equal(data.stretched(seen[False]), seen[True]) and not torch.equal(seen[False], seen[True])
