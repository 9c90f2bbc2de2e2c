"""A written model against `featcache.predict`: the same images, in a child process."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import EngineUnavailableError, one_line
from ..new_images import PlacedImages, find_places
from ..process import last_line, run_in_child

if TYPE_CHECKING:
    from PIL import Image

N_IMAGES = 32
_TIMEOUT_S = 1800
_LARGEST = {"f32": 1e-3, "f16": 2e-2}  # difference of a probability that passes
_SIDES = (40, 400)  # pixels of the pieces of scikit-learn's photographs

# Runs the model on each image, and saves each output, joined along the images.
_RUN = """
import sys
import numpy as np
images = np.load(sys.argv[2])
if sys.argv[1].endswith(".onnx"):
    import onnxruntime
    session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
    name, outputs = session.get_inputs()[0].name, [one.name for one in session.get_outputs()]
    run = lambda pixels: session.run(outputs, {name: pixels})
else:
    sys.modules["openvino_telemetry"] = None
    import openvino
    model = openvino.Core().compile_model(sys.argv[1], "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    known = {"probabilities", "values", "features"}  # a tensor may have several names
    outputs = [(one.get_names() & known).pop() for one in model.outputs]
    run = lambda pixels: [model(pixels)[index] for index in range(len(outputs))]
results = [run(images[name]) for name in images.files]
np.savez(sys.argv[3], **{
    name: np.concatenate([one[index] for one in results]) for index, name in enumerate(outputs)
})
"""


@dataclass(frozen=True)
class Agreement:
    """How far a written model is from `predict`.

    Parameters
    ----------
    largest_difference : float
        Of a probability; of a head of numbers, of a value, relative to the largest of its target.
    feature_difference : float
        The largest of a feature, relative to the largest feature.
    n_images : int
        Images that both saw.
    images : str
        Which these are.
    """

    largest_difference: float
    feature_difference: float
    n_images: int
    images: str

    def problem(self, precision: str) -> str:
        """Return why the model is not good enough, or nothing."""
        most = _LARGEST[precision]
        found = float(np.max([self.largest_difference, self.feature_difference]))
        if found <= most:  # False for NaN, which np.max keeps
            return ""
        return f"a difference of {found:.2g}, above {most:g}"


def check_images(paths: Sequence[str | Path], max_pixels: int) -> tuple[list[Image.Image], str]:
    """Return images for the check, whole, and what they are: some of these, or of our own."""
    if not paths:
        return _photographs(), "pieces of the two photographs that come with scikit-learn"
    images = PlacedImages(find_places(paths), max_pixels)
    rows = np.unique(np.linspace(0, len(images) - 1, N_IMAGES).astype(int))
    # Their names alone: where they are on this machine is nobody's business.
    names = (str(path).rstrip("/").rpartition("/")[2] for path in paths)
    return [images.read(int(row)) for row in rows], ", ".join(names)


def _photographs() -> list[Image.Image]:
    """Cut pieces of many sizes out of the photographs that scikit-learn brings."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    photographs = load_sample_images().images
    generator = np.random.default_rng(0)
    pieces = []
    for number in range(N_IMAGES):
        photograph = photographs[number % len(photographs)]
        height, width = (int(one) for one in generator.integers(*_SIDES, 2))
        top = int(generator.integers(0, photograph.shape[0] - height))
        left = int(generator.integers(0, photograph.shape[1] - width))
        pieces.append(Image.fromarray(photograph[top : top + height, left : left + width]))
    return pieces


def answers(model: Path, images: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Return the outputs of a model, by name, of batches of images uint8 (n, H, W, 3)."""
    with tempfile.TemporaryDirectory(prefix="featcache-") as folder:
        given, found = Path(folder, "images.npz"), Path(folder, "answers.npz")
        np.savez(given, *images)
        child = run_in_child(
            _RUN, str(model.absolute()), str(given), str(found), timeout_s=_TIMEOUT_S
        )
        if child is None or child.returncode or not found.exists():
            said = "no end" if child is None else one_line(last_line(child))
            target = "ONNX Runtime" if model.suffix == ".onnx" else "OpenVINO"
            raise EngineUnavailableError(
                f"{model.name}: expected a model that {target} runs, found: {said}; no file is "
                "kept: choose another backbone, or another --to"
            )
        with np.load(found) as arrays:
            return {name: arrays[name] for name in arrays.files}


def compared(
    found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray], images: str
) -> Agreement:
    """Compare outputs (N, ...) by name with those expected, ``features`` and one more."""
    (name,) = expected.keys() - {"features"}
    scale = np.abs(expected[name]).max(axis=0) if name == "values" else np.ones(1)
    apart = np.abs(found[name] - expected[name]) / np.where(scale > 0, scale, 1)
    features = expected["features"]
    return Agreement(
        float(apart.max()),
        float(np.abs(found["features"] - features).max() / max(np.abs(features).max(), 1e-30)),
        len(features),
        images,
    )
