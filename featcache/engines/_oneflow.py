"""OneFlow: the reference engine, and what the trainer needs of the framework."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..backbone import Backbone, get_backbone
from ..errors import ShapeMismatchError
from ..frameworks import import_flowvision, import_oneflow
from ..preprocess import Preprocess
from ..weights import Weights

__all__ = [
    "OneFlowEngine",
    "build_backbone",
    "load_backbone",
    "state_arrays",
    "to_input",
]


class OneFlowEngine:
    """A frozen backbone in eval mode.

    Parameters
    ----------
    weights : Weights
        The checkpoint; its preprocessing is the input's.
    device : str
        ``"cpu"`` or ``"cuda"``.
    """

    def __init__(self, weights: Weights, device: str) -> None:
        self._flow = import_oneflow()
        self._preprocess = weights.preprocess
        self._device = device
        self._model = build_backbone(get_backbone(weights.backbone))
        load_backbone(self._model, weights.state)
        self._model.to(device).eval()

    def extract(self, images: np.ndarray) -> np.ndarray:
        """Return float32 features (N, D) of uint8 pixels (N, size, size, 3)."""
        with self._flow.no_grad():
            features = self._model(to_input(images, self._preprocess, self._device))
        result: np.ndarray = features.numpy()
        return result


def build_backbone(backbone: Backbone) -> Any:
    """Return flowvision's ResNet with its head replaced by the identity: (N, D) out."""
    import_oneflow()
    model = getattr(import_flowvision().models, backbone.name)()
    model.fc = import_oneflow().nn.Identity()
    return model


def load_backbone(model: Any, state: Mapping[str, np.ndarray]) -> None:
    """Copy a checkpoint's tensors, its head left out, into a model of `build_backbone`."""
    model.load_state_dict({key: value for key, value in state.items() if not key.startswith("fc.")})


def state_arrays(model: Any) -> dict[str, np.ndarray]:
    """Return name -> NumPy copy of every parameter and buffer."""
    return {key: np.array(value.numpy()) for key, value in model.state_dict().items()}


def to_input(images: np.ndarray, preprocess: Preprocess, device: str) -> Any:
    """Turn pixels into the backbone's input: normalised float32 (N, 3, size, size).

    Parameters
    ----------
    images : numpy.ndarray
        uint8 (N, size, size, 3), any strides.

    Raises
    ------
    ShapeMismatchError
        Another dtype or size than the preprocessing's.
    """
    size = preprocess.size
    if images.dtype != np.uint8 or images.shape[1:] != (size, size, 3) or not len(images):
        raise ShapeMismatchError(
            f"images: expected uint8 (N >= 1, {size}, {size}, 3), found {images.dtype} "
            f"{images.shape}"
        )
    flow = import_oneflow()
    planes = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    pixels = flow.from_numpy(planes).to(device).to(flow.float32) / 255.0
    mean = flow.tensor(preprocess.mean, dtype=flow.float32, device=device).reshape(1, 3, 1, 1)
    std = flow.tensor(preprocess.std, dtype=flow.float32, device=device).reshape(1, 3, 1, 1)
    return (pixels - mean) / std
