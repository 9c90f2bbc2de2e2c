"""Linear heads on cached features: training, the independent check, saving.

Arrays in, arrays out. Nothing here opens a cache or loads an engine; the
gradient framework that SGD runs in is handed in by the caller.
"""

from __future__ import annotations

from .check import CheckResult, check_with_sklearn
from .head import Head, load_head, save_head
from .linear import Solution, train_sgd
from .objective import Objective, objective

__all__ = [
    "CheckResult",
    "Head",
    "Objective",
    "Solution",
    "check_with_sklearn",
    "load_head",
    "objective",
    "save_head",
    "train_sgd",
]
