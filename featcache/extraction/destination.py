"""An output behind a URL: made on this machine as ever, and put there when it is whole."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import CacheError, CacheMismatchError, OutputError, RemoteError
from ..progress import OnNote, OnProgress
from ..remote import RemotePlace, located
from ..store.format import differences, fingerprint
from ..store.remote_caches import (
    RemoteCache,
    RemoteParts,
    copies_folder,
    find_remote_cache,
    send_cache,
)
from ..store.shards import shards_path, unfinished_folder
from .provenance import check_skipped_by, may_be_of, name_stem
from .result import ExtractResult, result_from
from .setting import Setting

_SUFFIXES = (".h5", ".shards")
_AGAIN = "use --force to make it again, or name another --output"


class Destination:
    """A cache's place behind a URL, or the folder for one.

    Parameters
    ----------
    place : RemotePlace
        As it was asked for.

    Attributes
    ----------
    local : Path
        What takes the place of the output on this machine: shards lie there until the cache is
        whole, and then the cache, as the copy that `featcache.load` reads.

    Raises
    ------
    OutputError
        Another suffix than a cache has.
    """

    def __init__(self, place: RemotePlace) -> None:
        self.place = place
        self._named = place.suffix in _SUFFIXES
        if not self._named and place.suffix and not place.url.endswith("/"):
            raise OutputError(
                f"{place}: expected a name that ends in .h5, or a folder (with / at its end), "
                f"found {place.suffix!r}; rename it"
            )
        self.local = (
            copies_folder(place.parent) / place.name if self._named else copies_folder(place)
        )

    def may_be(self, setting: Setting) -> bool:
        """Tell whether there is a cache that could be the one that is wanted."""
        if self._named:
            return any(self._named_as(name).find() for name in self._forms(self.place.name))
        meta = setting.meta("")
        stem = name_stem(setting.dataset.name, meta)
        names = [name for name in self.place.names() if name.startswith(f"{stem}-")]
        found = (self._there(Path(name)) for name in names if name.endswith(_SUFFIXES))
        return any(may_be_of(one.meta, meta) for one in found if one)

    def any_form(self, path: Path, why: str, started: float) -> ExtractResult | None:
        """Return what there is in either form, whatever its ingredients."""
        there = self._there(path)
        return None if there is None else _result(there, why, started)

    def found(
        self, path: Path, wanted: Mapping[str, Any], setting: Setting, started: float
    ) -> ExtractResult | None:
        """Return what there is of these ingredients, without fetching it.

        Parameters
        ----------
        path : Path
            The cache on this machine, whose name the other has too.
        wanted : mapping
            The provenance.
        setting : Setting
            Everything else.
        started : float
            When the call began.

        Raises
        ------
        CacheMismatchError
            It is of others; the message lists them.
        """
        there = self._there(path)
        if there is None:
            return None
        if there.meta["fingerprint"] != fingerprint(wanted):
            raise CacheMismatchError(
                f"{there.place}: expected a cache of these ingredients, found one of others: "
                f"{'; '.join(differences(there.meta, wanted))}; {_AGAIN}"
            )
        check_skipped_by(there.place, there.skipped, setting.on_error, _AGAIN)
        return _result(there, setting.choice.why, started)

    def check_writable(self) -> None:
        """Find out before hours of work that nothing can be put there.

        Raises
        ------
        RemoteError
            With the reason.
        """
        (self.place if self._named else self.place.within("cache.h5")).check_writable()

    def check_free(self, path: Path) -> None:
        """Refuse a name that a cache has already.

        Raises
        ------
        OutputError
            It is there.
        """
        there = self._there(path)
        if there is not None:
            raise OutputError(
                f"{there.place}: expected a name for a new cache, found that it is there already; "
                "remove it to make it again, or name another --output"
            )

    def parts(self, path: Path) -> RemoteParts:
        """Return where jobs keep the shards of the cache that is made in ``path``."""
        folder = unfinished_folder(path)
        return RemoteParts(self.of(path).parent.within(folder.name), folder)

    def unfinished(self) -> list[Path]:
        """Return, for each cache whose shards jobs may have put there, where it is made here."""
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
        """Put a cache there that was made here, unless it is there.

        Raises
        ------
        OutputError
            It cannot be sent, or another one is there by now; this one stays, and is named.
        """
        path = Path(result.cache)
        target = self.of(path)
        try:
            there = None if force else self._there(path)
            if there is None:
                send_cache(path, target, on_progress)
            elif there.meta["fingerprint"] != result.fingerprint:
                raise OutputError(f"{there.place}: another cache was put there meanwhile")
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"{path}: is made and kept; {_UPLOAD_AGAIN}") from None
        except (CacheError, OutputError, RemoteError) as error:
            raise OutputError(
                f"{error}; the cache is made and kept in {path}; {_UPLOAD_AGAIN}"
            ) from None
        where = str(there.place if there else target)
        on_note(f"{where}: is there; {path} is a copy of it, which may be removed")
        return replace(result, cache=where, wall_s=time.perf_counter() - started)

    def _there(self, path: Path) -> RemoteCache | None:
        """Return what is there in either form: a file, or a folder of shards."""
        for name in self._forms(path.name):
            try:
                there = find_remote_cache(self._named_as(name))
            except CacheError as error:
                raise type(error)(f"{error} ({_AGAIN})") from None
            if there is not None:
                return there
        return None

    def _forms(self, name: str) -> tuple[str, str]:
        path = Path(name).with_suffix(".h5")
        return path.name, shards_path(path).name

    def of(self, path: Path) -> RemotePlace:
        """Return the place of the cache that is made in ``path``."""
        return self._named_as(path.name)

    def _named_as(self, name: str) -> RemotePlace:
        """Return the place of a cache of that name."""
        if self._named:
            return self.place if name == self.place.name else self.place.parent.within(name)
        return self.place.within(name)


_UPLOAD_AGAIN = "the same command only uploads it"


def _result(there: RemoteCache, why: str, started: float) -> ExtractResult:
    """Return what is to be said of a cache that was found."""
    return result_from(
        there.meta,
        started,
        cache=str(there.place),
        reused=True,
        n_rows=there.n_rows,
        n_skipped=there.skipped,
        n_resumed=0,
        feature_dim=there.feature_dim,
        why=why,
    )


def destination(output: str | Path | None) -> Destination | None:
    """Return where a cache goes behind a URL; None where the output is a path.

    Raises
    ------
    RemoteError
        A URL with a password in it.
    OutputError
        As `Destination`.
    """
    place = None if output is None else located(output)
    return Destination(place) if isinstance(place, RemotePlace) else None
