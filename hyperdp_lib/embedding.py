"""Image -> vector of norm at most one: the only thing the mechanism ever sees of a private example.

The encoder is public: trained on public tasks, then frozen. It looks at one image at a time (GroupNorm, never batch
statistics), so an example's vector depends on that example alone. Coordinate 0 is the constant
``COUNT_COORDINATE``: its noisy sum is a noisy count, so that the number of private examples need not be public.

"On that example alone" has to hold to the last bit, since the mechanism's sensitivity is exact. Matrix products round
differently for different batch *sizes* (and numbers of threads), so removing one example would move the last digits of
others if it changed the size of their batch. The encoder therefore always sees batches of one size, the last filled
up with blank images. That a place within such a batch makes no difference is tested, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

COUNT_COORDINATE = 0.5
CHUNK = 128  # images the encoder runs on at a time, always exactly so many; see above


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
def embed_batches(encoder: Encoder, batches: Iterable[Tensor]) -> Iterator[np.ndarray]:
    """Stream: one array (B, k) of float32 per batch of images; memory does not grow with the number of images.

    Batches of any size B may come in; inside they are cut and filled up to ``CHUNK``.
    """
    encoder.eval()
    device = next(encoder.parameters()).device
    for images in batches:
        parts = []
        for chunk in images.to(device).split(CHUNK):
            padded = chunk.new_zeros(CHUNK, *chunk.shape[1:])
            padded[: len(chunk)] = chunk
            parts.append(encoder(padded)[: len(chunk)].cpu())
        yield torch.cat(parts).numpy()
