"""Accuracy over the number of training images: `few_shot` and `learning_curve`.

- **Draws depend on the cache, seed, class and size alone**, from ``default_rng((seed, size,
  class))``: other classes or sizes in the same call change nothing. Each size is drawn anew: the 5
  shots of a seed are not the first 5 of its 10.
- **The test split chooses nothing.** The penalty is the same at every size.
- **Intervals**: with several draws Student's, of the mean over draws; with one, as where all images
  are used, that of one head over draws of test images.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ..errors import DatasetError, RecipeError
from ..metrics import METRICS, mean_interval, score, score_interval
from ..notebook import Rows, ShownAsTable
from ..options import with_options
from ..progress import OnProgress, Progress, silent
from ..runs import cache_facts, new_run, runs_folder, save_run
from ..store.cache import Cache
from .head import Head
from .lbfgs import train_lbfgs
from .question import Asked, Question, ask, class_counts, opened
from .recipes import ExactRecipe, check_choice

FULL = "full"


@dataclass(frozen=True)
class CurveOptions(Question):
    """Options that both curves share."""

    seeds: int = 5
    recipe: ExactRecipe | None = None
    metric: str = "top1"
    runs: str | Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seeds < 1:
            raise RecipeError(f"seeds: expected at least 1, found {self.seeds}")
        check_choice("metric", self.metric, METRICS)


@dataclass(frozen=True)
class FewShotOptions(CurveOptions):
    """Options of `few_shot`, which describes them."""

    shots: Sequence[int | str] = (1, 2, 5, 10, 25, FULL)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not len(self.shots):
            raise RecipeError("shots: expected at least one number, found none")
        for shots in self.shots:
            if shots != FULL and (not isinstance(shots, (int, np.integer)) or shots < 1):
                raise RecipeError(f"shots: expected numbers from 1 or {FULL!r}, found {shots!r}")


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
    recipe : ExactRecipe, optional
        Penalty and tolerance, by default those of `ExactRecipe()`. The penalty lambda is the
        same at every size, so C = 1 / (N * lambda) grows as N shrinks. Small samples are best
        served by a larger lambda: with a penalty chosen for each size the curve would start
        higher.
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
    """
    cache = opened(cache)
    asked = ask(cache, options).only_classes("few-shot curve")
    present = class_counts(cache, asked.train.labels, len(asked.names))
    scarce = int(present.argmin())
    sizes = []
    for shots in options.shots:
        if isinstance(shots, str):
            sizes.append(Size(present, None))
            continue
        if present[scarce] < shots:
            advice = f"ask for at most {present[scarce]}, or " if present[scarce] else ""
            raise DatasetError(
                f"{cache.path}: expected {shots} training images of every class, found "
                f"{present[scarce]} of {asked.names[scarce]!r}; {advice}extract a data set "
                "with more images of it"
            )
        sizes.append(Size(np.full_like(present, shots), int(shots)))
    return _curve(cache, asked, sizes, options, "few-shot", on_progress)


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
    cache, seeds, recipe, metric, target, task, separator, labels, by, split_column, group, where,
    weight_column, runs, on_progress
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


def _curve(
    cache: Cache,
    asked: Asked,
    sizes: Sequence[Size],
    options: CurveOptions,
    kind: str,
    on_progress: OnProgress,
) -> list[CurvePoint]:
    """Draw, train and test every size with every seed; save the record."""
    metric, recipe = options.metric, options.recipe or ExactRecipe()
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
        scores, converged = [], True
        for seed in range(n_draws):
            on_progress(Progress(stage, done, sum(draws), "fit"))
            rows = draw(labels, size.counts, seed)
            weights = None if train.weights is None else train.weights[rows]
            solution = train_lbfgs(
                [train.views[0][rows]], labels[rows], n_classes, recipe, weights=weights
            )
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
        "recipe": asdict(recipe),
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
    """

    n_train: int
    shots: int | None
    scores: tuple[float, ...]
    mean: float
    interval: tuple[float, float]
    converged: bool
    wall_s: float
