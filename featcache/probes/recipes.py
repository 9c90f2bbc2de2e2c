"""Hyperparameters of a probe, checked when they are made."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from ..errors import RecipeError
from ..options import check_choice

_COUNTS = ("epochs", "batch_size", "max_iterations", "patience")
_RATES = ("lr", "head_lr", "backbone_lr")


def check_common(recipe: Any, *, least_batch: int = 1, may_lack_penalty: bool = False) -> None:
    """Raise RecipeError where a field that many recipes share, found by its name, is out of range.

    None is always allowed; ``may_lack_penalty`` allows a weight decay of 0.
    """
    for field in fields(recipe):
        value = getattr(recipe, field.name)
        if value is None:
            continue
        name = field.name.replace("_", " ")
        least = least_batch if field.name == "batch_size" else 1
        if field.name in _COUNTS and value < least:
            raise RecipeError(f"{name}: expected at least {least}, found {value}")
        if field.name in _RATES and not (math.isfinite(value) and value > 0):
            raise RecipeError(f"{name}: expected a positive number, found {value}")
        if field.name == "weight_decay" and not (math.isfinite(value) and value >= 0):
            raise RecipeError(f"{name}: expected 0 or a positive number, found {value}")
        if field.name == "weight_decay" and value == 0 and not may_lack_penalty:
            raise RecipeError(
                f"{name}: expected a positive number (without a penalty, separable classes "
                "have no optimum), found 0"
            )
        if field.name == "momentum" and not 0 <= value < 1:
            raise RecipeError(f"{name}: expected a number from 0 to below 1, found {value}")


MAX_ROUNDS = 5
PROBE_SCHEDULES = ("constant", "cosine")


@dataclass(frozen=True)
class ProbeRecipe:
    """How a linear head is trained on cached features.

    The objective is mean cross-entropy + weight_decay / 2 * ||W||^2.

    Parameters
    ----------
    epochs : int
        Least number of passes over the training features.
    min_steps : int
        Least number of steps: small data sets get more epochs.
    batch_size : int
        Features per step.
    lr : float
        Learning rate. With ``whiten``, in units of the inverse curvature bound, so
        that one value suits every backbone and data set.
    momentum : float
        In [0, 1).
    weight_decay : float
        lambda of the objective; scikit-learn's C is 1 / (N * lambda).
    nesterov : bool
        Nesterov's form of momentum.
    schedule : str
        One of `PROBE_SCHEDULES`. ``"cosine"``: the rate falls to 0 along half a cosine, step
        by step (Loshchilov and Hutter, ICLR 2017). ``"constant"``: it stays.
    whiten : bool
        Take the steps in coordinates in which the features are centred and decorrelated. The
        objective and its optimum stay the same; SGD reaches it in seconds instead of minutes.
    decay_bias : bool
        Whether the bias is penalised too, as when an optimizer is given every parameter.
    tolerance : float or None
        With ``whiten`` and unless None, the schedule is run again, up to `MAX_ROUNDS` times in
        all, while the estimated gap of the objective to its optimum exceeds this fraction. Below
        0.1 nats, where classes are almost separated, the fraction is of 0.1 nats.
    """

    epochs: int = 20
    min_steps: int = 2000
    batch_size: int = 512
    lr: float = 1.0
    momentum: float = 0.9
    weight_decay: float = 5e-4
    nesterov: bool = True
    schedule: str = "cosine"
    whiten: bool = True
    decay_bias: bool = False
    tolerance: float | None = 1e-3

    def __post_init__(self) -> None:
        check_common(self)
        check_choice("schedule", self.schedule, PROBE_SCHEDULES)


@dataclass(frozen=True)
class ExactRecipe:
    """How L-BFGS finds the exact optimum of the same objective; the bias is not penalised.

    Parameters
    ----------
    weight_decay : float
        lambda of the objective; scikit-learn's C is 1 / (N * lambda).
    tolerance : float
        Stop when the gap of the objective to its optimum, by Newton's decrement, is at most this
        fraction of it. A tolerance of 1e-4 or more is of 0.001 nats at least.
    max_iterations : int
        Stop after this many at the latest; the solution then says that it did not converge.
    """

    weight_decay: float = 5e-4
    tolerance: float = 1e-6
    max_iterations: int = 500

    def __post_init__(self) -> None:
        check_common(self)
        if not 0 < self.tolerance < 1:
            raise RecipeError(f"tolerance: expected a number from 0 to 1, found {self.tolerance}")

    @property
    def decay_bias(self) -> bool:
        """Whether the bias is penalised too."""
        return False


# "tutorial" is method 3 of the tutorial: SGD(momentum=0.9, weight_decay=5e-4) at 1e-3 over weight
# and bias, batches of 64, 3 epochs. "default" keeps its weight decay, the best of six on two
# stratified holdouts of CIFAR-10's training images (benchmarks/weight_decay.py), and trains to
# the optimum.
PROBE_RECIPES = {
    "default": ProbeRecipe(),
    "tutorial": ProbeRecipe(
        epochs=3,
        min_steps=0,
        batch_size=64,
        lr=1e-3,
        nesterov=False,
        schedule="constant",
        whiten=False,
        decay_bias=True,
    ),
}
