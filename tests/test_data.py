"""The range contract, the readers, and every bad input they must refuse in one line."""

import os
import struct
import zlib

import numpy as np
import pytest
import tifffile
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


# ---- depth, photometric interpretation, alpha: against files written by hand --------------------------------


def png_of(levels, depth, colour_type, key=None):
    """A PNG of any bit depth and colour type, ``(H, W, C)`` levels; the level ``key`` stands for transparent."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = b""
    for row in levels:
        bits = "".join(f"{int(level):0{depth}b}" for level in row.ravel())
        bits += "0" * (-len(bits) % 8)
        rows += b"\0" + bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8))
    header = struct.pack(">IIBBBBB", levels.shape[1], levels.shape[0], depth, colour_type, 0, 0, 0)
    transparent = b"" if key is None else chunk(b"tRNS", struct.pack(f">{len(key)}H", *key))
    content = chunk(b"IHDR", header) + transparent + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + content


def rounded(levels, white):
    return np.array([[[round(255 * int(v) / white) for v in pixel] for pixel in row] for row in levels], np.uint8)


PNG_KINDS = [(1, 0, 1), (2, 0, 1), (4, 0, 1), (8, 0, 1), (16, 0, 1), (8, 2, 3), (16, 2, 3), (8, 4, 2), (16, 4, 2)]


@pytest.mark.parametrize(("depth", "colour_type", "channels"), [*PNG_KINDS, (8, 6, 4), (16, 6, 4)])
def test_png_of_every_depth_is_rounded_to_the_nearest_level(depth, colour_type, channels, tmp_path):
    levels = np.random.default_rng(0).integers(0, 2**depth, (7, 9, channels))
    (tmp_path / "x.png").write_bytes(png_of(levels, depth, colour_type))
    expected = rounded(levels, 2**depth - 1)
    if channels == 2:
        expected = expected[..., [0, 0, 0, 1]]
    np.testing.assert_array_equal(decode(tmp_path / "x.png"), expected)


@pytest.mark.parametrize(("depth", "colour_type"), [(1, 0), (2, 0), (4, 0), (8, 0), (16, 0), (8, 2), (16, 2)])
def test_the_transparent_level_of_a_png_is_transparent_at_every_depth(depth, colour_type, tmp_path):
    levels = np.random.default_rng(0).integers(0, 2**depth, (7, 9, 1 if colour_type == 0 else 3))
    key = tuple(int(level) for level in levels[2, 3])
    (tmp_path / "x.png").write_bytes(png_of(levels, depth, colour_type, key))
    expected = np.where((levels == key).all(-1), 0, 255)
    np.testing.assert_array_equal(decode(tmp_path / "x.png")[..., 3], expected)


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("photometric", ["miniswhite", "minisblack", "rgb"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_tiff_of_every_kind_is_right_or_refused(dtype, photometric, order, compression, tmp_path):
    white = np.iinfo(dtype).max
    levels = np.random.default_rng(0).integers(0, white + 1, (7, 9, 3 if photometric == "rgb" else 1)).astype(dtype)
    written = levels if photometric == "rgb" else levels[..., 0]
    options = dict(photometric=photometric, byteorder=order, compression=compression)
    tifffile.imwrite(tmp_path / "x.tif", written, **options)
    if photometric == "miniswhite" and dtype is np.uint16 and order == ">":  # Pillow does not know it
        with pytest.raises(InputError, match="cannot be read"):
            decode(tmp_path / "x.tif")
        return
    expected = rounded(levels, white)
    np.testing.assert_array_equal(decode(tmp_path / "x.tif"), 255 - expected if "white" in photometric else expected)


def test_a_folder_of_both_photometric_kinds_is_read_right(tmp_path):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    tifffile.imwrite(tmp_path / "a.tif", ramp, photometric="minisblack")
    tifffile.imwrite(tmp_path / "b.tif", 65535 - ramp, photometric="miniswhite")
    read = load_images(tmp_path)
    assert torch.equal(read.images[0], read.images[1])
    assert any("WhiteIsZero" in note and "1 of 2" in note for note in read.notes)


def test_12_bits_in_16_are_read_by_their_window_and_noticed_without(tmp_path):
    levels = np.linspace(0, 4095, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(levels).save(tmp_path / "x.png")
    dark = load_images(tmp_path)
    assert dark.images.max() < -0.8 and "--window 0 4095" in dark.warnings[0]
    read = load_images(tmp_path, window=(0, 4095))
    np.testing.assert_array_equal(to_uint8(read.images)[0], rounded(levels[..., None], 4095)[..., 0])
    assert read.warnings == () and "4095" in read.notes[0]
    np.savez(tmp_path / "x.npz", images=levels[None])
    assert torch.equal(load_images(tmp_path / "x.npz", window=(0, 4095)).images, read.images)
    clamped = load_images(tmp_path, window=(1000, 2000)).images
    assert clamped.min() == -1 and clamped.max() == 1
    with pytest.raises(InputError, match="black below white"):
        load_images(tmp_path, window=(4095, 0))


def test_floats_need_a_window_and_a_graymap_states_its_white(tmp_path):
    Image.fromarray(np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)).save(tmp_path / "x.tiff")
    expected = np.rint(np.linspace(0, 255, 256)).reshape(16, 16)
    np.testing.assert_array_equal(decode(tmp_path / "x.tiff", (0, 1))[..., 0], expected)
    (tmp_path / "x.pgm").write_bytes(b"P5 2 1 4095\n" + struct.pack(">2H", 4095, 1000))
    assert decode(tmp_path / "x.pgm").ravel().tolist() == [255, 62]
    assert decode(tmp_path / "x.pgm", (0, 1000)).ravel().tolist() == [255, 255]


def test_white_ink_on_a_transparent_ground_is_noticed_and_read_over_black(tmp_path):
    ink = np.full((16, 16, 4), 255, np.uint8)
    ink[..., 3] = np.arange(256).reshape(16, 16)
    Image.fromarray(ink).save(tmp_path / "x.png")
    lost, kept = load_images(tmp_path), load_images(tmp_path, background="black")
    assert (lost.images == 1).all() and any("--background black" in warning for warning in lost.warnings)
    np.testing.assert_array_equal(to_uint8(kept.images)[0], ink[..., 3])
    assert kept.warnings == () and "over black" in kept.notes[0]


def test_what_looks_wrong_is_said(tmp_path):
    for name in ("a.png", "b.png"):
        write_png(tmp_path / "f" / name, 7, (16, 16))
    one_value, copies = load_images(tmp_path / "f").warnings
    assert "one value" in one_value and "1 images are copies" in copies
    sixteenths = np.arange(256, dtype=np.uint8).reshape(1, 16, 16) // 16
    np.savez(tmp_path / "x.npz", images=sixteenths)
    assert "a quarter of the range" in load_images(tmp_path / "x.npz").warnings[0]
    text_file(tmp_path / "f", "scan.dcm")
    (tmp_path / "f" / "a.png").unlink()
    (tmp_path / "f" / "b.png").unlink()
    assert "none of the 1 files" in load_images(tmp_path / "f").warnings[0]


# ---- classes -----------------------------------------------------------------------------------------------


def test_the_classes_do_not_depend_on_which_labels_are_there(tmp_path):
    images, names = np.zeros((3, 16, 16), np.uint8), np.array(["a", "b", "c"])
    for labels in ([0, 1, 2], [0, 1, 1], [0, 0, 0]):
        np.savez(tmp_path / "x.npz", images=images, labels=np.array(labels), class_names=names)
        read = load_images(tmp_path / "x.npz")
        assert read.class_names == ("a", "b", "c") and read.labels.tolist() == labels
        np.savez(tmp_path / "y.npz", images=images, labels=np.array(labels))
        assert torch.equal(load_images(tmp_path / "y.npz", class_names=names.tolist()).labels, read.labels)
    # other names for the same numbers would be other classes: they are matched by name
    read = load_images(tmp_path / "x.npz", class_names=["d", "c", "b", "a"])
    assert read.class_names == ("d", "c", "b", "a") and read.labels.tolist() == [3, 3, 3]
    with pytest.raises(InputError, match="not declared: 'c'"):
        load_images(tmp_path / "x.npz", class_names=["a", "b"])


def test_empty_classes_and_empty_sets_are_read_like_others(tmp_path):
    folder = empty_class(tmp_path)
    read = load_images(folder)
    assert read.class_names == ("a", "b") and read.labels.tolist() == [0]
    (folder / "a" / "1.png").unlink()
    nobody = load_images(folder, class_names=["b", "a", "c"])
    assert nobody.images.shape == (0, 1, 16, 16) and nobody.labels.shape == (0,)
    assert nobody.class_names == ("b", "a", "c") and "without a folder" in nobody.notes[0]
    assert load_images(folder / "a", channels=3).images.shape == (0, 3, 16, 16)
    for labels in (np.zeros(0), np.zeros((0, 1), int), np.zeros((0, 2), int)):
        path = bad_npz(tmp_path, images=np.zeros((0, 8, 8), np.uint8), labels=labels, class_names=np.array(["a", "b"]))
        assert load_images(path).images.shape == (0, 1, 16, 16) and load_images(path).class_names == ("a", "b")


def test_declared_classes_order_the_folders(tmp_path):
    for level, name in enumerate(("ant", "cafe\u0301")):
        write_png(tmp_path / name / "1.png", level, (16, 16))
    read = load_images(tmp_path, class_names=["caf\u00e9", "ant"])
    assert read.class_names == ("caf\u00e9", "ant") and to_uint8(read.images)[:, 0, 0].tolist() == [1, 0]
    with pytest.raises(InputError, match="not declared: 'ant'"):
        load_images(tmp_path, class_names=["caf\u00e9"])
    with pytest.raises(InputError, match="not both"):
        load_images(tmp_path, labelled=False, class_names=["ant"])


LABELS = {"column": [[0], [1], [1]], "one-hot": [[1, 0], [0, 1], [0, 1]], "names": ["a", "b", "b"]}


@pytest.mark.parametrize("kind", LABELS)
def test_archives_in_parts_and_labels_of_other_kinds(kind, tmp_path):
    images = np.arange(3, dtype=np.uint8)[:, None, None].repeat(16, 1).repeat(16, 2)
    parts = dict(val_images=images[:1], val_labels=[[0]], train_images=images, train_labels=LABELS[kind])
    np.savez(tmp_path / "x.npz", **parts)
    read = load_images(tmp_path / "x.npz", class_names=["a", "b"])
    assert read.labels.tolist() == [0, 1, 1] and to_uint8(read.images)[:, 0, 0].tolist() == [0, 1, 2]
    assert "'train_images'" in read.notes[0]
    with pytest.raises(InputError, match="--classes"):
        load_images(tmp_path / "x.npz")


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
    with pytest.raises(ValueError, match="one label for each image"):
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
