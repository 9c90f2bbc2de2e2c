"""The figures of a report: each drawn once, for the page and for files beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import EngineUnavailableError, FeatcacheError, OutputError
from ..runs import CURVES
from .class_figures import confusion, per_class
from .comparison_figure import accuracy_over_time
from .curve_figures import learning_curves, regularisation_path, shots_curve
from .judged import Judged, Probe
from .map import Points, draw_map
from .probe_figures import reliability
from .selection import Group
from .svg import save_figure, svg

_FIGURES = (
    *("accuracy-over-time", "learning-curves", "regularisation-path", "few-shot"),
    *("training-set-size", "confusion", "per-class", "reliability"),
)


_MAP = "map"


@dataclass(frozen=True)
class Card:
    """A figure for the page.

    Parameters
    ----------
    name : str
        What its files are called.
    svg : str
        An ``<svg>`` element; empty where it could not be drawn.
    why : str
        Why it could not.
    """

    name: str
    svg: str
    why: str


def draw_figures(
    group: Group, probe: Probe | None, judged: Judged | None, folder: Path, prefix: str
) -> tuple[dict[str, Card], list[Path]]:
    """Draw whatever the runs of a group give, and save it as PNG and SVG.

    Parameters
    ----------
    group : Group
        Runs on one data set.
    probe : Probe or None
        The one to show.
    judged : Judged or None
        Its head on the test images.
    folder : Path
        Where files go.
    prefix : str
        How their names begin.

    Returns
    -------
    cards : dict of str to Card
        By name; what there is no data for is missing.
    files : list of Path
        What was written.
    """
    cards: dict[str, Card] = {}
    files: list[Path] = []
    for name, make in _wanted(group, probe, judged).items():
        try:
            figure = make()
        except (EngineUnavailableError, OutputError):
            raise
        except FeatcacheError as error:  # more than a figure has room for
            cards[name] = Card(name, "", str(error))
            continue
        cards[name] = Card(name, svg(figure), "")
        files += save_figure(figure, folder / f"{prefix}{name}")
    return cards, files


def save_map(points: Points, group: Group, folder: Path, prefix: str) -> tuple[Path, ...]:
    """Save the map as PNG: as SVG, tens of thousands of points are too many for any viewer."""
    names = group.cache.class_names if group.cache is not None else ()
    figure = draw_map(points, names, group.dataset)
    return save_figure(figure, folder / f"{prefix}{_MAP}.png")


def remove_others(written: Sequence[Path], folder: Path, prefix: str) -> None:
    """Delete the figures of an earlier report that this one has not: they would pass for its own.

    Raises
    ------
    OutputError
        One cannot be deleted.
    """
    for name in (*_FIGURES, _MAP):
        for suffix in (".png", ".svg"):
            path = folder / f"{prefix}{name}{suffix}"
            if path in written:
                continue
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise OutputError(
                    f"{path}: an earlier report's figure cannot be deleted: {error.strerror}; "
                    "name another output"
                ) from None


def _wanted(
    group: Group, probe: Probe | None, judged: Judged | None
) -> dict[str, Callable[[], Any]]:
    records = [run.record for run in group.runs]
    compared = [record for record in records if record["kind"] not in CURVES]
    wanted: dict[str, Callable[[], Any]] = {}
    if compared:
        wanted["accuracy-over-time"] = lambda: accuracy_over_time(compared)
    tuned = [record for record in compared if record["kind"] == "finetune" and record.get("epochs")]
    if tuned:
        wanted["learning-curves"] = lambda: learning_curves(tuned)
    for name, kind in (("few-shot", "few-shot"), ("training-set-size", "learning-curve")):
        curve = _newest(records, kind)
        if curve is not None:
            wanted[name] = partial(shots_curve, curve["points"], metric=curve["metric"])
    if probe is None:
        return wanted
    record = probe.run.record
    sweep = record.get("sweep")
    if isinstance(sweep, Mapping) and sweep.get("points"):
        metric = record.get("metric", "top1")
        wanted["regularisation-path"] = lambda: regularisation_path(sweep, metric=metric)
    if judged is not None and group.cache is not None:
        names = group.cache.class_names
        wanted["confusion"] = lambda: confusion(judged.confusion, names)
        wanted["per-class"] = lambda: per_class(judged.recalls, names)
        bins = judged.evaluation.reliability
        if bins:
            wanted["reliability"] = lambda: reliability(bins)
    return wanted


def _newest(records: Sequence[Mapping[str, Any]], kind: str) -> Mapping[str, Any] | None:
    return next((record for record in reversed(records) if record["kind"] == kind), None)
