"""Every notebook: one typed, commented cell of parameters, the guard, no stray outputs; typos are errors."""

import ast
import re
from pathlib import Path

import nbformat
import pytest
import yaml

from hyperdp_lib.data import InputError
from hyperdp_lib.notebook import refresh, require_known_parameters, results_folder

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
TYPES = {
    "epsilon": "float",
    "delta": "float",
    "num_private": "int",
    "seed": "int",
    "device": "str",
    "preset": "str",
    "out": "str",
}

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(path: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def parameters(path: Path) -> dict[str, str]:
    """Name -> annotated type, from the cell tagged parameters, which must be the first code cell."""
    first = code_cells(path)[0]
    assert "parameters" in first.metadata.get("tags", [])
    body = ast.parse(first.source).body
    annotated = [statement for statement in body if isinstance(statement, ast.AnnAssign)]
    assert annotated == body, "write: name: type = value  # meaning"
    return {ast.unparse(s.target): ast.unparse(s.annotation) for s in annotated}


@each_notebook
def test_parameters_are_typed_commented_and_named_as_everywhere(path: Path) -> None:
    known = parameters(path)
    assert {"epsilon", "delta", "seed"} <= set(known)
    assert all(TYPES.get(name, annotation) == annotation for name, annotation in known.items())
    assert all(re.search(r"#\s*\S", line) for line in code_cells(path)[0].source.splitlines())
    tagged = [cell for cell in code_cells(path) if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1


@each_notebook
def test_guard_comes_second_and_names_every_parameter(path: Path) -> None:
    tree = ast.parse(code_cells(path)[1].source)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    (guard,) = [call for call in calls if ast.unparse(call.func) == "require_known_parameters"]
    assert {k.arg: ast.unparse(k.value) for k in guard.keywords} == parameters(path)
    # nothing is assigned before it: such a name would look like a misspelt parameter
    before = tree.body[: [ast.unparse(s).startswith("require_known") for s in tree.body].index(True)]
    assert all(isinstance(statement, (ast.Import, ast.ImportFrom)) for statement in before)


@each_notebook
def test_committed_outputs_are_checked_text_only(path: Path) -> None:
    for cell in code_cells(path):
        if "NBVAL_CHECK_OUTPUT" in cell.source:
            assert [output.output_type for output in cell.outputs] == ["stream"]
            assert cell.outputs[0].name == "stdout"
        else:
            assert not cell.outputs and cell.execution_count is None


@each_notebook
def test_chapter_ends_with_literal_papermill_lines(path: Path) -> None:
    from papermill import inspect_notebook

    prose = "\n".join(c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "markdown")
    assert "**After it you can**" in prose and "## What to try" in prose
    lines = re.findall(r"^papermill (.*)$", prose, flags=re.M)
    assert lines
    for line in lines:
        words = line.split()
        used = [words[i + 1] for i, word in enumerate(words) if word == "-p"]
        assert set(used) <= set(inspect_notebook(str(ROOT / words[0])))


def test_papermill_with_a_typo_fails_and_with_the_right_name_passes(tmp_path: Path) -> None:
    """The guard in a real kernel, on the first cells of a real notebook."""
    import papermill

    notebook = nbformat.read(ROOT / "notebooks" / "02_one_noisy_sum.ipynb", as_version=4)
    guard = "\n\n".join(code_cells(ROOT / "notebooks" / "02_one_noisy_sum.ipynb")[1].source.split("\n\n")[:2])
    parameters_cell = next(cell for cell in notebook.cells if cell.cell_type == "code")
    notebook.cells = [parameters_cell, nbformat.v4.new_code_cell(f"{guard}\nprint(epsilon)")]
    short = tmp_path / "short.ipynb"
    nbformat.write(notebook, short)
    run = {"cwd": str(ROOT), "progress_bar": False}
    done = papermill.execute_notebook(str(short), str(tmp_path / "out.ipynb"), {"epsilon": 0.5}, **run)
    assert done.cells[-1].outputs[0].text == "0.5\n"
    message = "no parameter 'epsilom'; did you mean 'epsilon'"
    with pytest.raises(papermill.PapermillExecutionError, match=message):
        papermill.execute_notebook(str(short), str(tmp_path / "out.ipynb"), {"epsilom": 0.5}, **run)


def test_refresh_keeps_the_checked_text_only(tmp_path: Path) -> None:
    cells = ["print('kept')  # NBVAL_CHECK_OUTPUT", "print('dropped')"]
    path = tmp_path / "small.ipynb"
    new = [nbformat.v4.new_code_cell(source) for source in cells]
    nbformat.write(nbformat.v4.new_notebook(cells=new), path)
    refresh(path)
    checked, other = code_cells(path)
    assert checked.outputs[0].text == "kept\n" and checked.execution_count == 1
    assert not other.outputs and other.execution_count is None
    first = path.read_text(encoding="utf-8")
    refresh(path)
    assert path.read_text(encoding="utf-8") == first


def test_guard_checks_types() -> None:
    require_known_parameters({"epsilon": 1}, epsilon=float)
    with pytest.raises(InputError, match="'epsilon' must be a number, got '0.5'"):
        require_known_parameters({"epsilon": "0.5"}, epsilon=float)
    with pytest.raises(InputError, match="'seed' must be an int, got True"):
        require_known_parameters({"seed": True}, seed=int)
    with pytest.raises(InputError, match="does not define 'seed'"):
        require_known_parameters({}, seed=int)


def test_guard_ignores_what_ipython_and_imports_define() -> None:
    namespace = {"__name__": "x", "_oh": {}, "In": [], "Out": {}, "ast": ast, "f": len, "seed": 3}
    require_known_parameters(namespace, seed=int)
    with pytest.raises(InputError, match="no parameter 'colour'; it has seed"):
        require_known_parameters({**namespace, "colour": 1}, seed=int)


def test_results_folder_is_found_from_anywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for start in (ROOT, ROOT / "notebooks", tmp_path):
        monkeypatch.chdir(start)
        assert results_folder() == ROOT / "book" / "results"


@pytest.mark.parametrize(("written", "advice"), [("1e-5", "1.0e-5"), ("2.5e3", "2.5e+3")])
def test_a_number_that_yaml_takes_for_text_is_explained(written, advice):
    assert isinstance(yaml.safe_load(written), str) and isinstance(yaml.safe_load(advice), float)
    with pytest.raises(InputError, match=re.escape(f"-p delta {advice}")):
        require_known_parameters({"delta": written}, delta=float)
