"""The options of an extraction, each written down once."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from ..backbones.architectures import check_cuts, get_backbone
from ..datasets.dataset import Dataset
from ..datasets.images import OnError
from ..errors import RecipeError
from ..preprocess import VIEWS
from ..remote import shown
from ..store.format import DTYPES
from ..store.shards import PACK_LIMIT_BYTES

CUT = "avgpool"


@dataclass(frozen=True)
class ExtractOptions:
    """What `featcache.extract` makes of a data set, and where it puts it.

    Parameters
    ----------
    backbone : str
        ``"resnet18"``, ``"resnet34"`` or ``"resnet50"``.
    weights : str or Path
        ``"imagenet"``, ``"tinyimagenet32"``, or the path of a checkpoint.
    size : int, optional
        Side of the input in pixels, at least 1; the weights' own size by default.
    cut : str or sequence of str
        Where features are taken: ``"avgpool"`` (N, D), ``"layer1"`` to ``"layer4"``
        (N, C, H, W); several in one pass, also as ``"avgpool,layer3"``.
    engine : str
        ``"auto"``, ``"oneflow"``, ``"openvino"`` or ``"torch"``.
    device : str
        ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"mps"``.
    precision : str
        What the engine computes in: ``"f32"``, ``"bf16"`` or ``"f16"``.
    dtype : str
        What features are stored as: ``"float32"``, or ``"float16"`` at half the size.
    batch_size : int, optional
        Images per forward pass, at least 1; the engine's own choice by default. It changes speed
        and memory, and features by rounding at most.
    views : str
        ``"none"``, or ``"flips"`` for the four flip views of every training image.
    on_error : str
        ``"fail"`` at an image that does not decode, or ``"skip"`` it: the cache lists it.
    train_limit, test_limit : int, optional
        Only a stratified draw of this many images, always the same: the one that
        `featcache.probe` and `featcache.finetune` take.
    output : str or Path, optional
        A ``.h5`` file, or the folder for one; ``cache/`` by default. For a URL, the cache is made
        in ``remote/`` in the cache folder and uploaded when it is complete.
    pack : bool, optional
        One HDF5 file, or (False) a folder of shards beside it; by default shards above
        8 GiB, or where ``output`` ends in ``.shards``.
    data_root : str or Path, optional
        Folder of the named data sets.

    Raises
    ------
    RecipeError
        A value that is not one of those.
    """

    backbone: str = "resnet18"
    weights: str | Path = "imagenet"
    size: int | None = None
    cut: str | Sequence[str] = CUT
    engine: str = "auto"
    device: str = "auto"
    precision: str = "f32"
    dtype: str = "float32"
    batch_size: int | None = None
    views: str = "none"
    on_error: OnError = "fail"
    train_limit: int | None = None
    test_limit: int | None = None
    output: str | Path | None = None
    pack: bool | None = None
    data_root: str | Path | None = None

    def __post_init__(self) -> None:
        """Check every value that can be checked without an engine, weights or images."""
        get_backbone(self.backbone)
        check_cuts(self.cuts)
        for name, value, known in (
            ("views", self.views, tuple(VIEWS)),
            ("dtype", self.dtype, tuple(DTYPES)),
            ("on error", self.on_error, ("fail", "skip")),
            ("pack", self.pack, (None, True, False)),
        ):
            if value not in known:
                raise RecipeError(
                    f"{name}: expected one of {', '.join(map(str, known))}, found {value!r}"
                )
        if self.batch_size is not None and self.batch_size < 1:
            raise RecipeError(f"batch size: expected at least 1, found {self.batch_size}")

    @property
    def cuts(self) -> tuple[str, ...]:
        """The cuts by name; vectors come first, since a probe takes the first."""
        names = self.cut.split(",") if isinstance(self.cut, str) else self.cut
        return tuple(sorted((name.strip() for name in names), key=lambda name: name != CUT))

    @property
    def packed(self) -> bool | None:
        """Whether one file is asked for, a folder of shards, or either (None)."""
        by_name = self.output is not None and Path(self.output).suffix == ".shards"
        return False if by_name and self.pack is None else self.pack

    def views_of(self, role: str) -> tuple[str, ...]:
        """Return the views of a split; test images have one."""
        return tuple(VIEWS[self.views if role == "train" else "none"])

    def command(self, dataset: str | Path | Dataset) -> str:
        """Return the command line of this extraction; a `Dataset` stands as ``DATASET``."""
        words = ["featcache", "extract"]
        words.append("DATASET" if isinstance(dataset, Dataset) else shown(dataset))
        for field in fields(self):
            value = getattr(self, field.name)
            if value == field.default:
                continue
            if field.name == "pack":
                words += [] if value else ["--shards"]
                continue
            text = shown(value) if isinstance(value, (str, Path)) else value
            text = text if isinstance(text, (str, int)) else ",".join(text)
            words += [f"--{field.name.replace('_', '-')}", str(text)]
        return shlex.join(words)


def pack_limit(pack: bool | None) -> int:
    """Return up to how many bytes a cache is packed into one file."""
    return {None: PACK_LIMIT_BYTES, True: 1 << 62, False: -1}[pack]
