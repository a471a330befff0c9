"""Public tasks: no digits, no look-alikes unless asked, fresh every time, split by character."""

import os
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
import torch

from hyperdp_lib.public.glyphs import GlyphConfig, GlyphTasks, cached_fields, is_lookalike, is_number, load_shapes

SMALL = GlyphConfig(num_strokes=20)


@pytest.fixture(scope="module")
def tasks():
    return GlyphTasks(SMALL, progress=False)


def test_no_shape_is_a_digit():
    names = [n for n in load_shapes(SMALL, progress=False)[1] if len(n) == 1]
    assert len(names) > 10_000  # the fonts were really read
    assert not [n for n in names if unicodedata.numeric(n, None) is not None or n in "0123456789"]


@pytest.mark.parametrize("number", "0123456789٣५Ⅶ½②⁴₇㊈")
def test_numbers_of_every_script_are_numbers(number):
    assert is_number(number)


@pytest.mark.parametrize("letter", "OoQDlIiZzSsBbGgEθƐЗзЭЧбꓢꓳ∞&")
def test_lookalikes(letter):
    assert is_lookalike(letter)


@pytest.mark.parametrize("letter", "AaHhKkMmNnRrTtWwXxΩΨЖщقש")
def test_not_everything_is_a_lookalike(letter):
    assert not is_lookalike(letter)


def test_lookalikes_are_left_out_unless_asked_for(tasks):
    everything = GlyphTasks(GlyphConfig(num_strokes=20, lookalikes=True), progress=False)
    extra = set(everything.names) - set(tasks.names)
    assert {"O", "S", "Z"} <= extra and all(map(is_lookalike, extra))


def test_splits_share_no_character(tasks):
    held_out = GlyphTasks(SMALL, "held_out", progress=False)
    assert not set(held_out.names) & set(tasks.names)
    assert 0.02 < held_out.num_classes / tasks.num_classes < 0.12
    with pytest.raises(ValueError, match="held_out"):
        GlyphTasks(SMALL, "test", progress=False)


@pytest.mark.parametrize("mixed", [0.0, 0.4, 1.0])
def test_a_declared_share_of_tasks_is_mixed(mixed):
    """A mixed task has two or three shapes, seldom the same twice. False alarm below 1e-6 (5 s.d. of a share)."""
    tasks = GlyphTasks(GlyphConfig(num_strokes=20, mixed=mixed), progress=False)
    shapes = tasks._choose_shapes(2000, 40, torch.Generator().manual_seed(0), None)
    several = (shapes != shapes[:, :1]).any(1).float().mean().item()
    slack = 5 * (mixed * (1 - mixed) / 2000) ** 0.5
    assert 0.75 * mixed - slack <= several <= mixed + slack  # a character may have one shape only


def test_images_obey_the_range_contract_and_are_not_blank(tasks):
    images = tasks.sample_tasks(40, 6, torch.Generator().manual_seed(0))
    assert images.shape == (40, 6, 1, 16, 16) and images.dtype == torch.float32
    assert images.amin() >= -1 and images.amax() <= 1
    ink = (images > 0).float().mean((2, 3, 4))
    assert ((ink > 0.005) & (ink < 0.8)).float().mean() > 0.9


def test_same_generator_same_tasks_and_else_fresh_ones(tasks):
    first = tasks.sample_tasks(4, 3, torch.Generator().manual_seed(1))
    assert torch.equal(first, tasks.sample_tasks(4, 3, torch.Generator().manual_seed(1)))
    assert not torch.equal(first, tasks.sample_tasks(4, 3, torch.Generator().manual_seed(2)))


def test_images_of_a_task_resemble_each_other(tasks):
    images = tasks.sample_tasks(60, 20, torch.Generator().manual_seed(3)).flatten(2)
    within = images.var(1).mean()
    between = images.mean(1).var(0).mean()
    assert within > 0.02 and between > 0.5 * within


def test_a_given_class_draws_that_shape():
    disc = np.full((40, 40), -100, np.int8)
    disc[10:30, 10:30] = 100
    empty = np.full((2, 40, 40), -127, np.int8)
    tasks = GlyphTasks.from_fields(np.stack([np.stack([disc, disc]), empty]), ["disc", "nothing"])
    images = tasks.sample_tasks(8, 4, torch.Generator().manual_seed(0), classes=torch.tensor([0, 1] * 4))
    ink = images.mean((1, 2, 3, 4))
    assert ink[0::2].mean() > ink[1::2].mean() + 0.2


def test_shapes_of_ones_own_are_described_by_their_owner():
    fields = np.zeros((3, 2, 40, 40), np.int8)
    own = GlyphTasks.from_fields(fields, ["a", "b", "b"], text="three wheels")
    assert own.describe() == {"text": "three wheels", "shapes": 3, "classes": 2}


@pytest.fixture
def made(monkeypatch, tmp_path):
    """Fields from an empty cache in ``$XDG_CACHE_HOME``, and how often they were made."""
    monkeypatch.delenv("HYPERDP_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    calls = []

    def make():
        calls.append(1)
        return np.full((1, 2, 40, 40), len(calls), np.int8), ["a"]

    return lambda key=("test",): (cached_fields(key, make)[0].flat[0], len(calls))


def test_shapes_are_made_once_and_kept_where_the_user_keeps_caches(made, monkeypatch, tmp_path):
    assert made() == made() == (1, 1)
    (file,) = (tmp_path / "xdg" / "hyperdp").glob("*.npz")
    for damaged in (b"", file.read_bytes()[:200], b"not an archive"):
        file.write_bytes(damaged)
        value, calls = made()
        assert value == calls and made() == (value, calls)
    monkeypatch.setattr("hyperdp_lib.public.glyphs.metadata.version", lambda name: "another")
    assert made()[1] == 5  # other libraries, other shapes
    monkeypatch.setenv("HYPERDP_CACHE", str(tmp_path / "own"))
    made()
    assert len(list((tmp_path / "own").glob("*.npz"))) == 1


def test_shapes_are_made_without_a_place_for_them(made, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("HYPERDP_CACHE", str(tmp_path / "file" / "below"))
    assert made() == (1, 1) and made() == (2, 2)


def test_two_processes_make_shapes_once(tmp_path):
    code = (
        "import sys, time; import numpy as np; from hyperdp_lib.public.glyphs import cached_fields\n"
        "def make():\n"
        "    print('made'); time.sleep(2); return np.zeros((1, 2, 40, 40), np.int8), ['a']\n"
        "cached_fields(('test',), make)"
    )
    environment = {**os.environ, "HYPERDP_CACHE": str(tmp_path)}
    start = [sys.executable, "-c", code]
    both = [subprocess.Popen(start, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert sorted(process.communicate()[0] for process in both) == ["", "made\n"]
