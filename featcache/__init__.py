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

from .version import __version__ as __version__

TYPE_CHECKING = False  # as type checkers know it; `typing` takes a third of Python's own start

_HOME = {
    "AuditResult": "auditing.findings",
    "Cache": "store.cache",
    "CachedSplit": "store.cache",
    "CrossValidationResult": "probes.folds",
    "Dataset": "datasets.dataset",
    "DiffReport": "store.diff",
    "ErrorsResult": "reporting.mistakes",
    "ExactRecipe": "probes.recipes",
    "ExportResult": "store.export",
    "ExtractOptions": "extraction.options",
    "ExtractResult": "extraction.result",
    "FeatcacheError": "errors",
    "FinetuneOptions": "finetuning.recipes",
    "FinetuneRecipe": "finetuning.recipes",
    "FinetuneResult": "finetuning.run",
    "FitOptions": "finetuning.fit",
    "FitResult": "finetuning.fit",
    "Head": "probes.head",
    "ImportResult": "importing.features",
    "KnnResult": "probes.knn",
    "LabelResult": "store.label",
    "LinearProbe": "probes.estimator",
    "MergeResult": "store.merge",
    "MultilabelResult": "probes.labels_and_numbers",
    "Preprocess": "preprocess",
    "ProbeOptions": "probes.probe",
    "ProbeRecipe": "probes.recipes",
    "ProbeResult": "probes.probe",
    "Progress": "progress",
    "Question": "probes.question",
    "RegressionResult": "probes.labels_and_numbers",
    "ReportResult": "reporting.report",
    "SearchResult": "searching",
    "SelectResult": "auditing.selection",
    "ShareResult": "extraction.result",
    "ShipOptions": "shipping.ship",
    "ShipResult": "shipping.ship",
    "Split": "datasets.dataset",
    "SurveyOptions": "surveying",
    "SurveyResult": "surveying",
    "VerifyReport": "store.verify",
    "Weights": "backbones.weights",
    "audit": "auditing.audit",
    "compare": "runs",
    "diff": "store.diff",
    "evaluate_head": "prediction",
    "examine": "doctor",
    "export": "store.export",
    "extract": "extraction.extract",
    "extract_share": "extraction.extract",
    "few_shot": "probes.curves",
    "finetune": "finetuning.finetune",
    "fit": "finetuning.fit",
    "import_features": "importing.features",
    "knn": "probes.knn",
    "label": "store.label",
    "learning_curve": "probes.curves",
    "load": "store.cache",
    "load_dataset": "datasets.loading",
    "load_head": "probes.head",
    "load_weights": "backbones.loading",
    "merge": "store.merge",
    "newest_cache": "store.cache",
    "pack": "extraction.jobs",
    "predict": "prediction",
    "predict_stream": "prediction",
    "probe": "probes.probe",
    "report": "reporting.report",
    "search": "searching",
    "select": "auditing.selection",
    "ship": "shipping.ship",
    "survey": "surveying",
    "text_features": "searching",
    "verify": "store.verify",
    "worst_errors": "reporting.mistakes",
}

__all__ = [  # spelled out for readers and type checkers; a test holds it equal to _HOME
    "AuditResult",
    "Cache",
    "CachedSplit",
    "CrossValidationResult",
    "Dataset",
    "DiffReport",
    "ErrorsResult",
    "ExactRecipe",
    "ExportResult",
    "ExtractOptions",
    "ExtractResult",
    "FeatcacheError",
    "FinetuneOptions",
    "FinetuneRecipe",
    "FinetuneResult",
    "FitOptions",
    "FitResult",
    "Head",
    "ImportResult",
    "KnnResult",
    "LabelResult",
    "LinearProbe",
    "MergeResult",
    "MultilabelResult",
    "Preprocess",
    "ProbeOptions",
    "ProbeRecipe",
    "ProbeResult",
    "Progress",
    "Question",
    "RegressionResult",
    "ReportResult",
    "SearchResult",
    "SelectResult",
    "ShareResult",
    "ShipOptions",
    "ShipResult",
    "Split",
    "SurveyOptions",
    "SurveyResult",
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
    "import_features",
    "knn",
    "label",
    "learning_curve",
    "load",
    "load_dataset",
    "load_head",
    "load_weights",
    "merge",
    "newest_cache",
    "pack",
    "predict",
    "predict_stream",
    "probe",
    "report",
    "search",
    "select",
    "ship",
    "survey",
    "text_features",
    "verify",
    "worst_errors",
]

if TYPE_CHECKING:
    from typing import Any

    from .auditing.audit import audit
    from .auditing.findings import AuditResult
    from .auditing.selection import SelectResult, select
    from .backbones.loading import load_weights
    from .backbones.weights import Weights
    from .datasets.dataset import Dataset, Split
    from .datasets.loading import load_dataset
    from .doctor import examine
    from .errors import FeatcacheError
    from .extraction.extract import extract, extract_share
    from .extraction.jobs import pack
    from .extraction.options import ExtractOptions
    from .extraction.result import ExtractResult, ShareResult
    from .finetuning.finetune import finetune
    from .finetuning.fit import FitOptions, FitResult, fit
    from .finetuning.recipes import FinetuneOptions, FinetuneRecipe
    from .finetuning.run import FinetuneResult
    from .importing.features import ImportResult, import_features
    from .prediction import evaluate_head, predict, predict_stream
    from .preprocess import Preprocess
    from .probes.curves import few_shot, learning_curve
    from .probes.estimator import LinearProbe
    from .probes.folds import CrossValidationResult
    from .probes.head import Head, load_head
    from .probes.knn import KnnResult, knn
    from .probes.labels_and_numbers import MultilabelResult, RegressionResult
    from .probes.probe import ProbeOptions, ProbeResult, probe
    from .probes.question import Question
    from .probes.recipes import ExactRecipe, ProbeRecipe
    from .progress import Progress
    from .reporting.mistakes import ErrorsResult, worst_errors
    from .reporting.report import ReportResult, report
    from .runs import compare
    from .searching import SearchResult, search, text_features
    from .shipping.ship import ShipOptions, ShipResult, ship
    from .store.cache import Cache, CachedSplit, load, newest_cache
    from .store.diff import DiffReport, diff
    from .store.export import ExportResult, export
    from .store.label import LabelResult, label
    from .store.merge import MergeResult, merge
    from .store.verify import VerifyReport, verify
    from .surveying import SurveyOptions, SurveyResult, survey


def __getattr__(name: str) -> Any:
    """Import the module that a public name lives in, and return the name."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    from .process import import_numpy

    import_numpy()
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names."""
    return [*__all__, "__version__"]
