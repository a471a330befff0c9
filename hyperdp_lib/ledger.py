"""The ledger: everything that touched private data, and what it costs together.

*Precondition.* One :class:`LedgerEntry` for each release, DP-SGD run, tuned trial, and each private
quantity that was declared public. *Postcondition.* :func:`ledger_epsilon` bounds the epsilon of all of them
together, also if each was chosen after seeing the results of those before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hyperdp_lib import accounting, dp_sgd_accounting
from hyperdp_lib.strict_json import check_types, later

KINDS = ("gaussian", "dp_sgd", "other", "declared_public")
RELATIONS = ("add_or_remove_one", "replace_one", "zero_out")
NUMBER_OF_IMAGES, CLASS_SIZES, CLASS_NAMES = "number of images", "class sizes", "class names"
QUANTITIES = (NUMBER_OF_IMAGES, CLASS_SIZES, CLASS_NAMES)


@dataclass(frozen=True)
class LedgerEntry:
    """One thing that touched private data, with its own cost.

    Parameters
    ----------
    kind : {"gaussian", "dp_sgd", "other", "declared_public"}
        A noisy sum; ``steps`` noisy gradients at ``sample_rate``; something of which only ``epsilon`` and
        ``delta`` are known; a quantity (such as n) declared public, which is outside the promise and costs
        nothing in it.
    description : str
        What it was.
    epsilon, delta : float
        Its own cost.
    mu : float or None
        Gaussian-DP parameter, None unless Gaussian.
    noise_multiplier : float or None
        Noise over sensitivity of one step (``gaussian`` and ``dp_sgd``).
    sample_rate, steps : float, int
        Poisson sampling rate in (0, 1] and number of steps (``dp_sgd``).
    neighboring_relation : {"add_or_remove_one", "replace_one", "zero_out"}
        What its cost was computed for: costs under different relations do not add up.
    quantity : {"number of images", "class sizes", "class names"} or None
        What is declared public; None for what is protected, and in entries written before it existed.
    """

    kind: str
    description: str
    epsilon: float
    delta: float
    mu: float | None = None
    noise_multiplier: float | None = None
    sample_rate: float = 1.0
    steps: int = 1
    neighboring_relation: str = "add_or_remove_one"
    quantity: str | None = later(None)

    def __post_init__(self) -> None:
        check_types(self)
        if self.kind not in KINDS:
            raise ValueError(f"the kind of a ledger entry must be one of {', '.join(KINDS)}")
        if self.kind in ("gaussian", "dp_sgd") and self.noise_multiplier is None:
            raise ValueError(f"a ledger entry of kind {self.kind} needs its noise_multiplier")
        if not (0 < self.sample_rate <= 1 and 1 <= self.steps <= 10**7 and self.delta < 1):
            raise ValueError("a ledger entry needs 0 < sample_rate <= 1, 1 <= steps <= 10**7 and delta < 1")
        if self.kind == "gaussian" and (self.sample_rate, self.steps) != (1.0, 1):
            raise ValueError("a ledger entry of kind gaussian is one unsampled release")
        if self.neighboring_relation not in RELATIONS:
            raise ValueError(f"neighboring_relation must be one of {', '.join(RELATIONS)}")
        cost = (self.epsilon, self.delta, self.mu, self.noise_multiplier, self.sample_rate, self.steps)
        if self.kind == "declared_public" and cost != (0, 0, None, None, 1, 1):
            raise ValueError("what is declared public is outside the promise and has no cost or noise")
        if self.quantity is not None and (self.kind, self.quantity in QUANTITIES) != ("declared_public", True):
            raise ValueError(f"what is declared public must be one of {', '.join(QUANTITIES)}")

    @property
    def private(self) -> bool:
        """Whether it was protected by noise (and not declared public)."""
        return self.kind != "declared_public"


def declaration(quantity: str, description: str) -> LedgerEntry:
    """Entry of a private quantity that is declared public.

    >>> declaration(CLASS_NAMES, "class names: cat, dog").private
    False
    """
    return LedgerEntry("declared_public", description, 0.0, 0.0, quantity=quantity)


def with_class_names(ledger: Sequence[LedgerEntry], class_names: Sequence[str]) -> tuple[LedgerEntry, ...]:
    """The ledger, in which class names stand as declared public, unless there are none or they stand there already."""
    if not class_names or any(entry.quantity == CLASS_NAMES for entry in ledger):
        return tuple(ledger)
    return (declaration(CLASS_NAMES, f"class names: {', '.join(class_names)}"), *ledger)


def gaussian_charge(
    description: str, noise_multiplier: float, delta: float, neighboring_relation: str = "add_or_remove_one"
) -> LedgerEntry:
    """Entry of one call of the mechanism: the release, or another (a noisy score, a first look).

    >>> gaussian_charge("one noisy sum", 2.0, 1e-5).mu
    0.5
    """
    cost = accounting.epsilon(noise_multiplier, delta)
    mu = accounting.mu(noise_multiplier)
    return LedgerEntry(
        "gaussian", description, cost, delta, mu, noise_multiplier, neighboring_relation=neighboring_relation
    )


def size_told(ledger: Sequence[LedgerEntry], secret: bool) -> str:
    """In words, what is public about the number of images; ``secret`` where the relation protects it."""
    told = [entry.description for entry in ledger if not entry.private and entry.quantity != CLASS_NAMES]
    return f"declared public: {'; '.join(told)}" if told else "not public" if secret else "public"


def gaussian_multipliers(ledger: Sequence[LedgerEntry]) -> list[float] | None:
    """The noise multipliers, if all that is protected in the ledger is at least one noisy sum."""
    private = [entry for entry in ledger if entry.private]
    if not private or any(entry.kind != "gaussian" for entry in private):
        return None
    return [entry.noise_multiplier or 0.0 for entry in private]


def ledger_epsilon(ledger: Sequence[LedgerEntry], delta: float, neighboring_relation: str) -> float:
    """Epsilon of the whole ledger at `delta`, an upper bound.

    Noisy sums alone compose exactly (mu-GDP). With DP-SGD among them, dp-accounting's PLD composes all; one
    DP-SGD run alone gets :func:`~hyperdp_lib.dp_sgd_accounting.dp_sgd_epsilon`. What is known only by its epsilon
    and delta is added on top (basic composition), as is sampled DP-SGD under ``replace_one``, which no
    accountant here covers. Where DP-SGD is among what is composed, 1 % of delta is kept for the end of its
    noise (`baselines.dp_sgd`), and with sampled batches delta below 1e-12 is a ValueError. So are entries of
    another relation: the same noise protects less against a replacement than against a removal.

    Examples
    --------
    >>> entry = gaussian_charge("one noisy sum", 5.2756, 1e-5)
    >>> round(ledger_epsilon([entry, entry], 1e-5, "add_or_remove_one"), 3)
    1.0
    """
    private = [entry for entry in ledger if entry.private]
    for entry in private:
        if math.isinf(entry.epsilon):
            return math.inf  # also where its noise would say less: the whole costs at least what each part does
        if entry.neighboring_relation != neighboring_relation:
            raise ValueError(
                f"the ledger entry {entry.description!r} was charged for {entry.neighboring_relation}, "
                f"and the release is for {neighboring_relation}; charge both for the same relation"
            )
    known_only = [entry for entry in private if _is_known_only(entry, neighboring_relation)]
    composed = [entry for entry in private if not _is_known_only(entry, neighboring_relation)]
    base = math.fsum(entry.epsilon for entry in known_only)
    rest = delta - math.fsum(entry.delta for entry in known_only)
    if not composed:
        return base if rest >= 0 else math.inf
    if rest <= 0 or any(entry.noise_multiplier == 0 for entry in composed):
        return math.inf
    parts = [(entry.noise_multiplier or 0.0, entry.sample_rate, entry.steps) for entry in composed]
    if all(entry.kind == "gaussian" for entry in composed):
        return base + accounting.epsilon([multiplier for multiplier, _, _ in parts], rest)
    rest = dp_sgd_accounting.kept(rest)
    if len(parts) == 1:
        multiplier, sample_rate, steps = parts[0]
        error = min(0.01, 0.01 * composed[0].epsilon)  # the accountant's own, as in calibration
        return base + dp_sgd_accounting.dp_sgd_epsilon(multiplier, rest, sample_rate, steps, eps_error=error)
    return base + dp_sgd_accounting.pld_epsilon(parts, rest)


def _is_known_only(entry: LedgerEntry, neighboring_relation: str) -> bool:
    sampled = entry.kind == "dp_sgd" and entry.sample_rate < 1
    return entry.kind == "other" or (sampled and neighboring_relation == "replace_one")


def conversion(ledger: Sequence[LedgerEntry]) -> str:
    """In words, by which route :func:`ledger_epsilon` came to its number."""
    private = [entry for entry in ledger if entry.private]
    kinds = {entry.kind for entry in private}
    if kinds == {"gaussian"}:
        return "analytic Gaussian mechanism with discretisation slack; rho is exact"
    if kinds == {"dp_sgd"} and len(private) == 1 and not _is_known_only(private[0], private[0].neighboring_relation):
        return "the larger of the PRV and the PLD accountant; analytic Gaussian for full batches"
    return "PLD, and basic composition of what is known by epsilon and delta only" if kinds else "none"
