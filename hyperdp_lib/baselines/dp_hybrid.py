"""Half and half: a share of the budget on one noisy sum, the rest on DP-SGD from the adapter decoded from it.

The noisy sum gives a good adapter at once, which no further image improves; DP-SGD improves without end, but from
nothing. Here the hypernetwork's adapter (one a class) is where DP-SGD LoRA starts, with the same layers and rank.

How the budget is shared. Let one noisy sum that spent all of (epsilon, delta) have noise multiplier m, that is
``mu = 1 / m``. The sum here has ``m / sqrt(share)``, hence ``mu * sqrt(share)``. The noise of DP-SGD is the least with
which the ledger of the two, composed by numerical convolution (`dp_sgd_accounting.pld_epsilon`), stays within
epsilon: for full batches about ``mu * sqrt(1 - share)``; for Poisson batches there is no such formula. Adaptivity
costs nothing: the second mechanism may start where the first has led.

``replace_one`` with Poisson batches has no proven composition here, so epsilon and delta themselves are shared (basic
composition). A share of 0 or 1 is refused: those are `dp_lora` and `dp_deepsets`, which state their budget exactly.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hyperdp_lib import accounting, artefacts, certificate, dp_sgd_accounting, ledger, planning
from hyperdp_lib.adapter import Adapter, concatenate
from hyperdp_lib.baselines import controls, dp_lora, dp_sgd, dp_training
from hyperdp_lib.baselines.dp_embedding_sgd import sample_classes
from hyperdp_lib.baselines.dp_lora import DPLoraConfig
from hyperdp_lib.baselines.dp_sgd import LossFunction, PrivacyPlan
from hyperdp_lib.baselines.dp_training import TrainConfig
from hyperdp_lib.certificate import Certificate
from hyperdp_lib.data import InputError
from hyperdp_lib.ledger import LedgerEntry


@dataclass(frozen=True)
class DPHybridConfig(TrainConfig):
    """Public choices of one run; layers, rank and ``lora_alpha`` are the hypernetwork's.

    The defaults lie in the middle. On public stand-ins a strict budget (epsilon = 1) wants a large share and a learning
    rate so small that DP-SGD does little, a generous one (10) a share of 0.1 and a learning rate of 1e-2.

    Parameters
    ----------
    share : float
        Part of the squared Gaussian-DP parameter that goes to the noisy sum, in (0, 1).
    """

    share: float = 0.5
    learning_rate: float = 3e-3
    clip_norm: float = 0.01
    num_steps: int = 20
    noise_draws: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.share < 1:
            raise InputError(
                f"share must lie strictly between 0 (that is dp_lora) and 1 (that is dp_deepsets), got {self.share}."
            )

    def check_budget(self, epsilon: float, delta: float, neighboring_relation: str, declared_size: float) -> None:
        """As for DP-SGD alone, whose part of a budget under ``replace_one`` with sampled batches is smaller."""
        super().check_budget(epsilon, delta, neighboring_relation, declared_size)
        sampled = dp_sgd.sample_rate(self.expected_batch_size, declared_size) < 1
        if sampled and neighboring_relation == "replace_one" and math.isfinite(epsilon):
            kept = 1 - self.share
            super().check_budget(kept * epsilon, kept * delta, neighboring_relation, declared_size)


@dataclass(frozen=True)
class BudgetSplit:
    """What each part costs by itself, together at most the whole budget.

    Attributes
    ----------
    sum_epsilon, sum_delta : float
        Of the noisy sum.
    sgd_epsilon, sgd_delta : float
        Of DP-SGD: `dp_sgd.privacy_plan` turns it into noise.
    """

    sum_epsilon: float
    sum_delta: float
    sgd_epsilon: float
    sgd_delta: float

    @property
    def sum_multiplier(self) -> float:
        """Noise over sensitivity of the noisy sum."""
        return accounting.noise_multiplier(self.sum_epsilon, self.sum_delta)

    def charges(self, plan: PrivacyPlan, relation: str) -> tuple[LedgerEntry, LedgerEntry]:
        """The two ledger entries."""
        of_sum = ledger.gaussian_charge("one noisy sum of embeddings", self.sum_multiplier, self.sum_delta, relation)
        title = "DP-SGD LoRA from the decoded adapter"
        return of_sum, dp_training.dp_sgd_charge(plan, title, self.sgd_epsilon, self.sgd_delta, relation)


@functools.cache  # seconds of numerical composition, and the same for every seed
def split_budget(
    epsilon: float,
    delta: float,
    neighboring_relation: str,
    share: float,
    *,
    expected_batch_size: float,
    declared_size: float,
    num_steps: int,
) -> BudgetSplit:
    """The split described above, for the sizes and steps of DP-SGD; the ledger of both stays within the budget.

    Examples
    --------
    >>> sizes = dict(expected_batch_size=50, declared_size=50, num_steps=10)
    >>> half = split_budget(1.0, 1e-5, "add_or_remove_one", 0.5, **sizes)
    >>> round(half.sum_multiplier, 2), round(half.sgd_epsilon, 1)
    (5.28, 0.7)
    """
    if math.isinf(epsilon):
        return BudgetSplit(epsilon, delta, epsilon, delta)
    sizes: dict[str, Any] = dict(
        expected_batch_size=expected_batch_size, declared_size=declared_size, num_steps=num_steps
    )
    rate = dp_sgd.sample_rate(expected_batch_size, declared_size)
    if neighboring_relation == "replace_one" and rate < 1:
        sum_delta, sgd_epsilon, sgd_delta = share * delta, (1 - share) * epsilon, (1 - share) * delta
        sum_epsilon = share * epsilon
    else:
        kept = dp_sgd_accounting.kept(delta)  # the rest is for the end of DP-SGD's noise
        whole = accounting.noise_multiplier(epsilon, kept)
        sum_delta = sgd_delta = delta
        sum_epsilon = accounting.epsilon(whole / math.sqrt(share), delta)
        multiplier = _sgd_multiplier(epsilon, kept, whole, share, rate, num_steps)
        if rate == 1:
            sgd_epsilon = accounting.epsilon(multiplier / math.sqrt(num_steps), kept)
        else:
            # the stricter of two accountants then turns it into a little more noise than `multiplier`
            sgd_epsilon = dp_sgd_accounting.pld_epsilon([(multiplier, rate, num_steps)], kept)
    while True:  # one round as a rule: DP-SGD's own calibration may differ from ours in the last digits
        split = BudgetSplit(sum_epsilon, sum_delta, sgd_epsilon, sgd_delta)
        plan = dp_sgd.privacy_plan(sgd_epsilon, sgd_delta, neighboring_relation, **sizes)
        if ledger.ledger_epsilon(split.charges(plan, neighboring_relation), delta, neighboring_relation) <= epsilon:
            return split
        sgd_epsilon *= 0.998


def _sgd_multiplier(
    epsilon: float, delta: float, whole: float, share: float, sample_rate: float, num_steps: int
) -> float:
    """The least noise multiplier of DP-SGD, up to 0.2 %, that fits beside a noisy sum of ``whole / sqrt(share)``."""

    def fits(multiplier: float) -> bool:
        parts = [(whole / math.sqrt(share), 1.0, 1), (multiplier, sample_rate, num_steps)]
        return dp_sgd_accounting.pld_epsilon(parts, delta) <= epsilon

    # exact without sampling, which needs the most noise: an upper bound, but for the accountant's rounding
    high = whole / math.sqrt(1 - share) * math.sqrt(num_steps)
    while not fits(high):
        high *= 1.0005
    if sample_rate == 1:
        return high
    low = 0.8 * high
    while low > 0.02 and fits(low):  # below 0.02 the accountants state nothing
        high, low = low, 0.8 * low
    while high > 1.002 * low:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


@dataclass(frozen=True, eq=False)
class DPHybrid:
    """Trained adapters, and all that is needed to sample from them.

    Attributes
    ----------
    adapter, start : Adapter
        T = number of classes: after DP-SGD, and as decoded from the noisy sum.
    model : torch.nn.Module
        The base model.
    class_names : tuple of str
    config : DPHybridConfig
    split : BudgetSplit
    plan : PrivacyPlan
        Of DP-SGD.
    trained_parameters : int
        Over all adapters.
    noise_dimension : int
        Coordinates noised at a time by DP-SGD; the noisy sum has far fewer.
    seconds : float
        Wall-clock time of both parts.
    """

    adapter: Adapter
    start: Adapter
    model: nn.Module
    class_names: tuple[str, ...]
    config: DPHybridConfig
    split: BudgetSplit
    plan: PrivacyPlan
    trained_parameters: int
    noise_dimension: int
    seconds: float

    @property
    def num_releases(self) -> int:
        """The noisy sum and the noisy gradients (of each class); 0 without privacy."""
        return 1 + self.plan.num_steps if self.plan.noise_std > 0 else 0

    def sample(
        self, num_images: int, *, generator: torch.Generator, num_steps: int = 20, batch_size: int = 500
    ) -> tuple[Tensor, Tensor]:
        """Images ``(num_images, C, H, W)`` in [-1, 1] and their labels, as many of each class, sorted."""
        return sample_classes(self.model, self.adapter, num_images, generator, num_steps, batch_size)


def train_dp_hybrid(
    private_images: Tensor,
    private_labels: Tensor | None,
    base_model: nn.Module,
    hypernetwork: Any,
    config: DPHybridConfig,
    *,
    epsilon: float,
    num_private_declared: int,
    delta: float = 1e-5,
    neighboring_relation: str = "add_or_remove_one",
    class_names: Sequence[str] = ("adapter",),
    seed: int | None = None,
    loss_function: LossFunction | None = None,
    progress: bool = False,
) -> tuple[DPHybrid, Certificate]:
    """One noisy sum, decoded; then DP-SGD LoRA from there. With ``epsilon = inf`` by the same code, not private.

    Parameters
    ----------
    private_images : Tensor
        ``(N, C, H, W)`` in [-1, 1], of the base model's size.
    private_labels : Tensor or None
        ``(N,)`` with values in ``0 .. len(class_names) - 1``, or ``None`` for one unlabelled class.
    base_model, hypernetwork
        Public, and left as they are; see ``load_pretrained``.
    epsilon, delta, neighboring_relation
        The budget of both parts together.
    num_private_declared, class_names, seed, loss_function, progress
        As in `dp_lora.train_dp_lora`.

    Returns
    -------
    trained : DPHybrid
    certificate : Certificate
        Its ledger has two entries.  For ``epsilon = inf`` it says NOT PRIVATE.
    """
    started = time.perf_counter()
    names = tuple(class_names)
    dp_lora.check_request(private_images, base_model, names)
    if not names:
        raise InputError("class_names is empty: name the public label set.")
    if num_private_declared < 1:
        raise InputError(f"num_private_declared must be at least 1, got {num_private_declared}.")
    config.check_budget(epsilon, delta, neighboring_relation, num_private_declared / len(names))
    private_rows = dp_training.check_private(private_images, private_labels, names)
    split = split_budget(
        epsilon,
        delta,
        neighboring_relation,
        config.share,
        expected_batch_size=config.expected_batch_size,
        declared_size=num_private_declared / len(names),
        num_steps=config.num_steps,
    )
    noisy_sum, noise_std = controls.noisy_class_sums(
        private_images,
        private_rows,
        hypernetwork.encoder,
        epsilon=split.sum_epsilon,
        num_classes=len(names),
        delta=split.sum_delta,
        neighboring_relation=neighboring_relation,
        seed=0 if math.isinf(epsilon) else seed,  # where there is no noise, the mechanism wants a seed
    )
    start = planning.decode(noisy_sum, noise_std, hypernetwork, names)
    lora_config = DPLoraConfig(
        r=hypernetwork.config.r,
        lora_alpha=hypernetwork.config.lora_alpha,
        target_modules=hypernetwork.config.target_modules,
    )
    lora_models: list[dp_lora.LoraModel] = []

    def make_trainee(label: int) -> nn.Module:
        lora_models.append(dp_lora.lora_model(base_model, lora_config))
        lora_models[-1].start_at(start[label])
        return lora_models[-1].model

    run = dp_training.train(
        make_trainee,
        private_images,
        private_labels,
        config,
        epsilon=split.sgd_epsilon,
        delta=split.sgd_delta,
        neighboring_relation=neighboring_relation,
        num_private_declared=num_private_declared,
        per_class=True,
        class_names=names,
        seed=seed,  # no noise of the sum is met again: that comes from another generator
        loss_function=loss_function,
        progress=progress,
    )
    trained = DPHybrid(
        concatenate([made.adapter() for made in lora_models], names),
        start,
        base_model,
        names,
        config,
        split,
        run.plan,
        run.trained_parameters,
        run.noise_dimension,
        time.perf_counter() - started,
    )
    plan = run.plan
    fields: dict[str, Any] = {}
    if math.isinf(epsilon):
        stated, rng = certificate.NO_PRIVACY, certificate.NO_NOISE
        charges: tuple[LedgerEntry, ...] = (
            LedgerEntry("other", "one sum of embeddings and LoRA training, without noise", math.inf, 0.0),
        )
    else:
        # of the two generators the weaker one is named
        stated, rng = certificate.DP_SGD, certificate.FLOAT_NOISE if seed is None else certificate.SEEDED_NOISE
        charges = (dp_training.declared_size(num_private_declared), *split.charges(plan, neighboring_relation))
        sensitivity = plan.sensitivity * config.clip_norm
        fields = dict(
            noise_multiplier=plan.noise_multiplier,
            noise_std=plan.noise_multiplier * sensitivity,
            clip_norm=config.clip_norm,
            sensitivity=sensitivity,
            dimension=run.noise_dimension,
        )
    statement = certificate.ledger_certificate(
        charges,
        delta,
        method="dp_hybrid",
        mechanism=stated,
        neighboring_relation=neighboring_relation,
        rng=rng,
        epsilon=epsilon,
        num_private=num_private_declared,
        class_names=names if len(names) > 1 else (),
        base_model_sha256=artefacts.tensors_sha256(base_model.state_dict()),
        encoder_sha256=artefacts.tensors_sha256(hypernetwork.encoder.state_dict()),
        hypernetwork_sha256=artefacts.tensors_sha256(hypernetwork.decoder_state()),
        **fields,
    )
    return trained, statement
