"""What runs on the machines of a cluster: an engine, and shards that it is given."""

from __future__ import annotations

import os
import platform
import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .. import __version__
from ..cores import THREADS_VARIABLE, usable_cores
from ..datasets import OnError, Split, reading_threads, recording
from ..engines import EngineChoice, build_engine, choose_engine, computed_by
from ..errors import EngineUnavailableError, FeatcacheError
from ..pipeline import Plan, Shard, extract_shards, hashes_of
from ..progress import silent
from ..store import ShardRange
from ..weights import Weights

__all__ = ["Made", "Work", "Worker", "makers"]


@dataclass(frozen=True)
class Work:
    """What every worker of a cluster is to do with the images that it is given.

    Parameters
    ----------
    weights : Weights
        The checkpoint: it travels, so that no worker looks for one of its own.
    choice : EngineChoice
        The driver's.
    cuts : tuple of str
        Where features are taken.
    dtype : str
        What they are kept as.
    batch_size : int or None
        Images per forward pass; None is the engine's own.
    on_error : str
        ``"fail"`` or ``"skip"``.
    n_passes : int
        Forward passes of the whole data set, by which an engine may decide what to compile.
    """

    weights: Weights
    choice: EngineChoice
    cuts: tuple[str, ...]
    dtype: str
    batch_size: int | None
    on_error: OnError
    n_passes: int


@dataclass(frozen=True)
class Made:
    """What a worker made of a shard.

    Parameters
    ----------
    shard : Shard
        Features, by the rows of the whole split.
    hashes : numpy.ndarray or None
        uint8 (n, 32): SHA-256 of the files, where the images are files.
    notes : tuple of str
        On images that were skipped.
    """

    shard: Shard
    hashes: np.ndarray | None
    notes: tuple[str, ...]


def makers(choice: EngineChoice, weights: Weights) -> dict[str, Any]:
    """Return what must be the same on every machine, so that all make the same bytes."""
    return {
        **computed_by(choice, weights),
        "featcache": __version__,
        "numpy": np.__version__,
        "processor": platform.machine(),
    }


class Worker:
    """An engine on one machine of the cluster.

    Errors of featcache's own are handed back and not raised: Ray would wrap them.
    """

    def start(self, work: Work, wanted: dict[str, Any], cores: int) -> str | FeatcacheError:
        """Load the engine, if it is the driver's; return the machine's name.

        Parameters
        ----------
        work : Work
            What is to be done.
        wanted : dict
            `makers`, as the driver has them.
        cores : int
            How many are this worker's.
        """
        os.environ[THREADS_VARIABLE] = str(cores)
        host = socket.gethostname()
        try:
            choice = choose_engine(work.choice.name, work.choice.device, work.choice.precision)
            found = makers(choice, work.weights)
            differing = [
                f"{name}: found {found.get(name)!r}, wanted {value!r}"
                for name, value in wanted.items()
                if found.get(name) != value
            ]
            if differing:
                return EngineUnavailableError(
                    f"worker on {host}: expected what the driver has, found another "
                    f"{'; '.join(differing)}; install the same packages on every machine"
                )
            engine = build_engine(choice, work.weights, work.cuts, n_images=work.n_passes)
        except FeatcacheError as error:
            return type(error)(f"worker on {host}: {error}")
        self._plan = Plan(
            engine=engine,
            preprocess=work.weights.preprocess,
            cuts=work.cuts,
            dtype=work.dtype,
            batch_size=work.batch_size or engine.batch_size,
            workers=usable_cores(),
            on_error=work.on_error,
        )
        return host

    def make(self, part: Split, views: Sequence[str], shard: ShardRange) -> Made | FeatcacheError:
        """Return the features of a shard.

        Parameters
        ----------
        part : Split
            Its images alone.
        views : sequence of str
            Flip views.
        shard : ShardRange
            Where they stand in the whole split.
        """
        notes: list[str] = []
        recorded = recording(part)
        here = ShardRange(shard.role, 0, len(part))
        plan = replace(self._plan, workers=reading_threads(part.images))
        try:
            (made,) = extract_shards(
                recorded or part, views, plan, [here], lambda *_: silent(_), notes.append
            )
        except FeatcacheError as error:
            return error
        hashes = hashes_of(recorded, made)
        return Made(_moved(made, shard), hashes, tuple(notes))


def _moved(made: Shard, to: ShardRange) -> Shard:
    """Return a shard by the rows of the whole split, its batches joined for the journey."""
    return Shard(
        to.start,
        to.stop,
        [np.concatenate(made.rows) + to.start],
        [row + to.start for row in made.skipped],
        {name: [np.concatenate(parts)] for name, parts in made.features.items()},
        made.facts,
    )
