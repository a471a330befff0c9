"""Who wins where: only private methods that make images compete, and a lead within two standard errors is no lead."""

import math
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from matplotlib.colors import to_rgb

from hyperdp_lib.pages import figures, winners
from hyperdp_lib.records import Record, load_records


def save(folder: Path, method: str, epsilon: float, distances: tuple[float, ...], size: int = 128, pair: str = "p-q"):
    for seed, distance in enumerate(distances):
        scores = {"accuracy": 1 - distance / 500, "frechet_distance": distance, "num_images": 2000}
        Record(pair, method, epsilon, 1e-5, "add_or_remove_one", size, seed, scores=scores).save(folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ours is flat in epsilon; DP-SGD LoRA starts worse and ends better. A control has the best score of all."""
    for epsilon, distance in ((1.0, 190.0), (10.0, 49.0), (100.0, 10.0)):
        save(tmp_path, "dp_deepsets", epsilon, (50.0, 51.0))
        save(tmp_path, "dp_lora", epsilon, (distance, distance + 4))
        save(tmp_path, "lora_non_private", epsilon, (1.0, 1.0))
    return tmp_path


def test_winner_is_the_best_mean_among_private_methods(folder: Path) -> None:
    table = load_records(folder)
    for score in ("frechet_distance", "accuracy"):
        strict, middle, loose = winners.contests(table, score)
        assert (strict.winner, loose.winner) == ("dp_deepsets", "dp_lora")
        assert strict.contestants == ("dp_deepsets", "dp_lora") and strict.level == () == loose.level
        # 51 +- 2 is not told from 50.5 +- 0.5
        assert middle.winner == "dp_deepsets" and middle.level == ("dp_lora",)
    assert winners.contests(table[:0], "accuracy") == []
    assert winners.contests(table[table["method"] == "dp_lora"], "accuracy") == []


def test_a_single_seed_wins_without_being_told_apart(tmp_path: Path) -> None:
    save(tmp_path, "dp_deepsets", 10.0, (60.0,))
    save(tmp_path, "dp_lora", 10.0, (7.0,))
    (cell,) = winners.contests(load_records(tmp_path), "frechet_distance")
    assert cell.winner == "dp_lora" and cell.level == ("dp_deepsets",) and cell.contested


def test_variants_of_ours_and_retrieval_alone_are_no_contest(tmp_path: Path) -> None:
    for method, distance in (("dp_deepsets", 9.0), ("dp_deepsets_nested", 8.0), ("nearest_public", 20.0)):
        save(tmp_path, method, 1.0, (distance, distance))
    (cell,) = winners.contests(load_records(tmp_path), "frechet_distance")
    assert cell.winner == "dp_deepsets_nested" and not cell.contested


def test_crossover_lies_between_the_budgets_or_beyond_them(folder: Path) -> None:
    save(folder, "dp_deepsets", 1.0, (50.0, 51.0), size=20)
    save(folder, "dp_ldm", 1.0, (90.0, 91.0), size=20)
    save(folder, "dp_deepsets", 10.0, (50.0,), size=50_000)
    save(folder, "dp_ldm", 10.0, (9.0,), size=50_000)
    table = load_records(folder)
    few, some, many = winners.crossovers(table, "frechet_distance")
    assert [one.num_private for one in (few, some, many)] == [20, 128, 50_000]
    assert math.isinf(few.epsilon) and 10 < some.epsilon < 12 and many.epsilon == 0
    assert (few.few, some.few, many.few) == (False, False, True)
    text = winners.crossover_sentences([few, some, many], "frechet_distance")
    first, second, third = text.splitlines()
    assert "ahead of the best of DP-SGD LoRA, DP-LDM and layer search at the largest budget" in first
    assert "from about ε = 10 on" in second or "from about ε = 11 on" in second
    assert "at every budget on record" in third and "some with one seed" in third
    assert winners.crossovers(table, "frechet_distance", ours="dp_deepsets_nested") == []
    assert "No budget" in winners.crossover_sentences([], "accuracy")


def test_map_colours_the_winner_hatches_ties_and_draws_the_crossover(folder: Path) -> None:
    figures.house_style()
    save(folder, "dp_deepsets", 1.0, (50.0, 51.0), size=1437)
    save(folder, "nearest_public", 1.0, (90.0, 91.0), size=1437)
    predicted = {"floor": ([0.5, 1.0, 2.0], [9000.0, math.inf, 0.0])}
    figure = figures.winner_map(load_records(folder), predicted, simulated=([1.0], [4000.0]))
    distances, accuracies, theory = figure.axes
    cells = [patch for patch in distances.patches if patch.get_label() in figures.METHOD_COLOURS]
    drawn = {(round(patch.get_x() + 0.48), round(patch.get_y(), 2)): patch for patch in cells}
    assert len(drawn) == 4
    rows = sorted({y for _, y in drawn})
    strict, middle, loose = (drawn[column, rows[0]] for column in range(3))
    assert to_rgb(strict.get_facecolor()) == pytest.approx(to_rgb(figures.METHOD_COLOURS["dp_deepsets"]))
    assert to_rgb(loose.get_facecolor()) == pytest.approx(to_rgb(figures.METHOD_COLOURS["dp_lora"]))
    assert (strict.get_hatch(), middle.get_hatch(), loose.get_hatch()) == (None, "///", None)
    # retrieval is no rival: the same winner, paler
    assert sum(drawn[0, rows[1]].get_facecolor()[:3]) > sum(strict.get_facecolor()[:3])
    assert [label.get_text() for label in distances.get_yticklabels()] == ["128", "1,437"]
    line = [one for one in distances.lines if one.get_color() == "black"]
    assert len(line) == 1 and 1.0 < line[0].get_xdata()[0] < 2.0  # between the second budget and the third
    assert len(theory.lines) == 2 and theory.get_xscale() == "log"
    figure.canvas.draw()
    plt.close(figure)


def test_map_with_nothing_on_record_is_empty(tmp_path: Path) -> None:
    save(tmp_path, "dp_deepsets", 1.0, (50.0, 51.0))
    figure = figures.winner_map(load_records(tmp_path), {})
    figure.canvas.draw()
    plt.close(figure)
