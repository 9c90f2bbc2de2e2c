"""Engines run the backbone: uint8 pixels in, float32 features out.

NumPy crosses the border, tensors never do. OneFlow is the reference; any other
engine states its tolerance against it in a test.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from ..progress import OnNote, silent
from .architectures import check_cuts
from .choice import EngineChoice
from .weights import Weights


class Engine(Protocol):
    """What runs a backbone, for one caller at a time."""

    @property
    def batch_size(self) -> int:
        """Images per call that keep the device busy; any other number works too."""

    def extract(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Return the features of a batch at every cut, from one pass.

        Parameters
        ----------
        images : numpy.ndarray
            uint8 (N, s, s, 3), N >= 1, any strides: canonical pixels (s equal to the
            preprocessing's size), or smaller ones that the engine enlarges as
            `featcache.preprocess.upscale` does (`Preprocess.compact` makes both).

        Returns
        -------
        dict
            Cut -> float32 array: (N, D) for ``"avgpool"``, (N, C, H, W) for a stage.
            The arrays are the caller's own. An image gives the same bytes in every call,
            whichever images stand beside it.

        Raises
        ------
        ShapeMismatchError
            Another dtype or shape.
        """


def build_engine(
    choice: EngineChoice,
    weights: Weights,
    cuts: Sequence[str] = ("avgpool",),
    *,
    n_images: int = 0,
    on_note: OnNote = silent,
) -> Engine:
    """Load the engine that was chosen, with these weights."""
    checked = check_cuts(cuts)
    if choice.name == "openvino":
        from .openvino_engine import OpenVinoEngine

        return OpenVinoEngine(weights, checked, choice.precision)
    if choice.name == "torch":
        from .torch_engine import TorchEngine

        return TorchEngine(
            weights, checked, choice.device, choice.precision, n_images=n_images, on_note=on_note
        )
    from .oneflow_engine import OneFlowEngine

    return OneFlowEngine(weights, checked, choice.device, choice.precision)


def computed_by(choice: EngineChoice, weights: Weights) -> dict[str, Any]:
    """Return the fields of a cache's fingerprint that say what computes its features."""
    return {
        "backbone": weights.backbone,
        "device": choice.device,
        "engine": choice.name,
        "engine_version": choice.version,
        "precision": choice.precision,
        "preprocess": weights.preprocess.as_dict(),
        "weights_sha256": weights.sha256,
    }
