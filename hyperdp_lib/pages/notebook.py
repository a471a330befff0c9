"""What the notebooks share: the guard against misspelt parameters, how they are committed, how they become the book.

Papermill only *warns* about a parameter that the notebook does not have, so `-p epsilom 0.5` would run with
the default and print a result for another privacy budget. Each notebook therefore states its parameters once
more, right after its `parameters` cell, and the guard turns a typo into an error.

`python -m hyperdp_lib.pages.notebook notebooks/*.ipynb` runs notebooks and writes them back as they are committed:
without outputs, but for the text of the cells marked NBVAL_CHECK_OUTPUT, which the tests compare.

`python -m hyperdp_lib.pages.notebook --book` builds the book. A page that wrote to stderr fails the build, since
readers would see it; what earlier builds left is used only where it must be what a first build would make.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from hyperdp_lib.artefacts import file_sha256, write_atomic
from hyperdp_lib.data import InputError

# Libraries that import tqdm.auto announce missing notebook widgets; these pages are static and want none. The
# filter comes first in every notebook because this module does.
warnings.filterwarnings("ignore", message="IProgress not found")
# On a machine without matplotlib's font cache, a slow one, a page's first figure would write this to stderr.
logging.getLogger("matplotlib.font_manager").addFilter(lambda record: "font cache" not in record.getMessage())

_METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")
# what IPython itself puts into a notebook's namespace
_IPYTHON_NAMES = {"In", "Out", "exit", "quit", "open", "get_ipython"}


def require_known_parameters(namespace: Mapping[str, Any], /, **parameters: type) -> None:
    """Stop when the notebook was given a parameter it does not have, or a value of the wrong type.

    Call it in the first cell after the `parameters` cell, before any other assignment: whatever is defined by
    then, apart from imported modules, functions and classes, came from that cell or from papermill.

    Parameters
    ----------
    namespace
        The notebook's `globals()`.
    **parameters
        Every parameter of the notebook with its type. An int is accepted where a float is expected.

    Raises
    ------
    InputError
        Names the unknown or ill-typed parameter, and the nearest known name.

    Examples
    --------
    >>> require_known_parameters({"epsilon": 0.5, "seed": 0}, epsilon=float, seed=int)
    >>> require_known_parameters({"epsilom": 0.5, "seed": 0}, epsilon=float, seed=int)
    Traceback (most recent call last):
    ...
    hyperdp_lib.data.InputError: this notebook has no parameter 'epsilom'; did you mean 'epsilon'?
    """
    for name, value in namespace.items():
        if name.startswith("_") or name in _IPYTHON_NAMES or name in parameters:
            continue
        if callable(value) or type(value).__name__ == "module":
            continue
        near = difflib.get_close_matches(name, parameters, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(parameters)}."
        raise InputError(f"this notebook has no parameter {name!r}; {hint}")
    for name, expected in parameters.items():
        if name not in namespace:
            raise InputError(f"the parameters cell does not define {name!r}")
        value = namespace[name]
        if expected is float and isinstance(value, str) and _NUMBER.fullmatch(value):
            raise InputError(
                f"parameter {name!r} was given as {value}, which YAML takes for text; write it with a point, "
                f"as in -p {name} {_with_point(value)}"
            )
        accepted = (int, float) if expected is float else (expected,)
        if not isinstance(value, accepted) or (isinstance(value, bool) and expected is not bool):
            raise InputError(
                f"parameter {name!r} must be {_article(expected.__name__)}, got {value!r}; "
                f"with papermill write -p {name} VALUE (numbers unquoted)"
            )


def results_folder() -> Path:
    """The folder with the book's result records, `book/results` of this repository.

    Found by walking up from the working directory and then from the package, so that a notebook finds it from
    wherever papermill runs it.

    Raises
    ------
    InputError
        If the library is installed without its repository: the records are not part of the wheel.
    """
    for start in (Path.cwd(), Path(__file__).resolve().parent):
        for folder in (start, *start.parents):
            if (folder / "book" / "_toc.yml").is_file():
                return folder / "book" / "results"
    raise InputError("no book/results here: run the notebook inside a clone of the HyperDP repository")


def refresh(path: str | Path, *, timeout: int = 900) -> None:
    """Run a notebook in its folder and keep nothing of it but the text of its checked cells.

    Parameters
    ----------
    path
        An `.ipynb`, rewritten in place.
    timeout
        Seconds that one cell may take.

    Raises
    ------
    nbclient.exceptions.CellExecutionError
        If a cell fails; the file is then left as it was.
    """
    import nbformat
    from nbclient import NotebookClient

    path = Path(path)
    notebook = nbformat.read(path, as_version=4)
    place = {"metadata": {"path": str(path.parent)}}
    # on a busy machine one cell's text arrives in several pieces
    NotebookClient(notebook, timeout=timeout, coalesce_streams=True, resources=place).execute()
    notebook.metadata = nbformat.from_dict(_METADATA)
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({k: v for k, v in cell.metadata.items() if k == "tags"})
        if cell.cell_type == "code":
            checked = "NBVAL_CHECK_OUTPUT" in cell.source
            cell.outputs = cell.outputs if checked else []
            cell.execution_count = 1 if checked else None  # nbval compares only cells that were run
    nbformat.write(notebook, path)


def _with_point(value: str) -> str:
    """A number as YAML 1.1 reads it: with a point before the exponent, and a sign in it."""
    mantissa, _, exponent = value.lower().partition("e")
    sign = "" if exponent[:1] in ("", "-", "+") else "+"
    return f"{mantissa if '.' in mantissa else mantissa + '.0'}e{sign}{exponent}" if exponent else value


def build_book(root: str | Path) -> list[str]:
    """Troubles of the book in ``root``, built into ``root/_build/html``; none when it is whole.

    Outputs are kept by jupyter-cache, which knows a notebook's source alone, and pages by Sphinx, which reads (and
    warns about) a page only when that page changed. So all is forgotten when an installed package, the library or a
    record changed; pages, and outputs with text on stderr, when any page changed or the last build did not succeed.

    Parameters
    ----------
    root
        A clone: holds ``_config.yml``, ``book/_toc.yml``, ``book/results``, ``hyperdp_lib`` and ``notebooks``.
    """
    root = Path(root).resolve()
    build, toc = root / "_build", root / "book" / "_toc.yml"
    installed = sorted(f"{package.name}=={package.version}" for package in metadata.distributions())
    records = root / "book" / "results"
    computed = _digest(root, [*(root / "hyperdp_lib").rglob("*"), *records.rglob("*")], sys.version, *installed)
    sources = [root / "_config.yml", *(root / "book").rglob("*"), *(root / "notebooks").glob("*.ipynb")]
    pages = _digest(root, [path for path in sources if records not in path.parents])
    state = build / "state.json"
    before = _read_state(state)
    if before == {"computed": computed, "pages": pages} and not incomplete_pages(root):
        return []
    if before.get("computed") != computed:
        shutil.rmtree(build, ignore_errors=True)
    for folder in ("html", ".doctrees"):
        shutil.rmtree(build / folder, ignore_errors=True)
    _forget_noisy_outputs(build / ".jupyter_cache")
    build.mkdir(exist_ok=True)
    write_atomic(state, json.dumps({"computed": computed}).encode())
    command = shutil.which("jupyter-book", path=str(Path(sys.executable).parent)) or "jupyter-book"
    options = ["--config", str(root / "_config.yml"), "--toc", str(toc), "--warningiserror", "--keep-going", "--quiet"]
    done = subprocess.run([command, "build", str(root), *options])
    if done.returncode:
        return [f"jupyter-book stopped with exit code {done.returncode}; its messages are above"]
    troubles = incomplete_pages(root)
    if not troubles:
        write_atomic(state, json.dumps({"computed": computed, "pages": pages}).encode())
    return troubles


def incomplete_pages(root: str | Path) -> list[str]:
    """What the built book of ``root`` lacks: pages of the table of contents, their text, outputs of their code."""
    from bs4 import BeautifulSoup
    from sphinx_external_toc.parsing import parse_toc_yaml

    root = Path(root)
    troubles = []
    for name in parse_toc_yaml(root / "book" / "_toc.yml"):
        page = root / "_build" / "html" / f"{name}.html"
        if not page.is_file():
            troubles.append(f"{name} has no page")
            continue
        article = BeautifulSoup(page.read_bytes(), "html.parser").find("article")
        for heading in article.find_all(re.compile("^h[1-6]$")) if article else ():
            heading.decompose()
        source = root / f"{name}.md"
        runs = not source.is_file() or re.search(r"^```\{code-cell\}", source.read_text(encoding="utf-8"), flags=re.M)
        if article is None or not article.get_text(strip=True):
            troubles.append(f"the page of {name} is empty")
        elif runs and not article.find(class_="cell_output"):
            troubles.append(f"the page of {name} shows no output of its code")
    return troubles


def _digest(root: Path, paths: Iterable[Path], *more: str) -> str:
    files = {path.relative_to(root).as_posix(): path for path in paths if path.is_file()}
    passed_over = re.compile(r"(^|/)(\.|__pycache__/)")
    lines = [f"{name} {file_sha256(files[name])}" for name in sorted(files) if not passed_over.search(name)]
    return hashlib.sha256("\n".join([*lines, *more]).encode()).hexdigest()


def _read_state(path: Path) -> dict[str, str]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none yet
        return {}


def _forget_noisy_outputs(folder: Path) -> None:
    """Drop cached runs that wrote to stderr: jupyter-cache keeps them as successful."""
    from jupyter_cache import get_cache

    if not folder.is_dir():
        return
    try:
        cache = get_cache(folder)
        for record in cache.list_cache_records():
            cells = cache.get_cache_bundle(record.pk).nb.cells
            if any(output.get("name") == "stderr" for cell in cells for output in cell.get("outputs", ())):
                cache.remove_cache(record.pk)
    except Exception:  # of whatever kind: a run that was stopped while writing left it in disorder
        shutil.rmtree(folder)


def _article(type_name: str) -> str:
    return {"int": "an int", "float": "a number", "str": "a string"}.get(type_name, f"a {type_name}")


if __name__ == "__main__":
    if sys.argv[1:] == ["--book"]:
        found = build_book(results_folder().parents[1])
        sys.exit("\n".join(found) or 0)
    for argument in sys.argv[1:]:
        refresh(argument)
