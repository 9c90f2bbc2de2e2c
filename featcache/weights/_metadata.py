"""What a safetensors file says about its own use: which backbone, which pixels.

Two keys of the file's metadata, both text:

* ``featcache.backbone``: ``resnet18``
* ``featcache.preprocess``: ``{"size": 64, "mean": [...], "std": [...]}``
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from ..errors import WeightsError
from ..preprocess import Preprocess
from ._quote import quote

__all__ = ["check_backbone", "describe", "read_preprocess"]

_BACKBONE = "featcache.backbone"
_PREPROCESS = "featcache.preprocess"
_MAX_SIZE = 4096  # pixels; a file may not ask for images that fill the memory


def describe(
    backbone: str, preprocess: Preprocess, metadata: Mapping[str, str] | None
) -> dict[str, str]:
    """Return ``metadata`` with both keys set."""
    pixels = json.dumps(asdict(preprocess))
    return {**(metadata or {}), _BACKBONE: backbone, _PREPROCESS: pixels}


def check_backbone(metadata: Mapping[str, str], backbone: str, source: str) -> None:
    """Refuse a file that says it is of another backbone; one that does not say may pass.

    Raises
    ------
    WeightsError
        The backbone that it names.
    """
    said = metadata.get(_BACKBONE, backbone)
    if said != backbone:
        raise WeightsError(
            f"{source}: expected {backbone} weights, found {quote(said)} in the file's metadata; "
            f"use --backbone {quote(said)}"
        )


def read_preprocess(metadata: Mapping[str, str], source: str) -> Preprocess:
    """Return the preprocessing that a file asks for, ImageNet's at 224 pixels by default.

    Raises
    ------
    WeightsError
        A value that is missing, of another type or out of range.
    """
    text = metadata.get(_PREPROCESS)
    if text is None:
        return Preprocess()
    try:
        fields = json.loads(text)
        size = fields["size"]
        if type(size) is not int or size > _MAX_SIZE:
            raise ValueError(f"a size of {size}")
        return Preprocess(
            size,
            _channels(fields["mean"]),
            _channels(fields["std"]),
            fields.get("interpolation", "bilinear"),
        )
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as failure:
        raise WeightsError(
            f"{source}: expected {_PREPROCESS} with size (32 to {_MAX_SIZE}), mean and std (3 "
            f"numbers each), found {quote(text)}; write the file with save_weights"
        ) from failure


def _channels(values: Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    if not all(math.isfinite(value) for value in (red, green, blue)):
        raise ValueError("not finite")
    return red, green, blue
