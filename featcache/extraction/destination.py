"""An output behind a URL: the cache is made on this machine and uploaded when it is complete."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import CacheError, OutputError, RemoteError
from ..progress import OnNote, OnProgress
from ..remote import RemotePlace, located
from ..store.remote_caches import (
    RemoteCache,
    RemoteParts,
    copies_folder,
    find_remote_cache,
    send_cache,
)
from ..store.shards import shards_path, unfinished_folder
from .plan import (
    MAKE_AGAIN,
    SUFFIXES,
    Plan,
    check_ingredients,
    check_none_skipped,
    name_stem,
    same_but_images,
)
from .result import ExtractResult, result_from

_UPLOAD_AGAIN = "the same command only uploads it"


class Destination:
    """A cache's place behind a URL, or the folder for one.

    ``local`` takes the place of the output on this machine: it holds the shards until the cache is
    complete, and then the cache, as the copy that `featcache.load` reads.
    """

    def __init__(self, place: RemotePlace) -> None:
        self.place = place
        self._named = place.suffix in SUFFIXES
        if not self._named and place.suffix and not place.url.endswith("/"):
            raise OutputError(
                f"{place}: expected a name that ends in .h5, or a folder (with / at its end), "
                f"found {place.suffix!r}; rename it"
            )
        self.local = (
            copies_folder(place.parent) / place.name if self._named else copies_folder(place)
        )

    def may_be_there(self, plan: Plan) -> bool:
        """Tell whether there is a cache that differs in nothing but perhaps its images."""
        if self._named:
            return any(self.of(name).find() for name in self._forms(self.place.name))
        meta = plan.meta("")
        names = [name for name in self.place.names() if name.startswith(f"{name_stem(meta)}-")]
        caches = (self.existing(Path(name)) for name in names if name.endswith(SUFFIXES))
        return any(same_but_images(one.meta, meta) for one in caches if one)

    def matching(
        self, path: Path, expected: Mapping[str, Any], plan: Plan, started: float
    ) -> ExtractResult | None:
        """Describe the cache of these ingredients without fetching it; refuse one of others."""
        existing = self.existing(path)
        if existing is None:
            return None
        check_ingredients(existing.place, existing.meta, expected)
        check_none_skipped(existing.place, existing.skipped, plan.options.on_error)
        return result_of_remote(existing, plan.work.choice.why, started)

    def check_writable(self) -> None:
        """Try with an empty object, before hours of work, that the place can be written."""
        (self.place if self._named else self.place.within("cache.h5")).check_writable()

    def parts(self, path: Path) -> RemoteParts:
        """Return where jobs keep the shards of the cache that is made in ``path``."""
        folder = unfinished_folder(path)
        return RemoteParts(self.of(path).parent.within(folder.name), folder)

    def unfinished(self) -> list[Path]:
        """Return where each cache whose shards jobs may have uploaded is made here."""
        if self._named:
            return [self.local.with_suffix(".h5")]
        found = (re.fullmatch(r"\.(.+\.h5)\.parts", name) for name in self.place.names())
        return [self.local / match[1] for match in found if match]

    def deliver(
        self,
        result: ExtractResult,
        force: bool,
        started: float,
        on_progress: OnProgress,
        on_note: OnNote,
    ) -> ExtractResult:
        """Upload a cache that was made here, unless it is there; it stays here if that fails."""
        path = Path(result.cache)
        target = self.of(path)
        try:
            existing = None if force else self.existing(path)
            if existing is None:
                send_cache(path, target, on_progress)
            elif existing.meta["fingerprint"] != result.fingerprint:
                raise OutputError(
                    f"{existing.place}: expected no cache, found one uploaded meanwhile"
                )
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"{path}: is complete; {_UPLOAD_AGAIN}") from None
        except (CacheError, OutputError, RemoteError) as error:
            raise OutputError(
                f"{error}; the complete cache is in {path}; {_UPLOAD_AGAIN}"
            ) from None
        where = str(existing.place if existing else target)
        on_note(f"{where}: uploaded; {path} is a copy, which may be deleted")
        return replace(result, cache=where, wall_s=time.perf_counter() - started)

    def existing(self, path: Path) -> RemoteCache | None:
        """Return the cache in either form: a file, or a folder of shards."""
        for name in self._forms(path.name):
            try:
                existing = find_remote_cache(self.of(name))
            except CacheError as error:
                raise type(error)(f"{error} ({MAKE_AGAIN})") from None
            if existing is not None:
                return existing
        return None

    def _forms(self, name: str) -> tuple[str, str]:
        path = Path(name).with_suffix(".h5")
        return path.name, shards_path(path).name

    def of(self, path: str | Path) -> RemotePlace:
        """Return the place of the cache that is made in ``path``, or has that name."""
        name = Path(path).name
        if self._named:
            return self.place if name == self.place.name else self.place.parent.within(name)
        return self.place.within(name)


def result_of_remote(cache: RemoteCache, why: str, started: float) -> ExtractResult:
    """Describe a cache that exists behind a URL."""
    return result_from(
        cache.meta,
        started,
        cache=str(cache.place),
        reused=True,
        n_rows=cache.n_rows,
        n_val=cache.n_val,
        n_skipped=cache.skipped,
        n_resumed=0,
        computed=0,
        reused_rows=cache.n_rows,
        feature_dim=cache.feature_dim,
        why=why,
    )


def destination(output: str | Path | None) -> Destination | None:
    """Return a cache's place behind a URL; None where the output is a path."""
    place = None if output is None else located(output)
    return Destination(place) if isinstance(place, RemotePlace) else None
