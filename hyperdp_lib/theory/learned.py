r"""A DeepSets hypernetwork trained end to end on public linear tasks, to be held against the closed form.

The same three parts as for images: an encoder that sees one example at a time and whose output has norm at most 1; one
noisy sum; a decoder that turns the noisy mean into the task vector. None of the three is told the subspace ``U``, the
best clip norm or the best shrinkage: training by the squared error on query examples, with the release's noise
simulated, has to find them.

    z = 1/n sum_i phi(x_i, y_i) + N(0, 1 / (n mu)^2),        estimate = gain D z,        |phi| <= 1.

``"bilinear"`` encoder: ``phi = clip_1(E x y)``, the family of `theory.deepsets` with ``E = U' / C``. ``"network"``: a
small network of a learned projection of ``x`` and of ``y``, which is not told that the two should be multiplied. The
gain is 1, or (``noise_aware``) a function of ``log n`` and ``log mu``, so that one network serves every budget and set
size: shrinkage learned at one noise level is wrong at another.

Public tasks are fresh at every step, or come from a bank of ``num_public_tasks`` with ``examples_per_task`` examples
each. A task of the bank has the same examples whenever it is met (they are drawn again from the task's own seed, so the
bank takes no memory); which of them are queries, and which stand in for the private set, is shuffled each time.

All data is synthetic. ``python -m hyperdp_lib.theory.learned --out book/results/theory/learned.json`` trains the table
of the chapter.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor, nn

from hyperdp_lib.data import InputError
from hyperdp_lib.mechanism import GaussianSum, noisy_sum
from hyperdp_lib.public.stages import Loop, StageConfig, log_uniform
from hyperdp_lib.records import provenance, require_commit, write_atomically
from hyperdp_lib.theory import deepsets
from hyperdp_lib.theory.setting import Array, LinearSetting, check_sizes, gdp_mu

ENCODERS = ("bilinear", "network")
# Just inside the unit ball: float32 rounding of the length (below 1e-5 up to a thousand coordinates) cannot leave it.
RADIUS = 1 - 1e-5
# One independent stream for each use of the seed.
_BASIS, _WEIGHTS, _BANK, _STEPS, _TEST, _DIAGNOSTICS = range(6)
Range = float | tuple[float, float]


@dataclass(frozen=True)
class LearnedConfig:
    """How the hypernetwork is built and trained. All of it is public.

    Parameters
    ----------
    encoder : ``"bilinear"`` or ``"network"``.
    dimension : k', the length of an embedding; ``None`` means the setting's k.
    steps, tasks, queries : optimiser steps, tasks a step, and query examples a task.
    learning_rate : the decoder's, at its peak; warm-up and cosine decay are those of `training.Loop`.
    encoder_rate : the encoder's, as a share of it.
    encoder_scale : expected length of a row of the encoder's projection at the start.
    num_public_tasks : ``None`` means fresh tasks at every step, otherwise the size of the bank.
    examples_per_task : of a task of the bank; ``None`` means just enough, num_private + queries.
    noise_aware : whether the decoder reads n and mu.
    hidden : width of the ``"network"`` encoder.
    ema : decay of the averaged weights, which are the ones that are used.
    seed : of the subspace, the first weights, the tasks and the noise.

    >>> LearnedConfig(encoder="bilinar")
    Traceback (most recent call last):
    ...
    hyperdp_lib.data.InputError: no encoder 'bilinar': choose one of bilinear, network
    """

    encoder: str = "bilinear"
    dimension: int | None = None
    steps: int = 2500
    tasks: int = 16
    queries: int = 100
    learning_rate: float = 0.005
    encoder_rate: float = 1.0
    encoder_scale: float = 1.0
    num_public_tasks: int | None = None
    examples_per_task: int | None = None
    noise_aware: bool = False
    hidden: int = 64
    ema: float = 0.99
    seed: int = 0

    def __post_init__(self) -> None:
        if self.encoder not in ENCODERS:
            raise InputError(f"no encoder {self.encoder!r}: choose one of {', '.join(ENCODERS)}")
        for name in ("dimension", "steps", "tasks", "queries", "num_public_tasks", "examples_per_task", "hidden"):
            value = getattr(self, name)
            optional = name in ("dimension", "num_public_tasks", "examples_per_task")
            if value is None and optional:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"{name} must be a whole number of at least 1{' or None' * optional}, got {value!r}")
        if not isinstance(self.seed, int) or self.seed < 0:
            raise InputError(f"seed must be a whole number of at least 0, got {self.seed!r}")
        for name in ("learning_rate", "encoder_rate", "encoder_scale"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name} must be positive and finite, got {getattr(self, name)}")
        if not 0 <= self.ema < 1:
            raise InputError(f"ema must be at least 0 and below 1, got {self.ema}")
        if self.examples_per_task is not None and self.num_public_tasks is None:
            raise InputError("examples_per_task belongs to a bank of tasks: give num_public_tasks too")


# `quick` is for a notebook: within 20% of the closed form for epsilon from 0.25 to 8, in a few seconds of one core at
# d = 50, k = 3, n = 200 and in twenty at d = 200, k = 5, n = 1000. Its decoder needs many queries more than many tasks.
# Its encoder starts small and goes slowly: one that has grown while the subspace was still unknown clips too hard, and
# comes back too late, since the risk is flat there (+20% at epsilon 8 where encoder and decoder start and go alike).
PRESETS = {
    "full": LearnedConfig(),
    "quick": LearnedConfig(steps=900, tasks=8, queries=800, encoder_rate=0.5, encoder_scale=0.2),
    "one_for_all": LearnedConfig(noise_aware=True),
    "network": LearnedConfig(encoder="network"),
}


def _generator(*key: int) -> torch.Generator:
    """A torch stream of its own for each key."""
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))
    return torch.Generator().manual_seed(seed)


def subspace_basis(setting: LinearSetting, seed: int) -> Tensor:
    """``U``: (d, k) float32, orthonormal columns, uniformly random."""
    normal = torch.randn(setting.d, setting.k, generator=_generator(seed, _BASIS), dtype=torch.float64)
    return torch.linalg.qr(normal)[0].float()


def draw_tasks(setting: LinearSetting, basis: Tensor, count: int, g: torch.Generator) -> Tensor:
    """Task vectors (count, d): ``U w + nu`` with ``|w| = tau`` and ``|nu|^2 = off_subspace_energy``."""
    theta = setting.tau * F.normalize(torch.randn(count, setting.k, generator=g), dim=1) @ basis.T
    if setting.off_subspace_energy:
        outside = torch.randn(count, setting.d, generator=g)
        outside = F.normalize(outside - outside @ basis @ basis.T, dim=1)
        theta = theta + math.sqrt(setting.off_subspace_energy) * outside
    return theta


def fill_examples(rows: Tensor, theta: Tensor, noise_std: float, g: torch.Generator) -> Tensor:
    """Overwrite ``rows`` (T, N, d + 1) with N examples ``(x, y)`` of each of T tasks (T, d); returned for convenience.

    >>> g = torch.Generator().manual_seed(0)
    >>> rows = fill_examples(torch.empty(1, 5, 3), torch.tensor([[1.0, 0.0]]), 0.0, g)
    >>> torch.equal(rows[..., 2], rows[..., 0])
    True
    """
    rows.normal_(generator=g)
    weights = F.pad(theta, (0, 1), value=noise_std)  # the last column is still xi: y = <x, theta> + s xi
    rows[:, :, -1] = (rows @ weights[:, :, None])[:, :, 0]
    return rows


def clip(vectors: Tensor) -> Tensor:
    """Scale rows (..., k') into the unit ball; a row that is not finite, or too long to be measured, becomes 0.

    >>> clip(torch.tensor([[0.3, 0.4], [3e30, 4e30], [float("nan"), 0.0]]))[:2, 0]
    tensor([0.3000, 0.0000])
    """
    vectors = torch.where(vectors.isfinite().all(-1, keepdim=True), vectors, torch.zeros(()))
    return vectors * (RADIUS / torch.linalg.vector_norm(vectors, dim=-1, keepdim=True).clamp_min(RADIUS))


class ExampleEncoder(nn.Module):
    """One example ``(x, y)`` -> one vector of norm at most 1: (N, d + 1) -> (N, k')."""

    def __init__(self, d: int, dimension: int, config: LearnedConfig) -> None:
        super().__init__()
        g = _generator(config.seed, _WEIGHTS, 0)
        self.projection = nn.Parameter(torch.randn(dimension, d, generator=g) * config.encoder_scale / math.sqrt(d))
        self.network: nn.Sequential | None = None
        if config.encoder == "network":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(g.initial_seed())
                self.network = nn.Sequential(
                    nn.Linear(dimension + 1, config.hidden), nn.GELU(),
                    nn.Linear(config.hidden, config.hidden), nn.GELU(),
                    nn.Linear(config.hidden, dimension),
                )  # fmt: skip

    def unclipped(self, examples: Tensor) -> Tensor:
        """(N, d + 1) -> (N, k') before the clip."""
        v = examples @ F.pad(self.projection, (0, 1)).T  # a zero column for y: no copy of x is needed
        y = examples[:, -1:]
        return v * y if self.network is None else self.network(torch.cat([v, y], 1))

    def forward(self, examples: Tensor) -> Tensor:
        """(N, d + 1) -> (N, k'), norms at most 1."""
        return clip(self.unclipped(examples))


class TaskDecoder(nn.Module):
    """Noisy mean -> task vector, linear in the mean: (T, k') -> (T, d)."""

    low: Tensor
    high: Tensor

    def __init__(
        self, d: int, dimension: int, config: LearnedConfig, sizes: tuple[float, float], mus: tuple[float, float]
    ) -> None:
        super().__init__()
        g = _generator(config.seed, _WEIGHTS, 1)
        self.matrix = nn.Parameter(torch.randn(d, dimension, generator=g) / math.sqrt(d))
        self.log_gain: nn.Sequential | None = None
        if config.noise_aware:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(g.initial_seed())
                self.log_gain = nn.Sequential(nn.Linear(2, 32), nn.GELU(), nn.Linear(32, 1))
            nn.init.zeros_(cast(nn.Linear, self.log_gain[-1]).weight)
        # What it will be trained on, so that it never has to extrapolate: beyond, it answers as at the edge.
        self.register_buffer("low", _features(sizes[0], torch.tensor(mus[:1]))[0])
        self.register_buffer("high", _features(sizes[1], torch.tensor(mus[1:]))[0])

    def forward(self, noisy_mean: Tensor, num_private: float, mu: Tensor) -> Tensor:
        """``mu`` (T,); both sizes are ignored unless the decoder is noise-aware."""
        estimate = noisy_mean @ self.matrix.T
        if self.log_gain is None:
            return estimate
        inside = torch.minimum(torch.maximum(_features(num_private, mu), self.low), self.high)
        centred = (2 * inside - self.low - self.high) / (self.high - self.low).clamp_min(1e-3)  # in [-1, 1]
        return self.log_gain(centred).exp() * estimate


def _features(num_private: float, mu: Tensor) -> Tensor:
    """(T, 2): log n and log mu, from which the noise on the mean, -log n - log mu, is one step away.

    Not the noise itself: sizes and budgets are trained on a rectangle, which the limits in the decoder can respect.
    """
    return torch.stack([torch.full_like(mu, math.log(num_private)), mu.clamp(1e-6, 1e6).log()], 1)


@dataclass(frozen=True)
class MeasuredRisk:
    """Mean of ``|estimate - theta|^2`` over test tasks and its standard error; arrays of the same shape."""

    mean: Array
    standard_error: Array


@dataclass(frozen=True)
class LearnedHyperNetwork:
    """A trained hypernetwork, and the public world it was trained in.

    ``num_private`` and ``mu`` are what it was trained for, a number or (lowest, highest); ``seconds`` is the time
    training took.
    """

    setting: LinearSetting
    config: LearnedConfig
    num_private: Range
    mu: Range
    basis: Tensor
    encoder: ExampleEncoder
    decoder: TaskDecoder
    seconds: float

    @property
    def dimension(self) -> int:
        """k', the number of coordinates that are released."""
        return len(self.encoder.projection)

    @torch.no_grad()
    def embed(self, examples: ArrayLike) -> np.ndarray:
        """(n, d + 1) -> (n, k') float32; each row depends on its own example to the last bit."""
        rows = torch.as_tensor(np.asarray(examples), dtype=torch.float32)
        if rows.ndim != 2 or rows.shape[1] != self.setting.d + 1:
            raise InputError(f"examples must be rows (x, y) of {self.setting.d + 1} numbers, got {tuple(rows.shape)}")
        # One at a time, in memory of its own: a product of small matrices gives a row, on some processors, another last
        # bit in another place. With that, one record would move the vectors of all that come after it.
        vectors = [self.encoder(row.clone()[None]) for row in rows]
        return torch.cat(vectors or [rows.new_zeros(0, self.dimension)]).numpy()

    @torch.no_grad()
    def release(self, examples: ArrayLike, mu: float, *, seed: int | None = None) -> Array:
        """Estimate (d,) of the task of ``examples`` (n, d + 1), mu-GDP under ``zero_out``; n is public.

        The sum and its noise are the mechanism's (integers; the operating system's entropy unless a demonstration
        ``seed`` is given, which ``mu = inf``, no privacy, needs). ``mu = 0`` reads nothing and answers 0.
        """
        embeddings = self.embed(examples)
        check_sizes(len(embeddings), mu)
        if mu == 0:
            return np.zeros(self.setting.d)
        config = GaussianSum(self.dimension, noise_multiplier=1 / mu, neighboring_relation="zero_out")
        mean = noisy_sum([(embeddings, None)], config, seed=seed) / len(embeddings)
        return self.decode(mean, len(embeddings), mu)[0]

    @torch.no_grad()
    def decode(self, noisy_mean: ArrayLike, num_private: int, mu: float) -> Array:
        """Estimates (T, d) from noisy means (T, k')."""
        mean = torch.as_tensor(np.asarray(noisy_mean), dtype=torch.float32)
        return self.decoder(mean, num_private, torch.full((len(mean),), mu)).double().numpy()

    @torch.no_grad()
    def risk(self, num_private: ArrayLike, mu: ArrayLike, *, test_tasks: int = 400, seed: int = 0) -> MeasuredRisk:
        """Risk on fresh test tasks; ``num_private`` and ``mu`` broadcast, every point has tasks and noise of its own.

        A network that is not noise-aware may be asked about sizes it was not trained for; the answer shows the harm.
        """
        if not (isinstance(test_tasks, int) and test_tasks >= 2):
            raise InputError(f"test_tasks must be a whole number of at least 2, got {test_tasks!r}")
        if not (isinstance(seed, int) and seed >= 0):
            raise InputError(f"seed must be a whole number of at least 0, got {seed!r}")
        sizes, mus = check_sizes(num_private, mu)
        means, errors = [], []
        for index, (n, m) in enumerate(zip(sizes.ravel(), mus.ravel(), strict=True)):
            g = _generator(self.config.seed, _TEST, seed, index)
            squared = self._squared_errors(int(n), float(m), test_tasks, g) if m else self._trivial(test_tasks)
            means.append(squared.mean().item())
            errors.append(squared.std().item() / math.sqrt(test_tasks))
        return MeasuredRisk(np.reshape(means, sizes.shape), np.reshape(errors, sizes.shape))

    def _trivial(self, test_tasks: int) -> Tensor:
        return torch.full((test_tasks,), self.setting.trivial_risk, dtype=torch.float64)

    def _squared_errors(self, n: int, mu: float, test_tasks: int, g: torch.Generator) -> Tensor:
        """(test_tasks,) float64."""
        at_a_time = max(1, min(test_tasks, 2_000_000 // (n * (self.setting.d + 1))))
        theta = draw_tasks(self.setting, self.basis, test_tasks, g)
        errors = []
        for part in theta.split(at_a_time):
            rows = fill_examples(torch.empty(len(part), n, self.setting.d + 1), part, self.setting.noise_std, g)
            mean = self.encoder(rows.flatten(0, 1)).unflatten(0, rows.shape[:2]).mean(1)
            mean = mean + torch.randn(mean.shape, generator=g) / (n * mu)
            estimate = self.decoder(mean, n, torch.full((len(part),), mu))
            errors.append((estimate - part).double().square().sum(1))
        return torch.cat(errors)

    @torch.no_grad()
    def diagnostics(self, *, test_tasks: int = 50) -> dict[str, Any]:
        """What was learned.

        ``decoder_subspace_error`` and ``encoder_subspace_error``: mean squared sine between ``U`` and the k strongest
        directions that the decoder writes and the encoder's projection reads; ``singular_values`` of the decoder
        (k'); ``clipped_share`` of test examples, from 0 to 1.
        """
        g = _generator(self.config.seed, _DIAGNOSTICS)
        theta = draw_tasks(self.setting, self.basis, test_tasks, g)
        rows = fill_examples(torch.empty(test_tasks, 200, self.setting.d + 1), theta, self.setting.noise_std, g)
        lengths = torch.linalg.vector_norm(self.encoder.unclipped(rows.flatten(0, 1)), dim=1)
        return {
            "decoder_subspace_error": subspace_angle(self.decoder.matrix, self.basis),
            "encoder_subspace_error": subspace_angle(self.encoder.projection.T, self.basis),
            "singular_values": torch.linalg.svdvals(self.decoder.matrix.double()).tolist(),
            "clipped_share": (lengths > RADIUS).double().mean().item(),
        }


def subspace_angle(matrix: Tensor, basis: Tensor) -> float:
    """``1 - |Q^T U|_F^2 / k`` with ``Q`` the k leading left singular vectors of ``matrix`` (d, any); in [0, 1].

    >>> subspace_angle(torch.eye(4)[:, 1:3], torch.eye(4)[:, :2])
    0.5
    """
    k = basis.shape[1]
    leading = torch.linalg.svd(matrix.double(), full_matrices=False)[0][:, :k]
    return min(1.0, max(0.0, 1 - (leading.T @ basis.double()).square().sum().item() / k))


class _Batches:
    """Training batches: support (tasks, n, d + 1), queries (tasks, Q, d + 1) and mu (tasks,), one stream a step.

    A stream a step, and not one for all, lets a stopped training continue exactly as if it had not been stopped.
    """

    def __init__(
        self, setting: LinearSetting, basis: Tensor, sizes: tuple[int, int], mus: tuple[float, float],
        config: LearnedConfig,
    ) -> None:  # fmt: skip
        self.setting, self.basis, self.sizes, self.mus, self.config = setting, basis, sizes, mus, config
        columns = setting.d + 1
        self.support = torch.empty(config.tasks * sizes[1] * columns)  # filled again at every step
        self.queries = torch.empty(config.tasks, config.queries, columns)
        self.bank: torch.Tensor | None = None
        if config.num_public_tasks is not None:
            needed = sizes[1] + config.queries
            examples = needed if config.examples_per_task is None else config.examples_per_task
            if examples < needed:
                raise InputError(
                    f"a public task needs num_private + queries = {needed} examples, got {examples}: shrinkage learned "
                    "at a smaller set size would be wrong"
                )
            self.bank = torch.empty(1, examples, columns)  # room for one task at a time

    def __call__(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        g = _generator(self.config.seed, _STEPS, step)
        (low, high), tasks = self.sizes, self.config.tasks
        n = low if low == high else min(high, max(low, round(log_uniform(low, high, 1, g).item())))
        mu = torch.full((tasks,), self.mus[0])
        if self.mus[0] != self.mus[1]:
            mu = log_uniform(*self.mus, tasks, g)
        support = self.support[: tasks * n * self.queries.shape[2]].view(tasks, n, -1)
        if self.bank is None:
            theta = draw_tasks(self.setting, self.basis, tasks, g)
            fill_examples(support, theta, self.setting.noise_std, g)
            fill_examples(self.queries, theta, self.setting.noise_std, g)
        else:
            assert self.config.num_public_tasks is not None
            chosen = torch.randint(self.config.num_public_tasks, (tasks,), generator=g).tolist()
            for row, task in enumerate(chosen):
                own = _generator(self.config.seed, _BANK, task)
                fill_examples(self.bank, draw_tasks(self.setting, self.basis, 1, own), self.setting.noise_std, own)
                order = torch.randperm(self.bank.shape[1], generator=g)
                torch.index_select(self.bank[0], 0, order[:n], out=support[row])
                torch.index_select(self.bank[0], 0, order[n : n + self.config.queries], out=self.queries[row])
        return support, self.queries, mu


def _range(value: Range) -> tuple[float, float]:
    low, high = value if isinstance(value, tuple) else (value, value)
    return float(low), float(high)


def train(
    setting: LinearSetting,
    num_private: Range,
    mu: Range,
    config: LearnedConfig | None = None,
    *,
    out: str | Path | None = None,
) -> LearnedHyperNetwork:
    """Train on public tasks for a private set of ``num_private`` examples and a budget of ``mu``.

    Parameters
    ----------
    setting : the world; its ``num_public_tasks``, ``examples_per_task`` and ``subspace_error`` are not used (the
        subspace has to be learned, and from what, `config` says).
    num_private, mu : a number each; a noise-aware network may be given (lowest, highest), drawn log-uniformly.
    config : see `LearnedConfig`.
    out : folder of checkpoints, from which a stopped training goes on; ``None`` keeps nothing.

    Raises
    ------
    InputError
        Sizes out of range (mu must be above 0; infinity means no noise), a range without ``noise_aware``, a bank
        whose tasks are too small, or a folder with another training's checkpoints.

    >>> world, short = LinearSetting(d=6, k=2), LearnedConfig(steps=200, tasks=8, learning_rate=0.02)
    >>> learned = train(world, 100, 1.0, short)
    >>> bool(learned.risk(100, 1.0).mean < 0.2 * world.trivial_risk)
    True
    """
    config = LearnedConfig() if config is None else config
    sizes, mus = _range(num_private), _range(mu)
    check_sizes(sizes, mus)
    if not (0 < mus[0] <= mus[1]) or not sizes[0] <= sizes[1]:
        raise InputError(f"need 0 < lowest mu <= highest mu and lowest n <= highest n, got {mu} and {num_private}")
    if any(size != int(size) for size in sizes):
        raise InputError(f"num_private must be a whole number, got {num_private}")
    if (sizes[0] != sizes[1] or mus[0] != mus[1]) and not config.noise_aware:
        raise InputError("a range of num_private or mu needs noise_aware=True: shrinkage depends on both")
    if math.isinf(mus[1]) and mus[0] != mus[1]:
        raise InputError("a range of mu must be finite; a network trained down to little noise serves mu = inf too")

    dimension = setting.k if config.dimension is None else config.dimension
    basis = subspace_basis(setting, config.seed)
    encoder = ExampleEncoder(setting.d, dimension, config)
    decoder = TaskDecoder(setting.d, dimension, config, sizes, mus)
    batches = _Batches(setting, basis, (int(sizes[0]), int(sizes[1])), mus, config)

    def loss(step: int) -> tuple[Tensor, dict]:
        support, queries, budgets = batches(step)
        n = support.shape[1]
        mean = encoder(support.flatten(0, 1)).unflatten(0, support.shape[:2]).mean(1)
        noise = torch.randn(mean.shape, generator=_generator(config.seed, _STEPS, step, 1))
        estimate = decoder(mean + noise / (n * budgets)[:, None], n, budgets)
        residual = queries @ F.pad(estimate, (0, 1), value=-1.0)[:, :, None]  # <x, estimate> - y
        value = residual.square().mean()
        return value, {"loss": value.detach()}

    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()) if out is None else out)
        folder.mkdir(parents=True, exist_ok=True)
        _claim(folder, {"setting": asdict(setting), "num_private": sizes, "mu": mus, "config": asdict(config)})
        stage = StageConfig(config.steps, config.tasks, config.queries, config.learning_rate, config.ema)
        loop = Loop("learned", [(encoder, config.encoder_rate), (decoder, 1.0)], stage, folder)
        if not loop.done:
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))  # its log line; the folder keeps it too
            loop.run(loss, every=min(500, config.steps))
    loop.modules.load_state_dict(loop.average)
    loop.modules.requires_grad_(False).eval()
    return LearnedHyperNetwork(setting, config, num_private, mu, basis, encoder, decoder, loop.seconds)


def _claim(folder: Path, settings: dict[str, Any]) -> None:
    """Note in ``folder`` what is trained there, or refuse if it is something else."""
    text = json.dumps(settings, indent=1)
    if (folder / "settings.json").exists() and (folder / "settings.json").read_text() != text:
        raise InputError(f"{folder} holds another training: choose another folder")
    write_atomically(folder / "settings.json", text)


@dataclass(frozen=True)
class Row:
    """One line of the chapter's table: what is trained, for what, and the points (epsilon, n) it is evaluated at."""

    setting: LinearSetting
    num_private: Range
    epsilon: Range
    config: LearnedConfig
    points: tuple[tuple[float, int], ...]


DELTA = 1e-5
SMALL = LinearSetting(d=50, k=3, subspace_error=0.0)
LARGE = LinearSetting(d=200, k=5, subspace_error=0.0)
EPSILONS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
# Every budget at the n of the table, no noise at all, and other set sizes.
EVERYWHERE = (*((epsilon, 200) for epsilon in (*EPSILONS, math.inf)), *((1.0, n) for n in (50, 100, 500, 1000, 3000)))


def table() -> dict[str, Row]:
    """The rows by name."""
    rows: dict[str, Row] = {}
    for epsilon in (1.0, 8.0):
        for dimension in (3, 8):
            for tasks in (None, 300, 1000):
                name = f"bilinear_eps{epsilon:g}_k{dimension}_{'fresh' if tasks is None else f'{tasks}tasks'}"
                config = replace(PRESETS["full"], dimension=dimension, num_public_tasks=tasks)
                # The first row is also asked about budgets and sizes that it was not trained for.
                points = ((epsilon, 200),) if rows else EVERYWHERE
                rows[name] = Row(SMALL, 200, epsilon, config, points)
        rows[f"network_eps{epsilon:g}_k3_fresh"] = Row(SMALL, 200, epsilon, PRESETS["network"], ((epsilon, 200),))
    for epsilon in (0.25, 1.0, 8.0):
        rows[f"quick_eps{epsilon:g}"] = Row(SMALL, 200, epsilon, PRESETS["quick"], ((epsilon, 200),))
        rows[f"quick_large_eps{epsilon:g}"] = Row(LARGE, 1000, epsilon, PRESETS["quick"], ((epsilon, 1000),))
    for encoder in ENCODERS:
        config = replace(PRESETS[encoder] if encoder in PRESETS else PRESETS["full"], noise_aware=True)
        rows[f"{encoder}_one_for_all"] = Row(SMALL, (50, 1000), (0.2, 10.0), config, EVERYWHERE)
    return rows


def _train_row(row: Row, seed: int) -> dict[str, Any]:
    """Numbers of one training: CPU seconds, risks at the row's points, diagnostics."""
    mus = gdp_mu(_range(row.epsilon), DELTA).tolist()
    config = replace(row.config, seed=seed)
    budget = (mus[0], mus[1]) if isinstance(row.epsilon, tuple) else mus[0]
    started = time.process_time()  # not the clock on the wall: the machine may have other work
    learned = train(row.setting, row.num_private, budget, config)
    seconds = time.process_time() - started
    epsilons, sizes = zip(*row.points, strict=True)
    risk = learned.risk(sizes, gdp_mu(epsilons, DELTA), test_tasks=2000)
    return {
        "cpu_seconds": round(seconds, 1),
        "risk": risk.mean.tolist(),
        "standard_error": risk.standard_error.tolist(),
        **learned.diagnostics(),
    }


def _summary(row: Row, trainings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line a point: mean and standard deviation over training seeds, beside the closed form."""
    lines = []
    for index, (epsilon, n) in enumerate(row.points):
        risks = [training["risk"][index] for training in trainings]
        budget = gdp_mu(epsilon, DELTA)
        line = {
            "epsilon": None if math.isinf(epsilon) else epsilon,  # none: no noise
            "num_private": n,
            "risk": statistics.mean(risks),
            "deviation_over_seeds": statistics.stdev(risks) if len(risks) > 1 else None,
            "closed_form": float(deepsets.risk(row.setting, n, budget)),
        }
        if row.config.num_public_tasks is not None:  # what the eigenvectors of the same public tasks would give
            public = replace(
                row.setting,
                num_public_tasks=row.config.num_public_tasks,
                examples_per_task=row.config.examples_per_task or int(_range(row.num_private)[1]) + row.config.queries,
                subspace_error=None,
            )
            line["closed_form_eigenvectors"] = float(deepsets.risk(public, n, budget))
        line["ratio"] = line["risk"] / line["closed_form"]
        lines.append(line)
    return lines


def make_table(out: str | Path, rows: dict[str, Row], seeds: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Train what ``out`` (JSON) does not hold yet, write it after every training; yield each row when complete."""
    out = Path(out)
    require_commit(out)
    document: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"rows": {}}
    document = {"delta": DELTA, "neighboring_relation": "zero_out", "provenance": provenance(), **document}
    for name, row in rows.items():
        settings = json.loads(json.dumps(asdict(row)).replace("Infinity", "null"))
        known = document["rows"].get(name)
        if known is None or known["settings"] != settings:
            known = {"settings": settings, "trainings": {}}
        for seed in range(seeds):
            if str(seed) not in known["trainings"]:
                known["trainings"][str(seed)] = _train_row(row, seed)
                known["summary"] = _summary(row, list(known["trainings"].values()))
                document["rows"][name] = known
                document["provenance"] = provenance()
                write_atomically(out, json.dumps(document, indent=1, allow_nan=False) + "\n")
        yield name, known


def main(arguments: list[str] | None = None) -> None:
    """Command line of the table."""
    parser = argparse.ArgumentParser(prog="python -m hyperdp_lib.theory.learned", description=main.__doc__)
    parser.add_argument("--out", required=True, help="JSON file; what it already holds is not trained again")
    parser.add_argument("--seeds", type=int, default=3, help="trainings a row (default 3)")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="these rows only")
    options = parser.parse_args(arguments)
    rows = table()
    if unknown := set(options.only or ()) - set(rows):
        parser.error(f"no row {', '.join(sorted(unknown))}: choose from {', '.join(rows)}")
    chosen = {name: row for name, row in rows.items() if not options.only or name in options.only}
    for name, known in make_table(options.out, chosen, options.seeds):
        for line in known["summary"]:
            budget = "inf" if line["epsilon"] is None else f"{line['epsilon']:g}"
            print(
                f"{name}: epsilon {budget}, n {line['num_private']}: risk {line['risk']:.4f}, "
                f"closed form {line['closed_form']:.4f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
