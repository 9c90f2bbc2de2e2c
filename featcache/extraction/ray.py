"""The shards of an extraction made on a Ray cluster; this process is the one that writes."""

from __future__ import annotations

import importlib
import logging
import os
import platform
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..backbones.choice import EngineChoice, choose_engine
from ..backbones.engine import build_engine, computed_by
from ..backbones.weights import Weights
from ..cores import THREADS_VARIABLE, usable_cores
from ..datasets.dataset import Split, recording
from ..datasets.images import OnError, reading_threads
from ..errors import EngineUnavailableError, FeatcacheError
from ..progress import OnNote, OnProgress, Progress, silent
from ..store.shards import ShardRange, ShardWriter
from ..store.writer import encoded_ids
from ..version import __version__
from .once import Make
from .pipeline import Plan, Shard, extract_shards, hashes_of
from .setting import Setting


def on_ray(
    setting: Setting,
    address: str | None,
    workers: int | None,
    on_progress: OnProgress,
    on_note: OnNote,
) -> Make:
    """Return what has the shards made by the workers of a cluster."""

    def make(writer: ShardWriter) -> None:
        _run(setting, writer, address, workers, on_progress, on_note)

    return make


def _run(
    setting: Setting,
    writer: ShardWriter,
    address: str | None,
    workers: int | None,
    on_progress: OnProgress,
    on_note: OnNote,
) -> None:
    """Have the shards made that are missing, and commit them as they come back."""
    splits = dict(setting.dataset.splits())
    tasks = [
        Task(shard, splits[shard.role], tuple(setting.views_of(shard.role)))
        for shard in writer.missing(setting.shards())
    ]
    ids = {role: encoded_ids(split.ids) for role, split in splits.items()}
    work = Work(
        weights=setting.weights,
        choice=setting.choice,
        cuts=setting.cuts,
        dtype=setting.dtype,
        batch_size=setting.batch_size,
        on_error=setting.on_error,
        n_passes=setting.n_passes,
    )

    def keep(task: Task, made: Made) -> None:
        shard, split, role = made.shard, task.split, task.shard.role
        writer.commit(
            role,
            shard.start,
            shard.stop,
            shard.arrays(split, ids[role]),
            shard.facts,
            hashes=made.hashes,
            left_out=shard.left_out(split),
        )
        on_progress(Progress("images", writer.n_done, setting.n_images))

    on_progress(Progress("images", writer.n_done, setting.n_images))
    with connected(address) as ray:
        run_tasks(ray, work, tasks, workers, keep, on_note)


_NO_REPORTS = "RAY_USAGE_STATS_ENABLED"
_REACHABLE_S = 5.0
_SILENT = {
    "include_dashboard": False,
    "log_to_driver": False,
    "logging_level": logging.CRITICAL,
}


def import_ray() -> Any:
    """Return Ray, which sends nothing to its makers and prints nothing.

    Raises
    ------
    EngineUnavailableError
        It is not installed.
    """
    os.environ.setdefault(_NO_REPORTS, "0")  # read when a cluster is started
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise EngineUnavailableError(
            f"executor ray: not available: {error}; run pip install 'featcache[ray]'"
        ) from None


@contextmanager
def connected(address: str | None) -> Iterator[Any]:
    """Yield Ray, connected to a cluster.

    A connection that the process has already is used, and left as it is.

    Parameters
    ----------
    address : str, optional
        ``"auto"``, or the cluster's host and port; by default that of ``RAY_ADDRESS``, a cluster
        that runs on this machine, or one that is started here and ends with the block.

    Raises
    ------
    EngineUnavailableError
        No Ray, no cluster at the address, or one of another version.
    """
    ray = import_ray()
    if ray.is_initialized():
        yield ray
        return
    where = address if address is not None else os.environ.get("RAY_ADDRESS") or None
    try:
        _check_reachable(where)
        ray.init(address=address, **_SILENT)
    except (ConnectionError, OSError, RuntimeError, TimeoutError, ValueError) as error:
        raise EngineUnavailableError(
            f"executor ray: expected a cluster at {where or 'this machine'!r}, found: "
            f"{reason(error)}; see to it with ray status, or name another --address"
        ) from None
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_reachable(address: str | None) -> None:
    """Find out in seconds what Ray takes minutes to find out."""
    if address is None or address in ("auto", "local"):
        return
    if "://" in address:
        raise ValueError("an address of Ray Client; run this on a machine of the cluster instead")
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError("no address of the form host:port")
    socket.create_connection((host.strip("[]"), int(port)), timeout=_REACHABLE_S).close()


def reason(error: BaseException) -> str:
    """Return what an error of Ray's says, on one line and without its advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = lines[0] if lines else type(error).__name__
    return first[:200].rstrip(" .:")


def shape_of_workers(
    nodes: Sequence[dict[str, Any]], wanted: int | None, on_gpu: bool
) -> tuple[int, int]:
    """Return how many workers a cluster holds, and how many cores each of them has.

    Parameters
    ----------
    nodes : sequence of dict
        As ``ray.nodes()`` gives them.
    wanted : int, optional
        Workers; by default one per machine, or one per GPU.
    on_gpu : bool
        Whether each takes a GPU.

    Returns
    -------
    n_workers : int
        At least 1: what the cluster does not have yet may come.
    cores : int
        As many for each as so many workers leave, at least 1.
    """
    found = [node["Resources"] for node in nodes if node["Alive"]]
    cores = [int(one.get("CPU", 0)) for one in found]
    # Without GPUs, cores alone say how many fit.
    gpus = [int(one.get("GPU" if on_gpu else "CPU", 0)) for one in found]

    def fitting(each: int) -> int:
        return sum(min(count // each, gpu) for count, gpu in zip(cores, gpus, strict=True))

    if wanted is None:
        machines = sum(1 for count in cores if count)
        wanted = max(1, fitting(1) if on_gpu else machines)
    for each in range(max(cores, default=1), 0, -1):
        if fitting(each) >= wanted:
            return wanted, each
    return max(1, min(wanted, fitting(1))), 1


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
