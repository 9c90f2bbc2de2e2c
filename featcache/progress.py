"""What long work says about itself while it runs.

The library never prints. Work that takes longer than a moment takes an
``on_progress`` callable and hands it a `Progress` now and then; the command
line turns these into bars, a notebook into whatever it likes.
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
        What is being done, for a person: ``"train images"``.
    done : int
        Units finished since the stage began.
    total : int or None
        Units in the stage; None where nobody knows.
    unit : str
        ``"img"``, ``"B"``, ``"step"``.
    note : str
        A short fact of the moment, such as the running loss.
    """

    stage: str
    done: int
    total: int | None
    unit: str = "img"
    note: str = ""


OnProgress = Callable[[Progress], None]
OnNote = Callable[[str], None]  # hears, in a sentence each, of what a person should know


def silent(_: object) -> None:
    """Say nothing: the default everywhere."""
