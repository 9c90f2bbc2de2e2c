"""The ResNet family: names, feature sizes, and the tensors that a checkpoint must hold.

He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016,
Table 1, in the layout and with the key names of torchvision. Nothing here needs a framework:
a checkpoint is judged by its shapes before any engine is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import RecipeError, WeightsError
from ..options import check_choice
from ..preprocess import MAX_SIZE

# Where features can be taken: after a stage's last ReLU, or after the global average pooling.
CUTS = ("layer1", "layer2", "layer3", "layer4", "avgpool")

STAGE_WIDTHS = (64, 128, 256, 512)
_NORM_KEYS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
# Counts training batches; inference never reads it, and old checkpoints lack it.
_COUNTER = "num_batches_tracked"
_HEAD = ("fc.weight", "fc.bias")

# The stem and four stages divide each side by 32: below that no pixel is left.
RESNET_MIN_SIZE = 32

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Backbone:
    """One architecture."""

    name: str  # ``"resnet18"``
    blocks: tuple[int, int, int, int]  # residual blocks per stage
    bottleneck: bool  # whether a block is 1x1, 3x3, 1x1 (ResNet-50) rather than 3x3, 3x3

    @property
    def feature_dim(self) -> int:
        """Length D of the features after global average pooling."""
        return STAGE_WIDTHS[-1] * (4 if self.bottleneck else 1)

    @property
    def n_parameters(self) -> int:
        """How many numbers the tensors of `shapes` have."""
        return sum(math.prod(shape) for shape in self.shapes().values())

    def cut_shape(self, cut: str, size: int) -> Shape:
        """Return the shape of one image's features at a cut."""
        check_cuts((cut,))
        if cut == "avgpool":
            return (self.feature_dim,)
        stage = CUTS.index(cut)
        side = size
        for _ in range(2 + stage):  # the stem halves twice, each stage after the first once
            side = (side + 1) // 2
        return (STAGE_WIDTHS[stage] * (4 if self.bottleneck else 1), side, side)

    def shapes(self) -> dict[str, Shape]:
        """Return name -> shape of every tensor of the backbone, the head left out."""
        shapes: dict[str, Shape] = {}

        def conv(name: str, out: int, into: int, kernel: int) -> None:
            shapes[f"{name}.weight"] = (out, into, kernel, kernel)

        def norm(name: str, channels: int) -> None:
            for key in _NORM_KEYS:
                shapes[f"{name}.{key}"] = () if key == _COUNTER else (channels,)

        conv("conv1", 64, 3, 7)
        norm("bn1", 64)
        into = 64
        for stage, (width, blocks) in enumerate(
            zip(STAGE_WIDTHS, self.blocks, strict=True), start=1
        ):
            out = width * (4 if self.bottleneck else 1)
            kernels = (1, 3, 1) if self.bottleneck else (3, 3)
            for block in range(blocks):
                prefix = f"layer{stage}.{block}"
                channels = into
                for index, kernel in enumerate(kernels, start=1):
                    filters = out if index == len(kernels) else width
                    conv(f"{prefix}.conv{index}", filters, channels, kernel)
                    norm(f"{prefix}.bn{index}", filters)
                    channels = filters
                if block == 0 and (stage > 1 or into != out):
                    conv(f"{prefix}.downsample.0", out, into, 1)
                    norm(f"{prefix}.downsample.1", out)
                into = out
        return shapes


BACKBONES: Mapping[str, Backbone] = {
    backbone.name: backbone
    for backbone in (
        Backbone("resnet18", (2, 2, 2, 2), bottleneck=False),
        Backbone("resnet34", (3, 4, 6, 3), bottleneck=False),
        Backbone("resnet50", (3, 4, 6, 3), bottleneck=True),
    )
}


def get_backbone(name: str) -> Backbone:
    """Return the architecture of that name."""
    try:
        return BACKBONES[name]
    except KeyError:
        raise RecipeError(
            f"backbone: expected one of {', '.join(BACKBONES)}, found {name!r}; "
            "try --backbone resnet18"
        ) from None


def check_resnet_size(size: int) -> None:
    """Refuse an input's side in pixels that no ResNet could work with."""
    if not RESNET_MIN_SIZE <= size <= MAX_SIZE:
        raise RecipeError(
            f"size: expected {RESNET_MIN_SIZE} to {MAX_SIZE} pixels (a ResNet halves the image "
            f"five times), found {size}; try --size 64 or --size 224"
        )


def check_cuts(cuts: Sequence[str]) -> tuple[str, ...]:
    """Check names of cuts; return them as a tuple, in the order given."""
    cuts = ["avgpool" if cut == "pooled" else cut for cut in cuts]
    known = ", ".join(CUTS)
    if not cuts:
        raise RecipeError(f"cut: expected one or more of {known}, found none; try --cut avgpool")
    for cut in cuts:
        check_choice("cut", cut, CUTS)
    if len(set(cuts)) != len(cuts):
        raise RecipeError(f"cut: expected each one once, found {', '.join(cuts)}; name it once")
    return tuple(cuts)


def check_state(
    state: Mapping[str, np.ndarray], backbone: Backbone, source: str
) -> dict[str, np.ndarray]:
    """Check that a checkpoint is one of this architecture, and complete."""
    expected = backbone.shapes()
    problem = _first_problem(state, expected)
    if problem:
        others = [
            other.name for other in BACKBONES.values() if not _first_problem(state, other.shapes())
        ]
        advice = (
            f"these are {others[0]} weights: use --backbone {others[0]}"
            if others
            else f"give a checkpoint of {backbone.name} with torchvision's key names"
        )
        raise WeightsError(f"{source}: not a {backbone.name}: {problem}; {advice}")

    checked: dict[str, np.ndarray] = {}
    for key in [*expected, *(key for key in _HEAD if key in state)]:
        if key.endswith(_COUNTER):
            checked[key] = np.asarray(state.get(key, 0), np.int64).reshape(())
            continue
        checked[key] = np.ascontiguousarray(state[key], np.float32)
        if not np.isfinite(checked[key]).all():
            raise WeightsError(
                f"{source}: expected finite numbers, found NaN or infinity in {key!r}; "
                "the file is damaged or its training diverged: give another checkpoint"
            )
        if key.endswith("running_var") and checked[key].min() < 0:
            raise WeightsError(
                f"{source}: expected variances from 0 on, found {checked[key].min():g} in {key!r}; "
                "the file is damaged: give another checkpoint"
            )
    return checked


def _first_problem(state: Mapping[str, np.ndarray], expected: Mapping[str, Shape]) -> str:
    for key, shape in expected.items():
        if key.endswith(_COUNTER):
            continue
        if key not in state:
            return f"expected {key!r} of shape {shape}, found no such tensor"
        if state[key].shape != shape:
            return f"expected {key!r} of shape {shape}, found {state[key].shape}"
    left_over = sorted(set(state) - set(expected) - set(_HEAD))
    if left_over:
        return f"found a tensor that it does not have, {left_over[0]!r}"
    return ""


RANDOM = "random:"
# Makes this draw differ from those of `featcache.sampling`, whose keys are shorter.
_BACKBONE_KEY = (0, 0, 1)


def draw_state(backbone: Backbone, seed: int) -> dict[str, np.ndarray]:
    """Draw random weights, the same for every framework.

    Convolutions are normal with variance 2 / (k * k * outputs), as in torchvision and flowvision
    (He et al., "Delving Deep into Rectifiers", ICCV 2015). Batch normalisation starts as the
    identity.
    """
    generator = np.random.default_rng((seed, *_BACKBONE_KEY))
    state: dict[str, np.ndarray] = {}
    for name, shape in backbone.shapes().items():
        if len(shape) == 4:
            scale = np.float32(np.sqrt(2 / (shape[0] * shape[2] * shape[3])))
            state[name] = scale * generator.standard_normal(shape, np.float32)
        elif not shape:
            state[name] = np.zeros((), np.int64)
        else:
            filled = np.ones if name.endswith(("weight", "running_var")) else np.zeros
            state[name] = filled(shape, np.float32)
    return state


def random_seed(weights: str) -> int:
    """Return the seed of ``"random:SEED"``."""
    digits = weights.removeprefix(RANDOM)
    if not digits.isdecimal() or len(digits) > 9:
        raise RecipeError(
            f"weights: expected random:SEED with a whole number from 0, found {weights!r}; try "
            "--weights random:0"
        )
    return int(digits)
