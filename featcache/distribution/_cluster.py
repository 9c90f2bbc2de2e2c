"""Ray, imported when it is wanted, and a connection to a cluster that says nothing."""

from __future__ import annotations

import importlib
import logging
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ..errors import EngineUnavailableError

__all__ = ["connected", "import_ray", "reason", "shape_of_workers"]

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
