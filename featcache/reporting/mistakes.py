"""`featcache.worst_errors`: the worst predictions of a run, and a sheet with their images."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..datasets.dataset import Dataset
from ..errors import FeatcacheError, RecipeError, text_of
from ..files import user_path, write_atomically
from ..notebook import ShownAsTable
from ..options import with_options
from ..progress import OnNote, OnProgress, silent
from ..runs import PREDICTIONS, RECORD, load_predictions, runs_folder
from ..store.cache import Cache
from .page import check_sheet, render_sheet
from .pictures import Place, find_pictures
from .selection import Run, cache_of, named_run, runs_in

_SIDE = 128  # pixels of an image on the sheet
_CONFUSED = 10  # pairs of classes in the summary


@dataclass(frozen=True)
class WorstError:
    """One wrong prediction; of a regression, one prediction.

    Parameters
    ----------
    id, split : str
        The image, and the split that it is in.
    label, prediction : str or None
        What it is, and what was predicted.
    probability, label_probability : float or None
        Of the prediction and of the label, in [0, 1]; None where the run has none.
    error : float
        What they are sorted by: 1 - label_probability for classes, the largest
        |target - probability| for several labels, the largest residual in units of its root mean
        square for numbers.
    """

    id: str
    split: str
    label: str | None
    prediction: str | None
    probability: float | None
    label_probability: float | None
    error: float


@dataclass(frozen=True)
class ErrorsResult(ShownAsTable):
    """The worst predictions of a run.

    Parameters
    ----------
    run : Path
        Its folder.
    predictions : Path
        The file with every prediction.
    n_wrong, n : int
        Wrong predictions and all of them, after ``label`` and ``prediction`` were chosen.
    worst : tuple of WorstError
        The worst first.
    confused : tuple of (str, str, int)
        Label, prediction and number of the most frequent wrong pairs.
    page : Path or None
        The sheet, where one was asked for.
    notes : tuple of str
        Why the sheet has no images, where it has none.
    """

    run: Path
    predictions: Path
    n_wrong: int
    n: int
    worst: tuple[WorstError, ...]
    confused: tuple[tuple[str, str, int], ...]
    page: Path | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class ErrorsOptions:
    """Options of `worst_errors`, which describes them."""

    top: int = 24
    label: str | None = None
    prediction: str | None = None
    html: str | Path | None = None
    dataset: str | Path | Dataset | None = None
    data_root: str | Path | None = None
    runs: str | Path | None = None

    def __post_init__(self) -> None:
        if self.top < 1:
            raise RecipeError(f"top: expected at least 1, found {self.top}")


@with_options(ErrorsOptions)
def worst_errors(
    run: str | Path | None = None,
    *,
    options: ErrorsOptions,
    on_progress: OnProgress = silent,
    on_note: OnNote = silent,
) -> ErrorsResult:
    """Return the worst predictions of a run, and write a sheet with their images.

    Parameters
    ----------
    run : str or Path, optional
        Its folder, or its name in the folder of runs; the newest with predictions by default.
    top : int
        How many, at least 1.
    label, prediction : str, optional
        Only images of this label, and only those predicted as this.
    html : str or Path, optional
        Write them to this page, with their images from ``dataset``. It opens from the
        disk, has no script and fetches nothing.
    dataset : str, Path or Dataset, optional
        Where the images are, for the page; only cifar10 and digits are found without.
    data_root : str or Path, optional
        Where named data sets are kept.
    runs : str or Path, optional
        The folder of runs; ``cache/runs`` by default.
    on_progress, on_note : callable
        Called with the progress of thumbnails, and with notes.

    Returns
    -------
    ErrorsResult

    Raises
    ------
    FeatcacheError
        No such run, one without predictions, or none of these labels.
    DatasetError
        ``dataset`` is not what the cache was made from.
    EngineUnavailableError
        jinja2, which the page needs, is not installed.
    OutputError
        The page cannot be written.
    """
    page = None if options.html is None else user_path(options.html)
    if page is not None:
        check_sheet("errors", page)
    folder = runs_folder(options.runs)
    chosen = _newest(folder, on_note) if run is None else named_run(Path(run), folder, on_note)
    columns = load_predictions(chosen.folder)
    rows = _rows(columns, options, chosen)
    regression = chosen.record.get("task") == "numbers"
    wrong = [row for row in rows if regression or not columns["correct"][row]]
    wrong.sort(key=lambda row: -columns["error"][row])
    worst = tuple(_error(columns, row) for row in wrong[: options.top])
    pairs = Counter(
        (_text(columns, "label", row), _text(columns, "prediction", row)) for row in wrong
    )
    common = () if regression else tuple((*pair, n) for pair, n in pairs.most_common(_CONFUSED))
    result = ErrorsResult(
        run=chosen.folder,
        predictions=next(path for name in PREDICTIONS if (path := chosen.folder / name).is_file()),
        n_wrong=len(wrong),
        n=len(rows),
        worst=worst,
        confused=common,
        page=page,
        notes=(),
    )
    if page is None:
        return result
    cache = cache_of(chosen)
    thumbs, why = _thumbnails(cache, worst, options, on_progress)
    notes = (f"no images on the page: {why}",) if why else ()
    for note in notes:
        on_note(note)
    sheet = render_sheet(
        "errors",
        "errors.html.j2",
        result=result,
        run=chosen,
        method=str(chosen.record.get("method", "")),
        dataset=str(chosen.record.get("dataset", "")),
        target=str(chosen.record.get("target") or ""),
        thumbs=thumbs,
        notes=notes,
    )
    write_atomically(page, sheet)
    return replace(result, notes=notes)


def _newest(folder: Path, on_note: OnNote) -> Run:
    """Return the newest run that kept predictions of labelled images."""
    found = [
        path.parent
        for name in PREDICTIONS
        for path in folder.glob(f"*/{name}")
        if (path.parent / RECORD).is_file()
    ]
    by_name = {run.name: run for run in runs_in(folder, on_note)}
    there = sorted(path.name for path in found if path.name in by_name)
    if not there:
        raise FeatcacheError(
            f"{folder}: expected a run with predictions, found none; make one with featcache "
            "probe, or name a run"
        )
    return by_name[there[-1]]


def _rows(columns: dict[str, list[Any]], options: ErrorsOptions, run: Run) -> list[int]:
    rows = list(range(len(columns["id"])))
    for name in ("label", "prediction"):
        wanted = getattr(options, name)
        if wanted is None:
            continue
        values = columns[name]
        if wanted not in values:
            known = sorted({str(value) for value in values if value is not None})
            raise FeatcacheError(
                f"{run.folder}: expected images with the {name} {wanted!r}, found "
                f"{', '.join(map(repr, known[:8]))}{' ...' if len(known) > 8 else ''}"
            )
        rows = [row for row in rows if values[row] == wanted]
    return rows


def _text(columns: dict[str, list[Any]], name: str, row: int) -> str:
    value = columns[name][row]
    return "" if value is None else str(value)


def _error(columns: dict[str, list[Any]], row: int) -> WorstError:
    def number(name: str) -> float | None:
        value = columns.get(name, {row: None})[row]
        return float(value) if isinstance(value, (int, float)) and value == value else None

    return WorstError(
        columns["id"][row],
        columns["split"][row],
        _text(columns, "label", row) or None,
        _text(columns, "prediction", row) or None,
        number("probability"),
        number("label_probability"),
        columns["error"][row],
    )


def _thumbnails(
    cache: Cache | None,
    worst: tuple[WorstError, ...],
    options: ErrorsOptions,
    on_progress: OnProgress,
) -> tuple[dict[str, str], str]:
    """Return a picture of each image by id, or why there is none."""
    if cache is None:
        return {}, "the cache of this run no longer exists"
    pictures, why = find_pictures(cache, options.dataset, options.data_root, on_progress)
    if pictures is None:
        return {}, why
    places: dict[Place, str] = {}
    for role, split in cache.splits():
        wanted = {one.id for one in worst if one.split == role}
        # The file of predictions has an escaped name where it is not UTF-8.
        spelt = enumerate(map(text_of, split.ids if wanted else ()))
        places.update({(role, row): name for row, name in spelt if name in wanted})
    small = pictures.small(list(places), _SIDE, on_progress)
    return {places[place]: data for place, data in small.items()}, ""
