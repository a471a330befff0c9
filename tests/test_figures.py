"""Figures draw what they are given: pixels unchanged, one line per method, controls at the axis' ends."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.text import Text

from hyperdp_lib.pages import figures
from hyperdp_lib.records import Record, load_records


@pytest.fixture(autouse=True)
def closed_figures():
    figures.house_style()
    yield
    plt.close("all")


def test_grid_keeps_pixels_and_order() -> None:
    images = torch.stack([torch.full((1, 2, 2), value) for value in (-1.0, 0.0, 1.0)])
    _, axes = plt.subplots()
    figures.draw_images(axes, images, columns=2)
    canvas = np.asarray(axes.images[0].get_array())
    assert canvas.shape == (5, 5)
    assert canvas[0, 0] == 0 and canvas[3, 0] == 255 and canvas[0, 3] in (127, 128)


def test_colour_images_and_sheets() -> None:
    images = torch.zeros(6, 3, 4, 4)
    figure = figures.sheets({"a": images, "b": images[:4]}, columns=2)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["a", "b"]
    labels = torch.tensor([0, 0, 1, 1, 1, 2])
    assert len(figures.sample_sheet(images, labels, ["x", "y", "z"], per_class=2).axes) == 3


def test_pictures_in_rows_of_two() -> None:
    sheets = {str(number): np.zeros((10, 20)) for number in range(3)}
    figure = figures.pictures(sheets)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["0", "1", "2", ""]
    assert len(figure.axes[3].images) == 0
    assert len(figures.pictures({"one": np.zeros((10, 20, 3))}).axes) == 1


def test_scores_against_epsilon(tmp_path) -> None:
    cells = [("dp_deepsets", 0.0), ("dp_deepsets", 1.0), ("dp_deepsets", None), ("dp_lora", 1.0)]
    for method, epsilon in cells:
        scores = {"accuracy": 0.5, "frechet_distance": 300.0}
        Record("p-q", method, epsilon, 1e-5, "add_or_remove_one", 10, 0, scores=scores).save(tmp_path)
    figure = figures.scores_against_epsilon(load_records(tmp_path), "p-q")
    left, right = figure.axes
    assert [label.get_text() for label in left.get_xticklabels()] == [
        "0\nno private\ndata",
        "1",
        "∞\nno noise",
    ]
    assert len(left.containers) == len(right.containers) == 2
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["DP-DeepSets", "DP-SGD LoRA"]
    figure.canvas.draw()


def test_waterfall_shows_the_steps_on_record_from_real_to_private(tmp_path) -> None:
    cells = [("dp_deepsets", 1.0, 35.0), ("dp_deepsets", None, 23.0), ("real", None, 4.0), ("dp_deepsets", 10.0, 99.0)]
    for method, epsilon, distance in cells:
        for seed in (0, 1):
            scores = {"accuracy": 0.5, "frechet_distance": distance + seed}
            Record("p-q", method, epsilon, 1e-5, "add_or_remove_one", 10, seed, scores=scores).save(tmp_path)
    distances, accuracies = figures.waterfall(load_records(tmp_path), "p-q", 1.0).axes
    labels = [label.get_text() for label in distances.get_yticklabels()]
    assert [label.split(",")[0] for label in labels] == ["real held-out images", "one sum", "one sum"]
    assert labels[-1].endswith("ε = 1")
    assert [bar.get_width() for bar in distances.patches] == [4.5, 23.5, 35.5]
    assert len(accuracies.patches) == 3


def test_waterfalls_have_a_panel_for_each_private_set_with_something_above_a_release(tmp_path) -> None:
    def save(pair: str, size: int, method: str, epsilon: float | None, distance: float | None, seeds: int = 2) -> None:
        for seed in range(seeds):
            scores = {"frechet_distance": None if distance is None else distance + seed, "features": "net"}
            Record(pair, method, epsilon, 1e-5, "add_or_remove_one", size, seed, scores=scores).save(tmp_path)

    save("p-q", 128, "real", None, None)  # too few held-out images for a distance
    save("p-q", 128, "lora_non_private", None, 9.0, seeds=1)
    save("p-q", 128, "dp_deepsets_nested", None, 20.0)
    save("p-q", 128, "dp_deepsets_nested", 1.0, 30.0)
    save("p-q", 128, "dp_deepsets_nested", 10.0, 99.0)
    save("p-q", 1437, "real", None, 4.0)
    save("p-q", 1437, "dp_deepsets", 1.0, 35.0)
    save("p-r", 128, "dp_deepsets", 1.0, 50.0)  # nothing above it: no panel
    save("p-s", 128, "real", None, 1.0)  # no release: no panel
    few, many = figures.waterfalls(load_records(tmp_path), 1.0).axes
    assert few.get_title(loc="left") == "q (public: p), n = 128 [net]" and "1,437" in many.get_title(loc="left")
    labels = [label.get_text() for label in few.get_yticklabels()]
    assert labels == ["LoRA, not private", "ours nested, no noise", "ours nested, ε = 1"]
    assert [bar.get_width() for bar in few.patches] == [9.0, 20.5, 30.5]
    assert [text.get_text() for text in few.texts] == [" 9.0 (1)", " 20.5 ± 0.7 (2)", " 30.5 ± 0.7 (2)"]
    assert few.get_ylim() == many.get_ylim() == (2.5, -0.5)


def test_waterfalls_without_records_are_empty(tmp_path) -> None:
    Record("p-s", "real", None, 1e-5, "add_or_remove_one", 128, 0, scores={"frechet_distance": 1.0}).save(tmp_path)
    assert not any(axes.patches for axes in figures.waterfalls(load_records(tmp_path), 1.0).axes)


def variant(group: str, text: str, minutes: float, distance: float, sd: float | None = 1.0) -> dict:
    """As `ablations.found` returns it."""
    score = {"epsilon": 1.0, "frechet_distance": {"mean": distance, "sd": sd}}
    return {"group": group, "text": text, "seconds": {"base": 20 * minutes, "joint": 40 * minutes}, "scores": [score]}


def test_training_costs_has_a_labelled_point_for_each_variant() -> None:
    variants = [variant("reference", "as it is", 15, 40), variant("rank", "r = 1", 10, 50, None)]
    figure = figures.training_costs(variants)
    (axes,) = figure.axes
    points = [container.lines[0].get_xydata()[0].tolist() for container in axes.containers]
    assert points == [[15.0, 40.0], [10.0, 50.0]]
    assert [text.get_text() for text in axes.texts] == ["reference: as it is", "rank: r = 1"]
    assert axes.containers[0].lines[0].get_color() == (0.0, 0.0, 0.0) and axes.get_yscale() == "linear"
    assert "ε = 1" in axes.get_ylabel()
    figure.canvas.draw()


def test_training_costs_of_thirteen_close_points_stay_legible() -> None:
    variants = [variant(f"group {i // 2}", f"choice {i}", 15, 40 + 0.01 * i) for i in range(13)]
    figure = figures.training_costs([*variants[:-1], variant("group 6", "poor", 15, 300)])
    (axes,) = figure.axes
    assert axes.get_yscale() == "log"
    figure.canvas.draw()
    boxes = sorted((Text.get_window_extent(text) for text in axes.texts), key=lambda box: box.y0)
    assert len(boxes) == 13 and all(low.y1 <= high.y0 + 1 for low, high in zip(boxes, boxes[1:], strict=False))
    assert all(figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1 for box in boxes)


def test_training_costs_without_records_is_empty() -> None:
    assert not figures.training_costs([]).axes[0].texts


def test_texts_are_moved_apart_no_further_than_needed() -> None:
    assert figures._spread_out([0.1, 0.5, 0.9]) == [0.1, 0.5, 0.9]
    moved = figures._spread_out([0.97, 0.98, 0.99])
    assert moved[-1] <= 1.0 and all(high - low >= 1 / 13 - 1e-9 for low, high in zip(moved, moved[1:], strict=False))
