r"""Attacks on what is released: who was in the private set? Research only.

*Membership* (`membership`). Each of a few dozen candidate images is put into the private set by a fair coin, a release
is made, and a thief guesses the coins: the likelihood-ratio attack of Carlini et al. (2022, arXiv 2112.03570). From
shadow releases, made by itself with coins that it knows, it fits a Gaussian to each candidate's score when in and when
out, and says *in* where the first is the likelier. Three thieves, from most to least informed:

* ``noisy sum`` (ours only) has the released sum and knows all other coins: the inner product of what is left with the
  candidate's embedding. No score tells more;
* ``adapter`` has the adapter: by how much it lowers the denoising loss of the candidate, over fixed draws of noise;
* ``samples`` has samples: the distance from the candidate to the nearest one, in public features.

Under mu-GDP, whatever is known of the others, ``TPR <= Phi(Phi^-1(FPR) + mu)``. Averages over images and over the
other coins keep it, since the right side is concave. So ``TPR - FPR <= 2 Phi(mu / 2) - 1`` and ``AUC <= Phi(mu /
sqrt 2)``.

*Copies*. Are samples nearer to the members than to the candidates left out? `evaluation.memorisation`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from scipy.spatial import distance
from torch import Tensor, nn

from hyperdp_lib import accounting, data, diffusion, embedding, mechanism, planning, pretrained
from hyperdp_lib.adapter import Adapter, apply_adapters
from hyperdp_lib.auditing import bounds
from hyperdp_lib.baselines import controls, dp_lora
from hyperdp_lib.baselines.dp_lora import DPLoraConfig
from hyperdp_lib.progress import progress_bar
from hyperdp_lib.scores import evaluation

CONFIDENCE = 0.99
Released = tuple[Adapter, NDArray[np.float64] | None]
Releases = Callable[[Tensor, Tensor, nn.Module, Any, float, float], Iterator[Released]]
Scores = dict[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Game:
    """Public choices of one game of membership.

    Attributes
    ----------
    num_candidates : int
        Images with a coin each: a private set holds half of them on average.
    shadows, trials : int
        Releases from which the thief learns, and from which it is judged.
    loss_draws : int
        Draws of noise and time step for each loss, the same for all releases.
    num_samples, sampling_steps : int
        Samples that the thief of samples has.
    """

    num_candidates: int = 32
    shadows: int = 128
    trials: int = 128
    loss_draws: int = 8
    num_samples: int = 32
    sampling_steps: int = 8


@dataclass(frozen=True)
class Membership:
    """How well one thief guessed, and how well anybody can.

    Attributes
    ----------
    advantage, advantage_low, advantage_high : float
        TPR - FPR of the fitted rule, which no threshold was tuned for, and its 99 % interval: Student's over releases,
        which are independent (guesses of several coins of one release are not).
    best_advantage : float
        The largest TPR - FPR over thresholds, picked on the guesses themselves and hence too large.
    auc, tpr_at_1, tpr_at_10 : float
        Area under the ROC, and TPR where the FPR is 1 % and 10 %.
    advantage_bound, auc_bound, tpr_at_1_bound, tpr_at_10_bound : float
        What mu allows.
    mu_lower_bound : float
        From one guess in each release, hence distribution-free (`bounds.mu_lower_bound`).
    """

    attack: str
    advantage: float
    advantage_low: float
    advantage_high: float
    advantage_bound: float
    best_advantage: float
    auc: float
    auc_bound: float
    tpr_at_1: float
    tpr_at_1_bound: float
    tpr_at_10: float
    tpr_at_10_bound: float
    mu_lower_bound: float


def membership(
    method: str, epsilon: float, *, delta: float = 1e-5, game: Game | None = None, seed: int = 0
) -> dict[str, Any]:
    """Play the game with one method of `METHODS` on handwritten digits; see the module.

    Parameters
    ----------
    epsilon : float
        ``inf``: no noise.
    seed : int
        Of the choice of candidates and of the coins. The noise of the releases has none.

    Returns
    -------
    dict
        For JSON: the settings, ``mu`` (None for infinity), a `Membership` for each thief, whether all ``passed``, and
        ``closer_to_members``: share of samples whose nearest candidate was a member (1/2: no copies) with interval.
    """
    game = game or Game()
    public = torch.Generator().manual_seed(seed)
    digits = data.digits("train").images
    private_images = digits[torch.randperm(len(digits), generator=public)[: game.num_candidates]]
    coins = torch.rand(game.shadows + game.trials, game.num_candidates, generator=public) < 0.5
    base_model, network = pretrained.load_pretrained()
    released = METHODS[method](private_images, coins, base_model, network, epsilon, delta)
    scores, closer = _scores(private_images, coins.numpy(), released, base_model, network, game)
    mu = math.inf if math.isinf(epsilon) else 1 / accounting.noise_multiplier(epsilon, delta)
    found = [judge(name, score, coins.numpy(), game.shadows, mu) for name, score in scores.items()]
    return {
        "method": method,
        "epsilon": None if math.isinf(epsilon) else epsilon,
        "delta": delta,
        "mu": None if math.isinf(mu) else mu,
        "neighboring_relation": "add_or_remove_one",
        **asdict(game),
        "attacks": [asdict(one) for one in found],
        "closer_to_members": _mean_and_interval(closer[game.shadows :]),
        "passed": all(one.mu_lower_bound <= mu for one in found),
        "label": evaluation.NOT_DP,
    }


def lira(scores: NDArray[np.floating], coins: NDArray[np.bool_], shadows: int) -> NDArray[np.float64]:
    """Log-likelihood ratios ``(trials, N)`` of in over out, from scores and coins ``(shadows + trials, N)``.

    Each candidate has two Gaussians of its own, of one width: few shadows tell two widths apart badly.
    """
    known, true = scores[:shadows], coins[:shadows]
    mean_in, mean_out = (_column_means(known, where) for where in (true, ~true))
    residual = known - np.where(true, mean_in, mean_out)
    variance = np.maximum(np.square(residual).sum(0) / max(1, shadows - 2), 1e-24)
    return (mean_in - mean_out) * (scores[shadows:] - (mean_in + mean_out) / 2) / variance


def judge(attack: str, scores: NDArray[np.floating], coins: NDArray[np.bool_], shadows: int, mu: float) -> Membership:
    """Run `lira`, compare its guesses with the coins, and put theory's bounds beside.

    Examples
    --------
    >>> coins = np.random.default_rng(0).random((400, 10)) < 0.5
    >>> told = judge("all", coins * 9.0, coins, 200, mu=math.inf)
    >>> told.advantage, told.auc, told.advantage_bound
    (1.0, 1.0, 1.0)
    """
    from sklearn.metrics import roc_auc_score, roc_curve

    ratios, truth = lira(scores, coins, shadows), coins[shadows:]
    advantage, low, high = _mean_and_interval(2 * ((ratios > 0) == truth).mean(1) - 1)
    false_rates, true_rates, _ = roc_curve(truth.ravel(), ratios.ravel(), drop_intermediate=False)
    turn = np.arange(len(truth)), np.arange(len(truth)) % truth.shape[1]  # one guess in each release
    said, true = ratios[turn] > 0, truth[turn]
    counts = bounds.Counts(int((said & ~true).sum()), int((~true).sum()), int((said & true).sum()), int(true.sum()))

    def reached_and_bound(rate: float) -> tuple[float, float]:
        return float(true_rates[false_rates <= rate].max()), float(stats.norm.cdf(stats.norm.ppf(rate) + mu))

    return Membership(
        attack,
        advantage,
        low,
        high,
        float(2 * stats.norm.cdf(mu / 2) - 1),
        float((true_rates - false_rates).max()),
        float(roc_auc_score(truth.ravel(), ratios.ravel())),
        float(stats.norm.cdf(mu / math.sqrt(2))),
        *reached_and_bound(0.01),
        *reached_and_bound(0.10),
        bounds.mu_lower_bound(counts, CONFIDENCE),
    )


# ---- what is attacked --------------------------------------------------------------------------------------


def _dp_deepsets(
    private_images: Tensor, coins: Tensor, base_model: nn.Module, network: Any, epsilon: float, delta: float
) -> Iterator[Released]:
    """Ours. All releases in one call of the mechanism: each is a row, rows are noised independently."""
    codes = embedding.embed(network.encoder, private_images).numpy()
    rows, members = coins.nonzero(as_tuple=True)
    noisy_sum, noise_std = noisy_sums(codes[members], rows.numpy(), len(coins), epsilon, delta)
    adapters = planning.decode(noisy_sum, noise_std, network, [str(i) for i in range(len(coins))])
    for row, adapter in enumerate(adapters):
        known = coins[row].numpy() @ codes - coins[row, :, None].numpy() * codes  # the other members of each candidate
        yield adapter, ((noisy_sum[row] - known) * codes).sum(1)


def _lora(config: DPLoraConfig) -> Releases:
    """LoRA by DP-SGD in full batches, so that mu is exact; with ``epsilon = inf`` by the same loop, not private."""

    def releases(
        private_images: Tensor, coins: Tensor, base_model: nn.Module, network: Any, epsilon: float, delta: float
    ) -> Iterator[Released]:
        for present in coins:
            trained, _ = dp_lora.train_dp_lora(
                private_images[present],
                None,
                base_model,
                config,
                epsilon=epsilon,
                delta=delta,
                num_private_declared=len(private_images) // 2,
            )
            assert trained.adapter is not None  # one adapter for one class
            yield trained.adapter, None

    return releases


METHODS: Mapping[str, Releases] = {
    "dp_deepsets": _dp_deepsets,
    "lora_non_private": _lora(DPLoraConfig(learning_rate=1e-2, num_steps=20)),
    "dp_lora": _lora(DPLoraConfig(learning_rate=1e-2, num_steps=20)),
}
"""Name in the comparison -> releases of the members that each row of coins picks."""


def noisy_sums(
    private_codes: NDArray[np.floating], private_rows: NDArray[np.int64], num_rows: int, epsilon: float, delta: float
) -> tuple[NDArray[np.float64], float]:
    """Noisy sums of embeddings ``(num_rows, k)`` and the size of their noise; secret noise, or none at all."""
    config = controls.gaussian_sum(epsilon, private_codes.shape[1], num_rows, delta)
    noisy_sum = mechanism.noisy_sum([(private_codes, private_rows)], config, seed=0 if math.isinf(epsilon) else None)
    return noisy_sum, config.noise_std


# ---- what the thieves look at ------------------------------------------------------------------------------


def _scores(
    private_images: Tensor,
    coins: NDArray[np.bool_],
    releases: Iterator[Released],
    base_model: nn.Module,
    network: Any,
    game: Game,
) -> tuple[Scores, NDArray[np.float64]]:
    """Scores ``(releases, N)`` of each thief, and of each release the share of samples nearer to a member."""
    features = feature_network()
    candidates = evaluation.features(features, private_images)
    unchanged = _losses(private_images, base_model, game)
    scores: dict[str, list[NDArray[np.floating]]] = {"noisy sum": [], "adapter": [], "samples": []}
    closer = []
    rounds = zip(coins, releases, strict=True)
    for present, (adapter, told_by_sum) in progress_bar(rounds, desc="releases", total=len(coins)):
        if told_by_sum is not None:
            scores["noisy sum"].append(told_by_sum)
        with torch.no_grad(), apply_adapters(base_model, adapter):
            scores["adapter"].append(unchanged - _losses(private_images, base_model, game))
        samples = diffusion.sample(
            base_model,
            adapter,
            game.num_samples,
            generator=torch.Generator().manual_seed(0),
            num_steps=game.sampling_steps,
        )
        seen = evaluation.features(features, samples)
        scores["samples"].append(-distance.cdist(candidates, seen).min(1))
        closer.append(
            evaluation.memorisation(seen, candidates[present], candidates[~present])["closer_to_train"]
            if 0 < present.sum() < len(present)
            else 0.5
        )
    return {name: np.stack(rows) for name, rows in scores.items() if rows}, np.array(closer)


@torch.no_grad()
def _losses(private_images: Tensor, model: nn.Module, game: Game) -> NDArray[np.floating]:
    generator = torch.Generator().manual_seed(0)
    return diffusion.denoising_loss(model, private_images, generator, noise_draws=game.loss_draws).numpy()


def feature_network() -> embedding.FeatureNetwork:
    """Public features that no release is made with."""
    return embedding.FeatureNetwork.from_pretrained(pretrained.features_file())


def _column_means(values: NDArray[np.floating], where: NDArray[np.bool_]) -> NDArray[np.floating]:
    return np.where(where, values, 0.0).sum(0) / np.maximum(where.sum(0), 1)


def _mean_and_interval(values: NDArray[np.floating]) -> tuple[float, float, float]:
    """Mean of independent values and Student's interval."""
    reach = stats.t.isf((1 - CONFIDENCE) / 2, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return float(values.mean()), float(values.mean() - reach), float(values.mean() + reach)
