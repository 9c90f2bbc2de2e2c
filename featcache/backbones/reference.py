"""The ResNets in NumPy: slow and plain, to check an engine on one image before it runs.

An engine may hide what is wrong: OpenVINO's ReLU turns NaN into 0, so that a checkpoint with
weights of 1e30 gives finite features that mean nothing.

He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, Table 1; batch
normalisation as in evaluation, with epsilon 1e-5.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..preprocess import Preprocess
from .architectures import STAGE_WIDTHS, Backbone

_EPSILON = 1e-5


def resnet_features(
    state: Mapping[str, np.ndarray], backbone: Backbone, preprocess: Preprocess, image: np.ndarray
) -> dict[str, np.ndarray]:
    """Return the features of one image at every cut, float32 (1, …); they may not be finite.

    ``image`` is uint8 (s, s, 3), s the preprocessing's size.
    """

    def convolved(x: np.ndarray, name: str, stride: int) -> np.ndarray:
        weight = state[f"{name}.weight"]  # (outputs, inputs, k, k)
        kernel = weight.shape[2]
        windows = _windows(x, kernel, stride, kernel // 2, 0)  # (inputs, h, w, k, k)
        return np.tensordot(weight, windows, ([1, 2, 3], [0, 3, 4]))

    def normalised(x: np.ndarray, name: str) -> np.ndarray:
        gain, shift, mean, variance = (
            state[f"{name}.{key}"][:, None, None]
            for key in ("weight", "bias", "running_mean", "running_var")
        )
        result: np.ndarray = (x - mean) / np.sqrt(variance + _EPSILON) * gain + shift
        return result

    def block(x: np.ndarray, name: str, stride: int) -> np.ndarray:
        shortcut = x
        if f"{name}.downsample.0.weight" in state:
            shortcut = normalised(
                convolved(x, f"{name}.downsample.0", stride), f"{name}.downsample.1"
            )
        # The stride is the second convolution's in a bottleneck, the first one's otherwise.
        strides = (1, stride, 1) if backbone.bottleneck else (stride, 1)
        for number, step in enumerate(strides, start=1):
            x = normalised(convolved(x, f"{name}.conv{number}", step), f"{name}.bn{number}")
            if number < len(strides):
                x = np.maximum(x, 0)
        return np.maximum(x + shortcut, 0)

    with np.errstate(all="ignore"):  # whoever asks looks for NaN and infinity in the result
        x = image.transpose(2, 0, 1).astype(np.float32) / 255
        mean, std = (
            np.array(three, np.float32)[:, None, None]
            for three in (preprocess.mean, preprocess.std)
        )
        x = np.maximum(normalised(convolved((x - mean) / std, "conv1", 2), "bn1"), 0)
        x = _windows(x, 3, 2, 1, -np.inf).max(axis=(3, 4))
        found = {}
        for stage, count in enumerate(backbone.blocks, start=1):
            for index in range(count):
                stride = 2 if stage > 1 and index == 0 else 1
                x = block(x, f"layer{stage}.{index}", stride)
            found[f"layer{stage}"] = x[None]
        assert len(found) == len(STAGE_WIDTHS)
        return {**found, "avgpool": x.mean(axis=(1, 2))[None]}


def _windows(x: np.ndarray, kernel: int, stride: int, padding: int, fill: float) -> np.ndarray:
    """Return the windows (C, h, w, k, k) of a map (C, H, W)."""
    around = ((0, 0), (padding, padding), (padding, padding))
    padded = np.pad(x, around, constant_values=fill)
    windows: np.ndarray = np.lib.stride_tricks.sliding_window_view(
        padded,
        (kernel, kernel),
        axis=(1, 2),  # type: ignore[call-overload]
    )
    return windows[:, ::stride, ::stride]
