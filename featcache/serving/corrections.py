"""A table of labels to which each correction is appended, flushed, before anybody is told of it.

It is a CSV file with the columns id, label and corrected. First comes a row for each label of the
cache, then one for each correction, with its time; an undo repeats the row before. The last row of
an id counts, wherever tables are read. A kill leaves whole rows, and at most half a last one, which
is cut off. One process at a time holds the table.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..errors import DatasetError, OutputError, TableError, one_line, shown_place
from ..files import check_writable, csv_line, refuse_links, user_path, write_all
from ..tables.reading import CORRECTIONS, read_corrections, whole_lines

State = tuple[str | None, str]  # label, and when somebody gave it: empty if nobody did

_HEADER = csv_line(CORRECTIONS)


class Corrections:
    """The labels of images, and the file that remembers how they came about.

    Parameters
    ----------
    path : str or Path
        A CSV file, which is made where there is none.
    labels : mapping of str to str or None
        Label by id of every image of the cache, before any correction.

    Raises
    ------
    TableError
        Another table is there, or another process holds it.
    DatasetError
        An id or a label that a line of CSV does not hold as it is.
    OutputError
        The table cannot be written.
    """

    def __init__(self, path: str | Path, labels: Mapping[str, str | None]) -> None:
        self.path = user_path(path)
        self.name = shown_place(self.path)
        if self.path.suffix.lower() != ".csv":
            raise TableError(f"{self.name}: expected a name that ends in .csv; name another table")
        _check_texts([*labels, *filter(None, set(labels.values()))])
        self._lock = self._locked()
        try:
            self._open(labels)
        except BaseException:
            self._lock.release()
            raise

    def close(self) -> None:
        """Let another process have the table."""
        os.close(self._file)
        self._lock.release()

    def state(self, id_: str) -> State:
        """Return the present label of an image, and when it was given."""
        return self._states[id_][-1] if id_ in self._states else (self.first[id_], "")

    def version(self, id_: str) -> int:
        """Return how many rows came after the first one of an image."""
        return self._versions.get(id_, 0)

    @property
    def corrected(self) -> Iterable[str]:
        """The ids of images that somebody has labelled or confirmed."""
        return [id_ for id_, states in self._states.items() if states[-1][1]]

    def correct(self, id_: str, label: str) -> None:
        """Append a label; when this returns it is on the disk."""
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        self._append([(id_, label, now)])
        self._replay(id_, (label, now))

    def undo(self, id_: str) -> bool:
        """Append the row before the last one again; False where there is none."""
        states = self._states.get(id_, [])
        if len(states) < 2:
            return False
        label, time = states[-2]
        self._append([(id_, label or "", time)])
        self._replay(id_, states[-2])
        return True

    def _locked(self) -> Any:
        from filelock import FileLock, Timeout

        check_writable(self.path)
        lock = self.path.with_name(f".{self.path.name}.lock")
        refuse_links(lock)
        held = FileLock(lock, timeout=0)
        try:
            held.acquire()
        except Timeout:
            raise TableError(
                f"{self.name}: another featcache serve is using this table; open its page in a "
                "second browser, or name another table"
            ) from None
        except (OSError, NotImplementedError) as error:
            raise self._unwritable(error) from None
        return held

    def _open(self, labels: Mapping[str, str | None]) -> None:
        self.first: dict[str, str | None] = {}  # by id: as of the first row
        self._states: dict[str, list[State]] = {}  # of ids with further rows; the first one first
        self._versions: dict[str, int] = {}
        try:
            data = self.path.read_bytes() if self.path.exists() else b""
            whole = b"" if _HEADER.encode().startswith(data) else whole_lines(data)
            if whole not in (b"", _HEADER.encode()):
                self._read(labels)
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
            flags |= getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
            self._file = os.open(self.path, flags, 0o644)
            os.ftruncate(self._file, len(whole))
        except OSError as error:
            raise self._unwritable(error) from None
        try:
            missing = [(id_, label, "") for id_, label in labels.items() if id_ not in self.first]
            given = [(id_, label, time) for id_, label, time in missing if label is not None]
            self._append(given, header=not whole)
            self.first.update((id_, label) for id_, label, _ in missing)
        except BaseException:
            os.close(self._file)
            raise

    def _read(self, labels: Mapping[str, str | None]) -> None:
        table = read_corrections(self.path)
        columns = (table[name].values.tolist() for name in CORRECTIONS)
        for id_, label, time in zip(*columns, strict=True):
            if id_ not in labels:
                continue  # of another cache: left as it is
            if id_ not in self.first:
                self.first[id_] = labels[id_] if time else label
                if not time:
                    continue
            self._replay(id_, (label, time or ""))

    def _replay(self, id_: str, state: State) -> None:
        states = self._states.setdefault(id_, [(self.first[id_], "")])
        if len(states) > 1 and state == states[-2]:
            states.pop()
        elif state != states[-1]:
            states.append(state)
        self._versions[id_] = self._versions.get(id_, 0) + 1

    def _append(self, rows: Iterable[tuple[str, str | None, str]], header: bool = False) -> None:
        lines = [csv_line([id_, label or "", time]) for id_, label, time in rows]
        data = "".join([_HEADER] * header + lines).encode()
        if not data:
            return
        try:
            size = os.fstat(self._file).st_size
            try:
                write_all(self._file, data)
                os.fsync(self._file)
            except OSError:
                os.ftruncate(self._file, size)
                raise
        except OSError as error:
            raise self._unwritable(error) from None

    def _unwritable(self, error: Exception) -> OutputError:
        why = getattr(error, "strerror", None) or one_line(error)
        return OutputError(
            f"{self.name}: cannot be written: {why}; free space, or name another table"
        )


def _check_texts(texts: Iterable[str]) -> None:
    """Refuse what a line of CSV would not give back."""
    for text in texts:
        is_unicode = text == text.encode("utf-8", "replace").decode()
        if text[:1] in ("", " ") or "\n" in text or "\r" in text or not is_unicode:
            raise DatasetError(
                "labels: expected ids and classes that a line of CSV holds, found "
                f"{one_line(repr(text))}; rename it"
            )
