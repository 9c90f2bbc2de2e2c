"""Where the ImageNet weights come from, and how a file is verified.

A file with a published checksum must have it. One without is pinned on first
use: its digest goes into ``<file>.sha256`` beside it, in the format of
``sha256sum``, and from then on a file that differs is refused.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..download import NetworkError, download, file_digest
from ..errors import OutputError, WeightsError, one_line
from ..files import write_atomically
from ..progress import OnProgress
from .tensors import MAX_BYTES


@dataclass(frozen=True)
class Source:
    """One place that publishes a checkpoint."""

    url: str  # its address
    file_name: str  # its name in the cache folder
    sha256: str | None  # the published digest; None where there is none
    provenance: str  # who trained it on what, and under which licence it is given away


def _torchvision(backbone: str, weights: str, sha256: str) -> Source:
    # torchvision publishes the first 8 digits of the checksum, in the name.
    file_name = f"{backbone}-{sha256[:8]}.pth"
    url = f"https://download.pytorch.org/models/{file_name}"
    return Source(url, file_name, sha256, f"torchvision's {weights}.IMAGENET1K_V1, BSD-3-Clause")


def _flowvision(backbone: str) -> Source:
    return Source(
        "https://oneflow-public.oss-cn-beijing.aliyuncs.com/model_zoo/flowvision/classification/"
        f"ResNet/{backbone}.zip",
        f"{backbone}.zip",
        None,
        f"flowvision's {backbone}, trained on ImageNet-1k",
    )


# Tried in this order.
IMAGENET: Mapping[str, Sequence[Source]] = {
    backbone: (_torchvision(backbone, weights, sha256), _flowvision(backbone))
    for backbone, weights, sha256 in (
        (
            "resnet18",
            "ResNet18_Weights",
            "f37072fd47e89c5e827621c5baffa7500819f7896bbacec160b1a16c560e07ec",
        ),
        (
            "resnet34",
            "ResNet34_Weights",
            "b627a593bcbe140c234610266fe4f8ae95ea42fc881d091c9b6052e6b1d0590f",
        ),
        (
            "resnet50",
            "ResNet50_Weights",
            "0676ba61b6795bbe1773cffd859882e5e297624d384b6993f7c9e683e722fb8a",
        ),
    )
}


def cache_folder() -> Path:
    """Return the folder of downloaded weights.

    ``$FEATCACHE_WEIGHTS``, else ``featcache/weights`` in ``$XDG_CACHE_HOME``, else in
    ``~/.cache``.
    """
    chosen = os.environ.get("FEATCACHE_WEIGHTS")
    return Path(chosen).expanduser() if chosen else user_cache() / "featcache" / "weights"


def source_urls() -> list[str]:
    """Return the addresses that ImageNet weights may be fetched from."""
    return [source.url for sources in IMAGENET.values() for source in sources]


def imagenet_is_here(backbone: str) -> bool:
    """Tell whether a ResNet's ImageNet weights need no download."""
    folders = (cache_folder(), torch_hub_folder())
    return any(
        _is_file(folder / source.file_name) for source in IMAGENET[backbone] for folder in folders
    )


def find(
    backbone: str, folder: Path, sources: Mapping[str, Sequence[Source]], on_progress: OnProgress
) -> tuple[Path, Source]:
    """Find a checkpoint on this machine, or else fetch it.

    Looks in ``folder``, then where PyTorch Hub keeps its downloads (a copy there counts only
    with the published checksum), then on the network.
    """
    candidates = sources.get(backbone, ())
    if not candidates:
        raise WeightsError(
            f"imagenet: expected {' or '.join(sources)}, found {backbone!r}, of which no "
            f"checksummed download is known; give a path: --weights {backbone}.pth"
        )
    for source in candidates:
        if _is_file(folder / source.file_name):
            return folder / source.file_name, source
        shared = torch_hub_folder() / source.file_name
        if source.sha256 and _is_file(shared) and file_digest(shared) == source.sha256:
            return shared, source
    unreachable = []
    for source in candidates:
        try:
            return _fetch(source, folder, f"{backbone} ImageNet weights", on_progress), source
        except WeightsError as failure:
            # Only a dead network is a reason to ask elsewhere; wrong bytes are not.
            if not isinstance(failure.__cause__, NetworkError):
                raise
            unreachable.append(f"{source.url}: {failure.__cause__}")
    first = candidates[0]
    own = backbone in IMAGENET  # the starter weights are of a ResNet
    instead = "tinyimagenet32, which comes with featcache but is far weaker" if own else "random:0"
    raise WeightsError(
        f"{'imagenet' if own else f'flowvision:{backbone}'}: no source can be reached "
        f"({'; '.join(unreachable)}); put {first.file_name} "
        f"(sha256 {first.sha256 or 'unpublished'}) into {folder} by hand, or use --weights "
        f"{instead}, or the path of a checkpoint"
    )


def check_digest(path: Path, source: Source, digest: str) -> None:
    """Refuse a file that is not the published or pinned one."""
    pin = _pin_path(path)
    expected = source.sha256 or _pinned(pin)
    if expected in (None, digest):
        return
    if source.sha256:
        advice = f"delete {path} to download it again"
    else:
        advice = f"delete {path} to download it again, or {pin} if this change is wanted"
    raise WeightsError(f"{path}: expected sha256 {expected}, found {digest}; {advice}")


def pin_digest(path: Path, source: Source, digest: str) -> None:
    """Remember the digest of a file that has no published one, the first time."""
    pin = _pin_path(path)
    if source.sha256 or pin.exists():
        return
    try:
        write_atomically(pin, f"{digest}  {path.name}\n".encode())
    except OutputError as failure:
        raise WeightsError(
            f"{failure}; {path.name} has no published checksum, and its own must be kept"
        ) from failure


def _fetch(source: Source, folder: Path, stage: str, on_progress: OnProgress) -> Path:
    path = folder / source.file_name
    pinned = None if source.sha256 else _pinned(_pin_path(path))
    try:
        return download(
            source.url,
            path,
            sha256=source.sha256 or pinned,
            max_bytes=MAX_BYTES,
            error=WeightsError,
            on_progress=on_progress,
            stage=stage,
        )
    except WeightsError as failure:
        match failure.__cause__:
            case NetworkError():
                raise
            case OSError():
                advice = "$FEATCACHE_WEIGHTS names the folder"
            case _ if pinned:
                advice = f"delete {_pin_path(path)} if this change is wanted"
            case _:
                raise
        raise WeightsError(f"{failure}; {advice}") from failure


def _is_file(path: Path) -> bool:
    try:
        return path.is_file() and os.access(path, os.R_OK)
    except OSError:  # a folder on the way is not ours to look into
        return False


def _pin_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _pinned(pin: Path) -> str | None:
    if not pin.exists():
        return None
    try:
        text = pin.read_text("ascii", "replace")
    except OSError as failure:
        raise WeightsError(
            f"{pin}: cannot be read ({failure.strerror}); check its permissions"
        ) from failure
    digest = re.match(r"[0-9a-f]{64}\b", text)
    if not digest:
        raise WeightsError(
            f"{pin}: expected a sha256, found '{one_line(text)}'; delete it to pin the present file"
        )
    return digest[0]


def user_cache() -> Path:
    """Return the folder of what programs can make or fetch again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()


def torch_hub_folder() -> Path:
    """Return where PyTorch Hub and torchvision keep their downloads."""
    home = os.environ.get("TORCH_HOME")
    return (Path(home).expanduser() if home else user_cache() / "torch") / "hub" / "checkpoints"
