"""MobileNetV2 as features: the right layers in the right order, one image at a time, and what to do without it."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from hyperdp_lib import data, data_sets
from hyperdp_lib.cli import feature_network
from hyperdp_lib.data import InputError
from hyperdp_lib.scores import evaluation, mobilenet
from hyperdp_lib.scores.mobilenet import FILE, MobileNetV2

HERE = Path(os.environ.get("HYPERDP_DATA") or os.devnull)
# Tiny-ImageNet's name of some classes -> their number among the 1,000 of ImageNet
CLASSES = {
    "goldfish": 1, "king penguin": 145, "lion": 291, "ladybug": 301, "monarch": 323, "African elephant": 386,
    "school bus": 779, "teapot": 849, "orange": 950, "lemon": 951, "banana": 954, "pizza": 963, "alp": 970,
}  # fmt: skip


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A file as torchvision names it, of random weights: each layer's differ."""
    network, rng = MobileNetV2().network, np.random.default_rng(0)
    own = [value for key, value in network.state_dict().items() if "num_batches" not in key]
    arrays = {
        name: rng.uniform(0.5, 1.5, value.shape).astype(np.float32) / max(1, value[0].numel()) ** 0.5
        for name, value in zip(mobilenet.torchvision_names(), own, strict=True)
    }
    path = tmp_path_factory.mktemp("data") / FILE
    np.savez(path, **arrays)
    return path, arrays


def test_every_array_is_read_into_a_layer_of_its_shape(file):
    path, arrays = file
    network = MobileNetV2.from_pretrained(path)
    state = network.network.state_dict()
    first, last = arrays["features.0.0.weight"], arrays["features.18.1.running_var"]
    assert torch.equal(state["conv_stem.first_conv.convolution.weight"], torch.from_numpy(first))
    assert torch.equal(state["conv_1x1.normalization.running_var"], torch.from_numpy(last))
    middle = torch.from_numpy(arrays["features.9.conv.1.0.weight"])  # depth-wise, seventh block after the stem's
    assert torch.equal(state["layer.7.conv_3x3.convolution.weight"], middle)
    assert not any(p.requires_grad for p in network.parameters()) and not network.train().network.training


def test_an_image_has_its_features_whatever_stands_beside_it(file):
    network = MobileNetV2.from_pretrained(file[0])
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    together = evaluation.features(network, images)
    assert together.shape == (3, 1280) and network.name == "mobilenet_v2"
    np.testing.assert_allclose(evaluation.features(network, images[1:2]), together[1:2], rtol=1e-4, atol=1e-4)
    grey = network(images[:1, :1])
    assert torch.allclose(grey, network(images[:1, :1].repeat(1, 3, 1, 1)))


def test_without_the_file_it_says_what_to_do(monkeypatch, tmp_path):
    for folder in ("", str(tmp_path)):
        monkeypatch.setenv("HYPERDP_DATA", folder)
        with pytest.raises(InputError, match="not shipped: put mobilenet_v2_imagenet.npz"):
            feature_network("mobilenet_v2")


def test_another_file_is_refused(file, tmp_path):
    arrays = dict(file[1])
    np.savez(tmp_path / "few.npz", **dict(list(arrays.items())[:5]))
    arrays["features.0.0.weight"] = arrays["features.0.0.weight"][:, :1]
    np.savez(tmp_path / "grey.npz", **arrays)
    for name in ("few", "grey"):
        with pytest.raises(InputError, match="does not hold MobileNetV2"):
            MobileNetV2.from_pretrained(tmp_path / f"{name}.npz")


@pytest.mark.skipif(not (HERE / FILE).is_file(), reason="no weights of MobileNetV2")
@pytest.mark.skipif(not (HERE / "tiny_imagenet32_jpeg.npz").is_file(), reason="no Tiny-ImageNet")
def test_with_the_file_it_knows_photographs():
    """Of 13 classes, far above 1 in 13 although the photographs are tiny; a wrong order of layers is at chance."""
    arrays = np.load(HERE / FILE)
    weight, bias = (torch.from_numpy(arrays[f"classifier.1.{part}"]) for part in ("weight", "bias"))
    source = np.load(HERE / "tiny_imagenet32_jpeg.npz")
    names = [name.split(",")[0] for name in source["class_names"]]
    rows = np.concatenate([np.flatnonzero(source["val_y"] == names.index(name))[:2] for name in CLASSES])
    offsets, content, header = source["val_off"], source["val_bytes"].tobytes(), source["header"].tobytes()
    parts = [content[offsets[row] : offsets[row + 1]] for row in rows]
    bounds = np.cumsum([0, *map(len, parts)])
    pixels = data_sets.decode_jpegs(HERE / "tiny_imagenet32_jpeg.npz", header, b"".join(parts), bounds)
    with torch.no_grad():
        logits = MobileNetV2.from_pretrained()(data.to_model_range(pixels)) @ weight.T + bias
    right = logits[:, list(CLASSES.values())].argmax(1) == torch.arange(len(CLASSES)).repeat_interleave(2)
    assert right.float().mean() > 0.3
