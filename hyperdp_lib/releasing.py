"""Private images in, adapter and certificate out: plan, measure, certify, decode, refine.

Private data is read in one place, `hyperdp_lib.measure`. Everything after it sees noisy sums only, and is therefore
free of privacy cost.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from hyperdp_lib import cells, certificate
from hyperdp_lib.artefacts import tensors_sha256
from hyperdp_lib.certificate import Certificate
from hyperdp_lib.data import ImageSet, InputError, check_model_range
from hyperdp_lib.hypernetwork import HyperNetwork
from hyperdp_lib.ledger import NUMBER_OF_IMAGES, LedgerEntry, declaration, gaussian_charge
from hyperdp_lib.measure import NoisySum, measure
from hyperdp_lib.nested import NestedHyperNetwork
from hyperdp_lib.planning import Plan, Reading
from hyperdp_lib.refinement import RefinementConfig, refine
from hyperdp_lib.release_folder import Release


def release(
    private: ImageSet,
    plan: Plan,
    *,
    ledger: Sequence[LedgerEntry] = (),
    seed: int | None = None,
    batch_size: int = 1024,
    progress: bool = False,
) -> Release:
    """The `Release` of private images: measured, certified, decoded and refined as planned.

    Parameters
    ----------
    private : images (N, C, H, W) in [-1, 1] of the base model's size; with the plan's classes if it has any.
    plan : public; see `hyperdp_lib.planning.plan`.
    ledger : what was spent on the same images before, or declared public of them; the certificate's epsilon covers all.
    seed : None for secret noise from the operating system. A number makes reproducible noise, for books and tests, and
        everything made with it is stamped as not private. ``epsilon=math.inf`` (no noise) needs a seed.
    batch_size : embeddings in memory at a time.
    progress : show a progress bar of the refinement, on a terminal.

    Raises
    ------
    InputError
        before anything is drawn, if the images are not what the plan expects.

    Examples
    --------
    >>> released = release(private, plan(load_weights("glyphs"), epsilon=1.0))  # doctest: +SKIP
    """
    rows = _check(private, plan)
    known = None if plan.neighboring_relation == "add_or_remove_one" else len(private)
    spent = declared(ledger, plan.public_size)
    try:
        _certify(plan, [NoisySum(np.empty(0), plan.whole, "the whole")], spent, len(private), seed)  # refuses now
        released, reading = measure(private.images, rows, plan.course(known), seed=seed, batch_size=batch_size)
        statement = _certify(plan, released, spent, len(private), seed, reading)
    except ValueError as error:
        raise error if isinstance(error, InputError) else InputError(str(error)) from error
    base_model = plan.weights.base_model
    adapter = reading.decode(
        base_model, plan.class_names, generator=torch.Generator().manual_seed(0), progress=progress
    )
    if reading.refinement is not None:
        statement = _noted(statement, reading.refinement)
    return Release(adapter, statement, reading.noisy_sum, base_model)


def _certify(
    plan: Plan,
    released: Sequence[NoisySum],
    spent: Sequence[LedgerEntry],
    private_count: int,
    seed: int | None,
    reading: Reading | None = None,
) -> Certificate:
    """The certificate of noisy sums as they were taken: nothing is charged but what was measured, and all of that."""
    *earlier, last = released
    relation = plan.neighboring_relation
    before = [gaussian_charge(one.description, one.config.noise_multiplier, plan.delta, relation) for one in earlier]
    network = plan.weights.hypernetwork if reading is None else reading.hypernetwork
    return certificate.gaussian_certificate(
        last.config,
        plan.delta,
        seeded=seed is not None,
        description=last.description,
        ledger=(*spent, *before),
        epsilon=plan.epsilon,
        num_private=private_count,
        class_names=plan.class_names,
        encoder_sha256=tensors_sha256(network.encoder.state_dict()),
        hypernetwork_sha256=tensors_sha256(network.decoder_state()),
        base_model_sha256=network.base_model_sha256,
    )


def declared(ledger: Sequence[LedgerEntry], public_size: float | None) -> tuple[LedgerEntry, ...]:
    """The ledger, in which a size that is public is entered, unless it is there already."""
    if public_size is None or any(entry.quantity == NUMBER_OF_IMAGES for entry in ledger):
        return tuple(ledger)
    return (*ledger, declaration(NUMBER_OF_IMAGES, f"number of images, about {public_size:g}"))


def _noted(statement: Certificate, config: RefinementConfig) -> Certificate:
    return dataclasses.replace(statement, post_processing=(*statement.post_processing, config.note))


def refine_release(
    released: Release,
    hypernetwork: HyperNetwork,
    config: RefinementConfig | None = None,
    *,
    generator: torch.Generator,
    progress: bool = False,
) -> Release:
    """The release with adapters from `refinement.refine`; its certificate gets a note, and every number in it stays.

    Raises
    ------
    InputError
        if the noisy sum was not made with this hypernetwork's encoder, or the release holds no base model.
    """
    config = config or RefinementConfig()
    if released.base_model is None:
        raise InputError("the release holds no base model: load it with load_release")
    network, noise_std = reader(released, hypernetwork)
    adapter = refine(
        released.noisy_sum, noise_std, network, released.base_model, config,
        class_names=released.certificate.class_names, generator=generator, progress=progress,
    )  # fmt: skip
    digest = tensors_sha256(network.decoder_state())
    noted = _noted(dataclasses.replace(released.certificate, hypernetwork_sha256=digest), config)
    return dataclasses.replace(released, adapter=adapter, certificate=noted)


def reader(released: Release, hypernetwork: Any) -> tuple[Any, float]:
    """The hypernetwork as it reads the release's noisy sum, and the noise on that."""
    width, noise_std = released.noisy_sum.shape[1], released.certificate.noise_std
    other = "the release was not made with this hypernetwork's encoder: name its own (--weights)."
    try:
        nested = isinstance(hypernetwork, NestedHyperNetwork)
        hypernetwork = cells.reading(hypernetwork, width) if nested else hypernetwork.using(width - 1)
    except InputError as error:  # it has no sums of so many numbers
        raise InputError(other) from error
    if noise_std is None or released.certificate.encoder_sha256 != tensors_sha256(hypernetwork.encoder.state_dict()):
        raise InputError(other)
    return hypernetwork, noise_std


def _check(private: ImageSet, plan: Plan) -> np.ndarray | None:
    """The rows of the images, None without labels; everything structural is refused here, before any noise."""
    config = plan.weights.hypernetwork.encoder.config
    expected = (config.channels, config.image_size, config.image_size)
    if tuple(private.images.shape[1:]) != expected:
        raise InputError(
            f"images must have shape (N, {', '.join(map(str, expected))}): use data.load_images to make them so"
        )
    check_model_range(private.images, "images")
    if (private.class_names or ()) != plan.class_names:
        raise InputError(
            "the plan and the images must have the same classes: give plan() class_names=private.class_names, or "
            "ImageSet(private.images) to pool them"
        )
    if private.labels is None:
        return None
    kind, refusal = private.labels.dtype, f"every label must be a whole number in 0 ... {plan.num_rows - 1}"
    if kind.is_floating_point or kind.is_complex or kind == torch.bool:
        raise InputError(refusal)
    labels = private.labels.cpu().to(torch.int64)
    if bool(((labels < 0) | (labels >= plan.num_rows)).any()):
        raise InputError(refusal)
    return labels.numpy()
