"""The canonical pixels and the four flip views."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from featcache.errors import RecipeError, ShapeMismatchError
from featcache.preprocess import FLIP_VIEWS, Preprocess, apply_view


def noise(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("side", [32, 64, 224])
def test_square_images_are_the_tutorials_resize(side):
    image = noise(32, 32)
    expected = np.asarray(image.resize((side, side), Image.Resampling.BILINEAR))
    assert np.array_equal(Preprocess(side).pixels(image), expected)


@pytest.mark.parametrize(("width", "height"), [(90, 40), (40, 91), (41, 40), (3, 200)])
def test_other_images_are_cropped_to_their_centre(width, height):
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    image = noise(width, height)
    centre = image.crop((left, top, left + side, top + side))
    assert np.array_equal(Preprocess(64).pixels(image), Preprocess(64).pixels(centre))


def test_downscaling_averages_rather_than_samples():
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    inside = Preprocess(64).pixels(Image.fromarray(stripes))[8:-8, 8:-8]
    assert abs(inside.astype(int) - 127).max() <= 2


@pytest.mark.parametrize("size", [32, 64, 224])
def test_flipping_before_or_after_resizing_is_the_same(size):
    image = noise(32, 32)
    pixels = Preprocess(size).pixels(image)[None]
    flipped = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert np.array_equal(Preprocess(size).pixels(flipped), apply_view(pixels, "hflip")[0])
    flipped = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    assert np.array_equal(Preprocess(size).pixels(flipped), apply_view(pixels, "vflip")[0])


def test_views_are_four_different_images_and_involutions():
    batch = np.stack([Preprocess(64).pixels(noise(64, 64, seed)) for seed in range(2)])
    views = {name: apply_view(batch, name) for name in FLIP_VIEWS}
    assert len({view.tobytes() for view in views.values()}) == 4
    for name in FLIP_VIEWS:
        assert np.array_equal(apply_view(views[name], name), batch)
    assert np.array_equal(apply_view(views["hflip"], "vflip"), views["hvflip"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"size": 0}, "size: expected 32 to 4096 pixels"),
        ({"size": 31}, "found 31"),
        ({"std": (0.2, 0.0, 0.2)}, "std positive"),
        ({"interpolation": "nearest"}, "'nearest'"),
    ],
)
def test_values_that_mean_nothing_are_refused(arguments, said):
    with pytest.raises(RecipeError, match=said):
        Preprocess(**arguments)


def test_unknown_views_and_shapes_are_refused():
    with pytest.raises(RecipeError, match="'upside'"):
        apply_view(np.zeros((1, 2, 2, 3)), "upside")
    with pytest.raises(ShapeMismatchError, match=r"\(2, 2, 3\)"):
        apply_view(np.zeros((2, 2, 3)), "hflip")
