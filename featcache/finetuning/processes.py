"""Several processes that train one network: PyTorch's DistributedDataParallel under torchrun.

Each process, a rank, takes its part of every batch, as drawn for one process. PyTorch averages
the gradients; rank 0 alone writes files. torchrun stops all processes when one fails.
"""

from __future__ import annotations

import atexit
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np

from ..cores import THREADS_VARIABLE, usable_cores
from ..errors import EngineUnavailableError, RankError, one_line
from ..process import process_environment, torchrun_rank

T = TypeVar("T")


class Processes:
    """The processes of a run; without ``torch`` this one alone, for which nothing is shared."""

    def __init__(self, rank: int = 0, size: int = 1, torch: Any = None) -> None:
        self.rank = rank
        self.size = size
        self._torch = torch

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def part(self, batch: slice) -> tuple[slice, float]:
        """Return this rank's part of a batch, and the weight of its mean loss among the ranks.

        Batch normalisation needs two images: a batch with fewer than two for each rank is
        computed whole by all of them.
        """
        n = batch.stop - batch.start
        if n < 2 * self.size:
            return batch, 1.0
        part = self.range(batch)
        return part, (part.stop - part.start) * self.size / n

    def range(self, whole: slice) -> slice:
        """Return this rank's part of a range; it may be empty."""
        n = whole.stop - whole.start
        first, stop = (n * rank // self.size for rank in (self.rank, self.rank + 1))
        return slice(whole.start + first, whole.start + stop)

    def wrap(self, module: Any, device: str) -> Any:
        """Return a module whose backward pass averages the gradients over all ranks."""
        if self.size == 1:
            return module
        places = [self._torch.cuda.current_device()] if device == "cuda" else None
        # Statistics of batch normalisation stay each rank's own while training: see `same_buffers`.
        return self._torch.nn.parallel.DistributedDataParallel(
            module, device_ids=places, broadcast_buffers=False
        )

    def same_buffers(self, module: Any) -> None:
        """Copy rank 0's buffers, such as running statistics, to all ranks."""
        if self.size > 1:
            for buffer in module.buffers():
                self._torch.distributed.broadcast(buffer, 0)

    def mean(self, tensor: Any) -> Any:
        """Return the mean of a tensor over all ranks."""
        if self.size > 1:
            self._torch.distributed.all_reduce(tensor)
            tensor /= self.size
        return tensor

    def total(self, array: np.ndarray) -> np.ndarray:
        """Return the sum of an int64 array over all ranks."""
        if self.size == 1:
            return array
        tensor = self._torch.tensor(array)  # on the CPU, by gloo: a GPU need not be waited for
        self._torch.distributed.all_reduce(tensor)
        return np.array(tensor.numpy())

    def any(self, flag: bool) -> bool:
        """Return whether a flag is set on any rank."""
        return flag if self.size == 1 else bool(self.total(np.array([int(flag)]))[0])

    def from_first(self, make: Callable[[], T]) -> T:
        """Return on every rank what ``make`` returns on rank 0."""
        if self.size == 1:
            return make()
        values = [make() if self.is_first else None]
        self._torch.distributed.broadcast_object_list(values, 0)
        return values[0]  # type: ignore[return-value]

    def check_alike(self, identity: Mapping[str, Any]) -> None:
        """Raise `RankError` unless every rank is about to do the same run."""
        own = json.loads(json.dumps(identity))
        first = self.from_first(lambda: own)
        differing = identity_differences(first, own, "rank 0")
        if differing:
            raise RankError(
                f"expected the same run as rank 0, found another: {differing}; give "
                "every machine the same command, data and weights"
            )


_MOST_LISTED = 8


def identity_differences(theirs: Mapping[str, Any], mine: Mapping[str, Any], whose: str) -> str:
    """Return the fields in which two runs differ, the first few, as ``name: whose …, here …``."""
    names = [name for name in sorted({*mine, *theirs}) if mine.get(name) != theirs.get(name)]
    listed = [
        f"{one_line(name)}: {whose} {theirs.get(name)!r:.80}, here {mine.get(name)!r:.80}"
        for name in names[:_MOST_LISTED]
    ]
    more = len(names) - _MOST_LISTED
    return "; ".join([*listed, f"and {more:,} more"] if more > 0 else listed)


@contextmanager
def joined(engine: str) -> Iterator[tuple[Processes, str]]:
    """Join the other processes of torchrun, if it started this one; else yield this one alone.

    Yields the processes and the engine. Each process of a machine gets its share of the cores.
    """
    rank = torchrun_rank()
    if rank is None:
        yield Processes(), engine
        return
    if engine == "oneflow":
        raise EngineUnavailableError(
            "engine oneflow: expected torch, with which several processes train together, found "
            "oneflow; leave out --engine, or start one process without torchrun"
        )
    from ..frameworks import import_torch

    torch = import_torch()
    distributed = torch.distributed
    if not distributed.is_available():
        raise EngineUnavailableError(
            "engine torch: expected a build of PyTorch with torch.distributed, found one without; "
            "start one process without torchrun"
        )
    if not distributed.is_initialized():
        on_gpus = torch.cuda.is_available() and distributed.is_nccl_available()
        distributed.init_process_group("cpu:gloo,cuda:nccl" if on_gpus else "gloo")
        atexit.register(distributed.destroy_process_group)
    size = distributed.get_world_size()
    cores = max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", size)))
    with process_environment({THREADS_VARIABLE: str(cores)}):
        try:
            yield Processes(rank, size, torch), "torch"
        except RuntimeError as error:
            # gloo raises plain RuntimeErrors, whose text differs by version.
            if not _is_lost_peer(error):
                raise
            raise RankError(
                f"rank {rank} of {size}: expected the other processes, found that one ended: "
                f"{str(error).splitlines()[0]:.200}; its own message says why; add --resume latest "
                "to the same command to resume"
            ) from None


def take_gpu(device: str) -> None:
    """Let each process of a machine compute on a GPU of its own."""
    if torchrun_rank() is None or device == "cpu":
        return
    if device != "cuda":
        raise EngineUnavailableError(
            f"device {device}: expected cpu or cuda with several processes, found {device}; use "
            "--device cpu, or one process"
        )
    from ..frameworks import import_torch

    cuda = import_torch().cuda
    place = int(os.environ.get("LOCAL_RANK", 0))
    if place >= cuda.device_count():
        raise EngineUnavailableError(
            f"device cuda: expected a GPU for each process of a machine, found "
            f"{cuda.device_count()}; start as many processes per machine as it has GPUs, or use "
            "--device cpu"
        )
    cuda.set_device(place)


def _is_lost_peer(error: BaseException) -> bool:
    names: Sequence[str] = [kind.__name__ for kind in type(error).__mro__]
    return "DistError" in names or "gloo" in str(error).lower() or "nccl" in str(error).lower()
