"""How many labels a linear head needs: accuracy over the number of training images.

`few_shot` draws so many images of every class, `learning_curve` a fraction of every
class, and both train the exact head on each draw and score it on the whole test
split. The backbone does not run, so that a curve with five draws a point is a
matter of seconds to a few minutes.

What keeps the curve clean:

- **Draws depend on nothing but themselves.** The images of a class come from
  ``default_rng((seed, images drawn, class))`` over its rows in order. Other classes,
  other sizes asked for in the same call, and what was computed before change
  nothing; the same cache gives the same images again. Sizes are drawn
  separately: the 5 shots of a seed are not the first 5 of its 10.
- **Test images are scored and do nothing else.** The penalty is the one given, for
  every size; no size, seed or penalty is picked by what it scores.
- **An interval says what it is about.** With several draws it is Student's, for the
  mean over draws of training images on these test images. With a single one,
  as when all images are used, there is no spread of draws to see, and it is
  the interval of that one head over draws of test images.
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
from ..progress import OnProgress, Progress, silent
from ..runs import cache_facts, new_run, runs_folder, save_run
from ..store.cache import Cache, load, newest_cache
from .head import Head
from .labelled import Labelled, labelled
from .lbfgs import train_lbfgs
from .recipes import ExactRecipe

FULL = "full"


def few_shot(
    cache: str | Path | Cache | None = None,
    *,
    shots: Sequence[int | str] = (1, 2, 5, 10, 25, FULL),
    seeds: int = 5,
    recipe: ExactRecipe | None = None,
    metric: str = "top1",
    runs: str | Path | None = None,
    on_progress: OnProgress = silent,
) -> list[CurvePoint]:
    """Score heads trained on a few images of every class.

    Parameters
    ----------
    cache : str, Path or Cache, optional
        The features, of the images as they are; the newest cache by default.
    shots : sequence of int or "full"
        Images of every class; ``"full"`` takes all there are.
    seeds : int
        How many draws of each size: seeds 0, 1, … below this.
    recipe : ExactRecipe, optional
        Penalty and tolerance; `ExactRecipe()` by default. The penalty lambda is the same at
        every size. Since the objective takes the mean over images, C = 1 / (N * lambda):
        a hundredth of the images means a hundred times the C. That is scikit-learn's way
        to count and not a weaker penalty. It is not the best one for each size either:
        the fewer the images, the larger the lambda that suits them, and a curve with
        penalties chosen on a holdout at each size would lie higher at its start.
    metric : str
        One of `featcache.metrics.METRICS`.
    runs : str or Path, optional
        Folder for the record; ``cache/runs`` by default.
    on_progress : callable
        Hears of fits.

    Returns
    -------
    list of CurvePoint
        In the order of ``shots``.

    Raises
    ------
    CacheError
        No cache, or one that cannot be trusted.
    DatasetError
        A class has fewer labelled training images than shots, there are fewer than 2
        classes, or no labelled test images.
    RecipeError
        Shots or seeds below 1, none at all, or no such metric.
    OutputError
        The record cannot be written.

    References
    ----------
    Kolesnikov et al., "Big Transfer (BiT): General visual representation learning",
    ECCV 2020: 1, 5, 10, 25 and 100 images per class.
    """
    cache = _opened(cache)
    train = labelled(cache, "train")
    present = _present(cache, train)
    sizes = []
    for asked in shots:
        if asked == FULL:
            sizes.append(Size(present, None))
            continue
        if not isinstance(asked, (int, np.integer)) or asked < 1:
            raise RecipeError(f"shots: expected numbers from 1 or {FULL!r}, found {asked!r}")
        scarce = int(present.argmin())
        if present[scarce] < asked:
            advice = f"ask for at most {present[scarce]}, or " if present[scarce] else ""
            raise DatasetError(
                f"{cache.path}: expected {asked} training images of every class, found "
                f"{present[scarce]} of {cache.class_names[scarce]!r}; {advice}extract a data set "
                "with more images of it"
            )
        sizes.append(Size(np.full_like(present, asked), int(asked)))
    return curve(cache, train, sizes, seeds, recipe, metric, "few-shot", runs, on_progress)


def learning_curve(
    cache: str | Path | Cache | None = None,
    *,
    fractions: Sequence[float] = (0.01, 0.03, 0.1, 0.3, 1.0),
    seeds: int = 5,
    recipe: ExactRecipe | None = None,
    metric: str = "top1",
    runs: str | Path | None = None,
    on_progress: OnProgress = silent,
) -> list[CurvePoint]:
    """Score heads trained on a fraction of every class.

    Whether more labels would help is how much the curve still rises at its end.

    Parameters
    ----------
    cache, seeds, recipe, metric, runs, on_progress
        As in `few_shot`, what it says of C included.
    fractions : sequence of float
        Above 0, at most 1. Of every class so much is drawn, rounded, at least one image:
        small fractions keep the proportions of the classes as well as whole images can.

    Returns
    -------
    list of CurvePoint
        In the order of ``fractions``.

    Raises
    ------
    CacheError
        No cache, or one that cannot be trusted.
    DatasetError
        Fewer than 2 classes, or no test images.
    RecipeError
        A fraction out of range, seeds below 1, no fraction at all, or no such metric.
    OutputError
        The record cannot be written.
    """
    cache = _opened(cache)
    train = labelled(cache, "train")
    present = _present(cache, train)
    sizes = []
    for fraction in fractions:
        if not 0 < fraction <= 1:
            raise RecipeError(f"fractions: expected above 0 and at most 1, found {fraction}")
        counts = np.floor(fraction * present + 0.5).astype(np.int64)
        sizes.append(Size(np.maximum(counts, np.minimum(present, 1)), None))
    return curve(cache, train, sizes, seeds, recipe, metric, "learning-curve", runs, on_progress)


def _opened(cache: str | Path | Cache | None) -> Cache:
    if not isinstance(cache, Cache):
        cache = load(cache if cache is not None else newest_cache())
    cache.check_vectors()
    return cache


def _present(cache: Cache, train: Labelled) -> np.ndarray:
    """Return the number of training images of each class: int64 (K,)."""
    present = np.bincount(train.labels, minlength=len(cache.class_names))
    if np.count_nonzero(present) < 2:
        raise DatasetError(
            f"{cache.path}: expected training images of at least 2 classes, found "
            f"{np.count_nonzero(present)}; extract a data set with more"
        )
    return present


@dataclass(frozen=True)
class Size:
    """How many images of each class a point takes: int64 (K,)."""

    counts: np.ndarray
    shots: int | None


def curve(
    cache: Cache,
    train: Labelled,
    sizes: Sequence[Size],
    seeds: int,
    recipe: ExactRecipe | None,
    metric: str,
    kind: str,
    runs: str | Path | None,
    on_progress: OnProgress,
) -> list[CurvePoint]:
    """Draw, train and score every size with every seed; save the record."""
    if not sizes:
        raise RecipeError(f"{kind}: expected at least one size, found none")
    if seeds < 1:
        raise RecipeError(f"seeds: expected at least 1, found {seeds}")
    if metric not in METRICS:
        raise RecipeError(f"metric: expected one of {', '.join(METRICS)}, found {metric!r}")
    recipe = recipe if recipe is not None else ExactRecipe()
    n_classes, labels = len(cache.class_names), train.labels
    test = labelled(cache, "test")
    run = new_run(runs_folder(runs), kind)
    stage = kind.replace("learning-", "learning ")
    # All images can be drawn in one way only.
    draws = [1 if size.counts.sum() == len(labels) else seeds for size in sizes]
    done = 0
    points: Rows[CurvePoint] = Rows()
    for size, n_draws in zip(sizes, draws, strict=True):
        started = time.perf_counter()
        scores, converged = [], True
        for seed in range(n_draws):
            on_progress(Progress(stage, done, sum(draws), "fit"))
            rows = draw(labels, size.counts, seed)
            features = [train.views[0][rows]]
            solution = train_lbfgs(features, labels[rows], n_classes, recipe)
            converged = converged and bool(solution.converged)
            head = Head(solution.weight, solution.bias, cache.class_names, cache.fingerprint)
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
    save_run(
        run,
        {
            "kind": kind,
            "method": kind,
            "metric": metric,
            "points": [asdict(point) for point in points],
            "seeds": seeds,
            "recipe": asdict(recipe),
            "n_train": len(labels),
            "n_test": len(test.labels),
            "wall_s": sum(point.wall_s for point in points),
            **cache_facts(cache),
        },
    )
    return points


def draw(labels: np.ndarray, counts: np.ndarray, seed: int) -> np.ndarray | slice:
    """Return sorted rows, int64 (sum of counts,): so many of each class.

    All rows come as a slice, which spares a copy of the features.
    """
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
    """What heads trained on so many images score.

    Parameters
    ----------
    n_train : int
        Images in each draw.
    shots : int or None
        Images of every class; None where classes were drawn by fraction or whole.
    scores : tuple of float
        One per seed, in the order of seeds, each in [0, 1]; a single one where all
        images are used, since there is one way to do that.
    mean : float
        Of the scores.
    interval : tuple of 2 floats
        95 %. Of two or more scores `mean_interval`: Student's, of the mean over draws. Of one
        score `score_interval`: over draws of test images, Wilson's for top-1.
    converged : bool
        Whether every head reached the recipe's tolerance.
    wall_s : float
        Duration of drawing, training and scoring, all seeds together.
    """

    n_train: int
    shots: int | None
    scores: tuple[float, ...]
    mean: float
    interval: tuple[float, float]
    converged: bool
    wall_s: float
