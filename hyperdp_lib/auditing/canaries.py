"""DP-SGD audited in a single run (Steinke, Nasr & Jagielski 2023), through the loop that trains every DP-SGD rival.

A thousand canaries, each put in by a fair coin. The gradient of each lies along a coordinate of its own and is as long
as the clip norm, the worst that an example can do; the model is one linear layer, so that nothing else moves. Whoever
sees the trained weights guesses the coins of the canaries with the largest and the smallest weights. Guessing better
than epsilon allows would refute the certificate (`bounds.one_run_epsilon`).

One run is cheap and its bound is loose: it says that the noise is there and about right, not that it is exact. That is
what the tests of `hyperdp_lib.baselines.dp_training` measure.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hyperdp_lib.auditing.bounds import one_run_epsilon
from hyperdp_lib.baselines import dp_training
from hyperdp_lib.baselines.dp_training import TrainConfig


@dataclass(frozen=True)
class CanaryAudit:
    """What one run proves; see `audit_dp_sgd`."""

    epsilon: float
    delta: float
    epsilon_lower_bound: float
    confidence: float
    num_canaries: int
    guesses: int
    correct: int
    neighboring_relation: str
    expected_batch_size: float

    @property
    def passed(self) -> bool:
        """Whether the guesses stayed within the claim."""
        return self.epsilon_lower_bound <= self.epsilon

    def to_plain(self) -> dict[str, Any]:
        """For JSON, where full batches are ``null``."""
        size = None if math.isinf(self.expected_batch_size) else self.expected_batch_size
        return {**asdict(self), "expected_batch_size": size, "passed": self.passed}


def audit_dp_sgd(
    epsilon: float,
    *,
    delta: float = 1e-5,
    num_canaries: int = 1000,
    num_steps: int = 10,
    expected_batch_size: float = math.inf,
    confidence: float = 0.99,
    guess_share: float = 0.2,
    seed: int | None = None,
) -> CanaryAudit:
    """Train once on canaries and guess which were there.

    Parameters
    ----------
    epsilon, delta : float
        The budget that `dp_training.train` is given.
    num_canaries : int
        Coins. Half of the canaries are in, on average.
    num_steps, expected_batch_size
        Of the training; by default full batches.
    guess_share : float
        Share of the canaries that is guessed, half of them *in*.
    seed : int, optional
        Of coins and noise; an audit of secret noise has none.
    """
    coins = torch.Generator()
    coins.seed() if seed is None else coins.manual_seed(seed)
    present = torch.rand(num_canaries, generator=coins) < 0.5
    clip_norm = 0.5
    private_images = torch.eye(num_canaries)[present].view(-1, 1, 1, num_canaries)

    def make_trainee(_: int) -> nn.Module:
        linear = nn.Linear(num_canaries, 1, bias=False)
        nn.init.zeros_(linear.weight)
        return dp_training.trainable(nn.Sequential(nn.Flatten(), linear))

    def loss(model: nn.Module, images: Tensor, *, generator: torch.Generator, labels: Tensor | None) -> Tensor:
        return -10 * clip_norm * model(images).squeeze(1)  # clipped to clip_norm: the weight of a canary grows

    run = dp_training.train(
        make_trainee,
        private_images,
        None,
        TrainConfig(
            learning_rate=0.01,
            clip_norm=clip_norm,
            num_steps=num_steps,
            expected_batch_size=expected_batch_size,
            ema_decay=0.0,
        ),
        epsilon=epsilon,
        delta=delta,
        num_private_declared=max(1, num_canaries // 2),
        per_class=False,
        seed=seed,
        loss_function=loss,
    )
    (trainee,) = run.trainees
    weights = next(trainee.parameters()).detach().flatten()
    ranked, each = weights.argsort(), max(1, round(guess_share * num_canaries / 2))
    correct = int(present[ranked[-each:]].sum()) + int((~present[ranked[:each]]).sum())
    return CanaryAudit(
        epsilon,
        delta,
        one_run_epsilon(correct, 2 * each, num_canaries, delta, confidence),
        confidence,
        num_canaries,
        2 * each,
        correct,
        "add_or_remove_one",
        expected_batch_size,
    )
