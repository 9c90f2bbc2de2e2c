"""What many tests share: small real data, a fake engine, a place for caches."""

from __future__ import annotations

import numpy_first  # noqa: F401

# isort: split
import os
import signal
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from featcache.frameworks import oneflow_status, torch_status

# What the terminal of whoever runs the tests is like; rich asks when it is imported.
for variable in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
    os.environ.pop(variable, None)
# A shell without job control starts what it puts into the background deaf to Ctrl-C.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

SHARED = Path(__file__).resolve().parents[2] / "shared"
CIFAR_ZIP = SHARED / "data" / "cifar10-jpeg.zip"
REFERENCE = SHARED / "weights" / "reference_features.npz"
# The engines that train: tests of training run in each, where it is installed.
TRAINERS = (
    pytest.param("oneflow", marks=pytest.mark.oneflow),
    pytest.param("torch", marks=pytest.mark.torch),
)


def pytest_collection_modifyitems(items):
    """Skip, with the reason, what needs a framework on a machine that does not have it.

    And give the slow ones their time: pyproject.toml's is that of the others.
    """
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(1200))
    for name, (version, why) in (("oneflow", oneflow_status()), ("torch", torch_status())):
        if version is None:
            for item in items:
                if item.get_closest_marker(name):
                    item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Keep every default folder of a test inside its temporary folder."""
    monkeypatch.setenv("FEATCACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("FEATCACHE_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("FEATCACHE_WEIGHTS", str(tmp_path / "weights"))
    return tmp_path


@pytest.fixture(scope="session")
def cifar_zip():
    """All of CIFAR-10 as JPEG files, where the machine has it."""
    if not CIFAR_ZIP.exists():
        pytest.skip(f"{CIFAR_ZIP} is not on this machine")
    return CIFAR_ZIP


@pytest.fixture(scope="session")
def reference():
    """Features of 64 real images, computed independently of featcache and of OneFlow."""
    if not REFERENCE.exists() or not CIFAR_ZIP.exists():
        pytest.skip(f"{REFERENCE} or {CIFAR_ZIP} is not on this machine")
    stored = np.load(REFERENCE)
    with zipfile.ZipFile(CIFAR_ZIP) as archive:
        files = [archive.read(str(name)) for name in stored["names"]]
    return files, stored["features"]


def colour_image(class_index: int, seed: int, size: tuple[int, int] = (40, 32)) -> Image.Image:
    """Draw noise around a colour of its class: a class that a linear head can learn."""
    generator = np.random.default_rng((class_index, seed))
    centre = np.array([[200, 60, 60], [60, 200, 60], [60, 60, 200]][class_index])
    noise = generator.normal(0, 25, (size[1], size[0], 3))
    return Image.fromarray(np.clip(centre + noise, 0, 255).astype(np.uint8))


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """``train/`` and ``test/`` with three classes: 12 and 6 PNG files each."""
    root = tmp_path_factory.mktemp("images") / "colours"
    for role, count in (("train", 12), ("test", 6)):
        for index, name in enumerate(("blue", "green", "red")):
            folder = root / role / name
            folder.mkdir(parents=True)
            for number in range(count):
                image = colour_image(index, number + (1000 if role == "test" else 0))
                image.save(folder / f"{number:02d}.png")
    return root


class FakeEngine:
    """A seeded projection of the pixels: as fast and as deterministic as an engine can be."""

    dim = 8
    batch_size = 64

    def __init__(self, weights, cuts):
        self.preprocess = weights.preprocess
        self.size = size = weights.preprocess.size
        self.cuts = cuts
        self.matrix = np.random.default_rng(0).normal(size=(size * size * 3, self.dim))
        self.calls = 0

    def extract(self, images):
        self.calls += 1
        assert images.dtype == np.uint8
        if images.shape[1] != self.size:
            from featcache.preprocess import upscale

            images = upscale(images, self.preprocess)
        features = (images.reshape(len(images), -1) / 255 @ self.matrix).astype(np.float32)
        maps = np.repeat(features[:, :4], 4, axis=1).reshape(len(images), 4, 2, 2)
        return {cut: features if cut == "avgpool" else maps for cut in self.cuts}


@pytest.fixture
def fake_engine(monkeypatch):
    """Let `featcache.extract` run on a machine without OneFlow."""
    from featcache.backbones.choice import EngineChoice
    from featcache.backbones.weights import Weights
    from featcache.extraction import extract as extraction

    choice = EngineChoice("fake", "1", "cpu", "f32", "a test asked for it")
    made = []

    def build(choice, weights, cuts, **_):
        made.append(FakeEngine(weights, cuts))
        return made[-1]

    monkeypatch.setattr(extraction, "choose_engine", lambda *_, **__: choice)
    monkeypatch.setattr(extraction, "build_engine", build)
    shapes = {"avgpool": (FakeEngine.dim,)}
    monkeypatch.setattr(
        Weights, "shapes", lambda _, cuts: {cut: shapes.get(cut, (4, 2, 2)) for cut in cuts}
    )
    return made


@pytest.fixture
def small_cache(tmp_path):
    """A cache of Gaussian classes: 3 classes, 120 train, 60 test, 8 dimensions, 4 views."""
    return write_gaussian_cache(tmp_path / "small.h5")


def write_gaussian_cache(
    path, *, n_classes=3, n_train=120, n_test=60, dim=8, spread=1.0, seed=0, **facts
):
    """Write features whose classes are Gaussian clouds, and return the path.

    ``facts`` take the place of the provenance's.
    """
    from caches import SplitArrays, write_cache

    from featcache.preprocess import FLIP_VIEWS, Preprocess

    generator = np.random.default_rng(seed)
    centres = generator.normal(size=(n_classes, dim)) * 1.5 + 2

    def split(n, role, views):
        labels = np.arange(n) % n_classes
        clouds = [
            (centres[labels] + generator.normal(scale=spread, size=(n, dim))).astype(np.float32)
            for _ in range(1 + len(views))
        ]
        ids = tuple(f"{role}/{row}" for row in range(n))
        return SplitArrays(
            clouds[0], labels.astype(np.int64), ids, dict(zip(views, clouds[1:], strict=True))
        )

    meta = {
        "backbone": "resnet18",
        "class_names": [f"class {index}" for index in range(n_classes)],
        "created": "2026-01-01T00:00:00+00:00",
        "cuts": ["avgpool"],
        "dataset": "gaussian",
        "dataset_digest": "0" * 64,
        "dataset_source": "drawn by a test",
        "device": "cpu",
        "dtype": "float32",
        "engine": "fake",
        "engine_version": "1",
        "featcache_version": "0",
        "images_per_s": 1.0,
        "precision": "float32",
        "preprocess": Preprocess(64).as_dict(),
        "views": list(FLIP_VIEWS),
        "wall_s": 1.0,
        "weights": "none",
        "weights_sha256": "0" * 64,
        "weights_source": "none",
        **facts,
    }
    splits = {
        "train": split(n_train, "train", FLIP_VIEWS[1:]),
        "test": split(n_test, "test", ()),
    }
    write_cache(path, splits, meta)
    return path
