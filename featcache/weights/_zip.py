"""Read entries of a zip archive in place: nothing is ever extracted."""

from __future__ import annotations

import io
import zipfile
import zlib

from ..errors import WeightsError
from ._arrays import MAX_BYTES
from ._quote import quote

__all__ = ["Archive"]


class Archive:
    """A zip archive in memory, that gives up rather than unpack without end.

    Parameters
    ----------
    data : bytes
        The whole file.
    source : str
        Path or name, for the message.

    Raises
    ------
    WeightsError
        Not a zip archive, or a truncated one (its directory is at the end).
    """

    def __init__(self, data: bytes, source: str) -> None:
        self._source = source
        self._budget = MAX_BYTES
        try:
            self._zip = zipfile.ZipFile(io.BytesIO(data))
        except (zipfile.BadZipFile, ValueError, NotImplementedError) as failure:
            raise WeightsError(
                f"{source}: expected a zip archive, found a truncated one or none "
                f"({quote(failure)}); get the file again"
            ) from failure
        self.names = [info.filename for info in self._zip.infolist() if not info.is_dir()]

    def read(self, name: str, limit: int) -> bytes:
        """Return one entry, checked against its CRC.

        Raises
        ------
        WeightsError
            No such entry, a damaged or encrypted one, one of more than ``limit``
            bytes, or more than `MAX_BYTES` from the archive in all.
        """
        shown = f"'{quote(name)}'"
        limit = min(limit, self._budget)
        try:
            with self._zip.open(name) as entry:
                # What an entry says about its size is not believed, but measured.
                data = entry.read(limit + 1)
        except KeyError:
            raise WeightsError(
                f"{self._source}: expected an entry {shown}, found none; get the file again"
            ) from None
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError) as failure:
            raise WeightsError(
                f"{self._source}: cannot read the entry {shown} ({quote(failure)}); "
                "get the file again"
            ) from failure
        if len(data) > limit:
            raise WeightsError(
                f"{self._source}: expected at most {limit:,} bytes in the entry {shown}, found "
                "more; give a checkpoint that holds the model alone"
            )
        self._budget -= len(data)
        return data
