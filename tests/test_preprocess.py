"""The canonical pixels and the four flip views."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import PIL
import pytest
from PIL import Image

from featcache.errors import RecipeError, ShapeMismatchError
from featcache.preprocess import (
    FLIP_VIEWS,
    INTERPOLATIONS,
    Preprocess,
    apply_view,
    check_pixels,
    resample_taps,
    upscale,
)

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
        ({"size": 0}, "size: expected 1 to 4096 pixels"),
        ({"size": 4097}, "found 4097"),
        ({"std": (0.2, 0.0, 0.2)}, "std positive"),
        ({"std": (0.2, float("nan"), 0.2)}, "std positive"),
        ({"mean": (0.2, float("inf"), 0.2)}, "finite"),
        ({"mean": "123"}, "mean and std: expected 3 values each"),
        ({"mean": (10**400, 0, 0)}, "finite"),
        ({"size": 224.0}, "found 224.0; try 224"),
        ({"size": True}, "found True"),
        ({"interpolation": "nearest"}, "one of bilinear, bicubic, lanczos, found 'nearest'"),
        ({"geometry": "fit"}, "one of square, crop, squash, pad, found 'fit'"),
        ({"geometry": ["crop"]}, r"found '\['crop'\]'; did you mean crop"),
        ({"geometry": "crop", "rounding": "up"}, "rounding: expected one of even, down, found"),
        ({"geometry": "crop", "resize": 223}, "resize: expected 224 to 8192 pixels, found 223"),
        ({"geometry": "crop", "resize": 8193}, "found 8193"),
        ({"geometry": "crop", "resize": 256.0}, "found 256.0"),
        ({"geometry": "pad", "fill": (0, 0, 256)}, "fill: expected 3 integers from 0 to 255"),
        ({"geometry": "pad", "fill": (0, 0, 0.5)}, "fill: expected 3 integers from 0 to 255"),
        ({"resize": 256}, "resize: expected none for geometry square, found 256"),
        ({"geometry": "pad", "resize": 256}, "resize: expected none for geometry pad"),
        ({"rounding": "down"}, "rounding: expected none for geometry square"),
        ({"geometry": "squash", "fill": (1, 1, 1)}, "fill: expected none for .* try geometry pad"),
    ],
)
def test_values_that_mean_nothing_are_refused(arguments, said):
    with pytest.raises(RecipeError, match=said) as caught:
        Preprocess(**arguments)
    assert "\n" not in str(caught.value)


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
    assert np.array_equal(upscale(native, Preprocess(size)), Preprocess(size).batch(images))


# Side of the input, side before the crop, and how an odd margin is rounded.
CROPS = [
    (64, 64, "even"),
    (56, 64, "even"),
    (100, 113, "even"),
    (100, 113, "down"),
    (224, 256, "even"),
]


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize(("size", "resize", "rounding"), CROPS)
@pytest.mark.parametrize("geometry", ["crop", "squash"])
def test_every_filter_enlarges_and_crops_as_pillow_does(
    geometry, size, resize, rounding, interpolation
):
    preprocess = Preprocess(
        size, interpolation=interpolation, geometry=geometry, resize=resize, rounding=rounding
    )
    for side in {*range(1, 9), size // 4, size // 2 + 1, size - 1}:
        images = [noise(side, side, seed) for seed in range(2)]
        images.append(images[0].point(lambda level: 255 * (level > 127)))  # overshoots the most
        native = np.stack([np.asarray(image) for image in images])
        assert np.array_equal(upscale(native, preprocess), preprocess.batch(images)), side


@pytest.mark.parametrize(
    ("interpolation", "taps"), [("bilinear", 2), ("bicubic", 4), ("lanczos", 6)]
)
def test_sums_of_taps_fit_in_32_bits(interpolation, taps):
    preprocess = Preprocess(96, interpolation=interpolation, geometry="crop", resize=110)
    for side in range(1, 96):
        index, weights = resample_taps(side, preprocess)
        assert index.shape == weights.shape == (96, taps)
        assert index.dtype == weights.dtype == np.int32
        assert index.min() >= 0 and index.max() < side
        assert 255 * abs(weights.astype(np.int64)).sum(axis=1).max() + 2**21 < 2**31
        assert abs(weights.sum(axis=1) - 2**22).max() <= taps


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize(("size", "resize"), [(64, 64), (64, 72), (97, 113), (224, 256)])
def test_every_filter_commutes_with_flipping(size, resize, interpolation):
    preprocess = Preprocess(size, interpolation=interpolation, geometry="crop", resize=resize)
    for side in (1, 2, 3, 20, 33, size - 1):
        images = np.asarray(noise(side, side))[None]
        enlarged = upscale(images, preprocess)
        for view in FLIP_VIEWS:
            flipped = upscale(apply_view(images, view), preprocess)
            assert np.array_equal(flipped, apply_view(enlarged, view))
        assert preprocess.compact([noise(side, side)]).shape[1] == side, "so that it may travel"


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
    assert np.array_equal(upscale(compact, Preprocess(64)), Preprocess(64).batch(images))


@pytest.mark.parametrize("shape", [(2, 65, 65, 3), (2, 32, 33, 3), (32, 32, 3), (2, 0, 0, 3)])
def test_what_cannot_be_enlarged_is_refused(shape):
    with pytest.raises(ShapeMismatchError, match=r"expected .* s up to 64"):
        upscale(np.zeros(shape, np.uint8), Preprocess(64))


@pytest.mark.parametrize(
    ("fields", "shapes", "side"),
    [
        ({"geometry": "crop", "resize": 72}, [(32, 32), (32, 32)], 32),
        ({"geometry": "squash", "resize": 72}, [(32, 32), (32, 32)], 32),
        ({"geometry": "squash"}, [(63, 63)], 63),
        ({"geometry": "crop", "resize": 72}, [(64, 64)], 64),
        ({"geometry": "crop", "resize": 72}, [(32, 33), (32, 33)], 64),
        ({"geometry": "squash"}, [(32, 33)], 64),
        ({"geometry": "crop", "resize": 73}, [(32, 32)], 64),
        ({"geometry": "pad"}, [(32, 32)], 64),
    ],
)
def test_small_images_travel_only_where_flips_commute(fields, shapes, side):
    preprocess = Preprocess(64, interpolation="bicubic", **fields)
    images = [noise(*shape, seed) for seed, shape in enumerate(shapes)]
    compact = preprocess.compact(images)
    assert compact.shape == (len(shapes), side, side, 3)
    assert np.array_equal(upscale(compact, preprocess), preprocess.batch(images))
    check_pixels(compact, preprocess)
    if not preprocess.enlarges:
        with pytest.raises(ShapeMismatchError, match="s of 64, found uint8"):
            check_pixels(compact[:, :32, :32], preprocess)


def test_padding_centres_on_its_colour():
    preprocess = Preprocess(64, geometry="pad", fill=(9, 8, 7))
    pixels = preprocess.pixels(noise(100, 51))  # 64 x 33, of 31 lines above and below 15 and 16
    assert (pixels[:15] == (9, 8, 7)).all() and (pixels[48:] == (9, 8, 7)).all()
    expected = np.asarray(noise(100, 51).resize((64, 33), Image.Resampling.BILINEAR))
    assert np.array_equal(pixels[15:48], expected)
    assert preprocess.pixels(noise(1, 1000)).shape == (64, 64, 3)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_the_part_of_a_panorama_is_the_wholes(interpolation, monkeypatch):
    for size, resize, shape in [(64, 72, (300, 3)), (64, 73, (2, 77)), (32, 64, (63, 500))]:
        preprocess = Preprocess(size, interpolation=interpolation, geometry="crop", resize=resize)
        whole = preprocess.pixels(noise(*shape))
        with monkeypatch.context() as patch:
            patch.setattr("featcache.preprocess._MAX_ENLARGED_PIXELS", 0)
            assert preprocess._is_far_too_large(preprocess._resized(*shape))
            assert np.array_equal(preprocess.pixels(noise(*shape)), whole)


def test_a_line_of_a_million_pixels_fills_no_memory():
    preprocess = Preprocess(interpolation="bicubic", geometry="crop", resize=256)
    for size in ((10**6, 1), (1, 10**6)):
        assert preprocess.pixels(Image.new("RGB", size, (1, 2, 3)))[9, 9].tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("fields", "size", "share"),
    [
        ({}, (100, 50), 0.5),
        ({"geometry": "crop"}, (50, 100), 0.5),
        ({"geometry": "crop", "resize": 256}, (100, 100), (224 / 256) ** 2),
        ({"geometry": "crop", "resize": 256}, (400, 100), (224 / 256) ** 2 / 4),
        ({"geometry": "squash"}, (400, 100), 1),
        ({"geometry": "squash", "resize": 256}, (400, 100), (224 / 256) ** 2),
        ({"geometry": "pad"}, (400, 100), 1),
    ],
)
def test_how_much_of_an_image_is_left(fields, size, share):
    assert Preprocess(**fields).kept_share(*size) == pytest.approx(share)


MADE = [
    Preprocess(64),
    Preprocess(64, (0.5,) * 3, (0.25,) * 3, "bicubic"),
    Preprocess(geometry="crop", resize=256),
    Preprocess(geometry="crop", resize=224, rounding="down"),
    Preprocess(1, interpolation="lanczos", geometry="squash"),
    Preprocess(geometry="pad", fill=(1, 2, 3)),
]


@pytest.mark.parametrize("preprocess", MADE)
def test_what_is_written_is_read_back(preprocess):
    text = json.dumps(preprocess.as_dict())
    again = Preprocess.from_dict(json.loads(text))
    assert again == preprocess and hash(again) == hash(preprocess)
    other = {**preprocess.as_dict(), "decoder": "pillow 9.0.0"}
    assert Preprocess.from_dict(other) == preprocess


def test_the_default_geometry_is_written_as_it_always_was():
    fields = Preprocess(64).as_dict()
    decoder = fields.pop("decoder")
    assert decoder == f"pillow {PIL.__version__}"
    assert fields == {
        "size": 64,
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "interpolation": "bilinear",
        "geometry": "centre square, then resize",
        "reducing_gap": 2.0,
    }


def test_other_geometries_are_written_with_what_they_use():
    crop, pad = Preprocess(geometry="crop", resize=256).as_dict(), MADE[-1].as_dict()
    assert (crop["geometry"], crop["resize"], crop["rounding"]) == ("crop", 256, "even")
    assert Preprocess(geometry="squash").as_dict()["resize"] == 224
    assert (pad["geometry"], pad["fill"]) == ("pad", [1, 2, 3])
    assert crop["reducing_gap"] is None and "fill" not in crop and "resize" not in pad


@pytest.mark.parametrize(
    "change",
    [
        {"size": "64"},
        {"size": 64.0},
        {"size": 10**9},
        {"size": True},
        {"size": None},
        {"mean": [0.5, 0.5]},
        {"mean": [float("nan")] * 3},
        {"mean": ["0.5"] * 3},
        {"mean": {"a": 1}},
        {"std": [0, 1, 1]},
        {"std": None},
        {"interpolation": ["bilinear"]},
        {"geometry": {}},
        {"geometry": "crop"},
        {"resize": 64},
        {"rounding": "even"},
        {"fill": [0, 0, 0]},
        {"reducing_gap": 3},
        {"reducing_gap": None},
        {"new": 1},
        {5: 1},
    ],
)
def test_odd_fields_are_refused_in_one_line(change):
    with pytest.raises(RecipeError) as caught:
        Preprocess.from_dict({**Preprocess(64).as_dict(), **change})
    assert "expected" in str(caught.value) and "found" in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "key", ["size", "mean", "std", "interpolation", "geometry", "reducing_gap"]
)
def test_missing_fields_have_the_defaults(key):
    fields = Preprocess(64).as_dict()
    del fields[key]
    assert Preprocess.from_dict(fields) == (Preprocess() if key == "size" else Preprocess(64))


@pytest.mark.parametrize("fields", [None, [], "text", 5])
def test_what_has_no_fields_is_refused(fields):
    with pytest.raises(RecipeError, match="preprocess: expected fields with values"):
        Preprocess.from_dict(fields)


def test_descriptions_fit_a_methods_section():
    version = ".".join(PIL.__version__.split(".")[:2])
    normalised = (
        "and normalised with mean (0.485, 0.456, 0.406) and standard deviation "
        "(0.229, 0.224, 0.225) on [0, 1]."
    )
    filtered = f"resized with Pillow {version}'s antialiased bicubic filter"
    bicubic = {"interpolation": "bicubic"}
    assert Preprocess(**bicubic, geometry="crop", resize=256).describe() == (
        f"Images were {filtered} so that the shorter side had 256 pixels, cropped to the central "
        f"224 x 224 pixels, {normalised}"
    )
    assert Preprocess(**bicubic, geometry="squash").describe() == (
        f"Images were {filtered} to 224 x 224 pixels whatever their aspect ratio {normalised}"
    )
    assert Preprocess(**bicubic, geometry="squash", resize=256).describe() == (
        f"Images were {filtered} to 256 x 256 pixels whatever their aspect ratio, cropped to the "
        f"central 224 x 224 pixels, {normalised}"
    )
    assert Preprocess(**bicubic, geometry="pad", fill=(1, 2, 3)).describe() == (
        f"Images were {filtered} so that the longer side had 224 pixels, centred on a background "
        f"of 224 x 224 pixels of RGB colour (1, 2, 3), {normalised}"
    )
    assert Preprocess(64, **bicubic).describe() == (
        f"Images were cropped to their central square, {filtered} to 64 x 64 pixels {normalised} "
        "The decoder scaled large JPEG images down, to no less than 2 times that size, before "
        "they were resized."
    )


CROP = Preprocess(geometry="crop", resize=256, rounding="down")


@pytest.mark.parametrize(
    ("start", "changes", "expected"),
    [
        (CROP, {}, CROP),
        (CROP, {"size": 112}, {"size": 112, "resize": 128}),
        (CROP, {"size": 4096}, {"size": 4096, "resize": 4681}),
        (CROP, {"size": 448}, {"size": 448, "resize": 512}),
        (CROP, {"size": 100}, {"size": 100, "resize": 114}),
        (CROP, {"size": 1}, {"size": 1, "resize": None}),
        (CROP, {"crop_pct": 0.9}, {"resize": 248}),
        (CROP, {"crop_pct": 1}, {"resize": None}),
        (CROP, {"crop_pct": 0.875, "size": 64}, {"size": 64, "resize": 73}),
        (CROP, {"geometry": "squash"}, {"geometry": "squash"}),
        (CROP, {"geometry": "pad"}, Preprocess(geometry="pad")),
        (CROP, {"geometry": "square", "size": 64}, Preprocess(64)),
        (CROP, {"mean": (0, 0, 0), "std": (1, 1, 1)}, {"mean": (0, 0, 0), "std": (1, 1, 1)}),
        (CROP, {"interpolation": "lanczos"}, {"interpolation": "lanczos"}),
        (Preprocess(), {"geometry": "crop", "crop_pct": 0.875}, replace(CROP, rounding="even")),
        (Preprocess(), {"size": 96}, Preprocess(96)),
        (MADE[-1], {"size": 96}, replace(MADE[-1], size=96)),
    ],
)
def test_flags_override_what_the_model_says(start, changes, expected):
    expected = expected if isinstance(expected, Preprocess) else replace(start, **expected)
    assert start.overridden(**changes) == expected


@pytest.mark.parametrize(
    ("start", "changes", "said"),
    [
        (CROP, {"crop_pct": 0}, "crop_pct: expected above 0 up to 1"),
        (CROP, {"crop_pct": 1.01}, "found 1.01"),
        (CROP, {"crop_pct": float("nan")}, "found nan"),
        (CROP, {"crop_pct": "0.9"}, "found '0.9'"),
        (CROP, {"crop_pct": 1e-300}, "found 1e-300"),
        (CROP, {"crop_pct": 0.9, "geometry": "pad"}, "geometry crop or squash, found pad, which"),
        (Preprocess(), {"crop_pct": 0.9}, "geometry crop or squash, found square, which"),
        (CROP, {"size": 0}, "size: expected"),
        (CROP, {"size": "64"}, "size: expected"),
        (CROP, {"geometry": "fit"}, "geometry: expected one of"),
        (CROP, {"interpolation": "cubic"}, "interpolation: expected one of"),
        (CROP, {"std": (0, 1, 1)}, "std positive"),
    ],
)
def test_flags_that_mean_nothing_are_refused(start, changes, said):
    with pytest.raises(RecipeError, match=said):
        start.overridden(**changes)
