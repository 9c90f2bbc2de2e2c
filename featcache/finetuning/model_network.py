"""A library's model and a linear head on what it pools."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from ..backbones.network import POOLED
from ..backbones.weights import Weights
from ..errors import RecipeError
from ..frameworks import import_torch
from .adapters import Adapted, adapted_path, import_peft, linear_layers
from .blocks import frozen_modules, layers_of
from .network import Network, below
from .recipes import FinetuneRecipe, group_rates

torch = import_torch()

_BACKBONE, _HEAD = "backbone.", "head."


class ModelNetwork(Network):
    """A backbone of a library and a linear head, as `Network`, whose place it takes.

    A stage is a layer of `layers_of`. A part that is frozen is in eval mode. With adapters they
    alone train, and all else is in eval mode.
    """

    cuts = (POOLED,)
    _adapted: Adapted | None = None

    @property
    def rates(self) -> dict[str, float]:
        """The rate of each part that trains: the head, then layers from the last to the first."""
        trained = [stage for stage in self._layers if self.parameters(stage)]
        return group_rates(self._recipe, tuple(self._layers), trained)

    def parameters(self, stage: str) -> list[Any]:
        """Return the parameters of ``"head"`` or of a layer that train."""
        if stage == "head":
            return list(self.head.parameters())
        return [value for value in self._layers[stage] if value.requires_grad]

    def state(self) -> dict[str, np.ndarray]:
        """Return a copy of every tensor, adapters too."""
        arrays = self._framework.state_arrays
        parts = {_BACKBONE: arrays(self.backbone), _HEAD: arrays(self.head)}
        return {start + name: one for start, part in parts.items() for name, one in part.items()}

    def load(self, state: Mapping[str, np.ndarray]) -> None:
        """Load what `state` returned."""
        self._framework.load_arrays(self.backbone, below(_BACKBONE, state))
        self._framework.load_arrays(self.head, below(_HEAD, state))

    def checkpoint(self) -> dict[str, np.ndarray]:
        """Return the backbone's tensors by the library's names, with adapters added in."""
        model = self._adapted.merged() if self._adapted else self.backbone
        return self._framework.state_arrays(model)

    def drawing(self, step: int, rank: int) -> AbstractContextManager[Any]:
        """Return a context in which dropout draws from the seed, the step and the rank alone."""
        return self._seeded(np.random.SeedSequence((self._seed, step, rank)))

    @contextmanager
    def _seeded(self, seed: np.random.SeedSequence) -> Iterator[None]:
        devices = [torch.cuda.current_device()] if self._device == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(int(seed.generate_state(1)[0]))
            yield

    def _build(self, weights: Weights) -> tuple[Any, int]:
        network: Any = weights.network
        drawn = f"random:{self._seed}"
        if not self._recipe.pretrained and network.weights != drawn:
            network = replace(network, weights=drawn, _loaded=None, _facts=None)
        loaded = network.load()
        self._outputs = loaded.outputs
        model = copy.deepcopy(loaded.model)  # what is loaded stays as it is
        layers = layers_of(model)
        values = dict(model.named_parameters())
        recipe = self._recipe
        modules: set[str] = set()
        parameters: set[str] = set()
        if recipe.backbone_lr is None:
            modules, parameters = {path for path, _ in model.named_modules()}, set(values)
        elif recipe.freeze_until:
            modules, parameters = frozen_modules(model, recipe.freeze_until, weights.backbone)
        # Modules and not their paths, which adapters change.
        self._frozen = [model.get_submodule(path) for path in modules]
        for name, value in values.items():
            value.requires_grad_(name not in parameters and value.is_floating_point())
        self._layers = {stage: [values[name] for name in names] for stage, names in layers.items()}
        if recipe.lora is not None:
            paths = linear_layers(model, weights.backbone, modules)
            self._adapted = Adapted(model, paths, recipe.lora, self._seed)
            model = self._adapted.model
            layer_of = {name: stage for stage, names in layers.items() for name in names}
            self._layers = {stage: [] for stage in layers}
            for name, value in model.named_parameters():
                path = adapted_path(name)
                value.requires_grad_(bool(path))
                if path:
                    stage = next(it for one, it in layer_of.items() if one.startswith(f"{path}."))
                    self._layers[stage].append(value)
        self._leave_out_unused(model, weights)
        return model, pooled_length(weights)

    def _leave_out_unused(self, model: Any, weights: Weights) -> None:
        """Take the gradients from what the pooled output does not depend on.

        Such as a projection: PyTorch's processes would wait for its gradient.
        """
        trained = [value for value in model.parameters() if value.requires_grad]
        if not trained:
            return
        size = weights.preprocess.size
        model.eval()
        with torch.enable_grad():
            pooled = self._outputs(model, torch.zeros(1, 3, size, size))[POOLED]
            gradients = torch.autograd.grad(pooled.sum(), trained, allow_unused=True)
        for value, gradient in zip(trained, gradients, strict=True):
            value.requires_grad_(gradient is not None)

    def _freeze(self) -> str | None:
        return POOLED if self._recipe.backbone_lr is None else None

    def _set_train(self) -> None:
        self.head.train()
        self.backbone.train(self._adapted is None)
        for module in self._frozen:
            module.training = False

    def _run(self, x: Any, after: str | None, until: str | None) -> Any:
        return self._outputs(self.backbone, x)[POOLED] if after is None else x


def check_model_recipe(weights: Weights, recipe: FinetuneRecipe) -> None:
    """Refuse, before the long work, a recipe that does not fit a library's model."""
    pooled_length(weights)
    if not recipe.freeze_until and recipe.lora is None:
        return
    network: Any = weights.network
    model = network.load().model
    modules: set[str] = set()
    if recipe.freeze_until:
        modules, _ = frozen_modules(model, recipe.freeze_until, weights.backbone)
    if recipe.lora is not None:
        linear_layers(model, weights.backbone, modules)
        import_peft()


def has_statistics(weights: Weights) -> bool:
    """Tell whether a library's model has batch normalisation."""
    network: Any = weights.network
    return any(hasattr(module, "running_mean") for module in network.load().model.modules())


def pooled_length(weights: Weights) -> int:
    """Return the length of what the model pools; RecipeError where that is no vector."""
    network: Any = weights.network
    known = network.cut_shapes()
    if len(known.get(POOLED, ())) != 1:
        raise RecipeError(
            f"backbone {weights.backbone}: expected a pooled output (N, D) to train a head on, "
            f"found {', '.join(known)}; choose a model that pools, or probe this one with --cut"
        )
    return int(known[POOLED][0])
