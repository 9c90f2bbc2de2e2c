"""Which of several processes this is, where a launcher started more than one."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import PurePath

__all__ = ["LAUNCH_VARIABLES", "Launch", "launched"]

# What both launchers tell their processes, and what OneFlow and PyTorch read.
LAUNCH_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK", "LOCAL_RANK")

_LAUNCHERS = {"torch": "torchrun", "oneflow": "oneflow.distributed.launch"}


@dataclass(frozen=True)
class Launch:
    """A place among processes that were started together.

    Parameters
    ----------
    rank : int
        From 0; in all machines together.
    size : int
        How many processes there are, at least 2.
    local_rank : int
        From 0, on this machine.
    address : str
        The machine of rank 0.
    engine : str or None
        ``"torch"`` or ``"oneflow"``: whose launcher it was; None where that is not known.
    """

    rank: int
    size: int
    local_rank: int
    address: str
    engine: str | None

    @property
    def launcher(self) -> str:
        """The launcher's name, for a person."""
        return _LAUNCHERS.get(self.engine or "", "a launcher")


def launched() -> Launch | None:
    """Return this process's place among those of its launcher; None where it is alone."""
    found = {name: os.environ.get(name, "") for name in LAUNCH_VARIABLES}
    rank, size, local = (found[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size) > 1):
        return None
    if not (found["MASTER_ADDR"] and found["MASTER_PORT"]):
        return None
    local_rank = int(local) if local.isdecimal() else 0
    return Launch(int(rank), int(size), local_rank, found["MASTER_ADDR"], _engine(local_rank))


def _engine(local_rank: int) -> str | None:
    """Tell the launchers apart by what each of them alone sets."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "torch"
    # A folder per process for the log of OneFlow's C++ code, which is made only on demand.
    log_folder = PurePath(os.environ.get("GLOG_log_dir", "")).name  # noqa: SIM112
    return "oneflow" if log_folder == f"local_rank_{local_rank}" else None
