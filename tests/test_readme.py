"""What the README and the page of commands say can be typed, can be typed."""

import re
import shlex
from pathlib import Path

import pytest

from hyperdp_lib import records

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = (ROOT / "book" / "rerun_with_your_epsilon.md").read_text(encoding="utf-8")


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.M | re.S)


def commands(program: str) -> list[list[str]]:
    """Of the README and of the page of commands."""
    found = [*blocks("bash"), *blocks("bash", COMMANDS)]
    lines = [shlex.split(line, comments=True) for block in found for line in block.splitlines()]
    return [line[1:] for line in lines if line and line[0] == program]


def test_there_is_something_to_test() -> None:
    assert len(blocks("python")) == 1 and len(blocks("bash")) == 2
    assert len(README.splitlines()) <= 110
    assert commands("hyperdp") and commands("make") and commands("papermill")


@pytest.mark.parametrize("arguments", commands("hyperdp"), ids=lambda arguments: arguments[0])
def test_hyperdp_commands_parse(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Every option is known: --help is appended, so that nothing runs, and must show each option used."""
    from hyperdp_lib.cli import main

    try:
        code = main([arguments[0], "--help"])
    except SystemExit as stop:
        code = stop.code
    assert code in (0, None)
    help_text = capsys.readouterr().out
    for option in (argument for argument in arguments if argument.startswith("--")):
        assert re.search(rf"{option}\b", help_text), f"hyperdp {arguments[0]} has no {option}"


@pytest.mark.parametrize("target", [word for arguments in commands("make") for word in arguments if "=" not in word])
def test_make_targets_exist(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M)


@pytest.mark.parametrize("arguments", commands("papermill"), ids=lambda arguments: Path(arguments[0]).stem)
def test_papermill_parameters_exist(arguments: list[str]) -> None:
    from papermill import inspect_notebook

    known = inspect_notebook(str(ROOT / arguments[0]))
    used = [arguments[i + 1] for i, argument in enumerate(arguments) if argument == "-p"]
    assert set(used) <= set(known)


def test_tldr_runs(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("python")
    namespace: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), namespace)
    assert tuple(namespace["samples"].images.shape) == (1000, 1, 16, 16)  # type: ignore[attr-defined]
    assert "epsilon" in capsys.readouterr().out.lower()


def test_links_and_files_exist() -> None:
    for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    (layout,) = [block for block in blocks("text") if "hyperdp_lib/" in block]
    told = {line.split()[0].rstrip("/") for line in layout.splitlines()}
    assert all((ROOT / folder).is_dir() for folder in told)
    if tracked := records._git("ls-files"):  # a copy without its history may hold other folders
        folders = {file.split("/")[0] for file in tracked.splitlines() if "/" in file}
        assert told == {folder for folder in folders if not folder.startswith(".")}
