"""featcache: run a pretrained backbone once, answer every later question from its features.

::

    import featcache

    made = featcache.extract("digits", weights="tinyimagenet32")
    cache = made.load()
    cache.train.features, cache.train.labels, cache.class_names, cache.meta
    print(featcache.probe(cache).top1)

Importing this package loads no framework, not even NumPy: every name below is
looked up when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "AuditResult": "auditing",
    "Cache": "store",
    "CachedSplit": "store",
    "Dataset": "datasets",
    "DiffReport": "store",
    "ExactRecipe": "recipe",
    "ExportResult": "exporting",
    "ExtractResult": "extraction",
    "FeatcacheError": "errors",
    "FinetuneRecipe": "recipe",
    "FinetuneResult": "finetuning",
    "FitResult": "fitting",
    "Head": "probes",
    "KnnResult": "neighbours",
    "LinearProbe": "probes.estimator",
    "MergeResult": "store",
    "Preprocess": "preprocess",
    "ProbeRecipe": "recipe",
    "ProbeResult": "probing",
    "Progress": "progress",
    "ReportResult": "reporting",
    "ShareResult": "extraction",
    "Split": "datasets",
    "VerifyReport": "store",
    "Weights": "weights",
    "audit": "auditing",
    "compare": "comparison",
    "diff": "store",
    "evaluate_head": "prediction",
    "examine": "doctor",
    "export": "exporting",
    "extract": "extraction",
    "extract_share": "extraction",
    "few_shot": "curves",
    "finetune": "finetuning",
    "fit": "fitting",
    "knn": "neighbours",
    "learning_curve": "curves",
    "load": "store",
    "load_dataset": "datasets",
    "load_head": "probes",
    "load_weights": "weights",
    "merge": "store",
    "newest_cache": "store",
    "pack": "extraction",
    "predict": "prediction",
    "probe": "probing",
    "report": "reporting",
    "verify": "store",
}

__all__ = [  # spelled out for readers and type checkers; a test holds it equal to _HOME
    "AuditResult",
    "Cache",
    "CachedSplit",
    "Dataset",
    "DiffReport",
    "ExactRecipe",
    "ExportResult",
    "ExtractResult",
    "FeatcacheError",
    "FinetuneRecipe",
    "FinetuneResult",
    "FitResult",
    "Head",
    "KnnResult",
    "LinearProbe",
    "MergeResult",
    "Preprocess",
    "ProbeRecipe",
    "ProbeResult",
    "Progress",
    "ReportResult",
    "ShareResult",
    "Split",
    "VerifyReport",
    "Weights",
    "audit",
    "compare",
    "diff",
    "evaluate_head",
    "examine",
    "export",
    "extract",
    "extract_share",
    "few_shot",
    "finetune",
    "fit",
    "knn",
    "learning_curve",
    "load",
    "load_dataset",
    "load_head",
    "load_weights",
    "merge",
    "newest_cache",
    "pack",
    "predict",
    "probe",
    "report",
    "verify",
]

if TYPE_CHECKING:
    from .auditing import AuditResult, audit
    from .comparison import compare
    from .curves import few_shot, learning_curve
    from .datasets import Dataset, Split, load_dataset
    from .doctor import examine
    from .errors import FeatcacheError
    from .exporting import ExportResult, export
    from .extraction import ExtractResult, ShareResult, extract, extract_share, pack
    from .finetuning import FinetuneResult, finetune
    from .fitting import FitResult, fit
    from .neighbours import KnnResult, knn
    from .prediction import evaluate_head, predict
    from .preprocess import Preprocess
    from .probes import Head, load_head
    from .probes.estimator import LinearProbe
    from .probing import ProbeResult, probe
    from .progress import Progress
    from .recipe import ExactRecipe, FinetuneRecipe, ProbeRecipe
    from .reporting import ReportResult, report
    from .store import (
        Cache,
        CachedSplit,
        DiffReport,
        MergeResult,
        VerifyReport,
        diff,
        load,
        merge,
        newest_cache,
        verify,
    )
    from .weights import Weights, load_weights


def __getattr__(name: str) -> Any:
    """Import the module that a public name lives in, and return the name."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .frameworks import import_numpy

    import_numpy()
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names."""
    return [*__all__, "__version__"]
