"""Multinomial logistic regression on fixed features, by stochastic gradient descent.

Features of a ReLU network are far from centred and strongly correlated (with the starter weights
on CIFAR-10 the variances of their principal components span a factor of 960, by
``benchmarks/weight_decay.py``), which makes plain SGD slow. The default recipe therefore takes
its steps in other coordinates. With the mean m and covariance S of the features and
``P = (S + 2 lambda I)^(-1/2)``, it trains V in ``W = V P`` on ``z = P (x - m)``: the same function
of another variable, with the same optimum. By Boehning's bound the curvature of the cross-entropy
is at most half the covariance of its inputs. It contributes at most ``S / (2 (S + 2 lambda))``,
the penalty ``lambda / (S + 2 lambda)``, together at most 1/2 in every direction: one step size
suits every backbone.

References
----------
Boehning, "Multinomial logistic regression algorithm", Annals of the Institute
of Statistical Mathematics 44 (1992), 197-200.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np

from ..errors import DivergedError
from ..progress import OnProgress, Progress, silent
from ..sampling import epoch_plan, initial_head, row_batches
from .blocks import Features, Rows, loaded
from .objective import Objective, Solution, objective
from .recipes import MAX_ROUNDS, ProbeRecipe
from .scaling import moments
from .weights import counted, mean_1

CURVATURE_BOUND = 0.5
_SEPARATED = 0.1  # nats: the least objective that the tolerance is relative to


def train_sgd(
    views: Sequence[Features],
    labels: np.ndarray,
    n_classes: int,
    recipe: ProbeRecipe,
    *,
    framework: ModuleType,
    weights: np.ndarray | None = None,
    device: str = "cpu",
    seed: int = 0,
    on_progress: OnProgress = silent,
) -> Solution:
    """Train a head on features (N, D), one array per flip view; draws depend on ``seed`` alone.

    ``weights`` float64 (N,) are of the images: each loss of a batch is multiplied by the image's
    weight, divided by the mean weight, so that the expectation of a step is the objective's.

    ``framework`` is OneFlow, or a module with the same tensors and optimizers.
    """
    started = time.perf_counter()
    views, labels, weights = counted(views, labels, weights)
    relative = None if weights is None else mean_1(weights).astype(np.float32)
    n, dim = views[0].shape
    batches = list(row_batches(n, recipe.batch_size))
    epochs = max(recipe.epochs, math.ceil(recipe.min_steps / len(batches)))
    steps = epochs * len(batches)

    whitening = _Whitening(views, recipe.weight_decay, weights) if recipe.whiten else None
    if whitening:
        inputs = [loaded(Rows(features, change=whitening.apply)) for features in views]
        weight, bias = np.zeros((n_classes, dim), np.float32), np.zeros(n_classes, np.float32)
        top_rate = recipe.lr / CURVATURE_BOUND * (1 - recipe.momentum)
    else:
        inputs = [loaded(features) for features in views]
        weight, bias = initial_head(n_classes, dim, seed)
        top_rate = recipe.lr
    trainee = _Trainee(framework, device, weight, bias, whitening, recipe)

    converged = None
    rounds = 0
    while not converged and rounds < (MAX_ROUNDS if whitening else 1):
        for step in range(steps):
            epoch, index = divmod(step, len(batches))
            if index == 0:
                rows, drawn = epoch_plan(n, len(views), seed, rounds * epochs + epoch)
                on_progress(Progress("probe", step, steps, "step"))
            fall = (
                0.5 + 0.5 * math.cos(math.pi * step / steps) if recipe.schedule == "cosine" else 1.0
            )
            batch = batches[index]
            x = _gather(inputs, rows[batch], drawn[batch])
            w = None if relative is None else relative[rows[batch]]
            trainee.step(x, labels[rows[batch]], w, top_rate * fall)
        on_progress(Progress("probe", steps, steps, "step"))
        rounds += 1
        weight, bias = trainee.arrays()
        if whitening:
            weight, bias = whitening.fold(weight, bias)
        reached = objective(weight, bias, views, labels, recipe, weights)
        if not math.isfinite(reached.value):
            raise DivergedError(
                f"probe: expected a finite objective, found {reached.value} after {steps} steps at "
                f"learning rate {recipe.lr}; use a smaller --lr"
            )
        if whitening and recipe.tolerance is None:
            break
        if whitening and recipe.tolerance is not None:
            gap = whitening.estimated_gap(reached, recipe.weight_decay)
            converged = gap <= recipe.tolerance * max(reached.value, _SEPARATED)
    return Solution(
        weight,
        bias,
        rounds * epochs,
        rounds * steps,
        converged,
        reached.value,
        reached.gradient_norm,
        time.perf_counter() - started,
    )


class _Trainee:
    """Head and optimizer inside the framework."""

    def __init__(
        self,
        framework: ModuleType,
        device: str,
        weight: np.ndarray,
        bias: np.ndarray,
        whitening: _Whitening | None,
        recipe: ProbeRecipe,
    ) -> None:
        self._framework = framework
        self._device = device
        self._decay = recipe.weight_decay
        self._weight = framework.nn.Parameter(_tensor(framework, weight, device))
        self._bias = framework.nn.Parameter(_tensor(framework, bias, device))
        self._loss = framework.nn.CrossEntropyLoss()
        self._losses = framework.nn.CrossEntropyLoss(reduction="none")
        # In whitened coordinates the penalty is not the optimizer's plain weight decay.
        self._unwhiten = (
            _tensor(framework, whitening.matrix, device) if whitening is not None else None
        )
        decay = 0.0 if whitening is not None else recipe.weight_decay
        self._optimizer = framework.optim.SGD(
            [
                {"params": [self._weight], "weight_decay": decay},
                {"params": [self._bias], "weight_decay": decay if recipe.decay_bias else 0.0},
            ],
            lr=recipe.lr,
            momentum=recipe.momentum,
            nesterov=recipe.nesterov,
        )

    def step(
        self, features: np.ndarray, labels: np.ndarray, weights: np.ndarray | None, rate: float
    ) -> None:
        """Take one step on a batch."""
        flow = self._framework
        x = _tensor(flow, features, self._device)
        y = _tensor(flow, labels, self._device)
        scores = flow.nn.functional.linear(x, self._weight, self._bias)
        if weights is None:
            loss = self._loss(scores, y)
        else:
            loss = (self._losses(scores, y) * _tensor(flow, weights, self._device)).mean()
        if self._unwhiten is not None:
            plain = flow.matmul(self._weight, self._unwhiten)
            loss = loss + self._decay / 2 * (plain * plain).sum()
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Return weight and bias."""
        return tuple(  # type: ignore[return-value]
            np.array(parameter.detach().cpu().numpy()) for parameter in (self._weight, self._bias)
        )


def _tensor(framework: ModuleType, array: np.ndarray, device: str) -> Any:
    """Copy an array into memory of the framework, which may outlive that of NumPy."""
    tensor = framework.empty(*array.shape, dtype=getattr(framework, array.dtype.name))
    tensor.numpy()[...] = array
    return tensor.to(device)


class _Whitening:
    """The change of coordinates that the module's docstring describes."""

    def __init__(
        self, views: Sequence[Features], decay: float, weights: np.ndarray | None = None
    ) -> None:
        measured = moments(views, weights)
        self.mean: np.ndarray = measured.mean.astype(np.float32)
        self._directions, self._variances = measured.directions, measured.variances
        spread = np.sqrt(self._variances + 2 * decay)
        self.matrix: np.ndarray = ((self._directions / spread) @ self._directions.T).astype(
            np.float32
        )

    def apply(self, features: np.ndarray) -> np.ndarray:
        """Return z (N, D) of x (N, D)."""
        z: np.ndarray = (features - self.mean) @ self.matrix
        return z

    def fold(self, weight: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the head for features before `apply`."""
        plain = weight @ self.matrix
        return plain, bias - plain @ self.mean

    def estimated_gap(self, reached: Objective, decay: float) -> float:
        """Estimate the gap of the objective to its optimum.

        Half the squared Newton decrement (Boyd and Vandenberghe, "Convex Optimization",
        section 9.5), with the Hessian taken as (mean curvature) * S + lambda I.
        """
        centred = reached.weight_gradient - np.outer(reached.bias_gradient, self.mean)
        along = np.square(centred @ self._directions)
        gap = (along / (reached.curvature * self._variances + decay)).sum()
        gap += np.square(reached.bias_gradient).sum() / max(reached.curvature, decay)
        return float(gap) / 2


def _gather(inputs: Sequence[Features], rows: np.ndarray, drawn: np.ndarray) -> Any:
    """Return float32 (B, D): row ``rows[i]`` of view ``drawn[i]``."""
    if len(inputs) == 1:
        return np.asarray(inputs[0][rows], np.float32)
    batch = np.empty((len(rows), inputs[0].shape[1]), np.float32)
    for view, features in enumerate(inputs):
        batch[drawn == view] = features[rows[drawn == view]]
    return batch
