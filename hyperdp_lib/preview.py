"""What a release would do, told to whoever holds the private images before anything is spent.

Everything here may depend on private images. It is for the operator's screen and becomes part of no release.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from hyperdp_lib import accounting
from hyperdp_lib.artefacts import CERTIFICATE_FILE
from hyperdp_lib.certificate import Certificate
from hyperdp_lib.data import ImageSet, to_levels
from hyperdp_lib.ledger import gaussian_charge, ledger_epsilon
from hyperdp_lib.planning import Plan
from hyperdp_lib.pretrained import COPIES_FILE, geometry, image_hashes, resolve, shipped

LARGE_EPSILON = 10.0
UNLIKE = 1.3  # error on private images over that on a model's own samples, from which on they are called unlike
_MOST_COMPARED = 256  # images that the public models are tried on


@dataclass(frozen=True)
class Preview:
    """What is about to be read, declared public and spent; what is advised; and what looks wrong.

    Attributes
    ----------
    facts
        One line each: images, reading decisions, classes, budget, noise.
    advice
        What a careful operator would change.
    stops
        What looks like a mistake in the input; a release waits until somebody says that it is none.
    """

    facts: tuple[str, ...]
    advice: tuple[str, ...] = ()
    stops: tuple[str, ...] = ()

    def to_plain(self) -> dict[str, Any]:
        """The three lists, for JSON."""
        return {name: list(lines) for name, lines in asdict(self).items()}

    def __str__(self) -> str:
        told = [*self.facts, *(f"advice: {line}" for line in self.advice), *(f"LOOK: {line}" for line in self.stops)]
        return "\n".join(told)


def preview(
    private: ImageSet,
    plan: Plan,
    *,
    inverted: bool = False,
    demonstration: bool = False,
    earlier: Path | None = None,
) -> Preview:
    """What a release of these images by a plan would do, as a `Preview`.

    Parameters
    ----------
    private
        As read from the files, before ``--invert``.
    plan
        Public.
    inverted
        Whether black and white will be swapped.
    demonstration
        Whether the noise has a seed, so that nothing is private.
    earlier
        Folder of a release that is about to be replaced.
    """
    count, names = len(private), private.class_names or ()
    size = tuple(private.images.shape[2:])
    noise_multiplier, delta, neighboring_relation = plan.noise_multiplier, plan.delta, plan.neighboring_relation
    epsilon = accounting.epsilon(noise_multiplier, delta)
    each = count / max(1, len(names))
    ratio = plan.whole.noise_std * math.sqrt(plan.choose(count, noise_multiplier).coordinates) / max(each, 1.0)
    kind = "grey" if private.images.shape[1] == 1 else "colour"
    facts = [
        f"images: {count:,}, {kind}, {size[0]} x {size[1]} as the model sees them",
        *(f"reading: {note}" for note in private.notes),
        f"classes, which become public: {len(names)} ({', '.join(names)})" if names else "classes: none, one adapter",
        *plan.facts(count),
        f"noise over signal: about {ratio:.2g} for {'each class' if names else 'the set'} (above 1 the noise prevails)",
    ]
    advice = []
    if demonstration:
        advice.append("--seed makes reproducible demonstration noise; this release is NOT PRIVATE")
    if count and delta > 1.0 / count:
        advice.append(f"delta {delta:g} is above 1/n for these images; it should be well below")
    if epsilon > LARGE_EPSILON:
        advice.append(f"epsilon {epsilon:.4g} promises little; 1 is a usual choice")
    if ratio > 1:
        advice.append("the noise prevails: pool classes (--unlabelled), collect more images, or do not release")
    if kind == "grey" and count and float(private.images.mean()) * (-1 if inverted else 1) > 0:
        what = "without --invert" if inverted else "with --invert"
        advice.append(f"the model would see more white than black; weights for white on black are better {what}")
    if earlier is not None and (told := _earlier(earlier, noise_multiplier, delta, neighboring_relation)):
        advice.append(told)
    return Preview(tuple(facts), tuple(advice), private.warnings)


def _earlier(folder: Path, noise_multiplier: float, delta: float, neighboring_relation: str) -> str:
    """What the release in ``folder`` and this one cost together, if they are of the same images."""
    try:
        certificate = Certificate.from_json((folder / CERTIFICATE_FILE).read_text(encoding="utf-8"))
        this = gaussian_charge("this release", noise_multiplier, delta, neighboring_relation)
        together = ledger_epsilon((*certificate.ledger, this), delta, neighboring_relation)
    except (OSError, ValueError):
        return ""
    return (
        f"{str(folder)!r} holds a release with epsilon {certificate.epsilon:.4g}; replacing the folder takes nothing "
        f"back: if it is of the same images, both cost epsilon {together:.4g} together"
    )


def likeness_advice(
    made: Preview, private_images: Tensor, source: str, options: Mapping[str, Any]
) -> Preview:
    """The preview with the weights that look nearest, and the command that is recommended.

    Parameters
    ----------
    made
        What is known without a model.
    private_images
        ``(N, C, H, W)`` as the model would see them, black and white swapped where asked.
    source, options
        The command's first argument and its options, by their names in Python.
    """
    from hyperdp_lib.diffusion import load_base_model

    shape = tuple(private_images.shape[1:])
    fitting = [name for name in shipped() if geometry(name) == (shape[1], shape[0])]
    facts = list(made.facts)
    nearest = None
    if fitting and len(private_images):
        models = [load_base_model(resolve(name) / "base") for name in fitting]
        errors = dict(zip(fitting, likeness(private_images, models), strict=True))
        nearest = min(fitting, key=lambda name: float(errors[name][0]))
        told = ", ".join(f"{name} {float(error[0]):.3g}" for name, error in errors.items())
        facts.append(f"weights: {nearest} look nearest (denoising error of the public models on these images: {told})")
        on_these, on_own = errors[nearest].tolist()
        if on_these > UNLIKE * on_own:
            facts.append(f"weights: these images are unlike theirs ({on_these / on_own:.1f} times the error on those)")
    facts.append(f"recommended: {shlex.join(recommended(source, options, nearest))}")
    return replace(made, facts=tuple(facts))


def copies_advice(made: Preview, private_images: Tensor, weights: str) -> Preview:
    """The preview with a warning if images are exactly among those that the weights were trained on.

    ``private_images`` (N, C, H, W) are as read for the weights, before black and white are swapped.
    """
    file = resolve(weights) / COPIES_FILE
    if not file.is_file():
        return made
    known = int(np.isin(image_hashes(to_levels(private_images)), load_file(str(file))["hashes"].numpy()).sum())
    if not known:
        return made
    text = f"{known} of these images are among the public ones of {weights!r}: no release protects what is public"
    return replace(made, advice=(*made.advice, text))


def recommended(source: str, options: Mapping[str, Any], nearest: str | None) -> list[str]:
    """The command for these images, as a list of words."""
    weights = options["weights"]
    if nearest is not None and weights in shipped():
        weights = nearest
    words = ["hyperdp", "release", source]
    for name in ("classes", "window"):
        if options[name] is not None:
            words += [f"--{name}", *(f"{value:g}" if name == "window" else value for value in options[name])]
    words += ["--epsilon", f"{options['epsilon']:g}", "--delta", f"{options['delta']:g}"]
    if options["neighboring_relation"] != "add_or_remove_one":
        words += ["--neighboring-relation", options["neighboring_relation"]]
    words += ["--weights", str(weights)]
    words += [f"--{name}" for name in ("invert", "unlabelled") if options[name]]
    return [*words, "--out", str(options["out"] or "my_release")]


@torch.no_grad()
def likeness(private_images: Tensor, public_models: Sequence[torch.nn.Module], num_samples: int = 64) -> list[Tensor]:
    """Denoising error of public base models on private images and on the model's own samples, (2,) for each model.

    A model that makes a smaller error on the images knows their like better. An error far above that on its own samples
    says that the images are unlike its public data. Not differentially private.

    Parameters
    ----------
    private_images : (N, C, H, W) float in [-1, 1], N at least 1; the first 256 are tried.
    public_models : base models for images of that shape.
    """
    from hyperdp_lib.diffusion import denoising_loss, sample

    found = []
    for model in public_models:
        own = sample(model, None, num_samples, generator=torch.Generator().manual_seed(0))
        errors = [
            denoising_loss(model, images, torch.Generator().manual_seed(1), noise_draws=4).mean()
            for images in (private_images[:_MOST_COMPARED], own)
        ]
        found.append(torch.stack(errors))
    return found
