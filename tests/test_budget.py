"""Budgets across releases: never past the cap, never a release that is not in the file, whatever happens in between."""

import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hyperdp_lib
from hyperdp_lib import accounting, budget, cli
from hyperdp_lib.budget import Terms, read_budget, reserve
from hyperdp_lib.data import ImageSet
from hyperdp_lib.image_files import InputError

SPAWN = multiprocessing.get_context("spawn")


def snapshot(folder):
    """Every file with its bytes; locks hold none and do not count."""
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"}


@pytest.fixture
def file(tmp_path):
    """A budget of mu 1, of which .3 and .4 are spent and .5 was taken back."""
    path = tmp_path / "budget.jsonl"
    reserve(path, "one", 1 / 0.3, cap_mu=1.0).commit()
    reserve(path, "two", 1 / 0.5).cancel()
    reserve(path, "three", 1 / 0.4)
    return path


# ---- what fits ---------------------------------------------------------------------------------------------


def test_what_is_spent_and_what_is_left(file):
    found = read_budget(file)
    assert [(line.entry.description, line.cancelled) for line in found.releases] == [
        ("one", False), ("two", True), ("three", False),
    ]  # fmt: skip
    assert found.spent["mu"] == pytest.approx(0.5) and found.left["mu"] == pytest.approx(math.sqrt(0.75), rel=2e-6)
    assert found.spent["epsilon"] == pytest.approx(accounting.epsilon(2.0, 1e-5))
    told = str(found).splitlines()
    assert told[0] == "cap: mu 1 at delta 1e-05, add_or_remove_one" and "no noise was drawn" in told[2]
    assert told[-1].startswith("left: epsilon 3.7") and told[-1].endswith("mu 0.866")
    plain = json.loads(json.dumps(found.to_plain()))
    assert plain["cap_mu"] == 1.0 and plain["left"]["mu"] == found.left["mu"] and len(plain["releases"]) == 3
    with pytest.raises(InputError, match="which this release .* would exceed; left is epsilon 3.7.*, mu 0.866$"):
        reserve(file, "four", 1.0)
    reserve(file, "four", 1 / found.left["mu"])
    assert read_budget(file).left == {"epsilon": 0.0, "mu": 0.0} and str(read_budget(file)).endswith("left: nothing")


def test_epsilon_composes_as_the_theorem_says(tmp_path):
    """Four releases at half the mu of epsilon 2 fill it, up to rounding; four at epsilon 1/2 leave much of it."""
    multiplier = accounting.noise_multiplier(2.0, 1e-5)
    for number in range(4):
        reserve(tmp_path / "a", f"{number}", 2 * multiplier * (1 + 1e-9), cap_epsilon=2.0)
        reserve(tmp_path / "b", f"{number}", accounting.noise_multiplier(0.5, 1e-5), cap_epsilon=2.0)
    assert read_budget(tmp_path / "a").spent["epsilon"] == pytest.approx(2.0)
    assert 1 < read_budget(tmp_path / "b").spent["epsilon"] < 1.1
    with pytest.raises(InputError, match="left is nothing"):
        reserve(tmp_path / "a", "five", 100.0)
    # a release of exactly the cap fits; its own delta may be another one, the file's counts
    reserve(tmp_path / "c", "all", accounting.noise_multiplier(2.0, 1e-5), cap_epsilon=2.0)
    reserve(tmp_path / "d", "one", 50.0, delta=1e-6, cap_epsilon=2.0)
    reserve(tmp_path / "d", "two", 50.0, delta=1e-3)
    assert read_budget(tmp_path / "d").terms == Terms(2.0, None, 1e-6)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    acts=st.lists(
        st.tuples(st.sampled_from(["reserve", "reserve", "cancel", "commit"]), st.floats(0.02, 1.2)), max_size=14
    ),
    kind=st.sampled_from(["mu", "epsilon"]),
)
def test_any_interleaving_stays_within_the_cap(tmp_path_factory, acts, kind):
    """Against a model that only adds up squares."""
    path = tmp_path_factory.mktemp("budget") / "file"
    cap = 1.0 if kind == "mu" else 1 / accounting.noise_multiplier(3.0, 1e-5)
    caps = {"cap_mu": 1.0} if kind == "mu" else {"cap_epsilon": 3.0}
    pending, active = [], {}
    for act, value in acts:
        if act == "reserve":
            mu, total = value, math.hypot(value, *active.values())
            try:
                made = reserve(path, act, 1 / mu, **caps)
            except InputError:
                assert total > cap * (1 - 1e-7)
                if path.exists():
                    assert read_budget(path).left["mu"] < mu
                continue
            assert total <= cap * (1 + 1e-9)
            active[made.number] = mu
            pending.append(made)
        elif pending:
            made = pending.pop(int(value * 1e6) % len(pending))
            getattr(made, act)()
            if act == "cancel":
                del active[made.number]
            before = path.read_bytes()
            made.cancel()  # nothing is taken back twice, nor after a commitment
            assert path.read_bytes() == before
        if path.exists():
            found = read_budget(path)
            assert found.mu == pytest.approx(math.hypot(*active.values())) and found.mu <= cap * (1 + 1e-9)
            assert [line.number for line in found.releases if not line.cancelled] == list(active)
            if found.left["mu"]:
                reserve(path, "would fit", 1 / found.left["mu"], write=False)
                own = accounting.noise_multiplier(found.left["epsilon"], 1e-5)
                reserve(path, "would fit", own, write=False)
            assert path.with_name("file.copy").read_bytes() == path.read_bytes()


# ---- processes that race and die ---------------------------------------------------------------------------


def spend(path, log, attempts, multiplier, seed):
    """Reserve again and again, and write down, after each, what came of it."""
    act = random.Random(seed)
    with open(log, "a", buffering=1) as told:
        for _ in range(attempts):
            try:
                made = reserve(path, log, multiplier)
            except InputError as error:
                assert "would exceed" in str(error), error
                told.write("refused 0\n")
                continue
            told.write(f"reserved {made.number}\n")
            if act.random() < 0.5:
                made.commit()
                told.write(f"committed {made.number}\n")
            elif act.random() < 0.8:
                made.cancel()
                told.write(f"cancelled {made.number}\n")


def race(tmp_path, *, processes, attempts, fitting, killed):
    path, cap = tmp_path / "budget", 1.0
    multiplier = math.sqrt(fitting)
    reserve(path, "makes the file", multiplier, cap_mu=cap)
    logs = [tmp_path / f"{number}.log" for number in range(processes)]
    running = [
        SPAWN.Process(target=spend, args=(path, str(log), attempts, multiplier, number))
        for number, log in enumerate(logs)
    ]
    for process in running:
        process.start()
    for number in range(killed):
        until = time.monotonic() + 60
        while running[number].is_alive() and time.monotonic() < until:
            if logs[number].exists() and logs[number].read_bytes().count(b"\n") >= 5 + 4 * number:
                os.kill(running[number].pid, signal.SIGKILL)
                break
            time.sleep(0.001)
    for process in running:
        process.join()
    assert [process.exitcode for process in running] == [-signal.SIGKILL] * killed + [0] * (processes - killed)
    found = read_budget(path)
    assert found.spent["mu"] <= cap
    lines = {line.number: line for line in found.releases}
    told = [text.split() for log in logs for text in log.read_text().splitlines()]
    acts = ("reserved", "cancelled", "committed")
    done = {act: [int(number) for name, number in told if name == act] for act in acts}
    assert len(set(done["reserved"])) == len(done["reserved"]) and set(done["reserved"]) <= lines.keys()
    assert all(lines[number].cancelled for number in done["cancelled"])
    assert not any(lines[number].cancelled for number in done["committed"])
    # a killed process may have been between the file and its log, once
    assert len(lines) - 1 - len(done["reserved"]) <= killed
    assert sum(line.cancelled for line in found.releases) - len(done["cancelled"]) <= killed
    assert all(["refused", "0"] in [text.split() for text in log.read_text().splitlines()] for log in logs[killed:])
    with pytest.raises(InputError, match="would exceed"):  # they raced to the last of it
        reserve(path, "more", multiplier)


def test_processes_race_for_the_last_of_it_and_one_is_killed(tmp_path):
    race(tmp_path, processes=2, attempts=100, fitting=40, killed=1)


@pytest.mark.slow
def test_ten_thousand_racing_and_interrupted_reservations(tmp_path):
    race(tmp_path, processes=8, attempts=1250, fitting=100, killed=3)


def die(path, call, share):
    """Reserve, and be killed in one of the writes, after a share of its bytes is there."""
    write, calls = os.write, iter(range(10))

    def fatal(handle, content):
        if next(calls) == call:
            write(handle, content[: int(share * len(content))])
            os.kill(os.getpid(), signal.SIGKILL)
        return write(handle, content)

    os.write = fatal
    reserve(path, "dies", 10.0)


@pytest.mark.parametrize(("call", "share"), [(0, 0), (0, 0.5), (0, 1), (1, 0), (1, 0.5), (1, 1)])
def test_a_process_killed_while_writing_loses_nothing(file, call, share):
    """No release was made for its entry: it may stand there or not, but all others do, and the file can be used."""
    before = read_budget(file)
    process = SPAWN.Process(target=die, args=(file, call, share))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    if (call, share) == (0, 0.5):
        with pytest.raises(InputError, match="ends in the middle of a line; copy '.*copy', which is whole, over it"):
            read_budget(file)
        shutil.copy(f"{file}.copy", file)
    found = read_budget(file)
    assert found.releases[:3] == before.releases
    assert len(found.releases) == (3 if call == 0 and share < 1 else 4)
    reserve(file, "goes on", 10.0)  # and the copy catches up
    assert read_budget(file).releases[-1].entry.description == "goes on"
    assert Path(f"{file}.copy").read_bytes() == file.read_bytes()


# ---- damaged files -----------------------------------------------------------------------------------------


def lines_of(path):
    return path.read_text().splitlines(keepends=True)


def rewrite(path, change):
    lines = lines_of(path)
    change(lines)
    path.write_text("".join(lines))


def with_sums(path):
    """A line edited, and its own hash made to fit."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[1]["charge"]["mu"] = 0.1
    lines[1].pop("sha256")
    lines[1]["sha256"] = budget._sha256(lines[1])
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


DAMAGE = {
    "cut short by a line": (lambda f: rewrite(f, lambda lines: lines.pop()), "was cut short: 1 releases are missing"),
    "cut short to its terms": (lambda f: f.write_text(lines_of(f)[0]), "was cut short: 3 releases are missing"),
    "cut inside a line": (lambda f: os.truncate(f, f.stat().st_size - 9), "ends in the middle of a line"),
    "a line taken out": (lambda f: rewrite(f, lambda lines: lines.pop(2)), "was changed in line 3"),
    "lines in another order": (lambda f: rewrite(f, lambda lines: lines.insert(1, lines.pop(2))), "changed in line 2"),
    "a line twice": (lambda f: rewrite(f, lambda lines: lines.append(lines[1])), "was changed in line 6"),
    "a smaller cost": (lambda f: f.write_text(f.read_text().replace('"mu": 0.3', '"mu": 0.1', 1)), "changed in line 2"),
    "a larger cap": (lambda f: f.write_text(f.read_text().replace('"cap_mu": 1.0', '"cap_mu": 9.0')), "in line 1"),
    "a cost with its hash": (with_sums, "was changed in line 3"),
    "no text": (lambda f: f.write_bytes(b"\xff\xfe\n"), "was changed in line 1"),
    "other JSON": (lambda f: f.write_text("[]\n"), "was changed in line 1"),
    "nested JSON": (lambda f: f.write_text("[" * 100_000 + "\n"), "was changed in line 1"),
    "emptied": (lambda f: f.write_text(""), "is missing or empty"),
    "removed": (lambda f: f.unlink(), "is missing or empty"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_refused_and_restored_from_its_copy(damage, file, capsys):
    whole, (spoil, expected) = read_budget(file), DAMAGE[damage]
    spoil(file)
    before = snapshot(file.parent)
    with pytest.raises(InputError, match="which is whole, over it; nothing was spent$") as caught:
        reserve(file, "more", 100.0)
    assert expected in str(caught.value)
    assert cli.main(["budget", str(file)]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err == f"hyperdp: {caught.value}\n"
    assert snapshot(file.parent) == before
    shutil.copy(f"{file}.copy", file)
    assert read_budget(file) == whole


@pytest.mark.parametrize("damage", ["removed", "a line taken out", "cut short by a line"])
def test_a_damaged_copy(damage, file):
    copy = Path(f"{file}.copy")
    DAMAGE[damage][0](copy)
    if damage == "cut short by a line":  # as an interruption leaves it
        assert len(read_budget(file).releases) == 3
        return
    with pytest.raises(InputError, match="its copy .*; if '.*budget.jsonl' holds every release, copy it over"):
        reserve(file, "more", 100.0)
    DAMAGE["a line taken out"][0](file)
    with pytest.raises(InputError, match="restore both from a backup, or count all releases as spent"):
        read_budget(file)


def test_two_files_that_parted_are_refused(file):
    shutil.copytree(file.parent, file.parent / "elsewhere")
    reserve(file, "here", 100.0)
    reserve(file.parent / "elsewhere" / file.name, "there", 100.0)
    shutil.copy(file.parent / "elsewhere" / file.name, file)
    with pytest.raises(InputError, match="and its copy contradict each other"):
        read_budget(file)


def test_every_changed_byte_is_noticed(file, monkeypatch):
    monkeypatch.setattr(budget.time, "sleep", lambda seconds: None)
    whole = file.read_bytes()
    for position in range(0, len(whole), 7):
        file.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(InputError):
            read_budget(file)


def test_what_is_no_file_is_refused(file, tmp_path):
    for spoil in (lambda f: f.symlink_to(f"{f}.copy"), lambda f: f.mkdir(), lambda f: os.mkfifo(f)):
        kept = file.read_bytes()
        file.unlink()
        spoil(file)
        with pytest.raises(InputError, match="cannot be read"):
            reserve(file, "more", 100.0)
        file.rmdir() if file.is_dir() and not file.is_symlink() else file.unlink()
        file.write_bytes(kept)
    with pytest.raises(InputError, match="no budget file"):
        read_budget(tmp_path / "absent")


def test_a_full_disk_leaves_no_half_line(file, monkeypatch):
    before = snapshot(file.parent)
    fsync, failing = os.fsync, iter([True])

    def full(handle):
        if next(failing, False):
            raise OSError(28, "No space left on device")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left on device"):
        reserve(file, "more", 100.0)
    assert snapshot(file.parent) == before
    reserve(file, "more", 100.0)


def test_a_lock_that_is_held_is_waited_for_and_not_forced(file, monkeypatch):
    monkeypatch.setattr(budget, "_PATIENCE", 0.05)
    before = snapshot(file.parent)
    with budget._locked(file), pytest.raises(InputError, match="another process holds it; nothing was spent"):
        reserve(file, "more", 100.0)
    assert snapshot(file.parent) == before


# ---- the command -------------------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path, monkeypatch):
    """`hyperdp release` whose steps are stand-ins that look into the budget file, and fail where they are told to."""
    file, seen = tmp_path / "budget", []
    (tmp_path / "images").mkdir()

    def step(name, result=None):
        def run(*args, **kwargs):
            entered = [not line.cancelled for line in read_budget(file).releases] if file.exists() else None
            seen.append((name, entered))
            if name == run.failing[0]:
                raise run.failing[1]
            return result

        run.failing = failing
        return run

    failing = [None, None]
    private = ImageSet(torch.zeros(2, 1, 16, 16))
    stated = SimpleNamespace(certificate=SimpleNamespace(sentence="done", risk_sentence="Risk: none."))
    monkeypatch.setattr(hyperdp_lib.data, "load_named_or_path", step("read", private))
    stand_in = SimpleNamespace(geometry=lambda name: (16, 1), stretches=lambda name: False)
    monkeypatch.setitem(vars(hyperdp_lib), "pretrained", stand_in)
    monkeypatch.setitem(vars(hyperdp_lib), "releasing", SimpleNamespace(release=step("release", stated)))
    monkeypatch.setitem(vars(hyperdp_lib), "release_folder", SimpleNamespace(save_release=step("save")))
    monkeypatch.setattr(cli, "_planned", lambda options, class_names: None)
    monkeypatch.setattr(cli, "_preview", step("preview"))

    def run(*options, fail=None, error=None):
        seen.clear()
        failing[:] = fail, error
        words = ["release", tmp_path / "images", "--out", tmp_path / "out", "--budget", file, *options]
        return cli.main([str(word) for word in words])

    return SimpleNamespace(run=run, file=file, seen=seen)


NEW = ("--epsilon", "1", "--cap-epsilon", "2")


def test_a_release_is_entered_before_an_image_is_read(command, capsys):
    assert command.run(*NEW) == 0
    assert command.seen == [("read", [True]), ("preview", [True]), ("release", [True]), ("save", [True])]
    assert command.run("--epsilon", "0.7") == 0
    assert command.seen[0] == ("read", [True, True])
    capsys.readouterr()
    assert cli.main(["budget", str(command.file), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    expected = [accounting.noise_multiplier(epsilon, 1e-5) for epsilon in (1.0, 0.7)]
    assert [one["noise_multiplier"] for one in told["releases"]] == expected
    assert told["releases"][0]["description"].endswith("images -> " + str(command.file.parent / "out"))
    before = snapshot(command.file.parent)
    assert command.run("--epsilon", "1.8") == 2
    assert command.seen == [] and snapshot(command.file.parent) == before  # no image was read
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "has a cap of epsilon 2, which this release (epsilon 1.8" in error


@pytest.mark.parametrize("error", [InputError("bad"), KeyboardInterrupt(), RuntimeError("bug"), MemoryError()])
@pytest.mark.parametrize(("step", "stays"), [("read", False), ("preview", False), ("release", True), ("save", True)])
def test_an_entry_is_taken_back_only_before_noise_may_be_drawn(command, step, stays, error):
    if isinstance(error, (InputError, KeyboardInterrupt)):
        assert command.run(*NEW, fail=step, error=error) == (2 if isinstance(error, InputError) else 130)
    else:
        with pytest.raises(type(error)):
            command.run(*NEW, fail=step, error=error)
    (line,) = read_budget(command.file).releases
    assert line.cancelled != stays


def test_a_dry_run_spends_nothing(command):
    assert command.run(*NEW, "--dry-run") == 0
    assert snapshot(command.file.parent) == {} and command.seen[0] == ("read", None)
    assert command.run(*NEW) == 0
    before = snapshot(command.file.parent)
    assert command.run("--epsilon", "1", "--dry-run") == 0 and command.run("--epsilon", "2", "--dry-run") == 2
    assert snapshot(command.file.parent) == before


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--epsilon", "1"], "give --cap-epsilon or --cap-mu to make it"),
        (["--epsilon", "1", "--cap-epsilon", "2", "--cap-mu", "1"], "give one of them"),
        (["--epsilon", "1", "--cap-epsilon", "0"], "from a millionth to a million"),
        (["--epsilon", "1", "--cap-mu", "nan"], "number"),
        (["--epsilon", "1", "--cap-mu", "-1"], "number"),
        (["--epsilon", "1", "--cap-mu", "inf"], "from a millionth to a million"),
        (["--epsilon", "3", "--cap-epsilon", "2"], "would exceed"),
        (["--epsilon", "1", "--cap-epsilon", "2", "--seed", "0"], "no budget can cover it"),
    ],
)
def test_a_new_budget_refuses_bad_input(options, expected, command, capsys):
    assert command.run(*options) == 2
    error = capsys.readouterr().err
    assert error.startswith("hyperdp: ") and error.count("\n") == 1 and expected in error
    assert command.seen == [] and list(command.file.parent.iterdir()) == [command.file.parent / "images"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--epsilon", ".1", "--cap-epsilon", "3"], "was fixed at epsilon 2 when it was made"),
        (["--epsilon", ".1", "--cap-mu", "2"], "was fixed at epsilon 2 when it was made"),
        (["--epsilon", ".1", "--cap-epsilon", "0.5"], "epsilon 1, mu 0.2681 are spent already; the cap"),
        (["--epsilon", ".1", "--cap-mu", "0.1"], "epsilon 1, mu 0.2681 are spent already; the cap"),
        (["--epsilon", ".1", "--neighboring-relation", "replace_one"], "is for add_or_remove_one"),
    ],
)
def test_an_old_budget_refuses_what_contradicts_it(options, expected, command, capsys):
    assert command.run(*NEW) == 0
    before = snapshot(command.file.parent)
    capsys.readouterr()
    assert command.run(*options) == 2
    error = capsys.readouterr().err
    assert error.startswith("hyperdp: ") and error.count("\n") == 1 and expected in error
    assert command.seen == [] and snapshot(command.file.parent) == before
    assert command.run("--epsilon", ".1", "--cap-epsilon", "2") == 0  # the same again is no contradiction


def test_a_cap_without_a_file_and_a_file_in_no_folder(tmp_path, capsys):
    words = ["release", str(tmp_path), "--epsilon", "1", "--out", str(tmp_path / "out")]
    assert cli.main([*words, "--cap-mu", "1"]) == 2 and "give --budget FILE" in capsys.readouterr().err
    absent = str(tmp_path / "absent" / "budget")
    assert cli.main([*words, "--cap-mu", "1", "--budget", absent]) == 2
    assert "cannot write the budget" in capsys.readouterr().err
    assert cli.main(["budget", absent]) == 2 and "no budget file" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
