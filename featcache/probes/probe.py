"""The whole of `featcache.probe`: read, scale, sweep, train, test, check, save."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CacheCorruptError, CacheMismatchError
from ..files import check_writable, user_path
from ..metrics import wilson_interval
from ..notebook import ShownAsTable
from ..progress import OnProgress, silent
from ..runs import cache_facts, new_run, runs_folder, save_run
from ..store.cache import Cache, load, newest_cache
from .blocks import Features, in_memory, loaded
from .cross_check import CheckResult
from .head import Evaluation, Head, evaluate_scores, save_head
from .ingredients import (
    class_differences,
    feature_differences,
    feature_ingredients,
    rounding_differences,
)
from .labelled import labelled
from .recipes import ExactRecipe, ProbeRecipe
from .scaling import Scaling
from .solving import Job
from .sweep import Sweep

# scikit-learn wants the features as one float32 array and makes a copy of it. Mapped features of
# more than this stay unchecked.
_CHECKED_BYTES = 2 << 30


def probe(
    cache: str | Path | Cache | None = None,
    *,
    solver: str | None = None,
    recipe: str | ProbeRecipe = "default",
    epochs: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    momentum: float | None = None,
    schedule: str | None = None,
    weight_decay: float | None = None,
    C: float | None = None,
    sweep: bool | None = None,
    scale: str = "none",
    metric: str = "top1",
    test: str | Path | Cache | None = None,
    train_limit: int | None = None,
    test_limit: int | None = None,
    seed: int = 0,
    device: str = "auto",
    mmap: bool = False,
    check: bool = True,
    save_head_to: str | Path | None = None,
    runs: str | Path | None = None,
    on_progress: OnProgress = silent,
) -> ProbeResult:
    """Train a linear head on cached features, and check it.

    Images whose label is -1 are left out of training and testing, and counted.

    Parameters
    ----------
    cache : str, Path or Cache, optional
        The features; the newest cache by default.
    solver : str, optional
        ``"lbfgs"``: the exact optimum of the multinomial logistic regression, the
        default. ``"ridge"``: least squares on one-hot labels, in closed form.
        ``"sgd"``: in OneFlow; the default where a recipe or one of its values is named.
    recipe : str or ProbeRecipe
        Of SGD: ``"default"`` trains to the optimum, ``"tutorial"`` is the tutorial's 3 epochs.
    epochs, batch_size, lr, momentum, schedule : optional
        Of SGD: each replaces one value of the recipe. ``epochs`` asks for exactly that many.
    weight_decay, C : float, optional
        The penalty, as lambda or in scikit-learn's terms: C = 1 / (N * lambda).
    sweep : bool, optional
        Choose C on a stratified holdout of the training split; by default where no
        penalty is given, and never for SGD.
    scale : str
        ``"none"``, ``"standardize"`` (by the training split) or ``"l2"``.
    metric : str
        What the sweep goes by: ``"top1"``, ``"balanced"`` or ``"f1"``.
    test : str, Path or Cache, optional
        Another cache, whose test split is tested on: features made alike, the same classes.
    train_limit, test_limit : int, optional
        Use a stratified draw of so many images: the same ones as `featcache.finetune` does.
    seed : int
        Of the holdout; for SGD of the order of images, the views, and the first head.
    device : str
        Of SGD: ``"auto"`` takes the GPU where OneFlow can use it; ``"cpu"``, ``"cuda"``.
    mmap : bool
        Leave the features on the disk and read them again in every pass, for a cache
        larger than the memory. Their checksums are then not verified. A `Cache` is
        taken as it was loaded.
    check : bool
        Fit scikit-learn to the same objective and compare. Mapped features of more than
        2 GiB are not checked, which is noted.
    save_head_to : str or Path, optional
        A file for the head besides the run's own.
    runs : str or Path, optional
        Folder for the record; ``cache/runs`` by default.
    on_progress : callable
        Hears of the sweep and of steps.

    Returns
    -------
    ProbeResult

    Raises
    ------
    CacheError
        No cache, one that cannot be trusted, features that are not finite, or a test
        cache whose features or classes are others.
    RecipeError
        A hyperparameter out of range, or no such recipe, solver, scale or metric.
    DatasetError
        No labelled images, a limit that leaves a class without any, or a class too small
        for a holdout.
    EngineUnavailableError
        SGD without OneFlow, or on a GPU that it cannot use.
    OutputError
        The head or the record cannot be written.
    """
    changes = {
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        "momentum": momentum,
        "schedule": schedule,
    }
    job = Job.of(
        solver,
        recipe,
        changes,
        weight_decay=weight_decay,
        C=C,
        sweep=sweep,
        metric=metric,
        device=device,
    )
    if not isinstance(cache, Cache):
        cache = load(cache if cache is not None else newest_cache(), mmap=mmap)
    cache.check_vectors()
    tested, notes = _test_cache(cache, test, mmap)
    train = labelled(cache, "train", views=cache.views, limit=train_limit)
    held = labelled(tested, "test", limit=test_limit)
    labels, n_classes = train.labels, len(cache.class_names)
    if len(np.unique(labels)) < 2:
        raise CacheCorruptError(
            f"{cache.path}: expected training images of at least 2 classes, found one; extract a "
            "data set with more"
        )
    if save_head_to is not None:
        save_head_to = user_path(save_head_to)
        check_writable(save_head_to)
    scaling = Scaling(scale, train.views)
    views = [loaded(scaling.lazily(features)) for features in train.views]
    run = new_run(runs_folder(runs), "probe")

    started = time.perf_counter()
    job, swept = job.with_penalty(views, labels, n_classes, seed, on_progress)
    solution = job.train(views, labels, n_classes, seed, on_progress)
    spent = time.perf_counter() - started

    weight, bias = scaling.fold(solution.weight, solution.bias)
    head = Head(
        weight,
        bias,
        cache.class_names,
        cache.fingerprint,
        "l2" if scale == "l2" else "none",
        feature_ingredients(cache.meta),
    )
    scores = head.scores(held.views[0])
    checked: CheckResult | None = None
    if check and _may_be_checked(views):
        checked = job.check(
            [np.asarray(features[:], np.float32) for features in views],
            labels,
            scaling.apply(np.asarray(held.views[0][:], np.float32)),
            held.labels,
            solution,
            scores.argmax(axis=1),
        )
    elif check:
        notes += ("not checked: scikit-learn would need a copy of the mapped features in memory",)
    evaluation = evaluate_scores(scores, held.labels, calibrated=job.solver != "ridge")
    provenance = {
        "solver": job.solver,
        "seed": seed,
        "scale": scale,
        "recipe": asdict(job.recipe),
        "top1": evaluation.top1,
    }
    head_path = run / "head.safetensors"
    save_head(head_path, head, provenance)
    if save_head_to is not None:
        head_path = user_path(save_head_to)
        save_head(head_path, head, provenance)
    decay = job.recipe.weight_decay
    result = ProbeResult(
        top1=evaluation.top1,
        top1_interval=wilson_interval(evaluation.top1, len(held.labels)),
        n_train=len(labels),
        n_test=len(held.labels),
        n_unlabelled=train.n_unlabelled + held.n_unlabelled,
        solver=job.solver,
        wall_s=spent,
        head=head_path,
        check=checked,
        C=1 / (decay * len(views) * len(labels)),
        weight_decay=decay,
        scale=scale,
        sweep=swept,
        metric=metric,
        evaluation=evaluation,
        recipe=job.recipe,
        seed=seed,
        epochs=solution.epochs,
        steps=solution.steps,
        converged=solution.converged,
        objective=solution.objective,
        gradient_norm=solution.gradient_norm,
        views=cache.views,
        cache=cache.path,
        test_cache=tested.path,
        notes=notes,
        run=run,
    )
    save_run(run, record_of(result, cache))
    return result


def _test_cache(
    cache: Cache, test: str | Path | Cache | None, mmap: bool
) -> tuple[Cache, tuple[str, ...]]:
    """Return the cache to test on, and how its features differ by rounding."""
    if test is None:
        return cache, ()
    if not isinstance(test, Cache):
        test = load(test, mmap=mmap)
    test.check_vectors()
    mine = feature_ingredients(cache.meta)
    differing = feature_differences(mine, test.meta, "training")
    if test.feature_dim != cache.feature_dim:
        differing.append(f"length: training {cache.feature_dim}, here {test.feature_dim}")
    differing += class_differences(cache.class_names, test.class_names, "training")
    if differing:
        raise CacheMismatchError(
            f"{test.path}: expected the features and classes of {cache.path}, found "
            f"{'; '.join(differing)}; extract the test images as the training images were"
        )
    rounding = rounding_differences(mine, test.meta, "training")
    return test, tuple(f"test features: {difference}" for difference in rounding)


def _may_be_checked(views: Sequence[Features]) -> bool:
    """Return whether the features are in memory anyway, or small."""
    n_bytes = sum(4 * features.shape[0] * features.shape[1] for features in views)
    return n_bytes <= _CHECKED_BYTES or all(in_memory(features) for features in views)


@dataclass(frozen=True)
class ProbeResult(ShownAsTable):
    """A linear head on cached features, and how good it is.

    Parameters
    ----------
    top1 : float
        Accuracy on the test split, in [0, 1].
    top1_interval : tuple of 2 floats
        Wilson's 95 % interval.
    n_train, n_test : int
        Images, all of them labelled.
    n_unlabelled : int
        Images of both splits whose label is -1: left out of training and testing.
    solver : str
        ``"lbfgs"``, ``"ridge"`` or ``"sgd"``.
    wall_s : float
        Duration of sweep and training; the check and the reading not counted.
    head : Path
        Where the head was saved.
    check : CheckResult or None
        scikit-learn on the same features and objective; None where it was not asked for, or
        would not fit into memory, which then is among the notes.
    C, weight_decay : float
        The penalty, in scikit-learn's terms and as lambda: C = 1 / (N * lambda).
    scale : str
        ``"none"``, ``"standardize"`` or ``"l2"``.
    sweep : Sweep or None
        How C was chosen; None where it was given.
    metric : str
        What the sweep went by: ``"top1"``, ``"balanced"`` or ``"f1"``.
    evaluation : Evaluation
        Per class, confusion, calibration and the rest, on the test split.
    recipe : ProbeRecipe or ExactRecipe
        The hyperparameters used.
    seed, epochs, steps : int
        What was run: passes over the features, updates of the head.
    converged : bool or None
        Whether the recipe's tolerance was reached; None where it asks for epochs alone.
    objective, gradient_norm : float
        At the head, over the training features.
    views : tuple of str
        The flip views that it was trained over.
    cache : Path
        The features.
    test_cache : Path
        Those of the test split: the same, unless another was named.
    notes : tuple of str
        What else to know: a check left out, another engine behind the test features.
    run : Path
        Folder of the record.
    """

    top1: float
    top1_interval: tuple[float, float]
    n_train: int
    n_test: int
    n_unlabelled: int
    solver: str
    wall_s: float
    head: Path
    check: CheckResult | None
    C: float
    weight_decay: float
    scale: str
    sweep: Sweep | None
    metric: str
    evaluation: Evaluation
    recipe: ProbeRecipe | ExactRecipe
    seed: int
    epochs: int
    steps: int
    converged: bool | None
    objective: float
    gradient_norm: float
    views: tuple[str, ...]
    cache: Path
    test_cache: Path
    notes: tuple[str, ...]
    run: Path


def record_of(result: ProbeResult, cache: Cache) -> dict[str, Any]:
    """Return the run's record: what `featcache.compare` reads, then everything else."""
    return {
        "kind": "probe",
        "method": f"probe {result.solver}",
        **asdict(result),
        **cache_facts(cache),
        "class_names": list(cache.class_names),
        "run": result.run.name,
        "n_epochs": result.epochs,
        "epochs": [],
        "images_per_s": result.n_train * result.epochs / result.wall_s,
    }
