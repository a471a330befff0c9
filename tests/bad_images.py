"""Folders and files that no command may accept, each with words its error message must hold."""

import struct
import zlib

import numpy as np
import tifffile
from PIL import Image


def write_png(path, level=128, size=(8, 8), mode="L"):
    """One flat image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (size[1], size[0]), level).save(path)
    return path


def bomb(path, side=20000):
    """A PNG whose header claims far more pixels than the file holds."""
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    chunks = (b"IHDR" + header, b"IDAT" + zlib.compress(bytes(side)))
    data = b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks
    )
    (path / "huge.png").write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    return path


def bad_npz(path, **arrays):
    images = np.zeros((4, 8, 8), np.uint8)
    np.savez(path / "x.npz", **({"images": images} | arrays))
    return path / "x.npz"


def named_npz(path, labels):
    return bad_npz(path, labels=labels, class_names=np.array(["a", "b"]))


def folder_with(path, *names):
    for name in names:
        write_png(path / name)
    return path


def corrupt(path):
    write_png(path / "good.png")
    data = write_png(path / "bad.png", size=(64, 64), mode="RGB", level=(1, 2, 3)).read_bytes()
    (path / "bad.png").write_bytes(data[: len(data) // 2])
    return path


def floats(path):
    Image.new("F", (4, 4)).save(path / "x.tiff")
    return path


def empty_class(path):
    folder_with(path, "a/1.png")
    (path / "b").mkdir()
    return path


def odd_class_name(path):
    return folder_with(path, "a\nb/1.png")


def link(path):
    outside = write_png(path / "outside" / "x.png")
    (path / "in").mkdir()
    (path / "in" / "x.png").symlink_to(outside)
    return path / "in"


def link_to_folder(path):
    folder_with(path, "outside/x.png", "in/a/x.png")
    (path / "in" / "b").symlink_to(path / "outside")
    return path / "in"


def pages(path, suffix):
    """Three pictures in one file."""
    first, *others = (Image.new("L", (8, 8), level) for level in (0, 128, 255))
    first.save(path / f"stack{suffix}", save_all=True, append_images=others)
    return path


def planes(path):
    """Deep colour in separate planes, of which Pillow would read half the bytes."""
    levels = np.arange(3 * 64, dtype=np.uint16).reshape(3, 8, 8)
    tifffile.imwrite(path / "x.tif", levels, photometric="rgb", planarconfig="separate")
    return path


def postscript(path):
    """What Pillow would hand to a program."""
    return text_file(
        path, "x.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    ).parent


def text_file(path, name="x.txt", content=b"hello"):
    (path / name).write_bytes(content)
    return path / name


def truncated_npz(path):
    data = bad_npz(path, images=np.random.default_rng(0).integers(0, 255, (9, 9, 9), np.uint8)).read_bytes()
    return text_file(path, "x.npz", data[:100])


def damaged_npz(path):
    data = bytearray(bad_npz(path, images=np.zeros((99, 9, 9), np.uint8)).read_bytes())
    data[3000] ^= 255  # the checksum inside the archive no longer agrees
    return text_file(path, "x.npz", bytes(data))


def npy(path):
    np.save(path / "x.npy", np.zeros((4, 8, 8), np.uint8))
    return (path / "x.npy").rename(path / "x.npz")


def npz_without_images(path):
    np.savez(path / "x.npz", x=np.zeros(3))
    return path / "x.npz"


def nan_images(path):
    images = np.zeros((4, 8, 8), np.float32)
    images[0, 0, 0] = np.nan
    return bad_npz(path, images=images)


BAD_INPUT = {
    "no such file": (lambda p: p / "absent", "no such file or folder"),
    "no such npz": (lambda p: p / "absent.npz", "no such file or folder"),
    "neither folder nor npz": (text_file, "neither a folder nor an .npz"),
    "a single image": (lambda p: write_png(p / "x.png"), "single image"),
    "corrupt image": (corrupt, "bad.png"),
    "text called png": (lambda p: text_file(p, "fake.png").parent, "fake.png"),
    "empty file called png": (lambda p: text_file(p, "fake.png", b"").parent, "fake.png"),
    "decompression bomb": (bomb, "huge.png' has more than"),
    "half a decompression bomb": (lambda p: bomb(p, side=10000), "bomb?"),
    "floating-point image": (floats, "no agreed white"),
    "32-bit image": (lambda p: write_png(p / "x.tiff", mode="I").parent, "no agreed white"),
    "pages of a TIFF": (lambda p: pages(p, ".tif"), "holds 3 pages"),
    "an animation": (lambda p: pages(p, ".gif"), "holds 3 pages"),
    "an animated PNG": (lambda p: pages(p, ".png"), "holds 3 pages"),
    "an animated WebP": (lambda p: pages(p, ".webp"), "holds 3 pages"),
    "16-bit colour planes": (planes, "save it as 8-bit"),
    "PostScript called png": (postscript, "cannot be read as an image"),
    "loose images and folders": (lambda p: folder_with(p, "x.png", "a/1.png"), "both loose images"),
    "a control character in a class name": (odd_class_name, "rename"),
    "folders in folders": (lambda p: folder_with(p, "a/b/1.png"), "inside a class folder"),
    "splits in place of classes": (
        lambda p: folder_with(p, "train/a/1.png", "val/a/1.png", "test/a/1.png"),
        "which are no classes; give one of them",
    ),
    "one split in place of classes": (lambda p: folder_with(p, "Train/1.png"), "which are no classes"),
    "class folders of one name": (
        lambda p: folder_with(p, "caf\u00e9/1.png", "cafe\u0301/1.png"),
        "in two Unicode forms",
    ),
    "a drive for a class name": (lambda p: folder_with(p, "c:/1.png"), "cannot be a folder name"),
    "link": (link, "is a link"),
    "link to a folder": (link_to_folder, "is a link"),
    "no images in npz": (npz_without_images, "no array 'images'"),
    "images without pixels": (lambda p: bad_npz(p, images=np.zeros((4, 0, 8), np.uint8)), "shape"),
    "pickled objects": (lambda p: bad_npz(p, images=np.array([{}, []], dtype=object)), "pickled"),
    "pickled labels": (lambda p: bad_npz(p, labels=np.array([None] * 4, dtype=object)), "pickled"),
    "wrong dtype": (lambda p: bad_npz(p, images=np.zeros((4, 8, 8), np.int64)), "must be uint8"),
    "float images": (lambda p: bad_npz(p, images=np.zeros((4, 8, 8))), "is float64; it must be uint8"),
    "NaN": (nan_images, "NaN"),
    "wrong shape": (lambda p: bad_npz(p, images=np.zeros((4, 64), np.uint8)), "shape"),
    "channels first": (lambda p: bad_npz(p, images=np.zeros((4, 3, 8, 8), np.uint8)), "shape"),
    "scalar": (lambda p: bad_npz(p, images=np.uint8(3)), "shape"),
    "wide levels": (lambda p: bad_npz(p, images=np.zeros((4, 8, 8), np.uint16)), "--window"),
    "labels without names": (lambda p: bad_npz(p, labels=np.array([0, 1, 0, 1])), "--classes"),
    "too few labels": (lambda p: named_npz(p, np.arange(3)), "4 images"),
    "labels in a table": (lambda p: named_npz(p, np.zeros((4, 3), int)), "4 images"),
    "two classes an image": (lambda p: named_npz(p, np.ones((4, 2), int)), "not one 1 among zeros"),
    "float labels": (lambda p: named_npz(p, np.zeros(4)), "integers"),
    "negative labels": (lambda p: named_npz(p, np.array([0, 1, -1, 0])), "none of the 2 classes"),
    "labels from 1": (lambda p: named_npz(p, np.array([1, 1, 2, 2])), "subtract 1"),
    "a huge label": (lambda p: named_npz(p, np.array([0, 0, 0, 2**64 - 1], np.uint64)), "none of the 2"),
    "labels of other names": (lambda p: named_npz(p, np.array(["a", "b", "secret", "a"])), "none of the 2 classes"),
    "a class name that leads elsewhere": (
        lambda p: bad_npz(p, labels=np.arange(4), class_names=np.array(["a", "../b", "c", "d"])),
        "'../b'",
    ),
    "a class name twice": (
        lambda p: bad_npz(p, labels=np.arange(4), class_names=np.array(["a", "a", "c", "d"])),
        "repeats",
    ),
    "a class name in two forms": (
        lambda p: bad_npz(p, labels=np.arange(4), class_names=np.array(["a", "caf\u00e9", "cafe\u0301", "d"])),
        "in two Unicode forms",
    ),
    "numbers for class names": (
        lambda p: bad_npz(p, labels=np.arange(4), class_names=np.arange(4)),
        "list of strings",
    ),
    "truncated npz": (truncated_npz, "npz"),
    "damaged npz": (damaged_npz, "cannot be read"),
    "npy called npz": (npy, "not an .npz"),
    "text called npz": (lambda p: text_file(p, "x.npz"), "not an .npz"),
}
