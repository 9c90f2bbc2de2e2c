"""The canonical pixels and the four flip views."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from featcache.errors import RecipeError, ShapeMismatchError
from featcache.preprocess import FLIP_VIEWS, Preprocess, apply_view, upscale

pytestmark = pytest.mark.numpy1  # its bytes or draws may depend on NumPy


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


@pytest.mark.parametrize(
    ("side", "size"),
    [
        (side, size)
        for size in (32, 64, 100, 224)
        for side in (1, 2, 3, 8, 28, 31, 32, 33, 64, 99, 200, 224)
        if side <= size
    ],
)
def test_enlarging_is_pillows_own_to_the_byte(side, size):
    images = [noise(side, side, seed) for seed in range(3)]
    native = np.stack([np.asarray(image) for image in images])
    assert np.array_equal(upscale(native, size), Preprocess(size).batch(images))


@pytest.mark.parametrize(("side", "size"), [(32, 64), (28, 64), (33, 100), (64, 224)])
def test_enlarging_commutes_with_flipping(side, size):
    images = np.asarray(noise(side, side))[None]
    for view in FLIP_VIEWS:
        flipped = upscale(apply_view(images, view), size)
        assert np.array_equal(flipped, apply_view(upscale(images, size), view))


@pytest.mark.parametrize(
    ("shapes", "side"),
    [
        ([(32, 32), (32, 32)], 32),
        ([(32, 48), (40, 32), (32, 32)], 32),
        ([(64, 64)], 64),
        ([(1, 1)], 1),
        ([(32, 32), (33, 33)], 64),
        ([(65, 65), (65, 65)], 64),
        ([(64, 64), (65, 65)], 64),
    ],
)
def test_compact_pixels_stand_for_the_canonical_ones(shapes, side):
    images = [noise(*shape, seed) for seed, shape in enumerate(shapes)]
    compact = Preprocess(64).compact(images)
    assert compact.dtype == np.uint8 and compact.shape == (len(shapes), side, side, 3)
    assert np.array_equal(upscale(compact, 64), Preprocess(64).batch(images))


@pytest.mark.parametrize("shape", [(2, 65, 65, 3), (2, 32, 33, 3), (32, 32, 3), (2, 0, 0, 3)])
def test_what_cannot_be_enlarged_is_refused(shape):
    with pytest.raises(ShapeMismatchError, match=r"expected .* s up to 64"):
        upscale(np.zeros(shape, np.uint8), 64)


def test_the_fingerprint_names_what_defines_the_pixels():
    fields = Preprocess(64).as_dict()
    assert fields["decoder"].startswith("pillow ") and fields["reducing_gap"] == 2.0
