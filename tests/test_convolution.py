"""The convolution that replaces OneFlow's on a processor: the same numbers, and the derivative."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import featcache
from featcache import load_weights
from featcache.datasets.dataset import Split
from featcache.datasets.images import ArrayImages
from featcache.finetuning.batches import ImageSource
from featcache.finetuning.recipes import finetune_recipe
from featcache.finetuning.trainer import Trainer


@pytest.mark.oneflow
@pytest.mark.parametrize(
    ("channels", "filters", "side", "kernel", "stride", "padding"),
    [
        (3, 8, 32, 7, 2, 3),  # the stem
        (8, 8, 9, 3, 1, 1),  # odd sides
        (8, 16, 8, 3, 2, 1),
        (8, 16, 8, 1, 2, 0),  # a shortcut
        (16, 16, 2, 3, 1, 1),
        (16, 16, 1, 3, 1, 1),
        (16, 8, 4, 1, 1, 0),
    ],
)
@pytest.mark.parametrize("n", [1, 5])
def test_the_swapped_convolution_equals_oneflows(
    n, channels, filters, side, kernel, stride, padding
):
    from featcache.finetuning.convolution import swap_convolutions
    from featcache.frameworks import import_oneflow

    flow = import_oneflow()
    flow.manual_seed(0)
    layer = flow.nn.Conv2d(channels, filters, kernel, stride, padding, bias=False)
    numbers = np.random.default_rng(0).normal(size=(n, channels, side, side)).astype(np.float32)
    found = []
    for swap in (False, True):
        if swap:
            swap_convolutions(flow.nn.Sequential(layer), flow)
        x = flow.tensor(numbers, requires_grad=True)
        y = layer(x)
        layer.weight.grad = None
        waves = np.cos(np.arange(y.numel())).astype(np.float32).reshape(*y.shape)
        (y * flow.tensor(waves)).sum().backward()
        found.append((y.numpy(), x.grad.numpy(), layer.weight.grad.numpy()))
    for theirs, ours in zip(*found, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * max(1, np.abs(theirs).max()))


@pytest.mark.parametrize(
    ("height", "width", "stride", "by_columns"),
    [(16, 12, 1, True), (6, 5, 2, False), (4, 4, 1, False), (2, 2, 1, False), (1, 1, 1, False)],
)
def test_the_swapped_convolutions_gradient_is_the_derivative(height, width, stride, by_columns):
    """In float64 arithmetic by hand: a central difference of the forward pass."""
    from featcache.finetuning.convolution import Geometry, convolve, convolve_back, mostly_inside

    generator = np.random.default_rng(1)
    g = Geometry(2, 3, height, width, 4, 3, stride, 1)
    assert mostly_inside(g) is by_columns
    x = generator.normal(size=(2, 3, height, width)).astype(np.float32)
    weight = generator.normal(size=(4, 3, 3, 3)).astype(np.float32)
    dy = generator.normal(size=(2, 4, g.out_height, g.out_width)).astype(np.float32)
    dx, dweight = np.empty_like(x), np.empty_like(weight)
    convolve_back(x, weight, dy, g, dx, dweight)

    def value(x, weight):
        return float((convolve(x, weight, g).astype(np.float64) * dy).sum())

    for array, gradient in ((x, dx), (weight, dweight)):
        for _ in range(10):
            place = tuple(generator.integers(length) for length in array.shape)
            up, down = array.copy(), array.copy()
            up[place] += 0.5
            down[place] -= 0.5
            pairs = [(up, weight), (down, weight)] if array is x else [(x, up), (x, down)]
            slope = value(*pairs[0]) - value(*pairs[1])  # linear: no error but rounding
            assert gradient[place] == pytest.approx(slope, abs=1e-3)


@pytest.mark.parametrize(("side", "stride"), [(7, 1), (7, 2), (4, 2), (3, 1), (2, 1)])
def test_both_ways_of_a_convolution_agree(side, stride):
    from featcache.finetuning import convolution as _columns
    from featcache.finetuning import convolution as _taps
    from featcache.finetuning.convolution import Geometry

    generator = np.random.default_rng(2)
    g = Geometry(5, 6, side, side, 4, 3, stride, 1)
    x, weight, dy = (
        generator.normal(size=shape).astype(np.float32)
        for shape in ((5, 6, side, side), (4, 6, 3, 3), g.out_shape)
    )
    ways = []
    for forward, backward in (
        (_columns.convolve_by_columns, _columns.convolve_back_by_columns),
        (_taps.convolve_by_taps, _taps.convolve_back_by_taps),
    ):
        y, dx, dweight = (np.full_like(array, np.nan) for array in (dy, x, weight))
        forward(x, weight, g, y)
        backward(x, weight, dy, g, dx, dweight)
        ways.append((y, dx, dweight))
    for one, other in zip(*ways, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-6 * np.abs(one).max())


@pytest.mark.oneflow
def test_gradients_of_weights_add_up_until_they_are_forgotten():
    from featcache.finetuning.convolution import swap_convolutions
    from featcache.frameworks import import_oneflow

    flow = import_oneflow()
    layer = flow.nn.Conv2d(3, 4, 3, 1, 1, bias=False)
    swap_convolutions(layer, flow)
    x = flow.ones(2, 3, 5, 5)
    layer(x).sum().backward()
    once = layer.weight.grad.numpy().copy()
    layer(x).sum().backward()
    assert np.abs(once).min() > 0
    assert np.allclose(layer.weight.grad.numpy(), 2 * once)
    layer.weight.requires_grad = False
    assert not layer(x).requires_grad


@pytest.mark.oneflow
def test_oneflow_never_shares_memory_with_numpy():
    """It lets go of a shared array in a thread that needs Python's lock: at exit, too late."""
    from featcache.backbones.oneflow_engine import to_device

    numbers = np.arange(6, dtype=np.int64).reshape(2, 3).T
    tensor = to_device(numbers, "cpu")
    assert not np.shares_memory(tensor.numpy(), numbers)
    np.testing.assert_array_equal(tensor.numpy(), numbers)
    for path in Path(featcache.__file__).parent.rglob("*.py"):
        assert "flow.from_numpy(" not in path.read_text("utf-8"), path


@pytest.mark.oneflow
def test_training_computes_the_same_as_oneflows_own_convolutions(monkeypatch):
    from featcache.finetuning import framework as _framework

    weights = load_weights("tinyimagenet32", size=32)
    pixels = np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3), np.uint8)
    labels = np.arange(16, dtype=np.int64) % 2
    split = Split(ArrayImages(pixels), labels, ("a", "b"), tuple(map(str, range(16))))
    images = ImageSource(split, weights.preprocess)
    losses = []
    for swap in (True, False):
        if not swap:
            monkeypatch.setattr(_framework, "swap_convolutions", lambda network, flow: None)
        trainer = Trainer(weights, 2, finetune_recipe("full", batch_size=8))
        losses.append([step.loss for epoch in range(2) for step in trainer.steps(images, epoch)])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-3)
