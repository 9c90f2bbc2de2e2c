"""One linear head, four decisions: which solver, which penalty, training, checking.

`Job.of` settles what was asked for before anything is read; the other methods are
the steps, on arrays.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..errors import EngineUnavailableError, RecipeError
from ..frameworks import cuda_status, import_oneflow
from ..metrics import METRICS, score
from ..progress import OnProgress
from .blocks import Features
from .cross_check import CheckResult, check_ridge, check_with_sklearn
from .lbfgs import train_lbfgs
from .objective import Solution
from .recipes import PROBE_RECIPES, ExactRecipe, ProbeRecipe
from .ridge import train_ridge
from .sgd import train_sgd
from .sweep import Sweep, sweep_lbfgs, sweep_ridge

SOLVERS = ("lbfgs", "ridge", "sgd")


@dataclass(frozen=True)
class Job:
    """A solver, its recipe, and how its penalty is found.

    Parameters
    ----------
    solver : str
        One of `SOLVERS`.
    recipe : ProbeRecipe or ExactRecipe
        Hyperparameters; the penalty in it holds where C is None and nothing is swept.
    C : float or None
        The penalty in scikit-learn's terms.
    sweep : bool
        Whether to choose C on a holdout.
    metric : str
        What the sweep goes by.
    device : str
        Where SGD runs: ``"cpu"`` or ``"cuda"``.
    """

    solver: str
    recipe: ProbeRecipe | ExactRecipe
    C: float | None
    sweep: bool
    metric: str
    device: str

    @classmethod
    def of(
        cls,
        solver: str | None = None,
        recipe: str | ProbeRecipe = "default",
        changes: Mapping[str, Any] | None = None,
        *,
        weight_decay: float | None = None,
        C: float | None = None,
        sweep: bool | None = None,
        metric: str = "top1",
        device: str = "auto",
    ) -> Job:
        """Check the arguments against each other before anything is read.

        ``changes`` are values of SGD's recipe by name, None where the recipe's own holds.
        """
        named = {name: value for name, value in (changes or {}).items() if value is not None}
        for_sgd = recipe != "default" or bool(named)
        if solver is None:
            solver = "sgd" if for_sgd else "lbfgs"
        if solver not in SOLVERS:
            raise RecipeError(f"solver: expected one of {', '.join(SOLVERS)}, found {solver!r}")
        if metric not in METRICS:
            raise RecipeError(f"metric: expected one of {', '.join(METRICS)}, found {metric!r}")
        if solver != "sgd" and for_sgd:
            raise RecipeError(
                f"solver {solver}: expected no {', '.join(named).replace('_', ' ') or 'recipe'}, "
                "which is SGD's; leave it out, or use --solver sgd"
            )
        if C is not None and not (math.isfinite(C) and C > 0):
            raise RecipeError(f"C: expected a positive number, found {C}")
        if C is not None and weight_decay is not None:
            raise RecipeError("penalty: expected C or the weight decay, found both; give one")
        given = C is not None or weight_decay is not None
        if sweep and (given or solver == "sgd"):
            raise RecipeError(
                "sweep: expected lbfgs or ridge and no penalty of your own, found "
                f"{'a given penalty' if given else 'SGD'}; leave one of them out"
            )
        chosen: ProbeRecipe | ExactRecipe = ExactRecipe()
        if solver == "sgd":
            chosen = _sgd_recipe(recipe, named)
        if weight_decay is not None:
            chosen = replace(chosen, weight_decay=weight_decay)
        sweep = solver != "sgd" and not given if sweep is None else sweep
        if solver == "sgd":
            device = _device(device)
        elif device not in ("auto", "cpu"):
            raise RecipeError(
                f"device: expected auto or cpu with {solver}, found {device!r}; use --solver sgd"
            )
        return cls(solver, chosen, C, sweep, metric, device)

    def with_penalty(
        self,
        views: Sequence[Features],
        labels: np.ndarray,
        n_classes: int,
        seed: int,
        on_progress: OnProgress,
    ) -> tuple[Job, Sweep | None]:
        """Return the job with its penalty settled, and the sweep that settled it."""
        swept, C = None, self.C
        if self.sweep:

            def judged(predicted: np.ndarray, wanted: np.ndarray) -> float:
                return score(self.metric, predicted, wanted, n_classes)

            more: dict[str, Any] = {"seed": seed, "score": judged, "on_progress": on_progress}
            if isinstance(self.recipe, ExactRecipe) and self.solver == "lbfgs":
                swept = sweep_lbfgs(views, labels, n_classes, self.recipe, **more)
            else:
                swept = sweep_ridge(views, labels, n_classes, **more)
            C = swept.C
        if C is None:
            return self, None
        decay = 1 / (C * len(views) * len(labels))
        return replace(self, recipe=replace(self.recipe, weight_decay=decay)), swept

    def train(
        self,
        views: Sequence[Features],
        labels: np.ndarray,
        n_classes: int,
        seed: int,
        on_progress: OnProgress,
    ) -> Solution:
        """Return the head at the settled penalty."""
        if isinstance(self.recipe, ProbeRecipe):
            return train_sgd(
                views,
                labels,
                n_classes,
                self.recipe,
                framework=import_oneflow(),
                device=self.device,
                seed=seed,
                on_progress=on_progress,
            )
        if self.solver == "lbfgs":
            return train_lbfgs(views, labels, n_classes, self.recipe, on_progress=on_progress)
        return train_ridge(views, labels, n_classes, self.recipe.weight_decay)

    def check(
        self,
        views: Sequence[np.ndarray],
        labels: np.ndarray,
        test_features: np.ndarray,
        test_labels: np.ndarray,
        solution: Solution,
        predicted: np.ndarray,
    ) -> CheckResult:
        """Return what scikit-learn finds on the same objective."""
        found: dict[str, Any] = {
            "head_objective": solution.objective,
            "head_predicted": predicted,
        }
        if self.solver == "ridge":
            decay = self.recipe.weight_decay
            return check_ridge(views, labels, test_features, test_labels, decay, **found)
        return check_with_sklearn(views, labels, test_features, test_labels, self.recipe, **found)


def _sgd_recipe(recipe: str | ProbeRecipe, changes: Mapping[str, Any]) -> ProbeRecipe:
    if isinstance(recipe, str):
        if recipe not in PROBE_RECIPES:
            raise RecipeError(
                f"recipe: expected one of {', '.join(PROBE_RECIPES)}, found {recipe!r}"
            )
        recipe = PROBE_RECIPES[recipe]
    if "epochs" in changes:
        # Someone who names a number of epochs wants that number.
        recipe = replace(recipe, min_steps=0, tolerance=None)
    return replace(recipe, **changes)


def _device(wanted: str) -> str:
    """Return where OneFlow trains the head: never run on a GPU so far."""
    if wanted not in ("auto", "cpu", "cuda"):
        raise RecipeError(f"device: expected auto, cpu or cuda, found {wanted!r}")
    if wanted == "cpu":
        return "cpu"
    usable, why = cuda_status()
    if wanted == "cuda" and not usable:
        raise EngineUnavailableError(
            f"device: expected a GPU that OneFlow can use, found {why}; use --device cpu"
        )
    return "cuda" if usable else "cpu"
