"""Decoding, the backbone and the disk at work at the same time, one shard after the other.

Threads decode ahead, the engine runs in the caller's thread, and one more thread writes the shard
before. Each waits for the next, so that memory stays the same however many images there are, and
the stage that the others wait for is the bottleneck.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np

from ..backbones.engine import Engine
from ..datasets.batches import DecodedBatch, decoded_batches
from ..datasets.dataset import Split, recorded_hashes, recording
from ..datasets.images import reading_threads
from ..errors import FeatcacheError
from ..preprocess import apply_view
from ..progress import OnNote, OnProgress, Progress
from ..store.format import array_name
from ..store.shards import ShardRange, ShardWriter
from ..store.writer import encoded_ids
from .plan import Plan, Work

# What is measured of every shard, in seconds, and added up over all of them.
STAGES = ("wall_s", "engine_s", "decoding_cpu_s", "waiting_for_pixels_s", "waiting_for_disk_s")
_NAMED = 5  # skipped images, by name and reason; the cache lists all
_WAITING_SHARE = 0.1  # of the time, before a stage that is waited for is called the bottleneck


@dataclass
class Shard:
    """The rows of a shard as they come in, by their numbers in ``split``."""

    place: ShardRange
    rows: list[np.ndarray] = field(default_factory=list)  # int64 (n,) each: those that decoded
    skipped: list[int] = field(default_factory=list)  # the others
    features: dict[str, list[np.ndarray]] = field(default_factory=dict)  # batch by batch
    hashes: np.ndarray | None = None  # uint8 (n, 32): SHA-256 of the files, where they are files
    facts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))

    def moved(self, to: ShardRange) -> Shard:
        """Return the shard by its rows in a longer split, its batches joined for the journey."""
        return Shard(
            to,
            [np.concatenate(self.rows) + to.start],
            [row + to.start for row in self.skipped],
            {name: [np.concatenate(parts)] for name, parts in self.features.items()},
            self.hashes,
            self.facts,
        )

    def commit(self, writer: ShardWriter, split: Split, ids: np.ndarray) -> None:
        """Write the shard; ``ids`` are those of the whole split, as bytes (N,)."""
        rows = np.concatenate(self.rows)
        arrays = {name: np.concatenate(parts) for name, parts in self.features.items()}
        arrays.update(labels=split.labels[rows], ids=ids[rows])
        if self.skipped:
            arrays["skipped"] = ids[self.skipped]
        writer.commit(
            self.place.role,
            self.place.start,
            self.place.stop,
            arrays,
            self.facts,
            hashes=self.hashes,
            left_out=[(row, int(split.labels[row])) for row in self.skipped],
        )


def run_shards(
    plan: Plan,
    engine: Engine,
    writer: ShardWriter,
    shards: Sequence[ShardRange],
    on_progress: OnProgress,
    on_note: OnNote,
) -> None:
    """Make those of these shards that are missing, on this machine, and commit each."""
    for role, split in plan.dataset.splits():
        own = [shard for shard in shards if shard.role == role]
        if own:
            _run_split(role, split, plan, engine, writer, own, on_progress, on_note)


def _run_split(
    role: str,
    split: Split,
    plan: Plan,
    engine: Engine,
    writer: ShardWriter,
    shards: Sequence[ShardRange],
    on_progress: OnProgress,
    on_note: OnNote,
) -> None:
    missing = writer.missing(shards)
    total = sum(map(len, shards))
    done = total - sum(map(len, missing))
    ids = encoded_ids(split.ids)
    on_progress(Progress(f"{role} images", done, total))

    def report(n_images: int, shard: Shard) -> None:
        note = f"bottleneck: {bottleneck(shard.facts)}"
        on_progress(Progress(f"{role} images", done + n_images, total, note=note))

    written: Future[None] | None = None
    made_shards = extract_shards(split, plan.work, engine, missing, report, on_note)
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
    engine: Engine,
    shards: Sequence[ShardRange],
    on_batch: Callable[[int, Shard], None],
    on_note: OnNote,
) -> Generator[Shard, None, None]:
    """Yield one shard after the other, while the next images are decoded.

    Every file is read once, and hashed as it is read. Close the iterator when leaving early: that
    ends the threads. ``on_batch`` is called after every batch but a shard's last.
    """
    recorded = recording(split)
    batch_size = work.options.batch_size or engine.batch_size
    pixels = decoded_batches(
        (recorded or split).images,
        (batch for shard in shards for batch in _batches(shard, batch_size)),
        work.weights.preprocess,
        workers=reading_threads(split.images),
        on_error=work.options.on_error,
    )
    n_named, warned = 0, False
    with closing(pixels):
        for place in shards:
            shard = Shard(place)
            views = work.options.views_of(place.role)
            last = time.perf_counter()
            for batch in _batches(place, batch_size):
                decoded = next(pixels)
                now = time.perf_counter()
                shard.facts["waiting_for_pixels_s"] += now - last
                shard.facts["decoding_cpu_s"] += decoded.decode_s
                for _, reason in decoded.failures[: max(0, _NAMED - n_named)]:
                    on_note(f"skipped: {reason}")
                n_named += len(decoded.failures)
                if decoded.cut_away and not warned:
                    warned = True
                    row, kept = decoded.cut_away[0]
                    on_note(
                        f"{split.ids[row]}: the crop keeps {100 * kept:.0f} % of it; --geometry "
                        "pad or squash keeps all of such images"
                    )
                _run_batch(decoded, split, views, work, engine, shard)
                shard.facts["engine_s"] += time.perf_counter() - now
                shard.facts["wall_s"] += time.perf_counter() - last
                last = time.perf_counter()
                if batch.stop < place.stop:
                    on_batch(batch.stop - place.start, shard)
            shard.facts["passes"] = sum(map(len, shard.rows)) * len(views)
            if recorded:
                shard.hashes = recorded_hashes(recorded, range(place.start, place.stop))
            yield shard


def bottleneck(facts: dict[str, float]) -> str:
    """Name the stage that the others waited for: decoding, writing, or the engine."""
    wall_s = max(facts["wall_s"], 1e-9)
    if facts["waiting_for_pixels_s"] > _WAITING_SHARE * wall_s:
        return "decoding"
    if facts["waiting_for_disk_s"] > _WAITING_SHARE * wall_s:
        return "writing"
    return "engine"


def _batches(shard: ShardRange, batch_size: int) -> Iterator[range]:
    """Yield the rows of each forward pass; none crosses from one shard into the next.

    So every batch, and its features, are the same whoever makes the shard, and after which others.
    """
    for first in range(shard.start, shard.stop, batch_size):
        yield range(first, min(first + batch_size, shard.stop))


def _run_batch(
    decoded: DecodedBatch,
    split: Split,
    views: Sequence[str],
    work: Work,
    engine: Engine,
    shard: Shard,
) -> None:
    shard.rows.append(decoded.rows)
    shard.skipped += [row for row, _ in decoded.failures]
    if not len(decoded.rows):
        return
    for view in views:
        for cut, values in engine.extract(apply_view(decoded.pixels, view)).items():
            name = array_name(cut, view, work.options.cuts[0])
            stored = _as_stored(values, work.options.dtype, split, decoded.rows)
            shard.features.setdefault(name, []).append(stored)


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
