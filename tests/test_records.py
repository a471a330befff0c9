"""Records round-trip, are written whole or not at all, and name no machine."""

import io
import json
import math
import os
import re
import socket
import subprocess
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pytest

from hyperdp_lib import records
from hyperdp_lib.data import InputError
from hyperdp_lib.pages import figures, report, winners

RESULTS = Path(__file__).resolve().parent.parent / "book" / "results"


def record(**changes):
    fields = dict(
        pair="glyphs-digits",
        method="dp_lora",
        epsilon=1.0,
        delta=1e-5,
        neighboring_relation="add_or_remove_one",
        num_private=100,
        seed=0,
        scores={"accuracy": 0.5, "frechet_distance": 100.0},
        seconds={"train": 1.0},
    )
    return records.Record(**{**fields, **changes})


def test_round_trip_through_a_file(tmp_path):
    saved = record(provenance=records.provenance("hyperdp compare"))
    path = saved.save(tmp_path / "new" / "folder")
    assert records.Record.from_json(path.read_text()) == saved
    assert path.name == "glyphs-digits_dp_lora_eps1_n100_seed0.json"
    assert os.listdir(path.parent) == [path.name]


def test_the_fields_are_those_of_the_architecture_page():
    expected = (
        "pair method epsilon delta neighboring_relation num_private seed scores seconds trained_parameters"
    )
    expected += " noise_dimension num_releases settings provenance"
    assert list(json.loads(record().to_json())) == expected.split()
    assert set(records.provenance("c")) == {"command", "commit", "device", "versions", "started"}


def test_no_noise_is_null_and_no_private_data_is_zero():
    assert json.loads(record(epsilon=math.inf).to_json())["epsilon"] is None
    assert json.loads(record(epsilon=0).to_json())["epsilon"] == 0
    with pytest.raises(InputError, match=">= 0"):
        record(epsilon=math.nan)


def test_not_finite_scores_are_refused():
    with pytest.raises(InputError, match="NaN or infinite"):
        record(scores={"accuracy": math.nan}).to_json()


def test_different_cells_have_different_names():
    variants = [{}, {"epsilon": 1.5}, {"epsilon": None}, {"seed": 1}, {"num_private": 10}, {"method": "real"}]
    assert len({record(**changes).name() for changes in variants}) == len(variants)


def test_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    path = record().save(tmp_path)
    before = path.read_text()

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        record(scores={"accuracy": 0.9}).save(tmp_path)
    assert os.listdir(tmp_path) == [path.name] and path.read_text() == before


def test_table_and_spread(tmp_path):
    for seed, accuracy in enumerate((0.5, 0.7)):
        record(seed=seed, scores={"accuracy": accuracy}).save(tmp_path)
    record(epsilon=None, scores={"accuracy": 0.9}).save(tmp_path / "deeper")
    record(method="public_only", epsilon=0, scores={"accuracy": None}).save(tmp_path)
    (tmp_path / "audit.json").write_text('{"epsilon": 1}')
    table = records.load_records(tmp_path)
    assert len(table) == 4 and table["epsilon"].max() == math.inf
    spread = records.mean_and_spread(table).set_index("epsilon")
    assert spread.loc[1.0, "mean"] == pytest.approx(0.6) and spread.loc[1.0, "seeds"] == 2
    assert spread.loc[1.0, "std"] == pytest.approx(0.02**0.5)
    assert math.isnan(spread.loc[math.inf, "std"])
    with pytest.raises(InputError, match="no column"):
        records.mean_and_spread(table, "scores.nonsense")


def test_bad_files_are_one_helpful_line(tmp_path):
    with pytest.raises(InputError, match="no folder"):
        records.load_records(tmp_path / "absent")
    assert records.load_records(tmp_path).empty
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(InputError, match="broken.json is not JSON"):
        records.load_records(tmp_path)
    with pytest.raises(InputError, match="not a result record"):
        records.Record.from_json('{"pair": "a"}')


def test_provenance_names_no_machine_or_folder(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["/somewhere/bin/hyperdp", "compare", "--out", str(tmp_path / "results")])
    text = json.dumps(records.provenance())
    assert "hyperdp compare --out results" in text
    assert str(tmp_path) not in text and "/somewhere" not in text
    if len(socket.gethostname()) > 6:  # a shorter name may be part of an innocent word
        assert socket.gethostname() not in text


def test_a_module_that_was_started_by_name_is_recorded_so():
    package = Path(records.__file__).parent
    shown = records._command_line([str(package / "theory" / "learned.py"), "--quick"])
    assert shown == "python -m hyperdp_lib.theory.learned --quick"
    assert records._command_line([str(package / "__main__.py"), "compare"]) == "python -m hyperdp_lib compare"
    assert records._command_line(["/usr/bin/hyperdp", "compare", "/secret/place/x.npz"]) == "hyperdp compare x.npz"


def test_a_record_of_code_with_changes_is_refused_in_the_repository(monkeypatch, tmp_path):
    published = RESULTS / "never.json"
    said = {"status": " M hyperdp_lib/data.py"}
    monkeypatch.setattr(records, "_git", lambda *arguments: said.get(arguments[0], "abc"))
    records._commit.cache_clear()
    try:
        dirty = record(provenance=records.provenance("c")).to_json()
        assert '"commit": "abc-dirty"' in dirty
        for refused in (lambda: records.require_commit(published), lambda: records.write_atomically(published, dirty)):
            with pytest.raises(InputError, match=r"not committed \(abc-dirty\): commit the changes"):
                refused()
        records.require_commit(tmp_path)
        records.write_atomically(tmp_path / "free.json", dirty)
    finally:
        records._commit.cache_clear()
    assert not published.exists() and (tmp_path / "free.json").is_file()


# made from code that was not committed, or at a commit that is not in the history: to be made again
TO_BE_MADE_AGAIN = """
benchmarks/forecast_coverage.json
benchmarks/two_steps.json
layers/digits.json
theory/learned.json
""".split()


def commits(content):
    """Of every block of provenance in a record, however deep."""
    if isinstance(content, dict):
        found = [content["commit"]] if "commit" in content and "command" in content else []
        return found + [commit for value in content.values() for commit in commits(value)]
    return [commit for value in content for commit in commits(value)] if isinstance(content, list) else []


def test_every_record_names_a_commit_of_the_history():
    if records._git("rev-parse", "--is-shallow-repository") != "false":
        pytest.skip("the history is not here")
    known = {commit[:12] for commit in records._git("rev-list", "HEAD").split()}
    wrong = []
    for path in sorted(RESULTS.rglob("*.json")):
        name, content = path.relative_to(RESULTS).as_posix(), json.loads(path.read_text(encoding="utf-8"))
        if name.startswith("settings/"):  # settings are given, not measured
            continue
        if name == records.PROVENANCE_FILE:  # of all that is a line of a file
            for key, one in content.items():
                assert one.get("commit", one.get("entered"))[:12] in known, key
            continue
        found = commits(content)
        if not found or not all(re.fullmatch("[0-9a-f]{12,40}", one) and one[:12] in known for one in found):
            wrong.append(name)
    assert wrong == TO_BE_MADE_AGAIN
    assert all(re.fullmatch("[0-9a-f]{12}", record.provenance["commit"]) for record in records.read_records(RESULTS))


def test_trials_without_a_commit_are_those_that_entered_the_history_with_the_one_they_name():
    if records._git("rev-parse", "--is-shallow-repository") != "false":
        pytest.skip("the history is not here")
    old = [trial for trial in records.read_trials(RESULTS) if "commit" not in trial["provenance"]]
    assert len(old) <= 156  # none is added
    asked = [f"{trial['provenance']['entered']}:book/results/tuning/{trial['trial']}.json" for trial in old]
    done = subprocess.run(
        ["git", "cat-file", "--batch"], cwd=RESULTS, input="\n".join(asked).encode(), capture_output=True, check=True
    )
    answer = io.BytesIO(done.stdout)
    for trial in old:
        size = int(answer.readline().split()[2])
        said = {name: trial.pop(name) for name in ("trial", "provenance")}
        assert json.loads(answer.read(size + 1)) == trial, said


def test_published_records_are_the_running_ones(tmp_path):
    """Merged twice, a new seed is one more line; provenance is kept once, whatever started when."""
    running, results = tmp_path / "running", tmp_path / "results"
    where = records.provenance("hyperdp compare")
    made = [
        record(epsilon=epsilon, seed=seed, provenance={**where, "started": f"at {seed}"})
        for epsilon in (10.0, None, 0.5) for seed in (1, 0)
    ]  # fmt: skip
    for one in (*made, record(pair="p-q", provenance={})):
        one.save(running)
    trial = {"method": "dp_mepf", "epsilon": 1.0, "scores": {"frechet_distance": 3.0}, "provenance": where}
    (running / "trials").mkdir()
    (running / "trials" / "dp_mepf_eps1_candidate0_set0.json").write_text(json.dumps(trial))
    (running / records.SHEETS["README.md"][0]).write_bytes(b"shown")
    (running / "other.png").write_bytes(b"not shown")
    written = {path.name for path in records.publish(running, results)}
    assert written == {path.name for path in results.iterdir()} == {
        "glyphs-digits.jsonl", "p-q.jsonl", "tuning.jsonl", "provenance.json", records.SHEETS["README.md"][0]
    }  # fmt: skip
    *lines, other = records.read_records(results)
    assert lines == sorted(made, key=lambda one: (one.epsilon or math.inf, one.seed)) and other.pair == "p-q"
    assert list(records.read_trials(results)) == [{"trial": "dp_mepf_eps1_candidate0_set0", **trial}]
    assert len(json.loads((results / "provenance.json").read_text())) == 2  # that of the records and none
    before = (results / "glyphs-digits.jsonl").read_text().splitlines()
    record(epsilon=10.0, seed=7, provenance=where).save(tmp_path / "more")
    record(epsilon=0.5, scores={"accuracy": 0.9}, provenance=where).save(tmp_path / "more")  # made again
    assert records.main([str(tmp_path / "more"), str(results)]) == 0
    after = (results / "glyphs-digits.jsonl").read_text().splitlines()
    assert [line for line in before if line not in after] == before[:1] and len(after) == len(before) + 1
    assert next(records.read_records(results)).scores == {"accuracy": 0.9}


def test_what_cannot_be_published_is_one_line_and_writes_nothing(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for folder in ("absent", "empty"):
        assert records.main([str(tmp_path / folder), str(tmp_path / "results")]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    record(provenance={**records.provenance("c"), "commit": "abc-dirty"}).save(tmp_path / "dirty")
    before = (RESULTS / "provenance.json").stat()
    with pytest.raises(InputError, match="not committed"):
        records.publish(tmp_path / "dirty", RESULTS)
    assert (RESULTS / "provenance.json").stat() == before and not (tmp_path / "results").exists()
    record().save(tmp_path / "running")
    records.publish(tmp_path / "running", tmp_path / "published")
    (tmp_path / "published" / "provenance.json").unlink()
    with pytest.raises(InputError, match="line 1 of .* has no provenance"):
        records.load_records(tmp_path / "published")


@pytest.mark.parametrize("page", [page for page in records.SHEETS if page.endswith(".ipynb")])
def test_a_page_shows_the_sheets_that_are_published_for_it(page, monkeypatch):
    """The cells of a chapter that read sheets are run with the chapter's own parameters."""
    shown = []
    monkeypatch.setattr(plt, "imread", lambda path: shown.append(path.name))
    monkeypatch.setattr(plt, "show", lambda: None)
    monkeypatch.setattr(figures, "pictures", lambda pictures: None)
    sources = [cell.source for cell in nbformat.read(RESULTS.parents[1] / page, as_version=4).cells]
    (chosen,) = [source for source in sources if source.startswith("epsilon: float = ")]
    namespace = {
        "math": math, "plt": plt, "folder": RESULTS, "table": records.load_records(RESULTS),
        "pair": report.MAIN_PAIR, "results_folder": lambda: RESULTS,
        **{module.__name__.split(".")[-1]: module for module in (figures, records, report, winners)},
    }  # fmt: skip
    exec(chosen, namespace)
    for source in sources:
        if "plt.imread" in source:
            exec(source, namespace)
    assert sorted(shown) == sorted(records.SHEETS[page])


def test_no_other_sheet_is_published():
    shown = {name for names in records.SHEETS.values() for name in names}
    assert {path.name for path in RESULTS.glob("*.png")} == shown


def test_a_cell_on_record_twice_counts_once(tmp_path):
    for folder, distance in (("book", 300.0), ("own", 320.0)):
        for seed in range(2 if folder == "book" else 1):
            record(seed=seed, scores={"frechet_distance": distance}).save(tmp_path / folder)
    record(epsilon=8, scores={"frechet_distance": 5.0}).save(tmp_path / "own")
    both = records.together(*(records.load_records(tmp_path / folder) for folder in ("book", "own")))
    spread = records.mean_and_spread(both, "scores.frechet_distance").set_index("epsilon")
    assert spread.loc[1.0, ["mean", "seeds"]].tolist() == [300.0, 2] and spread.loc[8.0, "mean"] == 5.0
    empty = records.load_records(tmp_path / "own").iloc[:0]
    assert len(records.together(empty, both)) == len(both) and records.together(empty, empty).empty
