"""Is a release folder what its certificate says? Recomputed from the files alone, by an independent route.

The numbers are checked twice: against :mod:`hyperdp_lib.ledger`, and against code that is not ours
(dp-accounting's own Gaussian formula and its PLD accountant). The sensitivities are written out again here
on purpose.

A pass means: consistent, complete and unchanged since it was written. It is no signature: whoever can
rewrite the whole folder can write a consistent false one.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import numpy as np

from hyperdp_lib.artefacts import CERTIFICATE_FILE, EMBEDDING_FILE, EMBEDDING_TENSOR, file_sha256
from hyperdp_lib.certificate import DP_SGD, GAUSSIAN_SUM, NO_NOISE, NO_PRIVATE_DATA, SEEDED_NOISE, Certificate
from hyperdp_lib.ledger import ledger_epsilon

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_CODE_FILES = (".bin", ".ckpt", ".dill", ".joblib", ".npy", ".pickle", ".pkl", ".pt", ".pth", ".py")
_LARGEST_TEXT = 10 * 2**20  # bytes


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
        certificate = Certificate.from_json(_read(folder / CERTIFICATE_FILE))
    except OSError:
        return [f"{CERTIFICATE_FILE} cannot be read"]
    except Exception as error:  # whatever a hostile file provokes is a problem to report, not a crash
        return [f"{CERTIFICATE_FILE} {error}"]
    problems: list[str] = []
    checks: tuple[Callable[[Certificate, Path], Iterator[str]], ...] = (
        _budget, _noise, _stamp, _files, _adapters, _embedding, _model_card,
    )  # fmt: skip
    for check in checks:
        try:
            problems += check(certificate, folder)
        except Exception as error:
            problems.append(f"{check.__name__.strip('_').replace('_', ' ')}: cannot be checked ({error})")
    if base_model_sha256 is not None and base_model_sha256 != certificate.base_model_sha256:
        problems.append("the adapters were made for another base model than the one at hand")
    return problems


def _budget(certificate: Certificate, folder: Path) -> Iterator[str]:
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
    for entry in gaussian:
        if not _agree(entry.mu, 1 / (entry.noise_multiplier or 1.0), 1e-9):
            yield f"the ledger entry {entry.description!r} states a wrong mu"
        cost = ledger_epsilon([entry], entry.delta, certificate.neighboring_relation)
        if not _agree(entry.epsilon, cost, 1e-5):
            yield f"the ledger entry {entry.description!r} states a wrong epsilon"
    for entry in ledger:
        if entry.kind == "dp_sgd" and entry.sample_rate < 1 and entry.neighboring_relation == "replace_one":
            # a replacement is a removal and an addition: group privacy for two
            half, small = entry.epsilon / 2, entry.delta / (1 + math.exp(entry.epsilon / 2))
            removal = dataclasses.replace(entry, neighboring_relation="add_or_remove_one", epsilon=half)
            spent = ledger_epsilon([removal], small, "add_or_remove_one")
            if spent > half * 1.01:
                yield f"the ledger entry {entry.description!r} states less than its noise costs"
    if len(gaussian) == len([entry for entry in ledger if entry.private]) > 0:
        squared = math.fsum((entry.noise_multiplier or 1.0) ** -2 for entry in gaussian)
        mu, rho = math.sqrt(squared), squared / 2
        if not (_agree(certificate.mu, mu, 1e-9) and _agree(certificate.rho, rho, 1e-9)):
            yield "mu or rho does not follow from the noise multipliers"
        # Bun & Steinke 2016, Proposition 1.3: looser, but rigorous for the discrete noise without any slack.
        elif stated > rho + 2 * math.sqrt(rho * math.log(1 / delta)) + 1e-9:
            yield "epsilon is above what zCDP guarantees"


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


def _noise(certificate: Certificate, folder: Path) -> Iterator[str]:
    """Sensitivity from the relation, noise from the sensitivity."""
    if certificate.mechanism not in (GAUSSIAN_SUM, DP_SGD):
        return
    multiplier, clip_norm = certificate.noise_multiplier, certificate.clip_norm
    sensitivity, noise_std = certificate.sensitivity, certificate.noise_std
    if multiplier is None or clip_norm is None or sensitivity is None or noise_std is None:
        yield "the noise multiplier, noise_std, clip_norm or sensitivity is not stated"
        return
    factor = 2.0 if certificate.neighboring_relation == "replace_one" else 1.0
    # A replaced example under Poisson sampling is charged as one removed and one added, each at sensitivity
    # C.
    sampled = any(entry.sample_rate < 1 for entry in certificate.ledger)
    allowed = {factor, 1.0} if certificate.mechanism == DP_SGD and sampled else {factor}
    if not any(_agree(sensitivity, clip_norm * f, 1e-9) for f in allowed):
        yield f"the sensitivity of {certificate.neighboring_relation} must be {factor:g} times the clip norm"
    if not _agree(noise_std, multiplier * sensitivity, 1e-9):
        yield "noise_std is not the noise multiplier times the sensitivity"
    if certificate.mechanism == GAUSSIAN_SUM:
        if None in (certificate.grid_bits, certificate.dimension, certificate.num_rows):
            yield "grid_bits, dimension or num_rows is not stated"
        elif certificate.class_names and certificate.num_rows != len(certificate.class_names):
            yield f"{certificate.num_rows} rows were released for {len(certificate.class_names)} classes"


def _stamp(certificate: Certificate, folder: Path) -> Iterator[str]:
    if certificate.demonstration != (certificate.rng == SEEDED_NOISE):
        yield "the demonstration stamp contradicts the kind of randomness"
    if certificate.rng == NO_NOISE and certificate.mechanism != NO_PRIVATE_DATA and math.isfinite(certificate.epsilon):
        yield "a finite epsilon is stated without noise"


def _files(certificate: Certificate, folder: Path) -> Iterator[str]:
    """Every listed file is there and unchanged; no model file is there unlisted."""
    listed = certificate.artefact_sha256
    if not listed:
        yield "the certificate lists no files"
    for name, expected in sorted(listed.items()):
        path = folder / name
        inside = _is_plain_name(name) and path.resolve().is_relative_to(folder.resolve())
        if not inside or path.is_symlink():
            yield f"the certificate lists {name!r}, which is not a file of this folder"
        elif not path.is_file():
            yield f"{name} is missing"
        elif file_sha256(path) != expected:
            yield f"{name} is not the file that was released"
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix.lower() in _CODE_FILES:
            yield f"{name}: a release contains no files that can carry code"
        elif name not in listed and (path.suffix == ".safetensors" or path.name in ADAPTER_FILES):
            yield f"{name} is not listed in the certificate"


def _adapters(certificate: Certificate, folder: Path) -> Iterator[str]:
    """Adapter folders are complete, one for each class, and all for one base model."""
    names = [PurePosixPath(name) for name in certificate.artefact_sha256]
    adapters = sorted({str(name.parent) for name in names if name.name in ADAPTER_FILES})
    if not adapters:
        yield "the certificate lists no adapter"
    # classes/NAME/file, or classes/NAME/part_01/file where a class is a mixture
    classes = {name.parts[1] for name in names if name.parts[0] == "classes" and len(name.parts) in (3, 4)}
    if certificate.class_names and len(classes) != len(certificate.class_names):
        yield f"{len(classes)} class adapters are listed for {len(certificate.class_names)} classes"
    if (folder / "classes").is_dir():
        for extra in sorted({path.name for path in (folder / "classes").iterdir()} - classes):
            yield f"classes/{extra} is not listed in the certificate"
    bases = set()
    for adapter in adapters:
        if missing := [name for name in ADAPTER_FILES if PurePosixPath(adapter, name) not in names]:
            yield f"the adapter in {adapter} lacks {' and '.join(missing)}"
            continue
        try:
            config = json.loads(_read(folder / adapter / ADAPTER_FILES[0]))
            bases.add(str(config["base_model_name_or_path"]))
        except Exception:
            yield f"{PurePosixPath(adapter, ADAPTER_FILES[0])} is not the configuration of an adapter"
    if len(bases) > 1:
        yield "the adapters are for different base models"


def _embedding(certificate: Certificate, folder: Path) -> Iterator[str]:
    """The noisy sum has the stated shape and lies on the stated grid."""
    if certificate.mechanism != GAUSSIAN_SUM:
        return
    if EMBEDDING_FILE not in certificate.artefact_sha256:
        yield f"{EMBEDDING_FILE} is not listed in the certificate"
        return
    from safetensors.numpy import load

    try:
        tensors = load((folder / EMBEDDING_FILE).read_bytes())
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


def _model_card(certificate: Certificate, folder: Path) -> Iterator[str]:
    """The first line of the card (after an optional YAML head) is the certificate's sentence."""
    lines = _read(folder / "README.md").splitlines()
    if lines and lines[0].strip() == "---" and "---" in lines[1:]:
        lines = lines[lines.index("---", 1) + 1 :]
    first = next((line.strip() for line in lines if line.strip()), "")
    if first != certificate.sentence:
        yield "the first line of README.md is not the sentence of the certificate"


def _read(path: Path) -> str:
    with open(path, "rb") as file:
        content = file.read(_LARGEST_TEXT + 1)
    if len(content) > _LARGEST_TEXT:
        raise ValueError("is too large")
    return content.decode("utf-8")


def _agree(stated: float | None, computed: float, tolerance: float) -> bool:
    if stated is None:
        return False
    return stated == computed or abs(stated - computed) <= tolerance * (computed + 1e-3)


def _is_plain_name(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return bool(parts) and parts[0] != "/" and ".." not in parts and not {"\\", "\0"} & set(name)
