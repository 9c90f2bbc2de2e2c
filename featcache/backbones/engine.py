"""Engines run the backbone: uint8 pixels in, float32 features out.

NumPy crosses the border, tensors never do. OneFlow is the reference; any other
engine states its tolerance against it in a test.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import numpy as np

from ..errors import EngineUnavailableError, FeatcacheError, WeightsError
from ..preprocess import check_pixels, upscale
from ..progress import OnNote, silent
from .architectures import get_backbone
from .choice import INT8, EngineChoice, choose_engine
from .conversion import LEAST_COSINE, agreement, canonical_images
from .network import POOLED, filled_up, in_passes
from .reference import resnet_features
from .weights import Weights, images_per_pass


class Engine(Protocol):
    """What runs a backbone, for one caller at a time."""

    @property
    def batch_size(self) -> int:
        """Images per call that keep the device busy; any other number works too."""

    def extract(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Return the features of a batch at every cut, from one pass.

        Parameters
        ----------
        images : numpy.ndarray
            uint8 (N, s, s, 3), N >= 1, any strides: canonical pixels (s equal to the
            preprocessing's size), or smaller ones that the engine enlarges as
            `featcache.preprocess.upscale` does (`Preprocess.compact` makes both).

        Returns
        -------
        dict
            Cut -> float32 array: (N, D) for ``"avgpool"`` and ``"pooled"``, (N, C, H, W) for a
            stage, (N, T, D) for tokens.
            The arrays are the caller's own. An image gives the same bytes in every call,
            whichever images stand beside it.

        Raises
        ------
        ShapeMismatchError
            Another dtype or shape.
        """


def start(engine: Engine, images: np.ndarray) -> Callable[[], dict[str, np.ndarray]]:
    """Start a batch where an engine can; the function that is returned gives its features."""
    starter: Callable[[np.ndarray], Callable[[], dict[str, np.ndarray]]]
    starter = getattr(engine, "start", partial(partial, engine.extract))
    return starter(images)


def build_engine(
    choice: EngineChoice,
    weights: Weights,
    cuts: Sequence[str] = (POOLED,),
    *,
    n_images: int = 0,
    on_note: OnNote = silent,
) -> Engine:
    """Load the engine that was chosen, with these weights.

    It computes a few images first, which must be what the reference makes of them: NumPy of a
    ResNet (else FeatcacheError), the model's own library of a converted one (else
    EngineUnavailableError). WeightsError is raised where a ResNet gives NaN or infinity.
    """
    checked = tuple(weights.shapes(cuts))
    engine = _built(choice, weights, checked, n_images, on_note)
    if weights.network is None:
        _check_resnet(engine, choice, weights, checked)
    elif choice.name == "openvino":
        _check(engine, choice, weights, checked, on_note)
    return engine


def _built(
    choice: EngineChoice,
    weights: Weights,
    checked: tuple[str, ...],
    n_images: int,
    on_note: OnNote,
) -> Engine:
    if choice.name == "function":
        return FunctionEngine(weights, checked)
    if choice.name == "openvino":
        from .openvino_engine import OpenVinoEngine

        return OpenVinoEngine(weights, checked, choice.precision, choice.calibration)
    if choice.name == "torch":
        from .torch_engine import TorchEngine

        return TorchEngine(
            weights, checked, choice.device, choice.precision, n_images=n_images, on_note=on_note
        )
    from .oneflow_engine import OneFlowEngine

    return OneFlowEngine(weights, checked, choice.device, choice.precision)


# Up to this side in pixels one image takes NumPy about 3 s; at 224 it takes 0.3 s.
_CHECKED_SIZE = 512


def _check_resnet(
    engine: Engine, choice: EngineChoice, weights: Weights, cuts: tuple[str, ...]
) -> None:
    if weights.preprocess.size > _CHECKED_SIZE:
        return
    image = canonical_images(weights.preprocess.size)[:1]
    features = resnet_features(
        weights.state, get_backbone(weights.backbone), weights.preprocess, image[0]
    )
    reference = {cut: features[cut] for cut in cuts}
    if not all(np.isfinite(one).all() for one in features.values()):
        raise WeightsError(
            f"{weights.name}: expected weights that give finite features, found NaN or infinity; "
            "the file is damaged or its training diverged: give another checkpoint"
        )
    found = agreement(engine.extract(image), reference)
    if not found.cosine >= LEAST_COSINE[choice.precision]:
        raise FeatcacheError(
            f"{weights.backbone}: expected the features of {choice.name} in {choice.precision} to "
            f"be the network's, found {found} on a canonical image; use another --engine"
            + ("" if choice.precision == "f32" else ", or --precision f32")
        )


def _check(
    engine: Engine, choice: EngineChoice, weights: Weights, cuts: tuple[str, ...], on_note: OnNote
) -> None:
    assert weights.network is not None
    reference = weights.network.reference(cuts, images_per_pass(weights))
    if not reference:
        return
    found = agreement(engine.extract(canonical_images(weights.preprocess.size)), reference)
    if not found.cosine >= LEAST_COSINE[choice.precision]:
        raise EngineUnavailableError(
            f"{weights.backbone}: expected OpenVINO's features in {choice.precision} to be "
            f"PyTorch's, found {found} on canonical images; use --engine torch"
            + ("" if choice.precision == "f32" else ", or --precision f32")
        )
    if choice.precision != INT8:  # whose features are measured on the user's own images
        on_note(f"{weights.backbone}: OpenVINO agrees with PyTorch on canonical images ({found})")


class FunctionEngine:
    """A callable of the user's own: normalised float32 (N, 3, s, s) to arrays."""

    batch_size = 32

    def __init__(self, weights: Weights, cuts: tuple[str, ...]) -> None:
        self._weights = weights
        self._function: Any = weights.network
        self._cuts = cuts

    def extract(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Return the features of uint8 pixels (N, s, s, 3), as `Engine.extract` does."""
        preprocess = self._weights.preprocess
        check_pixels(images, preprocess)
        if images.shape[1] < preprocess.size:
            images = upscale(images, preprocess)
        scale = (1 / (np.array(preprocess.std) * 255)).astype(np.float32)
        shift = (np.array(preprocess.mean) * 255).astype(np.float32)

        def run(chunk: np.ndarray) -> list[np.ndarray]:
            filled = filled_up((chunk.astype(np.float32) - shift) * scale, self.batch_size)
            results = self._function(filled.transpose(0, 3, 1, 2))
            return [results[cut] for cut in self._cuts]

        return dict(zip(self._cuts, in_passes(images, self.batch_size, run), strict=True))


def settled(choice: EngineChoice, weights: Weights, cuts: Sequence[str]) -> EngineChoice:
    """Return the engine that will run: PyTorch where ``auto`` took OpenVINO, which cannot."""
    if weights.network is None or choice.name != "openvino":
        return choice
    problem = weights.network.graph_problem(tuple(weights.shapes(cuts)), images_per_pass(weights))
    if not problem:
        return choice
    if not choice.automatic:
        raise EngineUnavailableError(
            f"engine openvino: expected to convert {weights.backbone}, found: {problem}; use "
            "--engine torch"
        )
    instead = choose_engine("torch", "cpu", choice.precision)
    return replace(instead, why=f"{instead.why}: OpenVINO cannot run this model ({problem})")


def computed_by(choice: EngineChoice, weights: Weights) -> dict[str, Any]:
    """Return the fields of a cache's fingerprint that say what computes its features."""
    optional = {"library": weights.library, "calibration": choice.calibration_sha256}
    return {
        **{name: value for name, value in optional.items() if value},
        "backbone": weights.backbone,
        "device": choice.device,
        "engine": choice.name,
        "engine_version": choice.version,
        "precision": choice.precision,
        "preprocess": weights.preprocess.as_dict(),
        "weights_sha256": weights.sha256,
    }
