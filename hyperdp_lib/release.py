"""Private images in, adapter and certificate out: the one composition of embedding, mechanism and hypernetwork.

Private data is read in one place, the loop that feeds ``mechanism.noisy_sum``. Everything after it sees the noisy sum
only, and is therefore free of privacy cost.
"""

from __future__ import annotations

import copy
import itertools
import json
import os
import re
import shutil
import tempfile
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load as from_safetensors
from safetensors.numpy import save as to_safetensors
from torch import Tensor, nn

from hyperdp_lib import accounting, certificate, looks, mechanism, strict_json
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
from hyperdp_lib.data import ImageSet, InputError, check_model_range, save_grid
from hyperdp_lib.diffusion import load_base_model, sample_classes
from hyperdp_lib.embedding import embed_rows
from hyperdp_lib.hypernetwork import HyperNetwork
from hyperdp_lib.ledger import LedgerEntry

MOST_BYTES = 2**30  # of one file that is read back


class Release(NamedTuple):
    """What leaves the private side: the adapter, its certificate, and the noisy sum (K, k) it was decoded from.

    The noisy sum is as public as the adapter: a better hypernetwork decodes it again at no further privacy cost.
    """

    adapter: Adapter
    certificate: Certificate
    noisy_sum: np.ndarray


def release(
    private_images: Tensor,
    hypernetwork: HyperNetwork,
    *,
    epsilon: float | None = None,
    delta: float = 1e-5,
    noise_multiplier: float | None = None,
    neighboring_relation: str = "add_or_remove_one",
    private_labels: Tensor | None = None,
    class_names: Sequence[str] | None = None,
    ledger: Sequence[LedgerEntry] = (),
    declared_size: float | None = None,
    seed: int | None = None,
    batch_size: int = 1024,
) -> Release:
    """Turn private images into one adapter (or one a class) with one noisy sum, or with two looks.

    Parameters
    ----------
    private_images : (N, C, H, W) float in [-1, 1], the size of the base model.
    hypernetwork : public, see ``load_pretrained``.
    epsilon, noise_multiplier : exactly one of them; the noise multiplier is sigma over sensitivity.
    delta : of (epsilon, delta)-differential privacy, in (0, 1).
    neighboring_relation : ``add_or_remove_one`` (the number of images stays secret), ``replace_one``, ``zero_out``.
    private_labels : (N,) in 0..K-1, with ``class_names`` (public) of length K; one adapter a class.
    ledger : what was spent on the same images before, or declared public of them; the certificate's epsilon covers all.
    declared_size : number of images, about, as declared public. If given, two looks share the budget, see `looks`.
    seed : None for secret noise from the operating system. A number makes reproducible noise, for books and tests, and
        everything made with it is stamped as not private. ``epsilon=math.inf`` (no noise) needs a seed.

    Raises
    ------
    InputError
        before anything is drawn, if an argument is out of range or the images are not what the model expects.

    Examples
    --------
    >>> base_model, hypernetwork = load_pretrained("glyphs")  # doctest: +SKIP
    >>> adapter, certificate, noisy_sum = release(private_images, hypernetwork, epsilon=1.0)  # doctest: +SKIP
    """
    if (epsilon is None) == (noise_multiplier is None):
        raise InputError("give exactly one of epsilon and noise_multiplier")
    _check_images(private_images, hypernetwork)
    names = _check_labels(private_images, private_labels, class_names)
    encoder = hypernetwork.encoder
    rows = None if private_labels is None else private_labels.cpu().numpy()
    sums: dict[str, Any] = dict(
        dimension=encoder.config.dimension, num_rows=max(1, len(names)), neighboring_relation=neighboring_relation
    )

    def state(config: mechanism.GaussianSum, spent: Sequence[LedgerEntry], **fields: Any) -> Certificate:
        return certificate.gaussian_certificate(
            config,
            delta,
            seeded=seed is not None,
            ledger=spent,
            epsilon=epsilon,
            num_private=len(private_images),
            class_names=names,
            encoder_sha256=tensors_sha256(encoder.state_dict()),
            hypernetwork_sha256=tensors_sha256(hypernetwork.decoder_state()),
            base_model_sha256=hypernetwork.base_model_sha256,
            **fields,
        )

    try:
        if epsilon is not None:
            noise_multiplier = accounting.noise_multiplier(epsilon, delta)
        assert noise_multiplier is not None  # one of the two is given
        if declared_size is None:
            config = mechanism.GaussianSum(noise_multiplier=noise_multiplier, **sums)
            statement = state(config, ledger)
            batches = embed_rows(encoder, private_images, rows, batch_size=batch_size)
            noisy_sum = mechanism.noisy_sum(batches, config, seed=seed)
        else:
            spent = looks.declared(ledger, declared_size)
            state(mechanism.GaussianSum(noise_multiplier=noise_multiplier, **sums), spent)  # refuses before it is read
            noisy_sum, first, config = looks.look_twice(
                private_images,
                rows,
                hypernetwork,
                noise_multiplier=noise_multiplier,
                num_rows=sums["num_rows"],
                declared_size=declared_size,
                neighboring_relation=neighboring_relation,
                seed=seed,
                batch_size=batch_size,
            )
            statement = state(config, (*spent, looks.charge(first, delta)), description=looks.SECOND)
    except ValueError as error:
        raise error if isinstance(error, InputError) else InputError(str(error)) from error
    return Release(decode(noisy_sum, config.noise_std, hypernetwork, names), statement, noisy_sum)


@torch.no_grad()
def decode(
    noisy_sum: np.ndarray, noise_std: float, hypernetwork: HyperNetwork, class_names: Sequence[str] = ()
) -> Adapter:
    """Adapter from a released noisy sum (K, k): post-processing, for any hypernetwork of the same encoder."""
    device = next(hypernetwork.parameters()).device
    sums = torch.from_numpy(np.asarray(noisy_sum)).to(device, torch.float32)
    return hypernetwork(sums, noise_std, tuple(class_names) or ("adapter",)).detach()


def _check_images(private_images: Tensor, hypernetwork: HyperNetwork) -> None:
    config = hypernetwork.encoder.config
    expected = (config.channels, config.image_size, config.image_size)
    if private_images.ndim != 4 or tuple(private_images.shape[1:]) != expected:
        raise InputError(
            f"images must have shape (N, {', '.join(map(str, expected))}): use data.load_images to make them so"
        )
    check_model_range(private_images, "images")


def _check_labels(
    private_images: Tensor, private_labels: Tensor | None, class_names: Sequence[str] | None
) -> tuple[str, ...]:
    if private_labels is None:
        if class_names:
            raise InputError("class_names are given but private_labels are not: give both or neither")
        return ()
    if not class_names:
        raise InputError(
            "private_labels need class_names: which classes exist is public and must be declared"
        )
    if private_labels.shape != (len(private_images),):
        raise InputError("private_labels must hold one label for each image")
    if len({unicodedata.normalize("NFC", name) for name in class_names}) != len(class_names):
        raise InputError("class_names must all be different")
    return _folder_names(class_names)


def _folder_names(class_names: Sequence[str]) -> tuple[str, ...]:
    """Class names, which become folders of a release: none may lead elsewhere, also not one from a certificate."""
    for name in class_names:
        if not name or name.startswith(".") or any(c in name for c in "/\\:\0"):
            raise InputError(f"the class name {name!r} cannot be a folder name: rename the class")
    return tuple(class_names)


def save_release(
    folder: str | Path,
    released: Release,
    base_model: nn.Module,
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
        if the folder exists and ``overwrite`` is False, or if ``base_model`` is not the one of the release.
    """
    folder = Path(folder)
    if folder.exists() and not overwrite:
        raise InputError(f"{str(folder)!r} exists: choose another --out, or --overwrite")
    _folder_names(released.certificate.class_names)
    if released.certificate.base_model_sha256 not in (None, tensors_sha256(base_model.state_dict())):
        raise InputError("the base model is not the one that the release was made for")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    adapter, statement, noisy_sum = released
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

    It reads what the certificate lists; whether that is what was released is the question of `certificate.verify`.

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
    return Release(_adapters(folder, statement, base_model), statement, noisy_sum)


def class_names_of(adapter: Adapter) -> tuple[str, ...]:
    """The classes of loaded adapters, whose members are ``3``, or ``3/1`` to ``3/20`` where a class is a mixture."""
    return tuple(dict.fromkeys(name.split("/")[0] for name in adapter.names))


def load_adapters(folder: str | Path, base_model: nn.Module) -> Adapter:
    """The adapters of a release, one for each class; or a plain PEFT folder's, if there is no certificate in it.

    Raises
    ------
    InputError
        if the folder cannot be read, or is for another base model.
    """
    return _adapters(Path(folder), _read_certificate(Path(folder)), base_model)


def _adapters(folder: Path, statement: Certificate | None, base_model: nn.Module) -> Adapter:
    names = _folder_names(statement.class_names) if statement else ()
    expected = statement.base_model_sha256 if statement else None
    if expected is not None and expected != tensors_sha256(base_model.state_dict()):
        raise InputError(f"{str(folder)!r} is for another base model; name its hypernetwork with --hypernetwork")
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
    images = sample_classes(base_model, adapter, classes, share, generator=torch.Generator().manual_seed(0))
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
