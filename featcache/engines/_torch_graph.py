"""A ResNet as PyTorch runs it for features: BatchNorm folded away, layers joined where that wins.

What is joined was measured on two Zen 4 cores, in images per second, ResNet-18:

===================================  =========  ==========
on the CPU                           64 px f32  64 px bf16
===================================  =========  ==========
layer by layer, as it was trained          520         782
BatchNorm folded, channels last            564         861
oneDNN's joined convolutions               610        1178
``torch.compile``, weights frozen          630        1205
===================================  =========  ==========

So on a processor a convolution, its bias, the shortcut and the ReLU are one call of oneDNN,
the one that ``torch.compile`` would make, without its ten seconds. On a GPU the layers run one
by one, or compiled where many images are to come.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from ..backbone import CUTS, get_backbone
from ..frameworks import import_torch
from ..weights import Weights
from ._torch_network import Normaliser, build_backbone, load_backbone

__all__ = ["Folded", "Forward", "dtype_of", "joins_convolutions"]

torch = import_torch()
nn: Any = torch.nn


class Forward:
    """Uint8 pixels in, features at every cut out, all on one device.

    Parameters
    ----------
    weights : Weights
        The checkpoint; its preprocessing is the input's.
    cuts : tuple of str
        Where features are taken; stages after the last one do not run.
    device, precision : str
        Where, and what the convolutions compute in. Pixels are enlarged and normalised in
        float32, and features pooled in it.
    compiled : bool
        Whether `torch.compile` joins the layers, for one number of images.
    """

    def __init__(
        self,
        weights: Weights,
        cuts: tuple[str, ...],
        device: str,
        precision: str,
        *,
        compiled: bool,
    ) -> None:
        backbone = get_backbone(weights.backbone)
        network = build_backbone(backbone)
        load_backbone(network, weights.state)
        self._dtype = dtype_of(precision)
        joined = device == "cpu" and not compiled and joins_convolutions(self._dtype)
        folded = Folded(network.eval(), cuts, joined=joined).requires_grad_(False)
        folded.to(device, self._dtype, memory_format=torch.channels_last)
        if joined:
            folded.pack()
        self._normalise = Normaliser(weights.preprocess, device)
        self._network = torch.compile(folded, dynamic=False) if compiled else folded

    def __call__(self, pixels: Any) -> list[Any]:
        """Return float32 (N, D) or (N, C, H, W) per cut of uint8 (N, s, s, 3)."""
        results: list[Any] = self._network(self._normalise(pixels).to(self._dtype))
        return results


def dtype_of(precision: str) -> Any:
    """Return torch's name of a precision."""
    return {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}[precision]


@cache
def joins_convolutions(dtype: Any) -> bool:
    """Try whether oneDNN's joined convolution is in this build, and right.

    It is what `torch.compile` calls, but no promise of PyTorch's.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    conv = nn.Conv2d(4, 4, 3, padding=1).to(dtype).requires_grad_(False)
    x = torch.linspace(-1, 1, 512, dtype=dtype).reshape(2, 8, 8, 4).permute(0, 3, 1, 2)
    expected = _separate(x, conv, True, x.clone())
    try:
        _pack(conv)
        found = _joined(x, conv, True, x.clone())
    except (RuntimeError, AttributeError, TypeError):
        return False
    return bool(torch.allclose(found.float(), expected.float(), rtol=0.05, atol=0.05))


class Folded(nn.Module):
    """The network without BatchNorm: normalised pixels in, float32 features at every cut out."""

    def __init__(self, network: Any, cuts: tuple[str, ...], *, joined: bool) -> None:
        super().__init__()
        self._cuts = cuts
        self._convolve = _joined if joined else _separate
        self.stem = _fold(network.conv1, network.bn1)
        deepest = max(CUTS.index(cut) for cut in cuts)
        self.stages = nn.ModuleList(
            nn.ModuleList(_folded_block(block) for block in getattr(network, stage))
            for stage in CUTS[:-1][: deepest + 1]
        )

    def pack(self) -> None:
        """Lay every kernel out as oneDNN's joined convolution wants it."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                _pack(module)

    def forward(self, x: Any) -> list[Any]:
        x = nn.functional.max_pool2d(self._convolve(x, self.stem, True, None), 3, 2, 1)
        taken = {}
        for stage, blocks in zip(CUTS, self.stages, strict=False):
            for block in blocks:
                x = self._block(x, block)
            taken[stage] = x.to(torch.float32)
        if "avgpool" in self._cuts:
            taken["avgpool"] = x.to(torch.float32).mean((2, 3))
        return [taken[cut] for cut in self._cuts]

    def _block(self, x: Any, block: Any) -> Any:
        """Run a block. The shortcut's tensor becomes the result's.

        No cut is lost by that: a stage's first block never has its input as the shortcut,
        layer1's of ResNet-18 and 34 aside, before which there is no cut.
        """
        *first, last = block["convs"]
        shortcut = self._convolve(x, block["down"], False, None) if "down" in block else x
        for conv in first:
            x = self._convolve(x, conv, True, None)
        return self._convolve(x, last, True, shortcut)


def _folded_block(block: Any) -> Any:
    pairs = [(block.conv1, block.bn1), (block.conv2, block.bn2)]
    if block.bottleneck:
        pairs.append((block.conv3, block.bn3))
    parts = {"convs": nn.ModuleList(_fold(*pair) for pair in pairs)}
    if block.downsample is not None:
        parts["down"] = _fold(*block.downsample)
    return nn.ModuleDict(parts)


def _fold(conv: Any, norm: Any) -> Any:
    """Return the convolution with the BatchNorm after it in its kernel and bias."""
    return nn.utils.fuse_conv_bn_eval(conv.double(), norm.double()).float()


def _pack(conv: Any) -> None:
    where = conv.padding, conv.stride, conv.dilation, conv.groups
    packed = torch.ops.mkldnn._reorder_convolution_weight(conv.weight, *where)
    conv.weight = nn.Parameter(packed, requires_grad=False)


def _separate(x: Any, conv: Any, relu: bool, shortcut: Any) -> Any:
    """Convolve, add the shortcut if there is one, and apply ReLU if so asked: layer by layer."""
    x = conv(x)
    if shortcut is not None:
        x = x.add_(shortcut)
    return x.relu_() if relu else x


def _joined(x: Any, conv: Any, relu: bool, shortcut: Any) -> Any:
    """Do the same in one call of oneDNN, in place of the shortcut."""
    where = conv.weight, conv.bias, conv.padding, conv.stride, conv.dilation, conv.groups
    if shortcut is None:
        kind = "relu" if relu else "none"
        return torch.ops.mkldnn._convolution_pointwise(x, *where, kind, [], "")
    add_and_relu: Any = ("add", 1.0, "relu", [], "")
    return torch.ops.mkldnn._convolution_pointwise_.binary(shortcut, x, *where, *add_and_relu)
