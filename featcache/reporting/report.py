"""The whole of `featcache.report`: select, gather, draw, write."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..datasets.dataset import Dataset
from ..errors import OutputError, RecipeError
from ..files import check_writable, user_path, write_atomically
from ..progress import OnNote, OnProgress, Progress, silent
from .gathering import Request, gather
from .map import MAPS, require_map
from .page import render, require_page
from .provenance import shell
from .selection import select
from .svg import check_plot

THUMBNAILS = ("auto", "all", "lists", "none")
POINTS = 60_000


def report(
    *sources: str | Path,
    output: str | Path | None = None,
    runs: str | Path | None = None,
    map: str = "pca",
    points: int = POINTS,
    thumbnails: str = "auto",
    dataset: str | Path | Dataset | None = None,
    data_root: str | Path | None = None,
    health: bool = True,
    on_progress: OnProgress = silent,
    on_note: OnNote = silent,
) -> ReportResult:
    """Make one HTML page of runs and features, and save its figures beside it.

    The page opens from the disk and asks nothing of any network. Runs on different data
    sets are parts of it that never share a figure.

    Parameters
    ----------
    *sources : str or Path
        Runs (folders, or names in the folder of runs) and caches, one of each data set. A
        cache brings the runs on its data set along, unless runs are named; a run brings its
        cache. By default the newest cache.
    output : str or Path, optional
        An ``.html`` file, or a folder for ``report.html``; beside the cache by default. The
        figures go into a folder beside it, ``report-figures``.
    runs : str or Path, optional
        The folder of runs; ``runs`` beside the cache, else ``cache/runs``, by default.
    map : str
        ``"pca"``, or ``"umap"`` where umap-learn is installed.
    points : int
        Images on the map at most; of more, a draw that is always the same.
    thumbnails : str
        ``"all"`` images of the map, those in ``"lists"``, ``"none"``; ``"auto"`` takes all of
        up to 20,000 images and else the lists.
    dataset : str, Path or Dataset, optional
        Where the images are; by default where they were when the cache was made. They must
        be the same ones.
    data_root : str or Path, optional
        Where named data sets are kept.
    health : bool
        Whether to run `featcache.audit` for the lists of near-duplicates, likely wrong labels
        and outliers.
    on_progress : callable
        Hears of every part of the work.
    on_note : callable
        Hears what `ReportResult.notes` has.

    Returns
    -------
    ReportResult

    Raises
    ------
    FeatcacheError
        A source that is neither run nor cache, nothing to report on, two caches of one
        data set.
    EngineUnavailableError
        matplotlib, jinja2 or bokeh is not installed, or umap-learn where it was asked for.
    CacheError
        A cache that cannot be trusted, or whose features are maps or not finite.
    DatasetError
        ``dataset`` is not what the cache was made from.
    OutputError
        The page or a figure cannot be written.
    RecipeError
        An option out of its range.
    """
    started = time.perf_counter()
    _check(map, points, thumbnails)
    require_page()
    require_map(map)
    notes: list[str] = []

    def note(text: str) -> None:
        notes.append(text)
        on_note(text)

    selection = select(sources, runs, note)
    groups = selection.groups
    if dataset is not None and len(groups) > 1:
        raise RecipeError(
            f"dataset: expected runs and caches of one data set, found {len(groups)}; make a "
            "report of each"
        )
    page = _page_path(output, selection.folder)
    folder = page.with_name(f"{page.stem}-figures")
    check_writable(page)
    check_plot(folder / "figure")
    request = Request(
        thumbnails, dataset, data_root, map, points, health, folder, on_progress, note
    )
    views = []
    for number, group in enumerate(groups, 1):
        prefix = f"{group.dataset}-{group.digest[:8]}-" if len(groups) > 1 else ""
        views.append(gather(group, f"d{number}", prefix, request))
        views[-1].commands.append(
            _command(sources, page, runs, map, points, thumbnails, dataset, data_root, health)
        )
    with request.stage("page"):
        on_progress(Progress("page", 0, 1, ""))
        data = render(views)
        write_atomically(page, data)
        on_progress(Progress("page", 1, 1, ""))
    return ReportResult(
        page=page,
        size_bytes=len(data),
        thumbnail_bytes=request.thumbnail_bytes,
        thumbnails=request.put,
        figures=tuple(request.figures),
        datasets=tuple(group.dataset for group in groups),
        n_points=request.n_points,
        n_runs=sum(len(group.runs) for group in groups),
        notes=tuple(notes),
        stages_s=request.stages_s,
        wall_s=time.perf_counter() - started,
    )


def _check(map: str, points: int, thumbnails: str) -> None:
    for name, value, known in (("map", map, MAPS), ("thumbnails", thumbnails, THUMBNAILS)):
        if value not in known:
            raise RecipeError(f"{name}: expected one of {', '.join(known)}, found {value!r}")
    if points < 2:
        raise RecipeError(f"points: expected at least 2, found {points}")


def _page_path(output: str | Path | None, folder: Path) -> Path:
    if output is None:
        return folder / "report.html"
    path = user_path(output)
    if path.suffix.lower() in (".html", ".htm"):
        return path
    if path.suffix and not path.is_dir():
        raise OutputError(
            f"{path}: expected a name that ends in .html, or a folder, found {path.suffix!r}; "
            "rename it"
        )
    return path / "report.html"


def _command(
    sources: Sequence[str | Path],
    page: Path,
    runs: str | Path | None,
    map: str,
    points: int,
    thumbnails: str,
    dataset: str | Path | Dataset | None,
    data_root: str | Path | None,
    health: bool,
) -> str:
    """Return what makes this page again."""
    words: list[object] = ["featcache", "report", *sources]
    if runs is not None:
        words += ["--runs", runs]
    if map != "pca":
        words += ["--map", map]
    if points != POINTS:
        words += ["--points", points]
    if thumbnails != "auto":
        words += ["--thumbnails", thumbnails]
    if dataset is not None:
        words += ["--dataset", dataset.name if isinstance(dataset, Dataset) else dataset]
    if data_root is not None:
        words += ["--data-root", data_root]
    if not health:
        words += ["--no-health"]
    return shell(*words, "--output", page)


@dataclass(frozen=True)
class ReportResult:
    """A page, and the figures beside it.

    Parameters
    ----------
    page : Path
        The HTML file.
    size_bytes : int
        Its size.
    thumbnail_bytes : int
        How much of that is thumbnails.
    thumbnails : str
        ``"all"``, ``"lists"`` or ``"none"``: what was put in, of the data set with the most.
    figures : tuple of Path
        The PNG and SVG files.
    datasets : tuple of str
        Whose runs and features are in it.
    n_points : int
        Images on the maps.
    n_runs : int
        Runs in it.
    notes : tuple of str
        What was left out and why, a sentence each.
    stages_s : mapping of str to float
        Seconds that each part of the work took.
    wall_s : float
        Seconds that everything took.
    """

    page: Path
    size_bytes: int
    thumbnail_bytes: int
    thumbnails: str
    figures: tuple[Path, ...]
    datasets: tuple[str, ...]
    n_points: int
    n_runs: int
    notes: tuple[str, ...]
    stages_s: Mapping[str, float]
    wall_s: float

    def open(self) -> bool:
        """Show the page in the browser; return whether there is one."""
        import webbrowser

        return webbrowser.open(self.page.absolute().as_uri())

    def _repr_html_(self) -> str:
        """Return a link, for a notebook."""
        from html import escape

        at = escape(self.page.absolute().as_uri(), quote=True)
        return f'<a href="{at}">{escape(str(self.page))}</a>, {self.size_bytes / 1e6:.1f} MB'
