"""The grid methods x budgets x seeds: one cell, one record; run again to resume.

Every cell sees the same private images, the same base model, the same budget and relation, and is scored by
the same code.  All methods but DP-SGD read one and the same noisy sum, so that they differ in what they do
with it and not in their luck.

Hyper-parameters are never tuned on private images: `tune` tries them on public tasks *dressed as private
ones* (as many classes, images and noise), the same number of trials for each method.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hyperdp_lib import artefacts, data, embedding, records
from hyperdp_lib.baselines import controls, dp_sgd
from hyperdp_lib.baselines.dp_training import TrainConfig
from hyperdp_lib.data import ImageSet, InputError
from hyperdp_lib.experiments.methods import METHODS, Bench, Settings, generator_for, public_models_source
from hyperdp_lib.progress import progress_bar
from hyperdp_lib.records import Record

SETTINGS_FILE = "comparison.json"


def compare(
    private: str | Path | tuple[ImageSet, ImageSet],
    *,
    methods: Iterable[str] = ("all",),
    epsilons: Iterable[float] = (1.0,),
    seeds: Iterable[int] = range(3),
    out: str | Path,
    num_private: int | None = None,
    delta: float = 1e-5,
    neighboring_relation: str = "add_or_remove_one",
    hypernetwork: str | Path | tuple[nn.Module, Any] = "glyphs",
    feature_network: embedding.FeatureNetwork | None = None,
    tasks: controls.PublicTasks | None = None,
    lookalikes: bool = False,
    settings: Settings | None = None,
    public_models: Callable[[str], tuple[Any, ...]] | None = None,
    pair: str | None = None,
    device: str = "cpu",
    command: str | None = None,
    jobs: int = 1,
    exact: bool = False,
) -> list[Path]:
    """Run the missing cells of a grid and write a record for each.

    Parameters
    ----------
    private : str, path or (train, test)
        A named data set with its own test set (``"digits"``, ``"mnist"``), a folder or ``.npz`` (a fifth is held out,
        evenly by class), or two image sets.
    methods : iterable of str
        Names from `METHODS`, or ``"all"``: every method whose public weights are there, and that can do without labels
        if there are none.
    epsilons : iterable of float
        Budgets; see `grid`.
    seeds : iterable of int
        Of subset, noise and sampling.  The noise is reproducible, so these are demonstrations, not releases.
        Seed 0 also gets a sheet of samples beside each record.
    out : path
        Folder of records.  A cell whose record is there is skipped; records made with other weights, delta
        or relation are an error.
    num_private : int, optional
        Private training images to use, evenly by class; default all.  This number is treated as declared.
    hypernetwork : str, path or (base model, hypernetwork)
        Pretrained name or folder.
    feature_network : FeatureNetwork, optional
        What scores are computed in; default the network that belongs to the weights.
    lookalikes : bool
        Whether retrieval may show the letters that look like digits. The shipped weights never saw them, so this
        gives an advantage to the control alone; the pair's name says which.
    settings : Settings, optional
        Default: those that ship with the hypernetwork, else `Settings()`.
    public_models : callable, optional
        See `methods.Bench`; default the rivals' models that ship with the library.
    jobs : int
        Processes, each with one thread, that share the cells. The steps of a training are too short for several threads
        to help one another much.
    exact : bool
        Whether to run the budgets given and no others; see `grid`.

    Returns
    -------
    list of Path
        One per cell, in the order of the grid.
    """
    methods, epsilons = tuple(methods), tuple(epsilons)
    grid(methods, epsilons, exact=exact)  # refuse bad input before anything is loaded
    if jobs < 1:
        raise InputError(f"jobs must be at least 1, got {jobs}.")
    records.require_commit(out)
    chosen = settings or found_settings(hypernetwork)
    budgets = tuple(grid(methods, epsilons, exact=exact, weights=weights_name(hypernetwork)))
    for method, epsilon in budgets:
        check_budget(method, epsilon, delta, neighboring_relation, chosen)
    setting = functools.partial(
        _set_up,
        private,
        num_private=num_private,
        delta=delta,
        neighboring_relation=neighboring_relation,
        hypernetwork=hypernetwork,
        feature_network=feature_network,
        tasks=tasks,
        lookalikes=lookalikes,
        settings=settings,
        public_models=public_models,
        pair=pair,
        device=device,
        budgets=budgets,
    )
    shared = setting()
    labelled = shared.bench.private_train.labels is not None
    once = grid(methods, epsilons, exact=exact, labelled=labelled, weights=weights_name(hypernetwork))
    cells = [(method, epsilon, seed) for seed in seeds for method, epsilon in once]
    if tasks is None and any(METHODS[method].needs_public for method, _ in once):
        public_data(hypernetwork)  # says what is missing before any work
    paths = [shared.path(out, *cell) for cell in cells]
    for path in paths:
        if path.exists():
            shared.require_same(path)
    missing = [cell for path, cell in zip(paths, cells, strict=True) if not path.exists()]
    bar = progress_bar(total=len(cells), initial=len(cells) - len(missing), desc="compare", unit="cell")
    with bar:
        if jobs == 1:
            for method, epsilon, seed in missing:
                bar.set_postfix_str(f"{method} eps {epsilon:g} seed {seed}")
                shared.run(method, epsilon, seed, out, command, sheet=seed == 0)
                bar.update()
            return paths
        # spawned, not forked: a fork of a process whose thread pool has run may hang
        context = torch.multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(jobs, context, initializer=_start_worker, initargs=(setting,)) as pool:
            # backwards: the slowest cells stand last, and none of them should be left to run alone at the end
            waiting = [
                pool.submit(_run_in_worker, *cell, out, command, cell[2] == 0) for cell in reversed(missing)
            ]
            for finished in as_completed(waiting):
                finished.result()
                bar.update()
    return paths


def grid(
    methods: Iterable[str],
    epsilons: Iterable[float],
    *,
    exact: bool = False,
    labelled: bool = True,
    weights: str = "glyphs",
) -> list[tuple[str, float]]:
    """Methods and budgets that a comparison runs for each seed, in its order.

    Parameters
    ----------
    methods : iterable of str
        See `compare`; with ``"all"``, those that need labels are left out where there are none.
    epsilons : iterable of float
        Budgets > 0, and ``inf`` for no noise.
    exact : bool
        By default a method gets all finite budgets, if it is private, and those in `Method.also` (no noise, or 0 for
        the control that reads nothing private), asked for or not. Exactly: only those of them that are in ``epsilons``,
        where 0 is allowed, too.
    labelled : bool
        Whether the private images have labels.
    weights : str
        Name of the hypernetwork: ``"all"`` are the methods whose public models are there for it.

    Examples
    --------
    >>> grid(["dp_deepsets", "public_only"], [1.0])
    [('dp_deepsets', 1.0), ('dp_deepsets', inf), ('public_only', 0.0)]
    >>> grid(["dp_deepsets", "public_only"], [1.0], exact=True)
    [('dp_deepsets', 1.0)]
    """
    methods = tuple(methods)
    chosen = _method_names(methods, weights)
    budgets = tuple(dict.fromkeys(float(epsilon) for epsilon in epsilons))
    if not all(epsilon > 0 or (exact and epsilon == 0) for epsilon in budgets):
        raise InputError(f"every epsilon must be positive, or inf for no noise, got {budgets}.")
    helpless = [] if labelled else [name for name in chosen if METHODS[name].needs_labels]
    if helpless and "all" not in methods:
        raise InputError(f"{', '.join(helpless)} needs labels, but these images have none: leave it out.")
    finite = [epsilon for epsilon in budgets if 0 < epsilon < math.inf]
    cells = [
        (method, epsilon)
        for method in chosen
        if method not in helpless
        for epsilon in (*(finite if METHODS[method].private else ()), *METHODS[method].also)
        if epsilon in budgets or not exact
    ]
    if not cells:
        raise InputError(f"none of {', '.join(methods)} runs at epsilon {', '.join(f'{e:g}' for e in budgets)}.")
    return cells


def check_budget(
    method: str,
    epsilon: float,
    delta: float,
    neighboring_relation: str,
    settings: Settings,
    num_private: int | None = None,
    num_classes: int = 1,
) -> None:
    """Raise `InputError` for a cell whose budget its method cannot keep; quick, and reads nothing.

    As long as the number of images is not known, only what holds for any is checked.
    """
    config = settings.config(method, epsilon) if METHODS[method].default is not None and epsilon > 0 else None
    if not isinstance(config, TrainConfig):
        return
    if num_private is None:
        dp_sgd.check_budget(epsilon, delta, neighboring_relation)
        return
    shared = getattr(config, "mode", "per_class") == "shared"
    config.check_budget(epsilon, delta, neighboring_relation, num_private / (1 if shared else num_classes))


@dataclass(frozen=True, eq=False)
class _Grid:
    """What all cells share."""

    bench: Bench
    pair: str
    num_private: int
    fixed: Mapping[str, Any]

    def path(self, out: str | Path, method: str, epsilon: float, seed: int) -> Path:
        return Path(out) / f"{records.cell_name(self.pair, method, epsilon, self.num_private, seed)}.json"

    def require_same(self, path: Path) -> None:
        """A record that is kept must be of the same comparison."""
        record = Record.from_json(path.read_text(encoding="utf-8"))
        same = {name: record.settings.get(name) for name in self.fixed} == dict(self.fixed)
        budget = (self.bench.delta, self.bench.neighboring_relation)
        scored_in = record.scores.get("features")
        if scored_in not in (None, self.bench.feature_network.name):
            raise InputError(
                f"{path.name} was scored in the features {scored_in}: choose another --out, or delete the old records."
            )
        if not same or (record.delta, record.neighboring_relation) != budget:
            raise InputError(
                f"{path.name} was made with other weights, delta or neighbouring relation: "
                "choose another --out, or delete the old records."
            )

    def run(
        self, method: str, epsilon: float, seed: int, out: str | Path, command: str | None, *, sheet: bool
    ) -> None:
        """Run one cell, score it, write its record and perhaps a sheet of samples."""
        started = datetime.now(UTC)
        private = self.bench.private_train
        own = dataclasses.replace(self.bench, private_train=subset(private, self.num_private, seed))
        # noise alone, epsilon = 0, is given the coordinates of epsilon = 1, whose noise it gets
        own = own.fitted(epsilon or 1.0)
        outcome = METHODS[method].run(own, epsilon, seed)
        scores = own.score(outcome)
        if outcome.images is not None and sheet:
            labels = outcome.labels if private.class_names else None
            drawn = ImageSet(outcome.images, labels, private.class_names)
            picture = self.path(out, method, epsilon, seed).with_suffix(".png")
            picture.parent.mkdir(parents=True, exist_ok=True)
            data.save_grid(picture, drawn, columns=20, rows=10)
        # last, because where a record is, its cell is done
        Record(
            pair=self.pair,
            method=method,
            epsilon=epsilon,
            delta=own.delta,
            neighboring_relation=own.neighboring_relation,
            num_private=self.num_private,
            seed=seed,
            scores=scores,
            seconds={name: round(value, 3) for name, value in outcome.seconds.items()},
            trained_parameters=outcome.trained_parameters,
            noise_dimension=outcome.noise_dimension,
            num_releases=outcome.num_releases,
            settings={**self.fixed, "sampling_steps": own.settings.sampling_steps, **outcome.settings},
            provenance=records.provenance(command, own.device, started),
        ).save(out)


def _set_up(
    private: str | Path | tuple[ImageSet, ImageSet],
    *,
    num_private: int | None,
    delta: float,
    neighboring_relation: str,
    hypernetwork: str | Path | tuple[nn.Module, Any],
    feature_network: embedding.FeatureNetwork | None,
    tasks: controls.PublicTasks | None,
    lookalikes: bool,
    settings: Settings | None,
    public_models: Callable[[str], tuple[Any, ...]] | None,
    pair: str | None,
    device: str,
    budgets: Sequence[tuple[str, float]],
) -> _Grid:
    from hyperdp_lib.pretrained import geometry, stretches

    weights = weights_name(hypernetwork)
    if isinstance(hypernetwork, tuple):
        side, channels = (int(getattr(hypernetwork[0].config, name)) for name in ("sample_size", "in_channels"))
    else:
        side, channels = geometry(hypernetwork)
    stretch = not isinstance(hypernetwork, tuple) and stretches(hypernetwork)
    train, test, name = private_sets(private, side, channels, stretch)
    count, classes = num_private or len(train), len(train.class_names or ("one",))
    for method, epsilon in budgets:  # before a model is loaded
        tuned = settings or found_settings(hypernetwork)
        check_budget(method, epsilon, delta, neighboring_relation, tuned, count, classes)
    base_model, network, features, found = load_models(hypernetwork, feature_network, device)
    if pair is None:
        variant = "-no-lookalikes" if weights == "glyphs" and not lookalikes else ""  # only glyphs have a list of them
        pair = f"{weights}-{name}{variant}" if hypernetwork == weights else name
    size = len(train) if num_private is None else num_private
    needed = 2 * features.dimension  # for a Fréchet distance; better said now than after the first training
    if len(train) < needed or (settings or found).num_images < needed:
        raise InputError(
            f"scores in {features.dimension} features need {needed} training images and as many samples: "
            f"there are {len(train)} and {(settings or found).num_images}."
        )
    if not 1 <= size <= len(train):
        raise InputError(f"num_private must lie in 1 .. {len(train)}, got {size}.")
    bank = bank_source(tasks, settings or found, hypernetwork, lookalikes)

    def examples() -> Tensor:
        return public_images(bank(network.encoder))

    bench = Bench(
        base_model=base_model,
        hypernetwork=network,
        feature_network=features,
        bank=bank,
        public_models=public_models or public_models_source(base_model, network, examples, device, weights),
        private_train=train,
        private_test=test,
        private_reference=train,
        settings=settings or found,
        delta=delta,
        neighboring_relation=neighboring_relation,
        device=device,
    )
    fixed = {
        "weights_sha256": artefacts.tensors_sha256({**base_model.state_dict(), **network.state_dict()}),
        "noise": "seeded demonstration - NOT PRIVATE",
    }
    return _Grid(bench, pair, size, fixed)


_WORKERS_GRID: list[_Grid] = []  # one, in a worker process


def _start_worker(setting: Callable[[], _Grid]) -> None:
    torch.set_num_threads(1)
    _WORKERS_GRID.append(setting())


def _run_in_worker(
    method: str, epsilon: float, seed: int, out: str | Path, command: str | None, sheet: bool
) -> None:
    _WORKERS_GRID[0].run(method, epsilon, seed, out, command, sheet=sheet)


def subset(private: ImageSet, size: int, seed: int) -> ImageSet:
    """``size`` images chosen at random, evenly by class (sizes differ by one at most).

    Examples
    --------
    >>> ten = ImageSet(torch.zeros(10, 1, 16, 16), torch.arange(10) % 2, ("a", "b"))
    >>> torch.bincount(subset(ten, 6, seed=0).labels).tolist()
    [3, 3]
    """
    if not 1 <= size <= len(private):
        raise InputError(f"num_private must lie in 1 .. {len(private)}, got {size}.")
    if size == len(private):
        return private
    return _take(private, _even_order(private, seed)[:size])


def _method_names(methods: Iterable[str], weights: str = "glyphs") -> tuple[str, ...]:
    names = tuple(methods)
    if "all" in names:
        return tuple(name for name, method in METHODS.items() if method.available(weights))
    unknown = [name for name in names if name not in METHODS]
    if unknown or not names:
        raise InputError(f"unknown method {', '.join(unknown)!r}: choose all, or from {', '.join(METHODS)}.")
    return tuple(dict.fromkeys(names))


def private_sets(
    private: str | Path | tuple[ImageSet, ImageSet], side: int = 16, channels: int = 1, stretch: bool = False
) -> tuple[ImageSet, ImageSet, str]:
    """Training set, test set and name of what `compare` is given; two image sets are taken as they are."""
    if isinstance(private, tuple):
        return (*private, "private")
    named, *part = str(private).split("/", 1)  # a class of a named set has its own test images, too
    if f"{named}-test" in data.NAMED_DATA_SETS:
        splits = ("/".join([f"{named}{split}", *part]) for split in ("", "-test"))
        train, test = (data.load_named_or_path(split, side, channels, stretch=stretch) for split in splits)
        return train, test, "-".join([named, *part]).replace(" ", "-")
    whole = data.load_named_or_path(private, side, channels, stretch=stretch)
    if len(whole) < 5:
        raise InputError("a comparison holds a fifth of the images out for tests: give five or more.")
    kept = _even_order(whole, seed=0)
    fifth = len(whole) // 5
    return _take(whole, kept[fifth:]), _take(whole, kept[:fifth]), Path(private).stem


def _even_order(images: ImageSet, seed: int) -> Tensor:
    """A random order in which every class gives its first image, then every class its second, ..."""
    order = torch.randperm(len(images), generator=generator_for(seed))
    if images.labels is None:
        return order
    turns = torch.zeros(len(images), dtype=torch.long)
    for label in torch.unique(images.labels):
        mine = images.labels[order] == label
        turns[mine] = torch.arange(int(mine.sum()))
    return order[turns.argsort(stable=True)]


def _take(images: ImageSet, indices: Tensor) -> ImageSet:
    chosen = indices.sort().values
    labels = None if images.labels is None else images.labels[chosen]
    return ImageSet(images.images[chosen], labels, images.class_names)


def load_models(hypernetwork: Any, feature_network: Any, device: str) -> tuple[Any, Any, Any, Settings]:
    """Base model, hypernetwork, feature network, and the settings that ship with them."""
    from hyperdp_lib import pretrained

    if isinstance(hypernetwork, tuple):
        base_model, network = hypernetwork
    else:
        base_model, network = pretrained.load_pretrained(hypernetwork, device)
    if feature_network is None:
        scoring = pretrained.features_file("glyphs" if isinstance(hypernetwork, tuple) else hypernetwork)
        feature_network = embedding.FeatureNetwork.from_pretrained(scoring)
    return base_model.to(device), network.to(device), feature_network.to(device), found_settings(hypernetwork)


def found_settings(hypernetwork: Any) -> Settings:
    """The settings that ship with the weights, else the defaults."""
    from hyperdp_lib.pretrained import resolve

    path = None if isinstance(hypernetwork, tuple) else resolve(hypernetwork) / SETTINGS_FILE
    return Settings.from_json(path.read_text(encoding="utf-8")) if path and path.is_file() else Settings()


def public_data(hypernetwork: Any) -> Any:
    """What the tasks are made of that trained these weights, as their manifest says; an InputError if it does not."""
    from hyperdp_lib.public.training import public_source

    if isinstance(hypernetwork, tuple):
        raise InputError("models given as objects do not say what they were trained on: give their public tasks=.")
    return public_source(hypernetwork)


def bank_source(
    tasks: Any, settings: Settings, hypernetwork: Any = "glyphs", lookalikes: bool = False
) -> Callable[[Any], controls.PublicBank]:
    """Makes the bank of an encoder at its first call; by default from the public data that trained the weights."""
    made: dict[tuple[type, int], controls.PublicBank] = {}

    def bank(encoder: Any) -> controls.PublicBank:
        key = type(encoder), encoder.config.dimension  # encoders of one comparison differ in these, if at all
        if key not in made:
            source = tasks
            if source is None:
                config = public_data(hypernetwork)
                source = (dataclasses.replace(config, lookalikes=True) if lookalikes else config).tasks()
            made[key] = controls.PublicBank.build(
                source,
                encoder,
                num_tasks=settings.bank_tasks,
                images_per_task=settings.bank_images,
                progress=True,
            )
        return made[key]

    return bank


def weights_name(hypernetwork: Any) -> str:
    """Under which name public training made these weights, or those that they build on."""
    from hyperdp_lib.pretrained import resolve

    if isinstance(hypernetwork, tuple):
        return "glyphs"
    manifest = json.loads((resolve(hypernetwork) / "manifest.json").read_text(encoding="utf-8"))
    return str(manifest.get("builds_on", manifest.get("name", "custom")))


def public_images(bank: controls.PublicBank, count: int = 1000) -> Tensor:
    """``count`` images of the bank, of as many tasks as possible: ``(count, C, H, W)`` in [-1, 1]."""
    each = -(-count // len(bank))
    return data.from_levels(bank.pixels[:, :each].flatten(0, 1)[:count])
