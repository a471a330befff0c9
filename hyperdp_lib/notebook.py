"""What the notebooks share: the guard against misspelt parameters, and how they are committed.

Papermill only *warns* about a parameter that the notebook does not have, so `-p epsilom 0.5` would run with
the default and print a result for another privacy budget. Each notebook therefore states its parameters once
more, right after its `parameters` cell, and the guard turns a typo into an error.

`python -m hyperdp_lib.notebook notebooks/*.ipynb` runs notebooks and writes them back as they are committed:
without outputs, but for the text of the cells marked NBVAL_CHECK_OUTPUT, which the tests compare.
"""

from __future__ import annotations

import difflib
import re
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .data import InputError

# Libraries that import tqdm.auto announce missing notebook widgets; these pages are static and want none. The
# filter comes first in every notebook because this module does.
warnings.filterwarnings("ignore", message="IProgress not found")

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


def _article(type_name: str) -> str:
    return {"int": "an int", "float": "a number", "str": "a string"}.get(type_name, f"a {type_name}")


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        refresh(argument)
