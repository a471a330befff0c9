"""How a budget is spent: which noisy sums are taken, how they are decoded. Public and printable; reads no image.

`plan` gives a `Plan`; its `Plan.course` is what `hyperdp_lib.measure.measure` runs. ``method="auto"`` decides by public
quantities alone:

1. *How many images?* Under ``add_or_remove_one`` that is secret, and a twentieth of mu squared buys a noisy count. A
   size that may be public (``public_size``) saves that share; the other relations make the number public anyway.
2. *Cells or two steps?* Where count and noise support several means (`hyperdp_lib.cells.cells_for`), one sum in cells;
   else two steps (`hyperdp_lib.two_steps`). Without labels a tenth of what is left tells first whether the images are
   of one kind, for which two steps are better even then. So many coordinates are summed as do best on held-out public
   tasks under that noise.
3. *Refined?* Decoding is corrected by comparing samples with the release (`hyperdp_lib.refinement`), unless the noise
   on a mean is above ``TOO_NOISY``: then samples would be made to fit the noise.

``benchmarks/plan.py`` measures these rules on public drawings and held-out shapes. ``method="one_sum"`` is the paper's:
one noisy sum, decoded once.
"""

from __future__ import annotations

import dataclasses
import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from hyperdp_lib import accounting, cells
from hyperdp_lib.adapter import Adapter
from hyperdp_lib.cells import CellHyperNetwork
from hyperdp_lib.data import InputError
from hyperdp_lib.hypernetwork import HyperNetwork, noisy_count
from hyperdp_lib.measure import Course, Query
from hyperdp_lib.mechanism import MAX_COORDINATES, SENSITIVITY_FACTOR, GaussianSum
from hyperdp_lib.nested import COORDINATES, NestedHyperNetwork
from hyperdp_lib.pretrained import Weights
from hyperdp_lib.refinement import RefinementConfig, refine
from hyperdp_lib.two_steps import TYPICAL, Size, TwoStepsConfig, first_step, second_step, two_steps

METHODS = ("auto", "two_steps", "cells", "one_sum")
COUNT_SHARE = 0.05  # of mu squared, for a noisy count
TOO_NOISY = 0.06  # noise on the mean of a class, or of the set, from which on two steps are decoded once
ONE_KIND = 0.7  # root mean square distance from the mean, below which images without labels are taken as of one kind
PROBE = TwoStepsConfig(share=0.1)  # of mu squared, for finding that out
COUNT = "a noisy count of the images"
ONE_SUM = "one noisy sum of embeddings"
CELLS = "one noisy sum of embeddings, each in the block of its cell"
SHOWN_SIZES = (32, 128, 512, 2048, 10_000)  # for which a plan says what it would do


class Reading(NamedTuple):
    """What was measured, ready to be decoded: public."""

    noisy_sum: np.ndarray  # (K, k)
    noise_std: float
    hypernetwork: Any
    refinement: RefinementConfig | None

    def decode(
        self, base_model: nn.Module, class_names: Sequence[str], *, generator: torch.Generator, progress: bool = False
    ) -> Adapter:
        """The adapters of all classes, refined if that is the plan."""
        if self.refinement is None:
            return decode(self.noisy_sum, self.noise_std, self.hypernetwork, class_names)
        return refine(
            self.noisy_sum, self.noise_std, self.hypernetwork, base_model, self.refinement,
            class_names=class_names, generator=generator, progress=progress,
        )  # fmt: skip


class Choice(NamedTuple):
    """What a number of images and the noise support."""

    method: str
    hypernetwork: Any

    @property
    def coordinates(self) -> int:
        """How many numbers say where one mean is."""
        encoder = self.hypernetwork.encoder
        cells_of = len(encoder.centroids) if self.method == "cells" else 1
        return encoder.config.dimension // cells_of - 1


@torch.no_grad()
def decode(
    noisy_sum: np.ndarray, noise_std: float, hypernetwork: HyperNetwork, class_names: Sequence[str] = ()
) -> Adapter:
    """Adapter from a released noisy sum (K, k): post-processing, for any hypernetwork of the same encoder."""
    device = next(hypernetwork.parameters()).device
    sums = torch.from_numpy(np.asarray(noisy_sum)).to(device, torch.float32)
    return hypernetwork(sums, noise_std, tuple(class_names) or ("adapter",)).detach()


@dataclass(frozen=True, eq=False)
class Plan:
    """What a release spends on what, made by `plan`.

    Attributes
    ----------
    weights : Weights
        Base model and hypernetwork.
    epsilon : float or None
        The budget asked for, if it was asked for so.
    noise_multiplier : float
        Of one noisy sum that costs as much as the whole release.
    delta, neighboring_relation
        As in the certificate.
    class_names : tuple of str
        Public; empty without labels.
    method : str
        One of ``METHODS``.
    public_size : float or None
        Number of images, about, if that may be public.
    refined : bool
        Whether decoding is refined where that helps.
    """

    weights: Weights
    epsilon: float | None
    noise_multiplier: float
    delta: float = 1e-5
    neighboring_relation: str = "add_or_remove_one"
    class_names: tuple[str, ...] = ()
    method: str = "auto"
    public_size: float | None = None
    refined: bool = True

    def __post_init__(self) -> None:
        if self.method == "two_steps" and not getattr(self.weights.hypernetwork, "priors", None):
            raise InputError("two steps need weights with a prior, and these have none: choose another method")
        most = MAX_COORDINATES // self._widest
        if self.num_rows > most:  # a later sum would be refused, when a count was paid for
            raise InputError(f"there may be at most {most:,} classes with these weights, got {self.num_rows:,}")

    def using(self, method: str) -> Plan:
        """The same budget spent by another of ``METHODS``."""
        return dataclasses.replace(self, method=_one_of(method, METHODS, "method"))

    @property
    def num_rows(self) -> int:
        """Classes, 1 without labels."""
        return max(1, len(self.class_names))

    @property
    def _widest(self) -> int:
        """Numbers of a class in the longest sum that may be taken; of cells there are no more than fit."""
        network = self.weights.one_sum if self.method == "one_sum" else self.weights.hypernetwork
        nested = 1 + COORDINATES[-1] if isinstance(network, NestedHyperNetwork) and self.method != "one_sum" else 1
        return max(network.encoder.config.dimension, nested)

    @property
    def buys_count(self) -> bool:
        """Whether a share of the budget goes to a noisy count."""
        secret = self.neighboring_relation == "add_or_remove_one"
        return secret and self.public_size is None and self.method != "one_sum"

    @property
    def whole(self) -> GaussianSum:
        """A sum of one number that costs as much as the whole release."""
        return self._sum(1, self.noise_multiplier)

    def course(self, num_private: int | None = None) -> Course[Reading]:
        """The course of this plan, for `measure`; it returns a `Reading`.

        ``num_private`` is the number of images where the relation makes it public, else None.
        """
        multiplier = self.noise_multiplier
        if self.method == "one_sum":
            return (yield from self._single(self.choose(1.0, multiplier), multiplier))
        if self.buys_count:
            query = Query(COUNT, self._sum(1, multiplier / math.sqrt(COUNT_SHARE)))
            answer = yield query
            error = query.config.noise_std
            size = Size(max(float(answer.values[0, 0]), error, 1.0), error)  # less than its error says no more
            multiplier /= math.sqrt(1 - COUNT_SHARE)
        else:
            size = self._public(num_private)
        choice, narrow = self.choose(size.value, multiplier), self._two_steps(size.value, multiplier)
        asked: dict[str, Any] = dict(
            num_rows=self.num_rows, size=size, neighboring_relation=self.neighboring_relation
        )
        if choice.method == "cells" and self.method == "auto" and not self.class_names and narrow:
            start = yield from first_step(narrow.hypernetwork, noise_multiplier=multiplier, config=PROBE, **asked)
            if start.centring.spread < ONE_KIND:
                return self._reading(narrow, *(yield from second_step(narrow.hypernetwork, start, **asked)))
            multiplier = start.noise_multiplier
        if choice.method != "two_steps":
            return (yield from self._single(choice, multiplier))
        both = two_steps(choice.hypernetwork, noise_multiplier=multiplier, **asked)
        return self._reading(choice, *(yield from both))

    def choose(self, size: float, noise_multiplier: float) -> Choice:
        """Which method, and which hypernetwork, for so many images and the noise of one sum; public."""
        network, noise_std = self.weights.hypernetwork, self._sum(1, noise_multiplier).noise_std
        if self.method == "one_sum":
            return Choice("one_sum", self.weights.one_sum)
        each, labelled = size / self.num_rows, bool(self.class_names)
        found = 1
        if getattr(network, "centroids", None) and self.method in ("auto", "cells"):
            found = cells.cells_for(noise_std, each, labelled=labelled, num_classes=self.num_rows)
        if found > 1:
            return Choice("cells", CellHyperNetwork.with_cells(found, network, noise_std, each))
        two = self._two_steps(size, noise_multiplier) if self.method != "cells" else None
        return two or Choice("one_sum", network.fitting(noise_std, each))

    def _two_steps(self, size: float, noise_multiplier: float) -> Choice | None:
        network = self.weights.hypernetwork
        if not network.priors:
            return None
        noise_std = self._sum(1, noise_multiplier).noise_std
        return Choice("two_steps", network.fitting(TYPICAL * noise_std, size / self.num_rows))

    def facts(self, size: float | None = None) -> tuple[str, ...]:
        """One line each: budget, what buys the count, and what follows for ``size`` images or for several sizes."""
        mu = accounting.mu([self.noise_multiplier])
        epsilon = self.epsilon if self.epsilon is not None else accounting.epsilon(self.noise_multiplier, self.delta)
        spent = f"epsilon {epsilon:.4g} at delta {self.delta:g} (mu {mu:.3g})"
        lines = [f"budget: {spent}, {self.neighboring_relation}, one image"]
        multiplier = self.noise_multiplier
        if self.method == "one_sum":
            k = self.weights.one_sum.encoder.config.dimension
            return (*lines, f"one noisy sum of {k} numbers{self._a_class}, decoded once: the paper's method")
        if self.buys_count:
            error = self._sum(1, multiplier / math.sqrt(COUNT_SHARE)).noise_std
            lines.append(f"{COUNT_SHARE:.0%} of mu squared buys {COUNT}, standard error {error:.3g}")
            multiplier /= math.sqrt(1 - COUNT_SHARE)
        elif self.public_size is not None:
            lines.append(f"public: the number of images, about {self.public_size:g}")
        if self.public_size is not None or size is not None:
            return (*lines, f"then {self._told(self.public_size or size or 1.0, multiplier)}")
        return (*lines, *(f"for about {n:,} images: {self._told(n, multiplier)}" for n in SHOWN_SIZES))

    def __str__(self) -> str:
        names = f"classes, public: {len(self.class_names)} ({', '.join(self.class_names)})"
        return "\n".join([*self.facts(), names if self.class_names else "classes: none, one adapter"])

    @property
    def _a_class(self) -> str:
        return " for each class" if self.class_names else ""

    def _told(self, size: float, multiplier: float) -> str:
        choice = self.choose(size, multiplier)
        k, text = choice.coordinates, "one sum"
        if choice.method == "cells":
            text += f" in {len(choice.hypernetwork.encoder.centroids)} cells"
            if not self.class_names and self.method == "auto":
                text = f"two sums, the second in {len(choice.hypernetwork.encoder.centroids)} cells for a mixture"
        elif choice.method == "two_steps":
            text = "two sums, where the images lie and how they differ from there"
        text += f", a count and {k} coordinates{self._a_class}"
        noise = TYPICAL * self._sum(1, multiplier).noise_std * self.num_rows / max(size, 1.0)
        return f"{text}{', refined' if self._worth_refining(choice.method, noise) else ', decoded once'}"

    def _single(self, choice: Choice, multiplier: float) -> Course[Reading]:
        description = CELLS if choice.method == "cells" else ONE_SUM
        config = self._sum(choice.hypernetwork.encoder.config.dimension, multiplier, self.num_rows)
        answer = yield Query(description, config, choice.hypernetwork.encoder)
        return self._reading(choice, answer.values, config.noise_std)

    def _reading(self, choice: Choice, noisy_sum: np.ndarray, noise_std: float) -> Reading:
        constant = choice.hypernetwork.encoder.config.count_coordinate
        count = float(noisy_count(torch.as_tensor(noisy_sum), noise_std, constant).mean())
        worth = self.method != "one_sum" and self._worth_refining(choice.method, noise_std / count)
        return Reading(noisy_sum, noise_std, choice.hypernetwork, RefinementConfig() if worth else None)

    def _worth_refining(self, method: str, noise_on_mean: float) -> bool:
        return self.refined and (method == "cells" or noise_on_mean <= TOO_NOISY)

    def _public(self, num_private: int | None) -> Size:
        if self.public_size is not None:
            return Size.about(self.public_size)
        if num_private is None:
            raise ValueError(f"under {self.neighboring_relation} the number of images is public: give num_private")
        return Size(max(1.0, num_private), 0.0)

    def _sum(self, dimension: int, noise_multiplier: float, num_rows: int = 1) -> GaussianSum:
        return GaussianSum(dimension, noise_multiplier, num_rows, neighboring_relation=self.neighboring_relation)


def plan(
    weights: Weights,
    *,
    epsilon: float | None = None,
    noise_multiplier: float | None = None,
    delta: float = 1e-5,
    neighboring_relation: str = "add_or_remove_one",
    class_names: Sequence[str] | None = None,
    method: str = "auto",
    public_size: float | None = None,
    refined: bool = True,
) -> Plan:
    """A `Plan`, which says how a budget is spent; it reads no image.

    Parameters
    ----------
    weights : from ``load_weights``.
    epsilon, noise_multiplier : exactly one of them; the noise multiplier is that of one sum that costs as much as the
        whole release, sigma over sensitivity.
    delta : of (epsilon, delta)-differential privacy, in (0, 1).
    neighboring_relation : ``add_or_remove_one`` (the number of images stays secret), ``replace_one``, ``zero_out``.
    class_names : the classes, public, in label order; one adapter a class. None or empty: one adapter in all.
    method : ``auto``, or ``two_steps``, ``cells``, ``one_sum`` (the paper's).
    public_size : number of images, about, if that may be public; saves the share of the budget that buys a count.
    refined : False: decode once, in seconds.

    Raises
    ------
    InputError
        if an argument is out of range.

    Examples
    --------
    >>> print(plan(load_weights("glyphs"), epsilon=1.0, public_size=128))  # doctest: +SKIP
    """
    if (epsilon is None) == (noise_multiplier is None):
        raise InputError("give exactly one of epsilon and noise_multiplier")
    if public_size is not None and not 1 <= public_size < math.inf:
        raise InputError(f"public_size must be at least 1, got {public_size:g}")
    names = folder_names(class_names or ())
    if len({unicodedata.normalize("NFC", name) for name in names}) != len(names):
        raise InputError("class_names must all be different")
    _one_of(method, METHODS, "method")
    _one_of(neighboring_relation, tuple(SENSITIVITY_FACTOR), "neighboring_relation")
    try:
        if epsilon is not None:
            noise_multiplier = accounting.noise_multiplier(epsilon, delta)
        assert noise_multiplier is not None  # one of the two is given
        accounting.check_delta(delta)
        GaussianSum(1, noise_multiplier, neighboring_relation=neighboring_relation)  # refuses noise out of range
        made = Plan(
            weights, epsilon, noise_multiplier, delta, neighboring_relation, names, method, public_size, refined,
        )  # fmt: skip
    except ValueError as error:
        raise error if isinstance(error, InputError) else InputError(str(error)) from error
    return made


def _one_of(value: str, allowed: Sequence[str], what: str) -> str:
    if value not in allowed:
        raise InputError(f"{what} must be one of {', '.join(allowed)}, got {value!r}")
    return value


def folder_names(class_names: Sequence[str]) -> tuple[str, ...]:
    """Class names, which become folders of a release: none may lead elsewhere, also not one from a certificate."""
    for name in class_names:
        if not name or name.startswith(".") or any(c in name for c in "/\\:\0"):
            raise InputError(f"the class name {name!r} cannot be a folder name: rename the class")
    return tuple(class_names)
