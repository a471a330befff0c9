r"""Which layers should DP-SGD tune? Searched on the private images themselves, with the price of the search.

Cattan, Choquette-Choo, Papernot & Thakurta (2022, arXiv 2210.02156): under differential privacy, which layers of a
pretrained network are tuned is one more hyper-parameter. Here it is searched among subsets of the base model's layers,
with LoRA on each, by the method whose price is known (Papernot & Steinke 2022, arXiv 2110.03620):

* the number of trials K is random, from a public distribution: Poisson, or truncated negative binomial;
* a *trial* Q takes a uniformly random subset, trains it by DP-SGD (`dp_lora`) and scores it by one noisy sum of the
  examples' improvements, each clipped;
* of the K trials the one with the highest score is released: subset, adapters and its score. Nothing else.

The price, with proof by their theorems, is in `private_selection`: about twice the noise of one training, however many
subsets there are. The alternative costs nothing: `choose_on_public` makes the same choice on public stand-ins.

The price does not cover how many trials were made, nor how long they took. Whoever runs the search sees both and must
keep them; ``seconds`` is therefore an expectation.

Differences from the original: they tune subsets of an image classifier and report the best (see
`layer_classification`); that the search is private, and that its object is a diffusion model, is ours.
"""

from __future__ import annotations

import dataclasses
import math
import secrets
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import norm
from torch import Tensor, nn

from hyperdp_lib import artefacts, certificate, diffusion, mechanism
from hyperdp_lib.adapter import apply_adapters, lora_geometry
from hyperdp_lib.baselines import dp_lora, dp_training, private_selection
from hyperdp_lib.baselines.dp_lora import DPLora, DPLoraConfig
from hyperdp_lib.baselines.dp_sgd import LossFunction
from hyperdp_lib.baselines.private_selection import SearchPlan
from hyperdp_lib.certificate import Certificate
from hyperdp_lib.data import ImageSet, InputError
from hyperdp_lib.embedding import fair_size, in_batches
from hyperdp_lib.ledger import LedgerEntry
from hyperdp_lib.progress import progress_bar

_BLOCK_LAYERS = r"(attn1\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.(0\.proj|2)|norm1\.linear)"
SUBSETS: Mapping[str, str] = {
    "all": dp_lora.ALL_BLOCK_LAYERS,
    "attention": dp_lora.ATTENTION,
    "feed_forward": r".*\.ff\.net\.(0\.proj|2)",
    "modulation": r".*\.norm1\.linear",
    "first_half": rf"transformer_blocks\.{{blocks}}\.{_BLOCK_LAYERS}",
    "second_half": rf"transformer_blocks\.{{blocks}}\.{_BLOCK_LAYERS}",
    "final": r"proj_out_[12]",
}
"""Name of a subset of a DiT's layers to PEFT's ``target_modules``; ``{blocks}`` stands for numbers of blocks."""

_CHUNK = 32  # images scored at a time, where places do not matter: see `denoising_losses`
_SCORE_SEED = 20_211_007


@dataclass(frozen=True)
class LayerSearchConfig(DPLoraConfig):
    """Public choices of a search; every trial trains with these but for ``target_modules``, which is not used.

    Parameters
    ----------
    candidates : tuple of str
        Names in `SUBSETS`, or regular expressions as PEFT's ``target_modules``.
    mean_trials : float
        Expected number of trials, at least 1.
    shape : float
        Of the number of trials: ``inf`` Poisson (it may be 0: then the base model is released as it is), 1 geometric,
        0 logarithmic, otherwise truncated negative binomial.
    score_share : float
        Part of a trial's privacy loss (of its squared Gaussian-DP parameter, for full batches) spent on its score.
    score_clip : float
        Largest improvement of one example, in either direction, that counts.
    score_draws : int
        Noise levels, equally likely, at which an example's improvement is averaged.
    """

    candidates: tuple[str, ...] = tuple(SUBSETS)
    mean_trials: float = 5.0
    shape: float = math.inf
    score_share: float = 0.1
    score_clip: float = 0.1
    score_draws: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "candidates", tuple(self.candidates))  # JSON has lists
        if not self.candidates or len(set(self.candidates)) < len(self.candidates):
            raise InputError("candidates must be one or more different subsets of layers.")
        if not 1 <= self.mean_trials < math.inf or not self.shape >= 0:
            raise InputError(
                f"mean_trials must be at least 1 and shape at least 0, got {self.mean_trials} and {self.shape}."
            )
        if not 0 < self.score_share < 1 or not self.score_clip > 0 or self.score_draws < 1:
            raise InputError("need 0 < score_share < 1, score_clip > 0 and score_draws >= 1.")

    def trial(self, target_modules: str) -> DPLoraConfig:
        """The configuration of one trial."""
        shared = {field.name: getattr(self, field.name) for field in dataclasses.fields(DPLoraConfig)}
        return DPLoraConfig(**(shared | {"target_modules": target_modules}))


def target_modules(subset: str, base_model: Any) -> str:
    r"""PEFT's ``target_modules`` for one candidate.

    >>> model = diffusion.build_base_model(diffusion.BaseModelConfig(width=32, num_layers=3))
    >>> target_modules("first_half", model)[:26], target_modules("second_half", model)[:28]
    ('transformer_blocks\\.(0)\\.(', 'transformer_blocks\\.(1|2)\\.(')
    """
    pattern = SUBSETS.get(subset, subset)
    if "{blocks}" not in pattern:
        return pattern
    blocks = len(getattr(base_model, "transformer_blocks", ()))
    if blocks < 2:
        raise InputError(f"{subset!r} needs a base model with two or more transformer blocks: leave it out.")
    half = range(blocks // 2) if subset == "first_half" else range(blocks // 2, blocks)
    return pattern.replace("{blocks}", f"({'|'.join(map(str, half))})")


@torch.no_grad()
def denoising_losses(
    model: nn.Module, private_images: Tensor, draws: int, private_rows: Tensor | None = None
) -> np.ndarray:
    """Denoising loss of each image, ``(N,)`` float64, at ``draws`` equally likely levels with one fixed noise for each.

    A function of one image alone, to the last bit: all images meet the same levels and the same noise, and
    `hyperdp_lib.embedding` sees to the batches.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(_SCORE_SEED)
    quantiles = (np.arange(draws) + 0.5) / draws
    sigma = torch.sigmoid(torch.tensor(norm.ppf(quantiles), dtype=torch.float32))[:, None, None, None, None]
    noise = torch.randn(draws, 1, *private_images.shape[1:], generator=generator)

    def losses(private_chunk: Tensor, private_labels: Tensor | None = None) -> Tensor:
        noisy = ((1 - sigma) * private_chunk + sigma * noise).flatten(0, 1).to(device)
        levels = sigma.flatten().repeat_interleave(len(private_chunk)).to(device)
        labels = None if private_labels is None else private_labels.repeat(draws).to(device)
        velocity = diffusion.predict(model, noisy, levels, labels).cpu().unflatten(0, (draws, len(private_chunk)))
        return (velocity - (noise - private_chunk)).double().square().flatten(2).mean(2).mean(0)

    columns = [private_images] if private_rows is None else [private_images, private_rows]
    blank = [torch.zeros(_CHUNK, dtype=torch.long)] * (len(columns) - 1)
    size = fair_size(lambda public_chunk: losses(public_chunk, *blank), private_images.shape[1:], _CHUNK)
    return in_batches(losses, *columns, size=size).numpy()


def improvements(
    trained: DPLora, base_losses: np.ndarray, private_images: Tensor, private_rows: Tensor, draws: int
) -> np.ndarray:
    """By how much training lowered the loss of each example, ``(N,)``; ``base_losses`` are the base model's."""
    losses = np.zeros(len(private_images))
    if trained.adapter is None:
        losses = denoising_losses(trained.model, private_images, draws, private_rows)
    else:
        for label in range(len(trained.class_names)):
            own = private_rows == label
            biases = {name: change[label : label + 1] for name, change in trained.bias_changes.items()}
            changed = dp_lora.biases_changed(trained.model, biases) if biases else nullcontext()
            with changed, apply_adapters(trained.model, trained.adapter[label]):
                losses[own.cpu().numpy()] = denoising_losses(trained.model, private_images[own], draws)
    return base_losses - losses


def noisy_score(
    private_improvements: np.ndarray, config: LayerSearchConfig, plan: SearchPlan, *, seed: int | None
) -> float:
    """The sum of clipped improvements with noise: one call of the mechanism."""
    sum_config = mechanism.GaussianSum(
        dimension=1,
        noise_multiplier=plan.score_multiplier,
        clip_norm=config.score_clip,
        neighboring_relation=plan.relation,
    )
    seed = 0 if plan.score_multiplier == 0 else seed  # where there is no noise, the mechanism wants a seed
    return float(mechanism.noisy_sum([(private_improvements[:, None], None)], sum_config, seed=seed)[0, 0])


@dataclass(frozen=True, eq=False)
class LayerSearch:
    """The winner of a search, and all that is needed to sample from it.

    Attributes
    ----------
    subset : str or None
        The winning candidate; None if there was no trial, as Poisson allows: then the base model is the result.
    score : float or None
        Its noisy score, a sum over examples: part of the release, at no further cost.
    winner : DPLora or None
    model : torch.nn.Module
        The base model.
    class_names : tuple of str
    config : LayerSearchConfig
    plan : SearchPlan
    seconds : float
        Expected wall-clock time of a search: that of the winning trial times the mean number of trials. The true time
        would tell how many trials there were.
    """

    subset: str | None
    score: float | None
    winner: DPLora | None
    model: nn.Module
    class_names: tuple[str, ...]
    config: LayerSearchConfig
    plan: SearchPlan
    seconds: float

    @property
    def trained_parameters(self) -> int:
        """Of the winner, over all classes."""
        return self.winner.trained_parameters if self.winner else 0

    @property
    def noise_dimension(self) -> int:
        """Coordinates noised at a time by the winner's DP-SGD."""
        return self.winner.noise_dimension if self.winner else 0

    @property
    def num_releases(self) -> int:
        """Noisy gradients and score of the winner; how many other trials there were is secret."""
        return self.winner.num_releases + 1 if self.winner and self.plan.score_multiplier > 0 else 0

    def sample(
        self, num_images: int, *, generator: torch.Generator, num_steps: int = 20, batch_size: int = 500
    ) -> tuple[Tensor, Tensor]:
        """Images ``(num_images, C, H, W)`` in [-1, 1] and their labels, as many of each class, sorted."""
        how: dict[str, Any] = dict(generator=generator, num_steps=num_steps, batch_size=batch_size)
        if self.winner is not None:
            return self.winner.sample(num_images, **how)
        classes = len(self.class_names)
        if num_images % classes:
            raise InputError(f"num_images must be a multiple of the {classes} classes, got {num_images}.")
        labels = torch.arange(classes).repeat_interleave(num_images // classes)
        return diffusion.sample(self.model, None, num_images, **how), labels


def train_dp_layer_search(
    private_images: Tensor,
    private_labels: Tensor | None,
    base_model: nn.Module,
    config: LayerSearchConfig,
    *,
    epsilon: float,
    num_private_declared: int,
    delta: float = 1e-5,
    neighboring_relation: str = "add_or_remove_one",
    class_names: Sequence[str] = ("adapter",),
    seed: int | None = None,
    loss_function: LossFunction | None = None,
    progress: bool = False,
) -> tuple[LayerSearch, Certificate]:
    """Train LoRA on random subsets of layers by DP-SGD and release the best; ``epsilon = inf``: the same, not private.

    Parameters
    ----------
    private_images, private_labels, base_model, num_private_declared, class_names, loss_function
        As in `dp_lora.train_dp_lora`.
    epsilon, delta, neighboring_relation
        The budget of the whole search, whatever the number of trials turns out to be.
    seed : int, optional
        Fixes the number of trials, the subsets, the batches and all noise: a demonstration that is NOT PRIVATE.
        ``None`` takes them from the operating system.
    progress : bool
        Show a bar of trials. Their number is secret: keep what it shows.

    Returns
    -------
    trained : LayerSearch
    certificate : Certificate
        One charge for the whole search.  For ``epsilon = inf`` it says NOT PRIVATE.
    """
    names = tuple(class_names)
    dp_lora.check_request(private_images, base_model, names)
    trials = {subset: config.trial(target_modules(subset, base_model)) for subset in config.candidates}
    _check_candidates(trials, base_model, len(names))
    if num_private_declared < 1:
        raise InputError(f"num_private_declared must be at least 1, got {num_private_declared}.")
    per_class = config.mode == "per_class" or len(names) == 1
    plan = private_selection.search_plan(
        epsilon,
        delta,
        neighboring_relation,
        mean_trials=config.mean_trials,
        shape=config.shape,
        score_share=config.score_share,
        expected_batch_size=config.expected_batch_size,
        declared_size=num_private_declared / (len(names) if per_class else 1),
        num_steps=config.num_steps,
    )
    private_rows = dp_training.check_private(private_images, private_labels, names)
    secret = np.random.default_rng(secrets.randbits(128) if seed is None else seed)
    base_losses = denoising_losses(base_model, private_images, config.score_draws)
    best: tuple[float, str, DPLora, float] | None = None
    number = private_selection.number_of_trials(config.mean_trials, config.shape, secret)
    bar = progress_bar(range(number), total=float("inf"), show=progress, desc="layer search", unit="trial")
    for _ in bar:
        started = time.perf_counter()
        subset = config.candidates[int(secret.integers(len(config.candidates)))]
        seeds = (None, None) if seed is None else tuple(int(s) for s in secret.integers(2**62, size=2))
        trained, _ = dp_lora.train_dp_lora(
            private_images,
            private_labels,
            base_model,
            trials[subset],
            epsilon=plan.trial_epsilon,
            delta=plan.trial_delta,
            neighboring_relation=plan.relation,
            num_private_declared=num_private_declared,
            class_names=names,
            seed=seeds[0],
            loss_function=loss_function,
        )
        gains = improvements(trained, base_losses, private_images, private_rows, config.score_draws)
        score = noisy_score(gains, config, plan, seed=seeds[1])
        if best is None or score > best[0]:
            best = score, subset, trained, time.perf_counter() - started
    result = LayerSearch(
        subset=best[1] if best else None,
        score=best[0] if best else None,
        winner=best[2] if best else None,
        model=base_model,
        class_names=names,
        config=config,
        plan=plan,
        seconds=config.mean_trials * best[3] if best else 0.0,
    )
    statement = _certify(result, epsilon, delta, neighboring_relation, num_private_declared, seeded=seed is not None)
    return result, statement


def _check_candidates(trials: Mapping[str, DPLoraConfig], base_model: nn.Module, num_classes: int) -> None:
    from peft import LoraConfig

    for trial in trials.values():  # a subset without layers is found before any training
        lora_geometry(
            base_model, LoraConfig(r=trial.r, lora_alpha=trial.lora_alpha, target_modules=trial.target_modules)
        )
        if trial.mode == "shared" and num_classes > 1:
            dp_lora.lora_model(base_model, trial, num_classes=num_classes)


def _certify(
    search: LayerSearch, epsilon: float, delta: float, relation: str, num_private_declared: int, *, seeded: bool
) -> Certificate:
    config, plan, sgd = search.config, search.plan, search.plan.sgd
    numbers = {math.inf: "Poisson", 1.0: "geometric", 0.0: "logarithmic"}.get(
        config.shape, "truncated negative binomial"
    )
    title = (
        f"search among {len(config.candidates)} subsets of layers; number of trials secret, {numbers} with mean "
        f"{config.mean_trials:g}"
    )
    fields: dict[str, Any] = {}
    declared: tuple[LedgerEntry, ...] = ()
    if sgd.noise_std == 0:
        stated, rng = certificate.NO_PRIVACY, certificate.NO_NOISE
        charge = LedgerEntry("other", f"{title}; each is LoRA training and a score, without noise", math.inf, 0.0)
    else:
        # of the two generators the weaker one is named
        stated, rng = certificate.DP_SGD, certificate.SEEDED_NOISE if seeded else certificate.FLOAT_NOISE
        sensitivity = sgd.sensitivity * config.clip_norm
        fields = dict(
            noise_multiplier=sgd.noise_multiplier,
            noise_std=sgd.noise_multiplier * sensitivity,
            clip_norm=config.clip_norm,
            sensitivity=sensitivity,
            dimension=search.noise_dimension or None,
        )
        charge = LedgerEntry(
            "other",
            f"{title}; each is {sgd.num_steps} steps of DP-SGD LoRA and a score of noise multiplier "
            f"{plan.score_multiplier:.6g}; the best is released (Renyi accounting of Papernot & Steinke 2022)",
            epsilon,
            delta,
            noise_multiplier=sgd.noise_multiplier,
            sample_rate=sgd.sample_rate,
            steps=sgd.num_steps,
            neighboring_relation=relation,
        )
        declared = (dp_training.declared_size(num_private_declared),)
    return certificate.ledger_certificate(
        (*declared, charge),
        delta,
        method="dp_layer_search",
        mechanism=stated,
        neighboring_relation=relation,
        rng=rng,
        epsilon=epsilon,
        num_private=num_private_declared,
        class_names=search.class_names if len(search.class_names) > 1 else (),
        base_model_sha256=artefacts.tensors_sha256(search.model.state_dict()),
        warnings=("secret: how many trials there were, how long they took, and every score but the winner's",),
        **fields,
    )


def choose_on_public(
    public_sets: Sequence[ImageSet],
    base_model: nn.Module,
    config: LayerSearchConfig,
    *,
    epsilon: float,
    num_private_declared: int,
    delta: float = 1e-5,
    neighboring_relation: str = "add_or_remove_one",
    seed: int = 0,
    progress: bool = False,
) -> dict[str, float]:
    """The free choice: every candidate trained with the whole budget on public stand-ins; its mean improvement.

    Train the candidate with the largest one by `dp_lora.train_dp_lora`: no private image had a say in it.
    """
    trials = {subset: config.trial(target_modules(subset, base_model)) for subset in config.candidates}
    scores: dict[str, list[float]] = {subset: [] for subset in trials}
    runs = [(public_set, subset) for public_set in public_sets for subset in trials]
    for public_set, subset in progress_bar(runs, show=progress, desc="choice on public data"):
        names = public_set.class_names or ("adapter",)
        rows = dp_training.check_private(public_set.images, public_set.labels, names)
        trained, _ = dp_lora.train_dp_lora(
            public_set.images,
            public_set.labels,
            base_model,
            trials[subset],
            epsilon=epsilon,
            delta=delta,
            neighboring_relation=neighboring_relation,
            num_private_declared=num_private_declared,
            class_names=names,
            seed=seed,
        )
        base_losses = denoising_losses(base_model, public_set.images, config.score_draws)
        gains = improvements(trained, base_losses, public_set.images, rows, config.score_draws)
        scores[subset].append(float(np.clip(gains, -config.score_clip, config.score_clip).mean()))
    return {subset: float(np.mean(values)) for subset, values in scores.items()}
