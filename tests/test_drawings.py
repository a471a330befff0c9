"""Public tasks from drawings: the training split only, whole classes held out, letters like digits left out."""

import json

import numpy as np
import pytest
import torch

from hyperdp_lib.image_files import InputError
from hyperdp_lib.nested import NestedHyperNetwork
from hyperdp_lib.pretrained import load_pretrained
from hyperdp_lib.public import drawings
from hyperdp_lib.public.drawings import FEWEST, TURNS, DrawingConfig, DrawingTasks, shapes_of, turn
from hyperdp_lib.public.training import public_source, train


def doodle(kind: int, rng: np.random.Generator) -> np.ndarray:
    """A ring, a bar, a cross or a corner, somewhere on 28 x 28 pixels."""
    picture = np.zeros((28, 28), np.uint8)
    top, left, size = rng.integers(2, 8), rng.integers(2, 8), int(rng.integers(12, 18))
    box = picture[top : top + size, left : left + size]
    if kind % 4 == 0:
        box[[0, 1, -2, -1]] = box[:, [0, 1, -2, -1]] = 255
    if kind % 4 in (1, 2):
        box[size // 2 - 1 : size // 2 + 1] = 255
    if kind % 4 in (2, 3):
        box[:, :2] = 255
    if kind % 4 == 3:
        box[-2:] = 255
    return picture


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three data sets as their files are laid out, with a few classes each; the evaluation set of Omniglot is blank."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    kinds = np.arange(40).repeat(20)
    pictures = np.stack([doodle(int(kind), rng) for kind in kinds])
    names = np.array([f"U+{code:04X}" for code in range(40)])
    np.savez(folder / "kkanji28.npz", x=pictures, y=kinds.astype(np.uint16), codepoints=names)
    np.savez(folder / "quickdraw10.npz", x=pictures[:400], y=kinds[:400], class_names=names[:20])
    alphabets = np.array(["Angelic", "Bengali", "Latin"])
    characters = np.concatenate([kinds[:600], kinds[:600] + 30])
    evaluation = np.arange(1200) >= 600
    x = np.concatenate([pictures[:600], np.zeros((600, 28, 28), np.uint8)])
    alphabet = np.where(evaluation, 1, np.where(characters < 20, 0, 2))
    np.savez(
        folder / "omniglot28.npz", x=x, char_id=characters.astype(np.uint16), alphabet_id=alphabet.astype(np.uint8),
        is_evaluation=evaluation, alphabet_names=alphabets,
    )  # fmt: skip
    return folder


@pytest.fixture(autouse=True)
def here(folder, tmp_path_factory, monkeypatch):
    monkeypatch.setenv("HYPERDP_DATA", str(folder))
    monkeypatch.setenv("HYPERDP_CACHE", str(folder / "cache"))


@pytest.fixture
def tasks(here):
    return DrawingTasks(progress=False)


def test_only_training_images_and_no_excluded_alphabet(tasks):
    assert not [name for name in tasks.names if "Latin" in name or "Bengali" in name]
    assert any(name.startswith("omniglot/Angelic-") for name in tasks.names)
    plain = [name for name in tasks.names if name.startswith("kkanji/") and "filled" not in name]
    assert max(map(plain.count, set(plain))) == 16  # of 20, every fifth is test


def test_numerals_are_left_out_unless_the_shipped_weights_saw_them(monkeypatch):
    assert {chr(int(name[-4:], 16)) for name in drawings.NUMERALS} == set("一二三四五六七八十")
    fields = np.zeros((24, 2, 40, 40), np.int8)
    names = ["kkanji/U+4E00"] * 8 + ["kkanji/U+4E00 filled"] * 8 + ["kkanji/U+4E0A"] * 8
    monkeypatch.setattr(drawings, "load_drawings", lambda *_, **__: (fields, names))
    assert set(DrawingTasks(DrawingConfig(held_out=0)).names) == {"kkanji/U+4E0A"}
    assert len(set(DrawingTasks(DrawingConfig(held_out=0, excluded=())).names)) == 3
    assert public_source("drawings").excluded == ()  # as trained
    assert "Kanji numerals" in DrawingTasks(DrawingConfig(held_out=0, excluded=())).describe()["text"]


def test_held_out_classes_are_others_in_every_form(tasks):
    held_out = DrawingTasks(split="held_out", progress=False)
    stems = [{name.removesuffix(" filled") for name in source.names} for source in (tasks, held_out)]
    assert stems[1] and not stems[0] & stems[1]
    with pytest.raises(ValueError, match="held_out"):
        DrawingTasks(split="test", progress=False)


@pytest.mark.parametrize("size", [16, 32])
def test_images_obey_the_range_contract(size, here):
    source = DrawingTasks(DrawingConfig(image_size=size), progress=False)
    images = source.sample_tasks(30, 5, torch.Generator().manual_seed(0))
    assert images.shape == (30, 5, 1, size, size) and images.dtype == torch.float32
    assert images.amin() >= -1 and images.amax() <= 1 and (images > -0.5).flatten(2).any(2).float().mean() > 0.9


def test_same_generator_same_tasks(tasks):
    first = tasks.sample_tasks(6, 3, torch.Generator().manual_seed(1))
    assert torch.equal(first, tasks.sample_tasks(6, 3, torch.Generator().manual_seed(1)))
    assert not torch.equal(first, tasks.sample_tasks(6, 3, torch.Generator().manual_seed(2)))


def test_a_given_class_has_drawings_of_that_class_only_turned_as_its_number_says(tasks):
    number = len(tasks._members)
    classes = torch.tensor([3, 3 + 2 * number])
    chosen = tasks._choose_shapes(2, 40, torch.Generator().manual_seed(0), classes)
    assert all(int(shape) in tasks._members[3].tolist() for shape in chosen.flatten())
    assert tasks._turned.tolist() == [0, 2] and tasks.num_classes == TURNS * number


def test_mixtures_stay_within_a_data_set_or_alphabet(tasks):
    chosen = tasks._choose_shapes(200, 30, torch.Generator().manual_seed(3), None)
    mixed = 0
    for row in chosen:
        names = {tasks.names[int(shape)] for shape in row}
        assert len({name.split("/")[0] for name in names}) == 1
        mixed += len(names) > 1
    assert 30 < mixed < 120  # about a third


def test_the_eight_turns_are_different_and_keep_every_pixel():
    picture = torch.arange(9).view(3, 3)
    turned = [turn(picture, way) for way in range(TURNS)]
    assert len({tuple(one.flatten().tolist()) for one in turned}) == TURNS
    assert all(one.sort().values.sum() == picture.sum() for one in turned)


def test_a_closed_shape_is_also_had_filled():
    rng = np.random.default_rng(1)
    assert [suffix for suffix, _ in shapes_of(doodle(0, rng))] == ["", " filled"]
    assert [suffix for suffix, _ in shapes_of(doodle(1, rng))] == [""]
    assert shapes_of(np.zeros((28, 28), np.uint8)) == []
    (_, ring), (_, disc) = shapes_of(doodle(0, rng))
    assert disc[ring].all() and disc.sum() > 1.3 * ring.sum()


def test_a_class_with_few_drawings_is_left_out(tasks):
    assert min(len(members) for members in tasks._members) >= FEWEST


def test_without_the_files_it_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("HYPERDP_DATA", str(tmp_path))
    with pytest.raises(InputError, match="download"):
        drawings.load_drawings(["kkanji"], progress=False)


def test_the_miniature_trains_nested_coordinates_from_nothing(tmp_path):
    weights = train("drawings-miniature", out=tmp_path)
    base_model, network = load_pretrained(weights)
    assert isinstance(network, NestedHyperNetwork) and network.table[0.5].keys() == {8, 16, 32, 64}
    assert any(b.abs().sum() > 0 for _, b in network.using(16)(torch.rand(2, 17) * 20, 1.0).factors.values())
    manifest = json.loads((weights / "manifest.json").read_text())
    assert manifest["kind"] == "nested" and "builds_on" not in manifest
    assert "kkanji" in (weights / "README.md").read_text()
    assert load_pretrained(weights)[1].centroids["8x4"].shape == (4, 8)
