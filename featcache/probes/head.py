"""A linear head as a file: safetensors with everything needed to use it again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ShapeMismatchError, WeightsError
from ..files import write_atomically

__all__ = ["Head", "load_head", "save_head"]

_KEY = "featcache.head"


@dataclass(frozen=True)
class Head:
    """Class scores from features: ``features @ weight.T + bias``.

    Parameters
    ----------
    weight : numpy.ndarray
        float32 (K, D).
    bias : numpy.ndarray
        float32 (K,).
    class_names : tuple of str
        K names, in label order.
    fingerprint : str
        Of the cache that it was trained on: it suits features made the same way.
    """

    weight: np.ndarray
    bias: np.ndarray
    class_names: tuple[str, ...]
    fingerprint: str

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Return the class of each feature: int64 (N,) of float32 (N, D).

        Raises
        ------
        ShapeMismatchError
            Features of another length than D.
        """
        if features.ndim != 2 or features.shape[1] != self.weight.shape[1]:
            raise ShapeMismatchError(
                f"features: expected (N, {self.weight.shape[1]}), found {features.shape}; this "
                "head belongs to another backbone"
            )
        classes: np.ndarray = (features @ self.weight.T + self.bias).argmax(axis=1)
        return classes


def save_head(path: Path, head: Head, provenance: Mapping[str, Any]) -> None:
    """Write a head, with a JSON account of how it was trained.

    Raises
    ------
    OutputError
        The file cannot be written.
    """
    from safetensors.numpy import save

    facts = {
        **provenance,
        "class_names": list(head.class_names),
        "fingerprint": head.fingerprint,
    }
    data = save({"weight": head.weight, "bias": head.bias}, {_KEY: json.dumps(facts)})
    write_atomically(path, data)


def load_head(path: str | Path) -> Head:
    """Read a head that `save_head` wrote.

    Raises
    ------
    WeightsError
        No such file, or not a head.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="numpy") as file:
            facts = json.loads((file.metadata() or {})[_KEY])
            return Head(
                file.get_tensor("weight"),
                file.get_tensor("bias"),
                tuple(facts["class_names"]),
                facts["fingerprint"],
            )
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise WeightsError(
            f"{path}: expected a head that featcache probe --save-head wrote, found: {error}"
        ) from None
