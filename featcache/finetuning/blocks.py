"""The blocks of a library's model in the order of their definition, from pixels to features.

Freezing and layer-wise rates count in them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import RecipeError
from ..frameworks import import_torch

nn: Any = import_torch().nn

STEM = "stem"
_LISTED = 40  # blocks in a message


def blocks_of(model: Any) -> list[str]:
    """Return the paths of the blocks: the members of the outermost lists of modules.

    Without such a list they are the model's own parts.
    """
    return _inside(model, "")


def _inside(module: Any, path: str) -> list[str]:
    parts = [
        (f"{path}.{name}".lstrip("."), part, _size(part))
        for name, part in module.named_children()
        if _size(part)
    ]
    if isinstance(module, (nn.Sequential, nn.ModuleList)):
        return [place for place, _, _ in parts]
    lists = [one for one in parts if isinstance(one[1], (nn.Sequential, nn.ModuleList))]
    half = _size(module) / 2
    if sum(size for _, _, size in lists) < half:  # a small list may be a classifier's
        for place, part, size in parts:
            blocks = _inside(part, place) if size >= half else []
            if len(blocks) > 1:  # an encoder that holds the list
                return blocks
    if lists:
        return [block for place, part, _ in lists for block in _inside(part, place)]
    return [place for place, _, _ in parts]


def _size(module: Any) -> int:
    return sum(int(value.numel()) for value in module.parameters())


def layers_of(model: Any) -> dict[str, list[str]]:
    """Return the parameters of each layer by name, the first layer first.

    A model of timm has groups of its own. Of any other each block is a layer, with what comes
    after it; what comes before the first is the stem.
    """
    if hasattr(model, "group_matcher"):
        return _timm_groups(model)
    blocks = blocks_of(model)
    layers: dict[str, list[str]] = {}
    last = STEM
    for name, _ in model.named_parameters():
        last = next((one for one in blocks if name.startswith(f"{one}.")), last)
        layers.setdefault(last, []).append(name)
    return layers


def _timm_groups(model: Any) -> dict[str, list[str]]:
    from timm.models import group_parameters

    groups = group_parameters(model, model.group_matcher(coarse=False))
    layers: dict[str, list[str]] = {}
    for index, names in sorted(groups.items()):
        name = _common_path(names) if index else STEM
        layers[name if name not in layers else f"{name} {index}"] = list(names)
    return layers


def _common_path(names: Sequence[str]) -> str:
    """Return the path that parameters share; a final norm among them, as timm groups it, aside."""
    first = names[0].split(".")[:-1] or [names[0]]
    for name in names[1:]:
        parts = name.split(".")
        if parts[0] == first[0]:
            same = [one == other for one, other in zip(first, parts, strict=False)]
            first = first[: same.index(False) if False in same else len(same)]
    return ".".join(first)


def frozen_modules(model: Any, block: str, backbone: str) -> tuple[set[str], set[str]]:
    """Return the modules up to and including a block, and the parameters that they hold.

    Modules around the block, which also hold what comes after it, are not among the modules; their
    own parameters, such as a class token, are among the parameters.
    """
    paths = [path for path, _ in model.named_modules()]
    inside = [at for at, path in enumerate(paths) if f"{path}.".startswith(f"{block}.")]
    if not inside or not _size(model.get_submodule(block)):
        blocks = blocks_of(model)
        shown = ", ".join(blocks[:_LISTED]) + (" ..." if len(blocks) > _LISTED else "")
        raise RecipeError(
            f"freeze until: expected a block of {backbone} ({shown}), found {block!r}; name one"
        )
    before = paths[: inside[-1] + 1]
    modules = {path for path in before if path and not block.startswith(f"{path}.")}
    parameters = {
        f"{path}.{name}".lstrip(".")
        for path in before
        for name, _ in model.get_submodule(path).named_parameters(recurse=False)
    }
    return modules, parameters
