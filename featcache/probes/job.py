"""One head to train: its penalty chosen where it is not given, then solved."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..errors import EngineUnavailableError
from ..frameworks import cuda_status, import_oneflow
from ..metrics import score
from ..progress import OnProgress
from ..sampling import stratified_rows
from .blocks import Features, Rows
from .lbfgs import train_lbfgs
from .objective import Solution
from .recipes import ExactRecipe, ProbeRecipe
from .ridge import train_ridge
from .sgd import train_sgd
from .sweep import Sweep, divide, sweep
from .weights import total_weight

_SWEEP_SHARE = 0.4  # of a budget
_PART_ROWS = 20  # times dimensions or classes: on so many images a budget's penalty is chosen


@dataclass(frozen=True)
class Job:
    """A solver, its recipe, and how its penalty is chosen.

    The recipe's penalty holds where ``C`` is None and ``sweep`` is False. With ``patience`` one
    part of the images is held out, also of few, and `sweep` ends early. ``ends`` are values of
    `time.perf_counter`, of the sweep and of all; ``start`` is what the sweep found.
    """

    solver: str
    recipe: ProbeRecipe | ExactRecipe
    C: float | None
    sweep: bool
    metric: str
    device: str
    seed: int
    grid: Sequence[float] | None = None
    patience: int | None = None
    ends: tuple[float, float] = (math.inf, math.inf)
    start: Solution | None = None

    def within(self, budget: float | None) -> Job:
        """Return the job that ends so many seconds from now."""
        now = time.perf_counter()
        if budget is None:
            return self
        return replace(self, ends=(now + _SWEEP_SHARE * budget, now + budget))

    def with_penalty(
        self,
        views: Sequence[Features],
        labels: np.ndarray,
        n_classes: int,
        on_progress: OnProgress,
        *,
        weights: np.ndarray | None = None,
        groups: np.ndarray | None = None,
        holdout: tuple[Features, np.ndarray] | None = None,
    ) -> tuple[Job, Sweep | None]:
        """Return the job with its penalty in the recipe, and the sweep that chose it.

        The sweep scores ``holdout`` where it is given, features (M, D) and labels (M,), and else a
        part of the images, of which one of ``groups`` (N,) is on one side.
        """
        swept, C, start = None, self.C, None
        if self.sweep:

            def holdout_score(predicted: np.ndarray, held: np.ndarray) -> float:
                return score(self.metric, predicted, held, n_classes)

            some, known, each = views, labels, weights
            part = _part(views, labels) if self.ends[0] < math.inf else None
            if part is not None:
                some, known = [Rows(features, part) for features in views], labels[part]
                each = None if weights is None else weights[part]
                groups = None if groups is None else groups[part]
            quick = part is not None or self.patience is not None
            parts = divide(
                some,
                known,
                weights=each,
                groups=groups,
                holdout=holdout,
                seed=self.seed,
                in_turn=not quick,
            )
            exact = self.recipe if isinstance(self.recipe, ExactRecipe) else None
            swept, solution = sweep(
                parts,
                n_classes,
                exact if self.solver == "lbfgs" else None,
                grid=self.grid,
                score=holdout_score,
                patience=self.patience,
                until=self.ends[0],
                on_progress=on_progress,
            )
            C, start = swept.C, solution if quick else None
        if C is None:
            return self, None
        decay = 1 / (C * total_weight(views, weights))
        recipe = replace(self.recipe, weight_decay=decay)
        return replace(self, recipe=recipe, start=start), swept

    def train(
        self,
        views: Sequence[Features],
        labels: np.ndarray,
        n_classes: int,
        on_progress: OnProgress,
        *,
        weights: np.ndarray | None = None,
    ) -> Solution:
        """Return the head at the recipe's penalty."""
        if isinstance(self.recipe, ProbeRecipe):
            return train_sgd(
                views,
                labels,
                n_classes,
                self.recipe,
                framework=import_oneflow(),
                weights=weights,
                device=_sgd_device(self.device),
                seed=self.seed,
                on_progress=on_progress,
            )
        if self.solver == "lbfgs":
            return train_lbfgs(
                views,
                labels,
                n_classes,
                self.recipe,
                weights=weights,
                start=self.start,
                until=self.ends[1],
                on_progress=on_progress,
            )
        return train_ridge(views, labels, n_classes, self.recipe.weight_decay, weights)


def _part(views: Sequence[Features], labels: np.ndarray) -> np.ndarray | None:
    """Return sorted rows on which a penalty is chosen in little time, or None for all."""
    most = _PART_ROWS * max(views[0].shape[1], int(labels.max()) + 1)
    if 2 * most > len(labels):
        return None
    return stratified_rows(labels, most, 0, "part of the training images")


def _sgd_device(device: str) -> str:
    """Return the device on which OneFlow trains the head; a GPU was never tried so far."""
    if device == "cpu":
        return "cpu"
    usable, reason = cuda_status()
    if device == "cuda" and not usable:
        raise EngineUnavailableError(
            f"device: expected a GPU that OneFlow can use, found {reason}; use --device cpu"
        )
    return "cuda" if usable else "cpu"
