"""The processes that share a run: their parts of a batch, and what they tell each other.

Each process, a *rank*, takes its part of every batch. What is a sum over the batch, a loss, a
gradient, a statistic, is added up over all ranks, so that each takes the step that a single
process would have taken, to rounding. A run by one process is the trivial case: its part is
the whole, and sums are what they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from ..errors import FeatcacheError, RankError
from ._watch import Watch

__all__ = ["JoinedRanks", "Ranks", "Stopped"]

T = TypeVar("T")

_FINE, _STOP, _FAILED = 0, 1, 2


class Stopped(KeyboardInterrupt):
    """All ranks stop here, between two steps, since one of them was asked to."""


class Ranks:
    """One process alone.

    Attributes
    ----------
    rank, size : int
        The place of this process, from 0, and how many there are.
    stop : callable
        Says whether this process is to stop.
    """

    rank = 0
    size = 1

    def __init__(self) -> None:
        self.stop: Callable[[], bool] = lambda: False

    def heed(self, stop: Callable[[], bool], advice: Callable[[], str]) -> None:
        """Stop when asked to; and know what there is to go on from, if a process is lost."""
        self.stop = stop

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which alone writes, and speaks to a person."""
        return self.rank == 0

    def part(self, whole: slice) -> slice:
        """Return this rank's part of a range: contiguous, in the order of ranks."""
        n = whole.stop - whole.start
        begin, end = (n * rank // self.size for rank in (self.rank, self.rank + 1))
        return slice(whole.start + begin, whole.start + end)

    def agreed(self, function: Callable[[], T]) -> T:
        """Return what a function of this rank does, if it succeeds on all; all must call it.

        Raises
        ------
        FeatcacheError
            The function's own, on rank 0.
        RankError
            It failed on another rank.
        Stopped
            A rank was asked to stop.
        """
        value = function()
        if self.stop():
            raise Stopped
        return value

    def met(self, error: FeatcacheError) -> FeatcacheError:
        """Return what to raise for an error that all ranks meet at this very moment."""
        return error

    def from_first(self, text: bytes) -> bytes:
        """Return what rank 0 calls this with."""
        return text

    def total(self, tensor: Any) -> Any:
        """Return the sum of a tensor over all ranks; its own memory may hold it."""
        return tensor

    def totals(self, tensors: Sequence[Any]) -> None:
        """Replace each tensor by its sum over all ranks."""

    def total_array(self, array: np.ndarray) -> np.ndarray:
        """Return the sum of an int64 array over all ranks."""
        return array


class JoinedRanks(Ranks):
    """One of several processes that a launcher started.

    Parameters
    ----------
    rank, size : int
        The place of this process, and how many there are.
    flow : module
        The framework.
    all_reduce : callable
        As `Framework.all_reduce`.
    """

    def __init__(self, rank: int, size: int, flow: Any, all_reduce: Callable[[Any], Any]) -> None:
        super().__init__()
        self.rank = rank
        self.size = size
        self._flow = flow
        self._all_reduce = all_reduce
        self.watch: Watch | None = None

    def heed(self, stop: Callable[[], bool], advice: Callable[[], str]) -> None:
        """Stop when asked to; and know what there is to go on from, if a process is lost."""
        watch = self.watch
        if watch is None:
            self.stop = stop
            return
        watch.advise(advice)
        self.stop = lambda: stop() or watch.is_orphan

    def agreed(self, function: Callable[[], T]) -> T:
        """Return what a function of this rank does, if it succeeds on all; all must call it."""
        error: FeatcacheError | None = None
        try:
            value = function()
        except FeatcacheError as found:
            error = found
        states = np.zeros(self.size, np.int64)
        states[self.rank] = _FAILED if error else _STOP if self.stop() else _FINE
        states = self.total_array(states)
        if states.max() == _FAILED:
            failed = int(states.argmax())
            said = self._from(failed, str(error).encode()).decode()
            who = f"rank {failed} of {self.size}: " if failed else ""
            mine = error if error is not None and self.is_first else None
            raise self.met(mine or RankError(who + said))
        if states.max() == _STOP:
            self._part()
            raise Stopped
        return value

    def met(self, error: FeatcacheError) -> FeatcacheError:
        """Return what to raise for an error that all ranks meet at this very moment."""
        self._part()
        return error if self.is_first else RankError(str(error), is_told=True)

    def from_first(self, text: bytes) -> bytes:
        """Return what rank 0 calls this with."""
        return self._from(0, text)

    def total(self, tensor: Any) -> Any:
        """Return the sum of a tensor over all ranks; its own memory may hold it."""
        if self.watch is not None:
            self.watch.check()
        try:
            self._all_reduce(tensor)
        except Exception as error:
            if self.watch is None:
                raise
            raise self.watch.cause(error) from None
        return tensor

    def totals(self, tensors: Sequence[Any]) -> None:
        """Replace each tensor by its sum over all ranks: one message for all of them."""
        with self._flow.no_grad():
            flat = self.total(self._flow.cat([tensor.reshape(-1) for tensor in tensors]))
            start = 0
            for tensor in tensors:
                stop = start + tensor.numel()
                tensor.copy_(flat[start:stop].reshape(tensor.shape))
                start = stop

    def total_array(self, array: np.ndarray) -> np.ndarray:
        """Return the sum of an int64 array over all ranks."""
        tensor = self._flow.empty(*array.shape, dtype=self._flow.int64, device="cpu")
        tensor.numpy()[...] = array
        return np.array(self.total(tensor).numpy())

    def _from(self, source: int, text: bytes) -> bytes:
        """Return the bytes that one rank calls this with."""
        mine = self.rank == source
        n = int(self.total_array(np.array([len(text) if mine else 0], np.int64))[0])
        words = np.zeros(-(-n // 8), np.int64)
        if mine and n:
            words.view(np.uint8)[:n] = np.frombuffer(text, np.uint8)
        return self.total_array(words).tobytes()[:n] if n else b""

    def _part(self) -> None:
        if self.watch is not None:
            self.watch.part()
