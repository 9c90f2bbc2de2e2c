"""The whole of `featcache.report`: select, evaluate, draw, write."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

from ..auditing.audit import audit
from ..datasets.dataset import Dataset
from ..errors import EngineUnavailableError, FeatcacheError, OutputError, RecipeError
from ..files import check_writable, user_path, write_atomically
from ..options import check_choice, with_options
from ..progress import OnNote, OnProgress, Progress, silent
from ..runs import NOT_COMPARED
from ..store.cache import Cache
from .commands import extract_command, run_command, shell
from .figures import (
    accuracy_over_time,
    backbones_compared,
    confused_pairs,
    confusion,
    learning_curves,
    per_class,
    regularisation_path,
    reliability,
    shots_curve,
    worst_classes,
)
from .judged import choose_probe, judge
from .map import MAPS, Points, draw_map, encode, gather_points, require_map
from .page import LISTED, Map, View, facts, lede, probe_words, render, require_page, rows, tiles_of
from .pictures import LIST_PIXELS, MAP_PIXELS, Pictures, find_pictures
from .selection import Group, select
from .style import NARROW, WIDTH, check_plot, save_figure, svg

THUMBNAILS = ("auto", "all", "lists", "none")
_ALL = 20_000  # images up to which "auto" gives each a thumbnail: some 7 MB
_FIGURES = (
    *("accuracy-over-time", "learning-curves", "survey", "regularisation-path", "few-shot"),
    *("training-set-size", "confusion", "per-class", "reliability", "map"),
)


@dataclass(frozen=True)
class ReportOptions:
    """The options of `report`, which documents them."""

    output: str | Path | None = None
    runs: str | Path | None = None
    map: str = "pca"
    points: int = 60_000
    thumbnails: str = "auto"
    dataset: str | Path | Dataset | None = None
    data_root: str | Path | None = None
    health: bool = True

    def __post_init__(self) -> None:
        for name, known in (("map", MAPS), ("thumbnails", THUMBNAILS)):
            check_choice(name, getattr(self, name), known)
        if self.points < 2:
            raise RecipeError(f"points: expected at least 2, found {self.points}")


@with_options(ReportOptions)
def report(
    *sources: str | Path,
    options: ReportOptions,
    on_progress: OnProgress = silent,
    on_note: OnNote = silent,
) -> ReportResult:
    """Write one HTML page about runs and features, and save its figures beside it.

    The page opens from the disk and fetches nothing. Runs on different data sets are separate
    parts of it that share no figure.

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
        The most images on the map; of more, a random sample that is always the same.
    thumbnails : str
        ``"all"``: of every image on the map. ``"lists"``: of those in lists. ``"none"``.
        ``"auto"``: all of up to 20,000 images, else those in lists.
    dataset : str, Path or Dataset, optional
        Where the images are, for thumbnails; only cifar10 and digits are found without. They
        must be the same images.
    data_root : str or Path, optional
        Where named data sets are kept.
    health : bool
        Whether to run `featcache.audit` for the lists of near-duplicates, likely wrong labels
        and outliers.
    on_progress : callable
        Called with the progress of each part.
    on_note : callable
        Called with each of `ReportResult.notes`.

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
    require_page()
    require_map(options.map)
    notes: list[str] = []

    def note(text: str) -> None:
        notes.append(text)
        on_note(text)

    groups, beside = select(sources, options.runs, note)
    if options.dataset is not None and len(groups) > 1:
        raise RecipeError(
            f"dataset: expected runs and caches of one data set, found {len(groups)}; make a "
            "report of each"
        )
    page = _page_path(options.output, beside)
    folder = page.with_name(f"{page.stem}-figures")
    check_writable(page)
    check_plot(folder / "figure")
    work = _Work(options, folder, on_progress, note)
    views = []
    for number, group in enumerate(groups, 1):
        prefix = f"{group.dataset}-{group.digest[:8]}-" if len(groups) > 1 else ""
        views.append(work.view(group, f"d{number}", prefix))
        views[-1].commands.append(_command(sources, page, options))
    with work.stage("page"):
        data = render(views)
        write_atomically(page, data)
    return ReportResult(
        page=page,
        size_bytes=len(data),
        thumbnail_bytes=work.thumbnail_bytes,
        thumbnails=work.thumbnails,
        figures=tuple(work.files),
        datasets=tuple(group.dataset for group in groups),
        n_points=work.n_points,
        n_runs=sum(len(group.runs) for group in groups),
        notes=tuple(notes),
        stages_s=work.stages_s,
        wall_s=time.perf_counter() - started,
    )


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


def _command(sources: Sequence[str | Path], page: Path, options: ReportOptions) -> str:
    """Return the command that makes this page again."""
    words: list[object] = ["featcache", "report", *sources]
    for option in fields(options):
        value = getattr(options, option.name)
        if option.name == "output" or value == option.default:
            continue
        value = value.name if isinstance(value, Dataset) else value
        name = option.name.replace("_", "-")
        words += [f"--no-{name}"] if value is False else [f"--{name}", value]
    return shell(*words, "--output", page)


@dataclass
class _Work:
    """One report in the making."""

    options: ReportOptions
    folder: Path
    on_progress: OnProgress
    on_note: OnNote
    stages_s: dict[str, float] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)
    n_points: int = 0
    thumbnail_bytes: int = 0
    thumbnails: str = "none"

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure a part of the work."""
        started = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - started
            self.stages_s[name] = round(self.stages_s.get(name, 0.0) + spent, 3)

    def view(self, group: Group, key: str, prefix: str) -> View:
        """Do everything for one data set's part of the page."""
        cache = group.cache
        view = View(key, group.dataset, lede(group), cache.class_names if cache else ())
        pictures = None
        if cache is not None:
            cache.check_vectors()
            with self.stage("thumbnails"):  # the wrong images are refused before the long work
                pictures = self._pictures(cache, view)
        with self.stage("probe"):
            view.probe = probe = choose_probe(group)
            if probe is not None and probe.head is not None and cache is not None:
                view.judged = judge(probe.head, cache, calibrated=probe.calibrated)
        if probe is not None:
            view.probe_said, view.probe_notes = probe_words(probe, view.judged)
        with self.stage("figures"):
            self._draw(view, group, prefix)
        view.rows = rows(group)
        view.has_votes = any(run.record["kind"] == "knn" for run in group.runs)
        if cache is not None:
            points = self._map(cache, pictures, view)
            with self.stage("figures"):  # as SVG, so many points are too much for any viewer
                drawn = draw_map(points, cache.class_names, group.dataset)
                self.files += save_figure(drawn, self.folder / f"{prefix}map.png")
            view.facts = facts(cache)
            view.commands = [extract_command(cache.meta, cache.path)]
        self._remove_others(prefix)
        commands = [run_command(run.record, cache) for run in group.runs]
        view.commands += dict.fromkeys(command for command in commands if command)
        view.tiles = tiles_of(group, probe, view.judged, view.health)
        return view

    def _pictures(self, cache: Cache, view: View) -> Pictures | None:
        if self.options.thumbnails == "none":
            return None
        pictures, why = find_pictures(
            cache, self.options.dataset, self.options.data_root, self.on_progress
        )
        if pictures is None:
            self._note(view, f"There are no thumbnails: {why}.")
        return pictures

    def _draw(self, view: View, group: Group, prefix: str) -> None:
        """Draw every figure that there is data for; save it, and put it into the view."""
        drawers = _drawers(view, group)
        for done, (name, draw) in enumerate(drawers.items(), 1):
            try:
                figure = draw()
            except (EngineUnavailableError, OutputError):
                raise
            except FeatcacheError as error:  # more than a figure has room for
                view.figures[name] = str(error)
                continue
            view.figures[name] = svg(figure) + svg(draw(width=NARROW), "narrow")
            if name == "accuracy-over-time" and "learning-curves" not in drawers:
                view.figures[name] += svg(draw(width=2 * WIDTH), "wide")  # alone in its row
            self.files += save_figure(figure, self.folder / f"{prefix}{name}")
            self.on_progress(Progress("figures", done, len(drawers), "figure"))

    def _map(self, cache: Cache, pictures: Pictures | None, view: View) -> Points:
        """Put the cache's images on the map and into the lists."""
        probe = view.probe
        with self.stage("map"):
            points = gather_points(
                cache,
                probe.head if probe else None,
                calibrated=bool(probe and probe.calibrated),
                how=self.options.map,
                limit=self.options.points,
                on_progress=self.on_progress,
            )
        self.n_points += len(points.ids)
        if self.options.health:
            with self.stage("health"):
                view.health = audit(cache, on_progress=self.on_progress)
        with self.stage("thumbnails"):
            thumbs = self._thumbs(pictures, points, view) if pictures else []
        with self.stage("page"):
            data, kinds = encode(points, cache.class_names, thumbs)
        said, n = points.projection.said, len(points.ids)
        if n < points.n_all:
            said += f" Shown is a random sample of {n:,} of the {points.n_all:,} images."
        view.map = Map(data, kinds, points.projection.axes, said)
        return points

    def _thumbs(self, pictures: Pictures, points: Points, view: View) -> list[str]:
        """Fill in the thumbnails of the view's lists, and return those of the map."""
        places = [("test", one.row) for one in view.judged.mistakes] if view.judged else []
        if view.health is not None:
            pairs = view.health.duplicates[:LISTED]
            images = [image for pair in pairs for image in (pair.first, pair.second)]
            images += (*view.health.mislabelled[:LISTED], *view.health.outliers[:LISTED])
            places += [(image.split, image.row) for image in images]
        view.thumbs = pictures.small(places, LIST_PIXELS, self.on_progress)
        n, asked = len(points.ids), self.options.thumbnails
        thumbs: list[str] = []
        if asked == "all" or (asked == "auto" and n <= _ALL):
            made = pictures.small(points.places(), MAP_PIXELS, self.on_progress)
            thumbs = [made.get(place, "") for place in points.places()]
        elif asked == "auto":
            self._note(
                view,
                f"The map has no thumbnails: {n:,} images would add about {n * 370 / 1e6:.0f} MB; "
                "--thumbnails all adds them.",
            )
        self.thumbnail_bytes += sum(map(len, [*view.thumbs.values(), *thumbs]))
        self.thumbnails = "all" if thumbs or self.thumbnails == "all" else "lists"
        return thumbs

    def _note(self, view: View, text: str) -> None:
        view.notes.append(text)
        self.on_note(text)

    def _remove_others(self, prefix: str) -> None:
        """Delete figures of an earlier report that this one does not have."""
        for name in _FIGURES:
            for suffix in (".png", ".svg"):
                path = self.folder / f"{prefix}{name}{suffix}"
                try:
                    if path not in self.files:
                        path.unlink(missing_ok=True)
                except OSError as error:
                    raise OutputError(
                        f"{path}: cannot delete this figure of an earlier report: "
                        f"{error.strerror}; choose another output"
                    ) from None


def _drawers(view: View, group: Group) -> dict[str, Callable[..., Any]]:
    """Return what draws each figure that there is data for."""
    records = [run.record for run in group.runs]
    compared = [record for record in records if record["kind"] not in NOT_COMPARED]
    tuned = [record for record in compared if record["kind"] == "finetune" and record.get("epochs")]
    drawers: dict[str, Callable[..., Any]] = {}
    if compared:
        drawers["accuracy-over-time"] = partial(accuracy_over_time, compared)
    if tuned:
        drawers["learning-curves"] = partial(learning_curves, tuned)
    own = group.cache.path.name if group.cache else ""
    curves = sorted(records, key=lambda record: Path(str(record.get("cache"))).name == own)
    for name, kind in (("few-shot", "few-shot"), ("training-set-size", "learning-curve")):
        for curve in curves:  # the newest on this cache is the last
            if curve["kind"] == kind:
                drawers[name] = partial(shots_curve, curve["points"], metric=curve["metric"])
    for record in records:
        if record["kind"] == "survey" and record["rows"]:
            drawers["survey"] = partial(backbones_compared, record["rows"])
    if view.probe is None:
        return drawers
    record = view.probe.run.record
    sweep = record.get("sweep")
    if isinstance(sweep, Mapping) and sweep.get("points"):
        metric = record.get("metric", "top1")
        drawers["regularisation-path"] = partial(regularisation_path, sweep, metric=metric)
    if view.judged is not None:
        measured = view.judged.evaluation
        if measured.confusion:
            drawers["confusion"] = partial(confusion, measured.confusion, view.classes)
            drawers["per-class"] = partial(per_class, measured.per_class_accuracy, view.classes)
        else:
            drawers["confusion"] = partial(confused_pairs, measured.most_confused, view.classes)
            drawers["per-class"] = partial(worst_classes, measured, view.classes)
        if measured.reliability:
            drawers["reliability"] = partial(reliability, measured.reliability)
    return drawers


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
        ``"all"``, ``"lists"`` or ``"none"``: which thumbnails it has, of the data set with the
        most.
    figures : tuple of Path
        The PNG and SVG files.
    datasets : tuple of str
        Data sets in it.
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
