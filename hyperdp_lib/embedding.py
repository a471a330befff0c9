"""Image -> vector of norm at most one: the only thing the mechanism ever sees of a private example.

The encoder is public: trained on public tasks, then frozen. It looks at one image at a time (GroupNorm, never batch
statistics), so an example's vector depends on that example alone. Coordinate 0 is the constant
``COUNT_COORDINATE``: its noisy sum is a noisy count, so that the number of private examples need not be public.

"On that example alone" has to hold to the last bit, since the mechanism's sensitivity is exact. Matrix products round
differently for different batch *sizes*, so removing one example would move the last digits of others if it changed the
size of their batch: `in_batches` makes all batches of one size, the last filled up with blank images. With some numbers
of threads they also round differently in different *places* of a batch, so removing one example would move the digits
of those after it: `fair_size` finds out, with public images, and where it is so every image is a batch of its own.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from hyperdp_lib.data import InputError

COUNT_COORDINATE = 0.5
CHUNK = 128  # images the encoder runs on at a time, where places do not matter; see above
_fair_sizes: weakref.WeakKeyDictionary[nn.Module, dict[tuple[object, ...], int]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class EncoderConfig:
    """Architecture of the encoder (public). ``dimension`` is k, the count coordinate included."""

    dimension: int = 64
    image_size: int = 16
    channels: int = 1
    width: int = 32
    count_coordinate: float = COUNT_COORDINATE


class Encoder(nn.Module):
    """Small convolutional network; output (N, k) with coordinate 0 = 0.5 and L2 norm exactly 1 up to rounding.

    >>> Encoder(EncoderConfig(dimension=8))(torch.zeros(3, 1, 16, 16)).shape
    torch.Size([3, 8])
    """

    def __init__(self, config: EncoderConfig | None = None) -> None:
        super().__init__()
        self.config = config = EncoderConfig() if config is None else config
        w = config.width

        def block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
            return [nn.Conv2d(inputs, outputs, 3, stride, 1), nn.GroupNorm(8, outputs), nn.GELU()]

        self.convolutions = nn.Sequential(
            *block(config.channels, w, 1),
            *block(w, 2 * w, 2),
            *block(2 * w, 2 * w, 1),
            *block(2 * w, 4 * w, 2),
        )
        side = config.image_size // 4
        self.head = nn.Sequential(
            nn.Flatten(),
            nn.Linear(4 * w * side * side, 8 * w),
            nn.GELU(),
            nn.Linear(8 * w, config.dimension - 1),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Embed images (N, C, H, W) in [-1, 1] -> (N, k)."""
        direction = F.normalize(self.head(self.convolutions(images)), dim=1, eps=1e-6)
        constant = self.config.count_coordinate
        count = torch.full_like(direction[:, :1], constant)
        return torch.cat([count, direction * (1 - constant**2) ** 0.5], 1)


class FeatureNetwork(nn.Module):
    """Small convolutional feature extractor, trained on public images only and shipped with the library.

    No layer looks across the batch (GroupNorm, no BatchNorm, no dropout), so the features of an image do not
    depend on its neighbours.

    Parameters
    ----------
    channels : int
        Image channels C.
    image_size : int
        Height and width H = W in pixels, a multiple of 4.
    dimension : int
        Number of features.
    name : str
        Printed beside every score made with this network.

    Examples
    --------
    >>> network = FeatureNetwork()
    >>> network(torch.zeros(3, 1, 16, 16)).shape
    torch.Size([3, 64])
    >>> network.name
    'glyphnet'
    """

    def __init__(
        self, channels: int = 1, image_size: int = 16, dimension: int = 64, name: str = "glyphnet"
    ) -> None:
        super().__init__()
        if image_size % 4:
            raise InputError(f"image_size must be a multiple of 4, got {image_size}: resize first.")
        self.channels, self.image_size, self.dimension, self.name = channels, image_size, dimension, name
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.SiLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.GroupNorm(8, 64), nn.SiLU(),
            nn.Conv2d(64, 64, 3, padding=1), nn.GroupNorm(8, 64), nn.SiLU(),
            nn.Conv2d(64, 128, 3, stride=2, padding=1), nn.GroupNorm(8, 128), nn.SiLU(),
            nn.Flatten(), nn.Linear(128 * (image_size // 4) ** 2, dimension),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        """Features ``(N, dimension)`` of ``images`` ``(N, C, H, W)`` in [-1, 1]."""
        expected = (self.channels, self.image_size, self.image_size)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise InputError(
                f"{self.name} reads images of shape (N, {', '.join(map(str, expected))}), "
                f"got {tuple(images.shape)}: resize or convert them first."
            )
        return self.layers(images)

    def save(self, path: str | Path, dtype: torch.dtype = torch.float16) -> None:
        """Write weights (half precision by default) and architecture to one safetensors file."""
        state = self.state_dict()
        tensors = {key: value.detach().to("cpu", dtype).contiguous() for key, value in state.items()}
        shape = {key: getattr(self, key) for key in ("channels", "image_size", "dimension", "name")}
        # One entry only: safetensors writes several in random order, and the same network should give the same bytes.
        # Written by us: safetensors makes files that only their owner may read.
        content = to_safetensors(tensors, metadata={"feature_network": json.dumps(shape)})
        Path(path).write_bytes(content)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> FeatureNetwork:
        """Read a file written by `save`; float32, evaluation mode, frozen."""
        if not Path(path).is_file():
            raise InputError(f"no feature network at {path}: give the path of a features.safetensors file.")
        try:
            with safe_open(str(path), framework="pt") as file:
                tensors = {key: file.get_tensor(key).float() for key in file.keys()}
                network = cls(**json.loads((file.metadata() or {})["feature_network"]))
            network.load_state_dict(tensors)
        except (SafetensorError, LookupError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(
                f"{path} is not a feature network ({type(error).__name__}): it was not written by FeatureNetwork.save."
            ) from error
        return network.eval().requires_grad_(False)


@torch.no_grad()
def embed(encoder: Encoder, images: Tensor, *, batch_size: int = 1024) -> Tensor:
    """Embeddings (N, k) of images (N, C, H, W), in evaluation mode, on the encoder's device; returned on the CPU."""
    batches = [torch.from_numpy(e) for e in embed_batches(encoder, images.split(batch_size))]
    return torch.cat(batches) if batches else torch.empty(0, encoder.config.dimension)


def embed_rows(
    encoder: Encoder, private_images: Tensor, private_rows: np.ndarray | None = None, *, batch_size: int = 1024
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """What `mechanism.noisy_sum` reads: embeddings (B, k) with the row each belongs to (B,), batch by batch."""
    starts = range(0, len(private_images), batch_size)
    codes = embed_batches(encoder, (private_images[i : i + batch_size] for i in starts))
    for i, batch in zip(starts, codes, strict=True):
        yield batch, None if private_rows is None else private_rows[i : i + batch_size]


@torch.no_grad()
def embed_batches(encoder: nn.Module, batches: Iterable[Tensor]) -> Iterator[np.ndarray]:
    """Stream: one array (B, k) of float32 per batch of images; memory does not grow with the number of images.

    Batches of any size B may come in; inside they are cut and filled up.
    """
    encoder.eval()
    device = next(encoder.parameters()).device
    # of an encoder that chooses, what it chooses by: a choice hides small differences until there is a tie
    weighed = getattr(encoder, "weighed", encoder)
    known = _fair_sizes.setdefault(encoder, {})
    for images in batches:
        key = (*images.shape[1:], device, torch.get_num_threads())
        if key not in known:
            known[key] = fair_size(lambda batch: weighed(batch.to(device)), images.shape[1:])
        yield in_batches(lambda batch: encoder(batch.to(device)), images, size=known[key]).numpy()


@torch.no_grad()
def fair_size(function: Callable[[Tensor], Tensor], shape: Iterable[int], size: int = CHUNK) -> int:
    """``size``, if a function of so many images gives an image the same bits in every place; otherwise 1.

    Tried with four public images, each in all places at once. On a processor whose matrix products depend on the place,
    every one of them shows it, in dozens of coordinates.

    Parameters
    ----------
    function : (B, C, H, W) -> (B, ...)
        Continuous in the image: rounding that sways a choice, as of a cell, has to be in what it returns.
    shape : (C, H, W)
    """
    for image in torch.rand(4, 1, *shape, generator=torch.Generator().manual_seed(0)) * 2 - 1:
        rows = function(image.repeat(size, 1, 1, 1))
        if not torch.equal(rows, rows[:1].expand_as(rows)):
            return 1
    return size


@torch.no_grad()
def in_batches(function: Callable[..., Tensor], *columns: Tensor, size: int) -> Tensor:
    """A function of examples, each (N, ...) of ``columns``, in batches of exactly ``size``; on the CPU.

    The last batch is filled up with zeros, and each is in memory of its own: products round by address, too.
    """
    parts = []
    if len({len(column) for column in columns}) != 1:
        raise ValueError("columns must have as many rows each")
    for start in range(0, max(1, len(columns[0])), size):  # of no examples, too, the result has its shape
        batch = []
        for column in columns:
            part = column[start : start + size].cpu()
            batch.append(part.new_zeros(size, *part.shape[1:]))
            batch[-1][: len(part)] = part
        parts.append(function(*batch)[: len(part)].cpu())
    return torch.cat(parts)
