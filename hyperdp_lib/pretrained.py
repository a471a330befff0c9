"""Trained public weights on disk: where they are, what images they are for, and how they are read and written.

A folder holds a base model (diffusers), encoder and hypernetwork (safetensors, half precision), a manifest, and what
the public training measured on its tasks: priors, cells, a feature network for scores.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from hyperdp_lib.artefacts import tensors_sha256
from hyperdp_lib.data import InputError
from hyperdp_lib.diffusion import load_base_model
from hyperdp_lib.embedding import Encoder, EncoderConfig, FeatureNetwork
from hyperdp_lib.hypernetwork import HyperNetwork, HyperNetworkConfig
from hyperdp_lib.nested import NestedEncoder, NestedHyperNetwork

WEIGHTS = Path(__file__).parent / "weights"
NON_COMMERCIAL = ("photographs", "photographs-latent")  # in the repository, not in the package
PRIORS_FILE = "priors.safetensors"  # of means of public data sets, see hyperdp_lib.prior
COPIES_FILE = "public_images.safetensors"  # hashes of the public images, where they were one's own
CELLS_FILE = "cells.safetensors"  # centroids, see hyperdp_lib.cells


def save_pretrained(folder: Path, base_model: nn.Module, hypernetwork: HyperNetwork, manifest: dict) -> None:
    """Write base model (diffusers folder), encoder and hypernetwork (safetensors, half precision) and the manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    halved: Any = copy.deepcopy(base_model).half()
    halved.save_pretrained(folder / "base")
    for name, state in (("encoder", hypernetwork.encoder.state_dict()), ("hypernetwork", hypernetwork.decoder_state())):
        write_half(folder / f"{name}.safetensors", state)
    shapes = {"encoder": asdict(hypernetwork.encoder.config), "hypernetwork": asdict(hypernetwork.config)}
    (folder / "manifest.json").write_text(json.dumps({**shapes, **manifest}, indent=2) + "\n")


def image_hashes(levels: Tensor) -> np.ndarray:
    """Hashes (N,) int64 of images (N, C, H, W) uint8: the same for the same pixels, and by chance hardly ever.

    >>> import torch
    >>> one = torch.zeros(1, 1, 2, 2, dtype=torch.uint8)
    >>> len(set(image_hashes(torch.cat([one, one, one + 1])).tolist()))
    2
    """
    rows = (hashlib.blake2b(image.tobytes(), digest_size=8).digest() for image in levels.contiguous().numpy())
    return np.frombuffer(b"".join(rows), dtype="<i8").astype(np.int64)


def write_half(path: Path, state: Mapping[str, Tensor]) -> None:
    """Weights in half precision, as safetensors."""
    half = {key: value.detach().cpu().half().contiguous() for key, value in state.items()}
    path.write_bytes(to_safetensors(half))


def read_half(path: Path) -> dict[str, Tensor]:
    """Inverse of `write_half`, in float32."""
    return {key: value.float() for key, value in load_file(str(path)).items()}


def resolve(name_or_path: str | Path, weights: str = "hypernetwork.safetensors") -> Path:
    """The folder of shipped weights called ``name``, or the given folder itself, if it holds the file ``weights``."""
    for folder in (WEIGHTS / str(name_or_path), Path(name_or_path), Path(name_or_path) / "weights"):  # of a training
        if (folder / "manifest.json").is_file() and (folder / weights).is_file():
            return folder
    if str(name_or_path) in NON_COMMERCIAL:
        raise InputError(
            f"the weights {str(name_or_path)!r} are for non-commercial research only (ImageNet's terms) and not in the "
            f"package: take hyperdp_lib/weights/{name_or_path} from the source repository and give that folder."
        )
    shipped = ", ".join(sorted(p.parent.name for p in WEIGHTS.glob(f"*/{weights}"))) or "none"
    raise InputError(
        f"no {weights.removesuffix('.safetensors')} {str(name_or_path)!r}: shipped are {shipped}, "
        "or give a folder of trained weights."
    )


def geometry(name_or_path: str | Path) -> tuple[int, int]:
    """Side in pixels and number of channels of the images that these weights are for, without loading them.

    >>> geometry("glyphs")
    (16, 1)
    """
    folder = foundation(resolve(name_or_path))
    try:
        config = json.loads((folder / "base" / "config.json").read_text(encoding="utf-8"))
        return int(config["sample_size"]), int(config["in_channels"])
    except (OSError, LookupError, TypeError, ValueError) as error:
        raise InputError(f"the models in {str(folder)!r} are damaged ({type(error).__name__}): train again") from error


def stretches(name_or_path: str | Path) -> bool:
    """Whether images are read for these weights with their contrast stretched, see `hyperdp_lib.data.stretched`.

    >>> stretches("glyphs")
    False
    """
    manifest = json.loads((foundation(resolve(name_or_path)) / "manifest.json").read_text(encoding="utf-8"))
    return bool((manifest.get("public_source") or {}).get("stretch", False))


def shipped() -> tuple[str, ...]:
    """Names of the shipped weights that have a base model of their own, in alphabetical order."""
    folders = sorted(path.parent for path in WEIGHTS.glob("*/hypernetwork.safetensors"))
    return tuple(folder.name for folder in folders if (folder / "base").is_dir())


def foundation(folder: Path) -> Path:
    """The folder with the base model and the feature network that weights were made for: their own, or another's."""
    manifest = json.loads((folder / "manifest.json").read_text())
    return WEIGHTS / manifest["builds_on"] if "builds_on" in manifest else folder


@dataclass(frozen=True, eq=False)
class Weights:
    """Everything public that a release needs: base model, and hypernetwork with its encoder and prior.

    Attributes
    ----------
    base_model
        A diffusers model.
    hypernetwork : HyperNetwork
        For ``base_model``.
    name : str
        Under which name or path they were loaded.
    paper : str or None
        Weights for the paper's one sum, if they are others.
    """

    base_model: nn.Module
    hypernetwork: Any
    name: str = "custom"
    paper: str | None = None

    @functools.cached_property
    def one_sum(self) -> HyperNetwork:
        """The hypernetwork for the paper's method: it reads all coordinates of one sum."""
        device = str(next(self.hypernetwork.parameters()).device)
        return self.hypernetwork if self.paper is None else load_pretrained(self.paper, device)[1]


def load_weights(name_or_path: str | Path = "glyphs", device: str = "cpu") -> Weights:
    """The best `Weights` of a name (``glyphs``, ``drawings``, ...) or folder; frozen, float32, in evaluation mode.

    Raises
    ------
    InputError
        if there are none, or they are damaged.

    Examples
    --------
    >>> load_weights("glyphs").hypernetwork.encoder.config.image_size
    16
    """
    name = str(name_or_path)
    best = best_name(name)
    return Weights(*load_pretrained(best, device), name, name if best != name else None)


def best_name(name: str) -> str:
    """The shipped weights that are meant by a name: those with nested coordinates, if there are two of that name.

    >>> best_name("glyphs"), best_name("drawings")
    ('glyphs-nested', 'drawings')
    """
    return f"{name}-nested" if (WEIGHTS / f"{name}-nested" / "manifest.json").is_file() else name


def features_file(name_or_path: str | Path = "glyphs") -> Path:
    """Where the feature network is that scores samples of these weights; see `embedding.FeatureNetwork`."""
    return foundation(resolve(name_or_path)) / "features.safetensors"


def load_pretrained(name_or_path: str | Path = "glyphs", device: str = "cpu") -> tuple[nn.Module, HyperNetwork]:
    """Base model and hypernetwork, frozen, float32, in evaluation mode.

    >>> base_model, hypernetwork = load_pretrained("glyphs")  # doctest: +SKIP
    """
    folder = resolve(name_or_path)
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        base_model = load_base_model(foundation(folder) / "base")
        hypernetwork = _load(folder, base_model, manifest)
        if (folder / PRIORS_FILE).is_file():
            hypernetwork.priors = load_file(str(folder / PRIORS_FILE))
    except (SafetensorError, OSError, LookupError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"the models in {str(folder)!r} are damaged ({type(error).__name__}): train again") from error
    hypernetwork.base_model_sha256 = tensors_sha256(base_model.state_dict())
    return base_model.to(device), hypernetwork.to(device).eval().requires_grad_(False)


def _load(folder: Path, base_model: nn.Module, manifest: dict) -> HyperNetwork:
    if manifest.get("kind") == "nested":
        return _load_nested(folder, base_model, manifest)
    encoder = Encoder(EncoderConfig(**manifest["encoder"]))
    encoder.load_state_dict(read_half(folder / "encoder.safetensors"))
    hypernetwork = HyperNetwork(encoder, base_model, HyperNetworkConfig(**manifest["hypernetwork"]))
    state = read_half(folder / "hypernetwork.safetensors")
    hypernetwork.load_state_dict(state | {f"encoder.{k}": v for k, v in encoder.state_dict().items()})
    return hypernetwork


def _load_nested(folder: Path, base_model: nn.Module, manifest: Mapping[str, Any]) -> NestedHyperNetwork:
    """The hypernetwork of nested coordinates in a folder; float32."""
    state = read_half(folder / "encoder.safetensors")
    encoder = Encoder(EncoderConfig(**manifest["encoder"]))
    features = FeatureNetwork(encoder.config.channels, encoder.config.image_size, name="codes")
    nested = NestedEncoder(encoder, features, state["centre"], state["projection"])
    nested.load_state_dict(state)
    network = NestedHyperNetwork(nested, base_model, HyperNetworkConfig(**manifest["hypernetwork"]))
    decoder = read_half(folder / "hypernetwork.safetensors")
    network.load_state_dict(decoder | {f"encoder.{k}": v for k, v in nested.state_dict().items()})
    network.table = {float(level): {int(k): v for k, v in row.items()} for level, row in manifest["table"].items()}
    if (folder / CELLS_FILE).is_file():
        network.centroids = read_half(folder / CELLS_FILE)
    return network
