"""Features in the containers of other packages, where these are installed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import EngineUnavailableError
from ._format import label_names

__all__ = ["as_frame", "as_tensors"]


def as_frame(
    features: np.ndarray, labels: np.ndarray, ids: Sequence[str], class_names: Sequence[str]
) -> Any:
    """Return a `pandas.DataFrame`: ids as the index, label, class, and f0 to f(D-1).

    Raises
    ------
    EngineUnavailableError
        pandas is not installed.
    """
    try:
        import pandas as pd
    except ImportError as error:
        raise EngineUnavailableError(
            f"to_pandas: expected the package pandas, found: {error}; type: pip install "
            "'featcache[pandas]'"
        ) from None
    flat = np.asarray(features).reshape(len(labels), int(np.prod(features.shape[1:])))
    index = pd.Index(list(ids), name="id", dtype=object)
    columns = [f"f{number}" for number in range(flat.shape[1])]
    frame = pd.DataFrame(flat, index=index, columns=columns, copy=True)
    names = np.array(label_names(class_names), dtype=object)
    frame.insert(0, "label", labels)
    frame.insert(1, "class", names[labels])
    return frame


def as_tensors(features: np.ndarray, labels: np.ndarray) -> tuple[Any, Any]:
    """Return features and labels as torch's tensors, which share no memory with the cache.

    Raises
    ------
    EngineUnavailableError
        torch is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise EngineUnavailableError(
            f"to_torch: expected the package torch, found: {error}; see "
            "https://pytorch.org/get-started/locally"
        ) from None
    # A copy: torch has no tensors that cannot be written to, and a cache's arrays are such.
    return torch.from_numpy(np.array(features)), torch.from_numpy(np.array(labels))
