"""Figures draw what they are given: pixels unchanged, one line per method, controls at the axis' ends."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from hyperdp_lib import figures
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
