"""The package installs as it says: one set of versions, cheap import, no torchvision, weights packed."""

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# extras that are, on purpose, not in the lock (see pyproject.toml)
UNLOCKED = {"inception", "sweep"}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def locked() -> dict[str, str]:
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    return {canonical(name): version for name, version in (pin.split("==") for pin in pins)}


def python(code: str) -> str:
    """Run code in a fresh interpreter, return what it prints."""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_lock_satisfies_every_bound_of_pyproject() -> None:
    versions = locked()
    extras = PROJECT["optional-dependencies"]
    wanted = [*PROJECT["dependencies"], *(r for extra in extras.keys() - UNLOCKED for r in extras[extra])]
    for requirement in map(Requirement, wanted):
        version = versions.get(canonical(requirement.name))
        assert version is not None, f"{requirement.name} is not in requirements.lock"
        allowed = requirement.specifier.contains(version, prereleases=True)
        assert allowed, f"{requirement}, but {version} is locked"


def test_lock_is_portable() -> None:
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    pins = [line for line in text.splitlines() if line and not line.startswith("#")]
    # no host, no path, no local version tag
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", pin) for pin in pins)
    assert locked()["torch"] == "2.13.0"
    assert "torchvision" not in locked()


def test_conda_environment_agrees_with_pyproject_and_lock() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    plain = [Requirement(entry) for entry in environment["dependencies"] if isinstance(entry, str)]
    conda = {requirement.name: requirement.specifier for requirement in plain}
    (pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert environment["name"] == PROJECT["name"]
    assert conda["python"] == SpecifierSet(PROJECT["requires-python"])
    # everything else comes from pip, under the same constraints and extras as the Makefile's
    assert set(conda) == {"python", "pip", "make"}
    assert pip == ["-c requirements.lock", "-e .[book,test]"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "EXTRAS := .[book,test]" in makefile and "-c requirements.lock -e '$(EXTRAS)'" in makefile


def test_import_is_cheap() -> None:
    code = "import sys, time; t = time.perf_counter(); import hyperdp_lib; t = time.perf_counter() - t; "
    seconds, heavy = python(code + "print(t, 'torch' in sys.modules or 'numpy' in sys.modules)").split()
    assert float(seconds) < 0.5
    assert heavy == "False"


def test_every_module_imports_without_torchvision() -> None:
    code = (
        "import sys; sys.modules['torchvision'] = None\n"  # any import of it now fails
        "import hyperdp_lib\n"
        "for name in hyperdp_lib.__all__: getattr(hyperdp_lib, name)\n"
        "print(len(hyperdp_lib.__all__))"
    )
    assert int(python(code)) > 10


def test_table_of_contents_is_complete() -> None:
    import hyperdp_lib

    listed = set(hyperdp_lib._MODULES)
    present = {
        path.stem if path.is_file() else path.name
        for path in (ROOT / "hyperdp_lib").iterdir()
        if path.suffix == ".py" or (path / "__init__.py").is_file()
    } - {"__init__", "__main__", "cli"}
    assert listed == present
    assert len(hyperdp_lib._FUNCTIONS) == 8
    for name in hyperdp_lib.__all__:
        assert f"`{name}`" in (hyperdp_lib.__doc__ or ""), f"{name} is missing from the docstring"


def free(path: Path) -> bool:
    """Whether weights may be packed: those trained on ImageNet are for non-commercial research only."""
    return "photographs" not in path.relative_to(ROOT / "hyperdp_lib" / "weights").parts[0]


def test_weights_say_their_licence_and_the_non_commercial_ones_are_not_packed(monkeypatch, tmp_path) -> None:
    from hyperdp_lib import data, pretrained

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    package = ROOT / "hyperdp_lib"
    out = {path for pattern in settings["exclude-package-data"]["hyperdp_lib"] for path in package.glob(pattern)}
    out = {path for path in out if path.is_file()}
    assert out == {path for path in (package / "weights").rglob("*") if path.is_file() and not free(path)}
    for folder in (package / "weights").iterdir():
        (line,) = re.findall(r"^- \*\*Licence\.\*\*.*", (folder / "README.md").read_text(encoding="utf-8"), re.M)
        assert ("non-commercial" in line) == (folder.name in pretrained.NON_COMMERCIAL)
    monkeypatch.setattr(pretrained, "WEIGHTS", tmp_path)
    with pytest.raises(data.InputError, match="non-commercial .* source repository"):
        pretrained.resolve("photographs")


@pytest.mark.slow
def test_wheel_holds_the_weights(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    (wheel,) = tmp_path.glob("hyperdp-*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    weights = [path for path in (ROOT / "hyperdp_lib" / "weights").rglob("*") if path.is_file() and free(path)]
    assert weights and not [path for path in packed if "photographs" in path and "/weights/" in path]
    assert {path.relative_to(ROOT).as_posix() for path in weights} <= packed
    assert {"hyperdp_lib/py.typed", "hyperdp_lib/certificate.schema.json"} <= packed


def test_package_data_patterns_cover_the_weights() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"][
        "package-data"
    ]["hyperdp_lib"]
    package = ROOT / "hyperdp_lib"
    covered = {path for pattern in patterns for path in package.glob(pattern)}
    weights = {path for path in (package / "weights").rglob("*") if path.is_file()}
    assert weights and weights <= covered
    for model in (package / "weights").iterdir():  # the promise: 16 MiB a model
        assert sum(path.stat().st_size for path in weights if model in path.parents) <= 16 * 2**20


def test_weights_name_no_place_of_the_machine_that_made_them():
    weights = Path(__file__).resolve().parent.parent / "hyperdp_lib" / "weights"
    texts = [path for path in weights.rglob("*") if path.suffix in (".json", ".md")]
    assert texts and [str(path) for path in texts if re.search(r'"/\w', path.read_text(encoding="utf-8"))] == []
