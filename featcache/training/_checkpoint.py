"""The state of a run in one file: safetensors, with an account in JSON; no pickle.

Written whole or not at all, so that the checkpoint before stays where a new one cannot be
written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import FeatcacheError, WeightsError
from ..files import split_safetensors, write_atomically

__all__ = ["load_checkpoint", "save_checkpoint"]

_KEY = "featcache.checkpoint"
_VERSION = 1


def save_checkpoint(path: Path, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
    """Write arrays and what they mean.

    Parameters
    ----------
    path : Path
        The file.
    arrays : mapping of str to numpy.ndarray
        float32 and int64 of any shape.
    facts : mapping of str to Any
        JSON types; floats come back to the bit.

    Raises
    ------
    FeatcacheError
        A number is NaN or infinite: such a state is not one to go on from.
    OutputError
        The file cannot be written; the one before is untouched.
    """
    from safetensors.numpy import save

    for name, value in arrays.items():
        if not np.isfinite(value).all():
            raise FeatcacheError(f"expected finite numbers, found NaN or infinity in {name}")
    text = json.dumps({**facts, "version": _VERSION})
    ready = {name: np.asarray(value, order="C") for name, value in arrays.items()}
    write_atomically(path, save(ready, {_KEY: text}))


def load_checkpoint(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read what `save_checkpoint` wrote.

    Raises
    ------
    WeightsError
        No such file, not a checkpoint, or a damaged one.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        data = path.read_bytes()
        arrays = dict(load(data))
        header, _ = split_safetensors(data)
        facts = json.loads((header.get("__metadata__") or {})[_KEY])
        if not isinstance(facts, dict) or facts.get("version") != _VERSION:
            raise ValueError(f"another version than {_VERSION}")
    except KeyError:
        found = f"a safetensors file without {_KEY} in its metadata"
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        found = getattr(error, "strerror", None) or str(error)
    else:
        return arrays, facts
    raise WeightsError(
        f"{path}: expected the checkpoint of a run of featcache finetune, found: {found:.200}; "
        "name another --resume, or begin anew without it"
    )
