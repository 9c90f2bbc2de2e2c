"""Decoding, the backbone and the disk at work at the same time, one shard after the other.

Threads decode ahead, the engine runs in the caller's thread, which starts each batch before it
waits for the one before, and one more thread writes the shard before. Each waits for the next, so
that memory stays the same however many images there are, and the stage with most of the main
thread's time is the bottleneck.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import TypeVar

import numpy as np

from ..backbones.engine import Engine, start
from ..datasets.batches import DecodedBatch, Found, decoded_batches
from ..datasets.dataset import Split
from ..datasets.images import FileImages, reading_threads
from ..errors import FeatcacheError
from ..preprocess import apply_view
from ..progress import OnNote, OnProgress, Progress
from ..sampling import drawn_sides
from ..store.format import array_name
from ..store.rows import KnownRows
from ..store.shards import UNDIVIDED, ShardRange, ShardWriter
from ..store.writer import encoded_ids
from .plan import Plan, Work

T = TypeVar("T")
Finish = Callable[[], None]  # waits for the features of a batch, and keeps them

# What is measured of every shard, in seconds, and added up over all of them.
STAGES = ("wall_s", "engine_s", "decoding_cpu_s", "waiting_for_pixels_s", "waiting_for_disk_s")
FACTS = (*STAGES, "passes")  # these are forward passes
REUSED = "reused_rows"  # a fact of a shard: how many images another cache had
_NAMED = 5  # skipped images, by name and reason; the cache lists all
_KNOWN_ROWS = 256  # per batch, where no engine says what suits it
_CUT_AWAY = "the crop keeps {:.0f} % of it; --geometry pad or squash keeps all of such images"
_DIM = (
    "its brightest pixel reaches {:.2g} % of the range that its format declares; if others are as "
    "dark, scale them first"
)
_COARSE_SHARE = 0.1  # of a column's spread, lost to float16: 3 steps per standard deviation
_CONSTANT_SHARE = 1e-6  # of a column's values: a spread below is float32's own rounding
_FEW_ROWS = 16  # too few to tell a column's spread: they may be alike
_STAGE_TIMES = {  # what the main thread does with its time
    "engine": "engine_s",
    "decoding": "waiting_for_pixels_s",
    "writing": "waiting_for_disk_s",
}


class _Rounding:
    """What float16 leaves of each column: sums over rows as they come in."""

    def __init__(self, values: np.ndarray) -> None:
        self._first = values[0].reshape(-1).copy()  # sums of squares are exact near zero
        self._sums = np.zeros((3, len(self._first)), np.float32)
        self.n_rows = 0

    def add(self, values: np.ndarray, stored: np.ndarray) -> None:
        """Add features, float32 (n, …), and what is stored of them."""
        flat = values.reshape(len(values), -1)
        shifted, lost = flat - self._first, flat - stored.reshape(flat.shape)
        self._sums += shifted.sum(0), (shifted**2).sum(0), (lost**2).sum(0)
        self.n_rows += len(values)

    def coarse(self) -> tuple[int, int]:
        """Return how many columns are rounded too coarsely, and how many vary at all."""
        mean, square, lost = self._sums / self.n_rows
        variance = square - mean**2
        varies = variance > (_CONSTANT_SHARE * np.abs(self._first)) ** 2
        return int((lost > _COARSE_SHARE**2 * variance)[varies].sum()), int(varies.sum())


@dataclass
class Shard:
    """The rows of a shard as they come in, by their numbers in ``split``."""

    place: ShardRange
    rows: list[np.ndarray] = field(default_factory=list)  # int64 (n,) each: those that decoded
    skipped: list[int] = field(default_factory=list)  # the others
    # Batch by batch, by role and name: "train/features".
    features: dict[str, list[np.ndarray]] = field(default_factory=dict)
    hashes: list[np.ndarray] = field(default_factory=list)  # uint8 (m, 32) each: of all, if files
    facts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(FACTS, 0.0))
    rounding: dict[str, _Rounding] = field(default_factory=dict)  # by cut, where that is lossy

    def moved(self, to: ShardRange) -> Shard:
        """Return the shard by its rows in a longer split, its batches joined for the journey."""
        return Shard(
            to,
            [np.concatenate(self.rows) + to.start],
            [row + to.start for row in self.skipped],
            {name: [np.concatenate(parts)] for name, parts in self.features.items()},
            [np.concatenate(self.hashes)] if self.hashes else [],
            self.facts,
        )

    def commit(self, writer: ShardWriter, split: Split, ids: np.ndarray) -> None:
        """Write the shard; ``ids`` are those of the whole split, as bytes (N,)."""
        place = self.place
        hashes = np.concatenate(self.hashes) if self.hashes else None
        kept, skipped = np.concatenate(self.rows), np.array(self.skipped, np.int64)
        arrays = {name: np.concatenate(parts) for name, parts in self.features.items()}
        sides = sides_of(place.role, len(place), hashes)
        for role, of_role in sides.items():
            rows, lost = (part[of_role[part - place.start]] for part in (kept, skipped))
            if not of_role.any():
                continue
            arrays |= {f"{role}/labels": split.labels[rows], f"{role}/ids": ids[rows]}
            if hashes is not None:
                arrays[f"{role}/content_hashes"] = hashes[rows - place.start]
            if len(lost):
                arrays[f"{role}/skipped"] = ids[lost]
        if place.role != UNDIVIDED:
            arrays = {name.removeprefix(f"{place.role}/"): array for name, array in arrays.items()}
        writer.commit(
            place.role,
            place.start,
            place.stop,
            arrays,
            self.facts,
            hashes=hashes,
            left_out=[(row, int(split.labels[row])) for row in self.skipped],
        )


def sides_of(role: str, n: int, hashes: np.ndarray | None) -> dict[str, np.ndarray]:
    """Return role -> bool (n,), which of n images have it; where none is given, hashes decide."""
    if role != UNDIVIDED:
        return {role: np.ones(n, bool)}
    assert hashes is not None  # only files are undivided
    is_test = drawn_sides(hashes)
    return {"train": ~is_test, "test": is_test}


def run_shards(
    plan: Plan,
    engine: Callable[[], Engine],
    writer: ShardWriter,
    shards: Sequence[ShardRange],
    known: KnownRows | None,
    on_progress: OnProgress,
    on_note: OnNote,
) -> None:
    """Make those of these shards that are missing, on this machine, and commit each."""
    for role, split in plan.listed().items():
        own = [shard for shard in shards if shard.role == role]
        if own:
            _run_split(role, split, plan, engine, writer, own, known, on_progress, on_note)


def _run_split(
    role: str,
    split: Split,
    plan: Plan,
    engine: Callable[[], Engine],
    writer: ShardWriter,
    shards: Sequence[ShardRange],
    known: KnownRows | None,
    on_progress: OnProgress,
    on_note: OnNote,
) -> None:
    missing = writer.missing(shards)
    total = sum(map(len, shards))
    done = total - sum(map(len, missing))
    ids = encoded_ids(split.ids)
    stage = "images" if role == UNDIVIDED else f"{role} images"
    on_progress(Progress(stage, done, total))

    def report(n_images: int, shard: Shard) -> None:
        note = f"bottleneck: {bottleneck(shard.facts)}"
        on_progress(Progress(stage, done + n_images, total, note=note))

    written: Future[None] | None = None
    made_shards = extract_shards(split, plan.work, engine, missing, report, on_note, known)
    with ThreadPoolExecutor(1, "featcache-disk") as disk, closing(made_shards):
        for shard in made_shards:
            began = time.perf_counter()
            if written:
                written.result()
            waited = time.perf_counter() - began
            shard.facts["waiting_for_disk_s"] += waited
            shard.facts["wall_s"] += waited
            written = disk.submit(shard.commit, writer, split, ids)
            done += len(shard.place)
            report(0, shard)
        if written:
            written.result()


def extract_shards(
    split: Split,
    work: Work,
    engine: Callable[[], Engine],
    shards: Sequence[ShardRange],
    on_batch: Callable[[int, Shard], None],
    on_note: OnNote,
    known: KnownRows | None = None,
) -> Generator[Shard, None, None]:
    """Yield one shard after the other, while the next images are decoded.

    Every file is read once, and hashed as it is read; those that are ``known`` are not decoded,
    and ``engine``, which is asked for one when an image needs it, computes the others. Close the
    iterator when leaving early: that ends the threads. ``on_batch`` is called after every batch
    but a shard's last.
    """
    if not isinstance(split.images, FileImages):
        known = None
    batch_size = work.options.batch_size or (
        _KNOWN_ROWS if known and _all_known(split, work, shards, known) else engine().batch_size
    )
    pixels = decoded_batches(
        split.images,
        (batch for shard in shards for batch in _batches(shard, batch_size)),
        work.weights.preprocess,
        workers=reading_threads(split.images),
        on_error=work.options.on_error,
        max_pixels=work.options.max_pixels,
        hashed=isinstance(split.images, FileImages),
        find=partial(_find, known, work, shards[0].role) if known and shards else None,
    )
    told: set[str] = set()  # of each remark, the first image alone
    n_named = 0

    def started() -> Iterator[tuple[Shard, range, Finish]]:
        nonlocal n_named
        for place in shards:
            shard = Shard(place)
            for batch in _batches(place, batch_size):
                began = time.perf_counter()
                decoded = next(pixels)
                now = time.perf_counter()
                shard.facts["waiting_for_pixels_s"] += now - began
                shard.facts["decoding_cpu_s"] += decoded.decode_s
                for _, reason in decoded.failures[: max(0, _NAMED - n_named)]:
                    on_note(f"skipped: {reason}")
                n_named += len(decoded.failures)
                for remark, cases in ((_CUT_AWAY, decoded.cut_away), (_DIM, decoded.dim)):
                    if cases and remark not in told:
                        told.add(remark)
                        row, share = cases[0]
                        on_note(f"{split.ids[row]}: {remark.format(100 * share)}")
                finish = _start_batch(batch, decoded, split, work, engine, shard)
                shard.facts["engine_s"] += time.perf_counter() - now
                yield shard, batch, finish

    with closing(pixels):
        last = time.perf_counter()
        for shard, batch, finish in _one_behind(started()):
            began = time.perf_counter()
            finish()
            now = time.perf_counter()
            shard.facts["engine_s"] += now - began
            shard.facts["wall_s"] += now - last
            last = now
            if batch.stop < shard.place.stop:
                on_batch(batch.stop - shard.place.start, shard)
            else:
                _check_rounding(shard, on_note, told)
                yield shard
                last = time.perf_counter()


def _one_behind(items: Iterable[T]) -> Iterator[T]:
    """Yield each item once the next has been made; after an error too, those that were made."""
    before: list[T] = []
    try:
        for item in items:
            yield from before
            before = [item]
    except FeatcacheError:
        yield from before
        raise
    yield from before


def bottleneck(facts: dict[str, float]) -> str:
    """Name the stage on which the main thread spent most time: waiting for pixels, or the disk."""
    return max(_STAGE_TIMES, key=lambda stage: facts[_STAGE_TIMES[stage]])


def _batches(shard: ShardRange, batch_size: int) -> Iterator[range]:
    """Yield the rows of each forward pass; none crosses from one shard into the next.

    So every batch, and its features, are the same whoever makes the shard, and after which others.
    """
    for first in range(shard.start, shard.stop, batch_size):
        yield range(first, min(first + batch_size, shard.stop))


def _find(
    known: KnownRows, work: Work, role: str, rows: np.ndarray, hashes: np.ndarray
) -> tuple[np.ndarray, Found]:
    """Return which images need not be decoded, and their features, by role and name."""
    is_known, found = np.zeros(len(rows), bool), Found()
    for side, of_side in sides_of(role, len(rows), hashes).items():
        is_known[of_side], features = known.find(hashes[of_side], work.options.views_of(side))
        of_known = rows[of_side & is_known]
        if len(of_known):
            found |= {f"{side}/{name}": (of_known, values) for name, values in features.items()}
    return is_known, found


def _all_known(split: Split, work: Work, shards: Sequence[ShardRange], known: KnownRows) -> bool:
    """Tell, without reading a file, whether no image of these shards needs an engine."""
    images = split.images
    assert isinstance(images, FileImages)
    remembered = images.known_hashes([row for one in shards for row in range(one.start, one.stop)])
    if not remembered or None in remembered:
        return False
    hashes = np.frombuffer(b"".join(one or b"" for one in remembered), np.uint8).reshape(-1, 32)
    sides = sides_of(shards[0].role, len(hashes), hashes)
    return all(
        known.has(hashes[of_side], work.options.views_of(side)).all()
        for side, of_side in sides.items()
    )


def _start_batch(
    batch: range,
    decoded: DecodedBatch,
    split: Split,
    work: Work,
    engine: Callable[[], Engine],
    shard: Shard,
) -> Finish:
    """Start the passes of a batch: the identity view of all images, the others of those in train.

    The function that is returned waits for them, and adds the batch to the shard.
    """
    sides = sides_of(shard.place.role, len(batch), decoded.hashes)
    of_roles = {role: of_role[decoded.rows - batch.start] for role, of_role in sides.items()}
    views: dict[str, list[str]] = {}
    for role in of_roles:
        for view in work.options.views_of(role):
            views.setdefault(view, []).append(role)
    passes = []
    for view, roles in views.items():
        rows = np.flatnonzero(np.logical_or.reduce([of_roles[role] for role in roles]))
        if len(rows):
            pixels = decoded.pixels if len(rows) == len(decoded.rows) else decoded.pixels[rows]
            passes.append((view, roles, rows, start(engine(), apply_view(pixels, view))))
    decoded = replace(decoded, pixels=decoded.pixels[:0])

    def computed() -> Iterator[Found]:
        for view, roles, rows, wait in passes:
            shard.facts["passes"] += len(rows)
            for cut, values in wait().items():
                stored = _as_stored(values, work.options.dtype, split, decoded.rows[rows])
                if view == "identity" and stored.dtype != values.dtype:
                    shard.rounding.setdefault(cut, _Rounding(values)).add(values, stored)
                name = array_name(cut, view, work.options.cuts[0])
                for role in roles:
                    own = of_roles[role][rows]
                    if own.any():
                        part = stored if own.all() else stored[own]
                        yield {f"{role}/{name}": (decoded.rows[rows[own]], part)}

    return partial(_add_batch, shard, decoded, computed())


def _add_batch(shard: Shard, decoded: DecodedBatch, computed: Iterable[Found]) -> None:
    shard.rows.append(np.sort(np.concatenate([decoded.rows, decoded.found_rows])))
    shard.skipped += [row for row, _ in decoded.failures]
    if decoded.hashes is not None:
        shard.hashes.append(decoded.hashes)
    if len(decoded.found_rows):
        shard.facts[REUSED] = shard.facts.get(REUSED, 0.0) + len(decoded.found_rows)
    parts: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for one in chain(decoded.found, computed):
        for name, part in one.items():
            parts.setdefault(name, []).append(part)
    for name, some in parts.items():
        values = some[0][1]
        if len(some) > 1:
            order = np.argsort(np.concatenate([rows for rows, _ in some]))
            values = np.concatenate([part for _, part in some])[order]
        shard.features.setdefault(name, []).append(values)


def _check_rounding(shard: Shard, on_note: OnNote, told: set[str]) -> None:
    """Refuse float16 where the spread of most columns is small beside their offset."""
    for cut, rounding in shard.rounding.items():
        if rounding.n_rows < _FEW_ROWS:
            continue
        n_coarse, n_varying = rounding.coarse()
        found = (
            f"{cut}: float16 rounds away more than {_COARSE_SHARE:.0%} of the spread of "
            f"{n_coarse:,} of {n_varying:,} features ({shard.place})"
        )
        if 2 * n_coarse > n_varying:
            raise FeatcacheError(f"{found}; nothing of these was written; use --dtype float32")
        if n_coarse and cut not in told:
            told.add(cut)
            on_note(f"{found}; --dtype float32 keeps it")


def _as_stored(values: np.ndarray, dtype: str, split: Split, rows: np.ndarray) -> np.ndarray:
    """Return features in the cache's type, or name the image whose features do not fit it."""
    finite = np.isfinite(values).reshape(len(values), -1).all(axis=1)
    if not finite.all():
        raise FeatcacheError(
            f"{split.ids[rows[finite.argmin()]]}: expected finite features, found NaN or "
            "infinity; the weights do not suit these images, nothing of this shard was written"
        )
    if dtype == "float32":
        return values
    limit = float(np.finfo(dtype).max)
    fitting = (np.abs(values) <= limit).reshape(len(values), -1).all(axis=1)
    if not fitting.all():
        raise FeatcacheError(
            f"{split.ids[rows[fitting.argmin()]]}: expected features up to {limit:,.0f} for "
            f"{dtype}, found {float(np.abs(values).max()):,.0f}; use --dtype float32"
        )
    return values.astype(dtype)
