"""Turn downloaded originals into the `.npz` files that the library reads.

    python data_scripts/prepare.py mnist omniglot --dest data      # from data/originals to data/*.npz
    HYPERDP_DATA=data hyperdp release mnist --epsilon 1 --out my_release

A file that is there is kept, unless --overwrite is given. Archives are read in memory, never unpacked; nothing is
unpickled. Grey sets become 28 x 28, white on black; colour sets 32 x 32. Pixels are averaged (Pillow's BOX).
Needs about 2 GB of memory for Tiny-ImageNet.
"""

from __future__ import annotations

import gzip
import io
import sys
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, ImageOps

from hyperdp_lib.cli import Parser
from hyperdp_lib.data_sets import DATA_SETS
from hyperdp_lib.image_files import InputError, shown, write_npz
from hyperdp_lib.progress import progress_bar
from hyperdp_lib.public.originals import ORIGINALS, QUICKDRAW_PREFIXES

Arrays = dict[str, np.ndarray]
GREY_SIDE, COLOUR_SIDE = 28, 32  # pixels
KKANJI_LEAST, KKANJI_MOST = 200, 300  # images of a character
CIFAR_PIXELS = 3 * COLOUR_SIDE**2


# ---- one function for each data set: folder of originals -> {file: arrays} ---------------------------------


def prepare_idx(folder: Path, name: str) -> dict[str, Arrays]:
    """MNIST and Fashion-MNIST: four gzipped IDX files, images and labels as they are."""
    contents = [read_idx(folder / original.file) for original in ORIGINALS[name]]
    keys = ("train_x", "train_y", "test_x", "test_y")
    return {DATA_SETS[name].file: dict(zip(keys, contents, strict=True))}


def read_idx(path: Path) -> np.ndarray:
    """An IDX file of bytes: two zero bytes, type 8, number of dimensions, big-endian sizes, data."""
    content = gzip.decompress(path.read_bytes())
    if content[:3] != b"\0\0\x08" or len(content) < 4 + 4 * content[3]:
        raise InputError(f"{shown(path)} is not an IDX file of bytes; download it again")
    shape = np.frombuffer(content, ">u4", count=content[3], offset=4).astype(int)
    if len(content) != 4 + 4 * len(shape) + shape.prod():
        raise InputError(f"{shown(path)} is cut short; download it again")
    return np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)


def prepare_omniglot(folder: Path, name: str) -> dict[str, Arrays]:
    """Strokes white on black; background set before evaluation set, then alphabet, character, drawer."""
    images, keys = [], []
    for evaluation, original in enumerate(ORIGINALS[name]):
        with zipfile.ZipFile(folder / original.file) as archive:
            members = sorted(member for member in archive.namelist() if _is_image(member))
            for member in progress_bar(members, desc=original.file):
                alphabet, character, file = PurePosixPath(member).parts[-3:]
                keys.append((bool(evaluation), alphabet, character, int(PurePosixPath(file).stem.split("_")[1])))
                images.append(_grey(archive.read(member), invert=True))
    order = sorted(range(len(keys)), key=keys.__getitem__)
    keys, images = [keys[i] for i in order], [images[i] for i in order]
    alphabets = sorted({key[1] for key in keys})
    characters = {key: number for number, key in enumerate(dict.fromkeys(key[:3] for key in keys))}
    return {
        DATA_SETS[name].file: {
            "x": np.stack(images),
            "char_id": np.array([characters[key[:3]] for key in keys], np.uint16),
            "alphabet_id": np.array([alphabets.index(key[1]) for key in keys], np.uint8),
            "drawer": np.array([key[3] for key in keys], np.uint8),
            "is_evaluation": np.array([key[0] for key in keys]),
            "alphabet_names": np.array(alphabets),
        }
    }


def prepare_kkanji(folder: Path, name: str) -> dict[str, Arrays]:
    """Characters with enough images, in code-point order; of each the first images by file name."""
    (original,) = ORIGINALS[name]
    with tarfile.open(folder / original.file) as archive:
        by_character: dict[str, list[tarfile.TarInfo]] = {}
        for member in archive.getmembers():
            if member.isfile() and _is_image(member.name):
                by_character.setdefault(PurePosixPath(member.name).parts[-2], []).append(member)
        often = sorted((c for c, found in by_character.items() if len(found) >= KKANJI_LEAST), key=_code_point)
        chosen = [
            (label, member)
            for label, character in enumerate(often)
            for member in sorted(by_character[character], key=lambda member: member.name)[:KKANJI_MOST]
        ]
        images = [_grey(_content(archive, member)) for _, member in progress_bar(chosen, desc=original.file)]
    labels = np.array([label for label, _ in chosen], np.uint16)
    return {DATA_SETS[name].file: {"x": np.stack(images), "y": labels, "codepoints": np.array(often)}}


def prepare_quickdraw(folder: Path, name: str) -> dict[str, Arrays]:
    """The first drawings of each category; the source's bitmaps are 28 x 28, white on black, already."""
    parts = []
    for original, count in zip(ORIGINALS[name], QUICKDRAW_PREFIXES.values(), strict=True):
        rows = np.load(folder / original.file, mmap_mode="r", allow_pickle=False)
        if rows.ndim != 2 or rows.shape[1] != GREY_SIDE**2 or rows.dtype != np.uint8 or len(rows) < count:
            raise InputError(f"{original.file} is not {count} or more rows of 784 bytes; download it again")
        parts.append(np.array(rows[:count]).reshape(-1, GREY_SIDE, GREY_SIDE))
    labels = np.repeat(np.arange(len(parts), dtype=np.uint8), [len(part) for part in parts])
    names = np.array(list(QUICKDRAW_PREFIXES))
    return {DATA_SETS[name].file: {"x": np.concatenate(parts), "y": labels, "class_names": names}}


def prepare_cifar(folder: Path, name: str) -> dict[str, Arrays]:
    """The binary version: records of one or two label bytes (the last is the class) and 3 x 32 x 32 pixels."""
    (original,) = ORIGINALS[name]
    train = [f"data_batch_{i}.bin" for i in range(1, 6)] if name == "cifar10" else ["train.bin"]
    test, names_file, label_bytes = (
        (["test_batch.bin"], "batches.meta.txt", 1) if name == "cifar10" else (["test.bin"], "fine_label_names.txt", 2)
    )
    wanted = [*train, *test, names_file]
    with tarfile.open(folder / original.file) as archive:
        members = {PurePosixPath(member.name).name: member for member in archive.getmembers() if member.isfile()}
        if missing := [file for file in wanted if file not in members]:
            raise InputError(f"{original.file} holds no {missing[0]}; download it again")
        content = {file: _content(archive, members[file]) for file in wanted}
    arrays: Arrays = {}
    for split, files in (("train", train), ("test", test)):
        records = np.frombuffer(b"".join(content[file] for file in files), np.uint8)
        if len(records) % (label_bytes + CIFAR_PIXELS):
            raise InputError(f"{original.file} is cut short; download it again")
        records = records.reshape(-1, label_bytes + CIFAR_PIXELS)
        planes = records[:, label_bytes:].reshape(-1, 3, COLOUR_SIDE, COLOUR_SIDE)
        arrays[f"{split}_x"] = np.ascontiguousarray(planes.transpose(0, 2, 3, 1))
        arrays[f"{split}_y"] = records[:, label_bytes - 1].copy()
    arrays["class_names"] = np.array(content[names_file].decode().split())
    return {DATA_SETS[name].file: arrays}


def prepare_tiny_imagenet(folder: Path, name: str) -> dict[str, Arrays]:
    """Halved to 32 x 32: once without loss, once as JPEG of the quality and layout of the JPEG copy of CIFAR-10."""
    (original,) = ORIGINALS[name]
    with zipfile.ZipFile(folder / original.file) as archive:
        root = next(PurePosixPath(member).parts[0] for member in archive.namelist())
        wnids = sorted(archive.read(f"{root}/wnids.txt").decode().split())
        words = dict(line.split("\t", 1) for line in archive.read(f"{root}/words.txt").decode().splitlines())
        notes = archive.read(f"{root}/val/val_annotations.txt").decode().splitlines()
        classes_of_val = dict(line.split("\t")[:2] for line in notes)
        found: dict[str, list[tuple[int, int, str]]] = {"train": [], "val": []}  # class, file number, member
        for member in filter(_is_image, archive.namelist()):
            file = PurePosixPath(member)
            split, wnid = file.parts[1], classes_of_val.get(file.name, file.parts[2])
            if split in found:
                found[split].append((wnids.index(wnid), int(file.stem.split("_")[-1]), member))
        arrays: Arrays = {}
        for split, entries in found.items():
            entries.sort()
            members = progress_bar([member for *_, member in entries], desc=f"{original.file}, {split}")
            arrays[f"{split}_x"] = np.stack([_colour(archive.read(member)) for member in members])
            arrays[f"{split}_y"] = np.array([label for label, *_ in entries], np.uint8)
    names: Arrays = {"wnids": np.array(wnids), "class_names": np.array([words[wnid].strip() for wnid in wnids])}
    lossless = {key.replace("val", "test"): array for key, array in arrays.items()}
    labels = {f"{split}_y": arrays[f"{split}_y"] for split in found}
    jpeg = as_jpegs({split: arrays[f"{split}_x"] for split in found}) | labels
    return {DATA_SETS[name].file: lossless | names, DATA_SETS[f"{name}-jpeg"].file: jpeg | names}


PREPARE: dict[str, Callable[[Path, str], dict[str, Arrays]]] = {
    "mnist": prepare_idx,
    "fashion-mnist": prepare_idx,
    "omniglot": prepare_omniglot,
    "kkanji": prepare_kkanji,
    "quickdraw": prepare_quickdraw,
    "cifar10": prepare_cifar,
    "cifar100": prepare_cifar,
    "tiny-imagenet-32": prepare_tiny_imagenet,
}


# ---- what they share ---------------------------------------------------------------------------------------


def as_jpegs(splits: dict[str, np.ndarray]) -> Arrays:
    """JPEG files (quality 75, 4:2:0) of (N, 32, 32, 3) images, laid end to end without the header that all share.

    ``header``, and for each split ``SPLIT_bytes`` and ``SPLIT_off`` (N + 1,), where images begin and the last one ends.
    """
    header, arrays = b"", {}
    for split, images in splits.items():
        files = []
        for image in progress_bar(images, desc=f"encoding, {split}"):
            file = io.BytesIO()
            Image.fromarray(image).save(file, "JPEG", quality=75, subsampling=2)
            content = file.getvalue()
            end = content.index(b"\xff\xda") + 14  # the scan header of three components is the last before the data
            header = header or content[:end]
            if content[:end] != header:
                raise AssertionError("Pillow wrote different headers for images of one size")
            files.append(content[end:])
        arrays[f"{split}_bytes"] = np.frombuffer(b"".join(files), np.uint8)
        arrays[f"{split}_off"] = np.cumsum([0, *map(len, files)]).astype(np.int32)
    return {"header": np.frombuffer(header, np.uint8), **arrays}


def _grey(content: bytes, invert: bool = False) -> np.ndarray:
    with Image.open(io.BytesIO(content)) as opened:
        image = ImageOps.invert(opened.convert("L")) if invert else opened.convert("L")
        return np.asarray(image.resize((GREY_SIDE, GREY_SIDE), Image.Resampling.BOX))


def _colour(content: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(content)) as opened:
        return np.asarray(opened.convert("RGB").resize((COLOUR_SIDE, COLOUR_SIDE), Image.Resampling.BOX))


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    assert file is not None  # regular files only get here
    return file.read()


def _is_image(member: str) -> bool:
    return member.lower().endswith((".png", ".jpg", ".jpeg")) and "__MACOSX" not in member


def _code_point(character: str) -> int:
    return int(character.removeprefix("U+"), 16)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="prepare.py", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", metavar="NAME", choices=[*PREPARE, "all"], help="a data set, or: all")
    parser.add_argument("--dest", type=Path, required=True, metavar="DIR", help="reads DIR/originals, writes DIR/*.npz")
    parser.add_argument("--overwrite", action="store_true", help="make again what is there")
    try:
        options = parser.parse_args(arguments)
        for name in PREPARE if "all" in options.names else dict.fromkeys(options.names):
            prepare(name, options.dest, overwrite=options.overwrite)
    except InputError as error:
        print(f"prepare.py: {error}", file=sys.stderr)
        return 2
    return 0


def prepare(name: str, dest: Path, *, overwrite: bool = False) -> None:
    """Make the files of one data set, and say whether their counts are the expected ones."""
    keys = [name, f"{name}-jpeg"] if name == "tiny-imagenet-32" else [name]
    files = [DATA_SETS[key].file for key in keys]
    if not overwrite and all((dest / file).is_file() for file in files):
        print(f"{', '.join(str(dest / file) for file in files)}: kept; --overwrite makes it again")
        return
    folder = dest / "originals"
    for original in ORIGINALS[name]:
        if not (folder / original.file).is_file():
            raise InputError(f"no {shown(folder / original.file)}: run data_scripts/download.py {name} --dest {dest}")
    try:
        made = PREPARE[name](folder, name)
    except (OSError, EOFError, KeyError, StopIteration, ValueError, tarfile.TarError, zipfile.BadZipFile) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"originals of {name} in {shown(folder)} are damaged ({type(error).__name__}: {error}); download them again"
        ) from error
    for file, arrays in made.items():
        write_npz(dest / file, arrays)
        images = sum(len(array) for key, array in arrays.items() if key in ("y", "char_id") or key.endswith("_y"))
        expected = sum(DATA_SETS[name].counts)
        print(f"{dest / file}: {images} images{'' if images == expected else f', NOT the {expected} EXPECTED'}")


if __name__ == "__main__":
    raise SystemExit(main())
