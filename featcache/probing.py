"""From a cache to a trained, checked and saved linear head."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .errors import CacheCorruptError, RecipeError
from .files import check_writable
from .frameworks import import_oneflow
from .metrics import top1, wilson_interval
from .probes import CheckResult, Head, check_with_sklearn, save_head, train_sgd
from .progress import OnProgress, silent
from .recipe import PROBE_RECIPES, ProbeRecipe
from .runs import new_run, runs_folder, save_run
from .sampling import LIMIT_SEED, stratified_rows
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
        ``"sgd"``.
    wall_s : float
        Duration of the training; the check and the reading not counted.
    head : Path
        Where the head was saved.
    check : CheckResult or None
        scikit-learn on the same features and objective.
    recipe : ProbeRecipe
        The hyperparameters used.
    seed, epochs, steps : int
        What was run.
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
    recipe: ProbeRecipe
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
    recipe: str | ProbeRecipe = "default",
    epochs: int | None = None,
    lr: float | None = None,
    weight_decay: float | None = None,
    train_limit: int | None = None,
    test_limit: int | None = None,
    seed: int = 0,
    check: bool = True,
    save_head_to: str | Path | None = None,
    runs: str | Path | None = None,
    on_progress: OnProgress = silent,
) -> ProbeResult:
    """Train a linear head on cached features, by SGD in OneFlow, and check it.

    Parameters
    ----------
    cache : str, Path or Cache, optional
        The features; the newest cache by default.
    recipe : str or ProbeRecipe
        ``"default"`` trains to the optimum, ``"tutorial"`` is the tutorial's 3 epochs.
    epochs, lr, weight_decay : optional
        Replace one value of the recipe. ``epochs`` asks for exactly that many.
    train_limit, test_limit : int, optional
        Use a stratified draw of so many images: the same ones as `featcache.finetune` does.
    seed : int
        Of the order of images, the views, and the first head.
    check : bool
        Fit scikit-learn's LogisticRegression to the same objective and compare.
    save_head_to : str or Path, optional
        A file for the head besides the run's own.
    runs : str or Path, optional
        Folder for the record; ``cache/runs`` by default.
    on_progress : callable
        Hears of steps.

    Returns
    -------
    ProbeResult

    Raises
    ------
    CacheError
        No cache, or one that cannot be trusted.
    RecipeError
        A hyperparameter out of range, or no such recipe.
    DatasetError
        A limit that leaves a class without images.
    EngineUnavailableError
        OneFlow cannot be imported here.
    OutputError
        The head or the record cannot be written.
    """
    chosen = _recipe(recipe, epochs, lr, weight_decay)
    if not isinstance(cache, Cache):
        cache = load(cache if cache is not None else newest_cache())
    rows = _limited(cache.train, train_limit, "train")
    features = [cache.train.view(name)[rows] for name in cache.views]
    labels = cache.train.labels[rows]
    rows = _limited(cache.test, test_limit, "test")
    test_features, test_labels = cache.test.features[rows], cache.test.labels[rows]
    if len(np.unique(labels)) < 2:
        raise CacheCorruptError(
            f"{cache.path}: expected training images of at least 2 classes, found one; extract a "
            "data set with more"
        )
    if save_head_to is not None:
        check_writable(Path(save_head_to).parent)
    run = new_run(runs_folder(runs), "probe")
    framework = import_oneflow()

    solution = train_sgd(
        features,
        labels,
        len(cache.class_names),
        chosen,
        framework=framework,
        seed=seed,
        on_progress=on_progress,
    )
    head = Head(solution.weight, solution.bias, cache.class_names, cache.fingerprint)
    predicted = head.predict(test_features)
    accuracy = top1(predicted, test_labels)
    checked = None
    if check:
        checked = check_with_sklearn(
            features,
            labels,
            test_features,
            test_labels,
            chosen,
            head_objective=solution.objective,
            head_predicted=predicted,
        )

    provenance = {"solver": "sgd", "seed": seed, "recipe": asdict(chosen), "top1": accuracy}
    head_path = run / "head.safetensors"
    save_head(head_path, head, provenance)
    if save_head_to is not None:
        head_path = Path(save_head_to)
        save_head(head_path, head, provenance)
    result = ProbeResult(
        top1=accuracy,
        top1_interval=wilson_interval(accuracy, len(test_labels)),
        n_train=len(labels),
        n_test=len(test_labels),
        solver="sgd",
        wall_s=solution.wall_s,
        head=head_path,
        check=checked,
        recipe=chosen,
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


def _recipe(
    recipe: str | ProbeRecipe, epochs: int | None, lr: float | None, weight_decay: float | None
) -> ProbeRecipe:
    if isinstance(recipe, str):
        if recipe not in PROBE_RECIPES:
            raise RecipeError(
                f"recipe: expected one of {', '.join(PROBE_RECIPES)}, found {recipe!r}"
            )
        recipe = PROBE_RECIPES[recipe]
    changes: dict[str, Any] = {}
    if epochs is not None:
        # Someone who names a number of epochs wants that number.
        changes.update(epochs=epochs, min_steps=0, tolerance=float("inf"))
    if lr is not None:
        changes["lr"] = lr
    if weight_decay is not None:
        changes["weight_decay"] = weight_decay
    return replace(recipe, **changes)


def _record(result: ProbeResult, cache: Cache) -> dict[str, Any]:
    """Return the run's record: what `featcache.compare` reads, then everything else."""
    meta = cache.meta
    return {
        "kind": "probe",
        "method": "probe",
        **asdict(result),
        "n_epochs": result.epochs,
        "epochs": [],
        "images_per_s": result.n_train * result.epochs / result.wall_s,
        "features_wall_s": meta["wall_s"],
        "dataset": meta["dataset"],
        "dataset_digest": meta["dataset_digest"],
        "backbone": meta["backbone"],
        "weights": meta["weights"],
        "weights_sha256": meta["weights_sha256"],
        "size": meta["preprocess"]["size"],
        "engine": meta["engine"],
        "device": meta["device"],
    }
