"""Which runs and which caches a report is about, grouped by data set."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CacheMissError, FeatcacheError
from ..files import user_path
from ..progress import OnNote
from ..runs import RECORD, load_runs, runs_folder
from ..store.cache import Cache, load, newest_cache
from ..store.index import default_folder, is_shards

_MAPPED_BYTES = 4 << 30  # features of a larger cache stay on the disk


@dataclass(frozen=True)
class Run:
    """A run's record, and the folder that it is in."""

    record: dict[str, Any]
    folder: Path

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.folder.name

    def saved(self, name: str) -> Path | None:
        """Return the file that the record names, or one of its name in the run's folder."""
        value = self.record.get(name)
        if not isinstance(value, str):
            return None
        path = user_path(value)
        return next((at for at in (path, self.folder / path.name) if at.is_file()), None)


@dataclass
class Group:
    """The runs and the cache of one data set; ``why`` says why there is no cache."""

    dataset: str
    digest: str
    runs: list[Run] = field(default_factory=list)
    cache: Cache | None = None
    why: str = ""


def select(
    sources: Sequence[str | Path], runs: str | Path | None, on_note: OnNote
) -> tuple[list[Group], Path]:
    """Return the runs and caches that ``sources`` name, and the folder that the page goes into.

    Without sources, it is the newest cache. Groups, at least one, are sorted by data set.

    Raises
    ------
    FeatcacheError
        A source that is neither a run nor a cache, or nothing to report on.
    """
    caches: list[Cache] = []
    named: list[Run] = []
    folders: dict[Path, list[Run]] = {}

    def known(folder: Path) -> list[Run]:
        if folder not in folders:
            folders[folder] = runs_in(folder, on_note)
        return folders[folder]

    if not sources:
        try:
            caches.append(_open(newest_cache()))
        except CacheMissError:
            folder = runs_folder(runs)
            named = known(folder)
            if not named:
                raise FeatcacheError(
                    f"{default_folder()}: expected a cache or runs to report on, found neither; "
                    "run featcache demo, or featcache extract and featcache probe"
                ) from None
    for source in sources:
        path = user_path(source)
        if path.is_file() or is_shards(path):
            caches.append(_open(path))
        else:
            named.append(_named_run(path, runs_folder(runs), known))
    groups: dict[tuple[str, str], Group] = {}
    for run in sorted(named, key=lambda run: run.name):
        mine = _group(groups, *_key(run))
        if run.folder not in [other.folder for other in mine.runs]:
            mine.runs.append(run)
    for cache in caches:
        _add_cache(groups, cache, known, runs, wanted=not named)
    for group in groups.values():
        if group.cache is None:
            _find_cache(group)
    ordered = sorted(groups.values(), key=lambda group: (group.dataset, group.digest))
    return ordered, caches[0].path.parent if caches else named[0].folder.parent.parent


def _add_cache(
    groups: dict[tuple[str, str], Group],
    cache: Cache,
    known: Any,
    runs: str | Path | None,
    *,
    wanted: bool,
) -> None:
    """Put a cache into its group, with the runs on its data set where none were named."""
    meta = cache.meta
    group = _group(groups, meta.get("dataset", "unnamed"), meta["dataset_digest"])
    if group.cache is not None and group.cache.path != cache.path:
        raise FeatcacheError(
            f"{cache.path}: expected one cache of each data set, found {group.cache.path} of the "
            "same; make a report of each"
        )
    group.cache = cache
    beside = cache.path.parent / "runs"
    folder = runs_folder(runs) if runs or not beside.is_dir() else beside
    if wanted:
        group.runs = [run for run in known(folder) if _key(run) == (group.dataset, group.digest)]


def _group(groups: dict[tuple[str, str], Group], dataset: str, digest: str) -> Group:
    return groups.setdefault((dataset, digest), Group(dataset, digest))


def _key(run: Run) -> tuple[str, str]:
    return run.record["dataset"], run.record["dataset_digest"]


def _open(path: Path) -> Cache:
    cache = load(path)
    size = sum(array.size_bytes for array in cache.index.arrays.values())
    return cache if size <= _MAPPED_BYTES else load(path, mmap=True)


def runs_in(folder: Path, on_note: OnNote) -> list[Run]:
    """Return the finished runs in a folder."""
    records, problems = load_runs(folder)
    for problem in problems:
        on_note(problem)
    return [Run(record, folder / record["run"]) for record in records]


def _named_run(path: Path, folder: Path, known: Any) -> Run:
    """Return the run in a folder, or of a name."""
    at = next((at for at in (path, folder / path.name) if (at / RECORD).is_file()), None)
    if at is None:
        there = "nothing there" if not path.exists() else "something else"
        raise FeatcacheError(
            f"{path}: expected a run (its folder, or its name in {folder}) or a cache, found "
            f"{there}; see featcache compare --json for the names of runs"
        )
    at = at.absolute()
    run = next((run for run in known(at.parent) if run.name == at.name), None)
    if run is None:
        raise FeatcacheError(
            f"{at / RECORD}: expected the record of a run, found something else; name another run"
        )
    return run


def named_run(path: Path, folder: Path, on_note: OnNote) -> Run:
    """Return the run in a folder, or of a name in the folder of runs."""
    return _named_run(path, folder, lambda at: runs_in(at, on_note))


def cache_of(run: Run) -> Cache | None:
    """Open the cache that a run names, if it still is that one."""
    for path in _cache_places(run):
        if path.is_file() or is_shards(path):
            cache = _open(path)
            if cache.meta["dataset_digest"] == run.record["dataset_digest"]:
                return cache
    return None


def _find_cache(group: Group) -> None:
    """Open the newest cache that a run of the group names, if it still is that one."""
    tried: set[tuple[Path, ...]] = set()
    for run in reversed(group.runs):
        places = tuple(_cache_places(run))
        if places not in tried:
            tried.add(places)
            group.cache = cache_of(run)
        if group.cache is not None:
            return
    group.why = "the cache of these runs no longer exists; name another one"


def _cache_places(run: Run) -> Iterable[Path]:
    value = run.record.get("cache")
    if not isinstance(value, str):
        return ()
    path = user_path(value)
    return (path, run.folder.parent.parent / path.name)
