"""Probes of a cache whose target is several labels an image, or numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RecipeError
from ..notebook import ShownAsTable
from ..progress import OnProgress
from ..runs import cache_facts, save_predictions, save_run
from ..store.cache import Cache
from .head import Head, save_head
from .multilabel import MultilabelScores, probe_labels
from .outcomes import Columns, label_outcomes, number_outcomes
from .question import Asked
from .regression import RegressionScores, probe_numbers

if TYPE_CHECKING:
    from .probe import ProbeOptions


@dataclass(frozen=True)
class TargetProbe(ShownAsTable):
    """What the probes of several labels and of numbers tell beside their scores.

    Parameters
    ----------
    target : str
        The columns asked for.
    n_unlabelled : int
        Images of both splits for which no label, or no number, is known.
    views, cuts : tuple of str
        The flip views that it was trained on; where the features were taken.
    cache, test_cache : Path
        The features, and those of the test split.
    head : Path
        Where the head was saved.
    run : Path
        Folder of the record and the head.
    n_val : int
        Images of the val split, which chose and nothing else.
    task : str
        ``"labels"`` or ``"numbers"``.
    split, group, where, table
        As in `ProbeResult`.
    """

    target: str
    n_unlabelled: int
    views: tuple[str, ...]
    cuts: tuple[str, ...]
    cache: Path
    test_cache: Path
    head: Path
    run: Path
    n_val: int
    task: str
    split: str
    group: str | None
    where: str | None
    table: str | None


@dataclass(frozen=True)
class MultilabelResult(TargetProbe, MultilabelScores):
    """Heads of several labels an image: the fields of `MultilabelScores` and `TargetProbe`."""


@dataclass(frozen=True)
class RegressionResult(TargetProbe, RegressionScores):
    """A head of numbers: the fields of `RegressionScores` and `TargetProbe`."""


def probe_targets(
    cache: Cache,
    asked: Asked,
    options: ProbeOptions,
    *,
    cuts: Sequence[str],
    check: bool,
    notes: tuple[str, ...],
    ingredients: dict[str, Any],
    paths: Sequence[Path],
    run: Path,
    on_progress: OnProgress,
) -> MultilabelResult | RegressionResult:
    """Choose penalties, train the head, test and check it; save it to ``paths``, and the record."""
    of_labels = asked.task == "labels"
    check_options(options, of_labels=of_labels)
    given: dict[str, Any] = {
        "C": options.C,
        "weight_decay": options.weight_decay,
        "scale": options.scale,
        "check": check,
        "fingerprint": cache.fingerprint,
        "ingredients": ingredients,
        "on_progress": on_progress,
    }
    sides = asked.train, asked.val, asked.test, asked.names
    scores: Any
    if of_labels:
        scores, head = probe_labels(*sides, seed=options.seed, **given)
    else:
        scores, head = probe_numbers(*sides, **given)
    headline = {"macro_ap": scores.macro_ap} if of_labels else {"r2": scores.r2}
    for path in paths:
        save_head(path, head, {"seed": options.seed, "scale": options.scale, **headline})
    more: dict[str, Any] = {
        **vars(scores),
        **asked.describes,
        "notes": (*notes, *scores.notes),
        "n_unlabelled": asked.n_unlabelled,
        "n_val": len(asked.val) if asked.val else 0,
        "views": cache.views[: len(asked.train.views)],
        "cuts": tuple(cuts) or cache.cuts[:1],
        "cache": cache.path,
        "test_cache": cache.path,
        "head": paths[-1],
        "run": run,
    }
    result = MultilabelResult(**more) if of_labels else RegressionResult(**more)
    kind = "multilabel" if of_labels else "regression"
    record = {
        "kind": kind,
        "method": f"probe {kind}",
        **asdict(result),
        **cache_facts(cache),
        "class_names": list(asked.names),
        "question": options.record(),
        "run": run.name,
    }
    save_predictions(run, _outcomes(head, asked))
    save_run(run, record)
    return result


def _outcomes(head: Head, asked: Asked) -> Columns:
    features, test, names = asked.test.views[0], asked.test, head.class_names
    # A label of which all or no training images have one has no head.
    targets = test.labels[:, [asked.names.index(name) for name in names]]
    if asked.task == "numbers":
        return number_outcomes(test.ids, targets, head.scores(features), names)
    thresholds = head.thresholds
    assert thresholds is not None
    return label_outcomes(test.ids, targets, head.probabilities(features), thresholds, names)


def check_options(options: ProbeOptions, *, of_labels: bool) -> None:
    """Refuse options that only classes have a use for."""
    fitting = "lbfgs" if of_labels else "ridge"
    given = {
        f"solver {options.solver}": options.solver not in (None, fitting),
        "recipe of SGD": options.job().solver == "sgd",
        "class_weight": options.class_weight is not None,
        f"metric {options.metric}": options.metric != "top1",
        "grid": options.grid is not None,
        "tolerance": options.tolerance is not None,
        "no sweep": options.sweep is False and options.C is options.weight_decay is None,
    }
    useless = [name for name, is_given in given.items() if is_given]
    if useless:
        target = "several labels" if of_labels else "numbers"
        raise RecipeError(
            f"{useless[0]}: expected an option for {target}, found one for classes; leave it out, "
            "or ask for --task classification"
        )
