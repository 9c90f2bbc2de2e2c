"""Becoming one of the processes that a launcher started, for as long as a run takes."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from ..cores import THREADS_VARIABLE, usable_cores
from ..errors import EngineUnavailableError, RankError
from ..frameworks import torch_status
from ..process import Launch, launched, process_environment
from .framework import Framework, get_framework
from .ranks import JoinedRanks, Ranks, open_watch


@contextmanager
def joined(engine: str) -> Iterator[tuple[Ranks, str]]:
    """Join the processes of the launcher that started this one, if one did.

    Each then takes its share of the cores, hears of the others' ends, and leaves in good order
    or tells them that it does not.

    Parameters
    ----------
    engine : str
        As `featcache.finetune` takes it.

    Yields
    ------
    ranks : Ranks
        The processes.
    engine : str
        What trains: the launcher's own framework for ``"auto"``.

    Raises
    ------
    EngineUnavailableError
        The launcher is another framework's, or the framework cannot be imported.
    RankError
        The processes cannot reach each other.
    """
    launch = launched()
    if launch is None:
        yield Ranks(), engine
        return
    engine = _launched_engine(launch, engine)
    with _sigterm_as_ctrl_c():
        framework = get_framework(engine, join=True)
        ranks = _ranks(framework, launch)
        ranks.watch = watch = open_watch(launch.rank, launch.size, launch.address, ranks.from_first)
        with process_environment({THREADS_VARIABLE: str(_own_cores(ranks))}):
            try:
                yield ranks, engine
            except BaseException as error:
                watch.close(failed=not watch.is_out)
                if watch.is_lost and isinstance(error, KeyboardInterrupt):
                    raise watch.cause(None) from None  # the launcher stops those that are left
                raise
            watch.close(failed=False)


def check_alike(ranks: Ranks, identity: Mapping[str, Any]) -> None:
    """Make sure that every process is about to do the same run.

    Raises
    ------
    RankError
        One is not; the message has the fields.
    """
    mine = json.loads(json.dumps(identity))
    first = json.loads(ranks.from_first(json.dumps(identity).encode()))

    def check() -> None:
        differing = [
            f"{name}: rank 0 {first.get(name)!r:.80}, here {mine.get(name)!r:.80}"
            for name in sorted({*first, *mine})
            if first.get(name) != mine.get(name)
        ]
        if differing:
            raise RankError(
                f"expected the same run as rank 0, found another: {'; '.join(differing)}; give "
                "every machine the same command, data and weights"
            )

    ranks.agreed(check)


def take_gpu(framework: Framework, device: str) -> None:
    """Let each process of a machine compute on a GPU of its own. Never run: no GPUs were at hand.

    Raises
    ------
    EngineUnavailableError
        There are more processes than GPUs, or they are none that processes can share work on.
    """
    launch = launched()
    if launch is None or device == "cpu":
        return
    if device != "cuda":
        raise EngineUnavailableError(
            f"device {device}: expected cpu or cuda with several processes, found {device}; use "
            "--device cpu, or a single process"
        )
    n_gpus = framework.module.cuda.device_count()
    if launch.local_rank >= n_gpus:
        raise EngineUnavailableError(
            f"device cuda: expected a GPU for each process of a machine, found {n_gpus}; start as "
            "many processes per machine as it has GPUs, or use --device cpu"
        )
    framework.module.cuda.set_device(launch.local_rank)


def _launched_engine(launch: Launch, engine: str) -> str:
    if launch.engine is None:
        if engine != "auto":
            return engine
        return "torch" if torch_status()[0] is not None else "oneflow"
    if engine not in ("auto", launch.engine):
        error = EngineUnavailableError(
            f"engine {engine}: expected {launch.engine}, whose launcher, {launch.launcher}, "
            f"started this process; leave out --engine, or use the launcher of {engine}"
        )
        raise error if launch.rank == 0 else RankError(str(error), is_told=True)
    return launch.engine


def _ranks(framework: Framework, launch: Launch) -> JoinedRanks:
    if framework.name == "oneflow" and framework.module.env.get_world_size() != launch.size:
        raise RankError(
            f"rank {launch.rank} of {launch.size}: expected OneFlow to be imported by this run, "
            "found it imported before, without the other processes; call featcache.finetune first"
        )
    return JoinedRanks(launch.rank, launch.size, framework.module, framework.all_reduce)


def _own_cores(ranks: Ranks) -> int:
    """Return this process's share of the cores that it and others of the run may all use."""
    places = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
    here = f"{socket.gethostname()} {sorted(places)}".encode()
    mine = int.from_bytes(hashlib.sha256(here).digest()[:7], "big")
    keys = np.zeros(ranks.size, np.int64)
    keys[ranks.rank] = mine
    n_sharing = int((ranks.total_array(keys) == mine).sum())
    return max(1, usable_cores() // n_sharing)


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """Take the signal by which launchers stop their processes for Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
