"""The fits of a curve: images of each class are drawn, a head trained, the test split scored."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ..errors import RecipeError
from ..labelled import Labelled, labelled
from ..metrics import METRICS, mean_interval, score, score_interval
from ..notebook import Rows
from ..probes import Head, train_lbfgs
from ..progress import OnProgress, Progress
from ..recipe import ExactRecipe
from ..runs import cache_facts, new_run, runs_folder, save_run
from ..store import Cache
from ._point import CurvePoint

__all__ = ["Size", "curve", "draw"]


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
