r"""Scores that may be published: accuracy and a Fréchet distance from noisy sums over the private images.

The scores of `hyperdp_lib.scores.evaluation` read private images and are for the operator's eyes. These go through
`hyperdp_lib.mechanism` like a release, cost what a release costs, and come with the ledger entry that says so. Samples,
and whatever is computed from them, are public: they are post-processing of a release.

*Accuracy.* Each private test image brings ``(1, right) / sqrt(2)``: a noisy count and a noisy number of hits.

*Fréchet distance.* All 64 features would drown in noise, so the features are projected onto the leading directions of
the samples' own features, centred and scaled by the samples, and clipped to length one. Each private image then brings

    (c, a x, b vec(x x^T)),   c^2 + a^2 + b^2 = 1,   |x| <= 1,

with ``vec`` the upper triangle, off the diagonal times sqrt(2), so that ``|vec(x x^T)| = |x|^2``. The samples are
clipped alike. This is the *clipped Fréchet distance*, another quantity than `evaluation.frechet_distance`: lengths are
in units of the radius that holds 95 % of the samples, in a few directions instead of all 64, and outliers are drawn in.
Both are zero for equal sets and grow with the difference, but no factor turns one into the other. Compare it with
``noise_floor``, what identical distributions would have given under noise of this size, and with the distance of public
images from the same samples (`clipped_frechet_distance`), which costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from hyperdp_lib import accounting, embedding, mechanism
from hyperdp_lib.data import InputError, check_model_range
from hyperdp_lib.ledger import LedgerEntry, gaussian_charge
from hyperdp_lib.scores import evaluation

_SHARES = np.sqrt([0.1, 0.45, 0.45])  # c, a, b above


@dataclass(frozen=True)
class PrivateScore:
    """A noisy score and its price.

    Attributes
    ----------
    value : float
    standard_error : float
        Of the noise alone, not of the choice of test images.
    noise_floor : float or None
        Mean clipped Fréchet distance that a perfect match would show; None for an accuracy.
    charge : LedgerEntry
        Add it to the ledger of the release (`certificate.ledger_certificate`).
    demonstration : bool
        Made with a seed, hence not private.
    """

    value: float
    standard_error: float
    noise_floor: float | None
    charge: LedgerEntry
    demonstration: bool


def private_accuracy(
    samples: Tensor,
    sample_labels: Tensor,
    private_test_images: Tensor,
    private_test_labels: Tensor,
    *,
    epsilon: float,
    delta: float = 1e-5,
    neighboring_relation: str = "add_or_remove_one",
    seed: int | None = None,
) -> PrivateScore:
    """Noisy accuracy in [0, 1] on private images of the classifier of `evaluation.downstream_accuracy`.

    Parameters
    ----------
    samples, sample_labels : Tensor
        ``(M, C, H, W)`` in [-1, 1] and ``(M,)``: public.
    private_test_images, private_test_labels : Tensor
        ``(N, C, H, W)`` and ``(N,)``. If they were also released from, the costs add up.
    epsilon, delta, neighboring_relation
        The price of this score.
    seed : int, optional
        Reproducible noise: a demonstration, NOT PRIVATE.
    """
    right = evaluation.predict(samples, sample_labels, private_test_images) == private_test_labels.cpu().numpy()
    vectors = np.stack([np.ones(len(right)), right.astype(np.float64)], 1) / np.sqrt(2)
    noisy, std, charge = _release(vectors, "noisy accuracy", epsilon, delta, neighboring_relation, seed)
    count, hits = noisy * np.sqrt(2)
    count = max(1.0, float(count))
    value = float(np.clip(hits / count, 0.0, 1.0))
    error = std * np.sqrt(2) * np.sqrt(1 + value**2) / count
    return PrivateScore(value, float(error), None, charge, seed is not None)


def private_frechet_distance(
    samples: Tensor,
    private_images: Tensor,
    network: Any,
    *,
    epsilon: float,
    delta: float = 1e-5,
    neighboring_relation: str = "add_or_remove_one",
    dimensions: int = 8,
    seed: int | None = None,
) -> PrivateScore:
    """Noisy clipped Fréchet distance between samples and private images; see the module.

    Parameters
    ----------
    samples, private_images : Tensor
        ``(M, C, H, W)`` (public) and ``(N, C, H, W)``, in [-1, 1].
    network : FeatureNetwork
        Public.
    dimensions : int
        Directions d; ``1 + d + d (d + 1) / 2`` numbers share the noise.
    """
    check_model_range(private_images, "private_images")
    ours = _features(network, samples)
    vectors = _clipped(ours, dimensions)
    description = f"noisy clipped Fréchet distance in {dimensions} directions"
    private_vectors = vectors(_features(network, private_images))
    noisy, std, charge = _release(private_vectors, description, epsilon, delta, neighboring_relation, seed)
    mean = vectors(ours).mean(0)
    count = max(1.0, float(noisy[0] / _SHARES[0]))
    value = _distance(noisy / count, mean, dimensions)
    # what noise alone does to a perfect match: public, so it may be tried as often as one likes
    rng = np.random.default_rng(0)
    tries = [_distance(mean + rng.normal(0, std / count, mean.shape), mean, dimensions) for _ in range(200)]
    return PrivateScore(value, float(np.std(tries)), float(np.mean(tries)), charge, seed is not None)


def clipped_frechet_distance(samples: Tensor, public_images: Tensor, network: Any, *, dimensions: int = 8) -> float:
    """What `private_frechet_distance` would read without noise, if private images were like these public ones."""
    ours = _features(network, samples)
    vectors = _clipped(ours, dimensions)
    return _distance(vectors(_features(network, public_images)).mean(0), vectors(ours).mean(0), dimensions)


def _clipped(
    ours: NDArray[np.float64], dimensions: int
) -> Callable[[NDArray[np.floating]], NDArray[np.float64]]:
    """From features to what each image brings, by the samples' leading directions; see the module."""
    if not 1 <= dimensions <= ours.shape[1] or len(ours) < 2 * dimensions:
        raise InputError(
            f"dimensions must lie in 1 .. {ours.shape[1]}, with twice as many samples: got {dimensions} with "
            f"{len(ours)} samples; draw more of them, or give fewer dimensions."
        )
    centre = ours.mean(0)
    _, _, directions = np.linalg.svd(ours - centre, full_matrices=False)
    directions = directions[:dimensions]
    scale = float(np.quantile(np.linalg.norm((ours - centre) @ directions.T, axis=1), 0.95))

    def vectors(features: NDArray[np.floating]) -> NDArray[np.float64]:
        # each row by itself: a product of matrices rounds a row differently among more or fewer of them
        x = np.array([(directions * row).sum(1) for row in features - centre]).reshape(-1, dimensions)
        x = x / max(scale, 1e-12)
        x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1.0)
        upper = np.triu_indices(dimensions)
        squares = (x[:, :, None] * x[:, None, :])[:, upper[0], upper[1]]
        squares *= np.where(upper[0] == upper[1], 1.0, np.sqrt(2))
        c, a, b = _SHARES
        return np.concatenate([np.full((len(x), 1), c), a * x, b * squares], 1)

    return vectors


def _features(network: Any, private_images: Tensor) -> NDArray[np.float64]:
    """Each image's features from that image alone, to the last bit: see `hyperdp_lib.embedding`."""
    return next(iter(embedding.embed_batches(network, [private_images]))).astype(np.float64)


def _distance(theirs: NDArray[np.float64], ours: NDArray[np.float64], dimensions: int) -> float:
    return evaluation.frechet_distance_of_gaussians(*_moments(theirs, dimensions), *_moments(ours, dimensions))


def _moments(row: NDArray[np.float64], dimensions: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and covariance from one averaged vector; the nearest positive semidefinite one if noise broke it."""
    _, a, b = _SHARES
    mean = row[1 : 1 + dimensions] / a
    upper = np.triu_indices(dimensions)
    second = np.zeros((dimensions, dimensions))
    second[upper] = row[1 + dimensions :] / b / np.where(upper[0] == upper[1], 1.0, np.sqrt(2))
    second = second + second.T - np.diag(np.diag(second))
    values, directions = np.linalg.eigh(second - np.outer(mean, mean))
    return mean, (directions * values.clip(min=0.0)) @ directions.T


def _release(
    private_vectors: NDArray[np.float64],
    description: str,
    epsilon: float,
    delta: float,
    neighboring_relation: str,
    seed: int | None,
) -> tuple[NDArray[np.float64], float, LedgerEntry]:
    try:
        config = mechanism.GaussianSum(
            dimension=private_vectors.shape[1],
            noise_multiplier=accounting.noise_multiplier(epsilon, delta),
            neighboring_relation=neighboring_relation,
        )
        noisy = mechanism.noisy_sum([(private_vectors, None)], config, seed=seed)[0]
    except ValueError as error:
        raise InputError(str(error)) from error
    charge = gaussian_charge(description, config.noise_multiplier, delta, neighboring_relation)
    return noisy, config.noise_std, charge
