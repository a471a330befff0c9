"""From originals to `.npz`: miniatures in the true formats, and the true ones rebuilt where HYPERDP_DATA has them."""

import hashlib
import os
from pathlib import Path

import check_duplicates
import download
import miniature_originals as miniature
import numpy as np
import prepare
import pytest
import reference_stats
from PIL import Image

from hyperdp_lib import data, data_sets
from hyperdp_lib.public.originals import ORIGINALS

REAL = Path(os.environ.get("HYPERDP_DATA", ""))
needs_real_data = pytest.mark.skipif(
    not (REAL / "mnist.npz").is_file() or REAL == Path(), reason="HYPERDP_DATA has no mnist.npz"
)
# MD5 of the unpacked originals: images and labels of train, then of test
UNPACKED_MD5 = {
    "mnist": ("6bbc9ace898e44ae57da46a324031adb", "a25bea736e30d166cdddb491f175f624",
              "2646ac647ad5339dbf082846283269ea", "27ae3e4e09519cfbb04c329615203637"),
    "fashion-mnist": ("f4a8712d7a061bf5bd6d2ca38dc4d50a", None, "8181f5470baa50b63fa0f6fddb340f0a", None),
}  # fmt: skip
SPLIT_ARRAYS = ("train_x", "train_y", "test_x", "test_y")


@pytest.fixture
def dest(tmp_path, monkeypatch):
    (tmp_path / "originals").mkdir()
    monkeypatch.setenv("HYPERDP_DATA", str(tmp_path))
    return tmp_path


def halved(pixels, side):
    return np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.BOX))


def run(name, dest):
    assert prepare.main([name, "--dest", str(dest)]) == 0


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_idx_files_become_arrays_unchanged(name, dest):
    shapes = ((4, 28, 28), (4,), (2, 28, 28), (2,))
    arrays = [miniature.RANDOM.integers(0, 10, shape, dtype=np.uint8) for shape in shapes]
    miniature.idx_files(dest / "originals", name, arrays)
    run(name, dest)
    for split, (images, labels) in (("train", arrays[:2]), ("test", arrays[2:])):
        stored = data_sets.read(name, split)
        np.testing.assert_array_equal(stored.images[..., 0], images)
        np.testing.assert_array_equal(stored.labels, labels)


def test_omniglot_is_inverted_averaged_and_ordered(dest):
    drawn = miniature.omniglot(dest / "originals")
    run("omniglot", dest)
    train, test = (data_sets.read("omniglot", split) for split in ("train", "test"))
    assert train.class_names == ("Angelic-01", "Angelic-02", "Greek-01", "Greek-02")
    assert test.class_names == ("Bengali-01", "Bengali-02")
    assert train.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3] and test.labels.tolist() == [0, 0, 1, 1]
    expected = halved(255 - drawn["Greek", "character02", 1], 28)
    np.testing.assert_array_equal(train.images[6, ..., 0], expected)  # drawer 1 before drawer 2
    assert train.images.mean() < 64  # white strokes on black


def test_kkanji_takes_frequent_characters_and_their_first_images(dest, monkeypatch):
    monkeypatch.setattr(prepare, "KKANJI_LEAST", 6)
    monkeypatch.setattr(prepare, "KKANJI_MOST", 10)
    # by text U+10000 would come before U+4E00; by code point it comes after
    drawn = miniature.kkanji(dest / "originals", {"U+10000": 6, "U+4E03": 5, "U+4E00": 12})
    run("kkanji", dest)
    train, test = (data_sets.read("kkanji", split) for split in ("train", "test"))
    assert train.class_names == ("U+4E00", "U+10000")
    assert np.bincount(train.labels).tolist() == [8, 5] and np.bincount(test.labels).tolist() == [2, 1]
    first = [halved(pixels, 28) for pixels in drawn["U+4E00"].values()]
    np.testing.assert_array_equal(train.images[:4, ..., 0], first[:4])
    np.testing.assert_array_equal(test.images[:2, ..., 0], [first[4], first[9]])


def test_quickdraw_takes_prefixes(dest):
    rows = miniature.quickdraw(dest / "originals")
    run("quickdraw", dest)
    with np.load(dest / "quickdraw10.npz") as stored:
        assert np.bincount(stored["y"]).tolist() == [len(one) - 1 for one in rows.values()]
        np.testing.assert_array_equal(stored["x"][-1].ravel(), rows["train"][-2])
    assert len(data_sets.read("quickdraw", "test").images) == data_sets.DATA_SETS["quickdraw"].counts[1]


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_has_colour_last_and_the_fine_label(name, dest):
    images = miniature.RANDOM.integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    miniature.cifar(dest / "originals", name, images, np.array([0, 1, 1], np.uint8))
    run(name, dest)
    train = data_sets.read(name, "train")
    np.testing.assert_array_equal(train.images[-3:], images)
    assert train.labels[-3:].tolist() == [0, 1, 1]
    assert train.class_names == (("airplane", "automobile") if name == "cifar10" else ("apple", "aquarium_fish"))
    loaded = data.load_named_or_path(f"{name}-test", 32, 3)
    assert loaded.images.shape == (3, 3, 32, 32)
    np.testing.assert_array_equal(data.to_uint8(loaded.images), images)


def test_tiny_imagenet_is_halved_and_kept_with_and_without_loss(dest):
    drawn = miniature.tiny_imagenet(dest / "originals")
    run("tiny-imagenet-32", dest)
    train, test = (data_sets.read("tiny-imagenet-32", split) for split in ("train", "test"))
    assert train.class_names == ("goldfish, Carassius auratus", "orange")  # in the order of wnids
    assert train.labels.tolist() == [0, 0, 1, 1] and test.labels.tolist() == [0, 1]
    order = [("n01", 2), ("n01", 10), ("n02", 2), ("n02", 10)]
    np.testing.assert_array_equal(train.images, [halved(drawn["train", *key], 32) for key in order])
    np.testing.assert_array_equal(test.images[0], halved(drawn["val", "n01", 1], 32))
    lossy = data_sets.read("tiny-imagenet-32-jpeg", "train")
    assert lossy.class_names == train.class_names and (lossy.labels == train.labels).all()
    difference = lossy.images.mean((1, 2, 3)) - train.images.mean((1, 2, 3))
    assert 0 < np.abs(difference).max() < 3


def test_prepare_keeps_what_is_there(dest, capsys):
    images = miniature.RANDOM.integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)
    miniature.cifar(dest / "originals", "cifar10", images, np.array([0], np.uint8))
    run("cifar10", dest)
    assert "NOT the 60000 EXPECTED" in capsys.readouterr().out  # a miniature is not the data set
    before = (dest / "cifar10.npz").stat().st_mtime_ns
    run("cifar10", dest)
    assert (dest / "cifar10.npz").stat().st_mtime_ns == before and "kept" in capsys.readouterr().out
    assert prepare.main(["cifar10", "--dest", str(dest), "--overwrite"]) == 0
    assert (dest / "cifar10.npz").stat().st_mtime_ns != before


def damaged(dest, case):
    """Originals that must be refused."""
    folder = dest / "originals"
    if case == "missing":
        return "mnist"
    if case == "cut IDX":
        arrays = [np.zeros((2, 28, 28), np.uint8), np.zeros(2, np.uint8)] * 2
        miniature.idx_files(folder, "mnist", arrays)
        cut = miniature.gzip.compress(miniature.idx(arrays[0])[:-1])
        (folder / ORIGINALS["mnist"][0].file).write_bytes(cut)
        return "mnist"
    if case == "not gzip":
        for original in ORIGINALS["mnist"]:
            (folder / original.file).write_bytes(b"<html>moved</html>")
        return "mnist"
    if case == "pickled npy":
        miniature.quickdraw(folder)
        np.save(folder / "quickdraw-apple.npy", np.array([{}], dtype=object), allow_pickle=True)
        return "quickdraw"
    if case == "wrong members":
        miniature.tar_file(folder / ORIGINALS["cifar10"][0].file, {"cifar-10-batches-py/data_batch_1": b"x"}, "w:gz")
        return "cifar10"
    (folder / "tiny-imagenet-200.zip").write_bytes(b"PK no zip")
    return "tiny-imagenet-32"


@pytest.mark.parametrize("case", ["missing", "cut IDX", "not gzip", "pickled npy", "wrong members", "not zip"])
def test_damaged_originals_are_refused_in_one_line(case, dest, capsys):
    name = damaged(dest, case)
    assert prepare.main([name, "--dest", str(dest)]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "download" in line
    assert [path.name for path in dest.iterdir()] == ["originals"]  # nothing written


@pytest.mark.parametrize("script", [download, prepare, reference_stats, check_duplicates])
def test_wrong_options_are_one_line_and_exit_code_2(script, capsys):
    assert script.main(["--bogus"]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and line.startswith(f"{script.__name__}.py: ") and "--help" in line


def test_members_that_lead_elsewhere_are_never_written(dest):
    """Archives are read in memory, so a member called ../evil.png leaves no file, wherever it points."""
    folder = dest / "originals"
    miniature.omniglot(folder)
    miniature.kkanji(folder, {"U+4E00": 200, "../../U+4E01": 1, "/tmp/U+4E02": 1})
    before = {path for path in dest.parent.rglob("*")}
    run("kkanji", dest)
    assert {path for path in dest.parent.rglob("*")} - before == {dest / "kkanji28.npz"}


@needs_real_data
@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_the_true_originals_give_the_true_arrays(name, tmp_path):
    """The arrays are written as IDX, which has the published checksum, and prepared again."""
    (tmp_path / "originals").mkdir()
    with np.load(REAL / data_sets.DATA_SETS[name].file) as stored:
        arrays = [stored[key] for key in SPLIT_ARRAYS]
    for array, md5 in zip(arrays, UNPACKED_MD5[name], strict=True):
        assert md5 in (None, hashlib.md5(miniature.idx(array)).hexdigest())
    train = {image.tobytes() for image in arrays[0]}
    assert len(train) == len(arrays[0]) and not train & {image.tobytes() for image in arrays[2]}
    miniature.idx_files(tmp_path / "originals", name, arrays)
    run(name, tmp_path)
    with np.load(tmp_path / data_sets.DATA_SETS[name].file) as made:
        for key, array in zip(SPLIT_ARRAYS, arrays, strict=True):
            np.testing.assert_array_equal(made[key], array)


@needs_real_data
def test_our_jpegs_have_the_header_of_the_real_copies():
    images = miniature.RANDOM.integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    ours = prepare.as_jpegs({"train": images})["header"]
    for file in ("cifar10_jpeg.npz", "tiny_imagenet32_jpeg.npz"):
        with np.load(REAL / file) as stored:
            np.testing.assert_array_equal(ours, stored["header"])


def rebuilt_omniglot(folder, stored):
    """Archives of the real images, already averaged, which averaging leaves as they are."""
    names, first = stored["alphabet_names"], {}
    for character, alphabet in zip(stored["char_id"], stored["alphabet_id"], strict=True):
        first.setdefault(alphabet, character)
    members = {False: {}, True: {}}
    for i in miniature.RANDOM.permutation(len(stored["x"])):
        alphabet, drawer = stored["alphabet_id"][i], stored["drawer"][i]
        character = stored["char_id"][i] - first[alphabet] + 1
        path = f"images/{names[alphabet]}/character{character:02}/{i % 1000:04}_{drawer:02}.png"
        members[bool(stored["is_evaluation"][i])][path] = miniature.image(255 - stored["x"][i])
    for original, content in zip(ORIGINALS["omniglot"], members.values(), strict=True):
        miniature.zip_file(folder / original.file, content)


def rebuilt_kkanji(folder, stored):
    members = {
        f"kkanji2/{stored['codepoints'][stored['y'][i]]}/{i:06}.png": miniature.image(stored["x"][i])
        for i in miniature.RANDOM.permutation(len(stored["x"]))
    }
    miniature.tar_file(folder / "kkanji.tar", members)


def rebuilt_quickdraw(folder, stored):
    for label, name in enumerate(stored["class_names"]):
        np.save(folder / f"quickdraw-{name}.npy", stored["x"][stored["y"] == label].reshape(-1, 784))


@pytest.mark.slow
@needs_real_data
@pytest.mark.parametrize(
    ("name", "rebuild"),
    [("omniglot", rebuilt_omniglot), ("kkanji", rebuilt_kkanji), ("quickdraw", rebuilt_quickdraw)],
)
def test_the_real_arrays_come_back_from_archives_of_them(name, rebuild, tmp_path):
    """Order, numbering and types are those of the real files; only the averaging cannot be told from these."""
    (tmp_path / "originals").mkdir()
    file = data_sets.DATA_SETS[name].file
    with np.load(REAL / file) as archive:
        stored = {key: archive[key] for key in archive.files}
    rebuild(tmp_path / "originals", stored)
    run(name, tmp_path)
    with np.load(tmp_path / file) as made:
        assert set(made.files) == set(stored)
        for key, array in stored.items():
            np.testing.assert_array_equal(made[key], array)
            assert made[key].dtype == array.dtype, key
