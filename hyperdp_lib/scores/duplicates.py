"""Are private images in the public data?  A research check: it reads private images and its numbers are not DP.

A guarantee for a private image is worth nothing if the same image is in the public data. So each private image is
compared with every public one, twice: by its pixels and by the features of a public network. Vectors are centred and
brought to length 1, so that brightness and contrast do not matter, and compared by Euclidean distance (0 the same, 2
opposite).

How near is a duplicate? The *threshold* is found on the private images themselves: a sample of them is copied with a
shift of half a pixel and noise of `COPY_NOISE` grey levels, and 95 copies in 100 are nearer to their originals than the
threshold. Simple drawings have such neighbours without being copied (one straight stroke is like another), which is why
every count stands beside its *control*: how many private images have another *private* image that near.

A *suspect* is within the threshold by every measure, has the same public neighbour by every measure, and that one is
much nearer than any other private image: at most `COPY_RATIO` times as far. The ratio was chosen by looking at pairs of
CIFAR-10 and Tiny-ImageNet, which share photographs: below it almost all pairs show the same one. A private image with
a near duplicate among the private images escapes this rule.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperdp_lib.data import InputError, resize, to_channels
from hyperdp_lib.embedding import FeatureNetwork
from hyperdp_lib.progress import progress_bar
from hyperdp_lib.scores.evaluation import NOT_DP

COPY_NOISE = 8.0  # grey levels of 255, standard deviation
QUANTILE = 0.95  # of the copies that the threshold lets through
SAMPLE = 5000  # private images that are copied, and compared with all other private ones
NUM_PAIRS = 10
COPY_RATIO = 0.8  # of the distances to the nearest public image and to the nearest other private one
_ROWS, _COLUMNS = 2000, 20_000  # of the similarities held at a time: 160 MB


@dataclass(frozen=True)
class Likeness:
    """One measure of likeness, all private images against all public ones.

    Attributes
    ----------
    measure
        ``"pixels"``, or the name of the feature network.
    threshold
        Distance in ``[0, 2]`` up to which an image counts as a near duplicate.
    matches
        Private images with a public image within the threshold.
    match_rate, control_rate
        Their share; and the share of (sampled) private images with another private image within the threshold.
    nearer_to_public
        Share of sampled private images whose nearest public image is nearer than their nearest other private one.
    median_to_public, median_to_private
        Median distance to the nearest public image, and to the nearest other private one.
    pairs
        The closest pairs: index of the private image, of the public one, distance; each public image once.
    """

    measure: str
    threshold: float
    matches: int
    match_rate: float
    control_rate: float
    nearer_to_public: float
    median_to_public: float
    median_to_private: float
    pairs: tuple[tuple[int, int, float], ...]


@dataclass(frozen=True)
class Check:
    """The result of `check`: a research metric, not DP.

    Attributes
    ----------
    num_public, num_private
        Images compared.
    image_size, channels
        What they were brought to for the pixels.
    likenesses
        One for each measure.
    matches_in_all
        Private images with a match by every measure.
    suspects
        Those of them that look like copies, as said above: index of the private image, of the public one.
    """

    num_public: int
    num_private: int
    image_size: int
    channels: int
    likenesses: tuple[Likeness, ...]
    matches_in_all: int
    suspects: tuple[tuple[int, int], ...]

    def to_plain(self) -> dict[str, Any]:
        """For JSON, with the label that every number about private images carries."""
        return {"label": NOT_DP, **asdict(self)}


def check(
    public_images: Tensor, private_images: Tensor, network: FeatureNetwork, *, seed: int = 0, progress: bool = False
) -> Check:
    """Compare every private image with every public one, by pixels and by features.

    Parameters
    ----------
    public_images, private_images
        ``(N, C, H, W)`` and ``(M, C, H, W)`` float32 in ``[-1, 1]``, of one size; M at least 2.
    network
        Public features; images are brought to its size and channels.
    seed
        Of the sample of private images, and of the noise of their copies.
    progress
        Show progress bars.

    Raises
    ------
    InputError
        When sizes differ or there are too few images.

    Examples
    --------
    >>> generator = torch.Generator().manual_seed(0)
    >>> public = torch.rand(30, 1, 16, 16, generator=generator) * 2 - 1
    >>> private = torch.rand(20, 1, 16, 16, generator=generator) * 2 - 1
    >>> private[7] = public[3]
    >>> found = check(public, private, FeatureNetwork())
    >>> found.likenesses[0].matches, found.likenesses[0].pairs[0][:2]
    (1, (7, 3))
    """
    if public_images.shape[1:] != private_images.shape[1:]:
        raise InputError(
            f"public images are {tuple(public_images.shape[1:])}, private ones {tuple(private_images.shape[1:])}: "
            "bring them to one size and number of channels"
        )
    if len(public_images) == 0 or len(private_images) < 2:
        raise InputError("a check for duplicates needs public images and at least two private ones")
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randperm(len(private_images), generator=generator)[:SAMPLE].sort().values
    copies = near_copies(private_images[sample], generator)
    centre, scale = _public_moments(network, public_images)

    def by_features(images: Tensor) -> Tensor:
        return F.normalize((_features(network, images) - centre) / scale, dim=1)

    measures: dict[str, Callable[[Tensor], Tensor]] = {"pixels": _by_pixels, network.name: by_features}
    likenesses, found = [], []
    for name, represent in measures.items():
        public, private, copied = (represent(images) for images in (public_images, private_images, copies))
        threshold = float((private[sample] - copied).norm(dim=1).quantile(QUANTILE))
        to_public, partner = nearest(private, public, progress=progress)
        to_private, _ = nearest(private[sample], private, own=sample, progress=progress)
        found.append((private, to_public, partner, threshold))
        likenesses.append(
            Likeness(
                measure=name,
                threshold=threshold,
                matches=int((to_public <= threshold).sum()),
                match_rate=_share(to_public <= threshold),
                control_rate=_share(to_private <= threshold),
                nearer_to_public=_share(to_public[sample] < to_private),
                median_to_public=float(to_public.median()),
                median_to_private=float(to_private.median()),
                pairs=_closest(to_public, partner),
            )
        )
    matched = torch.stack([to_public <= threshold for _, to_public, _, threshold in found]).all(0).nonzero()[:, 0]
    partners = torch.stack([partner[matched] for *_, partner, _ in found])
    suspect = (partners == partners[0]).all(0)
    for private, to_public, *_ in found:
        to_private, _ = nearest(private[matched], private, own=matched, progress=progress)
        suspect &= to_public[matched] <= COPY_RATIO * to_private
    pairs = torch.stack([matched[suspect], partners[0][suspect]], 1)
    return Check(
        num_public=len(public_images),
        num_private=len(private_images),
        image_size=public_images.shape[-1],
        channels=public_images.shape[1],
        likenesses=tuple(likenesses),
        matches_in_all=len(matched),
        suspects=tuple((int(private), int(public)) for private, public in pairs),
    )


def _share(which: Tensor) -> float:
    return float(which.double().mean())


def near_copies(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images as another program might have stored them: shifted by half a pixel, rescaled in contrast, and noisy.

    Examples
    --------
    >>> near_copies(torch.zeros(2, 3, 8, 8), torch.Generator().manual_seed(0)).shape
    torch.Size([2, 3, 8, 8])
    """
    padded = F.pad(images, (0, 1, 0, 1), mode="replicate")
    shifted = F.avg_pool2d(padded, 2, stride=1)  # the mean of four neighbours lies between them
    noise = torch.randn(images.shape, generator=generator) * (COPY_NOISE / 127.5)
    return (0.9 * shifted + noise).clamp(-1.0, 1.0)


def nearest(
    rows: Tensor, others: Tensor, *, own: Tensor | None = None, progress: bool = False
) -> tuple[Tensor, Tensor]:
    """Distance to, and index of, the nearest of ``others`` for each of ``rows``, all of length 1.

    Parameters
    ----------
    rows, others
        ``(N, d)`` and ``(M, d)`` float32 unit vectors.
    own
        ``(N,)``: the row of ``others`` that is the row itself, and does not count.

    Returns
    -------
    Tensor
        ``(N,)`` Euclidean distances in ``[0, 2]``.
    Tensor
        ``(N,)`` indices into ``others``.

    Examples
    --------
    >>> nearest(torch.eye(2), torch.tensor([[0.0, 1.0], [-1.0, 0.0]]))
    (tensor([1.4142, 0.0000]), tensor([0, 0]))
    """
    index = torch.empty(len(rows), dtype=torch.long)
    starts = range(0, len(rows), _ROWS)
    for start in progress_bar(starts, desc="comparing", show=progress):
        part = slice(start, start + _ROWS)
        best = torch.full((len(rows[part]),), -torch.inf)
        for offset in range(0, len(others), _COLUMNS):
            similarity = rows[part] @ others[offset : offset + _COLUMNS].T
            if own is not None:
                inside = (own[part] >= offset) & (own[part] < offset + _COLUMNS)
                similarity[inside.nonzero()[:, 0], own[part][inside] - offset] = -torch.inf
            value, column = similarity.max(1)
            better = value > best
            best[better] = value[better]
            index[part][better] = column[better] + offset
    # from the difference, not from the similarity: 2 - 2 s has no digits left where it matters
    parts = zip(rows.split(_ROWS), index.split(_ROWS), strict=True)
    return torch.cat([(part - others[partners]).norm(dim=1) for part, partners in parts]), index


def _by_pixels(images: Tensor) -> Tensor:
    flat = images.flatten(1)
    return F.normalize(flat - flat.mean(1, keepdim=True), dim=1)


@torch.no_grad()
def _features(network: FeatureNetwork, images: Tensor) -> Tensor:
    parts = []
    for batch in images.split(500):
        parts.append(network(resize(to_channels(batch, network.channels), network.image_size)))
    return torch.cat(parts)


def _public_moments(network: FeatureNetwork, public_images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each feature over public images: what makes features comparable."""
    public = _features(network, public_images)
    return public.mean(0), public.std(0, correction=0).clamp(min=1e-6)


def _closest(distances: Tensor, partner: Tensor) -> tuple[tuple[int, int, float], ...]:
    pairs: dict[int, tuple[int, int, float]] = {}
    for i in distances.argsort().tolist():
        pairs.setdefault(int(partner[i]), (i, int(partner[i]), float(distances[i])))
        if len(pairs) == NUM_PAIRS:
            break
    return tuple(pairs.values())
