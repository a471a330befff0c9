"""What all tests share: an empty home, no display, and no GPU tests without a GPU.

It lies beside the code because the examples in `hyperdp_lib` and the notebooks are tests too.
"""

import importlib
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

# Before anything reads them: home and caches are one new folder, which the processes of a run share.
HOME = "HYPERDP_TEST_HOME"
OWN_HOME = HOME not in os.environ
if OWN_HOME:
    os.environ[HOME] = tempfile.mkdtemp(prefix="hyperdp-tests-")
os.environ["HOME"] = os.environ["USERPROFILE"] = os.environ[HOME]
for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME", "HYPERDP_CACHE", "MPLCONFIGDIR",
             "IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "HF_HOME", "TORCH_HOME"):  # fmt: skip
    os.environ.pop(name, None)

import matplotlib  # noqa: E402

matplotlib.use("agg")


def pytest_unconfigure() -> None:
    if OWN_HOME:
        shutil.rmtree(os.environ.pop(HOME), ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="module")
def base_model():
    """A stock base model, tiny and untrained."""
    import torch
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=1, num_layers=1, sample_size=16,
        patch_size=4, num_embeds_ada_norm=1,
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def plain(base_model):
    """A hypernetwork for it, untrained, that reads sums of 16 numbers and makes adapters which do change something."""
    import torch

    from hyperdp_lib.embedding import Encoder, EncoderConfig
    from hyperdp_lib.hypernetwork import HyperNetwork, HyperNetworkConfig

    torch.manual_seed(1)
    encoder = Encoder(EncoderConfig(dimension=16, width=8))
    network = HyperNetwork(encoder, base_model, HyperNetworkConfig(hidden=16, head_width=16, num_blocks=1)).eval()
    with torch.no_grad():
        network.head_b.weight.normal_(std=0.1)
    return network.requires_grad_(False)


@pytest.fixture(scope="module")
def load_benchmark():
    """Import a script of `benchmarks/` by its name, with the others at hand as when it is run; all forgotten later."""
    folder = Path(__file__).parent / "benchmarks"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield importlib.import_module
    for script in folder.glob("*.py"):
        sys.modules.pop(script.stem, None)
