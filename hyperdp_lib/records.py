"""Result records: one for each cell of a comparison, with its provenance.

The book reads records and nothing else, so a record says what was run, on what, and from which commit. It never names
a machine, a user or a folder outside the working directory.

Records have two forms, and whoever reads them here reads both. While a comparison runs, each cell is a JSON file,
written whole and last. Published, each pair of public and private data is one file of lines, ``PAIR.jsonl``, sorted so
that a new seed is a new line. Equal provenance is kept once, in ``provenance.json``; a line names its id.
``python -m hyperdp_lib.records runs/mine book/results`` merges the first form into the second.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import json
import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hyperdp_lib import artefacts
from hyperdp_lib.data import InputError

if TYPE_CHECKING:  # importing pandas costs a second, and writing a record does not need it
    import pandas as pd

PROVENANCE_FILE, TRIALS_FILE = "provenance.json", "tuning.jsonl"
# sheets of samples that are published: those that a page shows at its own parameters
SHEETS = {
    "README.md": (
        "glyphs-digits-no-lookalikes_real_epsinf_n1437_seed0.png",
        "glyphs-digits-no-lookalikes_hyperdp_eps1_n1437_seed0.png",
        "glyphs-digits-no-lookalikes_dp_lora_eps1_n1437_seed0.png",
    ),
    "notebooks/05_private_lora_diffusion.ipynb": (
        "glyphs-digits-no-lookalikes_dp_deepsets_eps1_n1437_seed0.png",
        "glyphs-digits-no-lookalikes_dp_lora_eps1_n1437_seed0.png",
        "glyphs-digits-no-lookalikes_nearest_public_eps1_n1437_seed0.png",
        "glyphs-digits-no-lookalikes_lora_non_private_epsinf_n1437_seed0.png",
        "glyphs-digits-no-lookalikes_real_epsinf_n1437_seed0.png",
        "glyphs-digits-no-lookalikes_public_only_eps0_n1437_seed0.png",
    ),
    "notebooks/08_reproduced_vs_reported.ipynb": (
        "drawings-fashion-mnist-T-shirt_dp_deepsets_eps1_n128_seed0.png",
        "drawings-fashion-mnist-T-shirt_dp_lora_eps1_n128_seed0.png",
        "drawings-mnist-3_dp_deepsets_eps1_n128_seed0.png",
        "drawings-mnist-3_dp_lora_eps1_n128_seed0.png",
        "drawings-mnist-all_dp_deepsets_eps1_n128_seed0.png",
        "drawings-mnist-all_dp_lora_eps1_n128_seed0.png",
        "glyphs-digits-3-no-lookalikes_dp_deepsets_eps1_n128_seed0.png",
        "glyphs-digits-3-no-lookalikes_dp_lora_eps1_n128_seed0.png",
        "glyphs-digits-all-no-lookalikes_dp_deepsets_eps1_n128_seed0.png",
        "glyphs-digits-all-no-lookalikes_dp_lora_eps1_n128_seed0.png",
        "glyphs-fashion-mnist-T-shirt-no-lookalikes_dp_deepsets_eps1_n128_seed0.png",
        "glyphs-fashion-mnist-T-shirt-no-lookalikes_dp_lora_eps1_n128_seed0.png",
        "photographs-cifar10-jpeg-all_dp_deepsets_eps1_n128_seed0.png",
        "photographs-cifar10-jpeg-all_dp_lora_eps1_n128_seed0.png",
        "photographs-cifar10-jpeg-horse_dp_deepsets_eps1_n128_seed0.png",
        "photographs-cifar10-jpeg-horse_dp_lora_eps1_n128_seed0.png",
    ),
}  # fmt: skip
_CELL = ("pair", "method", "epsilon", "num_private")
_TRIAL = "*_candidate*_set*.json"  # of the search for settings, while it runs
# of the repository: what a record's numbers come from
_CODE = ("hyperdp_lib", "benchmarks", "data_scripts")


@dataclass(frozen=True)
class Record:
    """One method, at one budget, with one seed.

    Attributes
    ----------
    pair : str
        Public and private data, e.g. ``"glyphs-digits"``; a variant is a suffix.
    method : str
        E.g. ``"dp_deepsets"`` or ``"dp_lora"``.
    epsilon : float or None
        ``None`` means no noise (written for infinity), 0 a control that sees no private data.
    delta : float or None
    neighboring_relation : str
    num_private : int
        Private training images used.
    seed : int
    scores : mapping
        What `evaluation.evaluate` returns; research metrics, not DP.
    seconds : mapping
        Wall-clock seconds: ``release`` or ``train``, and ``sample``.
    trained_parameters, noise_dimension, num_releases : int
        Parameters fitted to private data; coordinates noised at a time; how many times noise was added.
    settings : mapping
        Everything else that was chosen (rank, steps, …).
    provenance : mapping
        From `provenance`.

    Examples
    --------
    >>> record = Record("glyphs-digits", "dp_lora", float("inf"), 1e-5, "add_or_remove_one", 100, 0)
    >>> record.epsilon is None
    True
    >>> Record.from_json(record.to_json()) == record
    True
    """

    pair: str
    method: str
    epsilon: float | None
    delta: float | None
    neighboring_relation: str
    num_private: int
    seed: int
    scores: Mapping[str, Any] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    trained_parameters: int = 0
    noise_dimension: int = 0
    num_releases: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.epsilon is not None and math.isinf(self.epsilon):
            object.__setattr__(self, "epsilon", None)
        if self.epsilon is not None and not self.epsilon >= 0:
            raise InputError(f"epsilon of a record must be >= 0, or None for no noise, got {self.epsilon}.")

    def to_json(self) -> str:
        """JSON text; a score that is not finite is an error, not a ``NaN`` other programs cannot read."""
        try:
            return json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False, ensure_ascii=False) + "\n"
        except ValueError as error:
            raise InputError(
                f"record {self.name()} has a NaN or infinite number: check its scores."
            ) from error

    @classmethod
    def from_json(cls, text: str) -> Record:
        """Inverse of `to_json`; unknown or missing fields are an `InputError`."""
        try:
            return cls(**json.loads(text))
        except (TypeError, ValueError) as error:
            raise InputError(f"this is not a result record ({error}): delete it and run again.") from error

    def name(self) -> str:
        """File name of this cell, without folder: the same cell always gets the same name."""
        return f"{cell_name(self.pair, self.method, self.epsilon, self.num_private, self.seed)}.json"

    def save(self, folder: str | Path) -> Path:
        """Write ``folder/name()`` in one step: an interruption leaves the whole file or none."""
        path = Path(folder) / self.name()
        write_atomically(path, self.to_json())
        return path


def cell_name(pair: str, method: str, epsilon: float | None, num_private: int, seed: int) -> str:
    """Name of a cell of the grid, e.g. ``glyphs-digits_dp_lora_eps1_n1437_seed0``.

    >>> cell_name("glyphs-digits", "dp_lora", None, 1437, 0)
    'glyphs-digits_dp_lora_epsinf_n1437_seed0'
    """
    budget = "inf" if epsilon is None or math.isinf(epsilon) else f"{epsilon:.12g}"
    return f"{pair}_{method}_eps{budget}_n{num_private}_seed{seed}"


def write_atomically(path: str | Path, text: str) -> None:
    """Write a text file through a temporary neighbour and a rename, creating the folder.

    A record that names no commit, or one with changes, is an `InputError` in a folder of the repository: see
    `require_commit`.
    """
    path = Path(path)
    if re.search(r'"commit": "(unknown|[^"]*-dirty)"', text):
        _refuse_in_repository(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    artefacts.write_atomic(path, text.encode())


def read_records(folder: str | Path) -> Iterator[Record]:
    """All records below a folder, in either form, sorted by path; other JSON files (audits, forecasts) are skipped."""
    if not Path(folder).is_dir():
        raise InputError(f"no folder {folder}: make records with `hyperdp compare` first.")
    for path in sorted(Path(folder).rglob("*.json*")):
        if path.suffix == ".jsonl":
            yield from (Record.from_json(json.dumps(line)) for line in _read_lines(path) if "pair" in line)
        elif path.suffix == ".json":
            content = _parse(path.read_text(encoding="utf-8"), path)
            if isinstance(content, dict) and {"pair", "method", "scores", "settings"} <= content.keys():
                yield Record.from_json(json.dumps(content))


def read_trials(folder: str | Path) -> Iterator[dict[str, Any]]:
    """Every trial of the search for settings below a folder, in either form, with its name as ``trial``.

    A name says method, budget, candidate and rehearsal: ``dp_mepf_eps1_candidate0_set1``.
    """
    for path in sorted(Path(folder).rglob("*.json*")):
        if path.name == TRIALS_FILE:
            yield from _read_lines(path)
        elif path.match(_TRIAL):
            yield {"trial": path.stem, **_parse(path.read_text(encoding="utf-8"), path)}


def publish(folder: str | Path, results: str | Path) -> list[Path]:
    """The files written: records, trials and shown sheets (`SHEETS`) below a folder, merged into the published form.

    Parameters
    ----------
    folder : path
        Records as `hyperdp compare` or a sweep wrote them, trials as `experiments.tuning` did. It is left as it is.
    results : path
        Published records; made if it is not there. A cell that is published already is replaced.

    Raises
    ------
    InputError
        If there is nothing to publish, or a record names no commit and the folder is one of the repository.
    """
    results = Path(results)
    records, trials = list(read_records(folder)), list(read_trials(folder))
    if not records and not trials:
        raise InputError(f"no record and no trial in {folder}: make some with `hyperdp compare` first.")
    shared = _read_provenance(results)
    files: dict[str, str] = {}
    by_pair: dict[str, list[Record]] = {}
    for record in records:
        by_pair.setdefault(record.pair, []).append(record)
    for pair, new in sorted(by_pair.items()):
        path = results / f"{pair}.jsonl"
        old = [Record.from_json(json.dumps(line)) for line in _read_lines(path)] if path.is_file() else []
        cells = {record.name(): record for record in (*old, *new)}
        ordered = sorted(cells.values(), key=_place)
        files[path.name] = "".join(_line(dataclasses.asdict(record), shared) for record in ordered)
    if trials:
        path = results / TRIALS_FILE
        named = {trial["trial"]: trial for trial in (*(_read_lines(path) if path.is_file() else ()), *trials)}
        files[path.name] = "".join(_line(named[name], shared) for name in sorted(named))
    told = ",\n".join(f' "{key}": {json.dumps(shared[key], ensure_ascii=False)}' for key in sorted(shared))
    files = {PROVENANCE_FILE: f"{{\n{told}\n}}\n", **files}  # first: it is refused where a commit is missing
    for name, text in files.items():
        write_atomically(results / name, text)
    shown = {name for names in SHEETS.values() for name in names}
    sheets = [path for path in sorted(Path(folder).rglob("*.png")) if path.name in shown]
    for path in sheets:
        artefacts.write_atomic(results / path.name, path.read_bytes())
    return [results / name for name in (*files, *(path.name for path in sheets))]


def _place(record: Record) -> tuple[str, float, int, int]:
    """Where a record stands among the lines of its pair."""
    budget = math.inf if record.epsilon is None else record.epsilon
    return record.method, budget, record.num_private, record.seed


def _line(content: Mapping[str, Any], shared: dict[str, Any]) -> str:
    """One published line; what its provenance has in common with others goes to ``shared``, by id."""
    own = dict(content.get("provenance", {}))
    started = {"started": own.pop("started")} if "started" in own else {}
    text = json.dumps(own, sort_keys=True, ensure_ascii=False)
    key = hashlib.sha256(text.encode()).hexdigest()[:12]
    shared[key] = own
    line = {**content, "provenance": {"id": key, **started}}
    return json.dumps(line, allow_nan=False, ensure_ascii=False) + "\n"


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a published file, each with its whole provenance."""
    shared = _read_provenance(path.parent)
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        line = _parse(text, f"line {number} of {path}")
        try:
            key = line["provenance"].pop("id")
            line["provenance"] = {**shared[key], **line["provenance"]}
        except (KeyError, TypeError, AttributeError) as error:
            where = f"line {number} of {path}"
            raise InputError(f"{where} has no provenance in {PROVENANCE_FILE}: publish it again.") from error
        yield line


def _read_provenance(folder: Path) -> dict[str, Any]:
    path = folder / PROVENANCE_FILE
    return _parse(path.read_text(encoding="utf-8"), path) if path.is_file() else {}


def _parse(text: str, where: str | Path) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise InputError(f"{where} is not JSON ({error}): delete it and run its command again.") from error


def load_records(folder: str | Path) -> pd.DataFrame:
    """All records below a folder as a table, one row each.

    Nested entries become columns ``scores.accuracy``, ``seconds.train``, …  No noise is ``epsilon = inf``
    here, so that the column sorts.
    """
    import pandas as pd

    rows = []
    for record in read_records(folder):
        row = dataclasses.asdict(record)
        row["epsilon"] = math.inf if record.epsilon is None else float(record.epsilon)
        rows.append(row)
    if not rows:
        names = [f.name for f in dataclasses.fields(Record)]
        return pd.DataFrame(columns=names)
    return pd.json_normalize(rows)


def together(*tables: pd.DataFrame) -> pd.DataFrame:
    """The rows of several tables of `load_records`; a cell with the same seed, delta and relation counts once.

    The first table that has it wins, so records made for the occasion never stand beside those of the book.
    """
    import pandas as pd

    rows = pd.concat([table for table in tables if len(table)] or list(tables[:1]), ignore_index=True)
    return rows.drop_duplicates([*_CELL, "seed", "delta", "neighboring_relation"], ignore_index=True)


def mean_and_spread(table: pd.DataFrame, score: str = "scores.accuracy") -> pd.DataFrame:
    """Mean, sample standard deviation over seeds and number of seeds of one column of `load_records`.

    One row for each pair, method, epsilon and size; the deviation of a single seed is NaN, never 0.
    """
    if score not in table.columns:
        raise InputError(f"no column {score!r}: choose one of {sorted(table.columns)}.")
    groups = table.dropna(subset=[score]).groupby(list(_CELL), dropna=False)[score]
    return groups.agg(["mean", "std", "count"]).rename(columns={"count": "seeds"}).reset_index()


def provenance(
    command: str | None = None, device: str | torch.device = "cpu", started: datetime | None = None
) -> dict[str, Any]:
    """Where a record comes from: command, commit, kind of device, versions, start time (UTC).

    No host or user name, no absolute path.  ``command`` defaults to this process's command line.  A commit with
    ``-dirty`` says that the code had changes; such a record cannot be written into the repository (`require_commit`).
    """
    return {
        "command": command if command is not None else _command_line(sys.argv),
        "commit": _commit(),
        "device": _device(torch.device(device)),
        "versions": {"python": platform.python_version(), **artefacts.library_versions()},
        "started": (started or datetime.now(UTC)).isoformat(timespec="seconds"),
    }


def _command_line(arguments: Sequence[str]) -> str:
    here = os.getcwd() + os.sep
    program = Path(arguments[0]) if arguments else Path("python")
    package = Path(__file__).resolve().parent
    if program.resolve().is_relative_to(package) and program.suffix == ".py":  # started as python -m
        parts = program.resolve().relative_to(package.parent).with_suffix("").parts
        shown = ["python", "-m", ".".join(part for part in parts if part != "__main__")]
    elif program.resolve().is_relative_to(package.parent) and program.suffix == ".py":  # a script of the repository
        shown = ["python", program.resolve().relative_to(package.parent).as_posix()]
    else:
        shown = [program.name]
    for argument in arguments[1:]:
        inside = argument.replace(here, "")
        shown.append(Path(inside).name if os.path.isabs(inside) else inside)
    return " ".join(shown)


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return f"{device.type} ({platform.machine()}, {len(cores)} cores, {torch.get_num_threads()} threads)"


def require_commit(out: str | Path) -> None:
    """Stop before work whose record could not say from which commit it came.

    Parameters
    ----------
    out : path
        File or folder to be written. What git does not track (``runs/``) and other folders may hold anything.

    Raises
    ------
    InputError
        If it is in a folder that the repository tracks, and the code has changes that are not committed.
    """
    if not re.fullmatch("[0-9a-f]+", _commit()):
        _refuse_in_repository(Path(out))


def _refuse_in_repository(path: Path) -> None:
    root = Path(__file__).resolve().parent.parent
    place = path.resolve()
    if place == root or not place.is_relative_to(root):
        return
    if _git("ls-files", "--", place.relative_to(root).parts[0]):
        raise InputError(
            f"{path} would be a record of code that is not committed ({_commit()}): commit the changes of "
            f"{', '.join(_CODE)} first, or write to a folder outside the repository or to runs/."
        )


@functools.cache
def _commit() -> str:
    """Commit of the code, with ``-dirty`` if files of `_CODE` differ from it; ``unknown`` outside a repository."""
    if not _git("ls-files", "--", "hyperdp_lib/records.py"):  # installed, perhaps below a repository of something else
        return "unknown"
    changed = _git("status", "--porcelain", "--", *_CODE)
    return _git("rev-parse", "--short=12", "HEAD") + ("-dirty" if changed else "")


def _git(*arguments: str) -> str:
    """What git says of the repository that this package stands in; empty if there is none."""
    folder = Path(__file__).resolve().parent.parent
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def main(arguments: Sequence[str] | None = None) -> int:
    """Publish the records of a folder."""
    parser = argparse.ArgumentParser(prog="python -m hyperdp_lib.records", description=main.__doc__)
    parser.add_argument("folder", help="records as they were run, e.g. runs/mine")
    parser.add_argument("results", nargs="?", default="book/results", help="published records; default: %(default)s")
    options = parser.parse_args(arguments)
    try:
        written = publish(options.folder, options.results)
    except InputError as error:
        print(f"records: {error}", file=sys.stderr)
        return 2
    print("\n".join(f"written: {path}" for path in written))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
