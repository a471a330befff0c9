r"""The rival: noisy moments of public perceptual features, released once, and a generator fitted to them.

DP-MEPF (Harder et al. 2023, arXiv 2205.12900): the activations of a frozen public network at several depths, rescaled
to unit norm, are averaged over each class's images, and so are their squares; the averages get Gaussian noise once.
A generator is then trained so that its images have these moments: post-processing, as long as one likes. Written from
its description, not from its code.

What one image brings. With ``f`` its features, ``phi1 = f / |f|`` and ``phi2 = f**2 / |f**2|``, the vector

    (c, s w1 phi1, s w2 phi2),   c**2 + s**2 = 1,   w1**2 + w2**2 = 1,   w2 / w1 = beta,

of norm one is clipped, summed in its class's row and noised by `hyperdp_lib.mechanism`. One draw of noise serves both
moments: that is the original's two releases, since Gaussian releases whose budgets stand as ``w1**2 : w2**2`` have
these very noise levels and compose to the same mu. Coordinate 0 makes a noisy count of every class.

The original has two slips that are not repeated here. It counts the images of each class without noise: the count is
noisy here, or `DPMepfConfig.public_class_counts` declares it public and the ledger says so. It selects the checkpoint
by a distance to private features that got no noise: here the average of the last iterates is returned, and nothing but
the released moments is looked at.

Other differences. A few hundred private images, not tens of thousands: the noise on the mean is larger than the mean,
so maps are averaged down before they are released and a public mean is subtracted from the features
(`PerceptualFeatures`), both of which helped on public stand-ins. A small generator and a few hundred steps instead of
200,000: longer fits follow the noise. ``add_or_remove_one`` besides the original's ``replace_one``.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperdp_lib import accounting, artefacts, certificate, mechanism
from hyperdp_lib.baselines import dp_training
from hyperdp_lib.certificate import Certificate
from hyperdp_lib.data import InputError
from hyperdp_lib.embedding import CHUNK, fair_size, in_batches
from hyperdp_lib.ledger import CLASS_SIZES, LedgerEntry, declaration
from hyperdp_lib.progress import progress_bar

Extractor = Callable[[Tensor], Tensor]
"""``(N, C, H, W)`` -> ``(N, D)``: features of each image from that image alone, differentiable, public and frozen."""

DEPTHS = (2, 4)


@dataclass(frozen=True)
class DPMepfConfig:
    """Public choices of one release and of the generator fitted to it; chosen on held-out public tasks.

    Parameters
    ----------
    beta : float
        Weight of the second moments over that of the first; 0 releases first moments only.
    count_coordinate : float
        ``c`` above, in (0, 1): the larger, the better known are the counts, and the worse the moments.
    public_class_counts : bool
        Declares the number of images of each class public, as the original does: outside the promise, and in the
        ledger as such.
    num_steps : int
        Steps of the generator's training.
    learning_rate : float
        Of Adam; it falls to 0 by a half cosine.
    images_per_class : int
        Generated images of each class in a step.
    moment_decay : float
        The generator's moments are averaged over steps with this decay, in [0, 1).
    ema_decay : float
        Of the average over the generator's iterates that is returned, in [0, 1).
    width, latent : int
        Channels of the generator's last hidden layer (a multiple of 8), and of its random input.
    """

    beta: float = 0.0
    count_coordinate: float = 0.25
    public_class_counts: bool = False
    num_steps: int = 150
    learning_rate: float = 3e-3
    images_per_class: int = 6
    moment_decay: float = 0.9
    ema_decay: float = 0.98
    width: int = 16
    latent: int = 32

    def __post_init__(self) -> None:
        if not 0 <= self.beta < math.inf:
            raise InputError(f"beta must be at least 0 and finite, got {self.beta}.")
        if not 0 < self.count_coordinate < 1:
            raise InputError(f"count_coordinate must lie between 0 and 1, got {self.count_coordinate}.")
        for name in ("num_steps", "images_per_class", "width", "latent"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.width % 8:
            raise InputError(f"width must be a multiple of 8, got {self.width}.")
        if not 0 < self.learning_rate < math.inf:
            raise InputError(f"learning_rate must be positive, got {self.learning_rate}.")
        for name in ("moment_decay", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} must lie in [0, 1), got {getattr(self, name)}.")


REHEARSED = {1.0: DPMepfConfig(), 10.0: DPMepfConfig(beta=0.5, num_steps=400)}
"""Epsilon to the best of some twenty settings, on held-out public tasks dressed as 10 private classes of 144 images.

Under much noise a long fit, and second moments, follow the noise; under little, both help.
"""


class PerceptualFeatures(nn.Module):
    """Activations of a public network at several depths, one after another in one vector.

    Parameters
    ----------
    network : torch.nn.Module
        A plain sequence of layers, such as `hyperdp_lib.embedding.Encoder` or
        `hyperdp_lib.scores.embedding.FeatureNetwork`; without batch statistics. It is copied, and the copy frozen.
    depths : sequence of int
        Depth d is the output of the d-th activation function; the last layer counts as one.
    side : int, optional
        Larger maps are averaged down to this height and width, so that fewer coordinates share the noise. ``None``
        keeps every activation, as the original does.
    public_images : Tensor, optional
        ``(N, C, H, W)``: their mean features are subtracted from all features. Activations have a large common part
        that says nothing of an image but takes most of the unit norm. The original subtracts nothing.

    Examples
    --------
    >>> from hyperdp_lib.embedding import Encoder
    >>> features = PerceptualFeatures(Encoder(), depths=(2, 4), side=4)
    >>> features(torch.zeros(5, 1, 16, 16)).shape  # 64 x 4 x 4 and 128 x 4 x 4
    torch.Size([5, 3072])
    """

    centre: Tensor

    def __init__(
        self,
        network: nn.Module,
        depths: Sequence[int] = DEPTHS,
        *,
        side: int | None = 4,
        public_images: Tensor | None = None,
    ) -> None:
        super().__init__()
        leaves = [copy.deepcopy(m) for m in network.modules() if not list(m.children())]
        if any(isinstance(leaf, nn.modules.batchnorm._BatchNorm) and leaf.training for leaf in leaves):
            raise InputError("a network in training mode looks across the batch: call eval() first.")
        ends = [i for i, leaf in enumerate(leaves) if isinstance(leaf, (nn.ReLU, nn.SiLU, nn.GELU))]
        if ends[-1:] != [len(leaves) - 1]:
            ends.append(len(leaves) - 1)
        if not depths or not all(1 <= depth <= len(ends) for depth in depths):
            raise InputError(f"depths must lie in 1 .. {len(ends)}, got {tuple(depths)}.")
        if side is not None and side < 1:
            raise InputError(f"side must be at least 1, or None for whole maps, got {side}.")
        self.depths, self.side = tuple(sorted(set(depths))), side
        starts = [0, *(end + 1 for end in ends)]
        stages = [nn.Sequential(*leaves[a : b + 1]) for a, b in zip(starts, ends, strict=False)]
        self.stages = nn.ModuleList(stages[: self.depths[-1]]).eval().requires_grad_(False)
        self.register_buffer("centre", torch.zeros((), device=_device(network)))
        if public_images is not None:
            with torch.no_grad():
                parts = [self(part.to(self.centre.device)).double().sum(0) for part in public_images.split(500)]
            self.centre = (torch.stack(parts).sum(0) / len(public_images)).float()

    def forward(self, inputs: Tensor) -> Tensor:
        """``(N, C, H, W)`` in [-1, 1] -> ``(N, D)``."""
        kept = []
        for depth, stage in enumerate(self.stages, 1):
            inputs = stage(inputs)
            if depth in self.depths:
                large = self.side is not None and inputs.ndim == 4 and inputs.shape[-1] > self.side
                kept.append((F.adaptive_avg_pool2d(inputs, self.side) if large else inputs).flatten(1))
        return torch.cat(kept, 1) - self.centre


class Generator(nn.Module):
    """Class-conditional convolutional generator: random vector and class -> image.

    Examples
    --------
    >>> network = Generator(num_classes=3, channels=1, image_size=16, width=8, latent=4)
    >>> network(torch.zeros(2, 4), torch.tensor([0, 2])).shape
    torch.Size([2, 1, 16, 16])
    """

    def __init__(self, num_classes: int, channels: int, image_size: int, *, width: int, latent: int) -> None:
        super().__init__()
        side = image_size // 4
        self.num_classes, self.latent = num_classes, latent
        self.first = nn.Linear(latent + num_classes, 4 * width * side * side)
        self.layers = nn.Sequential(
            nn.Unflatten(1, (4 * width, side, side)), nn.GroupNorm(8, 4 * width), nn.SiLU(),
            nn.Upsample(scale_factor=2), nn.Conv2d(4 * width, 2 * width, 3, padding=1),
            nn.GroupNorm(8, 2 * width), nn.SiLU(),
            nn.Upsample(scale_factor=2), nn.Conv2d(2 * width, width, 3, padding=1),
            nn.GroupNorm(8, width), nn.SiLU(),
            nn.Conv2d(width, channels, 3, padding=1), nn.Tanh(),
        )  # fmt: skip

    def forward(self, latents: Tensor, classes: Tensor) -> Tensor:
        """``latents`` (N, latent) and ``classes`` (N,) -> images (N, C, H, W) in [-1, 1]."""
        one_hot = F.one_hot(classes, self.num_classes).to(latents)
        return self.layers(self.first(torch.cat([latents, self.latent**0.5 * one_hot], 1)))


@dataclass(frozen=True, eq=False)
class DPMepf:
    """The fitted generator, and the release it was fitted to.

    Attributes
    ----------
    generator : Generator
    noisy_sum : ndarray
        ``(classes, dimension)``: as public as the generator; another generator can be fitted to it at no cost.
    class_names : tuple of str
    config : DPMepfConfig
    trained_parameters : int
    noise_dimension : int
        Numbers released, over all classes.
    num_releases : int
    seconds : float
        Wall-clock time of features, release and fit.
    """

    generator: Generator
    noisy_sum: np.ndarray
    class_names: tuple[str, ...]
    config: DPMepfConfig
    trained_parameters: int
    noise_dimension: int
    num_releases: int
    seconds: float

    @torch.no_grad()
    def sample(
        self, num_images: int, *, generator: torch.Generator, num_steps: int = 20, batch_size: int = 500
    ) -> tuple[Tensor, Tensor]:
        """Images ``(num_images, C, H, W)`` in [-1, 1] and their labels, as many of each class, sorted.

        ``num_steps`` is read by rivals that denoise; here one pass makes an image.
        """
        classes = len(self.class_names)
        if num_images < 1 or num_images % classes:
            raise InputError(f"num_images must be a multiple of the {classes} classes, got {num_images}.")
        labels = torch.arange(classes).repeat_interleave(num_images // classes)
        latents = torch.randn(num_images, self.generator.latent, generator=generator)
        device = next(self.generator.parameters()).device
        parts = zip(latents.split(batch_size), labels.split(batch_size), strict=True)
        return torch.cat([self.generator(z.to(device), y.to(device)).cpu() for z, y in parts]), labels


def train_dp_mepf(
    private_images: Tensor,
    private_labels: Tensor | None,
    extractor: Extractor,
    config: DPMepfConfig,
    *,
    epsilon: float,
    num_private_declared: int,
    delta: float = 1e-5,
    neighboring_relation: str = "add_or_remove_one",
    class_names: Sequence[str] = ("adapter",),
    seed: int | None = None,
    progress: bool = False,
) -> tuple[DPMepf, Certificate]:
    """Release the noisy moments of the private images, and fit a generator to them.

    Parameters
    ----------
    private_images : Tensor
        ``(N, C, H, W)`` in [-1, 1], H = W a multiple of 4.
    private_labels : Tensor or None
        ``(N,)`` with values in ``0 .. len(class_names) - 1``, or ``None`` for one unlabelled class.
    extractor : callable
        See `Extractor`; say, a `PerceptualFeatures`. An `nn.Module` decides the device of the fit.
    epsilon, delta, neighboring_relation
        The budget. ``epsilon = inf`` runs the same code without noise, and is certified as NOT PRIVATE.
    num_private_declared : int
        Public: the number of images to plan for. Nothing here depends on it but the certificate, which states it where
        the number of images is not secret.
    class_names : sequence of str
        The public label set.
    seed : int, optional
        Makes the noise reproducible, and the result a demonstration that is NOT PRIVATE. ``None`` draws it from the
        operating system.
    progress : bool
        Show a bar of the generator's steps.

    Returns
    -------
    trained : DPMepf
    certificate : Certificate

    Raises
    ------
    InputError
        Before any private image is read, for what cannot be served.
    """
    names = tuple(class_names)
    if num_private_declared < 1:
        raise InputError(f"num_private_declared must be at least 1, got {num_private_declared}.")
    if not names:
        raise InputError("class_names is empty: name the public label set.")
    if private_labels is None and len(names) > 1:
        raise InputError("several class_names but no private_labels: give one label for each image.")
    shape = _image_shape(private_images)
    moments = Moments(extractor, config, shape)
    try:
        release = mechanism.GaussianSum(
            dimension=moments.dimension,
            noise_multiplier=accounting.noise_multiplier(epsilon, delta),
            num_rows=len(names),
            neighboring_relation=neighboring_relation,
        )
    except ValueError as error:
        raise InputError(str(error)) from error
    labels = dp_training.check_private(private_images, private_labels, names)
    started = time.perf_counter()
    noiseless = release.noise_multiplier == 0
    noisy_sum = mechanism.noisy_sum(
        moments.of_private(private_images, labels), release, seed=0 if noiseless and seed is None else seed
    )
    if config.public_class_counts:
        counts = np.maximum(torch.bincount(labels.cpu(), minlength=len(names)).double().numpy(), 1.0)
    else:  # not below their own noise, so that a class of noise alone has bounded means
        least = max(1.0, release.noise_std / config.count_coordinate)
        counts = np.maximum(noisy_sum[:, 0] / config.count_coordinate, least)
    generator = fit_generator(
        noisy_sum, counts, moments, config, seed=0 if seed is None else seed, progress=progress
    )
    trained = DPMepf(
        generator=generator,
        noisy_sum=noisy_sum,
        class_names=names,
        config=config,
        trained_parameters=sum(p.numel() for p in generator.parameters()),
        noise_dimension=noisy_sum.size,
        num_releases=0 if noiseless else 1,
        seconds=time.perf_counter() - started,
    )
    return trained, _certify(
        release, config, extractor, epsilon, delta, num_private_declared, names, seeded=seed is not None
    )


class Moments:
    """From images to the vectors that are summed: the same for private and for generated images."""

    def __init__(self, extractor: Extractor, config: DPMepfConfig, shape: tuple[int, int, int]) -> None:
        self.extractor, self.shape = extractor, shape
        self.device = _device(extractor)
        size = math.sqrt(1 - config.count_coordinate**2)
        self.count = config.count_coordinate
        self.weights = (size / math.hypot(1, config.beta), size * config.beta / math.hypot(1, config.beta))
        with torch.no_grad():
            probe = self._checked(torch.zeros(1, *shape))
        self.dimension = probe.shape[1]

    def __call__(self, inputs: Tensor) -> Tensor:
        """``(N, C, H, W)`` -> ``(N, dimension)``, each row of norm one (up to rounding; the mechanism clips)."""
        features = self.extractor(inputs)
        if features.ndim != 2 or len(features) != len(inputs):
            raise InputError(f"the extractor must return (N, D) for N images, got {tuple(features.shape)}.")
        parts = [torch.full_like(features[:, :1], self.count), self.weights[0] * F.normalize(features, eps=1e-6)]
        if self.weights[1]:
            parts.append(self.weights[1] * F.normalize(features.square(), eps=1e-6))
        return torch.cat(parts, 1)

    @torch.no_grad()
    def of_private(
        self, private_images: Tensor, private_labels: Tensor
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Vectors and rows, for `mechanism.noisy_sum`, chunk by chunk: each of its image alone, to the last bit.

        `hyperdp_lib.embedding` sees to the batches.
        """
        size = fair_size(self._checked, self.shape)
        for chunk, rows in zip(private_images.split(CHUNK), private_labels.split(CHUNK), strict=True):
            if len(chunk):
                yield in_batches(self._checked, chunk, size=size).numpy(), rows.cpu().numpy().astype(np.int64)

    def _checked(self, inputs: Tensor) -> Tensor:
        try:
            return self(inputs.to(self.device))
        except RuntimeError as error:
            raise InputError(f"the extractor cannot read images of shape {self.shape}: {error}") from error


def fit_generator(
    noisy_sum: np.ndarray,
    counts: np.ndarray,
    moments: Moments,
    config: DPMepfConfig,
    *,
    seed: int = 0,
    progress: bool = False,
) -> Generator:
    """Generator whose images have the released moments: post-processing, no private data.

    It minimises the sum over classes of ``|noisy sum - count * generated mean|**2``, the maximum likelihood fit under
    Gaussian noise. The gradient is that of the current images' mean times a residual that is averaged over the last
    steps, so that few images a step suffice and their spread is not taken for error (compare the moment matching of
    Dos Santos et al. 2019, arXiv 1904.02762).

    Parameters
    ----------
    noisy_sum : ndarray
        ``(classes, dimension)``.
    counts : ndarray
        ``(classes,)``, positive.
    """
    classes, each = len(noisy_sum), config.images_per_class
    known = torch.as_tensor(counts, dtype=torch.float32, device=moments.device)
    target = torch.as_tensor(noisy_sum[:, 1:], dtype=torch.float32, device=moments.device) / known[:, None]
    weight = (known / known.mean()).square()[:, None] / classes
    draws = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        channels, image_size, _ = moments.shape
        network = Generator(classes, channels, image_size, width=config.width, latent=config.latent)
    network = network.to(moments.device)
    average = copy.deepcopy(network).requires_grad_(False)
    adam = torch.optim.Adam(network.parameters(), lr=config.learning_rate, betas=(0.5, 0.99))
    labels = torch.arange(classes, device=moments.device).repeat_interleave(each)
    running = torch.zeros_like(target)
    for done in progress_bar(range(config.num_steps), show=progress, desc="DP-MEPF", unit="step"):
        for group in adam.param_groups:
            group["lr"] = config.learning_rate * 0.5 * (1 + math.cos(math.pi * done / config.num_steps))
        latents = torch.randn(classes * each, config.latent, generator=draws).to(moments.device)
        mean = moments(network(latents, labels))[:, 1:].unflatten(0, (classes, each)).mean(1)
        decay = min(config.moment_decay, done / (done + 1))  # a plain average at first
        running.lerp_(mean.detach(), 1 - decay)
        loss = (weight * (running - target) * mean).sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
        decay = min(config.ema_decay, done / (done + 10))  # the starting point counts for nothing
        with torch.no_grad():
            for kept, p in zip(average.parameters(), network.parameters(), strict=True):
                kept.lerp_(p, 1 - decay)
    return average.eval()


def _certify(
    release: mechanism.GaussianSum,
    config: DPMepfConfig,
    extractor: Extractor,
    epsilon: float,
    delta: float,
    num_private_declared: int,
    class_names: tuple[str, ...],
    *,
    seeded: bool,
) -> Certificate:
    what = "noisy moments of perceptual features"
    declared: tuple[LedgerEntry, ...] = ()
    fields: dict[str, Any] = {"class_names": class_names if len(class_names) > 1 else ()}
    if state := _state(extractor):
        fields["encoder_sha256"] = artefacts.tensors_sha256(state)
    if config.public_class_counts:
        declared = (declaration(CLASS_SIZES, "number of images of each class"),)
    if release.noise_multiplier == 0:
        return certificate.ledger_certificate(
            (*declared, LedgerEntry("other", f"{what}, without noise", math.inf, 0.0)),
            delta,
            method="dp_mepf",
            mechanism=certificate.NO_PRIVACY,
            neighboring_relation=release.neighboring_relation,
            rng=certificate.NO_NOISE,
            **fields,
        )
    return certificate.gaussian_certificate(
        release,
        delta,
        seeded=seeded,
        method="dp_mepf",
        description=what,
        ledger=declared,
        epsilon=epsilon,
        num_private=num_private_declared,
        **fields,
    )


def _image_shape(private_images: Tensor) -> tuple[int, int, int]:
    if private_images.ndim != 4 or private_images.shape[2] != private_images.shape[3] or private_images.shape[2] % 4:
        raise InputError(
            f"DP-MEPF needs square images (N, C, H, H) with H a multiple of 4, got {tuple(private_images.shape)}: "
            "resize first."
        )
    return (private_images.shape[1], private_images.shape[2], private_images.shape[3])


def _state(extractor: Extractor) -> dict[str, Tensor]:
    return dict(extractor.state_dict()) if isinstance(extractor, nn.Module) else {}


def _device(extractor: Extractor) -> torch.device:
    return next(iter(_state(extractor).values()), torch.zeros(())).device
