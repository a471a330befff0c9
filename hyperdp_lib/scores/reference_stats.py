"""Mean and covariance of a reference set's features, kept in a file: what a Fréchet distance needs of it.

Sixty thousand images shrink to one small ``.npz``, and every score computed from it uses the same reference. Statistics
of private images are not private: like every score here they are research metrics.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from hyperdp_lib.artefacts import tensors_sha256
from hyperdp_lib.embedding import FeatureNetwork
from hyperdp_lib.image_files import InputError, read_arrays, shown, write_npz
from hyperdp_lib.scores.evaluation import Moments, features, frechet_distance_of_gaussians

_KEYS = ("mean", "covariance", "count", "source", "features", "features_sha256")


@dataclass(frozen=True, eq=False)
class ReferenceStatistics:
    """Features of a reference set, summed up.

    Attributes
    ----------
    mean, covariance
        float64 ``(d,)`` and ``(d, d)``; the covariance is unbiased.
    count
        Images.
    source
        What the images are, e.g. ``"mnist, 16 x 16"``.
    features, features_sha256
        Name of the feature network, and the hash of its weights: statistics of another network are worthless.

    Examples
    --------
    >>> import torch
    >>> images = torch.rand(200, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    >>> network = FeatureNetwork(dimension=4)
    >>> reference = ReferenceStatistics.of(images, network, "noise")
    >>> round(reference.frechet_distance(images, network), 6)
    0.0
    """

    mean: np.ndarray
    covariance: np.ndarray
    count: int
    source: str
    features: str
    features_sha256: str

    @classmethod
    def of(cls, private_images: Tensor, network: FeatureNetwork, source: str) -> ReferenceStatistics:
        """Statistics of ``(N, C, H, W)`` images in ``[-1, 1]``; an `InputError` for fewer than ``2 d``."""
        moments = Moments(network.dimension)
        for batch in private_images.split(5000):
            moments.update(features(network, batch))
        mean, covariance = moments.compute()
        weights = tensors_sha256(network.state_dict())
        return cls(mean, covariance, len(private_images), source, network.name, weights)

    def frechet_distance(self, samples: Tensor, network: FeatureNetwork, side: str = "samples") -> float:
        """Fréchet distance of samples ``(N, C, H, W)`` to the reference, in the features of the same network.

        An `InputError` for another network, or fewer than ``2 d`` samples, which it calls ``side``.
        """
        self.check(network)
        ours = Moments(network.dimension).update(features(network, samples)).compute(side)
        return frechet_distance_of_gaussians(*ours, self.mean, self.covariance)

    def check(self, network: FeatureNetwork) -> None:
        """An `InputError` unless the statistics are of this network."""
        if tensors_sha256(network.state_dict()) != self.features_sha256:
            raise InputError(
                f"the reference statistics are of another feature network ({self.features}): give its file with "
                "--features, or make them again with data_scripts/reference_stats.py"
            )

    def save(self, path: str | Path) -> None:
        """Write one ``.npz``, whole or not at all."""
        write_npz(Path(path), {key: np.asarray(getattr(self, key)) for key in _KEYS})

    @classmethod
    def load(cls, path: str | Path) -> ReferenceStatistics:
        """Inverse of `save`; an `InputError` names what is wrong."""
        path = Path(path)
        arrays = read_arrays(path, _KEYS)
        wrong = [key for key in _KEYS if key not in arrays]
        if not wrong:
            mean, covariance = arrays["mean"], arrays["covariance"]
            square = mean.ndim == 1 and covariance.shape == 2 * mean.shape
            if square and np.isfinite(mean).all() and np.isfinite(covariance).all():
                texts = [str(arrays[key]) for key in _KEYS[3:]]
                return cls(mean.astype(float), covariance.astype(float), int(arrays["count"]), *texts)
            wrong = ["mean", "covariance"]
        raise InputError(
            f"{shown(path)} does not hold reference statistics ({', '.join(wrong)}): make them again with "
            "data_scripts/reference_stats.py"
        )


def holds_statistics(path: str | Path) -> bool:
    """Whether a file is an ``.npz`` of statistics, rather than of images."""
    path = Path(path)
    if path.suffix.lower() != ".npz" or not path.is_file() or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return {"mean.npy", "covariance.npy"} <= set(archive.namelist())
