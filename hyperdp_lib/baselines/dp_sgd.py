"""DP-SGD for any module, through Opacus: how much noise, whose gradients, which batches.

DP-SGD (Abadi et al. 2016, arXiv 1607.00133) clips each example's gradient, sums, and adds Gaussian noise at
every step.  `hyperdp_lib.baselines.dp_training` trains models with it.

What is public: the configuration and the *declared* number of examples, from which sampling rate and gradient
denominator are computed; the true number is never used.  Which examples form a batch, like the noise, stays
secret.

Noise is drawn in double precision from torch's Mersenne twister, its whole state filled by the operating system
(`secret_generator`).  That is neither the exact arithmetic of `hyperdp_lib.mechanism` nor a cryptographic generator,
and Opacus' ``secure_mode`` would not give the first (Opacus issue 616).  Rounding is not accounted for; the end of the
noise is.

The end of the noise
--------------------
`gaussian_noise` makes pairs of normal numbers whose length never exceeds ``R = sqrt(2 * 106 * log(2)) = 12.12``
standard deviations.  So its law is the Gaussian's under the condition ``B`` that no pair is longer, and an outcome
beyond the end of one data set's noise betrays that it was not that data set's.

*Theorem.* If DP-SGD with Gaussian noise is (epsilon, delta')-DP, then with this noise it is (epsilon, delta)-DP for
``delta >= (delta' + leak) exp(T d 2**-105)``, with

    leak = T sqrt(d) exp(-(R - 1/m)**2 / 2),   1/m <= R - 1,

``T`` steps, ``d`` noised coordinates (of all trainees) and ``m`` the noise over the sensitivity.

*Proof.* Show the adversary all steps, and of each batch all but the example in question: the accountants' pairs of
distributions are those of each step given these.  Let ``P, Q`` be the Gaussian laws of two neighbours, ``P', Q'`` the
laws here, and ``A`` the event that every step lies within reach of both neighbours' noise.  Then ``P'(E)`` is at most
``P(E and A) + P(not A, within P's reach)`` over the probability of ``B``, and the first term at most ``e**epsilon Q(E
and A) + delta'``, where ``Q(E and A)`` is at most ``Q'(E)`` times the same probability.  For the second, a pair of
coordinates that is moved by ``v`` leaves reach with probability at most ``g(v) = exp(-(R - v)**2 / 2)`` less the same
at ``v = 0``, convex up to ``R - 1``; so ``g(v) <= g(1/m) v m``.  The moves of all pairs have L2 norm ``1/m``, hence sum
at most ``sqrt(d) / m``.  Each pair misses ``B`` with probability ``2**-106``.

`privacy_plan` calibrates ``delta'`` to 99 % of delta, and refuses plans whose leak does not fit into the rest.
"""

from __future__ import annotations

import functools
import math
import secrets
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from hyperdp_lib import accounting, dp_sgd_accounting
from hyperdp_lib.data import InputError
from hyperdp_lib.ledger import RELATIONS

MIN_DELTA = dp_sgd_accounting.MIN_DP_SGD_DELTA
SAMPLED_EPSILONS = (0.01, 100.0)
"""Range of epsilon in which sampled batches are calibrated in reasonable time."""
MAX_NOISED = 2**26
"""Most coordinates, of all trainees together, that the plans' allowance for the end of the noise covers."""
NOISE_END = math.sqrt(2 * 106 * math.log(2))
"""Largest length of a pair of numbers of `gaussian_noise`, in standard deviations."""

LossFunction = Callable[..., Tensor]
"""``(model, images, *, generator, labels) -> (N,)``: one loss for each image, from that image alone."""


Batch = tuple[Tensor, Tensor | None]
"""Images, and labels where the model reads them."""

Step = Callable[[Sequence[Batch]], None]
"""Makes one optimiser step from one batch, given in parts that fit into memory."""

# where torch keeps the words of its Mersenne twister, each in eight bytes of Generator.get_state() (tested)
_TWISTER_START, _TWISTER_WORDS = 24, 624
_RATE_UNITS = 2**24  # of torch.rand in single precision, which Opacus compares with the sampling rate


@dataclass(frozen=True)
class PrivacyPlan:
    """How much noise every step gets, and why that gives the budget.

    Attributes
    ----------
    noise_std : float
        Standard deviation of the noise on each coordinate of a step's gradient *sum*, over the clip norm.
    sample_rate : float
        Poisson sampling rate in (0, 1].
    num_steps : int
    declared_size : float
        Declared number of examples.
    sensitivity : float
        Sensitivity of a step's sum, over the clip norm, under the relation that was accounted for.
    accountant : str
        The route from noise to (epsilon, delta), in words.
    """

    noise_std: float
    sample_rate: float
    num_steps: int
    declared_size: float
    sensitivity: float
    accountant: str

    @property
    def denominator(self) -> float:
        """What the noisy gradient sum is divided by: the expected batch size at the declared size."""
        return self.sample_rate * self.declared_size

    @property
    def noise_multiplier(self) -> float:
        """Noise over sensitivity, as `hyperdp_lib.accounting` understands it."""
        return self.noise_std / self.sensitivity


def privacy_plan(
    epsilon: float,
    delta: float,
    neighboring_relation: str,
    *,
    expected_batch_size: float,
    declared_size: float,
    num_steps: int,
) -> PrivacyPlan:
    """Noise for a budget.

    Of delta, 1 % is kept for the end of the noise (see the module). Three routes:

    * *Full batches* (expected batch size at least the declared size): T Gaussian mechanisms compose exactly
      to one whose noise is ``sqrt(T)`` times smaller (Dong, Roth & Su 2022).  A step's sensitivity is C, or 2
      C for ``replace_one``.
    * *Poisson batches, add-or-remove or zero-out* (the two have the same pairs of output distributions):
      numerical composition by the PRV accountant.
    * *Poisson batches, replace-one*: no accountant here covers it.  A replacement is a removal and an
      addition, so group privacy for two holds: calibrate add-or-remove to ``epsilon / 2`` and
      ``delta / (1 + exp(epsilon / 2))``.  Valid, but dear: prefer full batches under ``replace_one``.

    Examples
    --------
    >>> sizes = dict(expected_batch_size=50, declared_size=50, num_steps=4)
    >>> plan = privacy_plan(1.0, 1e-5, "add_or_remove_one", **sizes)
    >>> round(plan.noise_std, 2), plan.sample_rate, plan.denominator
    (7.47, 1.0, 50.0)
    """
    rate = sample_rate(expected_batch_size, declared_size)
    check_budget(epsilon, delta, neighboring_relation, rate)
    if math.isinf(epsilon):
        return PrivacyPlan(0.0, rate, num_steps, declared_size, 1.0, "none: not private")
    sensitivity = 1.0
    if rate == 1.0:
        route = "analytic Gaussian mechanism; full batches compose exactly"
        sensitivity = 2.0 if neighboring_relation == "replace_one" else 1.0
        try:
            multiplier = accounting.noise_multiplier(epsilon, dp_sgd_accounting.kept(delta)) * math.sqrt(num_steps)
        except ValueError as error:
            raise InputError(str(error)) from error
    elif neighboring_relation == "replace_one":
        route = "PRV accountant for add_or_remove_one with Poisson sampling; group privacy for two"
        epsilon, delta = one_of_two(epsilon, delta)
        multiplier = _sampled_multiplier(epsilon, dp_sgd_accounting.kept(delta), rate, num_steps)
    else:
        route = "PRV accountant with Poisson sampling"
        multiplier = _sampled_multiplier(epsilon, dp_sgd_accounting.kept(delta), rate, num_steps)
    if not end_leak(multiplier, num_steps) <= 0.99 * dp_sgd_accounting.DP_SGD_RESERVE * delta:
        raise InputError(
            f"this budget leaves so little noise, {multiplier:.2g} sensitivities in {num_steps} steps, that the end of "
            "floating-point noise would show: take more steps, or a smaller epsilon."
        )
    return PrivacyPlan(multiplier * sensitivity, rate, num_steps, declared_size, sensitivity, route)


def sample_rate(expected_batch_size: float, declared_size: float) -> float:
    """The Poisson sampling rate, in (0, 1]: rounded up to 24 bits, which is all that `poisson_batches` tells apart.

    >>> sample_rate(2, 4), sample_rate(math.inf, 4), sample_rate(1, 10) > 0.1
    (0.5, 1.0, True)
    """
    if not declared_size > 0 or not expected_batch_size > 0:
        raise InputError("the declared number of images and the batch size must be positive.")
    return min(1.0, math.ceil(min(1.0, expected_batch_size / declared_size) * _RATE_UNITS) / _RATE_UNITS)


def check_budget(epsilon: float, delta: float, neighboring_relation: str, rate: float = 1.0) -> None:
    """Raise `InputError` for a budget that no plan can have at this sampling rate; quick, and reads nothing.

    >>> check_budget(1.0, 1e-13, "add_or_remove_one")
    Traceback (most recent call last):
    hyperdp_lib.data.InputError: DP-SGD is accounted for from delta 1e-12 on, got 1e-13: choose a larger delta.
    """
    if neighboring_relation not in RELATIONS:
        raise InputError(
            f"unknown neighboring_relation {neighboring_relation!r}: choose one of {', '.join(RELATIONS)}."
        )
    if not epsilon > 0 or (math.isfinite(epsilon) and not 0 < delta < 1):
        raise InputError(f"need epsilon > 0 (inf: not private) and 0 < delta < 1, got {epsilon} and {delta}.")
    if math.isinf(epsilon):
        return
    if delta < MIN_DELTA:
        raise InputError(f"DP-SGD is accounted for from delta {MIN_DELTA:g} on, got {delta:g}: choose a larger delta.")
    if rate == 1:
        return
    if neighboring_relation == "replace_one":
        asked, (epsilon, delta) = epsilon, one_of_two(epsilon, delta)
        if delta < MIN_DELTA:
            raise InputError(
                f"DP-SGD on sampled batches under replace_one needs delta / (1 + exp(epsilon / 2)), {delta:.1e} at "
                f"epsilon {asked:g}, and is accounted for from {MIN_DELTA:g} on: take full batches, or less epsilon."
            )
    low, high = SAMPLED_EPSILONS
    if not low <= epsilon <= high:
        half = " (half of it, under replace_one)" if neighboring_relation == "replace_one" else ""
        raise InputError(
            f"DP-SGD on sampled batches is accounted for at epsilon {low:g} to {high:g}{half}, got {epsilon:g}: "
            "take full batches, or another epsilon."
        )


def one_of_two(epsilon: float, delta: float) -> tuple[float, float]:
    """Budget of one removal or addition with which a replacement, two of them, has this budget (group privacy)."""
    return epsilon / 2, delta / (1 + math.exp(min(epsilon / 2, 700)))


def end_leak(noise_multiplier: float, num_steps: int) -> float:
    """What the end of the noise adds to delta at most, see the module; infinity where the proof does not reach.

    >>> end_leak(1.0, 100) < 1e-20, end_leak(0.2, 100) > 1e-7
    (True, True)
    """
    if not noise_multiplier * (NOISE_END - 1) >= 1:
        return math.inf
    return num_steps * math.sqrt(MAX_NOISED) * math.exp(-((NOISE_END - 1 / noise_multiplier) ** 2) / 2)


def gaussian_noise(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Independent standard normal numbers of this shape, float64 on the CPU, by Box and Muller's method.

    The uniform number below the logarithm has 106 bits, so that the noise ends at `NOISE_END`. ``torch.randn`` ends at
    5.77 in single precision and at 8.57 in double.
    """
    pairs = (math.prod(shape) + 1) // 2
    coarse, fine, turn = torch.rand(3, pairs, dtype=torch.float64, generator=generator)
    radius = (-2 * (coarse + (1 - fine) * 2.0**-53).log()).clamp_min(0).sqrt()
    angle = 2 * math.pi * turn
    return torch.cat([radius * angle.cos(), radius * angle.sin()])[: math.prod(shape)].view(tuple(shape))


def secret_generator() -> torch.Generator:
    """A generator that nobody can guess, on the CPU: its state comes from the operating system.

    ``manual_seed`` would not do: of its argument torch's Mersenne twister keeps 32 bits, few enough to try them all
    against published noise.  So all of its 624 words are set.

    >>> a, b = secret_generator(), secret_generator()
    >>> bool((torch.randn(4, generator=a) == torch.randn(4, generator=b)).any())
    False
    """
    generator = torch.Generator()
    state = generator.manual_seed(0).get_state()  # nothing drawn yet: the words are twisted before the first number
    words = np.frombuffer(secrets.token_bytes(4 * _TWISTER_WORDS), np.uint32).astype(np.uint64)
    end = _TWISTER_START + words.nbytes
    state[_TWISTER_START:end] = torch.from_numpy(words.view(np.uint8))
    return generator.set_state(state)


@functools.cache  # seconds of numerical composition, and the same for every seed
def _sampled_multiplier(epsilon: float, delta: float, sample_rate: float, num_steps: int) -> float:
    try:
        return dp_sgd_accounting.dp_sgd_noise_multiplier(epsilon, delta, sample_rate, num_steps)
    except ValueError as error:
        raise InputError(str(error)) from error


def require_contiguous_inputs(model: nn.Module) -> None:
    """Hand every Conv2d a contiguous input.

    Opacus 1.6.0 unfolds a convolution's input with strides that assume contiguous memory, and so computes
    wrong per-example gradients, without a message, for the channels-last tensors that diffusers' attention
    returns.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))


class Gradients(Protocol):
    """Fills ``grad_sample`` of every trainable parameter; `ExampleGradients` or one's own."""

    def backward(
        self, private_images: Tensor, private_labels: Tensor | None, generator: torch.Generator
    ) -> None:
        """Per-example gradients, ``(len(private_images), *parameter.shape)``."""

    def remove(self) -> None:
        """Undo what was done to the model."""


class ExampleGradients:
    """Per-example gradients by Opacus' hooks, averaged over each example's noise draws.

    Opacus keeps one gradient for each row of the batch.  An example fills ``noise_draws`` consecutive rows
    (noise multiplicity, Dockhorn et al. 2023); its gradient is the mean over them, formed before anything is
    clipped, so that one example moves a step's sum by at most one clip norm however many draws it gets.

    Modules that own trainable parameters must be in training mode: Opacus records nothing otherwise.
    """

    def __init__(self, model: nn.Module, loss_function: LossFunction, noise_draws: int = 1) -> None:
        from opacus.grad_sample.grad_sample_module import GradSampleHooks

        require_contiguous_inputs(model)
        self.model, self.loss_function, self.noise_draws = model, loss_function, noise_draws
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self._hooks = GradSampleHooks(model, loss_reduction="sum")

    def backward(
        self, private_images: Tensor, private_labels: Tensor | None, generator: torch.Generator
    ) -> None:
        """Fill ``grad_sample`` of every trainable parameter, shape ``(len(private_images), *parameter.shape)``."""
        # Poisson sampling may pick nobody, and diffusers' attention cannot take an empty batch
        if len(private_images) == 0:
            for p in self.parameters:
                p.grad_sample = p.new_zeros((0, *p.shape))  # type: ignore[attr-defined]
            return
        loss = summed_loss(
            self.model, self.loss_function, private_images, private_labels, self.noise_draws, generator
        )
        with warnings.catch_warnings():
            # said of layers fed by the time step alone; their parameters' gradients are right (tested)
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            loss.backward()
        for p in self.parameters:
            rows = p.grad_sample  # type: ignore[attr-defined]
            # the loss is divided by noise_draws already: the sum over an example's rows is their mean
            mean = rows.view(len(private_images), self.noise_draws, *p.shape).sum(1)
            p.grad_sample = mean  # type: ignore[attr-defined]

    def remove(self) -> None:
        """Take Opacus' hooks off the model."""
        self._hooks.remove_hooks()


def summed_loss(
    model: nn.Module,
    loss_function: LossFunction,
    private_images: Tensor,
    private_labels: Tensor | None,
    noise_draws: int,
    generator: torch.Generator,
) -> Tensor:
    """Sum over examples of the loss, averaged over ``noise_draws`` draws for each example."""
    repeated = private_images.repeat_interleave(noise_draws, 0)
    repeated_labels = None if private_labels is None else private_labels.repeat_interleave(noise_draws, 0)
    return loss_function(model, repeated, generator=generator, labels=repeated_labels).sum() / noise_draws


def noisy_step(
    gradients: Gradients,
    optimizer: torch.optim.Optimizer,
    plan: PrivacyPlan,
    clip_norm: float,
    *,
    noise: torch.Generator,
    draws: torch.Generator,
) -> Step:
    """A DP-SGD step: (sum of clipped per-example gradients + noise) / declared expected batch size.

    An example whose gradient is not finite counts as zero, like a clipped one that is too long to be measured.

    ``noise`` and ``draws`` (the diffusion's own noise and time steps) are secret, and on the CPU.  Examples take draws
    in turn, so one example more gives those behind it other draws, and for known draws a step moves by several clip
    norms.  Unknown draws are the same in law for every example, and only its own clip norm counts.
    """
    private = _optimizer_class()(
        optimizer,
        noise_multiplier=plan.noise_std,
        max_grad_norm=clip_norm,
        expected_batch_size=plan.denominator,  # a float: Opacus only divides by it
        generator=noise,
    )

    def step(parts: Sequence[Batch]) -> None:
        for index, (images, labels) in enumerate(parts):
            private.zero_grad()
            gradients.backward(images, labels, draws)
            # all parts but the last are only clipped and summed; noise comes once, with the last
            private.signal_skip_step(do_skip=index < len(parts) - 1)
            private.step()

    return step


@functools.cache
def _optimizer_class() -> type:
    """Opacus' optimizer with our noise, and without gradients that are not finite."""
    from opacus.optimizers import DPOptimizer

    class Optimizer(DPOptimizer):
        def clip_and_accumulate(self) -> None:
            finite = torch.stack(
                [p.grad_sample.isfinite().view(len(p.grad_sample), p.numel()).all(1).cpu() for p in self.params]
            ).all(0)
            if not finite.all():
                for p in self.params:
                    p.grad_sample[~finite.to(p.grad_sample.device)] = 0
            super().clip_and_accumulate()

        def add_noise(self) -> None:
            std = self.noise_multiplier * self.max_grad_norm
            for p in self.params:
                noise = std * gaussian_noise(p.summed_grad.shape, self.generator)
                p.grad = (p.summed_grad.cpu().double() + noise).to(p.summed_grad).view_as(p)  # rounded once, at the end

    return Optimizer


def plain_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    plan: PrivacyPlan,
    loss_function: LossFunction,
    noise_draws: int,
    *,
    draws: torch.Generator,
) -> Step:
    """The same step without clipping and without noise: ordinary training, not private."""

    def step(parts: Sequence[Batch]) -> None:
        optimizer.zero_grad()
        for images, labels in parts:
            if len(images):
                loss = summed_loss(model, loss_function, images, labels, noise_draws, draws)
                (loss / plan.denominator).backward()
        optimizer.step()

    return step


def poisson_batches(private_count: int, plan: PrivacyPlan, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices of each step's batch: every example independently at the sampling rate; maybe nobody.

    A rate that has more than 24 bits is rounded down here, so that the rate accounted for is never exceeded.
    """
    from opacus.utils.uniform_sampler import UniformWithReplacementSampler

    if private_count == 0:  # the sampler refuses, but an empty class must train like any other
        yield from (torch.zeros(0, dtype=torch.long) for _ in range(plan.num_steps))
        return
    rate = math.floor(plan.sample_rate * _RATE_UNITS) / _RATE_UNITS
    sampler = UniformWithReplacementSampler(
        num_samples=private_count, sample_rate=rate, generator=generator, steps=plan.num_steps
    )
    yield from (torch.tensor(indices, dtype=torch.long) for indices in sampler)
