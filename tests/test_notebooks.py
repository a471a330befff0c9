"""Every notebook: one typed, commented cell of parameters, the guard, no stray outputs; typos are errors."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml

from hyperdp_lib.data import InputError
from hyperdp_lib.pages.notebook import build_book, incomplete_pages, refresh, require_known_parameters, results_folder

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

PYTHON = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}

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


@pytest.fixture(scope="module")
def small_book(tmp_path_factory):
    """A clone with a book of two pages, one of which runs code."""
    root = tmp_path_factory.mktemp("clone")
    for folder in ("hyperdp_lib", "book/results", "notebooks"):
        (root / folder).mkdir(parents=True)
    config = "title: small\nonly_build_toc_files: true\nexecute: {execute_notebooks: cache, stderr_output: warn}\n"
    (root / "_config.yml").write_text(config)
    (root / "book" / "_toc.yml").write_text(
        "format: jb-book\nroot: book/index\nchapters:\n- file: notebooks/runs\n"
    )
    (root / "book" / "index.md").write_text("# A book\n\nWith text.\n")
    new = nbformat.v4
    code = "from pathlib import Path\nexec(Path('run').read_text())"
    cells = [new.new_markdown_cell("# Runs"), new.new_code_cell(code)]
    nbformat.write(new.new_notebook(cells=cells, metadata=PYTHON), root / "notebooks" / "runs.ipynb")
    return root


def page(root: Path, name: str) -> Path:
    return root / "_build" / "html" / f"{name}.html"


def test_a_failed_build_does_not_decide_the_next(small_book: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the page shows depends on a file that no cache knows of, like a library's own cache."""
    run = small_book / "notebooks" / "run"
    run.write_text("import sys; print('a progress bar', file=sys.stderr)")
    assert build_book(small_book) and build_book(small_book)
    run.write_text("raise SystemError('stopped')")
    assert build_book(small_book) and build_book(small_book)  # Sphinx alone would not warn again
    run.write_text("print('the right', 'output')")
    assert build_book(small_book) == []
    assert "the right output" in page(small_book, "notebooks/runs").read_text()
    # nothing changed: nothing is done
    with monkeypatch.context() as patch:
        patch.setattr("subprocess.run", None)
        assert build_book(small_book) == []
    # another package is installed: nothing computed with the old ones stays
    monkeypatch.setattr("hyperdp_lib.pages.notebook.metadata.distributions", lambda: [])
    run.write_text("print('computed', 'anew')")
    assert build_book(small_book) == []
    assert "computed anew" in page(small_book, "notebooks/runs").read_text()
    # a record goes away
    (small_book / "book" / "results" / "one.json").write_text("{}")
    assert build_book(small_book) == []
    (small_book / "book" / "results" / "one.json").unlink()
    run.write_text("print('without', 'the record')")
    assert build_book(small_book) == [] and "without the record" in page(small_book, "notebooks/runs").read_text()


def test_missing_and_empty_pages_are_found(small_book: Path) -> None:
    article = "<main><article><section><h1>Runs<a>#</a></h1>{}</section></article></main>"
    index, runs = page(small_book, "book/index"), page(small_book, "notebooks/runs")
    for path in (index, runs):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(article.format("<p>text</p><div class='output cell_output'>1</div>"))
    assert incomplete_pages(small_book) == []
    runs.write_text(article.format("<p>text</p>"))
    assert incomplete_pages(small_book) == ["the page of notebooks/runs shows no output of its code"]
    runs.write_text(article.format(""))
    assert incomplete_pages(small_book) == ["the page of notebooks/runs is empty"]
    index.unlink()
    assert len(incomplete_pages(small_book)) == 2


def test_nothing_of_the_users_is_read_or_written(tmp_path: Path) -> None:
    """Tests run in a process of their own, as a user would start them, with a home in which everything can be seen."""
    home = tmp_path / "home"
    environment = {**os.environ, "HOME": str(home)}
    for name in ("HYPERDP_CACHE", "XDG_CACHE_HOME", "MPLCONFIGDIR"):
        environment[name] = str(home / name)
    del environment["HYPERDP_TEST_HOME"]
    home.mkdir()
    script = tmp_path / "test_it.py"
    script.write_text(
        "import matplotlib, matplotlib.font_manager, numpy\n"
        "from pathlib import Path\n"
        "from hyperdp_lib.public.glyphs import cache_folder, cached_fields\n"
        "def test_it():\n"
        "    cached_fields(('test',), lambda: (numpy.zeros(1), ['a']))\n"
        f"    assert Path({str(home)!r}) not in cache_folder().parents and list(cache_folder().glob('*.npz'))\n"
    )
    options = ["-q", "-p", "no:cacheprovider", "--rootdir", ROOT, "-c", ROOT / "pyproject.toml", "--confcutdir", ROOT]
    command = [sys.executable, "-m", "pytest", *options, ROOT / "conftest.py", script]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(home.iterdir()) == []


# what looks like a result in prose and is none: words around it -> why it may stand
NO_RESULTS = {
    "1.4 million parameters": "the size of a model",
    "figure reach 0.1": "a question to the reader",
    "0.47 million": "reported by the authors of another method",
    "3.8 million": "reported by the authors of a benchmark",
}
RESULT = re.compile(r"\d ?± ?\d|(?<![\w.,])\d*\.\d+(?![\w.])|\d\s?(%|per cent)")


def results_in(prose: str) -> list[str]:
    """Decimals, percentages and spreads outside code, formulas, tables, links and values of symbols."""
    for nothing in (
        r"```.*?```", r"`[^`\n]*`", r"\$\$.*?\$\$", r"\$[^$\n]+\$", r"^---\n.*?^---\n", r"\]\([^)]*\)",
        r"^\|.*?$", r"[εδηγσμρ]²? = [\d.e-]+", *map(re.escape, NO_RESULTS),
    ):  # fmt: skip
        prose = re.sub(nothing, " ", prose, flags=re.S | re.M)
    return [line.strip() for line in prose.splitlines() if RESULT.search(line)]


@pytest.mark.parametrize("text", ["0.85", "93.2 ± 1.0", ".42", "15 %", "80%", "3 per cent"])
def test_a_typed_result_is_seen(text: str) -> None:
    assert results_in(f"The distance is {text}, at ε = 0.5.") and not results_in(f"At ε = 0.5, `{text}` and ${text}$.")


PAGES = [*NOTEBOOKS, *(ROOT / "book" / f"{name}.md" for name in ("status", "index"))]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_no_result_is_typed_by_hand(path: Path) -> None:
    """Numbers of the prose come from records, by code; tables of what others reported stand in Markdown tables."""
    if path.suffix == ".md":
        sources = [path.read_text(encoding="utf-8")]
    else:
        sources = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown"]
    assert [line for source in sources for line in results_in(source)] == []


def test_no_method_is_tested_for_truth(tmp_path: Path) -> None:
    """The types of the notebooks' code, as far as it asks whether a function is true: it always is."""
    from mypy import api

    for path in NOTEBOOKS:
        code = "\n".join(cell.source for cell in code_cells(path))
        (tmp_path / f"chapter_{path.stem}.py").write_text(code, encoding="utf-8")
    (tmp_path / "chapter_wrong.py").write_text("print([x for x in 'a' if x.upper])\n", encoding="utf-8")
    said, _, _ = api.run([*map(str, sorted(tmp_path.glob("*.py"))), "--config-file", str(ROOT / "pyproject.toml")])
    found = [line for line in said.splitlines() if "[truthy-function]" in line]
    assert len(found) == 1 and "chapter_wrong.py" in found[0], found
