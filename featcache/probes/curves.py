"""Accuracy over the number of training images: `few_shot` and `learning_curve`.

- **Draws depend on the cache, seed, class and size alone**, from ``default_rng((seed, size,
  class))``: other classes or sizes in the same call change nothing. Each size is drawn anew: the 5
  shots of a seed are not the first 5 of its 10.
- **The test split chooses nothing.** The penalty of each draw is chosen by generalized
  cross-validation of least squares on that draw, or by a rule for few shots; see `_penalty`.
- **Intervals**: with several draws Student's, of the mean over draws; with one, as where all images
  are used, that of one head over draws of test images.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from ..errors import DatasetError, RecipeError
from ..metrics import METRICS, mean_interval, score, score_interval
from ..notebook import Rows, ShownAsTable
from ..options import check_choice, with_options
from ..progress import OnProgress, Progress, silent
from ..runs import cache_facts, new_run, runs_folder, save_run
from ..store.cache import Cache
from .head import Head
from .lbfgs import train_lbfgs
from .objective import Solution
from .question import Asked, Question, ask, class_counts, opened
from .recipes import ExactRecipe
from .ridge import Ridge

FULL = "full"
SOLVERS = ("lbfgs", "ridge")
_LEAST_SHOTS = 5  # images of a class, on average: fewer say too little about the penalty
_GRID = 2.0 ** np.arange(-20, 4, 0.5)  # of penalties, in units of the features' total variance


@dataclass(frozen=True)
class CurveOptions(Question):
    """Options that both curves share."""

    seeds: int = 5
    solver: str = "lbfgs"
    recipe: ExactRecipe | None = None
    metric: str = "top1"
    runs: str | Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seeds < 1:
            raise RecipeError(f"seeds: expected at least 1, found {self.seeds}")
        check_choice("solver", self.solver, SOLVERS)
        check_choice("metric", self.metric, METRICS)


@dataclass(frozen=True)
class FewShotOptions(CurveOptions):
    """Options of `few_shot`, which describes them."""

    shots: Sequence[int | str] = (1, 2, 5, 10, 25, FULL)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shots(self.shots)


@dataclass(frozen=True)
class LearningCurveOptions(CurveOptions):
    """Options of `learning_curve`, which describes them."""

    fractions: Sequence[float] = (0.01, 0.03, 0.1, 0.3, 1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not len(self.fractions):
            raise RecipeError("fractions: expected at least one number, found none")
        for fraction in self.fractions:
            if not 0 < fraction <= 1:
                raise RecipeError(f"fractions: expected above 0 and at most 1, found {fraction}")


@with_options(FewShotOptions)
def few_shot(
    cache: str | Path | Cache | None = None,
    *,
    options: FewShotOptions,
    on_progress: OnProgress = silent,
) -> list[CurvePoint]:
    """Test heads trained on a few images of every class.

    Parameters
    ----------
    cache : str, Path or Cache, optional
        The features, without flip views; the newest cache by default.
    shots : sequence of int or "full"
        Images of every class; ``"full"`` takes all of them.
    seeds : int
        Number of draws of each size: seeds 0, 1, … below this.
    solver : str
        ``"lbfgs"``, the exact optimum, or ``"ridge"``, least squares in closed form.
    recipe : ExactRecipe, optional
        A penalty for every draw, and a tolerance. By default the penalty of each draw is chosen on
        that draw: by generalized cross-validation, or for fewer than 5 images of each class in
        proportion to the features' variance.
    metric : str
        ``"top1"``, ``"balanced"`` or ``"f1"``.
    target, task, separator, labels, by, split_column, group, where, weight_column
        As in `Question`; the target must be classes.
    runs : str or Path, optional
        Folder for the record; ``cache/runs`` by default.
    on_progress : callable
        Called with the number of finished fits.

    Returns
    -------
    list of CurvePoint
        In the order of ``shots``.

    Raises
    ------
    CacheError
        No cache, or a damaged one.
    DatasetError
        A class with fewer labelled training images than shots, fewer than 2 classes with
        training images, or no labelled test images.
    TableError
        No such column, or one that does not fit.
    RecipeError
        An option out of range, or a target that is no classes.
    OutputError
        The record cannot be written.

    References
    ----------
    Kolesnikov et al., "Big Transfer (BiT): General visual representation learning",
    ECCV 2020: 1, 5, 10, 25 and 100 images per class.

    Golub, Heath and Wahba, "Generalized cross-validation as a method for choosing a good ridge
    parameter", Technometrics 21 (1979), 215-223.
    """
    cache = opened(cache)
    asked = ask(cache, options).only_classes("few-shot curve")
    return _curve(
        cache, asked, sizes_of(cache, asked, options.shots), options, "few-shot", on_progress
    )


@with_options(LearningCurveOptions)
def learning_curve(
    cache: str | Path | Cache | None = None,
    *,
    options: LearningCurveOptions,
    on_progress: OnProgress = silent,
) -> list[CurvePoint]:
    """Test heads trained on a fraction of every class.

    If the curve still rises at its end, more labels would help.

    Parameters
    ----------
    cache, seeds, solver, recipe, metric, target, task, separator, labels, by, split_column, group,
    where, weight_column, runs, on_progress
        As in `few_shot`.
    fractions : sequence of float
        Above 0, at most 1: the fraction of each class, rounded, at least one image.

    Returns
    -------
    list of CurvePoint
        In the order of ``fractions``.

    Raises
    ------
    CacheError
        No cache, or a damaged one.
    DatasetError
        Fewer than 2 classes with training images, or no labelled test images.
    TableError
        No such column, or one that does not fit.
    RecipeError
        An option out of range, or a target that is no classes.
    OutputError
        The record cannot be written.
    """
    cache = opened(cache)
    asked = ask(cache, options).only_classes("learning curve")
    present = class_counts(cache, asked.train.labels, len(asked.names))
    sizes = []
    for fraction in options.fractions:
        counts = np.floor(fraction * present + 0.5).astype(np.int64)
        sizes.append(Size(np.maximum(counts, np.minimum(present, 1)), None))
    return _curve(cache, asked, sizes, options, "learning-curve", on_progress)


@dataclass(frozen=True)
class Size:
    """How many images of each class a point takes: int64 (K,)."""

    counts: np.ndarray
    shots: int | None


def sizes_of(cache: Cache, asked: Asked, shots: Sequence[int | str]) -> list[Size]:
    """Return the size of every number of shots; DatasetError where a class has fewer images."""
    present = class_counts(cache, asked.train.labels, len(asked.names))
    scarce = int(present.argmin())
    sizes = []
    for count in shots:
        if isinstance(count, str):
            sizes.append(Size(present, None))
            continue
        if present[scarce] < count:
            advice = f"ask for at most {present[scarce]}, or " if present[scarce] else ""
            raise DatasetError(
                f"{cache.path}: expected {count} training images of every class, found "
                f"{present[scarce]} of {asked.names[scarce]!r}; {advice}extract a data set "
                "with more images of it"
            )
        sizes.append(Size(np.full_like(present, count), int(count)))
    return sizes


def check_shots(shots: Sequence[int | str]) -> None:
    """Raise RecipeError unless they are numbers from 1 or "full"."""
    if not len(shots):
        raise RecipeError("shots: expected at least one number, found none")
    for count in shots:
        if count != FULL and (not isinstance(count, (int, np.integer)) or count < 1):
            raise RecipeError(f"shots: expected numbers from 1 or {FULL!r}, found {count!r}")


def _curve(
    cache: Cache,
    asked: Asked,
    sizes: Sequence[Size],
    options: CurveOptions,
    kind: str,
    on_progress: OnProgress,
) -> list[CurvePoint]:
    """Draw, train and test every size with every seed; save the record."""
    metric, recipe = options.metric, options.recipe
    train, test = asked.train, asked.test
    n_classes, labels = len(asked.names), train.labels
    run = new_run(runs_folder(options.runs), kind)
    stage = kind.replace("learning-", "learning ")
    # There is only one way to draw all images.
    draws = [1 if size.counts.sum() == len(labels) else options.seeds for size in sizes]
    done = 0
    points: Rows[CurvePoint] = Rows()
    for size, n_draws in zip(sizes, draws, strict=True):
        started = time.perf_counter()
        scores, decays, converged = [], [], True
        for seed in range(n_draws):
            on_progress(Progress(stage, done, sum(draws), "fit"))
            rows = draw(labels, size.counts, seed)
            weights = None if train.weights is None else train.weights[rows]
            solution, decay = fit(
                train.views[0][rows], labels[rows], n_classes, options.solver, recipe, weights
            )
            decays.append(decay)
            converged = converged and bool(solution.converged)
            head = Head(solution.weight, solution.bias, asked.names, cache.fingerprint)
            predicted = head.predict(test.views[0])
            scores.append(score(metric, predicted, test.labels, n_classes))
            done += 1
        if n_draws > 1:
            interval = mean_interval(scores)
        else:
            interval = score_interval(metric, predicted, test.labels, n_classes)
        points.append(
            CurvePoint(
                n_train=int(size.counts.sum()),
                shots=size.shots,
                scores=tuple(scores),
                mean=float(np.mean(scores)),
                interval=interval,
                weight_decays=tuple(decays),
                converged=converged,
                wall_s=time.perf_counter() - started,
            )
        )
    on_progress(Progress(stage, done, sum(draws), "fit"))
    record = {
        "kind": kind,
        "method": kind,
        "metric": metric,
        "points": [asdict(point) for point in points],
        "seeds": options.seeds,
        "solver": options.solver,
        "recipe": asdict(recipe) if recipe else None,
        "n_train": len(labels),
        "n_test": len(test.labels),
        "wall_s": sum(point.wall_s for point in points),
        "notes": asked.notes,
        **asked.describes,
        "question": options.record(),
        **cache_facts(cache),
    }
    save_run(run, record)
    return points


def draw(labels: np.ndarray, counts: np.ndarray, seed: int) -> np.ndarray | slice:
    """Draw sorted rows, int64 (sum of counts,); a slice where all are taken, to avoid a copy."""
    if counts.sum() == len(labels):
        return slice(None)
    present = np.bincount(labels, minlength=len(counts))
    by_class = np.split(np.argsort(labels, kind="stable"), np.cumsum(present)[:-1])
    drawn = []
    for index, (rows, count) in enumerate(zip(by_class, counts.tolist(), strict=True)):
        generator = np.random.default_rng((seed, count, index))
        drawn.append(generator.choice(rows, count, replace=False))
    return np.sort(np.concatenate(drawn))


def fit(
    features: np.ndarray,
    labels: np.ndarray,
    n_classes: int,
    solver: str = "lbfgs",
    recipe: ExactRecipe | None = None,
    weights: np.ndarray | None = None,
) -> tuple[Solution, float]:
    """Return a head on features (N, D), and its penalty: the recipe's, or one chosen on them."""
    ridge = None
    if recipe is None or solver == "ridge":
        ridge = Ridge([features], labels, n_classes, weights)
    decay = recipe.weight_decay if recipe else _penalty(ridge, labels, n_classes, solver)
    if solver == "ridge":
        assert ridge is not None
        solution = ridge.solve(decay)
    else:
        exact = replace(recipe or ExactRecipe(), weight_decay=decay)
        solution = train_lbfgs([features], labels, n_classes, exact, weights=weights)
    return solution, decay


def _penalty(ridge: Ridge | None, labels: np.ndarray, n_classes: int, solver: str) -> float:
    """Choose lambda for N features and K classes without other images.

    For least squares, leaving images out has a closed form: its lambda minimises GCV. The Hessian
    of logistic regression is that of least squares times p (1 - p), which is about 1/K where all
    classes are equally likely and at most 1/4, so its lambda is smaller: 2/K of the other.

    Of one or two images of a class nothing can be left out. There C = 1 / (N lambda) is 2 over the
    total variance of the features, a weak prior on scores of the order of 1: as in Gelman et al.,
    "A weakly informative default prior distribution for logistic and other regression models",
    Annals of Applied Statistics 2 (2008), 1360-1383.

    2/K and the 2 were found on CIFAR-10 with two backbones and on digits; see
    ``benchmarks/few_shot.py``.
    """
    assert ridge is not None
    variance = ridge.total_variance or 1.0
    present = len(np.unique(labels))
    if len(labels) < _LEAST_SHOTS * present:
        decay = variance / (2 * len(labels))
        return decay * n_classes if solver == "ridge" else decay
    grid = variance * _GRID
    decay = float(grid[np.argmin([ridge.gcv(value) for value in grid])])
    return decay if solver == "ridge" else 2 / n_classes * decay


@dataclass(frozen=True)
class CurvePoint(ShownAsTable):
    """The scores of heads trained on one number of images.

    Parameters
    ----------
    n_train : int
        Images in each draw.
    shots : int or None
        Images of every class; None for a fraction or all of them.
    scores : tuple of float
        One per seed, each in [0, 1]; only one where all images are used.
    mean : float
        Of the scores.
    interval : tuple of 2 floats
        95 %. For two or more scores Student's, of the mean over draws; for one score over draws
        of test images, Wilson's for top-1.
    converged : bool
        Whether every head reached the recipe's tolerance.
    wall_s : float
        Duration of drawing, training and testing, all seeds together.
    weight_decays : tuple of float
        The penalty lambda of each head.
    """

    n_train: int
    shots: int | None
    scores: tuple[float, ...]
    mean: float
    interval: tuple[float, float]
    converged: bool
    wall_s: float
    weight_decays: tuple[float, ...] = ()
