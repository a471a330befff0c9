"""Progress bars go to terminals only, and from one place."""

import ast
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hyperdp_lib import progress
from hyperdp_lib.data import load_named_or_path
from hyperdp_lib.diffusion import sample
from hyperdp_lib.progress import progress_bar
from hyperdp_lib.public import glyphs

ROOT = Path(__file__).resolve().parent.parent


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def imported(path: Path) -> set[str]:
    tree = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return {
        name.split(".")[0]
        for node in tree
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""])
    }


def test_tqdm_is_imported_by_the_helper_alone() -> None:
    files = [file for folder in ("hyperdp_lib", "data_scripts", "benchmarks") for file in (ROOT / folder).rglob("*.py")]
    users = [file.relative_to(ROOT).as_posix() for file in files if "tqdm" in imported(file)]
    assert len(files) > 60 and users == ["hyperdp_lib/progress.py"]


def test_the_library_writes_nothing_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str], base_model
) -> None:
    """Without the two seconds' grace: what shows a bar at all shows it here."""
    monkeypatch.setattr(progress, "DELAY", 0)
    monkeypatch.setenv("HYPERDP_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr(glyphs, "FONTS", ("cmr10",))
    glyphs.GlyphTasks(glyphs.GlyphConfig(num_strokes=20))
    assert len(list((tmp_path / "empty").glob("*.npz"))) == 2
    sample(base_model, None, 2, generator=torch.Generator().manual_seed(0), num_steps=2, progress=True)
    (tmp_path / "images").mkdir()
    for number in range(3):
        pixels = np.random.default_rng(number).integers(256, size=(16, 16), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
    assert len(load_named_or_path(tmp_path / "images", 16, 1)) == 3
    assert capfd.readouterr() == ("", "")


def test_a_bar_on_a_terminal_comes_after_the_delay_and_goes_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    monkeypatch.setattr(progress, "DELAY", 0.2)
    clock = iter(np.arange(0, 100, 0.15))
    monkeypatch.setattr("time.monotonic", lambda: float(next(clock)))
    with progress_bar(total=3, desc="first") as bar:
        bar.set_description("too early")
        assert not terminal.getvalue()
        bar.set_description("late enough")
        assert "late enough" in terminal.getvalue()
        bar.reset(total=5)
    assert terminal.getvalue().endswith("\r") and not terminal.getvalue().split("\r")[-2].strip()


def test_a_short_task_and_an_unwanted_bar_show_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    assert list(progress_bar("abc")) == list("abc")
    monkeypatch.setattr(progress, "DELAY", 0)
    assert list(progress_bar("abc", show=False)) == list("abc")
    assert not terminal.getvalue()
    assert list(progress_bar("abc", desc="shown")) == list("abc")
    assert "shown" in terminal.getvalue()
