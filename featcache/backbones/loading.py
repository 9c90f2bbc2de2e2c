"""Backbones by name: from our own ResNets, a library, a file or a function to `Weights`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import RecipeError, WeightsError, one_line
from ..files import user_path
from ..preprocess import MAX_SIZE, Preprocess
from ..progress import OnProgress, silent
from .architectures import RANDOM, check_resnet_size
from .checkpoints import FORMATS, read_metadata
from .graph_file import GraphFile
from .naming import PRETRAINED, BackboneName, parse_backbone, recorded_weights
from .own_files import remember_file
from .pretrained import cache_folder
from .weights import (
    PREPROCESS_KEY,
    Weights,
    check_backbone,
    file_stem,
    load_resnet,
    read_preprocess,
)


def load_weights(
    name: str | Path | None = None,
    backbone: str = "resnet18",
    *,
    size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    interpolation: str | None = None,
    geometry: str | None = None,
    crop_pct: float | None = None,
    cache_dir: Path | None = None,
    on_progress: OnProgress = silent,
) -> Weights:
    """Load a checkpoint and check that it is one of this architecture.

    Parameters
    ----------
    name : str or Path, optional
        ``"imagenet"`` (the ResNets' default), ``"tinyimagenet32"``, ``"random:SEED"``, or a path:
        ``.safetensors``, ``.pth``, ``.pt``, an OneFlow checkpoint folder or a ``.zip`` of one.
        A `Path` is always a path. By default a library's own pretrained weights.
    backbone : str
        ``"resnet18"``, ``"resnet34"``, ``"resnet50"``, or one of another library, a file or a
        function, as `featcache.extract` takes it.
    size : int, optional
        Side of the input in pixels, in place of the checkpoint's own.
    mean, std, interpolation, geometry, crop_pct : optional
        Preprocessing in place of the checkpoint's own, as `Preprocess.overridden` takes it.
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
    parsed = parse_backbone(backbone)
    overrides: dict[str, Any] = {
        "size": size,
        "mean": mean,
        "std": std,
        "interpolation": interpolation,
        "geometry": geometry,
        "crop_pct": crop_pct,
    }
    # Refuses what means nothing before anything is downloaded.
    Preprocess(size or MAX_SIZE).overridden(**{**overrides, "crop_pct": None})
    if parsed.kind != "resnet":
        weights = _load_network(parsed, name, overrides, on_progress)
    else:
        if size is not None:
            check_resnet_size(size)
        folder = cache_dir or cache_folder()
        weights = load_resnet("imagenet" if name is None else name, backbone, folder, on_progress)
        weights = replace(weights, preprocess=weights.preprocess.overridden(**overrides))
    file = backbone if parsed.kind == "file" else name
    if isinstance(file, Path) or (file is not None and recorded_weights(file) is None):
        remember_file(weights.sha256, file)
    return weights


def _load_network(
    parsed: BackboneName,
    name: str | Path | None,
    overrides: Mapping[str, Any],
    on_progress: OnProgress,
) -> Weights:
    """Find a backbone of a library, a file or a function; its weights load when they are needed."""
    asked = None if name is None else str(name)
    size = overrides["size"]
    if parsed.kind == "file":
        return _load_file(parsed, asked, overrides)
    if parsed.kind == "flowvision":
        return _load_flowvision(parsed, asked, overrides, on_progress)
    from .library_network import LibraryNetwork, build_function, is_module

    built = build_function(parsed.rest) if parsed.kind == "function" else None
    if built is not None and not is_module(built):
        return _load_callable(parsed, built, asked, overrides)
    if asked is not None and not asked.startswith(RANDOM) and not os.path.exists(user_path(asked)):
        raise WeightsError(
            f"{asked}: expected random:SEED or a path to {FORMATS}, found no such file; leave "
            f"--weights out for the own weights of {parsed.stored}"
        )
    own = _saved_preprocess(parsed, asked)
    network = LibraryNetwork(parsed, asked, size or (own.size if own else None), built=built)
    facts = network.facts()
    preprocess = (own or facts.preprocess).overridden(**overrides)
    network.preprocess = preprocess
    made = facts.sha256, preprocess, facts.source, facts.library, network, facts.notes
    return Weights(_weights_name(asked), parsed.stored, {}, *made)


def _load_flowvision(
    parsed: BackboneName,
    asked: str | None,
    overrides: Mapping[str, Any],
    on_progress: OnProgress,
) -> Weights:
    from .flowvision import flowvision_network, library

    network, own, source = flowvision_network(parsed.rest, asked, overrides["size"], on_progress)
    made = network.sha256(), own.overridden(**overrides), source, library(), network
    return Weights(_weights_name(asked), parsed.stored, {}, *made)


def _saved_preprocess(parsed: BackboneName, asked: str | None) -> Preprocess | None:
    """Return the preprocessing that `save_weights` wrote beside a library's tensors, if it did."""
    if asked is None or not asked.endswith(".safetensors"):
        return None
    metadata = read_metadata(user_path(asked))
    check_backbone(metadata, parsed.stored, asked)
    return read_preprocess(metadata, asked) if PREPROCESS_KEY in metadata else None


def _load_file(parsed: BackboneName, asked: str | None, overrides: Mapping[str, Any]) -> Weights:
    _refuse_weights(parsed, asked)
    path = user_path(parsed.rest)
    from .exported_program import exported_graph

    graph = exported_graph(path) if path.suffix.lower() == ".pt2" else GraphFile(path)
    preprocess, notes = file_preprocess(path, graph.fixed_size, overrides)
    made = graph.sha256, preprocess, str(path), "", graph.sized(preprocess.size), notes
    return Weights(file_stem(path.stem), parsed.stored, {}, *made)


def _load_callable(
    parsed: BackboneName, built: Any, asked: str | None, overrides: Mapping[str, Any]
) -> Weights:
    from .library_network import FunctionNetwork, function_preprocess

    _refuse_weights(parsed, asked)
    own, notes = function_preprocess(built, parsed.rest)
    preprocess = own.overridden(**overrides)
    network = FunctionNetwork(parsed.rest, built, preprocess.size)
    made = network.sha256, preprocess, parsed.rest, "", network, notes
    return Weights("function", parsed.stored, {}, *made)


def _refuse_weights(parsed: BackboneName, asked: str | None) -> None:
    if asked is not None:
        raise RecipeError(
            f"weights: expected none with {parsed.stored}, which has its own, found "
            f"'{one_line(asked)}'; leave out --weights"
        )


def file_preprocess(
    path: Path, fixed_size: int | None, overrides: Mapping[str, Any]
) -> tuple[Preprocess, tuple[str, ...]]:
    """Return the preprocessing of a network's file: from the JSON beside it, and the flags."""
    beside = path.with_suffix(".json")
    base = Preprocess() if fixed_size is None else Preprocess(fixed_size)
    if not beside.exists():
        given = overrides["mean"] is not None and overrides["std"] is not None
        note = (
            f"{path.name} says nothing of its images (a file {beside.name} beside it would): "
            "normalised with ImageNet's mean and standard deviation; give --mean and --std"
        )
        return base.overridden(**overrides), () if given else (note,)
    try:
        fields = json.loads(beside.read_text("utf-8"))
        crop_pct = fields.pop("crop_pct", None)
        own = Preprocess.from_dict({"size": base.size, **fields}).overridden(crop_pct=crop_pct)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(
            f"{beside}: expected JSON with size, mean, std, interpolation and geometry, found: "
            f"{one_line(error)}"
        ) from None
    return own.overridden(**overrides), ()


def _weights_name(asked: str | None) -> str:
    """Return what a cache records: a name that can be asked for again, or a file's stem."""
    if asked is None:
        return PRETRAINED
    return asked if asked.startswith(RANDOM) else file_stem(Path(asked).stem)
