"""The sweep: the right cells under the names that compare writes, on every profile; a kill loses what was running."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from packaging.requirements import Requirement

from hyperdp_lib import cli, records
from hyperdp_lib.data import ImageSet, InputError, save_npz
from hyperdp_lib.experiments import comparison, sweep
from hyperdp_lib.experiments.methods import METHODS

ROOT = Path(__file__).resolve().parent.parent
CONFIG = yaml.safe_load((ROOT / "workflow" / "config.yaml").read_text(encoding="utf-8"))
PROFILES = sorted(path.parent.name for path in (ROOT / "workflow" / "profiles").glob("*/config.yaml"))
CORES = 2


# ---- which cells -----------------------------------------------------------------------------------------


def names(**changes):
    return [cell.record for cell in sweep.cells({**CONFIG, **changes})]


def test_the_default_is_the_whole_grid():
    assert CONFIG["epsilons"] == [0.5, 1, 2, 4, 8, 16, "inf"] and CONFIG["methods"] == ["all"]
    assert CONFIG["sizes"] == [32, 128, 512, 2048, 8192, "all"] and CONFIG["seeds"] == [0, 1, 2]
    available = [method for method in METHODS.values() if method.available()]
    for_a_seed = sum(6 * method.private + len(method.also) for method in available)
    assert len(set(names())) == len(names()) == for_a_seed * 4 * 3  # 2048 and 8192 are more than there are


def test_every_method_runs_at_its_own_budgets():
    asked = dict(methods=["dp_deepsets", "dp_lora", "public_only", "real"], sizes=["all"], seeds=[2])
    cells = [name.removeprefix("glyphs-digits-no-lookalikes_") for name in names(epsilons=[0.5, "inf"], **asked)]
    assert cells == [
        f"{cell}_n1437_seed2.json"
        for cell in ("dp_deepsets_eps0.5", "dp_deepsets_epsinf", "dp_lora_eps0.5", "public_only_eps0", "real_epsinf")
    ]
    assert [name for name in names(epsilons=[0.5], **asked) if "epsinf" in name] == []


def test_a_pair_has_axes_of_its_own_and_images_without_labels_fewer_methods(tmp_path):
    save_npz(tmp_path / "mine.npz", ImageSet(torch.zeros(50, 1, 16, 16)))
    mine = {"name": "mine", "private": tmp_path / "mine.npz", "weights": "glyphs", "sizes": [32, "all", 40, 41]}
    cells = sweep.cells({**CONFIG, "pairs": [*CONFIG["pairs"], mine]})
    own = [cell for cell in cells if cell.record.startswith("mine_")]
    assert set(re.findall(r"_n(\d+)_", " ".join(cell.record for cell in own))) == {"32", "40"}  # a fifth is held out
    assert {cell.method for cell in cells} - {cell.method for cell in own} == {"noisy_class_means"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pairs": CONFIG["pairs"] * 2}, "name of its own"),
        ({"pairs": [{"name": "mine"}]}, "lacks 'private'"),
        ({"epsilons": ["much"]}, "'epsilons' of the sweep"),
        ({"epsilons": [-1]}, "must be positive"),
        ({"sizes": [0]}, "at least 1"),
        ({"methods": ["magic"]}, "unknown method"),
    ],
)
def test_a_bad_configuration_is_one_helpful_line(changes, message, capsys):
    with pytest.raises(InputError, match=message):
        sweep.cells({**CONFIG, **changes})
    assert sweep.main([json.dumps({**CONFIG, **changes})]) == 2 and "sweep: " in capsys.readouterr().err


def test_compare_writes_the_records_that_the_sweep_expects(tmp_path, capsys):
    asked = {**CONFIG, "methods": ["noisy_class_means", "real"], "epsilons": [1, "inf"], "sizes": [32], "seeds": [0]}
    cells = sweep.cells(asked)
    for cell in cells:
        before = set(os.listdir(tmp_path))
        assert cli.main(["compare", *cell.arguments, "--out", str(tmp_path)]) == 0
        assert {name for name in set(os.listdir(tmp_path)) - before if name.endswith(".json")} == {cell.record}
    assert sweep.summary(cells, tmp_path).endswith("done: 3 of 3 cells")
    (record,) = (r for r in records.read_records(tmp_path) if r.epsilon == 1)
    assert (record.num_private, record.seed, record.method) == (32, 0, "noisy_class_means")
    # one command for all would find every one of them done
    kept = {path: path.read_bytes() for path in tmp_path.iterdir()}
    whole = "compare --private digits --methods noisy_class_means real --epsilon 1 --num-private 32 --seeds 1 --out"
    assert cli.main([*whole.split(), str(tmp_path)]) == 0
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == kept
    assert capsys.readouterr().out.splitlines()[-1].startswith("3 records in ")


def test_a_record_is_the_last_that_a_cell_writes(tmp_path, monkeypatch):
    def stopped(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(comparison.data, "save_grid", stopped)
    (cell,) = sweep.cells({**CONFIG, "methods": ["real"], "epsilons": ["inf"], "sizes": [32], "seeds": [0]})
    assert cli.main(["compare", *cell.arguments, "--out", str(tmp_path)]) == 130
    assert list(tmp_path.glob("*.json")) == []


def test_the_environment_of_the_sweep_is_locked():
    lines = (ROOT / "workflow" / "requirements.lock").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for requirement in map(Requirement, project["optional-dependencies"]["sweep"]):
        assert requirement.specifier.contains(pins[requirement.name])
    assert not {"torch", "hyperdp"} & pins.keys()


# ---- Snakemake -------------------------------------------------------------------------------------------

# Stands for the project's Python. It plans like it; a cell is a record of nothing, whose writing takes a while.
STAND_IN = f"""#!{sys.executable}
import os, sys, time
if "compare" not in sys.argv:
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
from hyperdp_lib.cli import _parser
from hyperdp_lib.records import Record
asked = _parser().parse_args(sys.argv[3:])
budget = asked.epsilon[0], asked.delta, asked.neighboring_relation
record = Record(asked.pair, asked.methods[0], *budget, asked.num_private, asked.seed)
with open("started.txt", "a") as log:
    print(record.name(), file=log)
os.fsync = lambda handle: time.sleep(0.3)
if not (asked.out / record.name()).exists():
    record.save(asked.out)
"""


@pytest.fixture
def snakemake(tmp_path):
    """Arguments of a process that runs Snakemake on a copy of the workflow."""
    beside = ROOT / ".venv-sweep" / "bin" / "snakemake"
    found = shutil.which(os.environ.get("HYPERDP_SNAKEMAKE") or (beside if beside.is_file() else "snakemake"))
    if found is None:
        pytest.skip("no snakemake: `make test` installs it in .venv-sweep; or set HYPERDP_SNAKEMAKE to the program")
    shutil.copytree(ROOT / "workflow", tmp_path / "workflow")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def arguments(profile, *options, python=sys.executable, **changes):
        config = [f"{key}={json.dumps(value)}" for key, value in {**changes, "python": python}.items()]
        given = [found, *options, "--profile", f"workflow/profiles/{profile}", "--config", *config]
        return dict(args=given, cwd=tmp_path, env=environment, text=True)

    return arguments


@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_dry_runs_with_every_cell(snakemake, profile):
    done = subprocess.run(**snakemake(profile, "--dry-run", "--quiet", "rules"), capture_output=True)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^cell +(\d+)$", done.stdout + done.stderr, flags=re.M)[0] == str(len(sweep.cells(CONFIG)))


def test_profiles_agree_on_what_keeps_records():
    profiles = [yaml.safe_load((ROOT / "workflow" / "profiles" / p / "config.yaml").read_text()) for p in PROFILES]
    assert PROFILES == ["kubernetes", "laptop", "slurm"]
    for profile in profiles:
        assert profile["ignore-incomplete"] and profile["keep-incomplete"] and profile["nolock"]
        assert profile["rerun-triggers"] == ["mtime"]


def test_a_kill_loses_only_the_cells_that_were_running(snakemake, tmp_path):
    stand_in = tmp_path / "python"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    asked = dict(methods=["noisy_class_means"], epsilons=[1, 2, 4], sizes=[32, 64], seeds=[0, 1], out="records")
    expected = set(names(**asked))
    started, out = tmp_path / "started.txt", tmp_path / "records"
    given = snakemake("laptop", "--cores", str(CORES), python=str(stand_in), **asked)
    sweep_log = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}

    def complete():
        return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.glob("*.json")}

    kept: dict[str, tuple[int, bytes]] = {}
    for kills in (1, 2):
        with open(tmp_path / "log.txt", "w") as log:
            killed = subprocess.Popen(**given, stdout=log, stderr=log, start_new_session=True)
        try:
            deadline = time.monotonic() + 120
            while len(complete()) < len(kept) + 2:
                assert killed.poll() is None and time.monotonic() < deadline, (tmp_path / "log.txt").read_text()
                time.sleep(0.02)
            time.sleep(random.uniform(0, 1.5))
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(killed.pid, signal.SIGKILL)  # Snakemake and every cell with it
            killed.wait()
        time.sleep(0.5)
        now = complete()
        assert {name: now.get(name) for name in kept} == kept  # none thrown away, none written again
        assert kept.keys() < now.keys() < expected
        # whatever a kill leaves half-written is no record
        assert {record.name() for record in records.read_records(out)} == now.keys()
        begun = Counter(started.read_text().split())
        assert len(begun.keys() - now.keys()) <= CORES and max(begun.values()) <= kills
        kept = now

    done = subprocess.run(**given, **sweep_log)  # nothing to unlock or to clean up first
    assert done.returncode == 0, done.stdout
    assert complete().keys() == expected and {name: complete()[name] for name in kept} == kept
    begun = Counter(started.read_text().split())
    assert begun.keys() == expected and begun.total() <= len(expected) + 2 * CORES
    summary = snakemake("laptop", "summary", python=str(stand_in), **asked)
    assert "done: 12 of 12 cells" in subprocess.run(**summary, **sweep_log).stdout


def test_not_even_a_forced_run_deletes_a_record(snakemake, tmp_path):
    stand_in = tmp_path / "python"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    asked = dict(methods=["real"], epsilons=["inf"], sizes=[32], seeds=[0], out="records")
    (name,) = names(**asked)
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / name).write_text("kept")
    given = snakemake("laptop", "--forceall", "--cores", "1", python=str(stand_in), **asked)
    done = subprocess.run(**given, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "started.txt").read_text().split() == [name]
    assert (tmp_path / "records" / name).read_text() == "kept"
