"""PyTorch's input: pixels, enlarged and normalised on the device that uses them."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from ..frameworks import import_torch
from ..preprocess import WEIGHT_BITS, Preprocess, check_pixels, resample_taps

torch = import_torch()


def to_input(images: np.ndarray, preprocess: Preprocess, device: str) -> Any:
    """Turn pixels into the backbone's input: normalised float32 (N, 3, size, size)."""
    check_pixels(images, preprocess)
    return normalised(torch.from_numpy(np.array(images, order="C")).to(device), preprocess)


def normalised(pixels: Any, preprocess: Preprocess) -> Any:
    """Enlarge and normalise a uint8 tensor (N, s, s, 3), as `to_input` does, on its device."""
    return _normaliser(preprocess, str(pixels.device))(pixels)


class Normaliser:
    """Enlarges and normalises uint8 pixels on a device.

    Rows of pixels stay in one piece, (N, H, W * 3), until the last step: vectors of 3 would
    waste a processor (58 us where they take 303, at 224 pixels on a Zen 4 core).
    """

    def __init__(self, preprocess: Preprocess, device: str) -> None:
        self._preprocess = preprocess
        self._size = preprocess.size
        self._device = device
        self._shift = self._row(np.array(preprocess.mean) * 255)
        self._scale = self._row(1 / (np.array(preprocess.std) * 255))
        self._taps: dict[int, tuple[Any, ...]] = {}

    def __call__(self, pixels: Any) -> Any:
        """Return float32 (N, 3, size, size), channels last, of uint8 (N, s, s, 3)."""
        n, side = pixels.shape[:2]
        rows = pixels.reshape(n, side, side * 3)
        if side < self._size:
            rows = self._upscaled(rows, side)
        rows = rows.to(torch.float32).sub_(self._shift).mul_(self._scale)
        return rows.reshape(n, self._size, self._size, 3).permute(0, 3, 1, 2)

    def _upscaled(self, rows: Any, side: int) -> Any:
        """Enlarge uint8 (N, s, s * 3) as `featcache.preprocess.upscale` does, exactly, in int32."""
        if side not in self._taps:
            self._taps[side] = self._make_taps(side)
        rows = rows.to(torch.int32)
        for axis, index, weights in self._taps[side]:
            total = rows.index_select(axis, index[0]).mul_(weights[0])
            for where, weight in zip(index[1:], weights[1:], strict=True):
                total.add_(rows.index_select(axis, where).mul_(weight))
            rows = total.add_(1 << WEIGHT_BITS >> 1).bitwise_right_shift_(WEIGHT_BITS)
            if len(index) > 2:  # a blend of two pixels lies between them; other filters overshoot
                rows.clamp_(0, 255)
        return rows

    def _make_taps(self, side: int) -> tuple[Any, ...]:
        """Return axis, indices and weights by tap of the two passes, along the rows first."""
        index, weights = (array.T for array in resample_taps(side, self._preprocess))
        channel = np.arange(3, dtype=np.int32)
        along = (index[:, :, None] * 3 + channel).reshape(len(index), -1)
        passes = (
            (2, along, np.repeat(weights, 3, axis=1)),
            (1, np.ascontiguousarray(index), np.ascontiguousarray(weights[:, :, None])),
        )
        with torch.inference_mode(False):  # they are kept, and the trainer's mode is another
            return tuple(
                (axis, *(torch.tensor(array, device=self._device) for array in arrays))
                for axis, *arrays in passes
            )

    def _row(self, values: np.ndarray) -> Any:
        row = np.tile(values.astype(np.float32), self._size)
        with torch.inference_mode(False):
            return torch.tensor(row, device=self._device)


_normaliser = lru_cache(maxsize=4)(Normaliser)
