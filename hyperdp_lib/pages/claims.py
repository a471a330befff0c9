"""What was claimed, and whether the records bear it out: claims and their tests -> verdicts, commands, compute.

A claim is a sentence of somebody's and a test of `pages.evidence`. Its verdict is computed when the page is made;
no result is written here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hyperdp_lib.pages import evidence as tests
from hyperdp_lib.pages.evidence import ACCURACY, DISTANCE, FAILS, HOLDS, PLENTY, UNDECIDED, Check, Evidence, Test
from hyperdp_lib.pages.report import METHOD_LABELS, order
from hyperdp_lib.pages.theory_verdicts import TIE
from hyperdp_lib.pages.winners import BEST_DP_SGD, is_ours

REPRODUCED, PARTLY, NOT = "reproduced", "partly", "not"
NO_RECORD, NOT_TESTABLE = "no record yet", "not testable here"
_SHOWN = 16  # checks of a claim that are listed one by one


@dataclass(frozen=True)
class Claim:
    """A sentence and how it is tested.

    Attributes
    ----------
    group : str
        A key of `GROUPS`.
    title : str
        The claim in a few words.
    reported : str
        What was said, with its numbers where there are any, and on what.
    source : str
        By whom.
    rule : str
        When it holds at a place; it fails if the opposite does.
    why : str
        What differs here, or what decides: how things are made, no results.
    test : callable or None
        `None` if it cannot be tested here.
    """

    group: str
    title: str
    reported: str
    source: str
    rule: str
    why: str
    test: Test | None = None


@dataclass(frozen=True)
class Finding:
    """A claim and its checks."""

    claim: Claim
    checks: tuple[Check, ...]

    @property
    def verdict(self) -> str:
        """Of the checks in the claim's own regime."""
        return verdict(self.claim, [one.outcome for one in self.checks if one.inside])

    @property
    def elsewhere(self) -> str:
        """Of the other checks, or a dash."""
        outcomes = [one.outcome for one in self.checks if not one.inside]
        return verdict(self.claim, outcomes) if outcomes else "–"

    @property
    def aside(self) -> str:
        """`; elsewhere: partly`, or nothing."""
        return "" if self.elsewhere == "–" else f"; elsewhere: {self.elsewhere}"


def verdict(claim: Claim, outcomes: Sequence[str]) -> str:
    """One of reproduced (all hold), partly (some hold), not (none holds, some fail), undecided, or nothing to judge."""
    if claim.test is None:
        return NOT_TESTABLE
    if not outcomes:
        return NO_RECORD
    if HOLDS in outcomes:
        return REPRODUCED if set(outcomes) == {HOLDS} else PARTLY
    return NOT if FAILS in outcomes else UNDECIDED


def judge(evidence: Evidence, claims: Sequence[Claim] | None = None) -> list[Finding]:
    """Every claim (of `CLAIMS` unless others are given) with what the evidence says of it."""
    return [Finding(one, tuple(one.test(evidence)) if one.test else ()) for one in claims or CLAIMS]


# ---- text ------------------------------------------------------------


def summary_table(findings: Sequence[Finding]) -> str:
    """A row for each claim: verdict, how many checks hold, fail and are undecided, images, seeds and compute."""
    lines = [
        "| claim | of | verdict | hold, fail, undecided | n | seeds | compute |",
        "|---|---|---|---|---:|---:|---:|",
    ]
    for one in findings:
        row = (
            one.claim.title,
            one.claim.source,
            f"**{one.verdict}**" + one.aside,
            _counts(one.checks),
            _several(one.checks, "num_private"),
            _seeds(one.checks),
            _compute(one.checks)[1],
        )
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def details(finding: Finding) -> str:
    """Everything about one claim, as Markdown."""
    claim, checks = finding.claim, finding.checks
    lines = [f"**{claim.title}: {finding.verdict}{finding.aside}.**", ""]
    lines += [f"*Reported* ({claim.source}): {claim.reported}"]
    if claim.test is not None:
        lines += ["", f"*Holds where* {claim.rule}"]
    lines += ["", f"*Why:* {claim.why}"]
    if checks:
        lines += ["", *_listed(checks)]
        files, seconds = _compute(checks)
        commands = dict.fromkeys(command for _, command, _ in sorted(_sources(checks)) if command)
        lines += ["", f"Made by ({files}, {seconds}):", "", "```bash", *commands, "```"]
    return "\n".join(lines)


def variants_table(evidence: Evidence) -> str:
    """Verdicts of the claims about our method, were it each of its variants on record."""
    methods = order({method for method in evidence.scores.get("method", ()) if is_ours(method)})
    ours = [one for one in CLAIMS if one.group in ("paper", "lesson") and one.test is not None]
    columns = []
    for method in methods:
        judged = judge(Evidence(evidence.scores, evidence.folder, method, evidence.epsilon), ours)
        columns.append([one.verdict + one.aside for one in judged])
    lines = ["| claim | " + " | ".join(METHOD_LABELS.get(one, one) for one in methods) + " |"]
    lines += ["|---|" + "---|" * len(methods)]
    lines += [f"| {one.title} | " + " | ".join(row) + " |" for one, *row in zip(ours, *columns, strict=True)]
    return "\n".join(lines) if methods else "*No record of our method.*"


def _listed(checks: Sequence[Check]) -> list[str]:
    """The checks as a table; of many, those that do not hold first, and how many there are besides."""
    first = sorted(checks, key=lambda one: one.outcome == HOLDS)[:_SHOWN]
    shown = [one for one in checks if one in first]
    lines = ["| where | got | n | images scored | seeds | outcome |", "|---|---|---:|---:|---:|---|"] if shown else []
    for one in shown:
        outcome = one.outcome if one.inside else f"{one.outcome} (elsewhere)"
        size, images = _several([one], "num_private"), _several([one], "num_images")
        lines.append(f"| {one.where} | {one.got} | {size} | {images} | {_seeds([one])} | {outcome} |")
    if len(shown) < len(checks):
        not_shown = _counts([one for one in checks if one not in shown])
        lines += ["", f"Not listed, {len(checks) - len(shown)} more (hold, fail, undecided): {not_shown}."]
    return lines


def _counts(checks: Sequence[Check]) -> str:
    """`3, 0, 1`, and the same elsewhere in brackets."""
    parts = []
    for inside in (True, False):
        chosen = [one.outcome for one in checks if one.inside == inside]
        parts.append(", ".join(str(chosen.count(kind)) for kind in (HOLDS, FAILS, UNDECIDED)) if chosen else "")
    return (parts[0] or "–") + (f" ({parts[1]})" if parts[1] else "")


def _several(checks: Sequence[Check], name: str) -> str:
    found = sorted(set().union(*(getattr(one, name) for one in checks)))
    if len(found) > 3:
        return f"{found[0]:,} to {found[-1]:,}"
    return ", ".join(f"{one:,}" for one in found) or "–"


def _seeds(checks: Sequence[Check]) -> str:
    found = sorted({len(one.seeds) for one in checks if one.seeds})
    return "–" if not found else f"{found[0]}" if len(found) == 1 else f"{found[0]} to {found[-1]}"


def _sources(checks: Sequence[Check]) -> set[tuple[str, str, float]]:
    return set().union(*(one.sources for one in checks))


def _compute(checks: Sequence[Check]) -> tuple[str, str]:
    """How many files, and their seconds in all."""
    files = {name: seconds for name, _, seconds in _sources(checks)}
    known = [seconds for seconds in files.values() if not math.isnan(seconds)]
    text = f"{len(files)} record{'s' * (len(files) != 1)}"
    return text, _time(sum(known)) if known else "–" if not files else "time not recorded"


def _time(seconds: float) -> str:
    """
    >>> _time(42.3), _time(600), _time(9000)
    ('42 s', '10 min', '2.5 h')
    """
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5970 else f"{seconds / 3600:.1f} h"


# ---- the claims ------------------------------------------------------------

GROUPS = {
    "paper": "the paper",
    "linear": "the linear setting",
    "rivals": "the rivals' papers and a benchmark",
    "lesson": "our own lessons",
}
_PAPER, _OURS = "Nishikawa et al. 2026", "this book"
_BENCHMARK = "Gong et al. 2025"
_REGIME = "128 private images of CIFAR-10, LoRA of a diffusion model, several budgets; no number was available to us"
_OTHER_DATA = "Other data, other models, rivals written by us; distances are in other features than those of FID."
_LARGE = "45,000 to 55,000 private images"
_AT_128 = "in the regime of the claim if n = 128."
_AT_MANY = f"in the regime of the claim if n is {PLENTY:,} or more."


def _lower_fid(rival: str, said: str, why: str) -> Claim:
    label = METHOD_LABELS[rival]
    return Claim(
        "paper", f"Lower distance than {label}", f"{said}; {_REGIME}.", _PAPER,
        f"the mean Fréchet distance of ours is below that of {label}, at each finite ε; {_AT_128}",
        why, tests.better(None, rival, DISTANCE, tests.in_paper),
    )  # fmt: skip


CLAIMS: tuple[Claim, ...] = (
    _lower_fid("dp_lora", "lower FID than DP-SGD LoRA", _OTHER_DATA),
    _lower_fid(
        "dp_ldm", "lower FID than other methods guided by public data, for which DP-LDM stands here",
        f"{_OTHER_DATA} Which methods these are, and how they were run, we do not know.",
    ),
    _lower_fid(
        "dp_mepf", "lower FID than other methods guided by public data, for which DP-MEPF stands here",
        f"{_OTHER_DATA} DP-MEPF releases once, as ours does, and fits its generator to features of our encoder: it is "
        "close in kind to the score.",
    ),
    Claim(
        "paper", "The lead over DP-SGD LoRA is largest at strict budgets",
        f"most clearly at strict budgets such as ε = 1; {_REGIME}.", _PAPER,
        f"the difference of the two distances is larger at the strict ε than at a larger finite one; {_AT_128}",
        "DP-SGD's noise lies on every coordinate of every step, and one noisy sum's on a few numbers.",
        tests.clearest_when_strict,
    ),
    Claim(
        "paper", "Ours hardly depends on ε",
        "it holds to strict budgets where n = 128. We could not verify the note and quote no number of it.",
        "secondary note, unverified",
        "the distance at the strict ε is less than twice that at the loosest budget on record: the noise makes up less "
        f"than half of it; {_AT_128}",
        "One sum for each class: with ten classes 128 images are a dozen to a sum, and the noise is the same.",
        tests.twice(None, tests.in_paper, more=False),
    ),
    Claim(
        "paper", "DP-SGD LoRA collapses at strict ε",
        "DP-SGD collapses where n = 128: from the same note.",
        "secondary note, unverified",
        f"its distance at the strict ε is more than twice that at the loosest budget on record; {_AT_128}",
        "As above, and the search for settings was small.",
        tests.twice("dp_lora", tests.in_paper, more=True),
    ),
    Claim(
        "paper", "FID on CIFAR-10, in numbers", f"FIDs at several budgets; {_REGIME}.", _PAPER, "",
        "The numbers were not available to us, and ours are not FIDs. The order of methods is tested above, on small "
        "photographs in colour, too.",
    ),
    Claim(
        "linear", "Higher utility than DP-SGD in a linear setting",
        "higher utility at a fixed budget in a synthetic linear setting whose tasks share a low-dimensional structure.",
        _PAPER,
        "the simulated risk of ours, with a subspace learned from public tasks, is below that of DP gradient descent "
        "tuned as well as can be, at a place of the grid that both were simulated at.",
        "The setting is ours, and so is the theory. DP gradient descent is the stand-in for DP-SGD and has no public "
        "data. Ours has a floor, the error of the subspace: plenty of private data at a loose budget get below it.",
        tests.linear,
    ),
    Claim(
        "linear", "The hypernetwork learns the shared structure",
        "the hypernetwork learns the tasks' low-dimensional structure from public data.", _PAPER,
        f"the risk of the trained hypernetwork is less than {TIE:g} times that of one that is given the subspace.",
        "Our hypernetwork, trained end to end; few public tasks or many.",
        tests.learned,
    ),
    Claim(
        "linear", "It is the public subspace, not the single shot",
        "DP gradient descent inside the same public subspace has a smaller risk than one noisy sum.", _OURS,
        "its simulated risk is smaller, at a place that both were simulated at, the subspace given to both.",
        "Several steps shrink the residuals and with them the error of sampling; one shot cannot.",
        tests.projected,
    ),
    Claim(
        "linear", "The crossover is where the formulas say",
        "above n* private examples, DP gradient descent in all dimensions has the smaller risk.", _OURS,
        "the two risks, simulated at the predicted n*, are equal within the tolerance on record.",
        "The formulas are approximate; where there is no floor, n* is where DP-GD samples better.",
        tests.crossover,
    ),
    Claim(
        "rivals", "DP-SGD LoRA more accurate than DP-LDM at ε = 1",
        f"82.2 against 44.2% on MNIST, 63.5 against 62.3 on Fashion-MNIST, 64.6 against 41.7 on CIFAR-10; {_LARGE}.",
        _BENCHMARK,
        f"the mean accuracy is higher at ε = 1; {_AT_MANY}",
        _OTHER_DATA, tests.better("dp_lora", "dp_ldm", ACCURACY, tests.plentiful, at=(1.0,)),
    ),
    Claim(
        "rivals", "DP-LDM gains more than DP-SGD LoRA from ε = 1 to 10",
        "accuracy 44.2 to 95.5% against 82.2 to 97.1 on MNIST, 62.3 to 86.3 against 63.5 to 83.8 on Fashion-MNIST, "
        f"41.7 to 64.8 against 64.6 to 77.2 on CIFAR-10; {_LARGE}.",
        _BENCHMARK, f"the gain in mean accuracy is larger; {_AT_MANY}",
        _OTHER_DATA, tests.gains("dp_ldm", "dp_lora", ACCURACY, tests.plentiful),
    ),
    Claim(
        "rivals", "DP-SGD LoRA has the lower distance than DP-LDM at ε = 10",
        f"FID 95.4 against 99.1 on MNIST, 43.7 against 53.2 on Fashion-MNIST, 27.8 against 47.4 on CIFAR-10; {_LARGE}.",
        _BENCHMARK,
        f"the mean Fréchet distance is lower at ε = 10; {_AT_MANY}",
        _OTHER_DATA, tests.better("dp_lora", "dp_ldm", DISTANCE, tests.plentiful, at=(10.0,)),
    ),
    Claim(
        "rivals", "DP-LDM has the lower distance than DP-SGD LoRA",
        "FID 21.1, 16.1, 14.3 against 21.5, 17.6, 16.0 for the best of 175 LoRA runs, at ε = 1, 5, 10 on CelebA 64 x "
        "64. The benchmark says the opposite, of other data.",
        "repository of Liu et al. 2024",
        f"the mean Fréchet distance is lower, at each finite ε; {_AT_MANY}",
        _OTHER_DATA, tests.better("dp_ldm", "dp_lora", DISTANCE, tests.plentiful),
    ),
    Claim(
        "rivals", "The best LoRA rank grows with ε",
        "ranks 4, 8, 64 are best at ε = 1, 5, 10, on CelebA 64 x 64.", "repository of Liu et al. 2024", "",
        "Records hold one rank for each budget, the one that the search on public stand-ins chose.",
    ),
    Claim(
        "rivals", "DP-MEPF is more accurate at ε = 10 than at ε = 1",
        "28.9 and 29.4% at ε = 1, 48.9 and 51.0% at ε = 10 for two variants on CIFAR-10, measured by others.",
        "third party, of Harder et al. 2023",
        f"its mean accuracy is higher; {_AT_MANY}",
        f"{_OTHER_DATA} Its features are of our encoder and not of VGG19.",
        tests.gains("dp_mepf", None, ACCURACY, tests.plentiful),
    ),
    Claim(
        "rivals", "Perceptual features of public pre-training help",
        "pre-trained perceptual features improve private image generation.", "Harder et al. 2023", "",
        "There is no counterpart here that matches moments of features without public training.",
    ),
    Claim(
        "rivals", "Which layers are tuned matters at a fixed budget",
        "77.9% on CIFAR-100 at ε = 2, pre-trained on ImageNet, by choosing the layers to tune.", "Cattan et al. 2022",
        "the best subset of layers is more accurate than the worst.",
        "A small classifier of digits; layers and architecture of the original were not available.",
        tests.layers(changes=False),
    ),
    Claim(
        "rivals", "The best layers change with ε",
        "the best choice is one more hyper-parameter, and depends on the budget.",
        "Cattan et al. 2022",
        "two budgets have different best subsets, each clearly better there than the other; it fails if one subset is "
        "best at all of them.",
        "As above.", tests.layers(changes=True),
    ),
    Claim(
        "rivals", "FID and accuracy rank methods differently",
        f"at ε = 10 on MNIST, FID 4.4 for DPDM, 95.4 for DP-LoRA, with accuracies of 97.7 and 97.1%; {_LARGE}.",
        _BENCHMARK,
        "of the pairs of methods that both scores tell apart, some are in opposite order (it fails if none of ten or "
        f"more is); {_AT_MANY}",
        f"{_OTHER_DATA} All private methods on record that make images take part.", tests.scores_disagree,
    ),
    Claim(
        "lesson", "The noise is not what costs most",
        "the noise of one sum less than doubles the distance that the same sum without noise has.", _OURS,
        "the distance at the strict ε is less than twice that at the loosest budget on record, at any n.",
        "The noise on a mean falls with the number of images in its class; at a dozen images it does not fall far. "
        "The places of *Ours hardly depends on ε* are among these.",
        tests.twice(None, tests.everywhere, more=False),
    ),
    Claim(
        "lesson", "Public training decides, more than the noise",
        "the quality of public training moves the result by more than privacy does.", _OURS,
        "other public weights, the nested ones (or, if ours are these, the plain ones), move the distance without "
        "noise by more than the noise of the strict ε adds to it.",
        "Two trainings only, of the same kind: what can be said is whether this one difference is larger than the "
        "noise.",
        tests.training_over_noise,
    ),
    Claim(
        "lesson", "Retrieval is a strong control", "showing the nearest public data does as well as generating.", _OURS,
        "the distance of the nearest public data, found by the same noisy sum, is below that of ours.",
        "It can only show what is public: much where private images look like public ones, and nothing like them "
        "elsewhere.",
        tests.better("nearest_public", None, DISTANCE, tests.everywhere),
    ),
    Claim(
        "lesson", "The noisy class mean is a strong classifier",
        "the nearest noisy class mean classifies test images better than a classifier trained on our samples.",
        _OURS, "the accuracy of the nearest noisy class mean is higher than that of ours.",
        "It makes no images. What the samples add to the sum, the hypernetwork knows from public data.",
        tests.better("noisy_class_means", None, ACCURACY, tests.everywhere),
    ),
    Claim(
        "lesson", "DP-SGD catches up where private images are plentiful",
        "gradient methods keep learning from more images, one sum does not.", _OURS,
        f"the distance of {BEST_DP_SGD} is below that of ours, at each finite ε; {_AT_MANY}",
        "The best of the three is picked by its mean, which favours it. DP-SGD on the embedding and the hybrid use our "
        "encoder or our sum, and are not counted here; they often do better still.",
        tests.best_dp_sgd,
    ),
)  # fmt: skip
