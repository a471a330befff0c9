"""A release, in memory and on disk: PEFT adapters, base model, certificate, noisy sum, model card, sample sheet.

The folder is complete by itself: plain diffusers and PEFT draw from it.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load as from_safetensors
from safetensors.numpy import save as to_safetensors
from torch import nn

from hyperdp_lib import cells, certificate, diffusion, strict_json
from hyperdp_lib.adapter import Adapter, concatenate, load_adapter, save_adapter
from hyperdp_lib.artefacts import (
    BASE_FILES,
    BASE_FOLDER,
    CERTIFICATE_FILE,
    EMBEDDING_FILE,
    EMBEDDING_TENSOR,
    MOST_PARTS,
    PARTS_FILE,
    read_regular,
    tensors_sha256,
)
from hyperdp_lib.certificate import Certificate
from hyperdp_lib.data import ImageSet, InputError, save_grid
from hyperdp_lib.diffusion import load_base_model
from hyperdp_lib.planning import folder_names

MOST_BYTES = 2**30  # of one file that is read back


@dataclass(frozen=True, eq=False)
class Release:
    """What leaves the private side: all of it is public.

    Attributes
    ----------
    adapter : Adapter
        One LoRA adapter, or one a class.
    certificate : Certificate
        What it cost in privacy.
    noisy_sum : ndarray
        ``(K, k)``, what the adapter was decoded from: a better hypernetwork decodes it again at no privacy cost.
    base_model : module or None
        What the adapter is for.
    """

    adapter: Adapter
    certificate: Certificate
    noisy_sum: np.ndarray
    base_model: nn.Module | None = None

    def sample(
        self,
        num_images: int = 1000,
        *,
        seed: int = 0,
        balanced: bool = False,
        num_steps: int = 20,
        progress: bool = False,
    ) -> ImageSet:
        """Samples (num_images, C, H, W) in [-1, 1], with labels if there are classes.

        Parameters
        ----------
        seed : of the samples, public.
        balanced : as many of each class; default: in the released (noisy) proportions.
        num_steps : denoising steps.
        """
        if self.base_model is None:
            raise InputError("the release holds no base model to sample from: load it with load_release")
        names = self.certificate.class_names
        counts = self.counts(num_images, balanced=balanced)
        images = diffusion.sample_classes(
            self.base_model, self.adapter, len(counts), counts,
            generator=torch.Generator().manual_seed(seed), num_steps=num_steps, progress=progress,
        )  # fmt: skip
        labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        return ImageSet(images, labels if names else None, names or None)

    def to(self, device: str) -> Release:
        """The same on a device."""
        base_model = None if self.base_model is None else self.base_model.to(device)
        return dataclasses.replace(self, adapter=self.adapter.to(device), base_model=base_model)

    def counts(self, num_images: int, *, balanced: bool = False) -> list[int]:
        """How many of ``num_images`` samples are drawn of each class."""
        classes = max(1, len(self.certificate.class_names))
        shares = torch.ones(classes, dtype=torch.float64)
        if not balanced:
            shares = cells.released_proportions(self.noisy_sum)
            if len(shares) != classes:
                raise InputError("the noisy sum is of other classes than the certificate; see hyperdp verify")
        return cells.apportion(shares, num_images).tolist()

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write the release folder; see `save_release`."""
        return save_release(folder, self, overwrite=overwrite)


def save_release(
    folder: str | Path,
    released: Release,
    base_model: nn.Module | None = None,
    *,
    num_samples: int = 100,
    overwrite: bool = False,
) -> Path:
    """Write the release folder: PEFT adapter(s), base model, certificate, noisy sum, model card, sample sheet.

    The folder appears complete or not at all: it is written beside its place and then renamed. Every path in it, in
    cards and configurations, is relative to the folder itself.

    Raises
    ------
    InputError
        if the folder exists and ``overwrite`` is False, or if ``base_model`` (default: the release's own) is not the
        one it was made for.
    """
    base_model = released.base_model if base_model is None else base_model
    if base_model is None:
        raise InputError("the release holds no base model: give the one that it was made for")
    folder = Path(folder)
    if folder.exists() and not overwrite:
        raise InputError(f"{str(folder)!r} exists: choose another --out, or --overwrite")
    folder_names(released.certificate.class_names)
    if released.certificate.base_model_sha256 not in (None, tensors_sha256(base_model.state_dict())):
        raise InputError("the base model is not the one that the release was made for")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    adapter, statement, noisy_sum = released.adapter, released.certificate, released.noisy_sum
    try:
        os.chmod(temporary, 0o755)
        members = _members(adapter, statement.class_names or ("",))
        for where, (i, _) in members.items():
            card = model_card(statement, adapter.lora_config, base_model, where)
            save_adapter(adapter[i], temporary / where, base_model_name_or_path=BASE_FOLDER, model_card=card)
        if "" not in members:
            card = model_card(statement, adapter.lora_config, base_model, next(iter(members)))
            (temporary / "README.md").write_text(card, encoding="utf-8")
        _save_base(base_model, temporary / BASE_FOLDER)
        if len(members) > max(1, len(statement.class_names)):
            shares = {where: count for where, (_, count) in members.items()}
            (temporary / PARTS_FILE).write_text(json.dumps(shares, indent=1) + "\n", encoding="utf-8")
        (temporary / EMBEDDING_FILE).write_bytes(
            to_safetensors({EMBEDDING_TENSOR: np.ascontiguousarray(noisy_sum)})
        )
        if num_samples:
            _write_samples(temporary / "samples.png", adapter, statement.class_names, base_model, num_samples)
        certificate.write_certificate(statement, temporary)
        if folder.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
            os.replace(folder, old / "release")
            os.replace(temporary, folder)
            shutil.rmtree(old)
        else:
            os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return folder


def _save_base(base_model: nn.Module, folder: Path) -> None:
    """A diffusers folder; in half precision where that loses nothing. It names no place on this machine."""
    model: Any = copy.deepcopy(base_model).cpu()
    kept = tensors_sha256(model.state_dict())
    if tensors_sha256({key: value.half().float() for key, value in model.state_dict().items()}) == kept:
        model = model.half()
    model.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def holds_base(folder: str | Path) -> bool:
    """Whether a release's certificate lists a base model, which the folder then holds."""
    statement = _read_certificate(Path(folder))
    return statement is not None and f"{BASE_FOLDER}/{BASE_FILES[0]}" in statement.artefact_sha256


def load_base(folder: str | Path) -> nn.Module:
    """The base model in a release folder: float32, in evaluation mode, frozen.

    Raises
    ------
    InputError
        if there is none, or it is damaged.
    """
    try:
        return load_base_model(Path(folder) / BASE_FOLDER)
    except (OSError, SafetensorError, LookupError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"the base model in {str(folder)!r} is missing or damaged ({type(error).__name__}); see hyperdp verify"
        ) from error


def _members(adapter: Adapter, class_names: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Folder of each different adapter of a release -> its place among the members, and how many of them it is.

    One a class is the rule; a class that is a mixture (`hyperdp_lib.cells`) has parts.
    """
    each = adapter.num_adapters // len(class_names)
    found: dict[str, tuple[int, int]] = {}
    for number, name in enumerate(class_names):
        where = f"classes/{name}" if name else ""
        starts = [i for i in range(number * each, (number + 1) * each) if i % each == 0 or not _same(adapter, i - 1, i)]
        for part, (start, end) in enumerate(itertools.pairwise([*starts, (number + 1) * each]), 1):
            inside = f"part_{part:02}" if len(starts) > 1 else ""
            found["/".join(filter(None, (where, inside)))] = (start, end - start)
    return found


def _same(adapter: Adapter, i: int, j: int) -> bool:
    return all(torch.equal(factor[i], factor[j]) for factor in adapter.parameters())


def load_release(folder: str | Path, base_model: nn.Module | None = None) -> Release:
    """Inverse of `save_release`, for the base model it was made for: by default the one in the folder.

    It reads what the certificate lists; whether that is what was released is the question of `verification.verify`.

    Raises
    ------
    InputError
        if a file is missing or damaged, or the release is for another base model.
    """
    folder = Path(folder)
    statement = _read_certificate(folder)
    if statement is None:
        raise InputError(f"no release in {str(folder)!r}: give the --out folder of hyperdp release.")
    try:
        noisy_sum = from_safetensors(read_regular(folder / EMBEDDING_FILE, MOST_BYTES))[EMBEDDING_TENSOR]
    except (OSError, KeyError, SafetensorError) as error:
        raise InputError(f"{EMBEDDING_FILE} in {str(folder)!r} is missing or damaged; see hyperdp verify") from error
    base_model = load_base(folder) if base_model is None else base_model
    return Release(_adapters(folder, statement, base_model), statement, noisy_sum, base_model)


def load_adapters(folder: str | Path, base_model: nn.Module) -> Adapter:
    """The adapters of a release, one for each class; or a plain PEFT folder's, if there is no certificate in it.

    Raises
    ------
    InputError
        if the folder cannot be read, or is for another base model.
    """
    return _adapters(Path(folder), _read_certificate(Path(folder)), base_model)


def _adapters(folder: Path, statement: Certificate | None, base_model: nn.Module) -> Adapter:
    names = folder_names(statement.class_names) if statement else ()
    expected = statement.base_model_sha256 if statement else None
    if expected is not None and expected != tensors_sha256(base_model.state_dict()):
        raise InputError(f"{str(folder)!r} is for another base model; name its weights with --weights")
    if statement and PARTS_FILE in statement.artefact_sha256:
        return _load_parts(folder, names, base_model)
    if os.path.lexists(folder / PARTS_FILE):
        raise InputError(f"no certificate lists the {PARTS_FILE} in {str(folder)!r}; see hyperdp verify")
    if not names:
        return load_adapter(folder, base_model)
    return concatenate([load_adapter(folder / "classes" / name, base_model) for name in names], names)


def _load_parts(folder: Path, class_names: Sequence[str], base_model: nn.Module) -> Adapter:
    """Mixtures: every part as often as the file says, the same number for each class."""
    places = {f"classes/{name}" if name else "": name for name in class_names or ("",)}
    try:
        shares = strict_json.loads(read_regular(folder / PARTS_FILE, MOST_BYTES).decode("utf-8"))
        found: dict[str, list[tuple[str, int]]] = {place: [] for place in places}
        for where, count in shares.items():
            place, _, part = where.rpartition("/")
            whole = where in places
            if not (whole or (place in places and re.fullmatch(r"part_\d\d", part))) or type(count) is not int:
                raise ValueError(f"{where!r} is no part of this release")
            found[where if whole else place].append((where, count))
        sizes = {sum(count for _, count in parts) for parts in found.values()}
        if len(sizes) != 1 or not 1 <= min(sizes) <= MOST_PARTS or min(shares.values()) < 1:
            raise ValueError("its numbers do not add up to the same for each class")
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise InputError(f"{PARTS_FILE} in {str(folder)!r} is damaged ({error}); see hyperdp verify") from error
    members: list[Adapter] = []
    for where, count in itertools.chain(*found.values()):
        members += [load_adapter(folder / where, base_model)] * count
    (size,) = sizes
    return concatenate(members, [f"{name}/{i}" for name in places.values() for i in range(1, size + 1)])


def _read_certificate(folder: Path) -> Certificate | None:
    path = folder / CERTIFICATE_FILE
    if not path.is_file():
        return None
    try:
        return Certificate.from_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{CERTIFICATE_FILE} in {str(folder)!r} {error}; see hyperdp verify") from error


def _write_samples(
    path: Path, adapter: Adapter, class_names: Sequence[str], base_model: nn.Module, num_samples: int
) -> None:
    """A sheet with one row a class (or ten columns); the samples are post-processing, their seed is of no matter."""
    classes = len(class_names) or 1
    share = max(1, num_samples // classes)
    images = diffusion.sample_classes(base_model, adapter, classes, share, generator=torch.Generator().manual_seed(0))
    if not class_names:
        save_grid(path, ImageSet(images), rows=-(-share // 10))
    else:
        owner = torch.arange(classes).repeat_interleave(share)
        save_grid(path, ImageSet(images, owner, tuple(class_names)), columns=share)


def model_card(statement: Certificate, lora_config: Any, base_model: nn.Module, where: str) -> str:
    """Text of README.md. Its first line is the certificate's sentence; the code in it needs diffusers and PEFT only.

    The code runs in the release folder. ``where`` is the adapter's folder in it, such as ``classes/3/part_02``.
    """
    folders, what = where.split("/"), "one unlabelled data set"
    if statement.class_names:
        what = f"class `{folders[1]}` of {len(statement.class_names)}"
    if folders[-1].startswith("part_"):
        what += f"; one part of a mixture, in the proportions of `{PARTS_FILE}`"
    where = where or "."
    shape: Any = base_model.config
    channels, size = shape.in_channels, shape.sample_size
    afterwards = "".join(f"\nAfter the release: {note}." for note in statement.post_processing)
    told = "".join(
        f"\n- {'measured' if entry.private else 'declared public'}: {entry.description}" for entry in statement.ledger
    )
    if statement.num_rows and statement.dimension:
        told += f"\n- what was decoded: {statement.num_rows} x {statement.dimension} numbers, in `{EMBEDDING_FILE}`"
    return f"""{statement.sentence}

{statement.risk_sentence}

LoRA adapter (rank {lora_config.r}) for the diffusion model in `{BASE_FOLDER}`; {what}.
A hypernetwork trained on public data made it. Of the private images, the privacy ledger says:
{told}

`certificate.json` says exactly what was released; `hyperdp verify` recomputes it.{afterwards}

The code runs in the folder of the release, the one with `certificate.json` in it.

```python
import torch
from diffusers import {type(base_model).__name__}, FlowMatchEulerDiscreteScheduler
from peft import PeftModel

base = {type(base_model).__name__}.from_pretrained("{BASE_FOLDER}").float()
model = PeftModel.from_pretrained(base, {where!r}).eval()
scheduler = FlowMatchEulerDiscreteScheduler()
scheduler.set_timesteps(20)
x = torch.randn(16, {channels}, {size}, {size})
labels = torch.zeros(16, dtype=torch.long)
with torch.no_grad():
    for t in scheduler.timesteps:
        velocity = model(x, timestep=t.expand(16), class_labels=labels).sample
        x = scheduler.step(velocity, t, x).prev_sample
images = x.clamp(-1, 1)  # white on black, -1 is black
```
"""
