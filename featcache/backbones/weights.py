"""A backbone's weights: where they come from, and their metadata.

For the ResNets two names are known. ``imagenet`` is the tutorial's checkpoint, fetched once and
checked against its published digest. ``tinyimagenet32`` comes with featcache, so
that everything runs offline; it was trained on 32-pixel images and is far
weaker, and never stands in for the other unasked. ``random:SEED`` is drawn. Anything else is a
path. Backbones of a library bring their own weights.

No file is trusted. Formats that can carry code (PyTorch's, OneFlow's) are read by
a reader that has no way to run it; see `featcache.pickles`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path

import numpy as np

from ..errors import OutputError, RecipeError, WeightsError, one_line
from ..files import did_you_mean_path, user_path
from ..preprocess import Preprocess
from ..progress import OnProgress
from .architectures import (
    BACKBONES,
    RANDOM,
    check_cuts,
    check_resnet_size,
    check_state,
    draw_state,
    get_backbone,
    random_seed,
)
from .checkpoints import (
    FORMATS,
    Checkpoint,
    parse_checkpoint,
    read_checkpoint,
    read_file,
    write_safetensors,
)
from .choice import RESNET_ENGINES
from .naming import WEIGHT_NAMES
from .network import Network, Shape, arrays_digest
from .pretrained import IMAGENET, Source, check_digest, find, pin_digest

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
    library : str
        What built the network, such as ``"timm 1.0.31"``; empty for the ResNets.
    network : Network or None
        How to run a backbone that is not one of the ResNets; it has no ``state``.
    notes : tuple of str
        What the user should know of weights and preprocessing.
    """

    name: str
    backbone: str
    state: Mapping[str, np.ndarray] = field(repr=False)
    sha256: str
    preprocess: Preprocess
    source: str
    library: str = ""
    network: Network | None = field(default=None, repr=False)
    notes: tuple[str, ...] = ()

    @property
    def engines(self) -> tuple[str, ...]:
        """The engines that can run it, its own library's first."""
        return self.network.engines if self.network else RESNET_ENGINES

    def prepared(self, preprocess: Preprocess) -> Weights:
        """Return the same weights for images that are prepared in another way."""
        if self.network is not None:
            self.network.preprocess = preprocess
        return replace(self, preprocess=preprocess)

    def shapes(self, cuts: Sequence[str]) -> dict[str, Shape]:
        """Return the shape of one image's features at each cut."""
        if self.network:
            return self.network.shapes(cuts)
        resnet = get_backbone(self.backbone)
        return {cut: resnet.cut_shape(cut, self.preprocess.size) for cut in check_cuts(cuts)}


# 32 images of 64 pixels, 2 of 224: less leaves the kernels idle, more leaves the cache.
_PIXELS_PER_PASS = 2**17
_MAX_IMAGES_PER_PASS = 32


def images_per_pass(weights: Weights) -> int:
    """Return the images of one pass on a processor: always as many, whatever is asked for."""
    if weights.network and weights.network.fixed_batch:
        return weights.network.fixed_batch
    return max(1, min(_MAX_IMAGES_PER_PASS, _PIXELS_PER_PASS // weights.preprocess.size**2))


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
    if backbone in BACKBONES:
        state = check_state(state, get_backbone(backbone), str(path))
    write_safetensors(path, state, describe(backbone, preprocess, metadata))
    return path


def load_resnet(name: str | Path, backbone: str, folder: Path, on_progress: OnProgress) -> Weights:
    """Load the checkpoint of a ResNet by name or path; ``folder`` keeps downloads."""
    if name == "imagenet":
        return _load_imagenet(backbone, folder, IMAGENET, on_progress)
    if name == "tinyimagenet32":
        return _load_starter(backbone)
    if isinstance(name, str) and name.startswith(RANDOM):
        return _draw(name, backbone)
    path = user_path(name)
    if not os.path.exists(path):
        raise WeightsError(
            f"{path}: expected {', '.join(WEIGHT_NAMES)}, random:SEED or a path to {FORMATS}, "
            f"found no such file{did_you_mean_path(path, 'check the spelling', WEIGHT_NAMES)}"
        )
    return _load_path(path, backbone)


def _draw(name: str, backbone: str) -> Weights:
    """Return random weights; their digest is over the tensors in the order of their names."""
    state = draw_state(get_backbone(backbone), random_seed(name))
    source = f"random weights, seed {random_seed(name)}"
    return Weights(name, backbone, state, arrays_digest(state), Preprocess(224), source)


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
    name = file_stem(path.stem)
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
    try:
        check_resnet_size(preprocess.size)
    except RecipeError as failure:
        raise WeightsError(f"{where}: {PREPROCESS_KEY}: {failure}") from failure
    state = check_state(checkpoint.state, get_backbone(backbone), where)
    # Views become arrays of their own: engines may want to write, two tensors may have
    # shared a storage, and the file's bytes are no longer needed.
    own = {key: array if array.flags.owndata else array.copy() for key, array in state.items()}
    return Weights(name, backbone, own, checkpoint.sha256, preprocess, origin)


_BACKBONE = "featcache.backbone"
PREPROCESS_KEY = "featcache.preprocess"


def describe(
    backbone: str, preprocess: Preprocess, metadata: Mapping[str, str] | None
) -> dict[str, str]:
    """Return ``metadata`` with both keys set."""
    own = {
        key: value
        for key, value in preprocess.as_dict().items()
        if key not in ("decoder", "reducing_gap")
    }
    return {**(metadata or {}), _BACKBONE: backbone, PREPROCESS_KEY: json.dumps(own)}


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
    text = metadata.get(PREPROCESS_KEY)
    if text is None:
        return Preprocess()
    try:
        fields = json.loads(text)
        missing = {"size", "mean", "std"} - fields.keys()
        if missing:
            raise ValueError(f"no {', '.join(sorted(missing))}")
        return Preprocess.from_dict(fields)
    except (RecipeError, ValueError, TypeError, AttributeError, RecursionError) as failure:
        raise WeightsError(
            f"{source}: expected {PREPROCESS_KEY} with size, mean and std (3 numbers each), found "
            f"{one_line(text)} ({one_line(failure)}); write the file with save_weights"
        ) from failure


def file_stem(name: str) -> str:
    """Return a name that fits into the name of a cache."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-")[:64] or "weights"
