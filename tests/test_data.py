"""The range contract, the readers, and every bad input they must refuse in one line."""

import os
import zlib

import numpy as np
import pytest
import torch
from bad_images import BAD_INPUT, bad_npz, empty_class, text_file, write_png
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from hyperdp_lib.data import (
    ImageSet,
    InputError,
    digits,
    load_images,
    load_named_or_path,
    resize,
    save_grid,
    save_npz,
    to_channels,
    to_model_range,
    to_uint8,
)
from hyperdp_lib.image_files import decode

ANY_IMAGES = hnp.arrays(
    np.uint8,
    st.one_of(
        st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5)),
        st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.just(3)),
    ),
)


# ---- the range contract ----------------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(ANY_IMAGES)
def test_every_8_bit_image_survives_the_round_trip(images):
    model_range = to_model_range(images)
    assert model_range.dtype == torch.float32 and model_range.abs().max() <= 1.0
    np.testing.assert_array_equal(to_uint8(model_range), images)


def test_every_level_survives_and_the_ends_are_exact():
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    model_range = to_model_range(levels)
    assert (model_range.min().item(), model_range.max().item()) == (-1.0, 1.0)
    np.testing.assert_array_equal(to_uint8(model_range), levels)


def test_channels_come_first_inside_and_last_in_files():
    images = np.zeros((2, 4, 5, 3), dtype=np.uint8)
    images[..., 0] = 255
    model_range = to_model_range(images)
    assert model_range.shape == (2, 3, 4, 5)
    assert (model_range[:, 0] == 1).all() and (model_range[:, 1:] == -1).all()


def test_read_only_and_reversed_arrays_are_accepted():
    images = np.arange(16, dtype=np.uint8).reshape(1, 4, 4)
    images.flags.writeable = False
    np.testing.assert_array_equal(to_uint8(to_model_range(images[:, ::-1])), images[:, ::-1])


@pytest.mark.parametrize("wrong", [np.zeros((1, 4, 4), np.float32), np.zeros((4, 4), np.uint8)])
def test_to_model_range_refuses_other_dtypes_and_shapes(wrong):
    with pytest.raises(InputError):
        to_model_range(wrong)


def test_to_uint8_clamps_and_refuses_nan():
    assert to_uint8(torch.tensor([-3.0, 3.0]).view(1, 1, 1, 2)).tolist() == [[[0, 255]]]
    with pytest.raises(ValueError, match="NaN"):
        to_uint8(torch.tensor([float("nan")]).view(1, 1, 1, 1))


def test_resize_is_antialiased_and_stays_in_range():
    stripes = torch.ones(1, 1, 64, 64)
    stripes[..., ::2] = -1.0
    assert resize(stripes, 16).abs().max() < 0.2  # without antialiasing the stripes alias to full contrast
    edge = torch.ones(1, 1, 8, 8)
    edge[..., :4] = -1.0
    assert resize(edge, 16).abs().max() <= 1.0  # bicubic alone overshoots


def test_grey_is_luma_and_back_is_a_copy():
    colours = torch.tensor([[1.0, -1, -1], [-1, 1, -1], [-1, -1, 1]]).view(3, 3, 1, 1)
    assert (to_channels(colours, 1).flatten() + 1) / 2 == pytest.approx([0.299, 0.587, 0.114], abs=1e-6)
    grey = torch.rand(2, 1, 3, 3) * 2 - 1
    assert torch.equal(to_channels(grey, 3)[:, 2:], grey)
    torch.testing.assert_close(to_channels(to_channels(grey, 3), 1), grey)


def test_transparency_is_laid_over_white():
    clear_black = torch.full((1, 4, 1, 1), -1.0)
    assert to_channels(clear_black, 1).item() == 1.0


# ---- what is read ----------------------------------------------------------------------------------------


def test_flat_folder_of_mixed_sizes_modes_and_formats(tmp_path):
    write_png(tmp_path / "b.png", 255, (8, 8))
    write_png(tmp_path / "a.jpg", 0, (40, 20))
    write_png(tmp_path / "c.bmp", (255, 255, 255), (3, 3), "RGB")
    write_png(tmp_path / "d.webp", (0, 0, 0, 0), (9, 9), "RGBA")
    write_png(tmp_path / "e.png", 65535, (8, 8), "I;16")
    write_png(tmp_path / "f.png", 1, (8, 8), "1")
    write_png(tmp_path / "G.PNG", 0, (8, 8), "P")
    write_png(tmp_path / ".hidden.png")
    (tmp_path / "notes.txt").write_text("not an image")
    read = load_images(tmp_path)
    assert read.images.shape == (7, 1, 16, 16) and read.labels is None
    # in name order: G a b c d e f
    np.testing.assert_allclose(read.images.mean((1, 2, 3)), [-1, -1, 1, 1, 1, 1, 1], atol=0.02)
    notes = "; ".join(read.notes)
    assert "4 different sizes (3 x 3 .. 40 x 20) to 16 x 16" in notes
    assert "antialiased" in notes and "stretching" in notes
    assert "grey" in notes and "white" in notes and "'notes.txt'" in notes
    assert load_images(tmp_path, channels=3).images.shape == (7, 3, 16, 16)


def test_class_folders_give_labels_in_name_order(tmp_path):
    for name, level in (("cat", 255), ("ant", 0)):
        for index in range(2):
            write_png(tmp_path / name / f"{index}.png", level, (16, 16))
    read = load_images(tmp_path)
    assert read.class_names == ("ant", "cat") and read.labels.tolist() == [0, 0, 1, 1]
    assert read.images.mean((1, 2, 3)).tolist() == [-1, -1, 1, 1] and read.notes == ()
    assert load_images(tmp_path, labelled=False).labels is None


def test_numbered_class_folders_are_in_numeric_order(tmp_path):
    for name in ("10", "9", "0"):
        write_png(tmp_path / name / "x.png")
    assert load_images(tmp_path).class_names == ("0", "9", "10")


def test_exif_orientation_is_applied(tmp_path):
    image = Image.new("L", (16, 16), 0)
    image.paste(255, (0, 0, 16, 8))  # white above
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    image.save(tmp_path / "turned.png", exif=exif)
    turned = load_images(tmp_path).images[0, 0]
    assert (turned[:8] == -1).all() and (turned[8:] == 1).all()


def test_npz_and_png_of_the_same_images_read_alike(tmp_path):
    train = digits("train", image_size=16)
    few = ImageSet(train.images[:30], train.labels[:30], train.class_names)
    save_npz(tmp_path / "few.npz", few)
    again = load_images(tmp_path / "few.npz")
    assert torch.equal(again.images, few.images) and torch.equal(again.labels, few.labels)
    assert again.class_names == few.class_names and again.notes == ()
    assert os.listdir(tmp_path) == ["few.npz"]
    for index, pixels in enumerate(to_uint8(few.images)):
        folder = tmp_path / "png" / str(int(few.labels[index]))
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{index:03}.png")
    folders = load_images(tmp_path / "png")
    order = torch.argsort(few.labels, stable=True)
    assert torch.equal(folders.images, few.images[order]) and torch.equal(folders.labels, few.labels[order])


def test_npz_colour_and_other_sizes(tmp_path):
    np.savez(tmp_path / "x.npz", images=np.full((5, 32, 24, 3), 255, np.uint8))
    read = load_images(tmp_path / "x.npz")
    assert read.images.shape == (5, 1, 16, 16) and (read.images == 1).all()
    assert "from 32 x 24 to 16 x 16" in read.notes[0] and "grey" in read.notes[1]


def test_digits_split_is_fixed_and_disjoint():
    train, test = digits("train", image_size=8), digits("test", image_size=8)
    assert (len(train), len(test)) == (1437, 360)
    counts = torch.bincount(test.labels)
    assert counts.min() >= 34 and counts.max() <= 38  # stratified
    together = np.concatenate([to_uint8(train.images), to_uint8(test.images)]).reshape(1797, -1)
    from sklearn.datasets import load_digits

    source = np.rint(load_digits().data * 255 / 16)
    np.testing.assert_array_equal(np.sort(together @ np.arange(64)), np.sort(source @ np.arange(64)))
    # the split itself: a change of it would quietly mix train and test of older records
    assert zlib.crc32(to_uint8(test.images).tobytes()) == 890062842
    assert digits("train").images.shape == (1437, 1, 16, 16)


def test_named_data_sets():
    assert len(load_named_or_path("digits")) == 1437 and len(load_named_or_path("digits-test")) == 360
    colour = load_named_or_path("digits-test", image_size=8, channels=3, labelled=False)
    assert colour.images.shape == (360, 3, 8, 8) and colour.labels is None
    with pytest.raises(InputError, match="digits, digits-test"):
        load_named_or_path("digit")


def test_grid_has_one_row_per_class(tmp_path):
    train = digits("train")
    save_grid(tmp_path / "grid.png", train, columns=5)
    grid = decode(tmp_path / "grid.png")[..., 0]
    assert grid.shape == (4 * (10 * 17 - 1), 4 * (5 * 17 - 1))
    third = to_uint8(train.images[train.labels == 3])[1]
    np.testing.assert_array_equal(grid[::4, ::4][3 * 17 : 3 * 17 + 16, 17 : 17 + 16], third)
    save_grid(tmp_path / "grid.png", ImageSet(torch.zeros(12, 3, 16, 16)))
    assert decode(tmp_path / "grid.png").shape == (4 * (2 * 17 - 1), 4 * (10 * 17 - 1), 3)
    assert os.listdir(tmp_path) == ["grid.png"]


# ---- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_helpful_line(name, tmp_path):
    make, expected = BAD_INPUT[name]
    path = make(tmp_path)
    with pytest.raises(InputError) as caught:
        load_named_or_path(path)
    message = str(caught.value)
    assert expected in message and "\n" not in message
    # ... and says what to do
    assert any(separator in message for separator in (";", ":")), message


def test_bad_labels_do_not_matter_when_labels_are_not_read(tmp_path):
    assert load_images(empty_class(tmp_path), labelled=False).images.shape == (1, 1, 16, 16)
    path = bad_npz(tmp_path, labels=np.array([5, -1, 3, 0]))
    assert load_images(path, labelled=False).labels is None


def test_odd_file_names_cannot_break_the_line(tmp_path):
    text_file(tmp_path, "a\nb\x1b[31m.png")
    with pytest.raises(InputError) as caught:
        load_images(tmp_path)
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)


def test_image_set_checks_itself():
    images = torch.zeros(2, 1, 4, 4)
    with pytest.raises(ValueError, match="N x C x H x W"):
        ImageSet(images[0])
    with pytest.raises(ValueError, match="together"):
        ImageSet(images, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="3 labels"):
        ImageSet(images, torch.zeros(3, dtype=torch.int64), ("a",))
    assert len(ImageSet(images)) == 2


def test_data_sets_outside_the_library_are_read_from_a_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("HYPERDP_DATA", raising=False)
    with pytest.raises(InputError, match="set HYPERDP_DATA to a folder with mnist.npz"):
        load_named_or_path("mnist")
    levels = np.random.default_rng(0).integers(0, 256, (6, 28, 28)).astype(np.uint8)
    labels = np.array([3, 1, 4, 1, 5, 9], np.uint8)
    np.savez(tmp_path / "mnist.npz", train_x=levels, train_y=labels, test_x=levels[:2], test_y=labels[:2])
    monkeypatch.setenv("HYPERDP_DATA", str(tmp_path))
    train, test = load_named_or_path("mnist"), load_named_or_path("mnist-test", 28)
    assert train.images.shape == (6, 1, 16, 16) and train.labels.tolist() == labels.tolist()
    assert train.class_names == tuple("0123456789") and "28 x 28" in train.notes[0]
    assert (to_uint8(test.images) == levels[:2]).all()
    np.savez(tmp_path / "mnist.npz", train_x=levels[:3], train_y=labels)
    with pytest.raises(InputError, match="not as expected"):
        load_named_or_path("mnist")


def test_a_class_of_a_named_set_is_a_set_without_labels():
    whole = load_named_or_path("digits", 16, 1)
    three, everything = (load_named_or_path(f"digits/{part}", 16, 1) for part in ("3", "all"))
    assert three.labels is None and three.class_names is None
    assert torch.equal(three.images, whole.images[whole.labels == 3])
    assert torch.equal(everything.images, whole.images) and everything.labels is None
    with pytest.raises(InputError, match="no class 'x'; it has 0, 1"):
        load_named_or_path("digits/x", 16, 1)
