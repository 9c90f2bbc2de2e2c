"""Recipes of a linear head on cached features."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import RecipeError
from ._checks import check_common

__all__ = ["MAX_ROUNDS", "PROBE_RECIPES", "PROBE_SCHEDULES", "ExactRecipe", "ProbeRecipe"]

MAX_ROUNDS = 5
PROBE_SCHEDULES = ("constant", "cosine")


@dataclass(frozen=True)
class ProbeRecipe:
    """How a linear head is trained on cached features.

    The objective is mean cross-entropy + weight_decay / 2 * ||W||^2.

    Parameters
    ----------
    epochs : int
        Passes over the training features, at least.
    min_steps : int
        Steps, at least: small data sets get more epochs.
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
        Take the steps in coordinates in which the features are centred and
        decorrelated. The objective and its optimum stay the same; SGD reaches it
        in seconds instead of minutes.
    decay_bias : bool
        Whether the bias is in the penalty too, as when an optimizer is simply
        given every parameter.
    tolerance : float or None
        With ``whiten`` and unless None, the schedule is run again, up to `MAX_ROUNDS` times in all,
        while the objective is estimated to lie a larger fraction than this above its
        optimum. Below 0.1 nats, where classes are all but separated, the fraction is
        of 0.1 nats.
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
        """Refuse values that mean nothing."""
        check_common(self)
        if self.schedule not in PROBE_SCHEDULES:
            raise RecipeError(
                f"schedule: expected one of {', '.join(PROBE_SCHEDULES)}, found {self.schedule!r}"
            )


@dataclass(frozen=True)
class ExactRecipe:
    """How the exact optimum of the same objective is found; the bias is not penalised.

    Parameters
    ----------
    weight_decay : float
        lambda of the objective; scikit-learn's C is 1 / (N * lambda).
    tolerance : float
        Stop when the objective is estimated to lie no larger a fraction than this above
        its optimum; below 0.001 nats, where classes are separated, a fraction of that.
    max_iterations : int
        Stop at the latest after so many; the solution then says that it did not converge.
    """

    weight_decay: float = 5e-4
    tolerance: float = 1e-6
    max_iterations: int = 500

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        check_common(self)
        if not 0 < self.tolerance < 1:
            raise RecipeError(f"tolerance: expected a number from 0 to 1, found {self.tolerance}")

    @property
    def decay_bias(self) -> bool:
        """Whether the bias is in the penalty too."""
        return False


# "tutorial" is its method 3: SGD(momentum=0.9, weight_decay=5e-4) at 1e-3 over the head's
# weight and bias, batches of 64, 3 epochs. "default" keeps its weight decay, the best of six
# on two stratified holdouts of CIFAR-10's training images (benchmarks/weight_decay.py), and
# trains to the optimum.
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
