"""Decoding, the backbone and the disk at work at the same time, one shard after the other.

Threads decode ahead, the engine runs in the caller's thread, and one more thread
writes the shard before. Each waits for the next, so that memory stays the same
however many images there are, and whoever is waited for is the bottleneck.
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
from ..datasets.dataset import Split, recorded_hashes
from ..datasets.images import OnError
from ..errors import FeatcacheError
from ..preprocess import Preprocess, apply_view
from ..progress import OnNote, OnProgress, Progress
from ..store.format import array_name
from ..store.shards import ShardRange, ShardWriter
from ..store.writer import encoded_ids

# What is measured of every shard, in seconds, and added up over all of them.
STAGES = ("wall_s", "engine_s", "decoding_cpu_s", "waiting_for_pixels_s", "waiting_for_disk_s")
_TOLD = 5  # images that were skipped, by name and reason; the cache lists all
_WAITING_SHARE = 0.1  # of the time, before a stage that is waited for is called the bottleneck


@dataclass(frozen=True)
class Plan:
    """What is made of every image.

    Parameters
    ----------
    engine : Engine
        Runs the backbone.
    preprocess : Preprocess
        Makes the pixels.
    cuts : tuple of str
        The engine's; the first is the cache's ``features``.
    dtype : str
        What the features are kept as: ``"float32"`` or ``"float16"``.
    batch_size : int
        Images per forward pass.
    workers : int
        Threads that decode.
    on_error : str
        ``"fail"`` or ``"skip"``, of images that do not decode.
    """

    engine: Engine
    preprocess: Preprocess
    cuts: tuple[str, ...]
    dtype: str
    batch_size: int
    workers: int
    on_error: OnError


@dataclass
class Shard:
    """The rows of a shard as they come in.

    Parameters
    ----------
    start, stop : int
        The images of the split that it covers.
    rows : list of numpy.ndarray
        int64 (n,) each: those of them that decoded.
    skipped : list of int
        The others.
    features : dict of str to list of numpy.ndarray
        By name inside the split; the rows of each, batch by batch.
    facts : dict of str to float
        What it took: `STAGES`, in seconds, and ``passes``.
    """

    start: int
    stop: int
    rows: list[np.ndarray] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)
    features: dict[str, list[np.ndarray]] = field(default_factory=dict)
    facts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))

    def arrays(self, split: Split, ids: np.ndarray) -> dict[str, np.ndarray]:
        """Return what is to be kept, by name.

        Parameters
        ----------
        split : Split
            The whole one.
        ids : numpy.ndarray
            Bytes (N,), of the whole split.
        """
        rows = np.concatenate(self.rows)
        kept = {name: np.concatenate(parts) for name, parts in self.features.items()}
        kept.update(labels=split.labels[rows], ids=ids[rows])
        if self.skipped:
            kept["skipped"] = ids[self.skipped]
        return kept

    def left_out(self, split: Split) -> list[tuple[int, int]]:
        """Return row and label of each image that was skipped."""
        return [(row, int(split.labels[row])) for row in self.skipped]


def run_split(
    role: str,
    split: Split,
    views: Sequence[str],
    plan: Plan,
    writer: ShardWriter,
    shards: Sequence[ShardRange],
    on_progress: OnProgress,
    on_note: OnNote,
    *,
    recorded: Split | None = None,
) -> None:
    """Extract what is missing of a split, and commit it shard by shard.

    Parameters
    ----------
    role : str
        ``"train"`` or ``"test"``.
    split : Split
        Its images.
    views : sequence of str
        Flip views, all taken of one decoding.
    plan : Plan
        What is made of every image.
    writer : ShardWriter
        Knows what is done, and takes the rest.
    shards : sequence of ShardRange
        What is to be there in the end, in the order of the rows.
    on_progress : callable
        Hears after every batch, with the bottleneck as the note.
    on_note : callable
        Hears of the first images that are skipped.
    recorded : Split, optional
        The same images from `featcache.datasets.recording`, where nobody has hashed them: the
        hashes are committed too.

    Raises
    ------
    DatasetError
        An image that does not decode.
    FeatcacheError
        Features that are not finite, or too large for float16. Nothing of that shard is kept.
    OutputError
        The disk is full. The shards before stay.
    """
    missing = writer.missing(shards)
    total = sum(map(len, shards))
    done = total - sum(map(len, missing))
    ids = encoded_ids(split.ids)
    on_progress(Progress(f"{role} images", done, total))

    def tell(n_images: int, shard: Shard) -> None:
        note = f"bottleneck: {bottleneck(shard.facts)}"
        on_progress(Progress(f"{role} images", done + n_images, total, note=note))

    written: Future[None] | None = None
    with (
        ThreadPoolExecutor(1, "featcache-disk") as disk,
        closing(extract_shards(recorded or split, views, plan, missing, tell, on_note)) as made,
    ):
        for shard in made:
            began = time.perf_counter()
            if written:
                written.result()
            waited = time.perf_counter() - began
            shard.facts["waiting_for_disk_s"] += waited
            shard.facts["wall_s"] += waited
            written = disk.submit(
                writer.commit,
                role,
                shard.start,
                shard.stop,
                shard.arrays(split, ids),
                shard.facts,
                hashes=hashes_of(recorded, shard),
                left_out=shard.left_out(split),
            )
            done += shard.stop - shard.start
            tell(0, shard)
        if written:
            written.result()


def extract_shards(
    split: Split,
    views: Sequence[str],
    plan: Plan,
    shards: Sequence[ShardRange],
    on_batch: Callable[[int, Shard], None],
    on_note: OnNote,
) -> Generator[Shard, None, None]:
    """Yield the features of one shard after the other, while the next images are decoded.

    Close the iterator when leaving early: that ends the threads.

    Parameters
    ----------
    split : Split
        The images.
    views : sequence of str
        Flip views, all taken of one decoding.
    plan : Plan
        What is made of every image.
    shards : sequence of ShardRange
        Of this split.
    on_batch : callable
        Hears after every batch but a shard's last how many images of the shard are done.
    on_note : callable
        Hears of the first images that are skipped.

    Raises
    ------
    DatasetError, FeatcacheError
        As `run_split`.
    """
    batches = (batch for shard in shards for batch in _batches(shard, plan.batch_size))
    pixels = decoded_batches(
        split.images, batches, plan.preprocess, workers=plan.workers, on_error=plan.on_error
    )
    n_told = 0
    with closing(pixels):
        for here in shards:
            shard = Shard(here.start, here.stop)
            last = time.perf_counter()
            for batch in _batches(here, plan.batch_size):
                decoded = next(pixels)
                now = time.perf_counter()
                shard.facts["waiting_for_pixels_s"] += now - last
                shard.facts["decoding_cpu_s"] += decoded.decode_s
                for _, reason in decoded.failures[: max(0, _TOLD - n_told)]:
                    on_note(f"skipped: {reason}")
                n_told += len(decoded.failures)
                _run_batch(decoded, split, views, plan, shard)
                shard.facts["engine_s"] += time.perf_counter() - now
                shard.facts["wall_s"] += time.perf_counter() - last
                last = time.perf_counter()
                if batch.stop < here.stop:
                    on_batch(batch.stop - here.start, shard)
            shard.facts["passes"] = sum(map(len, shard.rows)) * len(views)
            yield shard


def hashes_of(recorded: Split | None, shard: Shard) -> np.ndarray | None:
    """Return the hashes (n, 32) of a shard's files, if they were recorded."""
    return None if recorded is None else recorded_hashes(recorded, range(shard.start, shard.stop))


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

    So every batch is the same whoever makes the shard, and after which others; and so are
    its features.
    """
    for first in range(shard.start, shard.stop, batch_size):
        yield range(first, min(first + batch_size, shard.stop))


def _run_batch(
    decoded: DecodedBatch, split: Split, views: Sequence[str], plan: Plan, shard: Shard
) -> None:
    shard.rows.append(decoded.rows)
    shard.skipped += [row for row, _ in decoded.failures]
    for view in views:
        if len(decoded.rows):
            features = plan.engine.extract(apply_view(decoded.pixels, view))
        else:
            features = {}
        for cut, values in features.items():
            name = array_name(cut, view, plan.cuts[0])
            kept = _kept(values, plan.dtype, split, decoded.rows)
            shard.features.setdefault(name, []).append(kept)


def _kept(values: np.ndarray, dtype: str, split: Split, rows: np.ndarray) -> np.ndarray:
    """Return features as they are stored, or say whose are not numbers to be stored."""
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
