"""One data set's part of a page: judged, drawn, mapped and audited, step by step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ..auditing.audit import audit
from ..datasets.dataset import Dataset
from ..progress import OnNote, OnProgress, Progress
from ..store.cache import Cache
from .figure_files import draw_figures, remove_others, save_map
from .judged import Judged, choose_probe, judge, listed
from .map import Points, gather_points
from .page import View, make_map
from .pictures import Pictures, Place, find_pictures
from .provenance import extract_command, facts, run_command
from .selection import Group
from .words import health_words, lede, probe_words, rows, tiles

_ALL = 20_000  # images up to which each gets a thumbnail unasked: some 7 MB


@dataclass
class Request:
    """What a report is made with, and what it leaves as it goes.

    Parameters
    ----------
    thumbnails, dataset, data_root, map, points, health, on_progress, on_note
        As of `featcache.report`.
    folder : Path
        Of the figures.
    stages_s : dict of str to float
        Seconds that each part of the work took.
    figures : list of Path
        What was written.
    n_points, thumbnail_bytes : int
        Images on the maps, and bytes of thumbnails.
    put : str
        The most that was put in: ``"none"``, ``"lists"`` or ``"all"``.
    """

    thumbnails: str
    dataset: str | Path | Dataset | None
    data_root: str | Path | None
    map: str
    points: int
    health: bool
    folder: Path
    on_progress: OnProgress
    on_note: OnNote
    stages_s: dict[str, float] = field(default_factory=dict)
    figures: list[Path] = field(default_factory=list)
    n_points: int = 0
    thumbnail_bytes: int = 0
    put: str = "none"

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure a part of the work."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - begun
            self.stages_s[name] = round(self.stages_s.get(name, 0.0) + spent, 3)


def gather(group: Group, key: str, prefix: str, request: Request) -> View:
    """Do everything that one data set's part of the page needs.

    Parameters
    ----------
    group : Group
        Runs on one data set, and its cache.
    key : str
        What the ids of its elements begin with.
    prefix : str
        What the names of its figures begin with.
    request : Request
        What was asked for; hears what was made.
    """
    cache = group.cache
    view = View(key, group.dataset, lede(group), cache.class_names if cache else ())
    pictures = None
    if cache is not None:
        cache.check_vectors()
        with request.stage("thumbnails"):  # the wrong images are refused before the long work
            pictures = _pictures(cache, view, request)
    with request.stage("probe"):
        view.probe = probe = choose_probe(group)
        if probe is not None and probe.head is not None and cache is not None:
            view.judged = judge(probe.head, cache, calibrated=probe.calibrated)
    if probe is not None:
        view.probe_said, view.probe_notes = probe_words(probe, view.judged)
    with request.stage("figures"):
        request.on_progress(Progress("figures", 0, 1, ""))
        view.cards, files = draw_figures(group, probe, view.judged, request.folder, prefix)
        request.figures += files
        request.on_progress(Progress("figures", 1, 1, ""))
    view.rows = rows(group)
    if cache is not None:
        points = _look_at(cache, pictures, view, request)
        with request.stage("figures"):
            request.figures += save_map(points, group, request.folder, prefix)
        view.facts = facts(cache)
        view.commands = [extract_command(cache.meta, cache.path)]
    remove_others(request.figures, request.folder, prefix)
    commands = [run_command(run.record, cache) for run in group.runs]
    view.commands += dict.fromkeys(command for command in commands if command)
    view.tiles = tiles(group, probe, view.judged, view.health.audit if view.health else None)
    return view


def _look_at(cache: Cache, pictures: Pictures | None, view: View, request: Request) -> Points:
    """Put the cache's images on the map and into the lists."""
    probe = view.probe
    with request.stage("map"):
        points = gather_points(
            cache,
            probe.head if probe else None,
            calibrated=bool(probe and probe.calibrated),
            how=request.map,
            limit=request.points,
            on_progress=request.on_progress,
        )
    request.n_points += len(points.ids)
    if request.health:
        with request.stage("health"):
            found = audit(cache, on_progress=request.on_progress)
        view.health = listed(found)
        view.duplicates_said, view.mislabelled_said, view.outliers_said = health_words(found)
    with request.stage("thumbnails"):
        sheets = _thumbnails(pictures, points, view, request) if pictures else []
    view.map = make_map(view.key, points, cache.class_names, sheets)
    return points


def _pictures(cache: Cache, view: View, request: Request) -> Pictures | None:
    if request.thumbnails == "none":
        return None
    pictures, why = find_pictures(cache, request.dataset, request.data_root, request.on_progress)
    if pictures is None:
        _tell(view, request, f"There are no thumbnails: {why}.")
    return pictures


def _thumbnails(pictures: Pictures, points: Points, view: View, request: Request) -> list[str]:
    """Fill in the view's thumbnails, and return the sheets of the map's."""
    listed_places = [*_mistaken(view.judged), *(view.health.places() if view.health else ())]
    view.thumbs = pictures.singles(listed_places, request.on_progress)
    whole = request.thumbnails == "all" or (
        request.thumbnails == "auto" and len(points.ids) <= _ALL
    )
    sheets = pictures.sheets(points.places(), request.on_progress) if whole else []
    if not whole and request.thumbnails == "auto":
        _tell(
            view,
            request,
            f"The map has no thumbnails, the lists have: {len(points.ids):,} images would add some "
            f"{len(points.ids) * 340 / 1e6:.0f} MB; --thumbnails all puts them in.",
        )
    request.thumbnail_bytes += sum(map(len, [*view.thumbs.values(), *sheets]))
    request.put = "all" if whole or request.put == "all" else "lists"
    return sheets


def _mistaken(judged: Judged | None) -> Iterator[Place]:
    if judged is not None:
        yield from (("test", one.row) for one in judged.mistakes)


def _tell(view: View, request: Request, text: str) -> None:
    view.notes.append(text)
    request.on_note(text)
