"""The options of an extraction, each written down once."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..backbones.architectures import BACKBONES, check_cuts, check_resnet_size
from ..backbones.choice import PRECISIONS
from ..backbones.naming import parse_backbone
from ..backbones.network import POOLED
from ..datasets.dataset import Dataset
from ..datasets.images import OnError
from ..datasets.loading import load_dataset
from ..errors import RecipeError
from ..options import MAX_PIXELS, check_choice
from ..preprocess import VIEWS
from ..progress import OnProgress
from ..remote import shown
from ..store.format import DTYPES
from ..store.shards import PACK_LIMIT_BYTES


@dataclass(frozen=True)
class ExtractOptions:
    """What `featcache.extract` makes of a data set, and where it puts it.

    Parameters
    ----------
    backbone : str
        ``"resnet18"``, ``"resnet34"``, ``"resnet50"``; a model of a library: ``"timm:NAME"``,
        ``"torchvision:NAME"``, ``"hf:ORG/NAME"``, ``"open_clip:NAME/PRETRAINED"``,
        ``"flowvision:NAME"``; a file: ``.onnx``, ``.xml`` (OpenVINO), ``.pt2``; a folder that
        ``save_pretrained`` wrote; or ``"package.module:function"``, which returns a
        `torch.nn.Module` or a callable from float32 (N, 3, s, s) to arrays.
    weights : str or Path, optional
        The path of a checkpoint, or ``"random:SEED"``; for the ResNets also ``"imagenet"`` (the
        default) and ``"tinyimagenet32"``. A library's own pretrained weights by default.
    size : int, optional
        Side of the input in pixels, at least 1; the weights' own size by default.
    mean, std : 3 floats, optional
        Channel statistics on [0, 1]; the weights' own by default, as all preprocessing.
    interpolation : str, optional
        ``"bilinear"``, ``"bicubic"`` or ``"lanczos"``: Pillow's filters, with antialias.
    geometry : str, optional
        ``"square"`` (centre square, then resized), ``"crop"`` (shorter side resized, then centre
        crop), ``"squash"`` or ``"pad"``.
    crop_pct : float, optional
        In (0, 1]: the input's side divided by the side before a centre crop.
    cut : str or sequence of str
        Where features are taken: ``"pooled"`` (N, D), which the ResNets call ``"avgpool"``;
        ``"cls"``, ``"mean"``, ``"tokens"`` (N, T, D) of a transformer; a stage or block, such as
        ``"layer3"`` (N, C, H, W) or ``"blocks.11"``; several in one pass, also as
        ``"pooled,layer3"``. `featcache backbones NAME` lists them.
    engine : str
        ``"auto"``, ``"oneflow"``, ``"openvino"`` or ``"torch"``.
    device : str
        ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"mps"``.
    precision : str
        What the engine computes in: ``"f32"``, ``"bf16"`` or ``"f16"``; ``"auto"``: the
        fastest of these whose features of 256 training images have a cosine of 0.9999 to f32's,
        and the same votes of their neighbours; or ``"int8"``: OpenVINO in 8-bit integers, scaled
        by 256 training images and compared with f32 on 256 others.
    dtype : str
        What features are stored as: ``"float32"``, or ``"float16"`` at half the size.
    batch_size : int, optional
        Images per forward pass, at least 1; the engine's own choice by default. It changes speed
        and memory, and features by rounding at most.
    views : str
        ``"none"``, or ``"flips"`` for the four flip views of every training image.
    on_error : str
        ``"fail"`` at an image that does not decode, or ``"skip"`` it: the cache lists it. Classes
        without images too, as in `featcache.load_dataset`.
    max_pixels : int
        Images of more pixels are taken for ones that do not decode; 4 bytes of memory for each,
        several times, in each thread.
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
    labels : str, Path, frame or Table, optional
        A table with a row per image; its columns are kept with the cache.
    path_column, target, split_column, group : str, optional
        Its columns, as `featcache.load_dataset` takes them.
    verify_images : bool
        Hash every image, also where its size and times are those that are remembered from an
        earlier extraction.
    reuse : bool
        Take the features of an image from another cache in the output folder or in the default
        one, where that is of the same ingredients.

    Raises
    ------
    RecipeError
        A value that is not one of those.
    """

    backbone: str = "resnet18"
    weights: str | Path | None = None
    size: int | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    interpolation: str | None = None
    geometry: str | None = None
    crop_pct: float | None = None
    cut: str | Sequence[str] = POOLED
    engine: str = "auto"
    device: str = "auto"
    precision: str = "f32"
    dtype: str = "float32"
    batch_size: int | None = None
    views: str = "none"
    on_error: OnError = "fail"
    max_pixels: int = MAX_PIXELS
    train_limit: int | None = None
    test_limit: int | None = None
    output: str | Path | None = None
    pack: bool | None = None
    data_root: str | Path | None = None
    labels: Any = None
    path_column: str | None = None
    target: str | None = None
    split_column: str | None = None
    group: str | None = None
    verify_images: bool = False
    reuse: bool = True

    def __post_init__(self) -> None:
        """Check every value that can be checked without an engine, weights or images."""
        parse_backbone(self.backbone)
        if self.backbone in BACKBONES:
            check_cuts(self.cuts)
            if self.size is not None:
                check_resnet_size(self.size)
        elif not all(self.cuts) or len(set(self.cuts)) < len(self.cuts):
            raise RecipeError(
                f"cut: expected names, each once, found {', '.join(self.cuts)!r}; try --cut pooled"
            )
        for name, value, known in (
            ("precision", self.precision, (*PRECISIONS, "auto")),
            ("views", self.views, tuple(VIEWS)),
            ("dtype", self.dtype, tuple(DTYPES)),
            ("on error", self.on_error, ("fail", "skip")),
            ("pack", self.pack, (None, True, False)),
        ):
            check_choice(name, value, known)
        if self.batch_size is not None and self.batch_size < 1:
            raise RecipeError(f"batch size: expected at least 1, found {self.batch_size}")
        if type(self.max_pixels) is not int or self.max_pixels < 1:
            raise RecipeError(f"max pixels: expected at least 1, found {self.max_pixels!r:.80}")

    @property
    def cuts(self) -> tuple[str, ...]:
        """The cuts by name; what is pooled comes first, since a probe takes the first."""
        words = self.cut.split(",") if isinstance(self.cut, str) else self.cut
        names = [word.strip() for word in words]
        if self.backbone in BACKBONES:
            names = ["avgpool" if name == POOLED else name for name in names]
        return tuple(sorted(names, key=lambda name: name not in (POOLED, "avgpool")))

    @property
    def overrides(self) -> dict[str, Any]:
        """The preprocessing that was asked for, as `featcache.load_weights` takes it."""
        names = ("size", "mean", "std", "interpolation", "geometry", "crop_pct")
        return {name: getattr(self, name) for name in names}

    @property
    def packed(self) -> bool | None:
        """Whether one file is asked for, a folder of shards, or either (None)."""
        by_name = self.output is not None and Path(self.output).suffix == ".shards"
        return False if by_name and self.pack is None else self.pack

    def load_dataset(self, dataset: str | Path, on_progress: OnProgress) -> Dataset:
        """Open a data set as these options say."""
        columns = ("labels", "path_column", "target", "split_column", "group")
        given: dict[str, Any] = {name: getattr(self, name) for name in columns}
        given |= {"data_root": self.data_root, "on_error": self.on_error}
        return load_dataset(dataset, **given, on_progress=on_progress)

    def views_of(self, role: str) -> tuple[str, ...]:
        """Return the views of a split; images that are not trained on have one."""
        return tuple(VIEWS[self.views if role == "train" else "none"])

    def command(self, dataset: str | Path | Dataset) -> str:
        """Return the command line of this extraction; a `Dataset` stands as ``DATASET``."""
        words = ["featcache", "extract"]
        words.append("DATASET" if isinstance(dataset, Dataset) else shown(dataset))
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "labels" and not isinstance(value, (str, Path, type(None))):
                value = "TABLE"  # a frame
            if value == field.default:
                continue
            if isinstance(value, bool):
                flags = {"pack": [] if value else ["--shards"], "reuse": ["--no-reuse"]}
                words += flags.get(field.name, [f"--{field.name.replace('_', '-')}"])
                continue
            text = shown(value) if isinstance(value, (str, Path)) else value
            text = text if isinstance(text, (str, int, float)) else ",".join(map(str, text))
            words += [f"--{field.name.replace('_', '-')}", str(text)]
        return shlex.join(words)


def pack_limit(pack: bool | None) -> int:
    """Return up to how many bytes a cache is packed into one file."""
    return {None: PACK_LIMIT_BYTES, True: 1 << 62, False: -1}[pack]
