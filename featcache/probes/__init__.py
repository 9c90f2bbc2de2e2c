"""Linear heads on cached features: training, the independent check, saving.

Arrays in, arrays out. Nothing here opens a cache or loads an engine; the
gradient framework that SGD runs in is handed in by the caller.
"""

from __future__ import annotations

from .check import CheckResult, check_ridge, check_with_sklearn
from .evaluation import Evaluation, evaluate_scores
from .head import (
    Head,
    feature_differences,
    feature_ingredients,
    load_head,
    rounding_differences,
    save_head,
)
from .knn import knn_probe
from .lbfgs import train_lbfgs
from .linear import train_sgd
from .objectives import Objective, objective
from .ridge import Ridge, ridge_objective
from .scaling import SCALINGS, Scaling
from .solution import Solution
from .sweep import C_GRID, Sweep, SweepPoint, sweep_lbfgs, sweep_ridge

__all__ = [
    "C_GRID",
    "SCALINGS",
    "CheckResult",
    "Evaluation",
    "Head",
    "Objective",
    "Ridge",
    "Scaling",
    "Solution",
    "Sweep",
    "SweepPoint",
    "check_ridge",
    "check_with_sklearn",
    "evaluate_scores",
    "feature_differences",
    "feature_ingredients",
    "knn_probe",
    "load_head",
    "objective",
    "ridge_objective",
    "rounding_differences",
    "save_head",
    "sweep_lbfgs",
    "sweep_ridge",
    "train_lbfgs",
    "train_sgd",
]
