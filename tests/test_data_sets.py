"""Named data sets: their layouts, splits and names; the real files where HYPERDP_DATA has them."""

import os
from pathlib import Path

import numpy as np
import prepare
import pytest

from hyperdp_lib.data import NAMED_DATA_SETS, InputError, load_named_or_path
from hyperdp_lib.data_sets import DATA_SETS, is_test, read

REAL = os.environ.get("HYPERDP_DATA", "")
PRESENT = [name for name, one in DATA_SETS.items() if REAL and (Path(REAL) / one.file).is_file()]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HYPERDP_DATA", str(tmp_path))
    return tmp_path


def jpeg_file(path, count=3, part="val"):
    """`part` and train, each of `count` flat grey images 0, 60, 120, ..."""
    images = np.arange(count, dtype=np.uint8)[:, None, None, None] * np.full((1, 32, 32, 3), 60, np.uint8)
    labels = (np.arange(count) % 2).astype(np.uint8)
    arrays = prepare.as_jpegs({"train": images, part: images})
    arrays |= {"train_y": labels, f"{part}_y": labels, "class_names": np.array(["ant, emmet", "bee"])}
    np.savez(path, **arrays)
    return images, arrays


@pytest.mark.parametrize("name", ["cifar10-jpeg", "tiny-imagenet-32-jpeg"])
def test_jpeg_copies_are_read_in_colour_with_a_caveat(name, folder):
    images, _ = jpeg_file(folder / DATA_SETS[name].file, part="val" if "tiny" in name else "test")
    for part in ("", "-test"):
        loaded = load_named_or_path(name + part, 32, 3)
        assert loaded.images.shape == (3, 3, 32, 32) and loaded.labels.tolist() == [0, 1, 0]
        levels = (loaded.images.mean((1, 2, 3)) + 1) * 127.5
        np.testing.assert_allclose(levels, images.mean((1, 2, 3)), atol=2)
        assert any("JPEG" in note and "not with published numbers" in note for note in loaded.notes)
        assert loaded.class_names == ("ant, emmet", "bee")
    grey = load_named_or_path(name, 16, 1, labelled=False)
    assert grey.images.shape == (3, 1, 16, 16) and grey.labels is None


def test_the_lossless_set_never_gives_way_to_the_lossy_one(folder):
    jpeg_file(folder / "cifar10_jpeg.npz", part="test")
    with pytest.raises(InputError, match="cifar10.npz.*or use 'cifar10-jpeg'"):
        load_named_or_path("cifar10", 32, 3)


def damaged(folder, case):
    path = folder / "tiny_imagenet32_jpeg.npz"
    _, arrays = jpeg_file(path)
    if case == "cut image":
        arrays["train_off"] = arrays["train_off"] // 2
    elif case == "other size":
        large = prepare.Image.fromarray(np.zeros((64, 64, 3), np.uint8))
        file = prepare.io.BytesIO()
        large.save(file, "JPEG")
        content = np.frombuffer(file.getvalue(), np.uint8)
        arrays |= {"header": content[:0], "train_bytes": content, "train_off": np.array([0, len(content)])}
    elif case == "label":
        arrays["train_y"] = arrays["train_y"] + np.uint8(1)
    elif case == "missing":
        del arrays["header"]
    np.savez(path, **arrays)


@pytest.mark.parametrize("case", ["cut image", "other size", "label", "missing"])
def test_damaged_files_are_refused_in_one_line(case, folder):
    damaged(folder, case)
    with pytest.raises(InputError, match="make (it|the file) again") as caught:
        load_named_or_path("tiny-imagenet-32-jpeg", 32, 3)
    assert "\n" not in str(caught.value)


def test_one_part_sets_are_split_by_a_fixed_rule(folder):
    labels = np.array([1] * 10 + [0] * 7, np.uint16)
    images = np.arange(17, dtype=np.uint8)[:, None, None].repeat(28, 1).repeat(28, 2)
    np.savez(folder / "kkanji28.npz", x=images, y=labels, codepoints=np.array(["U+4E00", "U+4E03"]))
    train, test = read("kkanji", "train"), read("kkanji", "test")
    assert test.images[:, 0, 0, 0].tolist() == [4, 9, 14] and test.labels.tolist() == [1, 1, 0]
    both = np.concatenate([train.images, test.images])[:, 0, 0, 0]
    assert sorted(both) == list(range(17))
    assert is_test(labels).sum() == 3


def test_every_name_has_a_test_split():
    assert {"kkanji-test", "cifar10-jpeg-test", "tiny-imagenet-32", "omniglot"} <= set(NAMED_DATA_SETS)


@pytest.mark.parametrize("name", PRESENT)
def test_real_files_are_complete(name):
    """Counts, sizes, and names that a release may use for folders."""
    data_set = DATA_SETS[name]
    for split, count in zip(("train", "test"), data_set.counts, strict=True):
        if "jpeg" in name and split == "train":
            continue  # decoding takes long, and the test split goes the same way
        stored = read(name, split, REAL)
        assert stored.images.shape == (count, data_set.side, data_set.side, data_set.channels)
        assert set(np.unique(stored.labels)) == set(range(len(stored.class_names)))
        assert len(set(stored.class_names)) == len(stored.class_names)
        assert not any({"/", "\\"} & set(name) or name.startswith(".") for name in stored.class_names)
