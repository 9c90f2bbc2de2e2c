"""Models of PyTorch's libraries and of the user's own functions, loaded when they are needed.

What an extraction must know before its long work (the digest of the weights, the shapes of the
features, the preprocessing) is remembered from the first time, so that a second run that has
nothing to do imports no framework.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import FeatcacheError, RecipeError, WeightsError, one_line
from ..files import user_path, write_atomically
from ..options import did_you_mean
from ..preprocess import Preprocess
from .architectures import RANDOM, random_seed
from .checkpoints import read_checkpoint
from .conversion import Conversion
from .libraries import Loaded, drop_pooler, library_version, load_model, weights_files
from .naming import LIBRARIES, BackboneName
from .network import Network, Shape, unknown_cut
from .pretrained import cache_folder


@dataclass(frozen=True)
class Facts:
    """What is known of a model without loading it."""

    sha256: str  # over its tensors
    library: str  # "timm 1.0.31"
    preprocess: Preprocess
    shapes: Mapping[str, Shape]
    n_parameters: int
    source: str
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return JSON types."""
        return {**vars(self), "preprocess": self.preprocess.as_dict()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Facts:
        """Return what `as_dict` wrote."""
        return cls(
            str(fields["sha256"]),
            str(fields["library"]),
            Preprocess.from_dict(fields["preprocess"]),
            {str(cut): tuple(map(int, shape)) for cut, shape in fields["shapes"].items()},
            int(fields["n_parameters"]),
            str(fields["source"]),
            tuple(map(str, fields["notes"])),
        )


@dataclass(eq=False)
class LibraryNetwork(Network):
    """A model that PyTorch runs, and OpenVINO by conversion."""

    name: BackboneName  # what was asked for
    weights: str | None  # a path, ``"random:SEED"``, or None for the library's own
    size: int | None  # side of the input in pixels; None for the model's own
    engines: tuple[str, ...] = ("torch", "openvino")
    preprocess: Preprocess | None = None  # what overrides the model's own
    built: Any = field(default=None, repr=False)  # what a function returned, if it was called
    _loaded: Any = field(default=None, repr=False)
    _facts: Facts | None = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the model itself behind on the way to another process, which loads it anew."""
        return {**vars(self), "built": None, "_loaded": None}

    def facts(self) -> Facts:
        """Return what is remembered of the model; load it where nothing is."""
        if self._facts is None:
            self._facts = self._remembered()
        if self._facts is None:
            self.load()
        assert self._facts is not None
        return self._facts

    def load(self) -> Any:
        """Return the `TorchNetwork`; build it, with its weights, the first time."""
        if self._loaded is None:
            loaded = self._build()
            from .torch_network import TorchNetwork, first_broken, model_digest

            broken = first_broken(loaded.model)
            if broken:
                raise WeightsError(
                    f"{self.name.stored}: expected finite numbers, found NaN or infinity in "
                    f"'{one_line(broken)}'; give other weights"
                )
            size = self.size or loaded.preprocess.size
            network = TorchNetwork(self.name.stored, loaded.model, loaded.outputs, size)
            facts = Facts(
                model_digest(loaded.model),
                self._library(),
                loaded.preprocess,
                network.cut_shapes(),
                network.n_parameters(),
                loaded.source,
                loaded.notes,
            )
            if self._facts is not None and self._facts.sha256 != facts.sha256:
                self._memo().unlink(missing_ok=True)
                raise WeightsError(
                    f"{self.name.stored}: expected weights {self._facts.sha256[:8]}, found "
                    f"{facts.sha256[:8]}: they changed since the last run; run the same command "
                    "again for a cache of the new ones"
                )
            self._facts, self._loaded = facts, network
            self._remember(facts)
        return self._loaded

    def shapes(self, cuts: Sequence[str]) -> dict[str, Shape]:
        """Return the shape of one image's features at each cut."""
        known = self.facts().shapes
        if all(cut in known for cut in cuts):
            return {cut: known[cut] for cut in cuts}
        shapes: dict[str, Shape] = self.load().shapes(cuts)
        return shapes

    def cut_shapes(self) -> dict[str, Shape]:
        """Return the model's own outputs, and its stages and blocks."""
        return dict(self.facts().shapes)

    def n_parameters(self) -> int:
        """Return how many numbers the weights have."""
        return self.facts().n_parameters

    def module(self, cuts: Sequence[str]) -> Any:
        """Return a module from normalised float32 (N, 3, s, s) to a list of float32 (N, ...)."""
        return self.load().module(cuts)

    def graph(self, cuts: Sequence[str], batch: int) -> Any:
        """Return an OpenVINO model: float32 (batch, 3, s, s) -> one output per cut."""
        return self._conversion(cuts, batch).graph()

    def graph_problem(self, cuts: Sequence[str], batch: int) -> str:
        """Return why the model cannot be converted, or nothing; converts it the first time."""
        return self._conversion(cuts, batch).problem()

    def reference(self, cuts: Sequence[str], batch: int) -> dict[str, np.ndarray]:
        """Return PyTorch's features of the canonical images."""
        return self._conversion(cuts, batch).reference()

    def _conversion(self, cuts: Sequence[str], batch: int) -> Conversion:
        facts = self.facts()
        key = {"sha256": facts.sha256, "library": facts.library, "backbone": self.name.stored}
        preprocess = self.preprocess or facts.preprocess
        return Conversion(key, lambda: self.module(cuts), cuts, batch, preprocess)

    def _build(self) -> Loaded:
        if self.name.kind == "function":
            # Used once: weights that are drawn or loaded into it are this network's alone.
            built, self.built = self.built, None
            built = build_function(self.name.rest) if built is None else built
            preprocess, notes = function_preprocess(built, self.name.rest)
            loaded = Loaded(built, function_outputs, preprocess, (), self.name.rest, notes)
        else:
            pretrained = self.weights is None
            loaded = load_model(
                self.name.kind, self.name.rest, pretrained=pretrained, size=self.size
            )
        if self.weights is None:
            return loaded
        from .torch_network import draw_weights, load_strictly

        if self.weights.startswith(RANDOM):
            draw_weights(loaded.model, random_seed(self.weights))
            source = f"random weights, seed {random_seed(self.weights)}"
        else:
            state = read_checkpoint(user_path(self.weights)).state
            if self.name.kind == "hf" and not any("pooler" in name for name in state):
                drop_pooler(loaded.model)
            load_strictly(loaded.model, state, loaded.head, self.weights)
            source = self.weights
        return replace(loaded, source=source)

    def _library(self) -> str:
        if self.name.kind == "function":
            return f"{self.name.rest} {_source_digest(self.name.rest)[:16]}"
        return library_version(self.name.kind)

    def _memo(self) -> Path:
        """Return where the facts are remembered; the name changes with all that may change them."""
        files = weights_files(self.name.kind, self.name.rest)
        if self.weights is not None and not self.weights.startswith(RANDOM):
            files = [user_path(self.weights), *files]
        stats = []
        for path in files:
            status = os.stat(path)
            stats.append([str(path.absolute()), status.st_size, status.st_mtime_ns])
        asked = [self.name.kind, self.name.rest, self.weights, self.size, self._library(), stats]
        digest = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
        return cache_folder().parent / "backbones" / f"{digest[:32]}.json"

    def _remembered(self) -> Facts | None:
        if self.name.kind == "function":
            return None  # code may do anything
        try:
            return Facts.from_dict(json.loads(self._memo().read_bytes()))
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return None

    def _remember(self, facts: Facts) -> None:
        if self.name.kind == "function":
            return
        with suppress(OSError):  # it is computed again the next time
            write_atomically(self._memo(), json.dumps(facts.as_dict()).encode())


def resolve_function(name: str) -> Callable[[], Any]:
    """Import ``package.module:function``; modules of the working folder count too."""
    module_name, _, attribute = name.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), attribute)
    except (Exception, SystemExit) as error:  # a user's module raises what it likes
        raise RecipeError(
            f"backbone {name}: expected a function that can be imported, found "
            f"{type(error).__name__}: {one_line(error)}"
            + did_you_mean(module_name, LIBRARIES, "check the name, and PYTHONPATH")
        ) from error
    finally:
        sys.path.remove(os.getcwd())
    if not callable(function):
        raise RecipeError(
            f"backbone {name}: expected a function, found {type(function).__name__}; name one "
            "that returns a torch.nn.Module"
        )
    return function


def build_function(name: str) -> Any:
    """Call the function, and return the network or callable that it returns."""
    try:
        built = resolve_function(name)()
    except FeatcacheError:
        raise
    except (Exception, SystemExit) as error:
        raise RecipeError(
            f"backbone {name}: expected a torch.nn.Module or a callable, found "
            f"{type(error).__name__}: {one_line(error)}; call the function in Python to see why"
        ) from error
    if not callable(built):
        raise RecipeError(
            f"backbone {name}: expected it to return a torch.nn.Module, or a callable from float32 "
            f"(N, 3, H, W) to arrays, found {type(built).__name__}"
        )
    return built


def is_module(built: Any) -> bool:
    """Tell whether an object is a torch.nn.Module, without importing PyTorch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(built, torch.nn.Module)


def function_preprocess(built: Any, name: str) -> tuple[Preprocess, tuple[str, ...]]:
    """Return the ``preprocess`` attribute (fields of `Preprocess`) of what a function returned."""
    fields = getattr(built, "preprocess", None)
    if fields is None:
        note = (
            f"{name} says nothing of its images (an attribute preprocess would): 224 pixels, "
            "ImageNet's mean and standard deviation; override with --size, --mean and --std"
        )
        return Preprocess(), (note,)
    if isinstance(fields, Preprocess):
        return fields, ()
    try:
        return Preprocess(**dict(fields)), ()
    except (TypeError, ValueError) as error:
        raise RecipeError(
            f"backbone {name}: expected fields of Preprocess in its attribute preprocess, found "
            f"{one_line(error)}"
        ) from None


def function_outputs(model: Any, x: Any) -> Mapping[str, Any]:
    """Name the outputs of a module: a mapping's own, (N, D) pooled, (N, T, D) tokens, else map."""
    result = model(x)
    if isinstance(result, Mapping):
        return {str(name): value for name, value in result.items()}
    if not hasattr(result, "ndim"):
        raise RecipeError(
            "backbone: expected the network to return an array (N, ...) or a mapping of arrays, "
            f"found {type(result).__name__}; wrap it in a function that does"
        )
    return {{2: "pooled", 3: "tokens"}.get(result.ndim, "map"): result}


def _source_digest(name: str) -> str:
    """Return SHA-256 (hex) of the module's source, or its ``fingerprint`` attribute."""
    function = resolve_function(name)
    said = getattr(function, "fingerprint", None)
    if isinstance(said, str):
        return hashlib.sha256(said.encode()).hexdigest()
    try:
        path = inspect.getsourcefile(inspect.unwrap(function))
        return hashlib.sha256(Path(path or "").read_bytes()).hexdigest()
    except (OSError, TypeError):
        return hashlib.sha256(name.encode()).hexdigest()


class FunctionNetwork(Network):
    """A callable from normalised float32 (N, 3, s, s) to an array, or to a mapping of arrays."""

    engines = ("function",)

    def __init__(self, name: str, built: Callable[[np.ndarray], Any], size: int) -> None:
        self._name = name
        self._built = built
        self._size = size
        said = getattr(built, "fingerprint", "")
        self.sha256 = hashlib.sha256(f"{_source_digest(name)} {said}".encode()).hexdigest()

    def shapes(self, cuts: Sequence[str]) -> dict[str, Shape]:
        """Return the shape of one image's features at each cut."""
        known = self.cut_shapes()
        for cut in cuts:
            if cut not in known:
                raise unknown_cut(cut, list(known), self._name)
        return {cut: known[cut] for cut in cuts}

    def cut_shapes(self) -> dict[str, Shape]:
        """Return the function's outputs."""
        results = self(np.zeros((1, 3, self._size, self._size), np.float32))
        return {name: value.shape[1:] for name, value in results.items()}

    def __call__(self, x: np.ndarray) -> dict[str, np.ndarray]:
        """Return float32 (N, ...) by cut."""
        try:
            results = function_outputs(self._built, x)
            found = {cut: np.asarray(value, np.float32) for cut, value in results.items()}
        except FeatcacheError:
            raise
        except Exception as error:
            raise RecipeError(
                f"backbone {self._name}: expected arrays for float32 {x.shape}, found "
                f"{type(error).__name__}: {one_line(error)}"
            ) from error
        for cut, value in found.items():
            if value.ndim < 2 or len(value) != len(x) or not value.size:
                raise RecipeError(
                    f"backbone {self._name}: expected {len(x)} rows for {len(x)} images, found "
                    f"{cut!r} of shape {value.shape}"
                )
        return found

    def n_parameters(self) -> int:
        """Return 0: nobody knows."""
        return 0

    def module(self, cuts: Sequence[str]) -> Any:
        """Raise RecipeError: a function is not a module."""
        raise RecipeError(
            f"backbone {self._name}: expected a torch.nn.Module for this, found a callable"
        )
