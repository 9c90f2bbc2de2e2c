"""Progress of long work.

The library never prints. Functions that run for long take an ``on_progress`` callable and
call it with a `Progress`; the command line draws bars from these.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """One message: ``done`` of ``total`` units of a stage are finished.

    Parameters
    ----------
    stage : str
        Name of the stage, such as ``"train images"``.
    done : int
        Units finished since the stage started.
    total : int or None
        Units in the stage; None if unknown.
    unit : str
        Unit of ``done`` and ``total``: ``"img"``, ``"B"`` or ``"step"``.
    note : str
        A short fact, such as the running loss.
    """

    stage: str
    done: int
    total: int | None
    unit: str = "img"
    note: str = ""


OnProgress = Callable[[Progress], None]
OnNote = Callable[[str], None]  # receives one-line notes


def silent(_: object) -> None:
    """Do nothing: the default for ``on_progress`` and ``on_note``."""
