"""How good are the samples?  Research metrics, computed next to a release and never part of it.

Every function here may look at real private images, so every number it makes is labelled
``"research metric, not DP"``: publish one about private data and you have made a second, unaccounted release.

Images are float32 ``(N, C, H, W)`` in ``[-1, 1]``.  Scores:

* Fréchet distance between Gaussian fits of features (Heusel et al. 2017, arXiv 1706.08500, eq. 6);
* improved precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991, eqs. 1-2);
* downstream accuracy: a classifier that saw only samples, tested on real held-out images;
* memorisation: are samples nearer to the training images than to held-out ones?

A Fréchet distance in the features of a small network of our own is not "the FID": the name of the feature
network travels with every score.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hyperdp_lib.data import ImageSet, InputError, check_model_range, to_levels
from hyperdp_lib.embedding import FeatureNetwork

NOT_DP = "research metric, not DP"
SCORES = ("frechet_distance", "precision", "recall", "accuracy")
MOST_NEIGHBOURS = 10_000  # rows on a side of precision and recall


@torch.no_grad()
def features(network: FeatureNetwork, images: Tensor, batch_size: int = 500) -> np.ndarray:
    """Features of ``images`` ``(N, C, H, W)``, in batches, as float64 ``(N, dimension)``."""
    _check_images(images, "images")
    device = next(network.parameters()).device
    network.eval()
    parts = [network(batch.to(device)).double().cpu().numpy() for batch in images.split(batch_size)]
    return np.concatenate(parts)


class Moments:
    """Mean and covariance of features, accumulated batch by batch in float64 (Chan, Golub & LeVeque 1983).

    Examples
    --------
    >>> rows = np.random.default_rng(0).normal(size=(50, 3))
    >>> moments = Moments(3).update(rows[:20]).update(rows[20:])
    >>> bool(np.allclose(moments.compute()[1], np.cov(rows.T)))
    True
    """

    def __init__(self, dimension: int) -> None:
        self.count = 0
        self.mean = np.zeros(dimension)
        self._scatter = np.zeros((dimension, dimension))

    def update(self, rows: np.ndarray) -> Moments:
        """Add ``rows`` ``(N, dimension)``."""
        rows = np.asarray(rows, dtype=np.float64)
        if rows.ndim != 2 or rows.shape[1] != len(self.mean):
            raise InputError(f"features must have shape (N, {len(self.mean)}), got {rows.shape}.")
        if not np.isfinite(rows).all():
            raise InputError("features contain NaN or infinity: check that the images are finite.")
        if len(rows) == 0:
            return self
        total = self.count + len(rows)
        difference = rows.mean(0) - self.mean
        centred = rows - rows.mean(0)
        between = np.outer(difference, difference) * (self.count * len(rows) / total)
        self._scatter += centred.T @ centred + between
        self.mean = self.mean + difference * (len(rows) / total)
        self.count = total
        return self

    def compute(self, side: str = "images") -> tuple[np.ndarray, np.ndarray]:
        """Mean ``(d,)`` and unbiased covariance ``(d, d)``; at least ``2 d`` rows must have been seen.

        ``side``: what the rows are, for the error.
        """
        needed = 2 * len(self.mean)
        if self.count < needed:
            raise InputError(
                f"a Fréchet distance in {len(self.mean)} features needs at least {needed} images on each "
                f"side; of the {side} there are {self.count}."
            )
        return self.mean, self._scatter / (self.count - 1)


def frechet_distance_of_gaussians(
    mean_a: np.ndarray, covariance_a: np.ndarray, mean_b: np.ndarray, covariance_b: np.ndarray
) -> float:
    """Squared 2-Wasserstein distance between two Gaussians (Dowson & Landau 1982).

    ``tr (S_a S_b)^(1/2)`` is taken as the sum of the square roots of the eigenvalues of the symmetric
    ``S_a^(1/2) S_b S_a^(1/2)``, which is real and stable where a general matrix square root is not.
    """
    values, vectors = np.linalg.eigh(covariance_a)
    root = (vectors * np.sqrt(values.clip(min=0.0))) @ vectors.T
    product = root @ covariance_b @ root
    trace = np.sqrt(np.linalg.eigvalsh((product + product.T) / 2).clip(min=0.0)).sum()
    distance = np.square(mean_a - mean_b).sum() + np.trace(covariance_a) + np.trace(covariance_b) - 2 * trace
    return float(max(distance, 0.0))


def frechet_distance(
    features_a: np.ndarray, features_b: np.ndarray, sides: tuple[str, str] = ("samples", "reference images")
) -> float:
    """Fréchet distance between two sets of features ``(N, d)`` and ``(M, d)``; float64, >= 0, 0 is best.

    Raises `InputError` with fewer than ``2 d`` images on either side: the covariance would be too poor. It names that
    side as in ``sides``.
    """
    both = zip((features_a, features_b), sides, strict=True)
    a, b = (Moments(rows.shape[-1]).update(rows).compute(side) for rows, side in both)
    return frechet_distance_of_gaussians(*a, *b)


def precision_recall(
    sample_features: np.ndarray,
    reference_features: np.ndarray,
    neighbours: int = 3,
    sides: tuple[str, str] = ("samples", "reference images"),
) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019), both in [0, 1], 1 is best.

    Precision: the share of samples that fall inside the reference manifold, the union of balls around the
    references that reach their ``neighbours``-th nearest neighbour.  Recall: the same with the roles swapped.
    Of more than ``MOST_NEIGHBOURS`` rows on a side so many are used, drawn by a fixed seed: every pair is compared.

    Examples
    --------
    >>> rows = np.random.default_rng(0).normal(size=(40, 2))
    >>> precision_recall(rows, rows), precision_recall(rows + 100, rows)
    ((1.0, 1.0), (0.0, 0.0))
    """
    for rows, side in zip((sample_features, reference_features), sides, strict=True):
        if len(rows) <= neighbours:
            raise InputError(
                f"precision and recall need more than {neighbours} images a side; of the {side} there are {len(rows)}."
            )
    a, b = (_at_most(rows, MOST_NEIGHBOURS) for rows in (sample_features, reference_features))

    def radii(rows: Tensor) -> Tensor:  # the nearest row is the row itself, hence the + 1
        parts = [_distances(part, rows).kthvalue(neighbours + 1, dim=1).values for part in rows.split(500)]
        return torch.cat(parts)

    def inside(rows: Tensor, others: Tensor) -> float:
        within = radii(others)[None, :]
        hits = [(_distances(part, others) <= within).any(1) for part in rows.split(500)]
        return float(torch.cat(hits).double().mean())

    return inside(a, b), inside(b, a)


def downstream_accuracy(
    samples: Tensor, labels: Tensor, private_test_images: Tensor, private_test_labels: Tensor
) -> float:
    """Accuracy in [0, 1] on real held-out images of a classifier trained on samples only.

    The classifier is scikit-learn's support vector machine with a Gaussian kernel on pixels, ``C=10`` and
    ``gamma="scale"`` fixed beforehand, so nothing is tuned on private images.
    """
    if len(private_test_images) != len(private_test_labels):
        raise InputError("images and labels differ in length: give one label for each image.")
    predicted = predict(samples, labels, private_test_images)
    return float((predicted == private_test_labels.cpu().numpy()).mean())


def predict(samples: Tensor, labels: Tensor, private_test_images: Tensor) -> np.ndarray:
    """Labels ``(N,)`` that the classifier of `downstream_accuracy` gives to private images, each for itself."""
    from sklearn.svm import SVC

    _check_images(samples, "samples")
    _check_images(private_test_images, "private_test_images")
    check_model_range(private_test_images, "private_test_images")
    if len(samples) != len(labels):
        raise InputError("images and labels differ in length: give one label for each image.")
    if len(torch.unique(labels)) < 2:
        raise InputError("the samples have one class only: downstream accuracy needs two or more.")
    classifier = SVC(C=10.0, gamma="scale").fit(samples.flatten(1).cpu().numpy(), labels.cpu().numpy())
    return classifier.predict(private_test_images.flatten(1).cpu().numpy())


def memorisation(
    sample_features: np.ndarray,
    private_train_features: np.ndarray,
    private_test_features: np.ndarray,
    seed: int = 0,
) -> dict[str, float]:
    """Are samples nearer to the training images than to held-out images of the same kind?

    A bigger set has nearer neighbours by size alone, so the two sets are first cut, at random by ``seed``, to
    one size.  No memorisation: ratio about 1, share about 0.5.  A copy of the training set: 0 and 1.
    Read it beside precision: of samples far from all real images, one outlier may be the nearest of most.

    Returns
    -------
    dict
        ``distance_ratio``: median distance to the nearest training image over that to the nearest test image;
        ``closer_to_train``: share of samples whose nearest training image is the nearer one (tie: half).
    """
    size = min(len(private_train_features), len(private_test_features))
    if size == 0 or len(sample_features) == 0:
        raise InputError("memorisation needs samples, training images and test images: one of them is empty.")
    rng = np.random.default_rng(seed)
    nearest = []
    for rows in (private_train_features, private_test_features):
        chosen = torch.as_tensor(rows[rng.permutation(len(rows))[:size]]).double()
        nearest.append(_distances(torch.as_tensor(sample_features).double(), chosen).min(1).values)
    to_train, to_test = nearest
    closer = (to_train < to_test).double() + 0.5 * (to_train == to_test).double()
    ratio = to_train.median() / to_test.median().clamp(min=1e-12)
    return {"distance_ratio": float(ratio), "closer_to_train": float(closer.mean())}


class Side(NamedTuple):
    """One of two sets to compare: what it is called, its images and labels, and their features ``(N, d)``."""

    name: str
    images: Tensor
    labels: Tensor | None
    class_names: tuple[str, ...] | None
    features: np.ndarray

    @classmethod
    def of(cls, name: str, image_set: ImageSet, network: Any) -> Side:
        """The set with its features."""
        found = features(network, image_set.images)
        return cls(name, image_set.images, image_set.labels, image_set.class_names, found)

    def rows(self, index: np.ndarray, name: str) -> Side:
        """Some of its images."""
        labels = None if self.labels is None else self.labels[index]
        return self._replace(name=name, images=self.images[index], labels=labels, features=self.features[index])


def compare(samples: Side, reference: Side) -> dict[str, Any]:
    """Each score of the samples that can be computed; None for the others, with a reason in ``reasons``.

    Keys: those of ``SCORES``, ``num_images``, ``num_reference`` and ``reasons``. It raises nothing for too few images,
    missing labels or other classes.
    """
    reasons: dict[str, str] = {}
    sides = samples.name, reference.name

    def known(score: str, compute: Callable[[], Any]) -> Any:
        try:
            return compute()
        except InputError as error:
            reasons[score] = str(error)
            return None

    def accuracy() -> float:
        for side in (samples, reference):
            if side.labels is None:
                raise InputError(f"an accuracy needs labels; the {side.name} have none.")
        if samples.class_names != reference.class_names:
            raise InputError(f"the {sides[0]} and the {sides[1]} name their classes differently.")
        assert samples.labels is not None and reference.labels is not None
        return downstream_accuracy(samples.images, samples.labels, reference.images, reference.labels)

    both = samples.features, reference.features
    near = known("precision", lambda: precision_recall(*both, sides=sides))
    scores = {
        "frechet_distance": known("frechet_distance", lambda: frechet_distance(*both, sides=sides)),
        "precision": near and near[0],
        "recall": near and near[1],
        "accuracy": known("accuracy", accuracy),
        "num_images": len(samples.features),
        "num_reference": len(reference.features),
        "reasons": reasons,
    }
    if near is None:
        reasons["recall"] = reasons["precision"]
    return scores


def compare_real(reference: Side, most: int, seed: int = 0) -> dict[str, Any]:
    """What real images score: one half of the reference, ``most`` of it at the most, against the other; see `compare`.

    It is the end of the scale that samples can hope for.
    """
    order = np.random.default_rng(seed).permutation(len(reference.features))
    half = len(order) // 2
    shown = reference.rows(order[: min(half, most)], "images in one half of the reference")
    return compare(shown, reference.rows(order[half : 2 * half], "images in the other half of the reference"))


def evaluate(
    samples: Tensor,
    labels: Tensor | None,
    private_train_images: Tensor,
    private_train_labels: Tensor | None,
    private_test_images: Tensor,
    private_test_labels: Tensor | None,
    feature_network: FeatureNetwork,
    *,
    private_reference_images: Tensor | None = None,
    private_reference_labels: Tensor | None = None,
) -> dict[str, Any]:
    """All scores of one set of samples, ready for a record.

    The reference of Fréchet distance, precision and recall are the private training images, or
    ``private_reference_images`` (say, the whole set of which a few were used).  Memorisation is always of the
    training images.  ``accuracy`` is ``None`` without labels; the per-class Fréchet distance (mean over
    classes) is ``None`` where a class has too few images on either side.
    """
    if private_reference_images is None:
        private_reference_images, private_reference_labels = private_train_images, private_train_labels
    ours = features(feature_network, samples)
    train = features(feature_network, private_train_images)
    test = features(feature_network, private_test_images)
    reference = features(feature_network, private_reference_images)
    precision, recall = precision_recall(ours, reference)
    scores: dict[str, Any] = {
        "frechet_distance": frechet_distance(ours, reference),
        "frechet_distance_per_class": None,
        "features": feature_network.name,
        "precision": precision,
        "recall": recall,
        "accuracy": None,
        "memorisation": memorisation(ours, train, test),
        "num_images": len(samples),
        "num_reference": len(private_reference_images),
        "label": NOT_DP,
    }
    if labels is not None and private_test_labels is not None:
        scores["accuracy"] = downstream_accuracy(samples, labels, private_test_images, private_test_labels)
    if labels is not None and private_reference_labels is not None:
        per_class = _frechet_per_class(ours, labels, reference, private_reference_labels)
        if per_class is not None:
            scores["frechet_distance_per_class"] = float(np.mean(list(per_class.values())))
    return scores


def inception_frechet_distance(
    samples: Tensor, reference: Tensor, weights_path: str | Path, batch_size: int = 100
) -> dict[str, Any]:
    """Fréchet Inception distance by torchmetrics, for colour images and comparison with the literature.

    Needs the ``inception`` extra (torchmetrics with torch-fidelity, which bring torchvision) and a local file
    of the Inception weights: nothing is downloaded.  Grey images are repeated over three channels.
    """
    if not Path(weights_path).is_file():
        raise InputError(f"no Inception weights at {weights_path}: fetch pt_inception-2015-12-05 first.")
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance

        metric = FrechetInceptionDistance(feature=2048, feature_extractor_weights_path=str(weights_path))
    except ImportError as error:  # torchmetrics turns a missing torch-fidelity into its own ImportError
        raise InputError(f"install the extra: pip install 'hyperdp[inception]' ({error}).") from error
    for images, real in ((reference, True), (samples, False)):
        _check_images(images, "images")
        for batch in images.split(batch_size):
            pixels = to_levels(batch)
            metric.update(pixels.expand(-1, 3, -1, -1) if pixels.shape[1] == 1 else pixels, real=real)
    distance = float(metric.compute())
    return {
        "frechet_distance": distance,
        "features": "inception-v3",
        "num_images": len(samples),
        "label": NOT_DP,
    }


def _frechet_per_class(
    ours: np.ndarray, labels: Tensor, train: np.ndarray, train_labels: Tensor
) -> Mapping[int, float] | None:
    distances: dict[int, float] = {}
    for label in torch.unique(train_labels).tolist():
        a, b = ours[(labels == label).cpu().numpy()], train[(train_labels == label).cpu().numpy()]
        if min(len(a), len(b)) < 2 * ours.shape[1]:
            return None
        distances[label] = frechet_distance(a, b)
    return distances


def _at_most(rows: np.ndarray, most: int) -> Tensor:
    if len(rows) > most:
        rows = rows[np.sort(np.random.default_rng(0).permutation(len(rows))[:most])]
    return torch.as_tensor(rows).double()


def _distances(a: Tensor, b: Tensor, chunk: int = 2000) -> Tensor:
    # The matrix-product shortcut of cdist loses digits between near-identical rows, where it matters here.
    mode = "donot_use_mm_for_euclid_dist"
    return torch.cat([torch.cdist(rows, b, compute_mode=mode) for rows in a.split(chunk)])


def _check_images(images: Tensor, name: str) -> None:
    if images.ndim != 4 or not images.is_floating_point() or len(images) == 0:
        raise InputError(
            f"{name} must be float (N, C, H, W) in [-1, 1], got {images.dtype} {tuple(images.shape)}."
        )
    if not torch.isfinite(images).all():
        raise InputError(f"{name} contain NaN or infinity: remove those images.")
    if images.abs().max() > 4.0:  # samples may overshoot a little; bytes read as floats do not
        raise InputError(f"{name} lie far outside [-1, 1]: bring them there with to_model_range.")
