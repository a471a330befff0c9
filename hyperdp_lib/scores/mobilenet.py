"""MobileNetV2 of ImageNet, as features in which colour photographs are scored; a file of one's own, not shipped.

Sandler et al. 2018 (arXiv 1801.04381), width 1.0, as transformers builds it: 1,280 features before the classifier.
The weights (7 MB, Apache-2.0, dequantised from the int8 network of Google Coral) are read from the file
``mobilenet_v2_imagenet.npz`` in ``HYPERDP_DATA``, with torchvision's parameter names; the classifier is not needed.

A Fréchet distance in these features is not the FID, which is Inception's, and is never called so. ImageNet contains the
classes of CIFAR-10, and this network was trained on them: good for a judge, while an encoder should not have seen them.

Images are enlarged to 224 x 224, the size the network was trained for, and given in [-1, 1], its own range.
Convolutions pad as TensorFlow does, with which it was trained.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hyperdp_lib.data import InputError, resize, to_channels
from hyperdp_lib.image_files import read_arrays, shown

NAME = "mobilenet_v2"
FILE = "mobilenet_v2_imagenet.npz"
SIDE = 224  # pixels


class MobileNetV2(nn.Module):
    """Features of colour photographs; used like `embedding.FeatureNetwork`. Random weights, until they are read.

    Attributes
    ----------
    name, dimension, channels
        ``"mobilenet_v2"``, 1280, 3.
    image_size : int
        Pixels of a side to which a command brings images first; any size is read.

    Examples
    --------
    >>> MobileNetV2()(torch.zeros(1, 3, 16, 16)).shape
    torch.Size([1, 1280])
    """

    def __init__(self, image_size: int = 32) -> None:
        super().__init__()
        from transformers import MobileNetV2Config, MobileNetV2Model

        self.name, self.dimension, self.channels, self.image_size = NAME, 1280, 3, image_size
        # 1e-5: torchvision's, which the file's variances are made for
        self.network: Any = MobileNetV2Model(MobileNetV2Config(tf_padding=True, layer_norm_eps=1e-5)).eval()

    def forward(self, images: Tensor) -> Tensor:
        """Features ``(N, 1280)`` of ``images`` ``(N, C, H, W)`` in [-1, 1], C = 1 or 3."""
        return self.network(resize(to_channels(images, 3), SIDE)).pooler_output

    def train(self, mode: bool = True) -> MobileNetV2:
        """Frozen: always in evaluation mode, in which an image's features do not depend on its neighbours."""
        return super().train(False)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str] | None = None) -> MobileNetV2:
        """Read the weights; frozen. ``path``: default the file of that name in ``HYPERDP_DATA``.

        Raises
        ------
        InputError
            When the file is missing, or holds something else.
        """
        if path is None:
            path = Path(os.environ.get("HYPERDP_DATA") or os.devnull) / FILE
        path = Path(path)
        if not path.is_file():
            raise InputError(
                f"the features {NAME} are not shipped: put {FILE} (torchvision's parameter names) into the folder that "
                "HYPERDP_DATA names, or score in the features that belong to the weights."
            )
        network = cls()
        own = {key: value for key, value in network.network.state_dict().items() if "num_batches" not in key}
        names = torchvision_names()
        arrays = read_arrays(path, names)
        try:
            state = {key: torch.from_numpy(arrays[name]) for key, name in zip(own, names, strict=True)}
            network.network.load_state_dict(state, strict=False)
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            trouble = str(error).splitlines()[0]
            raise InputError(f"{shown(path)} does not hold MobileNetV2 1.0 ({trouble}): fetch it again.") from error
        return network.requires_grad_(False)


def torchvision_names() -> list[str]:
    """Torchvision's names of all parameters and statistics before the classifier, from the input to the features.

    >>> names = torchvision_names()
    >>> len(names), names[0], names[-1]
    (260, 'features.0.0.weight', 'features.18.1.running_var')
    """
    pairs = [("0.0", "0.1"), ("1.conv.0.0", "1.conv.0.1"), ("1.conv.1", "1.conv.2")]
    for block in range(2, 18):  # wide, depth-wise, narrow
        pairs += [(f"{block}.conv.{a}", f"{block}.conv.{b}") for a, b in (("0.0", "0.1"), ("1.0", "1.1"), ("2", "3"))]
    parts = ("weight", "bias", "running_mean", "running_var")
    return [
        f"features.{name}"
        for convolution, normalisation in [*pairs, ("18.0", "18.1")]
        for name in (f"{convolution}.weight", *(f"{normalisation}.{part}" for part in parts))
    ]
