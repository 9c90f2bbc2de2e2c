"""What a backbone is called, and which library or file it comes from."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..errors import RecipeError, one_line
from ..files import user_path
from ..options import did_you_mean
from .architectures import BACKBONES, RANDOM
from .own_files import remembered_file

# Prefix of the name: the library whose name follows.
LIBRARIES = ("flowvision", "timm", "torchvision", "hf", "open_clip")
_PREFIXES = tuple(f"{library}:" for library in LIBRARIES)
GRAPH_SUFFIXES = (".onnx", ".xml", ".pt2")
FORMS = (
    f"{', '.join(BACKBONES)}, flowvision:NAME, timm:NAME, torchvision:NAME, hf:ORG/NAME, "
    "open_clip:NAME/PRETRAINED, a file (.onnx, .xml, .pt2), a folder of save_pretrained, or "
    "package.module:function"
)
WEIGHT_NAMES = ("imagenet", "tinyimagenet32")  # of the ResNets
PRETRAINED = "pretrained"  # the name of weights that a library brings
_OWN = "featcache.backbones.efficientnet_lite:"  # code of ours
# What a library looks up by name and cannot take for a path.
_PUBLIC = re.compile(r"(hf-hub:)?[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


@dataclass(frozen=True)
class BackboneName:
    """A backbone as it was asked for."""

    kind: str  # ``"resnet"``, one of `LIBRARIES`, ``"file"`` or ``"function"``
    rest: str  # within its kind: ``"resnet18"``, a path, ``"package.module:function"``

    @property
    def is_local(self) -> bool:
        """Whether it names something of the user's own: a file, a folder or code."""
        return self.kind in ("file", "function") or (self.kind == "hf" and _is_folder(self.rest))

    def brings_weights(self, name: object) -> bool:
        """Tell whether weights that a cache recorded under this name come with the backbone."""
        return self.kind in ("file", "function") or (self.kind != "resnet" and name == PRETRAINED)

    @property
    def stored(self) -> str:
        """The name that a cache records; of a file or folder without its place on this machine."""
        if self.kind == "file":
            return Path(self.rest).name
        if self.kind == "hf" and self.is_local:
            return f"hf:{Path(os.path.abspath(user_path(self.rest))).name}"
        return self.rest if self.kind in ("resnet", "function") else f"{self.kind}:{self.rest}"


def parse_backbone(text: str | Path) -> BackboneName:
    """Return what a name stands for; nothing is loaded."""
    words = str(text)
    if words in BACKBONES:
        return BackboneName("resnet", words)
    if user_path(words).suffix.lower() in GRAPH_SUFFIXES:
        return BackboneName("file", words)
    kind, colon, rest = words.partition(":")
    if colon and kind in LIBRARIES and rest:
        return BackboneName(kind, rest)
    if os.path.isfile(user_path(words) / "config.json"):
        return BackboneName("hf", words)
    if _FUNCTION.fullmatch(words):
        return BackboneName("function", words)
    raise RecipeError(
        f"backbone: expected {FORMS}, found '{one_line(words)}'"
        + did_you_mean(words, BACKBONES, "featcache backbones lists names")
    )


def did_you_mean_model(library: str, name: str, known: Iterable[str]) -> str:
    """Return the end of a message about a model that a library does not have."""
    otherwise = f"featcache backbones '{library}:*' lists names"
    return did_you_mean(name, known, otherwise, prefix=f"{library}:")


def recorded_backbone(name: object, where: str, sha256: object = None) -> str:
    """Return a name that a cache or head recorded, if loading it by itself is safe.

    A file may have been made by a stranger: it must not name code, or a file of this machine. The
    user's own network of that digest is found where an earlier command was given it.
    """
    own = remembered_file(sha256)
    if isinstance(name, str) and own and own.endswith(GRAPH_SUFFIXES):
        return own
    if isinstance(name, str) and name.startswith(_OWN):
        return name
    if isinstance(name, str) and (name in BACKBONES or name.startswith(_PREFIXES)):
        parsed = parse_backbone(name)
        # A folder is recorded without its place: hf:NAME, where the hub's are hf:ORG/NAME.
        public = parsed.kind == "resnet" or _PUBLIC.fullmatch(parsed.rest)
        if public and not parsed.is_local and (parsed.kind != "hf" or "/" in parsed.rest):
            return name
    raise RecipeError(
        f"{where}: expected a backbone of {', '.join(BACKBONES)} or of a library, found "
        f"'{one_line(name)}', which is a file or code of whoever made it; name it with --backbone"
    )


def recorded_weights(name: object, sha256: object = None) -> str | None:
    """Return weights that a cache or head recorded, by name or as the user's own file."""
    if isinstance(name, str) and (name in WEIGHT_NAMES or name.startswith(RANDOM)):
        return name
    return remembered_file(sha256)


def _is_folder(text: str) -> bool:
    return os.path.isdir(user_path(text))
