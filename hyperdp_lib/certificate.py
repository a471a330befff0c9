"""The certificate: what was released and at what privacy cost, in JSON and in one English sentence.

*Precondition.* Whoever reads private data adds one :class:`~hyperdp_lib.ledger.LedgerEntry` for it.
*Postcondition.* ``epsilon`` at ``delta`` covers the whole ledger; a release that is not in its own ledger
prints no epsilon. :func:`hyperdp_lib.verification.verify` recomputes everything from the folder alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hyperdp_lib import accounting
from hyperdp_lib import ledger as ledgers
from hyperdp_lib import risk as risks
from hyperdp_lib.artefacts import CERTIFICATE_FILE, folder_sha256, library_versions, write_atomic
from hyperdp_lib.ledger import LedgerEntry
from hyperdp_lib.mechanism import GaussianSum
from hyperdp_lib.risk import Risk
from hyperdp_lib.strict_json import check_types, decode, later, loads, plain

STAMP = "demonstration - NOT PRIVATE"
SCHEMA = "urn:hyperdp:certificate:1"  # the $id of certificate.schema.json, version last

GAUSSIAN_SUM, DP_SGD = "discrete Gaussian sum", "DP-SGD"
NO_PRIVATE_DATA, NO_PRIVACY = "no private data", "no privacy"
OS_NOISE, SEEDED_NOISE = "operating system (OpenDP)", "seeded demonstration"
FLOAT_NOISE, NO_NOISE = "torch generator (floating-point noise)", "none"
RELATIONS = {
    "add_or_remove_one": "adding or removing one image",
    "replace_one": "replacing one image",
    "zero_out": "voiding one image, which then contributes nothing",
}
_CHOICES = {
    "mechanism": (GAUSSIAN_SUM, DP_SGD, NO_PRIVATE_DATA, NO_PRIVACY),
    "rng": (OS_NOISE, SEEDED_NOISE, FLOAT_NOISE, NO_NOISE),
    "neighboring_relation": tuple(RELATIONS),
    "schema": (None, SCHEMA),
}
_CHARGED_AS = {GAUSSIAN_SUM: ("gaussian",), DP_SGD: ("dp_sgd", "other"), NO_PRIVACY: ("gaussian", "other")}


@dataclass(frozen=True)
class Certificate:
    """Everything a reader needs to judge a release; None where a field does not apply.

    ``epsilon``, ``delta``, ``mu`` and ``rho`` cover the whole ledger; the noise, the clip norm and the
    sensitivity are the release's own, in the embedding's units (DP-SGD: the gradient's). Hashes are sha256
    in hexadecimal.
    """

    method: str
    mechanism: str
    epsilon: float
    delta: float
    mu: float | None
    rho: float | None
    conversion: str
    neighboring_relation: str
    rng: str
    demonstration: bool
    num_private: int | None = None
    num_private_treatment: str = "not public"
    labels: str = "none"
    class_names: tuple[str, ...] = ()
    noise_multiplier: float | None = None
    noise_std: float | None = None
    clip_norm: float | None = None
    sensitivity: float | None = None
    grid_bits: int | None = None
    dimension: int | None = None
    num_rows: int | None = None
    encoder_sha256: str | None = None
    base_model_sha256: str | None = None
    hypernetwork_sha256: str | None = None
    artefact_sha256: dict[str, str] = field(default_factory=dict)
    ledger: tuple[LedgerEntry, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    post_processing: tuple[str, ...] = ()  # what was done to the release afterwards; costs nothing, says so
    schema: str | None = later(None)  # id and version of certificate.schema.json
    risk: Risk | None = later(None)  # follows from the rest: see `risk`

    def __post_init__(self) -> None:
        check_types(self)
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}")
        if not self.delta < 1:
            raise ValueError("delta must be below 1")
        if self.num_private is not None and self.neighboring_relation == "add_or_remove_one":
            raise ValueError("num_private is secret under add_or_remove_one and must not be stated")

    @property
    def private(self) -> bool:
        """Whether the guarantee holds: charged, unpredictable noise, and a finite epsilon."""
        return self.charged and not self.demonstration and math.isfinite(self.epsilon)

    @property
    def charged(self) -> bool:
        """Whether the release itself is in the ledger: an entry of its kind, with its noise."""
        if self.mechanism == NO_PRIVATE_DATA:
            return not any(entry.private for entry in self.ledger)
        own = [entry.noise_multiplier for entry in self.ledger if entry.kind in _CHARGED_AS[self.mechanism]]
        protected = self.noise_multiplier is not None and self.mechanism != NO_PRIVACY
        return self.noise_multiplier in own and (protected or math.isinf(self.epsilon))

    @property
    def sentence(self) -> str:
        """One English sentence, the first line of the model card. Numbers are rounded up."""
        if not self.charged:
            return "No epsilon can be stated: this release was not charged to its privacy ledger."
        if self.mechanism == NO_PRIVATE_DATA:
            return "This adapter was made from public data alone: no private image was read (epsilon = 0)."
        if math.isinf(self.epsilon):
            stamp = STAMP if self.demonstration else "NOT PRIVATE"
            return f"{stamp}: no noise protects the private images (epsilon = infinity)."
        budget = f"(epsilon = {risks.rounded_up(self.epsilon)}, delta = {risks.rounded_up(self.delta)})"
        claim = f"{budget}-differentially private with respect to {RELATIONS[self.neighboring_relation]}"
        if self.demonstration:
            return f"{STAMP}: the noise came from a seed; with secret noise this adapter would be {claim}."
        return f"This adapter is {claim}."

    @property
    def risk_sentence(self) -> str:
        """The risk in plain words, a line of the model card: see :func:`hyperdp_lib.risk.in_words`."""
        return risks.in_words(self)

    def to_json(self) -> str:
        """JSON text with sorted keys and a checksum; infinity is the string "infinity"."""
        values = plain(self)
        text = json.dumps(values | {"checksum": _checksum(values)}, indent=2, sort_keys=True, allow_nan=False)
        return text + "\n"

    @classmethod
    def from_json(cls, text: str) -> Certificate:
        """Read strictly: every key present, known, single and of its type, no NaN, and the checksum right.

        Anything else is a ValueError that says what is wrong.
        """
        values = loads(text)
        if not isinstance(values, dict):
            raise ValueError("is not a JSON object")
        checksum = values.pop("checksum", None)
        certificate: Certificate = decode(values, cls)
        if checksum != _checksum(plain(certificate)):
            raise ValueError("was changed after it was written: its checksum does not match")
        return certificate


def ledger_certificate(
    ledger: Sequence[LedgerEntry],
    delta: float,
    *,
    method: str,
    mechanism: str,
    neighboring_relation: str,
    rng: str,
    epsilon: float | None = None,
    num_private: int | None = None,
    **fields: Any,
) -> Certificate:
    """Certificate of any method: what follows from the ledger, and other `fields` of :class:`Certificate`.

    ``epsilon`` is the budget asked for: stated if the ledger stays within it and nearly fills it (DP-SGD's
    accountants leave up to 2 %), else what was spent is. ``num_private`` is dropped where it is secret.
    Class names enter the ledger, as declared public.
    """
    ledger = ledgers.with_class_names(ledger, fields.get("class_names") or ())
    spent = ledgers.ledger_epsilon(ledger, delta, neighboring_relation)
    slack = 0.02 if any(entry.kind == "dp_sgd" for entry in ledger) else 1e-6
    stated = epsilon if epsilon is not None and spent <= epsilon <= spent * (1 + slack) else spent
    multipliers = ledgers.gaussian_multipliers(ledger)
    secret = neighboring_relation == "add_or_remove_one"
    derived = {
        "num_private_treatment": ledgers.size_told(ledger, secret),
        "labels": "public label set, private labels" if fields.get("class_names") else "none",
        "conversion": ledgers.conversion(ledger),
        "versions": library_versions(),
    }
    made = Certificate(
        method, mechanism, stated, delta,
        mu=None if multipliers is None else accounting.mu(multipliers),
        rho=None if multipliers is None else accounting.rho(multipliers),
        neighboring_relation=neighboring_relation,
        rng=rng,
        demonstration=rng == SEEDED_NOISE,
        num_private=None if secret else num_private,
        ledger=tuple(ledger),
        **(derived | fields),
    )  # fmt: skip
    return dataclasses.replace(made, schema=SCHEMA, risk=risks.of(made))


def gaussian_certificate(
    config: GaussianSum,
    delta: float,
    *,
    seeded: bool,
    method: str = "dp_deepsets",
    description: str = "one noisy sum of embeddings",
    ledger: Sequence[LedgerEntry] = (),
    **fields: Any,
) -> Certificate:
    """Certificate of one noisy sum, itself charged after `ledger` (what was spent before).

    `fields`: ``epsilon`` (the budget asked for), and others of :class:`Certificate`.

    >>> config = GaussianSum(dimension=64, noise_multiplier=accounting.noise_multiplier(1.0, 1e-5))
    >>> gaussian_certificate(config, 1e-5, epsilon=1.0, seeded=False).sentence[:52]
    'This adapter is (epsilon = 1, delta = 1e-05)-differe'
    """
    if config.neighboring_relation == "add_or_remove_one":
        told = ledgers.size_told(ledger, True)
        fields = {"num_private_treatment": f"{told}; noisy count released in the same sum"} | fields
    numbers = "noise_multiplier noise_std clip_norm sensitivity grid_bits dimension num_rows".split()
    return ledger_certificate(
        (*ledger, ledgers.gaussian_charge(description, config.noise_multiplier, delta, config.neighboring_relation)),
        delta,
        method=method, mechanism=GAUSSIAN_SUM, neighboring_relation=config.neighboring_relation,
        rng=SEEDED_NOISE if seeded else OS_NOISE,
        **{name: getattr(config, name) for name in numbers},
        **fields,
    )  # fmt: skip


def write_certificate(certificate: Certificate, folder: str | Path) -> Path:
    """Hash every file under `folder` into the certificate and write it there, atomically; its path."""
    path = Path(folder) / CERTIFICATE_FILE
    complete = dataclasses.replace(certificate, artefact_sha256=folder_sha256(path.parent))
    write_atomic(path, complete.to_json().encode())
    return path


def _checksum(values: dict[str, Any]) -> str:
    # finds accidents and edits; no signature: whoever can rewrite the folder can recompute it
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
