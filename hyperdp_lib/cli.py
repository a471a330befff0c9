"""The ``hyperdp`` command: a thin layer over the functions of the library.

Bad input ends with exit code 2 and one line on stderr, before anything is written; a failed verification with
1; an interruption with 130. Results go to stdout, notes and progress to stderr. Modules that load torch are
imported inside the commands, so that ``hyperdp --help`` answers at once.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

NEIGHBORING_RELATIONS = ("add_or_remove_one", "replace_one", "zero_out")
DEFAULT_WEIGHTS = "glyphs"
DEFAULT_FEATURES = "glyphnet"
PLANS = ("auto", "two-steps", "cells", "one-sum")
PRIVATE_SCORES = ("clipped-frechet-distance", "accuracy")
PUBLIC_IMAGES = 500  # at most, of the public model alone: some seconds
_FEATURES_HELP = "what scores are computed in: a features.safetensors, or mobilenet_v2 for colour; default: {}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Parameters
    ----------
    arguments
        As typed after ``hyperdp``; those of the process when None.

    Returns
    -------
    int
        Exit code: 0 done; 1 ``verify`` found problems; 2 the input cannot be used; 130 interrupted.
    """
    try:
        options = _parser().parse_args(arguments)
        return int(options.run(options) or 0)
    except ValueError as error:
        from hyperdp_lib.image_files import InputError

        if not isinstance(error, InputError):
            raise
        print(f"hyperdp: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("hyperdp: interrupted", file=sys.stderr)
        return 130


# ---- the commands ------------------------------------------------------------------------------------------


def _release(options: argparse.Namespace) -> None:
    _check_plan(options)
    if not options.dry_run and options.out is None:
        _refuse("no folder to make; give --out, or --dry-run to see what would happen")
    if options.sheet is not None:
        if not options.dry_run:
            _refuse("--sheet shows private images to the operator; it goes with --dry-run")
        _check_output(options.sheet, options.overwrite, suffix=".png")
    if options.out is not None:
        _check_output(options.out, options.overwrite or options.dry_run, folder_of="certificate.json")
    _check_input(options.images)
    _check_device(options.device)
    from hyperdp_lib import data, pretrained, release_folder, releasing
    from hyperdp_lib.artefacts import CERTIFICATE_FILE

    _reserve(options)
    # the images first: what is wrong with them is said before a model is loaded
    private = data.load_named_or_path(
        options.images,
        *pretrained.geometry(options.weights),
        labelled=not options.unlabelled,
        class_names=options.classes,
        window=options.window,
        background=options.background,
        stretch=pretrained.stretches(options.weights),
    )
    plan = _planned(options, private.class_names)
    _preview(options, private, plan)
    if options.dry_run:
        return
    private_images = -private.images if options.invert else private.images
    if options.reservation is not None:
        options.reservation.commit()
    private = data.ImageSet(private_images.to(options.device), private.labels, private.class_names)
    released = releasing.release(private, plan, seed=options.seed, progress=True)
    release_folder.save_release(options.out, released, overwrite=options.overwrite)
    if options.json:
        written = (options.out / CERTIFICATE_FILE).read_text(encoding="utf-8")
        print(json.dumps({"out": str(options.out), "certificate": json.loads(written)}))
    else:
        print(f"wrote {options.out}")
        print(released.certificate.sentence, released.certificate.risk_sentence, sep="\n")


def _planned(options: argparse.Namespace, class_names: Sequence[str] | None) -> Any:
    from hyperdp_lib import planning, pretrained

    return planning.plan(
        pretrained.load_weights(options.weights, options.device),
        epsilon=options.epsilon,
        delta=options.delta,
        neighboring_relation=options.neighboring_relation,
        class_names=class_names,
        method=options.method.replace("-", "_"),
        public_size=options.public_size,
        refined=not options.no_refine,
    )


def _plan(options: argparse.Namespace) -> None:
    _check_plan(options)
    names = options.classes
    if names is not None and len(names) == 1 and names[0].isdecimal():  # their number is enough
        count = int(names[0])
        if not 1 <= count <= 2**16:
            _refuse(f"--classes must be names, or a number from 1 to {2**16}, got {count}")
        names = [str(number) for number in range(count)]
    made = _planned(options, names)
    print(json.dumps({"plan": list(made.facts())}, indent=1) if options.json else made)


def _preview(options: argparse.Namespace, private: Any, plan: Any) -> None:
    """Tell the operator what is about to happen, and ask where somebody can answer; nothing is spent yet."""
    from hyperdp_lib import data
    from hyperdp_lib.preview import copies_advice, likeness_advice, preview

    made = preview(
        private,
        plan,
        inverted=options.invert,
        demonstration=options.seed is not None,
        earlier=options.out if options.out is not None and options.out.is_dir() else None,
    )
    made = copies_advice(made, private.images, options.weights)
    # class folders were named for their owner's eyes; elsewhere the names were given to be published
    unasked = private.class_names is not None and options.classes is None and os.path.isdir(options.images)
    unasked = unasked and options.images.partition("/")[0] not in data.NAMED_DATA_SETS
    if options.dry_run:
        seen = -private.images if options.invert else private.images
        if options.sheet is not None:
            data.save_grid(options.sheet, data.ImageSet(seen))
        made = likeness_advice(made, seen, options.images, vars(options))
        print(json.dumps(made.to_plain(), indent=1) if options.json else made)
        return
    can_ask = sys.stdin.isatty() and sys.stderr.isatty()
    if not (options.yes or can_ask) and made.stops:
        _refuse(f"not released: {made.stops[0]}; or add --yes if it is meant so")
    if not (options.yes or can_ask) and unasked:
        names = shlex.join(private.class_names)
        _refuse(f"the names of the sub-folders would become public: add --classes {names}, or --yes, or --unlabelled")
    for line in str(made).splitlines():
        _tell(line)
    if can_ask and not options.yes:
        print("hyperdp: release? This spends the budget. [y/N] ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            _refuse("not released; nothing was spent")


def _release_within_budget(options: argparse.Namespace) -> None:
    """`_release`; what it reserved is taken back if it ends before any noise may have been drawn."""
    options.reservation = None
    try:
        _release(options)
    except BaseException:
        if options.reservation is not None:
            options.reservation.cancel()
        raise


def _reserve(options: argparse.Namespace) -> None:
    """Enter the release in its budget file, before an image is read; a dry run only asks whether it would fit."""
    caps = {"cap_epsilon": options.cap_epsilon, "cap_mu": options.cap_mu}
    if options.budget is None:
        if any(cap is not None for cap in caps.values()):
            _refuse("a cap needs a file that says what was spent; give --budget FILE")
        return
    if options.seed is not None:
        _refuse("noise from a seed protects nothing, so no budget can cover it; drop --seed, or --budget")
    from hyperdp_lib import accounting, budget

    reservation = budget.reserve(
        options.budget,
        f"{options.images} -> {options.out}",
        accounting.noise_multiplier(options.epsilon, options.delta),
        delta=options.delta,
        neighboring_relation=options.neighboring_relation,
        write=not options.dry_run,
        **caps,
    )
    options.reservation = None if options.dry_run else reservation


def _budget(options: argparse.Namespace) -> None:
    from hyperdp_lib import budget

    found = budget.read_budget(options.file)
    print(json.dumps(found.to_plain(), indent=1) if options.json else found)


def _sample(options: argparse.Namespace) -> None:
    _check_count("--num-images", options.num_images)
    _check_count("--num-steps", options.num_steps)
    _check_output(options.out, options.overwrite, suffix=".npz")
    if options.grid is not None:
        _check_output(options.grid, options.overwrite, suffix=".png")
    _check_input(options.folder)
    _check_device(options.device)
    import torch

    from hyperdp_lib import classifier, data, pretrained, release_folder

    relabelled = options.labels == "released"
    base_model = None
    if not release_folder.holds_base(options.folder):  # as in releases of earlier versions
        base_model = pretrained.load_pretrained(_weights_of(options))[0]
    released = release_folder.load_release(options.folder, base_model).to(options.device)
    class_names = released.certificate.class_names or None
    agreed = None
    if relabelled:
        counts = released.counts(options.num_images, balanced=options.balanced)
        network = pretrained.load_pretrained(_weights_of(options), options.device)[1]
        images, labels, agreed = classifier.sample_relabelled(
            released, network, counts, generator=torch.Generator().manual_seed(options.seed),
            num_steps=options.num_steps, progress=True,
        )  # fmt: skip
        samples = data.ImageSet(images, labels, class_names)
    else:
        samples = released.sample(
            options.num_images,
            seed=options.seed,
            balanced=options.balanced,
            num_steps=options.num_steps,
            progress=True,
        )
    data.save_npz(options.out, samples)
    if options.grid is not None:
        data.save_grid(options.grid, samples)
    written = [str(path) for path in (options.out, options.grid) if path is not None]
    told: dict[str, Any] = {"written": written, "num_images": len(samples), "class_names": class_names}
    how = ""
    if class_names:
        told["proportions"] = "balanced" if options.balanced else "released"
        assert samples.labels is not None
        each = samples.labels.bincount(minlength=len(class_names)).tolist()
        told["images_per_class"] = dict(zip(class_names, each, strict=True))
        how = ", as many of each class" if options.balanced else ", classes in the released (noisy) proportions"
        if empty := [name for name, count in told["images_per_class"].items() if not count]:
            how += f", none of {', '.join(map(repr, empty))}"
    if agreed is not None:
        told["agreed"] = agreed
        how += f", relabelled; the release agrees with {agreed:.0%} of the labels they were drawn for"
    print(json.dumps(told) if options.json else f"wrote {len(samples)} images to {' and '.join(written)}{how}")


def _evaluate(options: argparse.Namespace) -> None:
    if (options.reference is None) == (options.private is None):
        _refuse("give either --reference (a research metric) or --private and --epsilon (a noisy, charged score)")
    if options.private is not None:
        if options.epsilon is None:
            _refuse("no privacy budget; give --epsilon (for example 0.5) for the noisy score")
        _check_epsilon(options.epsilon, options.delta)
    elif options.epsilon is not None or options.seed is not None:
        _refuse("--epsilon and --seed are for --private; scores against --reference have no noise")
    real = options.reference if options.private is None else options.private
    _check_input(options.samples)
    _check_input(real)
    from hyperdp_lib import data, pretrained
    from hyperdp_lib.scores import reference_stats

    network = feature_network(options.features or str(pretrained.features_file(options.weights)))
    fit = (network.image_size, network.channels)
    samples = data.load_named_or_path(options.samples, *fit)
    notes = samples.notes
    if options.reference is not None and reference_stats.holds_statistics(options.reference):
        kept = reference_stats.ReferenceStatistics.load(options.reference)
        kept.check(network)
        scores = _statistics_scores(options, samples, kept, network)
    else:
        images = data.load_named_or_path(real, *fit, stretch=pretrained.stretches(options.weights))
        notes += images.notes
        score = _research_scores if options.private is None else _private_score
        scores = score(options, samples, images, network)
    for note in notes:
        _tell(note)
    if options.json:
        print(json.dumps(scores, indent=1))
    elif options.private is None:
        _print_research_scores(scores)
    else:
        _print_private_score(scores)


def _public_alone(options: argparse.Namespace, network: Any, most: int) -> Any:
    """Images of the public base model without an adapter, as many as ``most`` up to a limit; or why there are none."""
    import torch

    from hyperdp_lib import data, diffusion, pretrained

    side, channels = pretrained.geometry(options.weights)
    if (side, channels) != (network.image_size, network.channels):
        return (
            f"the base model of {options.weights!r} draws {side} x {side} pixels with {channels} channel(s), not "
            f"what {network.name} reads; name other weights with --weights"
        )
    base_model, _ = pretrained.load_pretrained(options.weights)
    count = min(most, PUBLIC_IMAGES)
    drawn = diffusion.sample(base_model, None, count, generator=torch.Generator().manual_seed(0), progress=True)
    return data.ImageSet(drawn)


def _ends(
    options: argparse.Namespace, network: Any, most: int, real: dict[str, Any] | str, against: Callable[[Any], Any]
) -> dict[str, Any]:
    """Both ends of the scale: what real images score, and what the public model alone does; or why not."""
    from hyperdp_lib.scores import evaluation

    def unknown(why: str) -> dict[str, Any]:
        return {**dict.fromkeys(evaluation.SCORES), "reasons": dict.fromkeys(evaluation.SCORES, why)}

    public = _public_alone(options, network, most)
    return {
        "real": {
            "what": "images of one half of the reference against the other half (few images make the distance larger)",
            **(unknown(real) if isinstance(real, str) else real),
        },
        "public": {
            "what": f"images that the base model of {options.weights} draws without an adapter",
            **(unknown(public) if isinstance(public, str) else against(public)),
        },
    }


def _research_scores(options: argparse.Namespace, samples: Any, reference: Any, network: Any) -> dict[str, Any]:
    """Every score that can be computed, between its two ends."""
    from hyperdp_lib.scores import evaluation

    theirs = evaluation.Side.of("reference images", reference, network)
    scores = evaluation.compare(evaluation.Side.of("samples", samples, network), theirs)
    if all(scores[score] is None for score in evaluation.SCORES):
        _refuse(f"nothing can be scored: {scores['reasons']['frechet_distance']}")
    real = evaluation.compare_real(theirs, len(samples))
    ends = _ends(
        options, network, len(samples), real,
        lambda public: evaluation.compare(evaluation.Side.of("images of the public model", public, network), theirs),
    )  # fmt: skip
    return {"label": evaluation.NOT_DP, "features": network.name, **scores, **ends}


def _statistics_scores(options: argparse.Namespace, samples: Any, kept: Any, network: Any) -> dict[str, Any]:
    """The Fréchet distance to a reference whose images are not there, and its public end."""
    from hyperdp_lib.scores import evaluation

    why = f"the reference is statistics of {kept.source} only; give its images"

    def distance(shown: Any, side: str) -> dict[str, Any]:
        reasons = dict.fromkeys(evaluation.SCORES[1:], why)
        counts = {"num_images": len(shown), "num_reference": kept.count}
        try:
            value = kept.frechet_distance(shown.images, network, side)
        except evaluation.InputError as error:
            value, reasons = None, {"frechet_distance": str(error), **reasons}
        return {**dict.fromkeys(evaluation.SCORES), "frechet_distance": value, **counts, "reasons": reasons}

    scores = distance(samples, "samples")
    if scores["frechet_distance"] is None:
        _refuse(f"nothing can be scored: {scores['reasons']['frechet_distance']}")
    ends = _ends(options, network, len(samples), why, lambda public: distance(public, "images of the public model"))
    return {"label": evaluation.NOT_DP, "features": network.name, **scores, **ends}


def _print_research_scores(scores: dict[str, Any]) -> None:
    columns = {"real": scores["real"], "samples": scores, "public alone": scores["public"]}
    print(f"{scores['label']}; features {scores['features']}; {scores['num_reference']} reference images")
    print(f"{'':<18}" + "".join(f"{name:>14}" for name in columns))
    counts = [column.get("num_images") for column in columns.values()]
    print(f"{'images':<18}" + "".join(f"{'-' if count is None else count:>14}" for count in counts))
    reasons: dict[str, list[str]] = {}
    for score in ("frechet_distance", "precision", "recall", "accuracy"):
        name, digits = ("Fréchet distance", 1) if score == "frechet_distance" else (score, 2)
        values = [column[score] for column in columns.values()]
        print(f"{name:<18}" + "".join(f"{'-' if v is None else format(v, f'.{digits}f'):>14}" for v in values))
        for where, column in columns.items():
            if column[score] is None:
                reasons.setdefault(column["reasons"][score], []).append(f"{name} ({where})")
    for where in ("real", "public"):
        print(f"{where}: {scores[where]['what']}")
    for why, which in reasons.items():
        print(f"- {', '.join(which)}: {why}")


def _print_private_score(scores: dict[str, Any]) -> None:
    charge = scores["charge"]
    print(f"{scores['label']}; it costs epsilon {charge['epsilon']:.4g} at delta {charge['delta']:g}, on top of others")
    name = "accuracy" if scores["score"] == "accuracy" else "clipped Fréchet distance"
    print(f"{name}: {scores[scores['score']]:.3g}, standard error of the noise {scores['standard_error']:.2g}")
    ends = {
        "noise_floor": "a perfect match, under this noise",
        "public": "if private images were what the public model draws alone, without noise",
        "chance": "chance",
    }
    for end, what in ends.items():
        if scores.get(end) is not None:
            print(f"{what}: {scores[end]:.3g}")
    for which, why in scores["reasons"].items():
        print(f"- {which.replace('_', ' ')}: {why}")


def _private_score(options: argparse.Namespace, samples: Any, private_set: Any, network: Any) -> dict[str, Any]:
    """One noisy score and its ledger entry: nothing else of the private images is told.

    Its ends are public and cost nothing; they are made first, so that nothing is spent if they fail.
    """
    from hyperdp_lib.certificate import STAMP
    from hyperdp_lib.scores import private_scores
    from hyperdp_lib.strict_json import plain

    budget: dict[str, Any] = dict(
        epsilon=options.epsilon,
        delta=options.delta,
        neighboring_relation=options.neighboring_relation,
        seed=options.seed,
    )
    ends: dict[str, Any] = {}
    reasons: dict[str, str] = {}
    name = options.score.replace("-", "_")
    if name == "accuracy":
        if samples.labels is None or samples.class_names != private_set.class_names:
            _refuse("an accuracy needs classes of the same names on both sides; try --score clipped-frechet-distance")
        ends["chance"] = 1 / len(samples.class_names)
        ends["precision"] = ends["recall"] = None
        reasons["precision, recall"] = "no noisy ones are offered; how alike images are: clipped-frechet-distance"
        scored = private_scores.private_accuracy(
            samples.images, samples.labels, private_set.images, private_set.labels, **budget
        )
    else:
        public = _public_alone(options, network, len(samples))
        if isinstance(public, str):
            ends["public"], reasons["public"] = None, public
        else:
            ends["public"] = private_scores.clipped_frechet_distance(samples.images, public.images, network)
        scored = private_scores.private_frechet_distance(samples.images, private_set.images, network, **budget)
        ends["noise_floor"] = scored.noise_floor
    return {
        "label": STAMP if scored.demonstration else "differentially private",
        "score": name,
        name: scored.value,
        "standard_error": scored.standard_error,
        **ends,
        "reasons": reasons,
        "neighboring_relation": options.neighboring_relation,
        "charge": plain(scored.charge),
    }


def _compare(options: argparse.Namespace) -> None:
    for epsilon in options.epsilon:
        if not (epsilon == math.inf or (options.exact and epsilon == 0)):
            _check_epsilon(epsilon, options.delta)
    _check_delta(options.delta)
    _check_count("--seeds", options.seeds)
    if options.pair is not None and os.path.basename(options.pair) != options.pair:
        _refuse(f"--pair is a part of file names, so it holds no slash: {options.pair!r}")
    _check_count("--jobs", options.jobs)
    if options.num_private is not None:
        _check_count("--num-private", options.num_private)
    if os.path.lexists(options.out) and not options.out.is_dir():
        _refuse(f"{str(options.out)!r} is not a folder; choose another --out")
    _check_input(options.private)
    _check_device(options.device)
    from hyperdp_lib.experiments import comparison
    from hyperdp_lib.experiments.methods import Settings

    settings = None
    if options.settings is not None:
        _check_input(options.settings)
        settings = Settings.from_json(_text(options.settings))
    paths = comparison.compare(
        options.private,
        methods=options.methods,
        epsilons=options.epsilon,
        delta=options.delta,
        neighboring_relation=options.neighboring_relation,
        num_private=options.num_private,
        seeds=range(options.seeds) if options.seed is None else [options.seed],
        hypernetwork=options.weights,
        feature_network=None if options.features is None else feature_network(options.features),
        pair=options.pair,
        lookalikes=options.lookalikes,
        out=options.out,
        device=options.device,
        jobs=options.jobs,
        settings=settings,
        exact=options.exact,
    )
    if options.json:
        print(json.dumps({"records": [str(path) for path in paths]}))
    else:
        print(f"{len(paths)} records in {options.out} (research metrics, not DP)")


def _forecast(options: argparse.Namespace) -> None:
    _check_epsilon(options.epsilon, options.delta)
    for option in ("num_private", "classes", "num_images"):
        _check_count("--" + option.replace("_", "-"), getattr(options, option))
    _check_device(options.device)
    from hyperdp_lib.experiments import comparison, forecast, tuning
    from hyperdp_lib.experiments.methods import METHODS

    if options.method in METHODS:
        comparison.check_budget(
            options.method,
            options.epsilon,
            options.delta,
            options.neighboring_relation,
            comparison.found_settings(options.weights),
            options.num_private,
            options.classes,
        )
    made = forecast.forecast(
        options.num_private,
        options.epsilon,
        num_classes=options.classes,
        method=options.method,
        coverage=options.coverage,
        rehearsals=options.rehearsals,
        num_images=options.num_images,
        delta=options.delta,
        neighboring_relation=options.neighboring_relation,
        bench=tuning.public_bench(options.weights, device=options.device),
        tasks=tuning.held_out_tasks(options.weights),
        about=comparison.public_data(options.weights).about,
        progress=True,
    )
    told = made.summary()
    if options.json:
        print(json.dumps(told, indent=1))
        return
    print(f"{made.about[0].upper()}{made.about[1:]}")
    print(
        f"{len(made.rehearsals)} rehearsals on public data; another such data set lies in each interval with "
        f"probability {made.coverage:.0%}:"
    )
    for score in forecast.SCORES:
        if told[score] is not None and (score != "accuracy" or told["precision"] is not None):  # alone it misleads
            low, high = told[score]["interval"]
            print(f"{score.replace('_', ' '):>16}  {told[score]['expected']:8.3g}   [{low:.3g}, {high:.3g}]")


def _train(options: argparse.Namespace) -> None:
    if (options.preset is None) == (options.public is None):
        _refuse("give exactly one of --preset (the library's public data) and --public (images of your own)")
    _check_device(options.device)
    how = dict(device=options.device, out=options.out, resume=not options.restart, seed=options.seed)
    if options.public is None:
        for name in ("size", "channels", "minutes", "licence", "mirror", "no_stretch"):
            if getattr(options, name):
                _refuse(f"--{name.replace('_', '-')} is for --public; a preset says it itself")
        from hyperdp_lib.public import training

        weights = training.train(options.preset, **how)
    else:
        from hyperdp_lib.public import image_training
        from hyperdp_lib.public.images import ImageConfig

        config = ImageConfig(
            tuple(options.public),
            size=options.size,
            channels=options.channels,
            mirror=options.mirror,
            stretch=not options.no_stretch,
            licence=options.licence or ImageConfig.licence,
        )
        command = _train_command(options)
        weights = image_training.train_on_images(config, minutes=options.minutes, command=command, tell=_tell, **how)
    print(f"wrote {weights}")


def _train_command(options: argparse.Namespace) -> str:
    """The command for a model card, with names of the sources only: a card tells nobody's folders."""
    words = ["hyperdp", "train", "--public", *(os.path.basename(os.path.normpath(path)) for path in options.public)]
    for name in ("size", "channels", "minutes", "licence", "seed"):
        if getattr(options, name) is not None:
            value = getattr(options, name)
            words += [f"--{name}", f"{value:g}" if isinstance(value, float) else str(value)]
    words += [f"--{name.replace('_', '-')}" for name in ("mirror", "no_stretch") if getattr(options, name)]
    return shlex.join(words)


def _verify(options: argparse.Namespace) -> int:
    if not options.folder.is_dir():
        _refuse(f"no such release folder: {str(options.folder)!r}; give the --out folder of hyperdp release")
    from hyperdp_lib import verification

    problems = verification.verify(options.folder)
    notes = verification.unknown_models(options.folder)
    told = None if problems else verification.stated_risk(options.folder)
    if options.json:
        print(json.dumps({"ok": not problems, "problems": problems, "notes": notes, "risk": told}))
    elif problems:
        print(*problems, sep="\n")
    else:
        print(f"ok: {options.folder} holds what its certificate lists and nothing else; the certificate recomputes")
        print(told)
    if not options.json:
        for note in notes:
            _tell(f"note: {note}")
    return 1 if problems else 0


def _audit(options: argparse.Namespace) -> int:
    _check_epsilon(options.epsilon, options.delta)
    _check_count("--trials", options.trials, least=1000)
    from hyperdp_lib import auditing

    if options.mutants:
        return _audit_mutants(options)
    if options.dp_sgd:
        return _audit_dp_sgd(options)
    if options.attacks:
        return _audit_attacks(options)
    made = auditing.audit(
        options.epsilon,
        delta=options.delta,
        trials=options.trials,
        neighboring_relation=options.neighboring_relation,
    )
    return _tell_audit(
        options,
        made,
        f"certified: epsilon {made.epsilon:g} at delta {made.delta:g}, mu {made.mu:.4f} "
        f"({made.neighboring_relation})\n"
        f"attacked {made.trials:,} times on each of two neighbouring data sets; "
        f"with confidence {made.confidence:.0%}\n"
        f"  mu is at least      {made.mu_lower_bound:.4f}  ({made.mu_lower_bound / made.mu:.0%} of the certified)\n"
        f"  epsilon is at least {made.epsilon_lower_bound:.4f}  (cannot be tight at a small delta)",
    )


def _audit_dp_sgd(options: argparse.Namespace) -> int:
    from hyperdp_lib.auditing import canaries

    made = canaries.audit_dp_sgd(options.epsilon, delta=options.delta)
    return _tell_audit(
        options,
        made,
        f"certified: epsilon {made.epsilon:g} at delta {made.delta:g} (DP-SGD, {made.neighboring_relation})\n"
        f"{made.num_canaries:,} canaries, one run: {made.correct} of {made.guesses} guesses right; "
        f"with confidence {made.confidence:.0%}\n"
        f"  epsilon is at least {made.epsilon_lower_bound:.4f}",
    )


def _tell_audit(options: argparse.Namespace, made: Any, text: str) -> int:
    """Print an audit as JSON, or as text and verdict; the exit code."""
    if options.json:
        print(json.dumps(made.to_plain(), indent=1))
    else:
        print(text, "the claim stands" if made.passed else "THE CLAIM IS FALSE", sep="\n")
    return 0 if made.passed else 1


def _audit_mutants(options: argparse.Namespace) -> int:
    from hyperdp_lib import auditing

    table = auditing.inspect_all(progress=True)
    if options.json:
        print(json.dumps(table, indent=1))
    else:
        for name, caught in table.items():
            print(f"{name:<40} {', '.join(caught) or '-'}")
    intact, *broken = table.values()
    return 0 if not intact and all(broken) else 1


def _audit_attacks(options: argparse.Namespace) -> int:
    from hyperdp_lib.auditing import attacks

    made = attacks.membership("dp_deepsets", options.epsilon, delta=options.delta)
    if options.json:
        print(json.dumps(made, indent=1))
        return 0 if made["passed"] else 1
    print(
        f"who was in? {made['trials']} releases of {made['num_candidates'] // 2} digits on average, "
        f"after {made['shadows']} to learn from"
    )
    for one in made["attacks"]:
        print(
            f"  from the {one['attack']:<9}  advantage {one['advantage']:+.3f} "
            f"[{one['advantage_low']:+.3f}, {one['advantage_high']:+.3f}]   at most {one['advantage_bound']:.3f}"
        )
    print("the claim stands" if made["passed"] else "THE CLAIM IS FALSE")
    return 0 if made["passed"] else 1


# ---- checks before any work --------------------------------------------------------------------------------


def _refuse(message: str) -> NoReturn:
    from hyperdp_lib.image_files import InputError

    raise InputError(message)


def _check_epsilon(epsilon: float, delta: float) -> None:
    _check_delta(delta)
    if not 0 < epsilon <= 1e6:  # beyond that nothing is protected, and floats end
        _refuse(f"--epsilon must be a positive number up to a million, got {epsilon:g}; 1 is a usual choice")
    from hyperdp_lib import accounting, mechanism

    try:
        multiplier = accounting.noise_multiplier(epsilon, delta)
        # refuses noise that is too large for exact integers; under no relation is there more of it
        mechanism.GaussianSum(1, multiplier, neighboring_relation="replace_one")
    except ValueError as error:
        _refuse(f"--epsilon {epsilon:g} with --delta {delta:g}: {error}")


def _check_plan(options: argparse.Namespace) -> None:
    if options.epsilon is None:
        _refuse("no privacy budget; give --epsilon (for example 1)")
    _check_epsilon(options.epsilon, options.delta)
    if options.public_size is not None:
        _check_count("--public-size", options.public_size)


def _check_delta(delta: float) -> None:
    if not 1e-60 < delta < 1:
        _refuse(f"--delta must lie strictly between 0 (1e-60) and 1, got {delta:g}; 1e-5 is a usual choice")


def _check_count(option: str, count: int, least: int = 1) -> None:
    if count < least:
        _refuse(f"{option} must be at least {least}, got {count}")


def _check_input(name_or_path: str | Path) -> None:
    """Existence only: the answer to a misspelt path should not wait until a model is loaded."""
    if not os.path.exists(name_or_path):
        from hyperdp_lib.data import require_source

        require_source(name_or_path)


def _check_output(path: Path, overwrite: bool, suffix: str | None = None, folder_of: str | None = None) -> None:
    """That ``path`` can be written and nothing is lost by it."""
    if suffix is not None and path.suffix.lower() != suffix:
        _refuse(f"output {str(path)!r} must end in {suffix}; rename it")
    parent = path.absolute().parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        _refuse(f"cannot write to folder {str(parent)!r}; create it or choose another place")
    if not os.path.lexists(path):
        return
    if not overwrite:
        _refuse(f"{str(path)!r} exists; choose another --out or add --overwrite")
    if folder_of is None:
        if not path.is_file():
            _refuse(f"{str(path)!r} is not a file, so it is not overwritten; choose another place")
    elif path.is_symlink() or not path.is_dir() or (any(path.iterdir()) and not (path / folder_of).is_file()):
        # --overwrite replaces the whole folder: never one that holds something else
        _refuse(f"{str(path)!r} is not an earlier release, so it is not overwritten; choose another --out")


def _seed(text: str) -> int:
    """An option's value; argparse reports what is wrong with it."""
    if not text.isascii() or not text.isdigit() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to 2**63 - 1, got {text!r}")
    return int(text)


def _check_device(name: str) -> None:
    if name != "cpu":
        import torch

        try:
            torch.zeros(1, device=name).item()  # "meta", too, makes tensors, but they hold nothing
        except (RuntimeError, AssertionError):
            _refuse(f"device {name!r} is not available here; use --device cpu")


# ---- what the commands share -------------------------------------------------------------------------------


def _weights_of(options: argparse.Namespace) -> str:
    """Weights to read a release with: as asked for, else those that its certificate names, if they are shipped."""
    from hyperdp_lib import verification

    return options.weights or verification.shipped_for(options.folder) or DEFAULT_WEIGHTS


def feature_network(name_or_path: str) -> Any:
    """What scores are computed in: the default one, a file's, or MobileNetV2."""
    from hyperdp_lib import embedding
    from hyperdp_lib.scores import mobilenet

    if name_or_path == mobilenet.NAME:
        return mobilenet.MobileNetV2.from_pretrained()
    return embedding.FeatureNetwork.from_pretrained(features_file(name_or_path))


def features_file(name_or_path: str) -> Path:
    if name_or_path == DEFAULT_FEATURES:
        from hyperdp_lib import pretrained

        return pretrained.features_file()
    return Path(name_or_path)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        _refuse(f"cannot read {str(path)!r} as text ({type(error).__name__}); give a file in UTF-8")


def _tell(text: str) -> None:
    print(f"hyperdp: {text}", file=sys.stderr)


class Parser(argparse.ArgumentParser):
    """Reports a wrong option in one line, like every other bad input (an `InputError`)."""

    def error(self, message: str) -> NoReturn:
        _refuse(f"{message}; see {self.prog} --help")


def _parser() -> Parser:
    parser = Parser(prog="hyperdp", description="Private images in, a certified LoRA adapter out.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], int | None], text: str) -> Callable[..., Any]:
        added = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        added.set_defaults(run=run)
        return added.add_argument

    def budgeted(add: Callable[..., Any]) -> None:
        """What a plan is made of."""
        add("--epsilon", type=float, help="privacy budget, for example 1")
        add("--delta", type=float, default=1e-5, help="default: 1e-5")
        add("--neighboring-relation", choices=NEIGHBORING_RELATIONS, default=NEIGHBORING_RELATIONS[0])
        add("--weights", default=DEFAULT_WEIGHTS, metavar="NAME|PATH", help="default: glyphs")
        add("--public-size", type=int, metavar="N", help="number of images, about, if it may be public; saves a share")
        add("--method", choices=PLANS, default=PLANS[0], help="default: auto; one-sum is the paper's")
        add("--no-refine", action="store_true", help="decode once, in seconds")
        add("--device", default="cpu", help="cpu or cuda; default: cpu")

    add = command("plan", _plan, "say what a release would spend on what; reads no image")
    budgeted(add)
    add("--classes", nargs="+", metavar="NAME", help="the classes, or their number; default: no labels")
    add("--json", action="store_true", help="print the plan as JSON")

    add = command("release", _release_within_budget, "turn private images into one adapter with a privacy certificate")
    add("images", metavar="IMAGES", help="folder of images, folder of class sub-folders, .npz, or: digits")
    budgeted(add)
    add("--budget", type=Path, metavar="FILE", help="of all releases of these images: refuse what it does not cover")
    add("--cap-epsilon", type=float, metavar="EPSILON", help="of a new --budget: most that all releases may cost")
    add("--cap-mu", type=float, metavar="MU", help="the same in mu; the cap of a file never changes")
    add("--seed", type=_seed, help="reproducible demonstration noise: NOT PRIVATE")
    add("--classes", nargs="+", metavar="NAME", help="declare the classes, in label order; their names become public")
    add("--window", type=float, nargs=2, metavar=("LOW", "HIGH"), help="levels of black and white in the files: 0 4095")
    add("--background", choices=("white", "black"), default="white", help="behind transparent images; default: white")
    add("--dry-run", action="store_true", help="say what would happen and what is advised; spends nothing")
    add("--sheet", type=Path, metavar="PNG", help="of --dry-run: the images as the model sees them, for your eyes only")
    add("--yes", action="store_true", help="do not ask, and take images that look wrong as they are")
    add("--invert", action="store_true", help="swap black and white; the glyphs model draws white on black")
    add("--unlabelled", action="store_true", help="ignore labels and class folders: one adapter in all")
    add("--out", type=Path, metavar="DIR", help="folder to make")
    add("--overwrite", action="store_true", help="replace an earlier release in DIR")
    add("--json", action="store_true", help="print the certificate as JSON")

    add = command("budget", _budget, "show what was spent of a budget file on what, and what is left")
    add("file", metavar="FILE", type=Path, help="as given to hyperdp release --budget")
    add("--json", action="store_true", help="print everything as JSON")

    add = command("sample", _sample, "draw images from a release")
    add("folder", metavar="DIR", type=Path, help="a release")
    add("--num-images", type=int, default=1000, help="in all; default: 1000")
    add("--balanced", action="store_true", help="as many of each class; default: in the released (noisy) proportions")
    add("--seed", type=_seed, default=0, help="default: 0")
    add("--num-steps", type=int, default=20, help="denoising steps; default: 20")
    add(
        "--labels",
        choices=("drawn", "released"),
        default="drawn",
        help="the class drawn for; or each with the class that the release itself gives it; default: drawn",
    )
    add("--weights", metavar="NAME|PATH", help="default: what the certificate names, if it is shipped")
    add("--out", type=Path, required=True, metavar="NPZ", help="images (uint8) and, with classes, labels")
    add("--grid", type=Path, metavar="PNG", help="also write a sheet of samples")
    add("--overwrite", action="store_true", help="replace existing files")
    add("--device", default="cpu", help="cpu or cuda; default: cpu")
    add("--json", action="store_true", help="print what was written as JSON")

    add = command("evaluate", _evaluate, "score samples against real images: a research metric, or a noisy score")
    add("samples", metavar="SAMPLES", help=".npz or folder of images")
    add("--reference", metavar="REFERENCE", help="real images, or their statistics; the scores are NOT DP")
    add("--private", metavar="IMAGES", help="or private images: one noisy score that may be published, and its price")
    add("--score", choices=PRIVATE_SCORES, default=PRIVATE_SCORES[0], help=f"default: {PRIVATE_SCORES[0]}")
    add("--epsilon", type=float, help="price of that score, on top of the release's")
    add("--delta", type=float, default=1e-5, help="default: 1e-5")
    add("--neighboring-relation", choices=NEIGHBORING_RELATIONS, default=NEIGHBORING_RELATIONS[0])
    add("--seed", type=_seed, help="reproducible demonstration noise: NOT PRIVATE")
    add("--weights", default=DEFAULT_WEIGHTS, metavar="NAME|PATH", help="of the public end; default: glyphs")
    add("--features", metavar="NAME|PATH", help=_FEATURES_HELP.format("the network that belongs to the weights"))
    add("--json", action="store_true", help="print the scores as JSON, with what could not be computed and why")

    add = command("compare", _compare, "run methods over epsilon and seeds, one record for each; restartable")
    add("--private", required=True, metavar="NAME|IMAGES", help="private images, for example: digits")
    add("--methods", nargs="+", default=["all"], metavar="METHOD", help="all (default), or names of methods")
    add("--epsilon", type=float, nargs="+", default=[1.0], help="privacy budgets, or inf for no noise; default: 1")
    add("--exact", action="store_true", help="run no budgets but these, not even inf, or 0 for a control without data")
    add("--delta", type=float, default=1e-5, help="default: 1e-5")
    add("--neighboring-relation", choices=NEIGHBORING_RELATIONS, default=NEIGHBORING_RELATIONS[0])
    add("--num-private", type=int, help="private images to use; default: all")
    add("--seeds", type=int, default=3, help="how many, from 0; default: 3")
    add("--seed", type=_seed, help="instead of --seeds: this one only")
    add("--weights", default=DEFAULT_WEIGHTS, metavar="NAME|PATH", help="default: glyphs")
    add("--pair", metavar="NAME", help="of public and private data, for the records; default: from their names")
    add("--lookalikes", action="store_true", help="let retrieval show letters that look like digits")
    add("--out", type=Path, required=True, metavar="DIR", help="folder of records; those there are kept")
    add("--settings", type=Path, metavar="JSON", help="settings of the methods, as experiments.tuning writes them")
    add("--features", metavar="NAME|PATH", help=_FEATURES_HELP.format("the network that belongs to the weights"))
    add("--jobs", type=int, default=1, help="processes that share the work, one thread each; default: 1")
    add("--device", default="cpu", help="cpu or cuda; default: cpu")
    add("--json", action="store_true", help="print the records' paths as JSON")

    add = command("forecast", _forecast, "what to expect of a release, from public data alone")
    add("--num-private", type=int, required=True, help="declared number of private images")
    add("--epsilon", type=float, required=True, help="privacy budget")
    add("--delta", type=float, default=1e-5, help="default: 1e-5")
    add("--neighboring-relation", choices=NEIGHBORING_RELATIONS, default=NEIGHBORING_RELATIONS[0])
    add("--classes", type=int, default=1, help="classes that share the images; default: 1, unlabelled")
    add("--method", default="hyperdp", help="default: hyperdp, which is what release does")
    add("--coverage", type=float, default=0.8, help="of the intervals; default: 0.8")
    add("--rehearsals", type=int, help="default: as few as the coverage needs, 9 for 0.8")
    add("--num-images", type=int, default=400, help="samples scored in each rehearsal; default: 400")
    add("--weights", default=DEFAULT_WEIGHTS, metavar="NAME|PATH", help="default: glyphs")
    add("--device", default="cpu", help="cpu or cuda; default: cpu")
    add("--json", action="store_true", help="print everything as JSON")

    add = command("train", _train, "train base model, encoder and hypernetwork on public data; resumes")
    add("--preset", metavar="NAME", help="for example: glyphs, or the best: glyphs-nested; this or --public")
    add("--public", nargs="+", metavar="FOLDER|NPZ", help="public images of your own: folders, of classes or not, .npz")
    add("--size", type=int, help="of --public: side in pixels, 16 to 64; default: the images' own")
    add("--channels", type=int, choices=(1, 3), help="of --public: grey or colour; default: the images' own")
    add("--mirror", action="store_true", help="of --public: a mirrored image is as likely as the image")
    add("--no-stretch", action="store_true", help="of --public: leave contrast as it is, of private images too")
    add("--minutes", type=float, help="of --public: time for all the training; default: hours")
    add("--licence", metavar="TEXT", help="of --public: the images' licence, for the model card")
    add("--out", type=Path, metavar="DIR", help="weights and checkpoints; default: runs/NAME, or runs/images")
    add("--restart", action="store_true", help="begin anew rather than resume")
    add("--seed", type=int, metavar="N", help="of all the training; default: the preset's, 0")
    add("--device", default="cpu", help="cpu or cuda; default: cpu")

    add = command("audit", _audit, "attack the mechanism and bound its privacy from below (exit code 1 if refuted)")
    add("--epsilon", type=float, default=1.0, help="budget whose claim is attacked; default: 1")
    add("--delta", type=float, default=1e-5, help="default: 1e-5")
    add("--neighboring-relation", choices=NEIGHBORING_RELATIONS, default=NEIGHBORING_RELATIONS[0])
    add("--trials", type=int, default=200_000, help="runs on each of two neighbouring data sets; default: 200000")
    add("--dp-sgd", action="store_true", help="audit the DP-SGD of the rivals instead, in one run of 1000 canaries")
    add("--attacks", action="store_true", help="guess instead who was in, from releases of digits: a few minutes")
    add("--mutants", action="store_true", help="show instead which checks catch which broken mechanism")
    add("--json", action="store_true", help="print everything as JSON")

    add = command("verify", _verify, "recompute a release's certificate (exit code 1 and a list if it fails)")
    add("folder", metavar="DIR", type=Path, help="a release")
    add("--json", action="store_true", help="print the problems as JSON")
    return parser
