"""Files of a release: how they are hashed and written.

safetensors, JSON, text and images only; nothing here or elsewhere in the library reads or writes a pickle.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

CERTIFICATE_FILE = "certificate.json"
PARTS_FILE = "parts.json"  # of a release whose classes are mixtures: how often each part is drawn
MOST_PARTS = 100  # of a class
EMBEDDING_FILE = "embedding.safetensors"
BASE_FOLDER = "base"  # the diffusers base model of a release
BASE_FILES = ("config.json", "diffusion_pytorch_model.safetensors")
EMBEDDING_TENSOR = "noisy_sum"  # float64 (num_rows, dimension), integer multiples of clip_norm / 2**grid_bits


def folder_sha256(folder: str | Path) -> dict[str, str]:
    """Hash of every file under `folder` except the certificate; keys are relative paths with slashes."""
    folder = Path(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    hashes = {path.relative_to(folder).as_posix(): file_sha256(path) for path in files}
    hashes.pop(CERTIFICATE_FILE, None)  # it cannot contain its own hash
    return hashes


def file_sha256(path: str | Path) -> str:
    """Hash of one file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_regular(path: str | Path, most: int) -> bytes:
    """Content of a regular file of at most ``most`` bytes.

    A link, a pipe, a device, a folder or a longer file is an OSError; none is waited for.
    """

    def opener(name: str, flags: int) -> int:
        for flag in ("O_NOFOLLOW", "O_NONBLOCK"):  # should it become another kind of file in between
            flags |= getattr(os, flag, 0)
        return os.open(name, flags)

    def check(found: os.stat_result) -> None:
        if not stat.S_ISREG(found.st_mode):
            raise OSError("is a link" if stat.S_ISLNK(found.st_mode) else "is not a regular file")
        if found.st_size > most:
            raise OSError(f"is larger than {most} bytes")

    check(os.lstat(path))
    with open(path, "rb", opener=opener) as file:
        check(os.fstat(file.fileno()))
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(f"is larger than {most} bytes")
    return content


def tensors_sha256(tensors: Mapping[str, Any]) -> str:
    """Hash of a state dict: names, types, shapes and bytes, sorted by name; device and file do not matter.

    >>> tensors_sha256({"a": np.zeros(2, np.float32)})[:8]
    '9179530e'
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        array = np.ascontiguousarray(tensor.detach().cpu().numpy() if hasattr(tensor, "detach") else tensor)
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def write_atomic(path: str | Path, content: bytes) -> None:
    """Write a file so that it is there completely or not at all."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def library_versions() -> dict[str, str]:
    """Installed versions of what a release depends on."""
    versions = {}
    for name in "hyperdp numpy scipy opendp dp-accounting opacus torch diffusers peft".split():
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions
