"""From a cache to a trained, checked and saved linear head."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .errors import CacheCorruptError
from .files import check_writable, user_path
from .metrics import wilson_interval
from .probes import (
    CheckResult,
    Evaluation,
    Head,
    Scaling,
    Sweep,
    evaluate_scores,
    feature_ingredients,
    save_head,
)
from .progress import OnProgress, silent
from .recipe import ExactRecipe, ProbeRecipe
from .runs import cache_facts, new_run, runs_folder, save_run
from .sampling import LIMIT_SEED, stratified_rows
from .solving import Job
from .store import Cache, CachedSplit, load, newest_cache

__all__ = ["ProbeResult", "probe"]


@dataclass(frozen=True)
class ProbeResult:
    """A linear head on cached features, and how good it is.

    Parameters
    ----------
    top1 : float
        Accuracy on the test split, in [0, 1].
    top1_interval : tuple of 2 floats
        Wilson's 95 % interval.
    n_train, n_test : int
        Images.
    solver : str
        ``"lbfgs"``, ``"ridge"`` or ``"sgd"``.
    wall_s : float
        Duration of sweep and training; the check and the reading not counted.
    head : Path
        Where the head was saved.
    check : CheckResult or None
        scikit-learn on the same features and objective.
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
    run : Path
        Folder of the record.
    """

    top1: float
    top1_interval: tuple[float, float]
    n_train: int
    n_test: int
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
    run: Path


def probe(
    cache: str | Path | Cache | None = None,
    *,
    solver: str | None = None,
    recipe: str | ProbeRecipe = "default",
    epochs: int | None = None,
    lr: float | None = None,
    weight_decay: float | None = None,
    C: float | None = None,
    sweep: bool | None = None,
    scale: str = "none",
    metric: str = "top1",
    train_limit: int | None = None,
    test_limit: int | None = None,
    seed: int = 0,
    check: bool = True,
    save_head_to: str | Path | None = None,
    runs: str | Path | None = None,
    on_progress: OnProgress = silent,
) -> ProbeResult:
    """Train a linear head on cached features, and check it.

    Parameters
    ----------
    cache : str, Path or Cache, optional
        The features; the newest cache by default.
    solver : str, optional
        ``"lbfgs"``: the exact optimum of the multinomial logistic regression, the
        default. ``"ridge"``: least squares on one-hot labels, in closed form.
        ``"sgd"``: in OneFlow; the default where a recipe, epochs or a rate are named.
    recipe : str or ProbeRecipe
        Of SGD: ``"default"`` trains to the optimum, ``"tutorial"`` is the tutorial's 3 epochs.
    epochs, lr : optional
        Of SGD: replace one value of the recipe. ``epochs`` asks for exactly that many.
    weight_decay, C : float, optional
        The penalty, as lambda or in scikit-learn's terms: C = 1 / (N * lambda).
    sweep : bool, optional
        Choose C on a stratified holdout of the training split; by default where no
        penalty is given, and never for SGD.
    scale : str
        ``"none"``, ``"standardize"`` (by the training split) or ``"l2"``.
    metric : str
        What the sweep goes by: ``"top1"``, ``"balanced"`` or ``"f1"``.
    train_limit, test_limit : int, optional
        Use a stratified draw of so many images: the same ones as `featcache.finetune` does.
    seed : int
        Of the holdout; for SGD of the order of images, the views, and the first head.
    check : bool
        Fit scikit-learn to the same objective and compare.
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
        No cache, or one that cannot be trusted.
    RecipeError
        A hyperparameter out of range, or no such recipe, solver, scale or metric.
    DatasetError
        A limit that leaves a class without images, or a class too small for a holdout.
    EngineUnavailableError
        SGD without OneFlow.
    OutputError
        The head or the record cannot be written.
    """
    job = Job.of(solver, recipe, epochs, lr, weight_decay, C, sweep, metric)
    if not isinstance(cache, Cache):
        cache = load(cache if cache is not None else newest_cache())
    cache.check_vectors()
    rows = _limited(cache.train, train_limit, "train")
    raw = [np.asarray(cache.train.view(name)[rows], np.float32) for name in cache.views]
    labels = cache.train.labels[rows]
    rows = _limited(cache.test, test_limit, "test")
    test_features = np.asarray(cache.test.features[rows], np.float32)
    test_labels = cache.test.labels[rows]
    if len(np.unique(labels)) < 2:
        raise CacheCorruptError(
            f"{cache.path}: expected training images of at least 2 classes, found one; extract a "
            "data set with more"
        )
    if save_head_to is not None:
        save_head_to = user_path(save_head_to)
        check_writable(save_head_to)
    scaling = Scaling(scale, raw)
    views = [scaling.apply(features) for features in raw]
    run = new_run(runs_folder(runs), "probe")

    n_classes = len(cache.class_names)
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
    scores = head.scores(test_features)
    checked = None
    if check:
        checked = job.check(
            views,
            labels,
            scaling.apply(test_features),
            test_labels,
            solution,
            scores.argmax(axis=1),
        )
    evaluation = evaluate_scores(scores, test_labels, calibrated=job.solver != "ridge")
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
        top1_interval=wilson_interval(evaluation.top1, len(test_labels)),
        n_train=len(labels),
        n_test=len(test_labels),
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
        run=run,
    )
    save_run(run, _record(result, cache))
    return result


def _limited(split: CachedSplit, limit: int | None, role: str) -> np.ndarray | slice:
    if limit is None:
        return slice(None)
    return stratified_rows(split.labels, limit, LIMIT_SEED, f"cached {role}")


def _record(result: ProbeResult, cache: Cache) -> dict[str, Any]:
    """Return the run's record: what `featcache.compare` reads, then everything else."""
    return {
        "kind": "probe",
        "method": f"probe {result.solver}",
        **asdict(result),
        **cache_facts(cache),
        "run": result.run.name,
        "n_epochs": result.epochs,
        "epochs": [],
        "images_per_s": result.n_train * result.epochs / result.wall_s,
    }
