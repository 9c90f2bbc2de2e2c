"""The first steps of training on a made-up set, to compare frameworks and releases by.

    python tests/first_steps.py [ENGINE] > tests/data/first_steps.json

writes them anew, by OneFlow unless another engine is named; `test_first_steps.py` holds each
engine against the file. Rewrite it only where a method, a draw or the mathematics is meant to
change.

From scratch the learning rate is a hundredth of the recipe's: at the rate itself, batch
normalisation over a few images, on random weights, turns a difference of 1e-7 between weights into
one of 7e-5 between losses after one step and 0.06 after four, within PyTorch alone.
"""

from __future__ import annotations

import json
import sys

import numpy as np

from featcache import load_weights
from featcache.datasets.dataset import Split
from featcache.datasets.images import ArrayImages
from featcache.finetuning.batches import CachedSource, Draw, ImageSource
from featcache.finetuning.framework import get_framework
from featcache.finetuning.recipes import finetune_recipe
from featcache.finetuning.trainer import Trainer
from featcache.preprocess import FLIP_VIEWS

SIZE, N, CLASSES, BATCH, EPOCHS = 64, 24, 3, 8, 2  # the steps are those of the first epoch
CASES = {
    "full": ("full", {}),
    "split": ("split", {"augment": "crop-flip", "schedule": "cosine", "warmup": 2}),
    "frozen": ("frozen", {}),
    "scratch": ("scratch", {"augment": "flip", "label_smoothing": 0.1, "lr": 1e-5}),
    "statistics kept": ("full", {"bn": "eval", "layer_decay": 0.5}),
    "above layer3, cached": ("full", {"freeze_until": "layer3"}),
}
TENSORS = (
    "conv1.weight",
    "bn1.running_mean",
    "layer2.0.bn1.running_var",
    "layer3.1.conv1.weight",
    "layer4.1.conv2.weight",
    "layer4.1.bn2.bias",
    "fc.weight",
)


def source(case: str, preprocess) -> ImageSource | CachedSource:
    """Return images of half the input's side, of three colours; or maps of layer3's shape."""
    generator = np.random.default_rng(0)
    labels = np.arange(N, dtype=np.int64) % CLASSES
    if case.endswith("cached"):
        shape = (N, 256, SIZE // 16, SIZE // 16)
        views = {view: generator.random(shape, np.float32) for view in FLIP_VIEWS}
        return CachedSource(views, labels, "layer3")
    pixels = generator.integers(0, 128, (N, SIZE // 2, SIZE // 2, 3)).astype(np.uint8)
    pixels[np.arange(N), :, :, labels] += 96
    names, ids = tuple("abc"), tuple(map(str, range(N)))
    return ImageSource(Split(ArrayImages(pixels), labels, names, ids), preprocess)


def first_steps(case: str, engine: str) -> dict:
    """Return the losses of each step, and scores and tensors of the network after the last."""
    method, changes = CASES[case]
    weights = load_weights("tinyimagenet32", size=SIZE)
    recipe = finetune_recipe(method, batch_size=BATCH, epochs=EPOCHS, **changes)
    trainer = Trainer(get_framework(engine), weights, CLASSES, recipe, seed=1)
    images = source(case, weights.preprocess)
    losses = [step.loss for step in trainer.steps(images, 0)]
    trainer.network.eval()
    (batch,) = images.batches([Draw(np.arange(4))])
    x = trainer.network.to_device(batch, images.start)
    scores = trainer.network.scores(x, images.start).detach().numpy()
    state = trainer.network.state()
    return {
        "losses": losses,
        "scores": scores.astype(float).tolist(),
        "mean squares": {name: float(np.square(state[name]).mean()) for name in TENSORS},
        "means": {name: float(state[name].mean()) for name in TENSORS},
    }


if __name__ == "__main__":
    ENGINE = sys.argv[1] if sys.argv[1:] else "oneflow"
    print(json.dumps({case: first_steps(case, ENGINE) for case in CASES}, indent=1))
