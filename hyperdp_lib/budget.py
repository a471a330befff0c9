r"""A budget across releases of the same images: a file that every release enters before it reads an image.

*Theorem* (Dong, Roth & Su 2022, Theorem 4 and Corollary 2). Releases that are mu_1-GDP, mu_2-GDP, ... are together
`sqrt(mu_1**2 + mu_2**2 + ...)`-GDP, also if each is chosen after seeing the results of those before. Here each mu is
fixed before its release, and what is refused depends on the file alone, never on an image; so no more than the cap is
ever spent. What the integer grid costs is charged too, by step 5 in :mod:`hyperdp_lib.accounting`. Two looks are one
entry: their mu add up to it, and so does what the grid costs.

*Order.* Under a lock: read, check, compare with the cap, append, fsync. Only then is an image read. So two processes
cannot both spend the last of it, and a process that dies at any moment leaves its entry. An entry is taken back, by a
line of its own, only by its own process, before :meth:`Reservation.commit`, after which noise may be drawn.

*The file*, ``FILE``, has one JSON object a line, each with its number and the hash of itself and of the line before.
``FILE.copy`` is a second copy, written after it, so that a file cut short is noticed and can be restored.
``FILE.lock`` is held while writing. Hashes find accidents and edits; they are no signature against the file's owner.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from decimal import ROUND_FLOOR, Context
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hyperdp_lib import accounting
from hyperdp_lib.artefacts import read_regular, write_atomic
from hyperdp_lib.image_files import InputError
from hyperdp_lib.ledger import RELATIONS, LedgerEntry, gaussian_charge, ledger_epsilon
from hyperdp_lib.risk import rounded_up
from hyperdp_lib.strict_json import check_types, decode, loads, plain

VERSION = 1
_MOST_BYTES = 2**28
_PATIENCE = 60.0  # seconds to wait for another process, which holds the lock for milliseconds


@dataclass(frozen=True)
class Terms:
    """What a budget file fixes when it is made.

    Parameters
    ----------
    cap_epsilon, cap_mu : float or None
        Exactly one of them: the most that all releases together may cost.
    delta : float
        At which epsilon is counted, whatever delta a release names.
    neighboring_relation : {"add_or_remove_one", "replace_one", "zero_out"}
        Of every release in it: costs under different relations do not add up.

    Raises
    ------
    ValueError
        for a value out of range.
    """

    cap_epsilon: float | None
    cap_mu: float | None
    delta: float = 1e-5
    neighboring_relation: str = "add_or_remove_one"
    version: int = VERSION

    def __post_init__(self) -> None:
        check_types(self)
        caps = [cap for cap in (self.cap_epsilon, self.cap_mu) if cap is not None]
        if len(caps) != 1 or not 1e-6 <= caps[0] <= 1e6:
            raise ValueError("a budget has one cap, on epsilon or on mu, from a millionth to a million")
        if not 1e-60 < self.delta < 1:
            raise ValueError("the delta of a budget must be between 1e-60 and 1, both excluded")
        if self.neighboring_relation not in RELATIONS:
            raise ValueError(f"neighboring_relation must be one of {', '.join(RELATIONS)}")
        if self.version != VERSION:
            raise ValueError(f"the version of a budget file must be {VERSION}")

    @property
    def cap(self) -> str:
        """The cap in words, such as ``epsilon 2``."""
        return f"mu {self.cap_mu:.12g}" if self.cap_epsilon is None else f"epsilon {self.cap_epsilon:.12g}"

    def allows(self, noise_multipliers: Sequence[float]) -> bool:
        """Whether Gaussian releases with this noise stay together within the cap.

        >>> [Terms(None, 0.5).allows([2.8284272] * times) for times in (1, 2, 3)]
        [True, True, False]
        """
        if not noise_multipliers:
            return True
        if self.cap_mu is not None:
            return accounting.mu(noise_multipliers) <= self.cap_mu
        assert self.cap_epsilon is not None
        return accounting.delta(noise_multipliers, self.cap_epsilon) <= self.delta


@dataclass(frozen=True)
class Line:
    """A release as it stands in a budget file.

    Attributes
    ----------
    number
        Of its line, from 1.
    time
        When it was entered, UTC.
    entry
        What it was, and its cost.
    cancelled
        Whether it was taken back, before any noise was drawn.
    """

    number: int
    time: str
    entry: LedgerEntry
    cancelled: bool = False


@dataclass(frozen=True)
class Budget:
    """A budget file as read: its terms and its releases, in order."""

    terms: Terms
    releases: tuple[Line, ...] = ()
    content: bytes = field(default=b"", repr=False)

    @property
    def ledger(self) -> tuple[LedgerEntry, ...]:
        """The entries that count: all that were not taken back."""
        return tuple(line.entry for line in self.releases if not line.cancelled)

    @property
    def noise_multipliers(self) -> list[float]:
        """Of the entries that count."""
        return [entry.noise_multiplier or 0.0 for entry in self.ledger]

    @property
    def mu(self) -> float:
        """Of all together."""
        return accounting.mu(self.noise_multipliers) if self.ledger else 0.0

    @property
    def spent(self) -> dict[str, float]:
        """``epsilon`` at the file's delta, and ``mu``, of all together."""
        epsilon = ledger_epsilon(self.ledger, self.terms.delta, self.terms.neighboring_relation)
        return {"epsilon": epsilon, "mu": self.mu}

    @property
    def left(self) -> dict[str, float]:
        """``epsilon`` and ``mu`` of the largest single release that still fits, rounded down by a billionth.

        Both are 0 where less than a ten-thousandth of the cap is left. As mu adds up in squares, what is left is not
        the cap less what was spent.
        """
        terms, spent = self.terms, self.mu
        cap = terms.cap_mu
        if terms.cap_epsilon is not None:
            cap = 1 / accounting.noise_multiplier(terms.cap_epsilon, terms.delta)
        assert cap is not None
        rest = math.sqrt(max(0.0, (cap - spent) * (cap + spent))) * (1 - 1e-9)
        if rest <= 1e-4 * cap or not terms.allows([*self.noise_multipliers, 1 / rest]):
            return {"epsilon": 0.0, "mu": 0.0}
        return {"epsilon": accounting.epsilon(1 / rest, terms.delta) * (1 - 1e-9), "mu": rest}

    def to_plain(self) -> dict[str, Any]:
        """Everything, for JSON."""
        releases = [
            {"line": line.number, "time": line.time, "cancelled": line.cancelled, **plain(line.entry)}
            for line in self.releases
        ]
        return {**plain(self.terms), "releases": releases, "spent": plain(self.spent), "left": plain(self.left)}

    def __str__(self) -> str:
        terms, spent, left = self.terms, self.spent, self.left
        told = [f"cap: {terms.cap} at delta {terms.delta:g}, {terms.neighboring_relation}"]
        for line in self.releases:
            entry, note = line.entry, "  (taken back: no noise was drawn)" if line.cancelled else ""
            cost = f"epsilon {_up(entry.epsilon)}  mu {_up(entry.mu or 0)}"
            told.append(f"{line.time}  {cost}  {entry.description}{note}")
        told.append(f"spent, together: epsilon {_up(spent['epsilon'])}, mu {_up(spent['mu'])}")
        return "\n".join([*told, f"left: {_left(left)}"])


class Reservation:
    """A release that stands in a budget file: taken back by `cancel`, until `commit` says that noise may be drawn."""

    def __init__(self, path: Path, number: int):
        self.path, self.number, self.open = path, number, True

    def commit(self) -> None:
        """From here on noise may be drawn: the entry stays, whatever happens."""
        self.open = False

    def cancel(self) -> None:
        """Take the entry back; nothing if it was committed to or is taken back already.

        A file that cannot be written or was damaged meanwhile keeps the entry: an InputError.
        """
        if self.open:
            with _locked(self.path):
                _append(self.path, _read(self.path).content, {"cancels": self.number})
            self.open = False


def read_budget(path: str | Path) -> Budget:
    """A budget file, checked from its first line to its last.

    Raises
    ------
    InputError
        if there is none, or it is damaged, cut short or edited; the message says how to recover.
    """
    path = Path(path)
    if not os.path.lexists(path) and not os.path.lexists(_copy(path)):
        raise InputError(f"no budget file {str(path)!r}; hyperdp release --budget makes one")
    for _ in range(4):  # somebody may be writing
        try:
            return _read(path)
        except InputError:
            time.sleep(0.02)
    return _read(path)


def reserve(
    path: str | Path,
    description: str,
    noise_multiplier: float,
    *,
    delta: float = 1e-5,
    neighboring_relation: str = "add_or_remove_one",
    cap_epsilon: float | None = None,
    cap_mu: float | None = None,
    write: bool = True,
) -> Reservation:
    """Enter a Gaussian release in a budget file, on disk when this returns; the file is made if there is none.

    Parameters
    ----------
    path
        The file, beside the data. Its folder must exist.
    description
        What is released, in one line.
    noise_multiplier
        Of the release: standard deviation of the noise over the sensitivity, above 0.
    delta, neighboring_relation
        Of the release. A new file takes them for its own.
    cap_epsilon, cap_mu
        One of them for a new file, which keeps it. For an existing one neither, or the same again.
    write
        False: only check that it would be entered.

    Raises
    ------
    InputError
        if it would exceed the cap, a cap contradicts the file's, or the file cannot be used. Nothing is entered.

    Examples
    --------
    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "budget.jsonl"
    >>> made = reserve(file, "a first release", noise_multiplier=3.0, cap_mu=0.5)
    >>> made.commit()
    >>> {name: round(value, 3) for name, value in read_budget(file).left.items()}
    {'epsilon': 1.438, 'mu': 0.373}
    """
    path = Path(path)
    if not 0 < noise_multiplier < math.inf:
        raise InputError("a release without noise fits no budget; drop --budget")
    _check_cap(path, cap_epsilon, cap_mu)
    try:
        charge = gaussian_charge(" ".join(description.split()), noise_multiplier, delta, neighboring_relation)
    except ValueError as error:
        raise InputError(str(error)) from error
    # what is wrong is said before a lock file is made; under the lock it is asked again
    _check(path, charge, cap_epsilon, cap_mu, read_budget(path) if _exists(path) else None)
    if not write:
        return Reservation(path, 0)
    with _locked(path):
        budget = _check(path, charge, cap_epsilon, cap_mu, _read(path) if _exists(path) else None)
        if not budget.content:
            budget = Budget(budget.terms, (), _line(b"", {"terms": plain(budget.terms)}))
        number = budget.content.count(b"\n")
        _append(path, budget.content, {"charge": plain(charge)})
    return Reservation(path, number)


def _check_cap(path: Path, cap_epsilon: float | None, cap_mu: float | None) -> None:
    if cap_epsilon is not None and cap_mu is not None:
        raise InputError("--cap-epsilon and --cap-mu cap the same thing; give one of them")
    folder = path.absolute().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise InputError(f"cannot write the budget in folder {str(folder)!r}; create it or choose another place")


def _check(
    path: Path, charge: LedgerEntry, cap_epsilon: float | None, cap_mu: float | None, budget: Budget | None
) -> Budget:
    """The budget, or a new one, that the charge fits in; InputError if it does not."""
    given = cap_epsilon is not None or cap_mu is not None
    if budget is None:
        if not given:
            raise InputError(f"there is no budget file {str(path)!r} yet; give --cap-epsilon or --cap-mu to make it")
        try:
            budget = Budget(Terms(_number(cap_epsilon), _number(cap_mu), charge.delta, charge.neighboring_relation))
        except ValueError as error:
            raise InputError(f"{error}; change --cap-epsilon or --cap-mu") from error
    terms = budget.terms
    if given and (cap_epsilon, cap_mu) != (terms.cap_epsilon, terms.cap_mu):
        spent = budget.spent
        below = (cap_epsilon or math.inf) < spent["epsilon"] or (cap_mu or math.inf) < spent["mu"]
        why = f"epsilon {_up(spent['epsilon'])}, mu {_up(spent['mu'])} are spent already; " if below else ""
        raise InputError(f"{why}the cap of {str(path)!r} was fixed at {terms.cap} when it was made; give none, or that")
    if charge.neighboring_relation != terms.neighboring_relation:
        raise InputError(
            f"the budget {str(path)!r} is for {terms.neighboring_relation}, and costs under different relations do not "
            f"add up; release with --neighboring-relation {terms.neighboring_relation}"
        )
    if not terms.allows([*budget.noise_multipliers, charge.noise_multiplier or 0.0]):
        raise InputError(
            f"the budget {str(path)!r} has a cap of {terms.cap}, which this release (epsilon {_up(charge.epsilon)}, "
            f"mu {_up(charge.mu or 0)}) would exceed; left is {_left(budget.left)}"
        )
    return budget


# ---- the file ----------------------------------------------------------------------------------------------


def _copy(path: Path) -> Path:
    return path.with_name(f"{path.name}.copy")


def _exists(path: Path) -> bool:
    return os.path.lexists(path) or os.path.lexists(_copy(path))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    lock = FileLock(f"{path}.lock")
    try:
        lock.acquire(timeout=_PATIENCE, poll_interval=0.005)
    except (OSError, NotImplementedError, Timeout) as error:
        why = "another process holds it" if isinstance(error, Timeout) else "the file system refuses"
        raise InputError(f"cannot lock the budget {str(path)!r}: {why}; nothing was spent; try again") from error
    try:
        yield
    finally:
        lock.release()


def _line(before: bytes, what: dict[str, Any]) -> bytes:
    """The line that goes after what is ``before``."""
    lines = before.splitlines()
    values = {
        "line": len(lines),
        "time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "previous": json.loads(lines[-1])["sha256"] if lines else "",
        **what,
    }
    return (_text(values | {"sha256": _sha256(values)}) + "\n").encode()


def _text(values: dict[str, Any]) -> str:
    return json.dumps(values, sort_keys=True, allow_nan=False)


def _sha256(values: dict[str, Any]) -> str:
    return hashlib.sha256(_text(values).encode()).hexdigest()


def _append(path: Path, content: bytes, what: dict[str, Any]) -> None:
    """One more line, on disk when this returns. First the file, then its copy; a new file appears whole."""
    added = _line(content, what)
    try:
        if not os.path.lexists(path):
            write_atomic(path, content + added)
        else:
            _write_after(path, content, added)
        if not os.path.lexists(_copy(path)):
            write_atomic(_copy(path), content + added)
        else:
            held = read_regular(_copy(path), _MOST_BYTES)
            _write_after(_copy(path), held, (content + added)[len(held) :])
        _sync_folder(path.absolute().parent)
    except OSError as error:
        why = error.strerror or error
        raise InputError(f"cannot write the budget {str(path)!r} ({why}); nothing is released") from error


def _write_after(path: Path, content: bytes, added: bytes) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_APPEND)
    try:
        written = 0
        while written < len(added):
            written += os.write(handle, added[written:])
        os.fsync(handle)
    except OSError:
        os.ftruncate(handle, len(content))  # half a line on a full disk is nobody's entry
        raise
    finally:
        os.close(handle)


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _read(path: Path) -> Budget:
    copy = _copy(path)
    kept = {}
    for one in (copy, path):  # written in the other order, so the copy is never ahead
        try:
            kept[one] = read_regular(one, _MOST_BYTES)
        except FileNotFoundError:
            kept[one] = b""
        except OSError as error:
            why = error.strerror or error.args[0]
            raise InputError(f"the budget file {str(one)!r} cannot be read ({why}); put it right") from error
    content, second = kept[path], kept[copy]
    budget, problem = _decode(content)
    if problem is None and content.startswith(second) and second:
        return budget  # the copy may be a line behind, after an interruption
    other, second_problem = _decode(second)
    if second_problem is not None:
        if problem is None:
            advice = f"if {str(path)!r} holds every release, copy it over {str(copy)!r}"
        else:
            advice = "restore both from a backup, or count all releases as spent and begin another file"
        problem = f"its copy {second_problem}" if problem is None else problem
    elif problem is None and not second.startswith(content):
        problem = "and its copy contradict each other"
        advice = f"keep of {str(path)!r} and {str(copy)!r} the one that holds every release, and copy it over the other"
    else:
        problem = problem or f"was cut short: {len(other.releases) - len(budget.releases)} releases are missing"
        advice = f"copy {str(copy)!r}, which is whole, over it"
    raise InputError(f"the budget file {str(path)!r} {problem}; {advice}; nothing was spent")


def _decode(content: bytes) -> tuple[Budget, str | None]:
    """The budget in a file, as far as it can be read, and what is wrong with it."""
    budget = Budget(Terms(1.0, None))
    releases: list[Line] = []
    if not content:
        return budget, "is missing or empty"
    if not content.endswith(b"\n"):
        return budget, "ends in the middle of a line"
    previous = ""
    for number, raw in enumerate(content.split(b"\n")[:-1]):
        where = f"was changed in line {number + 1}"
        try:
            before, record, stated = _record(raw)
            if before != (number, previous) or isinstance(record, Terms) != (number == 0):
                return budget, where
            if isinstance(record, Terms):
                budget = Budget(record)
            elif isinstance(record, Line):
                releases.append(record)
            else:
                (place,) = [i for i, line in enumerate(releases) if line.number == record]
                releases[place] = replace(releases[place], cancelled=True)
        except (ValueError, KeyError, TypeError, AttributeError):
            return budget, where
        previous = stated
    return Budget(budget.terms, tuple(releases), content), None


@functools.lru_cache(2**14)
def _record(raw: bytes) -> tuple[tuple[int, str], Terms | Line | int, str]:
    """Of one line: its number and the hash before it, what it says (or the number of a line taken back), its hash."""
    values = loads(raw.decode())
    stated = values.pop("sha256")
    if stated != _sha256(values):
        raise ValueError("its hash does not match")
    before = values["line"], values["previous"]
    if "terms" in values:
        return before, decode(values["terms"], Terms), stated
    if "charge" in values:
        return before, Line(values["line"], str(values["time"]), decode(values["charge"], LedgerEntry)), stated
    return before, int(values["cancels"]), stated


def _number(value: float | None) -> float | None:
    return None if value is None else float(value)


def _up(value: float) -> str:
    return rounded_up(value, 4) if math.isfinite(value) else "infinity"


def _left(left: dict[str, float]) -> str:
    """Rounded down, so that it fits."""
    if not left["mu"]:
        return "nothing"
    down = Context(prec=3, rounding=ROUND_FLOOR)
    return ", ".join(f"{name} {float(down.create_decimal(repr(value))):g}" for name, value in left.items())
