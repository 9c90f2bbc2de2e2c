"""The ResNets, written once for PyTorch and OneFlow, whose layers have the same names.

He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, Table 1, with
torchvision's names and its later place for a bottleneck's stride, the 3x3 convolution.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any

from .architectures import STAGE_WIDTHS, Backbone


def build_resnet(framework: ModuleType, backbone: Backbone) -> Any:
    """Return a module, float32 (N, 3, s, s) -> (N, D), whose head ``fc`` is the identity.

    Its convolutions hold arbitrary numbers until a checkpoint is loaded.
    """
    return _resnet_class(framework)(backbone)


@cache
def _resnet_class(framework: ModuleType) -> Any:
    """Return the module's class; a framework is known only once it is imported."""
    nn: Any = framework.nn
    flatten: Any = framework.flatten
    in_place = framework.__name__ == "torch"  # saves memory in training

    def convolution(into: int, out: int, kernel: int, stride: int) -> Any:
        return nn.Conv2d(into, out, kernel, stride, kernel // 2, bias=False)

    class Block(nn.Module):
        """Two 3x3 convolutions, or 1x1, 3x3, 1x1, to which the input is added again."""

        def __init__(self, into: int, width: int, stride: int, *, bottleneck: bool) -> None:
            super().__init__()
            out = width * (4 if bottleneck else 1)
            self.bottleneck = bottleneck
            self.conv1 = convolution(into, width, *((1, 1) if bottleneck else (3, stride)))
            self.bn1 = nn.BatchNorm2d(width)
            self.relu = nn.ReLU(inplace=in_place)
            self.conv2 = convolution(width, width, 3, stride if bottleneck else 1)
            self.bn2 = nn.BatchNorm2d(width)
            if bottleneck:
                self.conv3 = convolution(width, out, 1, 1)
                self.bn3 = nn.BatchNorm2d(out)
            self.downsample: Any = None
            if stride > 1 or into != out:
                self.downsample = nn.Sequential(
                    convolution(into, out, 1, stride), nn.BatchNorm2d(out)
                )

        def forward(self, x: Any) -> Any:
            shortcut = x if self.downsample is None else self.downsample(x)
            x = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
            if self.bottleneck:
                x = self.bn3(self.conv3(self.relu(x)))
            return self.relu(x + shortcut)

    class ResNet(nn.Module):
        def __init__(self, backbone: Backbone) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
            self.bn1 = nn.BatchNorm2d(64)
            self.relu = nn.ReLU(inplace=in_place)
            self.maxpool = nn.MaxPool2d(3, 2, 1)
            into = 64
            bottleneck = backbone.bottleneck
            for number, (width, count) in enumerate(
                zip(STAGE_WIDTHS, backbone.blocks, strict=True), start=1
            ):
                blocks = []
                for index in range(count):
                    stride = 2 if number > 1 and index == 0 else 1
                    blocks.append(Block(into, width, stride, bottleneck=bottleneck))
                    into = width * (4 if bottleneck else 1)
                setattr(self, f"layer{number}", nn.Sequential(*blocks))
            self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
            self.fc = nn.Identity()

        def forward(self, x: Any) -> Any:
            x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
            x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
            return self.fc(flatten(self.avgpool(x), 1))

    return ResNet
