"""The curves of a run as TensorBoard's event files, where its package is installed."""

from __future__ import annotations

import importlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import EngineUnavailableError

__all__ = ["EventLog", "check_tensorboard"]


class EventLog:
    """Scalars by step, in files that ``tensorboard --logdir`` shows.

    Parameters
    ----------
    folder : Path
        Where the event file goes.

    Raises
    ------
    EngineUnavailableError
        The package ``tensorboard`` is not installed.
    """

    def __init__(self, folder: Path) -> None:
        event, summary, writer = _modules()
        self._event, self._summary = event.Event, summary.Summary
        self._writer: Any = writer.EventFileWriter(str(folder))

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Write the values of a step."""
        value = [self._summary.Value(tag=tag, simple_value=one) for tag, one in values.items()]
        summary = self._summary(value=value)
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=summary))

    def close(self) -> None:
        """Write what is still in memory."""
        self._writer.close()


def check_tensorboard() -> None:
    """Find out before the long work whether events can be written."""
    _modules()


def _modules() -> tuple[Any, Any, Any]:
    try:
        return (
            importlib.import_module("tensorboard.compat.proto.event_pb2"),
            importlib.import_module("tensorboard.compat.proto.summary_pb2"),
            importlib.import_module("tensorboard.summary.writer.event_file_writer"),
        )
    except ImportError as error:
        raise EngineUnavailableError(
            f"tensorboard: expected the package tensorboard, found: {error}; run pip install "
            "tensorboard, or leave out --tensorboard (metrics.jsonl has the same numbers)"
        ) from None
