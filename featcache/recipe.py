"""Recipes: every hyperparameter, once, with its source.

The constants of the tutorial ("Transfer Learning in Computer Vision", OneFlow)
are those of its text and code. What differs from it on purpose is said where
it differs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from .errors import RecipeError

__all__ = [
    "FINETUNE_RECIPES",
    "MAX_ROUNDS",
    "METHODS",
    "PROBE_RECIPES",
    "PUBLISHED",
    "ExactRecipe",
    "FinetuneRecipe",
    "ProbeRecipe",
]

MAX_ROUNDS = 5


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
    cosine : bool
        Let the rate fall to 0 along half a cosine, step by step.
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
    cosine: bool = True
    whiten: bool = True
    decay_bias: bool = False
    tolerance: float | None = 1e-3

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        _check_common(self)


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
        _check_common(self)
        if not 0 < self.tolerance < 1:
            raise RecipeError(f"tolerance: expected a number from 0 to 1, found {self.tolerance}")

    @property
    def decay_bias(self) -> bool:
        """Whether the bias is in the penalty too."""
        return False


@dataclass(frozen=True)
class FinetuneRecipe:
    """How a backbone and its head are trained end to end.

    Parameters
    ----------
    head_lr : float
        Learning rate of the head.
    backbone_lr : float or None
        Of the backbone; None leaves it frozen: eval mode, no gradients.
    pretrained : bool
        Whether the backbone starts from the weights, or from a random draw.
    epochs, batch_size, momentum, weight_decay
        As in `ProbeRecipe`; the penalty is on every trained parameter, as in the tutorial.
    views : str
        ``"flips"``: each image is flipped horizontally and vertically with
        probability 1/2 each; ``"none"``: never.
    """

    head_lr: float = 1e-3
    backbone_lr: float | None = 1e-3
    pretrained: bool = True
    epochs: int = 3
    batch_size: int = 64
    momentum: float = 0.9
    weight_decay: float = 5e-4
    views: str = "flips"

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        _check_common(self)


def _check_common(recipe: ProbeRecipe | ExactRecipe | FinetuneRecipe) -> None:
    for field in fields(recipe):
        value = getattr(recipe, field.name)
        name = field.name.replace("_", " ")
        # Batch normalisation needs two images to have a variance.
        least = 2 if field.name == "batch_size" and isinstance(recipe, FinetuneRecipe) else 1
        if field.name in ("epochs", "batch_size", "max_iterations") and value < least:
            raise RecipeError(f"{name}: expected at least {least}, found {value}")
        rate = field.name in ("lr", "head_lr", "backbone_lr") and value is not None
        if rate and not (math.isfinite(value) and value > 0):
            raise RecipeError(f"{name}: expected a positive number, found {value}")
        if field.name == "weight_decay" and not (math.isfinite(value) and value >= 0):
            raise RecipeError(f"{name}: expected 0 or a positive number, found {value}")
        if field.name == "weight_decay" and value == 0 and not isinstance(recipe, FinetuneRecipe):
            raise RecipeError(
                f"{name}: expected a positive number (without a penalty, classes that can be "
                "separated have no optimum), found 0"
            )
        if field.name == "momentum" and not 0 <= value < 1:
            raise RecipeError(f"{name}: expected a number from 0 to below 1, found {value}")


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
        cosine=False,
        whiten=False,
        decay_bias=True,
    ),
}

# The tutorial's methods 1, 2 and 3, and its comparison without transfer.
FINETUNE_RECIPES = {
    "full": FinetuneRecipe(),
    "split": FinetuneRecipe(backbone_lr=1e-4),
    "frozen": FinetuneRecipe(backbone_lr=None),
    "scratch": FinetuneRecipe(pretrained=False),
}
METHODS = tuple(FINETUNE_RECIPES)

# Top-1 on CIFAR-10's test images that the tutorial's text reports, ImageNet weights, 224 px.
PUBLISHED = {"full": 0.9017, "scratch": 0.4957}
