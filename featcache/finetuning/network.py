"""A backbone and its head, cut where training begins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..backbones.architectures import CUTS, Backbone, get_backbone
from ..backbones.weights import Weights
from ..sampling import initial_head
from .batches import Movement, move
from .framework import Framework
from .processes import Processes
from .recipes import STAGES, FinetuneRecipe, frozen_cut, group_rates

HeadArrays = tuple[np.ndarray, np.ndarray]

# Makes this draw differ from those of `featcache.sampling`, whose keys are shorter.
_BACKBONE_KEY = (0, 0, 1)


class Network:
    """A backbone and a linear head; the recipe says which parts train.

    The head starts from ``head``, by default as `featcache.sampling.initial_head` draws it.
    Everything up to the cut ``cut`` is frozen.
    """

    def __init__(
        self,
        framework: Framework,
        weights: Weights,
        n_classes: int,
        recipe: FinetuneRecipe,
        *,
        device: str,
        seed: int,
        compiled: bool = False,
        head: HeadArrays | None = None,
        processes: Processes | None = None,
    ) -> None:
        self._framework = framework
        self._flow = flow = framework.module
        self._preprocess = weights.preprocess
        self._device = device
        self._recipe = recipe
        architecture = get_backbone(weights.backbone)
        state = weights.state if recipe.pretrained else initial_backbone(architecture, seed)
        self.backbone = framework.build_backbone(architecture)
        framework.load_arrays(self.backbone, _split(state)[0])
        weight, bias = head or initial_head(n_classes, architecture.feature_dim, seed)
        self.head = flow.nn.Linear(architecture.feature_dim, n_classes)
        framework.load_arrays(self.head, {"weight": weight, "bias": bias})
        framework.prepare(self.backbone, device)
        self.backbone.to(device)
        self.head.to(device)
        self.cut = frozen_cut(recipe)
        for stage, modules in self._modules().items():
            for module in modules:
                for parameter in module.parameters():
                    parameter.requires_grad = stage in self.trained
        self._score = self._head_scores
        if compiled and framework.compiled is not None:
            self._score = framework.compiled(self._head_scores)
        self._training_score = self._score
        if processes is not None and processes.size > 1:
            self._training_score = processes.wrap(self._as_module(), device)
        self.eval()

    @property
    def trained(self) -> tuple[str, ...]:
        """The parts that train: ``"head"`` first, then stages from the last to the first."""
        return tuple(group_rates(self._recipe))

    def parameters(self, stage: str) -> list[Any]:
        """Return the parameters of ``"head"`` or of a stage."""
        return [value for module in self._modules()[stage] for value in module.parameters()]

    def train(self) -> None:
        """Set train mode; frozen parts, and the statistics with bn "eval", stay in eval mode."""
        for stage, modules in self._modules().items():
            for module in modules:
                module.train(stage in self.trained)
        if self._recipe.bn == "eval":
            for module in self.backbone.modules():
                if hasattr(module, "running_mean"):
                    module.eval()

    def eval(self) -> None:
        """Set eval mode."""
        self.backbone.eval()
        self.head.eval()

    def to_device(
        self, inputs: np.ndarray, start: str | None, movement: Movement | None = None
    ) -> Any:
        """Copy a batch to the device.

        With ``start`` None these are uint8 pixels (N, s, s, 3), moved as ``movement`` says and
        normalised; else float32 features at the cut ``start``.
        """
        if start is not None:
            return self._framework.to_device(inputs, self._device)
        planes = self._framework.to_device(inputs.transpose(0, 3, 1, 2), self._device)
        if movement is not None:
            places = [self._framework.to_device(array, self._device) for array in movement]
            planes = move(self._flow, planes, *places)
        return self._framework.to_input(planes, self._preprocess)

    def scores(self, x: Any, start: str | None) -> Any:
        """Return the class scores, a tensor (N, K), of what `to_device` returned."""
        if _place(start) < _place(self.cut):
            with self._flow.no_grad():
                x = self._run(x, start, self.cut)
            start = self.cut
        return (self._training_score if self.head.training else self._score)(x, start)

    def state(self) -> dict[str, np.ndarray]:
        """Return a copy of every tensor by torchvision's name, the head as ``fc``."""
        arrays = self._framework.state_arrays
        head = {f"fc.{key}": value for key, value in arrays(self.head).items()}
        return {**arrays(self.backbone), **head}

    def load(self, state: Mapping[str, np.ndarray]) -> None:
        """Load what `state` returned."""
        backbone, head = _split(state)
        self._framework.load_arrays(self.backbone, backbone)
        self._framework.load_arrays(self.head, head)

    def _as_module(self) -> Any:
        """Return a module of the framework whose forward pass is ours."""
        base: Any = self._flow.nn.Module
        network = self

        class Scoring(base):
            def __init__(self) -> None:
                super().__init__()
                self.backbone, self.head = network.backbone, network.head

            def forward(self, x: Any, start: str | None) -> Any:
                return network._head_scores(x, start)

        return Scoring()

    def _head_scores(self, x: Any, start: str | None) -> Any:
        return self.head(self._run(x, start, CUTS[-1]))

    def _run(self, x: Any, after: str | None, until: str | None) -> Any:
        """Run the parts of the backbone after one cut up to and including another."""
        net = self.backbone
        if after is None:
            x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
        for cut in CUTS[_place(after) : _place(until)]:
            x = getattr(net, cut)(x)
        return self._flow.flatten(x, 1) if until == CUTS[-1] else x

    def _modules(self) -> dict[str, tuple[Any, ...]]:
        net = self.backbone
        stages = {stage: (getattr(net, stage),) for stage in STAGES[1:]}
        return {"head": (self.head,), "stem": (net.conv1, net.bn1), **stages}


def initial_backbone(backbone: Backbone, seed: int) -> dict[str, np.ndarray]:
    """Draw a backbone to train from scratch, the same for every framework.

    Convolutions are normal with variance 2 / (k * k * outputs), as in torchvision and flowvision
    (He et al., "Delving Deep into Rectifiers", ICCV 2015). Batch normalisation starts as the
    identity.
    """
    generator = np.random.default_rng((seed, *_BACKBONE_KEY))
    state: dict[str, np.ndarray] = {}
    for name, shape in backbone.shapes().items():
        if len(shape) == 4:
            scale = np.float32(np.sqrt(2 / (shape[0] * shape[2] * shape[3])))
            state[name] = scale * generator.standard_normal(shape, np.float32)
        elif not shape:
            state[name] = np.zeros((), np.int64)
        else:
            filled = np.ones if name.endswith(("weight", "running_var")) else np.zeros
            state[name] = filled(shape, np.float32)
    return state


def _split(
    state: Mapping[str, np.ndarray],
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return the tensors of the backbone, and those of the head by its own names."""
    backbone = {key: value for key, value in state.items() if not key.startswith("fc.")}
    head = {key.removeprefix("fc."): state[key] for key in state if key.startswith("fc.")}
    return backbone, head


def _place(cut: str | None) -> int:
    """Return how many cuts lie at or before this one: 0 for the pixels."""
    return 0 if cut is None else 1 + CUTS.index(cut)
