"""The trust boundary, read from the syntax tree: who may hold private data, who may import what.

Whatever holds private data is called ``private_*``: parameters and fields of that name say which modules
can touch it. A room is a folder of the library; the flat modules are the private path.
"""

import ast
import re
from pathlib import Path

import networkx
import pytest

import hyperdp_lib

PACKAGE = Path(hyperdp_lib.__file__).parent

# room -> the rooms that its modules may import besides their own; "" is the private path, and every room may read it
ROOMS: dict[str, set[str]] = {
    "": set(),
    "public": set(),
    "scores": {"public"},
    "theory": {"public"},
    "baselines": {"public", "scores"},
    "auditing": {"public", "scores", "baselines"},
    "experiments": {"public", "scores", "baselines"},
    "pages": {"public", "scores", "theory", "baselines", "auditing", "experiments"},
}
FRONT_DOOR = ("cli", "__main__")  # may import everything
# flat module or room -> why it may have parameters or fields called private_*
MAY_HOLD_PRIVATE_DATA = {
    "mechanism": "the one place where private data becomes public",
    "measure": "the only loop over private data: private images to the embedding, vectors to the mechanism",
    "releasing": "checks private images and hands them to `measure`",
    "preview": "tells whoever holds the private images what a release of them would do",
    "two_steps": "maps one embedding to its offset from a public centre, for `measure`",
    "planning": "says which sums are taken; knows the number of private images where the relation makes it public",
    "embedding": "one private image at a time -> one vector; its result goes to the mechanism only",
    "data": "reads private images from files, and changes nothing else",
    "image_files": "decodes those files for `data`",
    "data_sets": "reads the files of named data sets for `data`",
    "baselines": "the rivals and controls, which stand where `releasing` stands",
    "scores": "research metrics on private test data, labelled so, and noisy scores that are charged",
    "experiments": "hand private sets to `releasing`, `baselines` and `scores`",
    "cli": "hands a user's private images to `releasing` and `experiments`",
    "auditing": "attacks mechanisms with neighbouring data sets that it makes up or takes from public digits",
}
# Where private data is handled, a parameter must say whose it takes: none may have one of these bare names.
BOUNDARY = ("mechanism", "measure", "releasing", "two_steps", "baselines", "scores.private_scores")
BARE_NAMES = {"batch", "batches", "embeddings", "examples", "images", "labels", "num_private", "rows"}

# The privacy-critical core: what each may import. Short files, no training framework, nothing to hide in.
STANDARD = {
    "__future__", "collections", "dataclasses", "decimal", "functools", "hashlib", "importlib", "json", "math", "os",
    "pathlib", "re", "stat", "statistics", "tempfile", "types", "typing", "warnings",
}  # fmt: skip
ALLOWED_IMPORTS = {
    "mechanism": {"numpy", "opendp"},
    "accounting": {"scipy"},
    "dp_sgd_accounting": {"dp_accounting", "opacus", "accounting"},
    "strict_json": set(),
    "artefacts": {"numpy"},
    "ledger": {"accounting", "dp_sgd_accounting", "strict_json"},
    "risk": {"scipy", "accounting", "ledger", "strict_json"},
    "certificate": {"accounting", "artefacts", "ledger", "mechanism", "risk", "strict_json"},
    "verification": {"numpy", "safetensors", "dp_accounting", "artefacts", "certificate", "ledger"},
}
# Only these may call the mechanism; only it may draw noise from OpenDP.
# theory: on synthetic tasks
MAY_CALL_NOISY_SUM = {
    "mechanism", "measure", "baselines", "auditing", "scores.private_scores", "theory", "experiments.methods",
}  # fmt: skip
# What the mechanism knows before its noise: a name that nothing else but an audit may utter.
BEFORE_THE_NOISE = {"_exact_sum", "_to_grid", "_add_discrete_gaussian"}
CODE_EXECUTION = {"pickle", "dill", "joblib", "marshal", "shelve", "cloudpickle"}


def modules():
    """Each module of the library as ("baselines.dp_lora", its syntax tree)."""
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        yield name, ast.parse(path.read_text(encoding="utf-8"))


KNOWN = {name for name, _ in modules()}


def imported(tree):
    """Top-level names of foreign modules, and names of our own modules without the package."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ("hyperdp_lib." if node.level else "") + (node.module or "")
            names = [f"{base}.{alias.name}" for alias in node.names] if base.strip(".") == "hyperdp_lib" else [base]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
            "import_module",
            "__import__",
        ):
            names = ["dynamic import"]
        else:
            continue
        for name in names:
            parts = name.split(".")
            yield parts[1] if parts[0] == "hyperdp_lib" and len(parts) > 1 else parts[0]


def parameters(tree):
    """Names of the parameters of all functions."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            arguments = node.args
            every = [
                *arguments.posonlyargs,
                *arguments.args,
                *arguments.kwonlyargs,
                arguments.vararg,
                arguments.kwarg,
            ]
            yield from (argument.arg for argument in every if argument)


def private_names(tree):
    """Parameters of functions and fields of classes that announce private data."""
    yield from (name for name in parameters(tree) if name.startswith("private"))
    for node in ast.walk(tree):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            if node.target.id.startswith("private"):
                yield node.target.id


def called_names(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield getattr(node.func, "attr", getattr(node.func, "id", ""))


def uttered_names(tree):
    """All names, attributes and imported names."""
    for node in ast.walk(tree):
        yield getattr(node, "attr", getattr(node, "id", ""))
        yield from (alias.name for alias in getattr(node, "names", ()) if isinstance(alias, ast.alias))


def reached(start, through):
    """Our modules that an import leads to from ``start``, by way of those in ``through``."""
    trees, found, left = {name.split(".")[0]: tree for name, tree in modules() if "." not in name}, set(), [start]
    while left:
        if (name := left.pop()) not in found and name in trees:
            found.add(name)
            left += set(imported(trees[name])) & set(through)
    return found


def room(name):
    """The room of a module, "" for the private path."""
    first = name.split(".")[0]
    return first if first in ROOMS else ""


def our_imports(name, tree):
    """Our modules that one imports, wherever in its code, as "public.glyphs"; not for typing alone."""
    for_typing = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            for_typing |= {id(inner) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in for_typing:
            continue
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = ["hyperdp_lib", *name.split(".")][: -node.level]
                base = ".".join([*above, *([base] if base else [])])
            found = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for full in found:
            parts = full.split(".")
            if parts[0] != "hyperdp_lib":
                continue
            inner = ".".join(parts[1:])
            while inner and inner not in KNOWN and f"{inner}.__init__" not in KNOWN:
                inner = inner.rpartition(".")[0]
            if inner:
                yield inner


def violations(name, tree):
    """What is wrong with one module, in words."""
    top, place = name.split(".")[0], room(name)
    found = set(imported(tree))
    if top in ALLOWED_IMPORTS:
        if surplus := found - ALLOWED_IMPORTS[top] - STANDARD:
            yield f"{name} imports {', '.join(sorted(surplus))}"
    elif "opendp" in found:
        yield f"{name} draws its own noise from OpenDP"
    if top not in FRONT_DOOR:
        up = sorted({other for other in our_imports(name, tree) if room(other) not in ROOMS[place] | {"", place}})
        if up or (place != "pages" and top != "__init__" and "cli" in found):
            yield f"{name} imports {', '.join(up) or 'cli'}, which lies above it"
    if pickles := found & CODE_EXECUTION:
        yield f"{name} imports {', '.join(sorted(pickles))}, which can execute code from files"
    names = sorted(set(private_names(tree)))
    if names and top not in MAY_HOLD_PRIVATE_DATA:
        yield f"{name} takes {', '.join(names)} but has no row in MAY_HOLD_PRIVATE_DATA"
    if {name, top} & set(BOUNDARY) and (bare := BARE_NAMES & set(parameters(tree))):
        yield f"{name} does not say whether {', '.join(sorted(bare))} is private"
    if "noisy_sum" in set(called_names(tree)) and not {name, top} & MAY_CALL_NOISY_SUM:
        yield f"{name} calls the mechanism"
    if top not in ("mechanism", "auditing") and (early := BEFORE_THE_NOISE & set(uttered_names(tree))):
        yield f"{name} reads {', '.join(sorted(early))}, what the mechanism knows before its noise"
    if top in ALLOWED_IMPORTS and {"print", "getLogger", "breakpoint"} & set(called_names(tree)):
        yield f"{name} prints or logs"


@pytest.mark.parametrize(("name", "tree"), list(modules()), ids=[name for name, _ in modules()])
def test_module_respects_the_trust_boundary(name, tree):
    assert list(violations(name, tree)) == []


def test_every_row_of_the_table_is_there_and_has_a_reason():
    there = {name.split(".")[0] for name, _ in modules()}
    assert set(MAY_HOLD_PRIVATE_DATA) <= there and all(MAY_HOLD_PRIVATE_DATA.values())
    assert set(ROOMS) - {""} == {path.parent.name for path in PACKAGE.glob("*/__init__.py")}


def circles(named_trees):
    """Groups of modules that import one another, directly or by way of others."""
    graph = networkx.DiGraph([(name, other) for name, tree in named_trees for other in our_imports(name, tree)])
    return [sorted(group) for group in networkx.strongly_connected_components(graph) if len(group) > 1]


def test_no_module_imports_itself_by_way_of_others():
    assert circles(modules()) == []
    bad = [("mechanism", "from hyperdp_lib import data"), ("data", "def f():\n    from . import mechanism")]
    assert circles([(name, ast.parse(source)) for name, source in bad]) == [["data", "mechanism"]]


@pytest.mark.parametrize("name", ["mechanism", "accounting", "dp_sgd_accounting", "certificate"])
def test_the_audited_files_stay_short(name):
    assert len((PACKAGE / f"{name}.py").read_text().splitlines()) <= 250


def test_the_privacy_page_names_every_file_that_the_promise_rests_on():
    """Derived: what the certificate imports, what carries private data in a release, and which encoders there are."""
    from hyperdp_lib.auditing.pipeline import miniature

    trees = dict(modules())
    proof = reached("certificate", trees) | reached("verification", trees)
    assert proof == {"mechanism", *proof} and proof <= set(ALLOWED_IMPORTS)
    path = reached("releasing", MAY_HOLD_PRIVATE_DATA)
    parts = [type(part).__module__ for part in miniature()["cells"].encoder.modules()]
    encoders = {name.split(".")[1] for name in parts if name.startswith("hyperdp_lib.")}
    page = (PACKAGE.parent / "book" / "privacy_statement.md").read_text(encoding="utf-8")
    section = page.split("## How to check it yourself")[1].split("\n## ")[0]
    assert set(re.findall(r"`(\w+)\.py`", section)) == proof | path | encoders


def test_the_mechanism_takes_private_data_under_that_name():
    trees = dict(modules())
    assert {"private_batches", "private_embeddings"} <= set(private_names(trees["mechanism"]))


BAD_MODULES = {
    "imports ours": ("mechanism", "from hyperdp_lib import data"),
    "imports ours relatively": ("mechanism", "from . import data"),
    "imports ours by its full name": ("mechanism", "import hyperdp_lib.data"),
    "imports ours inside a function": ("mechanism", "def f():\n    from hyperdp_lib.data import load"),
    "imports dynamically": ("mechanism", "importlib.import_module('hyperdp_lib.data')"),
    "imports torch": ("accounting", "import torch"),
    "logs": ("mechanism", "logging.getLogger('x')"),
    "prints": ("mechanism", "print(total)"),
    "private parameter": ("pages.figures", "def plot(private_images): ..."),
    "private parameter of a public room": ("public.glyphs", "def draw(private_images): ..."),
    "private parameter of the theory": ("theory.bounds", "class World:\n    private_rows: int"),
    "private keyword": ("records", "def record(*, private_count=None): ..."),
    "arrow upward": ("releasing", "from hyperdp_lib.experiments import methods"),
    "arrow upward inside a function": ("nested", "def f():\n    from hyperdp_lib.public.stages import Loop"),
    "arrow upward, relative": ("scores.evaluation", "from ..pages import report"),
    "arrow between rooms": ("baselines.dp_lora", "import hyperdp_lib.experiments.methods"),
    "arrow to the command": ("experiments.sweep", "from hyperdp_lib import cli"),
    "private field": ("diffusion", "class Config:\n    private_mean: float"),
    "unknown module": ("leak", "def f(private_images): ..."),
    "nameless parameter": ("releasing", "def embed(images): ..."),
    "own noise": ("public.training", "import opendp.prelude as dp"),
    "own call": ("pages.figures", "from hyperdp_lib import mechanism\nmechanism.noisy_sum([], config)"),
    "pickle": ("adapter", "import pickle"),
    "exact sum": ("two_steps", "mechanism._exact_sum([], config)"),
    "exact sum by name": ("releasing", "from hyperdp_lib.mechanism import _exact_sum as total"),
}


@pytest.mark.parametrize("fault", BAD_MODULES)
def test_a_bad_module_is_flagged(fault):
    name, source = BAD_MODULES[fault]
    assert list(violations(name, ast.parse(source))) != []
