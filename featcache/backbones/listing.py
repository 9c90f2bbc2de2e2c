"""Which backbones there are here, and what one of them offers."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from typing import Any

from ..frameworks import oneflow_status, torch_status
from ..process import installed_version
from .architectures import BACKBONES, CUTS
from .choice import RESNET_ENGINES
from .libraries import PACKAGES, catalogue_facts, library_version, names_of, weights_are_here
from .loading import load_weights
from .naming import LIBRARIES, parse_backbone
from .pretrained import imagenet_is_here

_BUILT = 50  # so many are laid out, to count their parameters


@dataclass(frozen=True)
class ListedBackbone:
    """One line of the list; None where only loading the model would tell."""

    name: str
    feature_dim: int | None
    size: int | None  # side of the input in pixels
    n_parameters: int | None
    weights_here: bool | None  # whether its pretrained weights are on this machine


def list_backbones(pattern: str | None = None) -> list[ListedBackbone]:
    """List the backbones of the installed libraries whose names match a pattern.

    Parameters
    ----------
    pattern : str, optional
        Shell wildcards, such as ``"timm:*dinov2*"``; by default the ResNets and one line for each
        installed library.
    """
    listed = [
        ListedBackbone(
            name,
            backbone.feature_dim,
            224,
            backbone.n_parameters,
            imagenet_is_here(name),
        )
        for name, backbone in BACKBONES.items()
        if pattern is None or fnmatch.fnmatchcase(name, pattern)
    ]
    asked = (pattern or "").partition(":")[0]
    if asked in PACKAGES:
        library_version(asked)  # says what to install
    for kind in LIBRARIES:
        if not _installed(kind):
            continue
        if pattern is None:
            listed.append(ListedBackbone(f"{kind}:*", None, None, None, None))
            continue
        if fnmatch.fnmatchcase(f"{kind}:", pattern.partition(":")[0] + ":"):
            names = [f"{kind}:{name}" for name in names_of(kind)]
            names = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
            listed += [_listed(kind, name, build=len(names) <= _BUILT) for name in names]
    return listed


def describe_backbone(
    name: str, *, weights: str | None = None, size: int | None = None
) -> dict[str, Any]:
    """Return what is known of one backbone: engines, preprocessing, cuts with their shapes.

    A library's model is built with random weights unless its own are on this machine.
    """
    parsed = parse_backbone(name)
    if parsed.kind == "resnet":
        backbone = BACKBONES[parsed.rest]
        side = size or 224
        cuts = {cut: backbone.cut_shape(cut, side) for cut in reversed(CUTS)}
        return {
            "backbone": name,
            "engines": list(RESNET_ENGINES),
            "weights": "imagenet, tinyimagenet32, random:SEED or a path",
            "n_parameters": backbone.n_parameters,
            "size": side,
            "cuts": cuts,
        }
    in_library = parsed.kind in LIBRARIES and not parsed.is_local
    if weights is None and in_library and not weights_are_here(parsed.kind, parsed.rest):
        weights = "random:0"
    loaded = load_weights(weights, name, size=size)
    assert loaded.network is not None
    return {
        "backbone": loaded.backbone,
        "library": loaded.library,
        "engines": list(loaded.engines),
        "weights": loaded.source,
        "n_parameters": loaded.network.n_parameters(),
        "size": loaded.preprocess.size,
        "preprocessing": loaded.preprocess.describe(),
        "notes": list(loaded.notes),
        "cuts": loaded.network.cut_shapes(),
    }


def _listed(kind: str, name: str, *, build: bool) -> ListedBackbone:
    own = name.partition(":")[2]
    facts = catalogue_facts(kind, own, build=build)
    return ListedBackbone(name, *facts, weights_are_here(kind, own))


def _installed(kind: str) -> bool:
    if kind == "flowvision":
        return oneflow_status()[0] is not None and installed_version("flowvision") is not None
    return torch_status()[0] is not None and installed_version(PACKAGES[kind][1]) is not None
