"""The command that asks for an extraction, as one would type it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..datasets import Dataset
from ..remote import shown

__all__ = ["command_line"]


def command_line(
    dataset: str | Path | Dataset, options: Mapping[str, Any], defaults: Mapping[str, Any]
) -> str:
    """Return the command that asks for this.

    Parameters
    ----------
    dataset : str, Path or Dataset
        The last cannot be typed, and stands as ``DATASET``.
    options : mapping
        Of `featcache.extract`, by name.
    defaults : mapping
        What need not be typed.
    """
    words = ["featcache", "extract", "DATASET" if isinstance(dataset, Dataset) else shown(dataset)]
    for name, value in options.items():
        if value == defaults[name]:
            continue
        if name == "pack":
            words += [] if value else ["--shards"]
        else:
            text = shown(value) if isinstance(value, (str, Path)) else value
            text = text if isinstance(text, (str, int)) else ",".join(text)
            words += [f"--{name.replace('_', '-')}", str(text)]
    return shlex.join(words)
