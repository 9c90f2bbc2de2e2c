"""Flips and shifts of images on the device: where each pixel comes from, and fetching it.

On a processor `ImageSource` moves pixels in NumPy, which is faster there. Both give the same
bytes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ._sources import Draw, shift_reach

__all__ = ["Movement", "move", "movement_of"]


class Movement(NamedTuple):
    """Where the pixels of each image come from.

    Parameters
    ----------
    rows, columns : numpy.ndarray
        int64 (N, s): the row of the image that each row shows, and the column that each
        column shows; s where there is none, for black.
    """

    rows: np.ndarray
    columns: np.ndarray


def movement_of(draw: Draw, names: tuple[str, ...], side: int) -> Movement | None:
    """Return how the images of a draw are moved; None where none is.

    Parameters
    ----------
    draw : Draw
        Its views and shifts.
    names : tuple of str
        The flip views that ``draw.views`` counts.
    side : int
        Of the images, in pixels.
    """
    flips = draw.views is not None and len(names) > 1
    if not flips and draw.shifts is None:
        return None
    n = len(draw.rows)
    places = []
    for axis, kinds in enumerate((("vflip", "hvflip"), ("hflip", "hvflip"))):
        place = np.tile(np.arange(side), (n, 1))
        if flips:
            flipped = np.isin(np.array(names)[draw.views], kinds)
            place[flipped] = place[flipped, ::-1]
        if draw.shifts is not None:
            place -= np.rint(draw.shifts[:, axis, None] * shift_reach(side)).astype(np.int64)
            place[(place < 0) | (place >= side)] = side
        places.append(place)
    return Movement(*places)


def move(flow: Any, planes: Any, rows: Any, columns: Any) -> Any:
    """Fetch every pixel of uint8 planes (N, C, s, s) from where a `Movement` says."""
    n, channels, side, _ = planes.shape
    padded = flow.nn.functional.pad(planes, (0, 1, 0, 1))
    down = rows.reshape(n, 1, side, 1).expand(n, channels, side, side + 1)
    across = columns.reshape(n, 1, 1, side).expand(n, channels, side, side)
    return flow.gather(flow.gather(padded, 2, down), 3, across)
