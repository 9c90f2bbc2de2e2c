"""Linear heads on cached features: training, the independent check, saving.

Arrays in, arrays out. Nothing here opens a cache or loads an engine; the
gradient framework that SGD runs in is handed in by the caller.
"""

from __future__ import annotations

from .blocks import each_block
from .check import CheckResult, check_ridge, check_with_sklearn
from .evaluation import Evaluation, evaluate_scores
from .head import Head, load_head, save_head
from .ingredients import (
    class_differences,
    feature_differences,
    feature_ingredients,
    rounding_differences,
)
from .knn import knn_probe
from .lbfgs import train_lbfgs
from .linear import train_sgd
from .objectives import Objective, objective, predict
from .ridge import Ridge, ridge_objective, train_ridge
from .rows import Features, Rows, in_memory, loaded
from .scaling import SCALINGS, Scaling
from .search import nearest
from .solution import Solution
from .sweep import C_GRID, Sweep, SweepPoint, sweep_lbfgs, sweep_ridge

__all__ = [
    "C_GRID",
    "SCALINGS",
    "CheckResult",
    "Evaluation",
    "Features",
    "Head",
    "Objective",
    "Ridge",
    "Rows",
    "Scaling",
    "Solution",
    "Sweep",
    "SweepPoint",
    "check_ridge",
    "check_with_sklearn",
    "class_differences",
    "each_block",
    "evaluate_scores",
    "feature_differences",
    "feature_ingredients",
    "in_memory",
    "knn_probe",
    "load_head",
    "loaded",
    "nearest",
    "objective",
    "predict",
    "ridge_objective",
    "rounding_differences",
    "save_head",
    "sweep_lbfgs",
    "sweep_ridge",
    "train_lbfgs",
    "train_ridge",
    "train_sgd",
]
