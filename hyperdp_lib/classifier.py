r"""What a release with classes says about labels, and samples that keep it. No privacy cost.

Such a release is a classifier by itself. What is known of the clean mean behind a noisy one is Gaussian, N(m_c, V_c)
(`hyperdp_lib.prior`, that of public data sets), and so, nearly, are the vectors of a data set's images
about its mean. A vector of class c, or of a cell of it, is then

    z ~ N(m_c, V_c + S),   S = (1 - RIDGE) W + RIDGE (tr W / k) I,

and an image goes where its vector is likeliest: discriminant analysis (Bishop 2006, section 4.2), with classes that are
equally frequent. W is the spread of public images, and private ones differ; so it is drawn towards one number for all
directions (Friedman 1989), by a share that ``benchmarks/released_labels.py`` measures on public drawings. The mean of a
cell is taken as it was released, and V_c is its error: cells lie farther out than the prior knows.

What a release has learned of the labels is more than its samples keep, so samples can be labelled by it
(`sample_relabelled`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hyperdp_lib import diffusion, embedding
from hyperdp_lib.adapter import Adapter
from hyperdp_lib.cells import CellHyperNetwork
from hyperdp_lib.data import InputError
from hyperdp_lib.prior import Prior, observed, posterior
from hyperdp_lib.release_folder import Release
from hyperdp_lib.releasing import reader

RIDGE = 0.3  # how far the spread of public images is drawn towards one number for all directions


@dataclass(frozen=True, eq=False)
class Classifier:
    """A release with K classes, read as a classifier.

    Attributes
    ----------
    encoder
        Public; of one image, without cells.
    means, roots : (P, k), (P, k, k)
        Of the vectors, without the count, that the images of a class have, or of one of its cells: mean, and Cholesky
        factor of the covariance; float64.
    classes : (P,)
        Whose each of them is.

    Examples
    --------
    >>> released = release(...)  # doctest: +SKIP
    >>> classify = Classifier.of(released.noisy_sum, released.certificate.noise_std, hypernetwork)  # doctest: +SKIP
    >>> labels = classify(images)  # doctest: +SKIP
    """

    encoder: Any
    means: Tensor
    roots: Tensor
    classes: Tensor

    @classmethod
    def of(
        cls,
        noisy_sum: np.ndarray | Tensor,
        noise_std: float,
        hypernetwork: Any,
        prior: Prior | None = None,
        *,
        ridge: float = RIDGE,
    ) -> Classifier:
        """Of a noisy sum (K, ...) as released: one part a class, with cells one for each that the decoder uses.

        ``prior``: default the one that belongs to the weights. InputError if there is none, or if with ``ridge`` 0
        images spread in fewer directions than there are.
        """
        if not 0 <= ridge <= 1:
            raise InputError(f"ridge must lie in [0, 1], got {ridge}.")
        sums = torch.as_tensor(noisy_sum, dtype=torch.float32).cpu()
        cells = isinstance(hypernetwork, CellHyperNetwork)
        plain = hypernetwork.hypernetwork if cells else hypernetwork
        parts = [part for part, _ in hypernetwork.parts(sums, noise_std)] if cells else list(sums[:, None])
        classes = torch.arange(len(parts)).repeat_interleave(torch.tensor([len(part) for part in parts]))
        prior = prior or Prior.shipped(plain)
        constant = plain.encoder.config.count_coordinate
        if cells and len(hypernetwork.encoder.centroids) > 1:
            means, left = observed(torch.cat(parts), noise_std, prior.within, constant)
        else:
            means, left = posterior(torch.cat(parts), noise_std, prior, constant)
        k = len(prior.mean)
        even = torch.eye(k, dtype=torch.float64) * prior.within.trace() / k
        roots, singular = torch.linalg.cholesky_ex(left + torch.lerp(prior.within, even, ridge))
        if singular.any():
            raise InputError("the prior's images do not spread in all directions; give a larger ridge.")
        return cls(plain.encoder, means, roots, classes)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """The class (N,) of each image (N, C, H, W) in [-1, 1]."""
        codes = embedding.embed(self.encoder, images, batch_size=1000).cpu().double()[:, 1:]
        log_likelihood = [
            -torch.linalg.solve_triangular(root, (codes - mean).T, upper=False).square().sum(0) / 2
            - root.diagonal().log().sum()
            for mean, root in zip(self.means, self.roots, strict=True)
        ]
        return self.classes[torch.stack(log_likelihood, 1).argmax(1)]


def draw_mixed(
    base_model: nn.Module,
    adapter: Adapter,
    num_classes: int,
    per_class: int | Sequence[int],
    *,
    generator: torch.Generator,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """`diffusion.sample_classes` and its labels, each class in random order: the first are not all of one member."""
    drawn = diffusion.sample_classes(base_model, adapter, num_classes, per_class, generator=generator, **options)
    counts = [per_class] * num_classes if isinstance(per_class, int) else list(per_class)
    starts = itertools.accumulate(counts[:-1], initial=0)
    mixed = [start + torch.randperm(count, generator=generator) for start, count in zip(starts, counts, strict=True)]
    return drawn[torch.cat(mixed)], torch.arange(num_classes).repeat_interleave(torch.tensor(counts))


def sample_relabelled(
    released: Release, hypernetwork: Any, per_class: int | Sequence[int], **options: Any
) -> tuple[Tensor, Tensor, float]:
    """Samples of all classes, each with the label that the release itself gives it, whatever it was drawn for.

    It reads the release and public models only: no privacy cost. Nothing is thrown away, and what lies between two
    classes is told which it is; so a classifier learns more of the release than from samples labelled as drawn, if the
    release tells the classes apart well. With a dozen images a class and much noise it does not.

    Parameters
    ----------
    released : of at least two classes, with its base model.
    hypernetwork : the one whose encoder it was made with.
    per_class : images drawn for each class, or one number for each of them.
    **options : ``generator``, ``num_steps`` and ``progress`` of `diffusion.sample_classes`.

    Returns
    -------
    images : (N, C, H, W) in [-1, 1], in the order of the classes they were drawn for; N in all.
    labels : (N,), not in the numbers drawn.
    share : of all images, those whose label is the class they were drawn for.

    Raises
    ------
    InputError
        if there are no classes to tell apart, the noisy sum was not made with this hypernetwork's encoder, or these
        weights have no prior.
    """
    count = len(released.certificate.class_names)
    if count < 2:
        raise InputError("samples can only be relabelled by a release of at least two classes: draw them as they come.")
    if released.base_model is None:
        raise InputError("the release holds no base model to sample from: load it with load_release")
    hypernetwork, noise_std = reader(released, hypernetwork)
    classify = Classifier.of(released.noisy_sum, noise_std, hypernetwork)
    drawn, labels = draw_mixed(released.base_model, released.adapter, count, per_class, **options)
    said = classify(drawn)
    return drawn, said, float((said == labels).double().mean())
