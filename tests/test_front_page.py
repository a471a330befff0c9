"""The README, the page of all results and the picture are what the records say."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hyperdp_lib import records
from hyperdp_lib.pages import front_page, report
from hyperdp_lib.records import Record, load_records

ROOT = Path(__file__).resolve().parent.parent
PAIR = report.MAIN_PAIR
MARKERS = "<!-- results:start -->\nold\n<!-- results:end -->"


def save(folder: Path, method: str, epsilon: float, distances: tuple, size: int = 128, pair: str = PAIR) -> None:
    for seed, distance in enumerate(distances):
        scores = {"accuracy": 1 - distance / 1000, "frechet_distance": distance}
        Record(pair, method, epsilon, 1e-5, "add_or_remove_one", size, seed, scores=scores).save(folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for pair in (*report.GLYPH_SETS, PAIR):
        save(tmp_path, "dp_deepsets_looks_refined", 1.0, (50.0, 52.0), pair=pair)
        save(tmp_path, "dp_deepsets", 1.0, (100.0, 101.0), pair=pair)
        save(tmp_path, "dp_lora", 1.0, (700.0, 701.0), pair=pair)
        save(tmp_path, "lora_non_private", math.inf, (9.0,), pair=pair)
    return tmp_path


@pytest.fixture
def root(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with published records, the sheets of the picture, and a README with two markers."""
    root = tmp_path_factory.mktemp("root")
    for level, name in enumerate(records.SHEETS["README.md"]):
        sheet = np.full((10 * 68 - 4, 20 * 68 - 4), 100, np.uint8)
        sheet[::68, ::68] = level  # the first pixel of each image
        Image.fromarray(sheet).save(folder / name)
    records.publish(folder, root / "book" / "results")
    (root / "README.md").write_text(f"before\n{MARKERS}\nafter\n", encoding="utf-8")
    return root


def test_what_is_committed_is_what_the_records_say() -> None:
    scores = load_records(ROOT / "book" / "results")
    block = f"<!-- results:start -->\n{front_page.block(scores)}\n<!-- results:end -->"
    assert block in (ROOT / "README.md").read_text(encoding="utf-8"), "run: make results-table"
    assert front_page.all_results(scores) == (ROOT / front_page.PAGE).read_text(encoding="utf-8"), "make results-table"
    with Image.open(ROOT / front_page.PICTURE) as picture:
        assert np.array_equal(np.asarray(picture), front_page.samples(ROOT / "book" / "results")), "make results-table"


def test_ours_is_the_first_of_its_methods_in_each_column(folder: Path) -> None:
    note, _, head, _, first, *rest = front_page.table(load_records(folder)).splitlines()
    assert head.count("|") == 2 + len(front_page.COLUMNS) and "than *HyperDP (two steps, refined)* in" in note
    shown = "51.0 ± 1.4"
    cells = (*[shown] * 3, "–", "–", shown, "0.95 ± 0.00")
    assert first == f"| **HyperDP (two steps, refined)** | {' | '.join(cells)} |"
    assert [line.split(" | ")[0].strip("| ") for line in rest] == list(front_page.ROWS)
    assert rest[1].split(" | ")[1] == "700.5 ± 0.7 ▼" and rest[-1].split(" | ")[1] == "9.0"  # one seed: no mark
    assert "–" in rest[2] and "▼" not in rest[2]  # not on record
    one, *_ = report.GLYPH_SETS
    save(folder, "hyperdp", 1.0, (200.0, 202.0), pair=one)
    note, _, _, _, first, one_sum, *_ = front_page.table(load_records(folder)).splitlines()
    assert first.startswith(f"| **HyperDP** | 201.0 ± 1.4 | {shown}\\* | {shown}\\* |")
    assert note.endswith("\\* HyperDP (two steps, refined).") and "than *HyperDP* in" in note
    assert [cell[-1] for cell in one_sum.split(" | ")[1:4]] == ["▲", "▼", "▼"]


def test_rivals_are_named_where_they_are_ahead_of_every_variant_of_ours(folder: Path) -> None:
    assert front_page.rivals_sentence(load_records(folder)) == (
        "No rival has the lowest mean distance at any of the 4 places on record."
    )
    save(folder, "dp_mepf", 1.0, (80.0, 81.0))  # ahead of one variant, not of all
    save(folder, "dp_mepf", 10.0, (20.0, 21.0))
    save(folder, "hyperdp", 10.0, (30.0, 31.0))
    save(folder, "dp_mepf", 10.0, (20.0, 21.0), pair=report.LOOKALIKE_PAIR)
    save(folder, "dp_deepsets", 10.0, (90.0, 91.0), pair=report.LOOKALIKE_PAIR)
    assert front_page.rivals_sentence(load_records(folder)).endswith(
        "at 1 of the 5 places on record (private set, number n of images, ε): "
        "digits (public: glyphs), n = 128, ε = 10 (DP-MEPF)."
    )


def test_the_page_keeps_different_numbers_of_private_images_apart(folder: Path) -> None:
    save(folder, "dp_deepsets", 1.0, (90.0,), size=12)
    text = front_page.all_results(load_records(folder))
    assert "| DP-DeepSets | 0.90 ± 0.00 |" in text and "## 128 labelled digits" in text
    assert text.endswith(
        "## 12 labelled digits\n\nIn all, the classes together. Seeds: 1.\n\n"
        "| method | ε | downstream accuracy | Fréchet distance |\n|---|---:|---:|---:|\n"
        "| DP-DeepSets | 1 | 0.91 | 90.0 |\n"
    )
    assert "No records of other" in front_page.all_results(load_records(folder), "other")


def test_the_picture_has_a_row_of_images_of_each_sheet(root: Path) -> None:
    picture = front_page.samples(root / "book" / "results", each=3)
    assert picture.shape == (3 * 64 + 2 * 12, 30 * 68 - 4)
    assert [set(picture[top, ::68]) for top in (0, 76, 152)] == [{0}, {1}, {2}]
    assert (picture[64:76] == 255).all()


def test_everything_is_written_or_nothing(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert front_page.main(["--root", str(root)]) == 0
    text = (root / "README.md").read_text(encoding="utf-8")
    assert re.fullmatch(r"before\n<!-- .*\n<!-- results:end -->\nafter\n", text, flags=re.S) and "old" not in text
    assert "| DP-SGD LoRA | 700.5 ± 0.7 ▼ |" in text
    assert (root / front_page.PAGE).is_file() and (root / front_page.PICTURE).is_file()
    assert front_page.main(["--root", str(root)]) == 0
    assert (root / "README.md").read_text(encoding="utf-8") == text
    before = {path: path.stat() for path in root.rglob("*")}
    (root / "book" / "results" / records.SHEETS["README.md"][0]).unlink()
    assert front_page.main(["--root", str(root)]) == 2
    (root / "README.md").write_text("no markers", encoding="utf-8")
    assert front_page.main(["--root", str(root)]) == 2
    missing, markers = capsys.readouterr().err.splitlines()
    assert "publish the records" in missing and "put the two markers" in markers
    assert before[root / front_page.PAGE] == (root / front_page.PAGE).stat()


def test_the_headline_names_ours_the_best_rival_and_the_end_without_privacy(tmp_path: Path) -> None:
    pair = next(iter(report.GLYPH_SETS))
    for method, epsilon, distances in (
        ("hyperdp", 1.0, (50.0, 52.0)), ("dp_lora", 1.0, (90.0, 92.0)), ("dp_mepf", 1.0, (80.0, 82.0)),
        ("dp_mepf", 10.0, (1.0, 1.0)), ("nearest_public", 1.0, (2.0, 2.0)), ("lora_non_private", math.inf, (8.0, 9.0)),
    ):  # fmt: skip
        save(tmp_path, method, epsilon, distances, pair=pair, size=report.FEW)
    told = front_page.headline(load_records(tmp_path))
    assert told.startswith("**HyperDP 51.0 ± 1.4; the best rival, DP-MEPF 81.0 ± 1.4; LoRA, *not private* 8.5 ± 0.7.**")
    assert "128 unlabelled images of one digit, ε = 1" in told
