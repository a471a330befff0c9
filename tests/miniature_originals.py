"""Tiny archives in the formats of the real originals, for the tests of the data scripts."""

from __future__ import annotations

import gzip
import io
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from hyperdp_lib.public.originals import ORIGINALS, QUICKDRAW_PREFIXES

RANDOM = np.random.default_rng(0)


def idx(array: np.ndarray) -> bytes:
    """An IDX file, not yet compressed."""
    return b"\0\0\x08" + bytes([array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def idx_files(folder: Path, name: str, arrays: list[np.ndarray]) -> None:
    """The four files of MNIST or Fashion-MNIST."""
    for original, array in zip(ORIGINALS[name], arrays, strict=True):
        (folder / original.file).write_bytes(gzip.compress(idx(array), compresslevel=1))


def image(pixels: np.ndarray, kind: str = "PNG", one_bit: bool = False) -> bytes:
    file = io.BytesIO()
    picture = Image.fromarray(pixels)
    (picture.convert("1") if one_bit else picture).save(file, kind)
    return file.getvalue()


def zip_file(path: Path, members: Mapping[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def tar_file(path: Path, members: Mapping[str, bytes], mode: str = "w") -> None:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def omniglot(folder: Path) -> dict[tuple[str, str, int], np.ndarray]:
    """Two alphabets in the background set, one that sorts between them in the evaluation set; ink is black."""
    drawn = {}
    for original, alphabets in zip(ORIGINALS["omniglot"], (("Angelic", "Greek"), ("Bengali",)), strict=True):
        root, members = original.file.removeprefix("omniglot-").removesuffix(".zip"), {}
        for alphabet in alphabets:
            for character in ("character02", "character01"):
                for drawer in (2, 1):
                    pixels = np.where(RANDOM.random((105, 105)) < 0.1, 0, 255).astype(np.uint8)
                    drawn[alphabet, character, drawer] = pixels
                    members[f"{root}/{alphabet}/{character}/{RANDOM.integers(999):04}_{drawer:02}.png"] = image(
                        pixels, one_bit=True
                    )
        zip_file(folder / original.file, members | {f"__MACOSX/{root}/x/y/._0001_01.png": b"no image"})
    return drawn


def kkanji(folder: Path, counts: Mapping[str, int]) -> dict[str, dict[str, np.ndarray]]:
    """64 x 64 images, white on black."""
    drawn = {
        character: {f"{i:03x}.png": RANDOM.integers(0, 256, (64, 64), dtype=np.uint8) for i in range(count)}
        for character, count in counts.items()
    }
    members = {
        f"kkanji2/{character}/{file}": image(pixels)
        for character, files in drawn.items()
        for file, pixels in reversed(files.items())
    }
    tar_file(folder / "kkanji.tar", members)
    return drawn


def quickdraw(folder: Path) -> dict[str, np.ndarray]:
    """More drawings than are taken."""
    rows = {}
    for name, count in QUICKDRAW_PREFIXES.items():
        rows[name] = RANDOM.integers(0, 256, (count + 1, 784), dtype=np.uint8)
        np.save(folder / f"quickdraw-{name}.npy", rows[name])
    return rows


def cifar(folder: Path, name: str, images: np.ndarray, labels: np.ndarray) -> None:
    """All images six times in CIFAR-10 (five training files and a test file), twice in CIFAR-100."""
    coarse = np.full((len(labels), 1), 9, np.uint8)  # a coarse label that must not be taken for the class
    head = [labels[:, None]] if name == "cifar10" else [coarse, labels[:, None]]
    planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    records = np.concatenate([*head, planes], 1).astype(np.uint8).tobytes()
    if name == "cifar10":
        files = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
        members = {f"cifar-10-batches-bin/{file}": records for file in files}
        members["cifar-10-batches-bin/batches.meta.txt"] = b"airplane\nautomobile\n\n"
    else:
        members = {f"cifar-100-binary/{file}.bin": records for file in ("train", "test")}
        members["cifar-100-binary/fine_label_names.txt"] = b"apple\naquarium_fish\n"
        members["cifar-100-binary/coarse_label_names.txt"] = b"aquatic_mammals\n"
    tar_file(folder / ORIGINALS[name][0].file, members, "w:gz")


def tiny_imagenet(folder: Path) -> dict[tuple[str, str, int], np.ndarray]:
    """Two classes, one grey image among those of train, and an unlabelled test set that is left out."""
    root, drawn, members = "tiny-imagenet-200", {}, {}
    for number, wnid in enumerate(("n02", "n01")):
        for file in (10, 2):
            colours = RANDOM.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            pixels = colours[..., 0] if (wnid, file) == ("n01", 2) else colours
            members[f"{root}/train/{wnid}/images/{wnid}_{file}.JPEG"] = content = image(pixels, "JPEG")
            drawn["train", wnid, file] = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
        members[f"{root}/val/images/val_{number}.JPEG"] = content = image(colours, "JPEG")
        drawn["val", wnid, number] = np.asarray(Image.open(io.BytesIO(content)))
    members[f"{root}/test/images/test_0.JPEG"] = content
    members[f"{root}/wnids.txt"] = b"n02\nn01\n"
    members[f"{root}/words.txt"] = b"n02\torange\nn03\tunused\nn01\tgoldfish, Carassius auratus\n"
    members[f"{root}/val/val_annotations.txt"] = b"val_0.JPEG\tn02\t0\t0\t9\t9\nval_1.JPEG\tn01\t0\t0\t9\t9\n"
    zip_file(folder / "tiny-imagenet-200.zip", members)
    return drawn
