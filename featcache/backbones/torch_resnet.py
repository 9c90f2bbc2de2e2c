"""The ResNets in PyTorch, for the engine and for the trainer.

He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, Table 1,
with torchvision's names and with its later place for a bottleneck's stride, the 3x3
convolution. Importing this module imports PyTorch.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from ..frameworks import import_torch
from ..preprocess import WEIGHT_BITS, Preprocess, upscale_taps
from .architectures import Backbone
from .images import check_images

torch = import_torch()
nn: Any = torch.nn

_STAGE_WIDTHS = (64, 128, 256, 512)


class Block(nn.Module):
    """Two 3x3 convolutions, or 1x1, 3x3, 1x1, and what came in added again.

    Parameters
    ----------
    into, width, out : int
        Channels of the input, between the convolutions, and of the output.
    stride : int
        Of the first 3x3 convolution, and of the shortcut.
    bottleneck : bool
        Whether it is the second kind.
    """

    def __init__(self, into: int, width: int, out: int, stride: int, *, bottleneck: bool) -> None:
        super().__init__()
        self.bottleneck = bottleneck
        first = (1, 1) if bottleneck else (3, stride)
        self.conv1 = _convolution(into, width, *first)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = _convolution(
            width, width if bottleneck else out, 3, stride if bottleneck else 1
        )
        self.bn2 = nn.BatchNorm2d(width if bottleneck else out)
        if bottleneck:
            self.conv3 = _convolution(width, out, 1, 1)
            self.bn3 = nn.BatchNorm2d(out)
        self.downsample: Any = None
        if stride > 1 or into != out:
            self.downsample = nn.Sequential(_convolution(into, out, 1, stride), nn.BatchNorm2d(out))

    def forward(self, x: Any) -> Any:
        """Return (N, out, H', W') of (N, into, H, W)."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if self.bottleneck:
            x = self.bn3(self.conv3(self.relu(x)))
        return self.relu(x + shortcut)


class ResNet(nn.Module):
    """A ResNet whose head is the identity: float32 (N, 3, s, s) -> (N, D).

    Parameters
    ----------
    backbone : Backbone
        The architecture.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        into = 64
        for number, (width, count) in enumerate(
            zip(_STAGE_WIDTHS, backbone.blocks, strict=True), start=1
        ):
            out = width * (4 if backbone.bottleneck else 1)
            blocks = []
            for index in range(count):
                stride = 2 if number > 1 and index == 0 else 1
                blocks.append(Block(into, width, out, stride, bottleneck=backbone.bottleneck))
                into = out
            setattr(self, f"layer{number}", nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Identity()

    def forward(self, x: Any) -> Any:
        """Return the pooled features."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def build_backbone(backbone: Backbone) -> Any:
    """Return a ResNet with its head replaced by the identity: (N, D) out.

    Its convolutions are random and of no account, until `load_backbone`.
    """
    return ResNet(backbone)


def load_backbone(network: Any, state: Mapping[str, np.ndarray]) -> None:
    """Copy a checkpoint's tensors, its head left out, into a network of `build_backbone`."""
    network.load_state_dict(
        {key: torch.tensor(value) for key, value in state.items() if not key.startswith("fc.")}
    )


def state_arrays(network: Any) -> dict[str, np.ndarray]:
    """Return name -> NumPy copy of every parameter and buffer, on the CPU and C-contiguous."""
    return {
        key: np.array(value.detach().cpu().numpy(), order="C")
        for key, value in network.state_dict().items()
    }


def to_input(images: np.ndarray, preprocess: Preprocess, device: str) -> Any:
    """Turn pixels into the backbone's input: normalised float32 (N, 3, size, size).

    Parameters
    ----------
    images : numpy.ndarray
        uint8 (N, s, s, 3) with s up to size, any strides. Smaller ones are enlarged on
        the device.
    preprocess : Preprocess
        Size, mean and standard deviation.
    device : str
        Torch's name of it.

    Returns
    -------
    torch.Tensor
        In memory as (N, size, size, 3): torch's ``channels_last``.

    Raises
    ------
    ShapeMismatchError
        Another dtype, or another shape.
    """
    check_images(images, preprocess)
    return normalised(torch.from_numpy(np.array(images, order="C")).to(device), preprocess)


def normalised(pixels: Any, preprocess: Preprocess) -> Any:
    """Enlarge and normalise a uint8 tensor (N, s, s, 3), as `to_input` does, on its device."""
    return _normaliser(preprocess, str(pixels.device))(pixels)


class Normaliser:
    """Enlarges and normalises uint8 pixels on a device.

    Rows of pixels stay in one piece, (N, H, W * 3), until the last step: vectors of 3 would
    waste a processor (58 us where they take 303, at 224 pixels on a Zen 4 core).

    Parameters
    ----------
    preprocess : Preprocess
        Size, mean and standard deviation.
    device : str
        Torch's name of it.
    """

    def __init__(self, preprocess: Preprocess, device: str) -> None:
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
        for axis, first, second, weight, other in self._taps[side]:
            total = rows.index_select(axis, first).mul_(weight)
            total.add_(rows.index_select(axis, second).mul_(other))
            rows = total.add_(1 << WEIGHT_BITS >> 1).bitwise_right_shift_(WEIGHT_BITS)
        return rows

    def _make_taps(self, side: int) -> tuple[Any, ...]:
        """Return axis, indices and weights of the two passes, along the rows first."""
        first, second, weights = upscale_taps(side, self._size)
        channel = np.arange(3, dtype=np.int32)
        along = (
            *((index[:, None] * 3 + channel).ravel() for index in (first, second)),
            *np.repeat(weights, 3, axis=0).T,
        )
        down = (first, second, *weights.T[:, :, None])
        with torch.inference_mode(False):  # they are kept, and the trainer's mode is another
            return tuple(
                (axis, *(torch.tensor(array, device=self._device) for array in arrays))
                for axis, arrays in ((2, along), (1, down))
            )

    def _row(self, values: np.ndarray) -> Any:
        row = np.tile(values.astype(np.float32), self._size)
        with torch.inference_mode(False):
            return torch.tensor(row, device=self._device)


_normaliser = lru_cache(maxsize=4)(Normaliser)


def _convolution(into: int, out: int, kernel: int, stride: int) -> Any:
    return nn.Conv2d(into, out, kernel, stride, kernel // 2, bias=False)
