"""Public tasks from photographs: the training split only, nothing of CIFAR-10's classes, three channels all the way."""

import dataclasses
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hyperdp_lib import data, embedding
from hyperdp_lib.data import ImageSet, InputError
from hyperdp_lib.experiments import comparison
from hyperdp_lib.hypernetwork import HyperNetwork
from hyperdp_lib.nested import NestedHyperNetwork
from hyperdp_lib.pretrained import load_pretrained
from hyperdp_lib.public import photographs, training
from hyperdp_lib.public.photographs import COLOURS, DUPLICATES, OVERLAPPING, PhotographConfig, PhotographTasks, overlaps
from hyperdp_lib.public.stages import PRESETS, StageConfig
from hyperdp_lib.public.training import train

NAMES = ("goose", "lion, king of beasts", *(f"thing {number}, whatsit" for number in range(40)))
PER_CLASS = 20


def jpegs(pictures):
    """Header, the rest of all files end to end, and where each begins."""
    files = []
    for picture in pictures:
        with io.BytesIO() as file:
            Image.fromarray(picture).save(file, "JPEG", quality=75, subsampling=2)
            files.append(file.getvalue())
    header = files[0][:600]
    assert all(one.startswith(header) for one in files)
    rest = [one[600:] for one in files]
    offsets = np.cumsum([0, *map(len, rest)]).astype(np.int32)
    return header, b"".join(rest), offsets


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tiny-ImageNet as its file is laid out: each class has a colour of its own; the validation images are white."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    labels = np.arange(len(NAMES)).repeat(PER_CLASS)
    colours = rng.integers(20, 200, (len(NAMES), 1, 1, 3))
    levels = colours[labels] + rng.integers(-20, 20, (len(labels), 32, 32, 3))
    pictures = [*levels.astype(np.uint8), *np.full((4, 32, 32, 3), 255, np.uint8)]
    header, content, offsets = jpegs(pictures)
    train = int(offsets[len(labels)])
    header, content = (np.frombuffer(part, np.uint8) for part in (header, content))
    np.savez(
        folder / "tiny_imagenet32_jpeg.npz", header=header, class_names=np.array(NAMES),
        train_bytes=content[:train], train_off=offsets[: len(labels) + 1], train_y=labels.astype(np.uint8),
        val_bytes=content[train:], val_off=offsets[len(labels) :] - train, val_y=np.arange(4, dtype=np.uint8),
    )  # fmt: skip
    return folder


@pytest.fixture(autouse=True)
def here(folder, monkeypatch):
    monkeypatch.setenv("HYPERDP_DATA", str(folder))


@pytest.fixture
def tasks(here):
    return PhotographTasks()


def stems(source):
    return {name.split("/", 1)[1] for name in source.class_names}


def test_classes_of_cifar10_are_left_out_unless_asked_for(tasks, here):
    both = [PhotographTasks(PhotographConfig(overlap=True), split) for split in ("train", "held_out")]
    everything = stems(both[0]) | stems(both[1])
    assert {"goose", "lion, king of beasts"} <= everything == set(NAMES)
    kept = stems(tasks) | stems(PhotographTasks(split="held_out"))
    assert kept == {name for name in NAMES if name.startswith("thing")}
    assert tasks.describe()["excluded"] and not both[0].describe()["excluded"]


def test_every_excluded_class_is_one_of_cifar10s_and_none_is_named_twice():
    assert set(OVERLAPPING) <= {
        "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"
    }  # fmt: skip
    names = [name for group in OVERLAPPING.values() for name in group]
    assert len(names) == len(set(names)) == 30 and all(map(overlaps, names))
    assert not any(map(overlaps, ("teapot", "goldfish, Carassius auratus", "lionfish", "gooseberry")))


def test_pictures_that_cifar10_has_are_left_out(monkeypatch, folder):
    """The list is the record's; a row of it is taken from the training split."""
    results = Path(__file__).parents[1] / "book" / "results"
    record = json.loads((results / "duplicates" / "tinyimagenet-cifar10.json").read_text())
    assert DUPLICATES == tuple(sorted({public for _, public in record["suspects"] if public < 100_000}))
    whole = photographs.load_photographs(("tiny-imagenet-32-jpeg",), str(folder))[0]
    photographs.load_photographs.cache_clear()
    monkeypatch.setattr(photographs, "DUPLICATES", (3, 5, 10**6))
    less = photographs.load_photographs(("tiny-imagenet-32-jpeg",), str(folder))[0]
    photographs.load_photographs.cache_clear()
    assert len(whole) - len(less) == 2 and torch.equal(less[:5], whole[[0, 1, 2, 4, 6]])


def test_held_out_classes_are_others(tasks):
    held_out = PhotographTasks(split="held_out")
    assert stems(held_out) and not stems(tasks) & stems(held_out)
    with pytest.raises(ValueError, match="held_out"):
        PhotographTasks(split="test")
    assert tasks.pixels.float().mean((1, 2, 3)).max() < 250  # no validation image: those are white


@pytest.mark.parametrize("size", [16, 32])
def test_images_obey_the_range_contract(size, here):
    images = PhotographTasks(PhotographConfig(image_size=size)).sample_tasks(30, 5, torch.Generator().manual_seed(0))
    assert images.shape == (30, 5, 3, size, size) and images.dtype == torch.float32
    assert images.amin() >= -1 and images.amax() <= 1
    with pytest.raises(InputError, match="16 or 32"):
        PhotographTasks(PhotographConfig(image_size=20))


def test_photographs_are_shrunk_as_private_ones_are(tasks):
    row = data.load_named_or_path("tiny-imagenet-32-jpeg", 16, 3)
    first = row.class_names.index(tasks.class_names[0].split("/", 1)[1])
    assert torch.equal(row.images[row.labels == first], data.from_levels(tasks._small[:PER_CLASS]))


def test_same_generator_same_tasks(tasks):
    first = tasks.sample_tasks(6, 3, torch.Generator().manual_seed(1))
    assert torch.equal(first, tasks.sample_tasks(6, 3, torch.Generator().manual_seed(1)))
    assert not torch.equal(first, tasks.sample_tasks(6, 3, torch.Generator().manual_seed(2)))


def test_a_given_class_has_photographs_of_that_class_only_coloured_as_its_number_says(tasks):
    count = len(tasks._members)
    assert tasks.num_classes == COLOURS * count
    rows, colours = tasks._choose(2, 40, torch.Generator().manual_seed(0), torch.tensor([3, 3 + 2 * count]))
    assert set(rows.flatten().tolist()) <= set(tasks._members[3].tolist()) and colours.tolist() == [0, 2]
    grey = tasks.sample_tasks(1, 8, torch.Generator().manual_seed(4), classes=torch.tensor([3 + count]))
    spread = (grey - grey.mean(2, keepdim=True)).flatten(3).std(-1)  # a cast may remain, of the whole image
    assert spread.max() < 1e-5
    pictures = [tasks._dress(tasks._members[3][:4], way, torch.Generator().manual_seed(3)) for way in (0, 2)]
    assert not torch.equal(*pictures)


def test_there_are_tasks_of_all_kinds_and_more_than_five_thousand(tasks):
    rows, _ = tasks._choose(300, 8, torch.Generator().manual_seed(3), None)
    owner = torch.empty(len(tasks.pixels), dtype=torch.long)
    for number, members in enumerate(tasks._members):
        owner[members] = number
    classes = torch.tensor([len(set(owner[row].tolist())) for row in rows])
    assert 150 < (classes == 1).sum() < 240 and (classes >= 6).sum() > 5  # two thirds hold one class
    assert len({tuple(row.sort().values.tolist()) for row in rows}) == 300
    whole, _ = tasks._choose(20, 8, torch.Generator().manual_seed(3), torch.arange(20))
    assert all(len(set(row.tolist())) == 8 for row in whole)  # none twice while there are others
    told = tasks.describe()
    assert told["look_alikes"] == len(tasks.pixels)
    assert told["unions_of_two"] == told["classes"] * (told["classes"] - 1) / 2


def test_without_the_file_it_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("HYPERDP_DATA", str(tmp_path))
    with pytest.raises(InputError, match="download"):
        PhotographTasks()
    with pytest.raises(InputError, match="colour"):
        PhotographTasks(PhotographConfig(data_sets=("mnist",)))


def test_the_presets_differ_as_said():
    small, overlap, large = (PRESETS[name] for name in ("photographs", "photographs-overlap", "photographs-32"))
    assert dataclasses.replace(overlap, public_data=small.public_data) == small and overlap.public_data.overlap
    drawn = PRESETS["drawings-32"]
    assert dataclasses.replace(drawn, **{name: getattr(large, name) for name in ("public_data", "encoder", "base")},
                               feature_network="photonet") == large  # fmt: skip
    assert drawn.public_data.image_size == drawn.base.image_size == 32 and drawn.base.channels == 1
    for preset in (small, overlap, large, PRESETS["photographs-miniature"]):
        sides = {preset.public_data.image_size, preset.encoder.image_size, preset.base.image_size}
        assert len(sides) == 1 and preset.encoder.channels == preset.base.channels == 3 and preset.nested


def test_the_large_preset_builds_and_takes_a_step_of_every_stage(tmp_path, here):
    tiny = StageConfig(1, 2, 4, 1e-3, 0.9)
    stages = {f"{stage}_stage": tiny for stage in ("features", "encoder", "base", "joint", "codes")}
    preset = dataclasses.replace(
        PRESETS["photographs-32"], **stages, feature_classes=16, pool_tasks=4, pool_images=12, fresh_tasks=2
    )
    source = preset.public_data.tasks()
    encoder = training.train_encoder(preset, source, tmp_path, "cpu")
    base = training.train_base(preset, source, tmp_path, "cpu")
    assert training.train_features(preset, source, tmp_path, "cpu").image_size == 32
    network = HyperNetwork(encoder, base, preset.hypernetwork)
    base, network = training.train_joint(
        preset, source, preset.public_data.tasks("held_out"), base, network, tmp_path, "cpu"
    )
    assert sum(p.numel() for p in base.parameters()) > 5e6 and network.encoder.config.image_size == 32


def test_the_miniature_trains_from_nothing_and_is_compared_in_colour(tmp_path):
    weights = train("photographs-miniature", out=tmp_path / "training")
    base_model, network = load_pretrained(weights)
    assert isinstance(network, NestedHyperNetwork) and base_model.config.in_channels == 3
    card = (weights / "README.md").read_text()
    assert "16 x 16 colour images" in card and "grey" not in card.split("| stage")[0].replace("three colourings", "")
    generator = torch.Generator().manual_seed(0)
    private = [ImageSet(torch.rand(140, 3, 16, 16, generator=generator) * 2 - 1) for _ in range(2)]
    settings = comparison.Settings(num_images=130, sampling_steps=1, bank_tasks=20, bank_images=8)
    paths = comparison.compare(
        tuple(private), methods=["dp_deepsets", "nearest_public"], epsilons=[1.0], seeds=[0], exact=True,
        num_private=128, hypernetwork=str(weights), settings=settings, out=tmp_path / "records", pair="photographs-a",
    )  # fmt: skip
    records = [json.loads(path.read_text()) for path in paths]
    (features,) = {record["scores"]["features"] for record in records}
    assert re.fullmatch("photonet-[0-9a-f]{8}", features)  # not those of the shipped weights
    with Image.open(paths[0].with_suffix(".png")) as sheet:
        assert sheet.mode == "RGB"
    with pytest.raises(InputError, match="scored in the features photonet"):
        comparison.compare(
            tuple(private), methods=["dp_deepsets"], epsilons=[1.0], seeds=[0], exact=True, num_private=128,
            hypernetwork=str(weights), settings=settings, out=tmp_path / "records", pair="photographs-a",
            feature_network=embedding.FeatureNetwork(3, name="another"),
        )  # fmt: skip
