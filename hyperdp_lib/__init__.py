"""HyperDP: private images in, a few noisy numbers, a LoRA adapter with a privacy certificate out.

Eight functions are all that most people need: `load_images`, `load_weights`, `plan`, `release`, `load_release`,
`verify`, `train_on_images` (public images of one's own) and `compare` (with other methods; research).

The modules behind them. The private path, in the order in which to read it:

==================  =======================================================================
`data`              images, named data sets, the one range contract
`data_sets`         the named data sets that lie outside the library
`image_files`       image folders and `.npz` files, and what is wrong with them
`embedding`         image -> vector of norm at most 1, one example at a time
`mechanism`         clip, sum, add Gaussian noise once: the only place where private becomes public
`accounting`        (epsilon, delta) <-> noise multiplier
`dp_sgd_accounting` the same for the DP-SGD of the rivals
`ledger`            everything that touched private data, added up
`certificate`       what was released, and its independent check
`verification`      the independent route by which `verify` recomputes a certificate
`risk`              what the best possible attack achieves, in plain words
`budget`            a file that holds several releases of the same images to one budget
`artefacts`         files written whole or not at all, with checksums
`strict_json`       JSON without surprises
`progress`          progress bars, on terminals only
`measure`           private images -> noisy sums: the only loop over private data
`hypernetwork`      noisy sum -> LoRA adapter
`adapter`           many adapters in one batch, PEFT folders
`lora_geometry`     which layers are adapted, with which shapes, read from PEFT
`lora_products`     the batched LoRA products
`diffusion`         the base denoiser, its loss, sampling
`nested`            as many coordinates as number of images and noise support
`cells`             several means instead of one, as far as number of images and noise support
`pretrained`        trained public weights on disk
`prior`             what public data sets say about the means behind a noisy sum
`two_steps`         two sums: where the images lie, then how they differ from there
`refinement`        better decoding of a release, from the release alone
`planning`          how a budget is spent; public
`releasing`         plan, measure, certify, decode, refine
`release_folder`    a release on disk
`classifier`        what a release says about labels
`preview`           what a release would do, told to the operator before anything is spent
`records`           result records with provenance
==================  =======================================================================

The rooms, each of which may import those above it:

==================  =======================================================================
`public`            public task sources and public training; no private image, ever
`scores`            research metrics on private test data, and noisy scores that are charged
`baselines`         the rivals and the controls
`theory`            the synthetic linear setting: risks, bounds, simulations
`auditing`          attacks on the mechanism and on what it releases, and the mutants they must catch
`experiments`       the table of methods, the comparison, its tuning, sweep and forecasts
`pages`             records -> tables, verdicts, figures: what the book and the README show
==================  =======================================================================

Importing this package is cheap: each function and module is imported when it is first used.

>>> import hyperdp_lib as hyperdp
>>> round(hyperdp.accounting.noise_multiplier(epsilon=1.0, delta=1e-5), 1)
3.7
"""

from __future__ import annotations

import importlib
from typing import Any

_FUNCTIONS = {
    "load_images": "data",
    "load_weights": "pretrained",
    "plan": "planning",
    "release": "releasing",
    "load_release": "release_folder",
    "verify": "verification",
    "train_on_images": "public.image_training",
    "compare": "experiments.comparison",
}
_MODULES = (
    "accounting", "adapter", "artefacts", "auditing", "baselines", "budget", "cells", "certificate",
    "classifier", "data", "data_sets", "diffusion", "dp_sgd_accounting", "embedding", "experiments",
    "hypernetwork", "image_files", "ledger", "lora_geometry", "lora_products", "measure", "mechanism", "nested",
    "pages", "planning", "pretrained", "preview", "prior", "progress", "public", "records", "refinement",
    "release_folder", "releasing", "risk", "scores", "strict_json", "theory", "two_steps", "verification",
)  # fmt: skip
__all__ = [*_FUNCTIONS, *_MODULES]


def __getattr__(name: str) -> Any:
    """Import a function or module of the table of contents on first use (PEP 562)."""
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(f"{__name__}.{_FUNCTIONS[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name == "__version__":
        from importlib.metadata import version

        return version("hyperdp")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, "__version__"])
