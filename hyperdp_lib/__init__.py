"""HyperDP: private images in, one noisy sum, a LoRA adapter with a privacy certificate out.

The modules, in the order in which to read them:

==================  =======================================================================
`data`              images, named data sets, the one range contract
`data_sets`         the named data sets that lie outside the library
`originals`         where their original files come from, and how they are checked
`duplicates`        are private images in the public data? A research check, not DP
`image_files`       image folders and `.npz` files, and what is wrong with them
`glyphs`            the public tasks, rendered from fonts
`drawings`          public tasks from drawings by people
`photographs`       public tasks from photographs in colour
`embedding`         image -> vector of norm at most 1, one example at a time
`mechanism`         clip, sum, add Gaussian noise once: the only place where private becomes public
`accounting`        (epsilon, delta) <-> noise multiplier
`certificate`       what was released, and its independent check
`verification`      the independent route by which `verify` recomputes a certificate
`ledger`            everything that touched private data, added up
`artefacts`         files written whole or not at all, with checksums
`strict_json`       JSON without surprises
`preview`           what a release would do, told to the operator before anything is spent
`progress`          progress bars, on terminals only
`hypernetwork`      noisy sum -> LoRA adapter
`adapter`           many adapters in one batch, PEFT folders
`lora_geometry`     which layers are adapted, with which shapes, read from PEFT
`lora_products`     the batched LoRA products
`diffusion`         the base denoiser, its loss, sampling
`training`          public pre-training and meta-training
`release`           the one composition of all of the above
`nested`            a release with as many coordinates as declared size and noise support
`cells`             several means instead of one, as far as declared size and noise support
`looks`             two sums instead of one: where the images lie, then how they differ from there
`prior`             what public data sets say about the means behind a noisy sum
`refinement`        better decoding of a release, from the release alone
`classifier`        what a release says about labels, and samples that keep it
`evaluation`        research metrics, not differentially private
`mobilenet`         features for colour photographs, from a file of one's own
`reference_stats`   features of a reference set, summed up in a file
`auditing`          attacks on the mechanism and on what it releases, and the mutants they must catch
`private_scores`    scores that may be published: noisy, and charged
`baselines`         the rivals and the controls
`theory`            the synthetic linear setting: risks, bounds, simulations
`comparison`        the grid methods x epsilon x seeds
`sweep`             the cells of a whole sweep, run by `workflow/Snakefile`
`tuning`            settings of the comparison, found on public stand-ins
`ablations`         what each choice of the public training buys
`forecast`          what to expect of a release, from public data alone
`records`           result records with provenance
`report`            records -> tables and sentences
`marks`             which methods of a table differ, with a false-alarm rate for all of it
`front_page`        the results of the README and of the page with all of them
`winners`           who wins at each budget and number of images, and where DP-SGD overtakes
`evidence`          records -> checks of a claim, place by place
`claims`            what was claimed, and whether the records bear it out
`data_cards`        data sets and their checks -> tables of the book
`comparison_tables` the tables of the chapter on rivals
`figures`           records and images -> figures
`notebook`          what the notebooks share
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
    "ablations",
    "accounting",
    "adapter",
    "artefacts",
    "auditing",
    "baselines",
    "cells",
    "certificate",
    "claims",
    "classifier",
    "comparison",
    "comparison_tables",
    "data",
    "data_cards",
    "data_sets",
    "diffusion",
    "drawings",
    "duplicates",
    "embedding",
    "evaluation",
    "evidence",
    "figures",
    "forecast",
    "front_page",
    "glyphs",
    "hypernetwork",
    "image_files",
    "ledger",
    "looks",
    "lora_geometry",
    "lora_products",
    "marks",
    "mechanism",
    "mobilenet",
    "nested",
    "notebook",
    "originals",
    "photographs",
    "preview",
    "prior",
    "private_scores",
    "progress",
    "records",
    "reference_stats",
    "refinement",
    "release",
    "report",
    "strict_json",
    "sweep",
    "theory",
    "training",
    "tuning",
    "verification",
    "winners",
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
