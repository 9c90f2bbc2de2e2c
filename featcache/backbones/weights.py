"""A backbone's weights: where they come from, and their metadata.

Two names are known. ``imagenet`` is the tutorial's checkpoint, fetched once and
checked against its published digest. ``tinyimagenet32`` comes with featcache, so
that everything runs offline; it was trained on 32-pixel images and is far
weaker, and never stands in for the other unasked. Anything else is a path.

No file is trusted. Formats that can carry code (PyTorch's, OneFlow's) are read by
a reader that has no way to run it; see `featcache.pickles`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from pathlib import Path

import numpy as np

from ..errors import OutputError, WeightsError, one_line
from ..files import user_path
from ..preprocess import Preprocess
from ..progress import OnProgress, silent
from .architectures import check_state, get_backbone
from .checkpoints import (
    FORMATS,
    Checkpoint,
    parse_checkpoint,
    read_checkpoint,
    read_file,
    write_safetensors,
)
from .pretrained import IMAGENET, Source, cache_folder, check_digest, find, pin_digest

WEIGHT_NAMES = ("imagenet", "tinyimagenet32")

_STARTER_FILE = "resnet18-tinyimagenet32.safetensors"
_STARTER_SHA256 = "bc5d0b3bf583fe2bac262b92f51a476fd5991cab725ef92d18ea45e8500d4fc0"
_STARTER_SIZE = 64
_STARTER_PROVENANCE = (
    "trained for featcache on Tiny-ImageNet-200 at 32 x 32 pixels; ImageNet's terms of access "
    "apply to the images"
)


@dataclass(frozen=True, eq=False)
class Weights:
    """A checked checkpoint, ready for any engine.

    Parameters
    ----------
    name : str
        ``"imagenet"``, ``"tinyimagenet32"`` or a file's stem, fit for a file name.
    backbone : str
        ``"resnet18"``.
    state : mapping of str to numpy.ndarray
        As `featcache.backbones.architectures.check_state` returns it; the head, if any, last.
    sha256 : str
        Of the checkpoint file; of a checkpoint folder, SHA-256 of what
        ``sha256sum`` prints for its files in sorted order.
    preprocess : Preprocess
        How the images looked that it was trained on.
    source : str
        Where it came from, for a person.
    """

    name: str
    backbone: str
    state: Mapping[str, np.ndarray] = field(repr=False)
    sha256: str
    preprocess: Preprocess
    source: str


def load_weights(
    name: str | Path,
    backbone: str = "resnet18",
    *,
    size: int | None = None,
    cache_dir: Path | None = None,
    on_progress: OnProgress = silent,
) -> Weights:
    """Load a checkpoint and check that it is one of this architecture.

    Parameters
    ----------
    name : str or Path
        ``"imagenet"``, ``"tinyimagenet32"``, or a path: ``.safetensors``,
        ``.pth``, ``.pt``, an OneFlow checkpoint folder or a ``.zip`` of one.
        A `Path` is always a path.
    backbone : str
        ``"resnet18"``, ``"resnet34"`` or ``"resnet50"``.
    size : int, optional
        Side of the input in pixels, in place of the checkpoint's own.
    cache_dir : Path, optional
        Where downloads are kept; `cache_folder` by default.
    on_progress : callable
        Called with the progress of a download.

    Raises
    ------
    WeightsError
        Missing, damaged, unsafe, of another architecture, of another digest
        than promised, or out of the network's reach.
    RecipeError
        No such backbone, or a size below 32.

    Notes
    -----
    A path's images are 224 x 224 with ImageNet's channel statistics, unless the
    metadata of a safetensors file says otherwise, as `save_weights` writes it.
    """
    get_backbone(backbone)
    if size is not None:
        Preprocess(size)  # refuses a size that means nothing before anything is downloaded
    weights = _load(name, backbone, cache_dir or cache_folder(), on_progress)
    if size is not None:
        weights = replace(weights, preprocess=replace(weights.preprocess, size=size))
    return weights


def save_weights(
    path: Path,
    state: Mapping[str, np.ndarray],
    *,
    backbone: str,
    preprocess: Preprocess,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write a checkpoint that `load_weights` reads back, preprocessing included."""
    if path.suffix != ".safetensors":
        raise OutputError(
            f"{path}: expected a name that ends in .safetensors, found {path.suffix!r}; rename it"
        )
    checked = check_state(state, get_backbone(backbone), str(path))
    write_safetensors(path, checked, describe(backbone, preprocess, metadata))
    return path


def _load(name: str | Path, backbone: str, folder: Path, on_progress: OnProgress) -> Weights:
    if name == "imagenet":
        return _load_imagenet(backbone, folder, IMAGENET, on_progress)
    if name == "tinyimagenet32":
        return _load_starter(backbone)
    path = user_path(name)
    if not os.path.exists(path):
        raise WeightsError(
            f"{path}: expected {', '.join(WEIGHT_NAMES)} or a path to {FORMATS}, found no such "
            "file; check the spelling"
        )
    return _load_path(path, backbone)


def _load_imagenet(
    backbone: str, folder: Path, sources: Mapping[str, Sequence[Source]], on_progress: OnProgress
) -> Weights:
    path, source = find(backbone, folder, sources, on_progress)
    data = read_file(path)
    check_digest(path, source, hashlib.sha256(data).hexdigest())
    origin = f"{source.url} ({source.provenance})"
    try:
        checkpoint = parse_checkpoint(data, path.suffix, str(path))
        weights = _checked("imagenet", backbone, checkpoint, origin, str(path), Preprocess(224))
    except WeightsError as failure:
        raise WeightsError(f"{failure} (delete {path} to download it again)") from failure
    pin_digest(path, source, checkpoint.sha256)
    return weights


def _load_starter(backbone: str) -> Weights:
    try:
        data = resources.files(__package__).joinpath(_STARTER_FILE).read_bytes()
    except OSError as failure:
        raise WeightsError(
            f"tinyimagenet32: expected {_STARTER_FILE} beside the code, found none "
            f"({failure.strerror}); install featcache again"
        ) from failure
    checkpoint = parse_checkpoint(data, ".safetensors", "tinyimagenet32")
    if checkpoint.sha256 != _STARTER_SHA256:
        raise WeightsError(
            f"tinyimagenet32: expected sha256 {_STARTER_SHA256}, found {checkpoint.sha256}; "
            "install featcache again"
        )
    return _checked(
        "tinyimagenet32",
        backbone,
        checkpoint,
        _STARTER_PROVENANCE,
        "tinyimagenet32",
        Preprocess(_STARTER_SIZE),
    )


def _load_path(path: Path, backbone: str) -> Weights:
    checkpoint = read_checkpoint(path)
    check_backbone(checkpoint.metadata, backbone, str(path))
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip(".-")[:64] or "weights"
    preprocess = read_preprocess(checkpoint.metadata, str(path))
    if checkpoint.sha256 == _STARTER_SHA256:  # it says so in its README and not in its metadata
        preprocess = Preprocess(_STARTER_SIZE)
    return _checked(name, backbone, checkpoint, str(path), str(path), preprocess)


def _checked(
    name: str,
    backbone: str,
    checkpoint: Checkpoint,
    origin: str,
    where: str,
    preprocess: Preprocess,
) -> Weights:
    """Compare a checkpoint with the architecture; ``where`` is for the message."""
    state = check_state(checkpoint.state, get_backbone(backbone), where)
    # Views become arrays of their own: engines may want to write, two tensors may have
    # shared a storage, and the file's bytes are no longer needed.
    own = {key: array if array.flags.owndata else array.copy() for key, array in state.items()}
    return Weights(name, backbone, own, checkpoint.sha256, preprocess, origin)


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
    """Refuse a file that says it is of another backbone; one that does not say may pass."""
    named = metadata.get(_BACKBONE, backbone)
    if named != backbone:
        raise WeightsError(
            f"{source}: expected {backbone} weights, found {one_line(named)} in the file's "
            f"metadata; use --backbone {one_line(named)}"
        )


def read_preprocess(metadata: Mapping[str, str], source: str) -> Preprocess:
    """Return the preprocessing that a file asks for, ImageNet's at 224 pixels by default."""
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
            f"numbers each), found {one_line(text)}; write the file with save_weights"
        ) from failure


def _channels(values: Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    if not all(math.isfinite(value) for value in (red, green, blue)):
        raise ValueError("not finite")
    return red, green, blue
