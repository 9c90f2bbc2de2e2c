"""What a probe found, and the record of its run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..notebook import ShownAsTable
from ..probes import CheckResult, Evaluation, Sweep
from ..recipe import ExactRecipe, ProbeRecipe
from ..runs import cache_facts
from ..store import Cache

__all__ = ["ProbeResult", "record_of"]


@dataclass(frozen=True)
class ProbeResult(ShownAsTable):
    """A linear head on cached features, and how good it is.

    Parameters
    ----------
    top1 : float
        Accuracy on the test split, in [0, 1].
    top1_interval : tuple of 2 floats
        Wilson's 95 % interval.
    n_train, n_test : int
        Images, all of them labelled.
    n_unlabelled : int
        Images of both splits whose label is -1: left out of training and testing.
    solver : str
        ``"lbfgs"``, ``"ridge"`` or ``"sgd"``.
    wall_s : float
        Duration of sweep and training; the check and the reading not counted.
    head : Path
        Where the head was saved.
    check : CheckResult or None
        scikit-learn on the same features and objective; None where it was not asked for, or
        would not fit into memory, which then is among the notes.
    C, weight_decay : float
        The penalty, in scikit-learn's terms and as lambda: C = 1 / (N * lambda).
    scale : str
        ``"none"``, ``"standardize"`` or ``"l2"``.
    sweep : Sweep or None
        How C was chosen; None where it was given.
    metric : str
        What the sweep went by: ``"top1"``, ``"balanced"`` or ``"f1"``.
    evaluation : Evaluation
        Per class, confusion, calibration and the rest, on the test split.
    recipe : ProbeRecipe or ExactRecipe
        The hyperparameters used.
    seed, epochs, steps : int
        What was run: passes over the features, updates of the head.
    converged : bool or None
        Whether the recipe's tolerance was reached; None where it asks for epochs alone.
    objective, gradient_norm : float
        At the head, over the training features.
    views : tuple of str
        The flip views that it was trained over.
    cache : Path
        The features.
    test_cache : Path
        Those of the test split: the same, unless another was named.
    notes : tuple of str
        What else to know: a check left out, another engine behind the test features.
    run : Path
        Folder of the record.
    """

    top1: float
    top1_interval: tuple[float, float]
    n_train: int
    n_test: int
    n_unlabelled: int
    solver: str
    wall_s: float
    head: Path
    check: CheckResult | None
    C: float
    weight_decay: float
    scale: str
    sweep: Sweep | None
    metric: str
    evaluation: Evaluation
    recipe: ProbeRecipe | ExactRecipe
    seed: int
    epochs: int
    steps: int
    converged: bool | None
    objective: float
    gradient_norm: float
    views: tuple[str, ...]
    cache: Path
    test_cache: Path
    notes: tuple[str, ...]
    run: Path


def record_of(result: ProbeResult, cache: Cache) -> dict[str, Any]:
    """Return the run's record: what `featcache.compare` reads, then everything else."""
    return {
        "kind": "probe",
        "method": f"probe {result.solver}",
        **asdict(result),
        **cache_facts(cache),
        "class_names": list(cache.class_names),
        "run": result.run.name,
        "n_epochs": result.epochs,
        "epochs": [],
        "images_per_s": result.n_train * result.epochs / result.wall_s,
    }
