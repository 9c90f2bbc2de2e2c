"""A trained head, and how far the training got."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["Solution"]


@dataclass(frozen=True)
class Solution:
    """A trained head and how far the training got.

    Parameters
    ----------
    weight : numpy.ndarray
        float32 (K, D), for features as they are cached.
    bias : numpy.ndarray
        float32 (K,).
    epochs, steps : int
        Passes over the training features, and updates of the head.
    converged : bool or None
        Whether the recipe's tolerance was reached; None where it asks for a number of
        epochs and not for the optimum.
    objective : float
        f at the end, over every view.
    gradient_norm : float
        Euclidean norm of its gradient with respect to W and b.
    wall_s : float
        Duration of the training.
    """

    weight: np.ndarray
    bias: np.ndarray
    epochs: int
    steps: int
    converged: bool | None
    objective: float
    gradient_norm: float
    wall_s: float
