"""Commands that a launcher started several times: rank 0 alone speaks for what all meet."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import FeatcacheError, RankError

if TYPE_CHECKING:
    from ..process import Launch


_QUIET = {"-h", "--help", "--version"}


def place() -> Launch | None:
    """Return this process's place among those of a launcher; None where it is alone."""
    if "WORLD_SIZE" not in os.environ:
        return None
    from ..process import launched

    return launched()


def is_first(launch: Launch | None) -> bool:
    """Tell whether this process alone speaks to a person: rank 0, or the only one."""
    return launch is None or launch.rank == 0


def refusal(launch: Launch | None, arguments: Sequence[str]) -> str | None:
    """Say why a command is not begun by several processes, which would all do the same."""
    if launch is None or launch.engine is None or not arguments or _QUIET & {*arguments}:
        return None
    if arguments[0] == "finetune":
        return None
    return (
        f"error: featcache {arguments[0]}: expected one process, found {launch.size}, started by "
        f"{launch.launcher}; several train together in featcache finetune alone: leave out the "
        "launcher"
    )


def spoken(launch: Launch | None, error: FeatcacheError) -> str | None:
    """Return what this process says of an error; None where another one tells it."""
    if launch is None or is_first(launch):
        return f"error: {error}"
    if isinstance(error, RankError) and error.is_told:
        return None
    if isinstance(error, RankError):  # which says itself of whom
        return f"error: {error}"
    return f"error: rank {launch.rank} of {launch.size}: {error}"
