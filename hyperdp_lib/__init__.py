"""HyperDP: private images in, one noisy sum, a LoRA adapter with a privacy certificate out.

The private path, in the order in which to read it:

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
`hypernetwork`      noisy sum -> LoRA adapter
`adapter`           many adapters in one batch, PEFT folders
`lora_geometry`     which layers are adapted, with which shapes, read from PEFT
`lora_products`     the batched LoRA products
`diffusion`         the base denoiser, its loss, sampling
`nested`            a release with as many coordinates as declared size and noise support
`cells`             several means instead of one, as far as declared size and noise support
`pretrained`        trained public weights on disk
`prior`             what public data sets say about the means behind a noisy sum
`looks`             two sums instead of one: where the images lie, then how they differ from there
`release`           the one composition of all of the above
`refinement`        better decoding of a release, from the release alone
`classifier`        what a release says about labels, and samples that keep it
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

Importing this package is cheap: each module is imported when it is first used.

>>> import hyperdp_lib
>>> round(hyperdp_lib.accounting.noise_multiplier(epsilon=1.0, delta=1e-5), 1)
3.7
"""

from __future__ import annotations

import importlib
from typing import Any

__all__ = [
    "accounting",
    "adapter",
    "artefacts",
    "auditing",
    "baselines",
    "budget",
    "cells",
    "certificate",
    "classifier",
    "data",
    "data_sets",
    "diffusion",
    "dp_sgd_accounting",
    "embedding",
    "experiments",
    "hypernetwork",
    "image_files",
    "ledger",
    "looks",
    "lora_geometry",
    "lora_products",
    "mechanism",
    "nested",
    "pages",
    "pretrained",
    "preview",
    "prior",
    "progress",
    "public",
    "records",
    "refinement",
    "release",
    "risk",
    "scores",
    "strict_json",
    "theory",
    "verification",
]


def __getattr__(name: str) -> Any:
    """Import a module of the table of contents on first use (PEP 562)."""
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    if name == "__version__":
        from importlib.metadata import version

        return version("hyperdp")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, "__version__"])
