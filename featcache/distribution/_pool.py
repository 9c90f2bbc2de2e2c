"""Workers and their tasks: handed out in order, and done again where a worker is lost."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..datasets import Split
from ..errors import EngineUnavailableError, FeatcacheError
from ..progress import OnNote
from ..store import ShardRange
from ._cluster import reason, shape_of_workers
from ._worker import Made, Work, Worker, makers

__all__ = ["Task", "run_tasks"]

_ATTEMPTS = 3  # of a shard; one that kills three workers is not to blame on the machines
_AHEAD = 2  # tasks of a worker: the next one is there when the last one ends
_TELL_EVERY_S = 15.0  # that nothing runs


@dataclass(frozen=True)
class Task:
    """A shard to be made.

    Parameters
    ----------
    shard : ShardRange
        Its place.
    split : Split
        The whole split; its rows alone travel.
    views : tuple of str
        Flip views.
    """

    shard: ShardRange
    split: Split = field(compare=False, repr=False)
    views: tuple[str, ...]


@dataclass(eq=False)
class _Hand:
    """A worker as the driver sees it."""

    actor: Any
    host: str = ""
    refs: deque[Any] = field(default_factory=deque)


def run_tasks(
    ray: Any,
    work: Work,
    tasks: Sequence[Task],
    n_workers: int | None,
    on_made: Callable[[Task, Made], None],
    on_note: OnNote,
) -> None:
    """Have every task done by the workers of a cluster.

    Parameters
    ----------
    ray : module
        Ray, from `connected`.
    work : Work
        What is done with the images.
    tasks : sequence of Task
        Handed out in this order.
    n_workers : int, optional
        As `shape_of_workers` takes it.
    on_made : callable
        Hears of each task that is done, in whatever order they come back.
    on_note : callable
        Told of workers that are lost, and of images that are skipped.

    Raises
    ------
    EngineUnavailableError
        A worker has another engine, or other versions, than the driver; or none can start.
    FeatcacheError
        What went wrong with an image; or a task was lost three times with its worker.
    """
    pool = _Pool(ray, work, n_workers, on_note)
    try:
        pool.run(deque(tasks), on_made)
    finally:
        pool.end()


class _Pool:
    """The workers of one run."""

    def __init__(self, ray: Any, work: Work, n_workers: int | None, on_note: OnNote) -> None:
        self._ray = ray
        self._on_note = on_note
        self._wanted = makers(work.choice, work.weights)
        self._work = ray.put(work)  # once per machine, and not once per worker
        on_gpu = work.choice.device == "cuda"
        self._n_workers, self._cores = shape_of_workers(ray.nodes(), n_workers, on_gpu)
        if n_workers is not None and self._n_workers < n_workers:
            on_note(
                f"{n_workers} workers were asked for, the cluster has room for {self._n_workers}"
            )
        self._class = ray.remote(Worker).options(
            num_cpus=self._cores, num_gpus=int(on_gpu), scheduling_strategy="SPREAD"
        )
        self._starting: dict[Any, _Hand] = {}
        self._hands: list[_Hand] = []
        self._running: dict[Any, tuple[_Hand, Task]] = {}
        self._losses: Counter[ShardRange] = Counter()
        self._failed_starts = 0

    def run(self, queue: deque[Task], on_made: Callable[[Task, Made], None]) -> None:
        """Do all that is in the queue."""
        for _ in range(min(self._n_workers, len(queue))):
            self._start()
        idle_since = time.monotonic()
        while queue or self._running:
            self._assign(queue)
            refs = [*self._running, *self._starting]
            ready, _ = self._ray.wait(refs, num_returns=1, timeout=1.0)
            now = time.monotonic()
            if ready or self._running:
                idle_since = now
            elif now - idle_since > _TELL_EVERY_S:
                idle_since = now
                self._on_note(
                    f"waiting for the cluster to start {len(self._starting)} workers with "
                    f"{self._cores} cores each"
                )
            for ref in ready:
                if ref in self._starting:
                    self._started(ref)
                elif ref in self._running:
                    self._ended(ref, queue, on_made)

    def end(self) -> None:
        """Let go of all workers, whatever they are at."""
        for hand in [*self._starting.values(), *self._hands]:
            with suppress(self._ray.exceptions.RayError, RuntimeError, ValueError):
                self._ray.kill(hand.actor)

    def _start(self) -> None:
        hand = _Hand(self._class.remote())
        self._starting[hand.actor.start.remote(self._work, self._wanted, self._cores)] = hand

    def _assign(self, queue: deque[Task]) -> None:
        # One round after the other, so that the last tasks are shared out.
        for depth in range(1, _AHEAD + 1):
            for hand in self._hands:
                if queue and len(hand.refs) < depth and self._may_take(hand, queue[0]):
                    task = queue.popleft()
                    rows = range(task.shard.start, task.shard.stop)
                    part = task.split.take(np.asarray(rows))
                    ref = hand.actor.make.remote(part, task.views, task.shard)
                    hand.refs.append(ref)
                    self._running[ref] = hand, task

    def _may_take(self, hand: _Hand, task: Task) -> bool:
        """Tell whether a worker may have a task; one that was lost before is alone with its own."""
        held = [self._running[ref][1] for ref in hand.refs]
        return not held or not any(self._losses[one.shard] for one in (*held, task))

    def _started(self, ref: Any) -> None:
        hand = self._starting.pop(ref)
        try:
            answer = self._ray.get(ref)
        except self._ray.exceptions.RayError as error:
            self._failed_starts += 1
            if self._failed_starts >= _ATTEMPTS and not self._hands:
                raise EngineUnavailableError(
                    f"executor ray: expected workers that start, found {self._failed_starts} that "
                    f"did not: {_cause(error)}; featcache must be installed on every machine"
                ) from None
            if self._failed_starts < _ATTEMPTS:
                self._start()
            return
        if isinstance(answer, FeatcacheError):
            raise answer
        self._failed_starts = 0
        hand.host = answer
        self._hands.append(hand)

    def _ended(self, ref: Any, queue: deque[Task], on_made: Callable[[Task, Made], None]) -> None:
        exceptions = self._ray.exceptions
        hand, task = self._running[ref]
        try:
            answer = self._ray.get(ref)
        except exceptions.RayTaskError as error:
            raise error.cause from error
        except exceptions.RayError as error:
            self._lost(hand, queue, error)
            return
        del self._running[ref]
        hand.refs.remove(ref)
        if isinstance(answer, FeatcacheError):
            raise answer
        for note in answer.notes:
            self._on_note(note)
        on_made(task, answer)

    def _lost(self, hand: _Hand, queue: deque[Task], error: Exception) -> None:
        """Give a lost worker's tasks to the others, and start another in its place."""
        tasks = [self._running.pop(ref)[1] for ref in hand.refs]
        self._hands.remove(hand)
        with suppress(self._ray.exceptions.RayError, ValueError):
            self._ray.kill(hand.actor)
        queue.extendleft(reversed(tasks))
        # Any of them may be to blame: an answer just before the end is lost too.
        self._losses.update(task.shard for task in tasks)
        first = tasks[0].shard
        said = f"worker on {hand.host}: lost while it made {first}: {reason(error)}"
        if self._losses[first] >= _ATTEMPTS:  # after the first time it was alone
            raise FeatcacheError(
                f"{said}; so were {_ATTEMPTS - 1} before it with the same images, which may be "
                "more than the memory holds: try a smaller --batch-size, or fewer --workers"
            )
        self._on_note(f"{said}; what it had is made again")
        self._start()


def _cause(error: Exception) -> str:
    """Return what stopped a worker: the last line of a traceback, or else the first line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if "Error: " in line]
    return (named or [reason(error)])[-1][:300]
