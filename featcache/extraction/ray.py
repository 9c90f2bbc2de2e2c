"""The shards of an extraction made on a Ray cluster; this process is the one that writes.

Each shard is a task of Ray, which starts the processes, places them and repeats a task whose
process or machine is lost. A process builds its engine for its first shard and keeps it.
"""

from __future__ import annotations

import importlib
import logging
import os
import platform
import secrets
import socket
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..backbones.choice import EngineChoice, choose_engine
from ..backbones.engine import Engine, build_engine, computed_by
from ..backbones.weights import Weights
from ..cores import THREADS_VARIABLE
from ..datasets.dataset import Split
from ..errors import EngineUnavailableError, FeatcacheError
from ..progress import OnNote, OnProgress, Progress, silent
from ..store.shards import ShardRange, ShardWriter
from ..store.writer import encoded_ids
from ..version import __version__
from .jobs import Make
from .pipeline import Shard, extract_shards
from .plan import Plan, Work

_RETRIES = 2  # of a shard by Ray; one that ends three processes is not to blame on the machines
_PATIENCE_S = 60.0  # without any shard, before a note says what is waited for


def on_ray(
    plan: Plan,
    address: str | None,
    workers: int | None,
    on_progress: OnProgress,
    on_note: OnNote,
) -> Make:
    """Return a function that has shards made by the workers of a cluster."""

    def make(writer: ShardWriter, shards: Sequence[ShardRange]) -> None:
        splits = plan.listed()
        ids = {role: encoded_ids(split.ids) for role, split in splits.items()}
        n_images = sum(map(len, splits.values()))

        def keep(shard: Shard) -> None:
            role = shard.place.role
            shard.commit(writer, splits[role], ids[role])
            on_progress(Progress("images", writer.n_done, n_images))

        on_progress(Progress("images", writer.n_done, n_images))
        with connected(address) as ray:
            _run_tasks(ray, plan, writer.missing(shards), workers, keep, on_note)

    return make


_NO_REPORTS = "RAY_USAGE_STATS_ENABLED"
_REACHABLE_S = 5.0
_SILENT = {
    "include_dashboard": False,
    "log_to_driver": False,
    "logging_level": logging.CRITICAL,
}


def import_ray() -> Any:
    """Return Ray, which sends nothing to its makers and prints nothing."""
    os.environ.setdefault(_NO_REPORTS, "0")  # read when a cluster is started
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise EngineUnavailableError(
            f"executor ray: not available: {error}; run pip install 'featcache[ray]'"
        ) from None


@contextmanager
def connected(address: str | None) -> Iterator[Any]:
    """Yield Ray, connected to a cluster, which is started here where there is none.

    A connection that the process has already is used, and left as it is.
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
    """Check in seconds what takes Ray minutes."""
    if address is None or address in ("auto", "local"):
        return
    if "://" in address:
        raise ValueError("an address of Ray Client; run this on a machine of the cluster instead")
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError("no address of the form host:port")
    socket.create_connection((host.strip("[]"), int(port)), timeout=_REACHABLE_S).close()


def reason(error: BaseException) -> str:
    """Return the first line of one of Ray's errors, without its advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = lines[0] if lines else type(error).__name__
    return first[:200].rstrip(" .:")


def shape_of_workers(
    nodes: Sequence[dict[str, Any]], wanted: int | None, on_gpu: bool
) -> tuple[int, int]:
    """Return how many workers a cluster holds, at least 1, and how many cores each has.

    ``nodes`` is what ``ray.nodes()`` returns; by default there is one worker per machine, or per
    GPU where each takes one.
    """
    resources = [node["Resources"] for node in nodes if node["Alive"]]
    cores = [int(one.get("CPU", 0)) for one in resources]
    # Without GPUs, cores alone say how many fit.
    gpus = [int(one.get("GPU" if on_gpu else "CPU", 0)) for one in resources]

    def fitting(each: int) -> int:
        return sum(min(count // each, gpu) for count, gpu in zip(cores, gpus, strict=True))

    if wanted is None:
        machines = sum(1 for count in cores if count)
        wanted = max(1, fitting(1) if on_gpu else machines)
    for each in range(max(cores, default=1), 0, -1):
        if fitting(each) >= wanted:
            return wanted, each
    return max(1, min(wanted, fitting(1))), 1


@dataclass(frozen=True)
class Order:
    """What every task of a run is given, once per machine: the work, and who may do it."""

    key: str  # of this run
    work: Work
    makers: dict[str, Any]
    cores: int


def _run_tasks(
    ray: Any,
    plan: Plan,
    shards: Sequence[ShardRange],
    workers: int | None,
    keep: Callable[[Shard], None],
    on_note: OnNote,
) -> None:
    """Have every shard made by a task, and keep each as it comes back."""
    work, splits = plan.work, plan.listed()
    on_gpu = work.choice.device == "cuda"
    n_workers, cores = shape_of_workers(ray.nodes(), workers, on_gpu)
    if workers is not None and n_workers < workers:
        on_note(f"{workers} workers were asked for, the cluster has room for {n_workers}")
    order = ray.put(Order(secrets.token_hex(8), work, makers(work.choice, work.weights), cores))
    task = ray.remote(
        num_cpus=cores,
        num_gpus=int(on_gpu),
        max_calls=0,  # a process keeps its engine, on a GPU too
        max_retries=_RETRIES,
        scheduling_strategy="SPREAD",
    )(make_shard)
    queue, running = deque(shards), {}

    def submit() -> None:
        shard = queue.popleft()
        part = splits[shard.role].take(np.arange(shard.start, shard.stop))
        running[task.remote(order, part, shard)] = shard

    try:
        while queue or running:
            while queue and len(running) < n_workers:
                submit()
            ready, _ = ray.wait(list(running), num_returns=1, timeout=_PATIENCE_S)
            if not ready:
                on_note(
                    f"waiting for the cluster: no shard for {_PATIENCE_S:.0f} s; each needs "
                    f"{cores} free cores"
                )
            for ref in ready:
                made, notes = _answer(ray, ref, running.pop(ref))
                if queue:
                    submit()  # first of all, so that no worker waits for the disk
                for note in notes:
                    on_note(note)
                keep(made)
    finally:
        for ref in running:
            with suppress(ray.exceptions.RayError, RuntimeError, ValueError):
                ray.cancel(ref, force=True)
        if running:
            ray.wait(list(running), num_returns=len(running), timeout=10)


def _answer(ray: Any, ref: Any, place: ShardRange) -> tuple[Shard, list[str]]:
    """Return what a task made, or raise what went wrong, as an error of featcache."""
    try:
        answer = ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, ImportError) or "failed to import" in str(error):
            raise EngineUnavailableError(
                f"executor ray: expected workers that start, found one that did not: "
                f"{_last_error(error)}; featcache must be installed on every machine"
            ) from None
        raise cause from error
    except ray.exceptions.RayError as error:
        raise FeatcacheError(
            f"{place}: expected a worker that makes this shard, lost {_RETRIES + 1} that tried: "
            f"{reason(error)}; its images may take more than the memory: try a smaller "
            "--batch-size, or fewer --workers"
        ) from None
    if isinstance(answer, FeatcacheError):
        raise answer
    return answer


def _last_error(error: Exception) -> str:
    """Return the last line of a traceback, or else the first line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if "Error: " in line]
    return (named or [reason(error)])[-1][:300]


def makers(choice: EngineChoice, weights: Weights) -> dict[str, Any]:
    """Return what must be the same on every machine, so that all make the same bytes."""
    return {
        **computed_by(choice, weights),
        "featcache": __version__,
        "numpy": np.__version__,
        "processor": platform.machine(),
    }


_engines: dict[str, Engine] = {}  # of this process, by the key of the run


def make_shard(
    order: Order, part: Split, place: ShardRange
) -> tuple[Shard, list[str]] | FeatcacheError:
    """Make a shard of these images, on a worker of the cluster.

    Errors of featcache's own are returned, not raised: Ray would wrap them.
    """
    os.environ[THREADS_VARIABLE] = str(order.cores)
    notes: list[str] = []
    try:
        if order.key not in _engines:
            _engines.clear()
            _engines[order.key] = _build(order)
        here = ShardRange(place.role, 0, len(part))
        engine = _engines[order.key]
        (made,) = extract_shards(
            part, order.work, lambda: engine, [here], lambda *_: silent(_), notes.append
        )
    except FeatcacheError as error:
        return error
    return made.moved(place), notes


def _build(order: Order) -> Engine:
    """Build the engine of the driver, and refuse another engine or other versions."""
    host, work = socket.gethostname(), order.work
    try:
        choice = choose_engine(work.choice.name, work.choice.device, work.choice.precision)
        choice = replace(choice, calibration=work.choice.calibration)
        own = makers(choice, work.weights)
        differing = [
            f"{name}: expected {value!r}, found {own.get(name)!r}"
            for name, value in order.makers.items()
            if own.get(name) != value
        ]
        if differing:
            raise EngineUnavailableError(
                f"expected what the driver has, found another {'; '.join(differing)}; install the "
                "same packages on every machine"
            )
        return build_engine(choice, work.weights, work.options.cuts, n_images=work.n_passes)
    except FeatcacheError as error:
        raise type(error)(f"worker on {host}: {error}") from None
