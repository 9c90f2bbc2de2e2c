"""LoRA by peft: small matrices beside the linear layers (Hu et al., ICLR 2022)."""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
import re
from collections.abc import Collection
from typing import Any

from ..errors import EngineUnavailableError, RecipeError, one_line
from ..frameworks import import_torch
from ..process import ctrl_c_later

torch = import_torch()
nn: Any = torch.nn

_NAME = "default"  # peft's name of an adapter
_MARK = ".lora_"  # in the names of its tensors


def import_peft() -> Any:
    """Import peft, or raise EngineUnavailableError."""
    try:
        importlib.metadata.version("peft")
        with ctrl_c_later():
            return importlib.import_module("peft")
    except Exception as error:  # a build for another PyTorch raises what it likes
        missing = isinstance(error, importlib.metadata.PackageNotFoundError)
        found = "that it is not installed" if missing else one_line(error)
        raise EngineUnavailableError(
            f"lora: expected the package peft, found {found}; run pip install 'featcache[lora]'"
        ) from None


def linear_layers(model: Any, backbone: str, frozen: Collection[str] = ()) -> list[str]:
    """Return the paths of the linear layers outside frozen modules; of attention in one piece."""
    attentions = [p for p, one in model.named_modules() if isinstance(one, nn.MultiheadAttention)]
    paths = attentions + [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and path.rpartition(".")[0] not in attentions
    ]
    found = [path for path in paths if path and path not in frozen]
    if not found:
        convolutions = sum(isinstance(one, nn.Conv2d) for one in model.modules())
        raise RecipeError(
            f"lora: expected linear layers that may train in {backbone}, found none "
            f"({convolutions} convolutions, {len(paths)} frozen linear layers); leave out --lora"
        )
    return found


class Adapted:
    """A model with adapters, which starts as what it was: B is zero, A is drawn with the seed."""

    def __init__(self, model: Any, paths: Collection[str], rank: int, seed: int) -> None:
        peft = import_peft()
        config = peft.LoraConfig(
            r=rank,
            lora_alpha=rank,  # W + B A
            target_modules="|".join(map(re.escape, paths)),
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._tuner = peft.LoraModel(model, config, _NAME)
        self.model = self._tuner.model

    def merged(self) -> Any:
        """Return a copy of the model with the adapters added to its weights."""
        return copy.deepcopy(self._tuner).merge_and_unload()


def adapted_path(name: str) -> str:
    """Return the path of the module that a parameter of an adapter belongs to; else nothing."""
    path, mark, _ = name.partition(_MARK)
    return path.replace(".base_layer", "") if mark else ""  # peft's name of what it wraps
