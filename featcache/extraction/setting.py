"""Everything that an extraction has decided before the first image is read."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..backbones.choice import EngineChoice
from ..backbones.engine import Engine
from ..backbones.weights import Weights
from ..datasets.dataset import Dataset
from ..datasets.images import OnError, is_remote, reading_threads
from ..errors import CacheMismatchError, DatasetError
from ..preprocess import VIEWS
from ..remote import shown
from ..store.shards import PACK_LIMIT_BYTES, ShardRange, ShardWriter
from .pipeline import STAGES, Plan, bottleneck
from .provenance import ingredients


@dataclass(frozen=True)
class Setting:
    """Everything that an extraction has decided before the first image is read.

    Parameters
    ----------
    dataset : Dataset
        Its images, limited.
    weights : Weights
        The checkpoint.
    choice : EngineChoice
        What runs it.
    cuts : tuple of str
        Where features are taken.
    dtype : str
        What they are kept as.
    views : str
        ``"none"`` or ``"flips"``.
    batch_size : int or None
        Images per forward pass; None is the engine's own.
    on_error : str
        ``"fail"`` or ``"skip"``.
    shard_rows : int
        Images per shard.
    output : str, Path or None
        As it was asked for.
    pack : bool or None
        As it was asked for.
    """

    dataset: Dataset
    weights: Weights
    choice: EngineChoice
    cuts: tuple[str, ...]
    dtype: str
    views: str
    batch_size: int | None
    on_error: OnError
    shard_rows: int
    output: str | Path | None
    pack: bool | None

    def meta(self, digest: str) -> dict[str, Any]:
        """Return the provenance, with this as the data set's digest."""
        made_of = ingredients(self.dataset, digest, self.weights, self.choice, VIEWS[self.views])
        return {**made_of, "cuts": list(self.cuts), "dtype": self.dtype}

    def plan(self, engine: Engine) -> Plan:
        """Return what is made of every image."""
        return Plan(
            engine=engine,
            preprocess=self.weights.preprocess,
            cuts=self.cuts,
            dtype=self.dtype,
            batch_size=self.batch_size or engine.batch_size,
            workers=reading_threads(self.dataset.train.images),
            on_error=self.on_error,
        )

    def views_of(self, role: str) -> Sequence[str]:
        """Return the views of a split: of test images there is one."""
        return VIEWS[self.views] if role == "train" else VIEWS["none"]

    def shards(self) -> list[ShardRange]:
        """Return the shards of both splits, in the order of the rows."""
        return [
            ShardRange(role, start, min(start + self.shard_rows, len(split)))
            for role, split in self.dataset.splits()
            for start in range(0, len(split), self.shard_rows)
        ]

    @property
    def reads_once(self) -> bool:
        """Whether images are worth being read once, since each read is a request to a store."""
        return any(is_remote(split.images) for _, split in self.dataset.splits())

    @property
    def n_images(self) -> int:
        """Images of both splits."""
        return len(self.dataset.train) + len(self.dataset.test)

    @property
    def n_passes(self) -> int:
        """Images of both splits, views counted."""
        return sum(len(split) * len(self.views_of(role)) for role, split in self.dataset.splits())


def check_skipped(writer: ShardWriter, on_error: OnError) -> None:
    """Refuse to go on in silence with what a run that skipped images left.

    Raises
    ------
    CacheMismatchError
        Images were left out, and none may be.
    """
    if on_error == "fail" and writer.skipped():
        raise CacheMismatchError(
            f"{writer.path}: expected every image of the data set, found an unfinished run that "
            f"left out {writer.skipped()} that did not decode; use --on-error skip to go on, or "
            "--force to start over"
        )


def check_rows(writer: ShardWriter, role: str, n_images: int, again: str = "use --force") -> None:
    """Refuse a split of which nothing is left; ``again`` says how to start over.

    Raises
    ------
    DatasetError
        Not one image of it decodes.
    """
    if not writer.rows(role):
        raise DatasetError(
            f"{role}: expected at least one image that decodes, found none among {n_images:,}; "
            f"replace them, and {again} to start over"
        )


def kept(writer: ShardWriter, n_images: int) -> str:
    """Say what an interrupted run leaves to the next one."""
    if not writer.n_done:
        return "nothing was kept yet"
    return f"{writer.n_done:,} of {n_images:,} images are kept, and the same command goes on there"


def took(writer: ShardWriter) -> dict[str, Any]:
    """Return what the extraction took, all its runs and machines together."""
    stages = {name: round(writer.total(name), 3) for name in STAGES}
    return {
        "wall_s": stages["wall_s"],
        "images_per_s": writer.total("passes") / max(writer.total("wall_s"), 1e-9),
        "bottleneck": bottleneck(stages),
        "stages_s": stages,
    }


def pack_limit(pack: bool | None) -> int:
    """Return up to how many bytes a cache is packed into one file."""
    return {None: PACK_LIMIT_BYTES, True: 1 << 62, False: -1}[pack]


def command_line(
    dataset: str | Path | Dataset, options: Mapping[str, Any], defaults: Mapping[str, Any]
) -> str:
    """Return the command that asks for this.

    Parameters
    ----------
    dataset : str, Path or Dataset
        The last cannot be typed, and stands as ``DATASET``.
    options : mapping
        Of `featcache.extract`, by name.
    defaults : mapping
        What need not be typed.
    """
    words = ["featcache", "extract", "DATASET" if isinstance(dataset, Dataset) else shown(dataset)]
    for name, value in options.items():
        if value == defaults[name]:
            continue
        if name == "pack":
            words += [] if value else ["--shards"]
        else:
            text = shown(value) if isinstance(value, (str, Path)) else value
            text = text if isinstance(text, (str, int)) else ",".join(text)
            words += [f"--{name.replace('_', '-')}", str(text)]
    return shlex.join(words)
