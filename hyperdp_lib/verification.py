"""Is a release folder what its certificate says? Recomputed from the files alone, by an independent route.

The numbers are checked twice: against :mod:`hyperdp_lib.ledger`, and against code that is not ours
(dp-accounting's own Gaussian formula and its PLD accountant). The sensitivities are written out again here
on purpose.

A pass means: the folder holds exactly the files that its certificate lists, each with the content listed, and
the certificate's numbers follow from its ledger. So a file changed, added or taken away since is found. It is no
signature: whoever rewrites certificate and files together can write a consistent false folder, and only a copy or
a hash of the certificate from elsewhere tells.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from hyperdp_lib.artefacts import (
    BASE_FILES,
    BASE_FOLDER,
    CERTIFICATE_FILE,
    EMBEDDING_FILE,
    EMBEDDING_TENSOR,
    MOST_PARTS,
    PARTS_FILE,
    read_regular,
    tensors_sha256,
)
from hyperdp_lib.certificate import DP_SGD, GAUSSIAN_SUM, NO_NOISE, NO_PRIVATE_DATA, SEEDED_NOISE, Certificate
from hyperdp_lib.ledger import ledger_epsilon

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
CARD_FILE = "README.md"
_ADAPTER_FOLDER = r"(classes/[^/.][^/]*/)?(part_\d\d/)?"
_RELEASE_FILES = re.compile(
    rf"{_ADAPTER_FOLDER}({'|'.join(map(re.escape, (*ADAPTER_FILES, CARD_FILE)))})"
    rf"|{re.escape(BASE_FOLDER)}/({'|'.join(map(re.escape, BASE_FILES))})"
    rf"|{'|'.join(map(re.escape, (EMBEDDING_FILE, PARTS_FILE, 'samples.png')))}"
)
_PART = re.compile(r"(?:(classes/[^/]+)/)?part_\d\d")
_WEIGHTS = Path(__file__).parent / "weights"
_LARGEST_TEXT, _LARGEST_FILE, _LARGEST_FOLDER = 10 * 2**20, 2**30, 2**32  # bytes

Contents = Mapping[str, bytes]  # of the files of a release, by name


def verify(folder: str | Path, *, base_model_sha256: str | None = None) -> list[str]:
    """Problems of a release folder, in plain English; an empty list if there are none.

    Parameters
    ----------
    folder : path
        A folder written by ``hyperdp release``.
    base_model_sha256 : str or None
        Hash of the base model at hand, to be compared with the one the adapters were made for.

    Returns
    -------
    list of str
        Never an exception, whatever the files contain.

    Examples
    --------
    >>> verify("no/such/folder")
    ['certificate.json cannot be read']
    """
    folder = Path(folder)
    try:
        certificate = _certificate(folder)
    except OSError:
        return [f"{CERTIFICATE_FILE} cannot be read"]
    except Exception as error:  # whatever a hostile file provokes is a problem to report, not a crash
        return [f"{CERTIFICATE_FILE} {error}"]
    contents, problems = _read(folder, certificate.artefact_sha256)
    checks: tuple[Callable[[Certificate, Contents], Iterator[str]], ...] = (
        _budget, _entries, _risk, _noise, _stamp, _adapters, _parts, _base, _models, _embedding, _model_cards,
    )  # fmt: skip
    for check in checks:
        try:
            problems += check(certificate, contents)
        except Exception as error:
            problems.append(f"{check.__name__.strip('_').replace('_', ' ')}: cannot be checked ({error})")
    if base_model_sha256 is not None and base_model_sha256 != certificate.base_model_sha256:
        problems.append("the adapters were made for another base model than the one at hand")
    return problems


def _budget(certificate: Certificate, contents: Contents) -> Iterator[str]:
    """The ledger's total, twice."""
    ledger, stated, delta = certificate.ledger, certificate.epsilon, certificate.delta
    if not certificate.charged:
        yield "the release is not charged to its ledger, so its epsilon means nothing"
    has_dp_sgd = any(entry.kind == "dp_sgd" for entry in ledger)
    ours = ledger_epsilon(ledger, delta, certificate.neighboring_relation)
    tolerance = 0.03 if has_dp_sgd else 1e-5
    if not _agree(stated, ours, tolerance) or stated < ours * (1 - 1e-9):
        yield f"epsilon is stated as {stated:g} but the ledger comes to {ours:g} at delta {delta:g}"
    theirs = _independent_epsilon(certificate)
    if theirs is not None and not _agree(stated, theirs, 0.05 if has_dp_sgd else 1e-4):
        yield f"epsilon is stated as {stated:g} but an independent accountant finds {theirs:g}"
    gaussian = [entry for entry in ledger if entry.kind == "gaussian" and entry.noise_multiplier]
    if len(gaussian) == len([entry for entry in ledger if entry.private]) > 0:
        squared = math.fsum((entry.noise_multiplier or 1.0) ** -2 for entry in gaussian)
        mu, rho = math.sqrt(squared), squared / 2
        if not (_agree(certificate.mu, mu, 1e-9) and _agree(certificate.rho, rho, 1e-9)):
            yield "mu or rho does not follow from the noise multipliers"
        # Bun & Steinke 2016, Proposition 1.3: looser, but rigorous for the discrete noise without any slack.
        elif stated > rho + 2 * math.sqrt(rho * math.log(1 / delta)) + 1e-9:
            yield "epsilon is above what zCDP guarantees"


def _entries(certificate: Certificate, contents: Contents) -> Iterator[str]:
    """Each entry by itself: its relation, and its cost from its own noise."""
    relation = certificate.neighboring_relation
    for entry in certificate.ledger:
        if not entry.private:
            continue
        what = f"the ledger entry {entry.description!r}"
        if math.isinf(entry.epsilon):
            if math.isfinite(certificate.epsilon):
                yield f"{what} states no finite epsilon, and the certificate does"
        elif entry.neighboring_relation != relation:
            yield f"{what} was charged for {entry.neighboring_relation}, and the release is for {relation}"
        elif entry.kind == "gaussian":
            if not _agree(entry.mu, 1 / (entry.noise_multiplier or 1.0), 1e-9):
                yield f"{what} states a wrong mu"
            if not _agree(entry.epsilon, ledger_epsilon([entry], entry.delta, relation), 1e-5):
                yield f"{what} states a wrong epsilon"
        elif entry.kind == "dp_sgd":
            alone, share, small = entry, entry.epsilon, entry.delta
            if entry.sample_rate < 1 and relation == "replace_one":
                # a replacement is a removal and an addition: group privacy for two
                share, small = entry.epsilon / 2, entry.delta / (1 + math.exp(min(entry.epsilon / 2, 700)))
                alone = dataclasses.replace(entry, neighboring_relation="add_or_remove_one", epsilon=share)
            if ledger_epsilon([alone], small, alone.neighboring_relation) > share * 1.01:
                yield f"{what} states less than its noise costs"


def _independent_epsilon(certificate: Certificate) -> float | None:
    """The same total by dp-accounting alone; None where it has nothing to say."""
    import dp_accounting

    private = [entry for entry in certificate.ledger if entry.private]
    multipliers = [entry.noise_multiplier or 0.0 for entry in private]
    sampled = any(entry.sample_rate < 1 for entry in private)
    if not private or any(entry.kind == "other" for entry in private) or 0.0 in multipliers:
        return None
    if not sampled:
        steps = [entry.steps for entry in private]
        squared = math.fsum(n / m**2 for m, n in zip(multipliers, steps, strict=True))
        return float(dp_accounting.get_epsilon_gaussian(squared**-0.5, certificate.delta))
    if certificate.neighboring_relation == "replace_one" or math.isinf(certificate.epsilon):
        return None
    accountant = dp_accounting.pld.PLDAccountant()
    for entry, multiplier in zip(private, multipliers, strict=True):
        gaussian = dp_accounting.GaussianDpEvent(multiplier)
        accountant.compose(dp_accounting.PoissonSampledDpEvent(entry.sample_rate, gaussian), entry.steps)
    return float(accountant.get_epsilon(certificate.delta))


def _risk(certificate: Certificate, contents: Contents) -> Iterator[str]:
    """What the best attack achieves, by the normal distribution of the standard library."""
    if (certificate.risk is None) != (certificate.schema is None):
        yield "only one of risk and schema is stated"
    if certificate.risk is None:  # older than both
        return
    private = [entry for entry in certificate.ledger if entry.private]
    squared = math.fsum((entry.noise_multiplier or math.nan) ** -2 for entry in private)
    epsilon, delta = (certificate.epsilon, certificate.delta) if private else (0.0, 0.0)
    if not certificate.private:
        found = [1.0, 1.0, 1.0, 1.0]
    else:
        if private and all(entry.kind == "gaussian" for entry in private):
            mu, normal = math.sqrt(squared), NormalDist()
            gained = normal.cdf(mu / 2) - normal.cdf(-mu / 2)
            rates = [normal.cdf(normal.inv_cdf(share) + mu) for share in (0.01, 0.001)]
        else:
            limit = math.exp(min(epsilon, 700.0))
            gained = 1 - 2 * (1 - delta) / (1 + limit)  # where the two lines of the region meet
            rates = [min(limit * share + delta, 1 - (1 - delta - share) / limit) for share in (0.01, 0.001)]
        found = [gained, *rates, rates[0] / (rates[0] + 0.01)]
    for item, computed in zip(dataclasses.fields(certificate.risk), found, strict=True):
        stated = getattr(certificate.risk, item.name)
        if stated < computed * (1 - 1e-9) - 1e-15 or not _agree(stated, computed, 3e-5):
            yield f"risk: {item.name} is stated as {stated:g} but comes to {computed:g}"


def _noise(certificate: Certificate, contents: Contents) -> Iterator[str]:
    """Sensitivity from the relation, noise from the sensitivity."""
    if certificate.mechanism not in (GAUSSIAN_SUM, DP_SGD):
        return
    multiplier, clip_norm = certificate.noise_multiplier, certificate.clip_norm
    sensitivity, noise_std = certificate.sensitivity, certificate.noise_std
    if multiplier is None or clip_norm is None or sensitivity is None or noise_std is None:
        yield "the noise multiplier, noise_std, clip_norm or sensitivity is not stated"
        return
    relation = certificate.neighboring_relation
    # A replaced example under Poisson sampling is charged as one removed and one added, each at sensitivity C.
    own = [entry for entry in certificate.ledger if entry.kind == "dp_sgd" and entry.noise_multiplier == multiplier]
    sampled = certificate.mechanism == DP_SGD and bool(own) and all(entry.sample_rate < 1 for entry in own)
    factor = 2.0 if relation == "replace_one" and not sampled else 1.0
    if not _agree(sensitivity, clip_norm * factor, 1e-9):
        yield f"the sensitivity of {relation} must be {factor:g} times the clip norm"
    if not _agree(noise_std, multiplier * sensitivity, 1e-9):
        yield "noise_std is not the noise multiplier times the sensitivity"
    if certificate.mechanism == GAUSSIAN_SUM:
        if None in (certificate.grid_bits, certificate.dimension, certificate.num_rows):
            yield "grid_bits, dimension or num_rows is not stated"
        elif certificate.class_names and certificate.num_rows != len(certificate.class_names):
            yield f"{certificate.num_rows} rows were released for {len(certificate.class_names)} classes"


def _stamp(certificate: Certificate, contents: Contents) -> Iterator[str]:
    if certificate.demonstration != (certificate.rng == SEEDED_NOISE):
        yield "the demonstration stamp contradicts the kind of randomness"
    if certificate.rng == NO_NOISE and certificate.mechanism != NO_PRIVATE_DATA and math.isfinite(certificate.epsilon):
        yield "a finite epsilon is stated without noise"


def _adapters(certificate: Certificate, contents: Contents) -> Iterator[str]:
    """Adapter folders are complete, one for each class, and all for the base model in the folder."""
    names = [PurePosixPath(name) for name in certificate.artefact_sha256]
    adapters = _adapter_folders(certificate)
    if not adapters:
        yield "the certificate lists no adapter"
    # classes/NAME/file, or classes/NAME/part_01/file where a class is a mixture
    classes = {name.parts[1] for name in names if name.parts[:1] == ("classes",) and len(name.parts) in (3, 4)}
    if certificate.class_names and classes != set(certificate.class_names):
        yield f"{len(classes)} class adapters are listed for {len(certificate.class_names)} classes, or by other names"
    for adapter in adapters:
        if missing := [name for name in ADAPTER_FILES if PurePosixPath(adapter, name) not in names]:
            yield f"the adapter in {_shown(adapter)} lacks {' and '.join(missing)}"
            continue
        name = str(PurePosixPath(adapter, ADAPTER_FILES[0]))
        try:
            base = str(json.loads(contents[name])["base_model_name_or_path"])
        except Exception:
            yield f"{_shown(name)} is not the configuration of an adapter"
            continue
        if base != BASE_FOLDER:
            yield f"{_shown(name)} is for another base model than the one in {BASE_FOLDER}"


def _adapter_folders(certificate: Certificate) -> list[str]:
    names = [PurePosixPath(name) for name in certificate.artefact_sha256]
    return sorted({str(name.parent) for name in names if name.name in ADAPTER_FILES})


def _parts(certificate: Certificate, contents: Contents) -> Iterator[str]:
    """The list of parts is there where classes have parts, and names each adapter, as often for each class."""
    adapters = {"" if name == "." else name for name in _adapter_folders(certificate)}
    if PARTS_FILE not in certificate.artefact_sha256:
        if any(_PART.fullmatch(name) for name in adapters):
            yield f"{PARTS_FILE} is not listed in the certificate, and there are parts"
        return
    shares = json.loads(contents[PARTS_FILE])
    totals: dict[str, int] = {}
    for name, count in shares.items():
        part = _PART.fullmatch(name)
        owner = part[1] if part else name
        totals[owner] = totals.get(owner, 0) + count
    whole = set(shares) == adapters and all(type(count) is int and count >= 1 for count in shares.values())
    if not whole or len(set(totals.values())) != 1 or max(totals.values()) > MOST_PARTS:
        yield f"{PARTS_FILE} is not a list of the adapters with the same number for each class"


def _base(certificate: Certificate, contents: Contents) -> Iterator[str]:
    """The base model is in the folder, and is the one that the certificate names."""
    if certificate.base_model_sha256 is None:
        return
    config, weights = (f"{BASE_FOLDER}/{name}" for name in BASE_FILES)
    if not {config, weights} <= certificate.artefact_sha256.keys():
        yield f"the certificate lists no base model: {config} and {weights}"
        return
    try:
        whole = isinstance(json.loads(contents[config]), dict)
        found = _state_sha256(contents[weights])
    except Exception:
        whole, found = False, ""
    if not whole:
        yield f"{BASE_FOLDER} is not a base model"
    elif found != certificate.base_model_sha256:
        yield f"{BASE_FOLDER} is not the base model that the certificate names"


class Shipped(NamedTuple):
    """Hashes, as in a certificate, of weights that come with this library; several encoders where sums have cells."""

    name: str
    hypernetwork: str
    encoders: frozenset[str]
    base_model: str


@functools.cache
def shipped_weights() -> tuple[Shipped, ...]:
    """Of all weights with a hypernetwork, from their files."""
    found = []
    for path in sorted(_WEIGHTS.glob("*/hypernetwork.safetensors")):
        folder = path.parent
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        base = _WEIGHTS / manifest.get("builds_on", folder.name) / BASE_FOLDER / BASE_FILES[1]
        encoder, cells = _state((folder / "encoder.safetensors").read_bytes()), folder / "cells.safetensors"
        inside = {f"encoder.{key}": value for key, value in encoder.items()}
        centroids = _state(cells.read_bytes()).values() if cells.is_file() else ()
        encoders = {tensors_sha256(encoder), *(tensors_sha256(inside | {"centroids": one}) for one in centroids)}
        digests = _state_sha256(path.read_bytes()), frozenset(encoders), _state_sha256(base.read_bytes())
        found.append(Shipped(folder.name, *digests))
    return tuple(found)


def shipped_for(folder: str | Path) -> str | None:
    """Name of the weights of this library whose hypernetwork a release's certificate names, if it is one of them."""
    try:
        stated = _certificate(Path(folder)).hypernetwork_sha256
    except (OSError, ValueError):
        return None
    return next((one.name for one in shipped_weights() if one.hypernetwork == stated), None)


def stated_risk(folder: str | Path) -> str | None:
    """The risk line of a certificate, derived again from its ledger (see `hyperdp_lib.risk`); None without one."""
    try:
        return _certificate(Path(folder)).risk_sentence
    except (OSError, ValueError):
        return None


def unknown_models(folder: str | Path) -> list[str]:
    """Models that a certificate names and that do not come with this library: no problem for own weights, a note."""
    try:
        certificate = _certificate(Path(folder))
    except (OSError, ValueError):
        return []
    known = shipped_weights()
    models = {
        "base model": (certificate.base_model_sha256, {one.base_model for one in known}),
        "encoder": (certificate.encoder_sha256, set().union(*(one.encoders for one in known))),
        "hypernetwork": (certificate.hypernetwork_sha256, {one.hypernetwork for one in known}),
    }
    return [
        f"the {what} ({stated[:12]}...) does not come with this library: whether it is public is for you to know"
        for what, (stated, hashes) in models.items()
        if stated is not None and stated not in hashes
    ]


def _models(certificate: Certificate, contents: Contents) -> Iterator[str]:
    """A hypernetwork of this library stands with its own encoder and base model."""
    if certificate.hypernetwork_sha256 is None:
        return
    for one in shipped_weights():
        if one.hypernetwork == certificate.hypernetwork_sha256:
            if certificate.encoder_sha256 not in one.encoders:
                yield f"the encoder is not the one that the hypernetwork of {one.name!r} was made with"
            if certificate.base_model_sha256 != one.base_model:
                yield f"the base model is not the one that the hypernetwork of {one.name!r} was made with"


def _embedding(certificate: Certificate, contents: Contents) -> Iterator[str]:
    """The noisy sum has the stated shape and lies on the stated grid."""
    if certificate.mechanism != GAUSSIAN_SUM:
        return
    if EMBEDDING_FILE not in certificate.artefact_sha256:
        yield f"{EMBEDDING_FILE} is not listed in the certificate"
        return
    from safetensors.numpy import load

    try:
        tensors = load(contents[EMBEDDING_FILE])
    except Exception:
        yield f"{EMBEDDING_FILE} is not a safetensors file"
        return
    shape = (certificate.num_rows, certificate.dimension)
    values = tensors.pop(EMBEDDING_TENSOR, None)
    if tensors or values is None or values.shape != shape or values.dtype != np.float64:
        yield f"{EMBEDDING_FILE} must hold one float64 tensor {EMBEDDING_TENSOR} of shape {shape}"
    elif not np.isfinite(values).all():
        yield f"{EMBEDDING_FILE} holds numbers that are not finite"
    else:
        with np.errstate(all="ignore"):
            steps = values / math.ldexp(certificate.clip_norm or 1.0, -(certificate.grid_bits or 0))
            off_grid = np.abs(steps - np.rint(steps))
        if not np.all(off_grid <= 1e-9 + 1e-15 * np.abs(steps)):
            yield f"{EMBEDDING_FILE} does not lie on the grid of the mechanism"


def _model_cards(certificate: Certificate, contents: Contents) -> Iterator[str]:
    """The first line of a card (after an optional YAML head) is the certificate's sentence, a risk line its risk."""
    if CARD_FILE not in certificate.artefact_sha256:
        yield f"{CARD_FILE} is not listed in the certificate"
    for name in sorted(contents):
        if PurePosixPath(name).name != CARD_FILE:
            continue
        lines = contents[name].decode("utf-8").splitlines()
        if lines and lines[0].strip() == "---" and "---" in lines[1:]:
            lines = lines[lines.index("---", 1) + 1 :]
        first = next((line.strip() for line in lines if line.strip()), "")
        if first != certificate.sentence:
            yield f"the first line of {_shown(name)} is not the sentence of the certificate"
        if any(line.startswith("Risk:") and line.strip() != certificate.risk_sentence for line in lines):
            yield f"the risk in {_shown(name)} is not that of the certificate"


# ---- files -------------------------------------------------------------------------------------------------


def _certificate(folder: Path) -> Certificate:
    return Certificate.from_json(read_regular(folder / CERTIFICATE_FILE, _LARGEST_TEXT).decode("utf-8"))


def _read(folder: Path, listed: Mapping[str, str]) -> tuple[dict[str, bytes], list[str]]:
    """What the files of a release hold, each read once, and what is wrong with them.

    Exactly the listed files are there, regular ones, at places where a release has files. Content is returned as it
    was hashed, also of a changed file; that of adapters and pictures, which is not looked at, is only hashed.
    """
    contents: dict[str, bytes] = {}
    problems, left = [] if listed else ["the certificate lists no files"], _LARGEST_FOLDER
    for name, expected in sorted(listed.items()):
        if not _RELEASE_FILES.fullmatch(name) or not _is_plain_name(name):
            problems.append(f"the certificate lists {name!r}, which is not a file of a release")
            continue
        large = name.endswith((".safetensors", ".png"))
        try:
            content = read_regular(folder / name, min(left, _LARGEST_FILE if large else _LARGEST_TEXT))
        except FileNotFoundError:
            problems.append(f"{_shown(name)} is missing")
            continue
        except (OSError, ValueError) as error:
            problems.append(f"{_shown(name)} {error if len(error.args) == 1 else 'cannot be read'}")
            continue
        left -= len(content)
        if hashlib.sha256(content).hexdigest() != expected:
            problems.append(f"{_shown(name)} is not the file that was released")
        if not name.endswith((ADAPTER_FILES[1], ".png")):
            contents[name] = content
    return contents, problems + list(_unlisted(folder, {*listed, CERTIFICATE_FILE}))


def _unlisted(folder: Path, listed: set[str]) -> Iterator[str]:
    """Whatever else there is: files of any kind, links, pipes, folders without a listed file."""
    parents = {str(parent) for name in listed for parent in PurePosixPath(name).parents}
    pending = [PurePosixPath(".")]
    while pending:
        where = pending.pop()
        try:
            with os.scandir(folder / where) as entries:
                inside = sorted(entries, key=lambda entry: entry.name)
        except OSError:
            yield f"{_shown(str(where))} cannot be read"
            continue
        for entry in inside:
            path = where / entry.name
            if entry.is_dir(follow_symlinks=False) and str(path) in parents:
                pending.append(path)
            elif str(path) not in listed:
                yield f"{_shown(str(path))} is not listed in the certificate"


def _shown(name: str) -> str:
    return name if name.isprintable() else ascii(name)


def _state(content: bytes) -> dict[str, np.ndarray]:
    """Weights, which models hold in float32 whatever the file does."""
    from safetensors.numpy import load

    return {key: value.astype(np.float32) for key, value in load(content).items()}


def _state_sha256(content: bytes) -> str:
    return tensors_sha256(_state(content))


def _agree(stated: float | None, computed: float, tolerance: float) -> bool:
    if stated is None:
        return False
    return stated == computed or abs(stated - computed) <= tolerance * (computed + 1e-3)


def _is_plain_name(name: str) -> bool:
    path = PurePosixPath(name)
    return str(path) == name and ".." not in path.parts and not {"\\", "\0"} & set(name)
