"""From rows of a data set to batches of pixels: decoded ahead, by threads, in order.

Each thread decodes a few images at a time and resizes each at once, so that a full photo
exists once per thread and no more, however large the batch and the data set are.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, nullcontext, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ..errors import DatasetChangedError, DatasetError, FeatcacheError, one_line
from ..options import MAX_PIXELS
from ..preprocess import Preprocess
from ..process import Stop, work_ahead
from .decoding import original_size, used_range
from .images import HASH_BYTES, FileImages, OnError, ReadableImages, is_remote, unreadable_hash

if TYPE_CHECKING:
    from PIL import Image


Failure = tuple[int, str]  # the row, and what is wrong with its image
Cut = tuple[int, float]  # the row, and a share: of its area that is kept, or of its range
# By name: rows int64 (k,) and their features (k, …), which are there already.
Found = dict[str, tuple[np.ndarray, np.ndarray]]
# Called with rows int64 (n,) and the SHA-256 of their files, uint8 (n, 32), by several threads;
# returns which of the images need not be decoded, bool (n,), and their features.
Find = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, Found]]

# Images per task: enough that handing a task to a thread costs nothing beside it, few
# enough that all threads share a batch and that Ctrl-C is answered soon.
_TASK_IMAGES = 32
# Seconds per image below which threads gain nothing: some 128 x 128 pixels.
_TINY_S = 0.4e-3
# Pixels that may lie ready while the engine is busy: some 200 images of 224 pixels.
_AHEAD_BYTES = 32 << 20
# Share of an image's area below which its loss is told of.
_LEAST_KEPT = 0.5
# After a bad image, seconds to look for others, and how many of them a message names.
_LOOK_S = 5.0
_NAMED = 5


@dataclass(frozen=True, eq=False)
class DecodedBatch:
    """The images of one batch that could be decoded."""

    rows: np.ndarray  # int64 (n,), their rows in the data set, in the order asked for
    # Uint8 (n, s, s, 3), as `Preprocess.compact` gives them; n is 0 where no image of the
    # batch could be decoded.
    pixels: np.ndarray
    # Row and message of those that could not.
    failures: tuple[Failure, ...]
    # Processor seconds that reading, decoding and resizing took, all threads together.
    decode_s: float
    # Row and share of those images of which the crop keeps less than half.
    cut_away: tuple[Cut, ...] = ()
    # Uint8 (m, 32), if asked for: SHA-256 of the file of each of the m rows, decoded or not.
    hashes: np.ndarray | None = None
    # Row and share of those whose brightest pixel reaches only this share of their range.
    dim: tuple[Cut, ...] = ()
    # The rows that were found (int64) and so not decoded, and their features, task by task.
    found_rows: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    found: tuple[Found, ...] = ()


def decoded_batches(
    images: ReadableImages,
    batches: Iterable[Sequence[int] | np.ndarray],
    preprocess: Preprocess,
    *,
    workers: int,
    on_error: OnError = "fail",
    max_pixels: int = MAX_PIXELS,
    hashed: bool = False,
    find: Find | None = None,
) -> Generator[DecodedBatch, None, None]:
    """Yield the pixels of each batch of rows, while threads decode the next ones.

    ``hashed`` is for `FileImages`: each file is hashed as it is read. With ``find``, those are
    not decoded whose features it knows, nor read where their hashes are remembered. Wrap the
    call in ``contextlib.closing``: leaving it ends the threads, whatever the reason for
    leaving.

    With ``"fail"``, the first image that cannot be read or decoded is a DatasetError. It counts
    and names others, which are looked for in the next batches for a few seconds.
    """
    image_bytes = 3 * preprocess.size**2
    ahead = max(1 + workers, _AHEAD_BYTES // image_bytes)
    step = min(_TASK_IMAGES, max(1, ahead // (2 * workers)))
    opened: deque[int] = deque()  # tasks of each batch that is under way

    def tasks() -> Iterator[np.ndarray]:
        for batch in batches:
            rows = np.asarray(batch, np.int64)
            parts = [rows[start : start + step] for start in range(0, len(rows), step)] or [rows]
            opened.append(len(parts))
            yield from parts

    turn, is_tiny = threading.Lock(), False

    def decode(rows: np.ndarray, stop: Stop) -> DecodedBatch:
        # The decoder of a photo leaves Python's lock free. An image of a kilobyte is mostly
        # Python: threads that decode such images at once pass the lock around, and together take
        # longer than one (on 2 cores, 144 us per image of CIFAR-10 instead of 95). The time has
        # the wait for the file in it: a slow disk is best asked for several at once.
        nonlocal is_tiny
        with turn if is_tiny else nullcontext():
            began = time.perf_counter()
            part = _decode(images, rows, preprocess, max_pixels, hashed, find, stop)
            is_tiny = time.perf_counter() - began < _TINY_S * max(1, len(rows))
        return part

    parts: list[DecodedBatch] = []
    n_looked = 0
    with closing(work_ahead(decode, tasks(), workers=workers, ahead=ahead // step)) as decoded:
        for part in decoded:
            parts.append(part)
            if len(parts) == opened[0]:
                opened.popleft()
                batch = _joined(parts, preprocess)
                parts.clear()
                n_looked += len(batch.rows) + len(batch.found_rows) + len(batch.failures)
                if batch.failures and on_error == "fail":
                    raise _all_failures(images, batch.failures, decoded, n_looked)
                yield batch


def _all_failures(
    images: ReadableImages,
    failures: Sequence[Failure],
    rest: Iterable[DecodedBatch],
    n_looked: int,
) -> DatasetError:
    """Return the error of the first bad image, with those of the next few seconds."""
    failures, end = list(failures), time.monotonic() + _LOOK_S
    with suppress(FeatcacheError):  # of another kind, which is said when these are mended
        for part in () if is_remote(images) else rest:
            failures += part.failures
            n_looked += len(part.rows) + len(part.found_rows) + len(part.failures)
            if time.monotonic() > end:
                break
    (_, text), *more = failures
    if more:
        where: Callable[[int], str] = getattr(images, "where", str)
        named = ", ".join(one_line(where(row)) for row, _ in more[:_NAMED])
        text += (
            f"; {len(more):,} more of the {n_looked:,} images looked at so far are such: {named}"
            f"{', …' * (len(more) > _NAMED)}"
        )
    return DatasetError(f"{text}, or use --on-error skip")


def _decode(
    images: ReadableImages,
    rows: np.ndarray,
    preprocess: Preprocess,
    max_pixels: int,
    hashed: bool,
    find: Find | None,
    stop: Stop,
) -> DecodedBatch:
    """Decode a few images, one after the other."""
    began = time.thread_time()
    decoded: list[Image.Image | np.ndarray] = []
    hashes: dict[int, bytes] = {}
    contents: dict[int, bytes] = {}
    found_rows, found = np.empty(0, np.int64), Found()
    if find:
        assert isinstance(images, FileImages)
        known = zip(rows.tolist(), images.known_hashes(rows.tolist()), strict=True)
        hashes = {row: sha256 for row, sha256 in known if sha256 is not None}
        for row in rows.tolist():
            if row not in hashes and not stop.is_set():
                with suppress(DatasetError):  # said when it is read for its pixels
                    contents[row], hashes[row] = images.hashed_content(row)
        hashed_rows = np.array([row for row in rows.tolist() if row in hashes], np.int64)
        is_found, found = find(
            hashed_rows, _as_array(map(hashes.__getitem__, hashed_rows.tolist()))
        )
        found_rows = hashed_rows[is_found]
    passed_over = set(found_rows.tolist())
    kept: list[int] = []
    failures: list[Failure] = []
    cut_away: list[Cut] = []
    dim: list[Cut] = []
    for row in rows.tolist():
        if stop.is_set():
            break
        if row in passed_over:
            continue
        try:
            if isinstance(images, FileImages):
                data = contents.pop(row, None) or (
                    _hashed_content(images, row, hashes) if hashed else images.content(row)
                )
                image = images.decode(row, data, preprocess, max_pixels)
                del data
            else:
                image = images.read(row, preprocess)
        except DatasetChangedError:
            raise
        except DatasetError as error:
            failures.append((row, str(error)))
        else:
            kept.append(row)
            share = preprocess.kept_share(*original_size(image))
            if share < _LEAST_KEPT:
                cut_away.append((row, share))
            used = used_range(image)
            if used is not None:
                dim.append((row, used))
            is_small = image.width * image.height <= preprocess.size**2
            decoded.append(image if is_small else preprocess.pixels(image))
            del image  # a full photo: gone before the next is decoded
    return DecodedBatch(
        np.array(kept, np.int64),
        _pixels(decoded, preprocess),
        tuple(failures),
        time.thread_time() - began,
        tuple(cut_away),
        _as_array(hashes[row] for row in rows.tolist() if row in hashes) if hashed else None,
        tuple(dim),
        found_rows,
        (found,) if found else (),
    )


def _hashed_content(images: FileImages, row: int, hashes: dict[int, bytes]) -> bytes:
    """Return the bytes of a file, and keep their hash; that of its name where it is unreadable."""
    try:
        data, hashes[row] = images.hashed_content(row)
    except DatasetError:
        hashes[row] = unreadable_hash(images.names[row])
        raise
    return data


def _as_array(hashes: Iterable[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, HASH_BYTES)


def _pixels(decoded: Sequence[Image.Image | np.ndarray], preprocess: Preprocess) -> np.ndarray:
    """Return small images as they are, if all are of one size, and else canonical pixels."""
    small = [image for image in decoded if not isinstance(image, np.ndarray)]
    if not decoded:
        return _no_pixels(preprocess)
    if len(small) == len(decoded):
        return preprocess.compact(small)
    return np.stack(
        [one if isinstance(one, np.ndarray) else preprocess.pixels(one) for one in decoded]
    )


def _joined(parts: Sequence[DecodedBatch], preprocess: Preprocess) -> DecodedBatch:
    """Put the parts of a batch together, at one size."""
    from PIL import Image

    arrays = [part.pixels for part in parts if len(part.pixels)]
    hashes = [part.hashes for part in parts if part.hashes is not None]
    if len({array.shape[1:] for array in arrays}) > 1:
        arrays = [
            array
            if array.shape[1] == preprocess.size
            else preprocess.batch([Image.fromarray(pixels) for pixels in array])
            for array in arrays
        ]
    return DecodedBatch(
        np.concatenate([part.rows for part in parts]),
        np.concatenate(arrays) if arrays else _no_pixels(preprocess),
        tuple(failure for part in parts for failure in part.failures),
        sum(part.decode_s for part in parts),
        tuple(cut for part in parts for cut in part.cut_away),
        np.concatenate(hashes) if hashes else None,
        tuple(one for part in parts for one in part.dim),
        np.concatenate([part.found_rows for part in parts]),
        tuple(found for part in parts for found in part.found),
    )


def _no_pixels(preprocess: Preprocess) -> np.ndarray:
    return np.empty((0, preprocess.size, preprocess.size, 3), np.uint8)
