"""The pixels are those of the libraries that the models come from, to the byte."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from PIL import Image

from featcache.preprocess import Preprocess, upscale

pytestmark = pytest.mark.torch

SIZES = [
    (301, 203),
    (1, 50),
    (50, 1),
    (997, 61),
    (61, 998),
    (31, 33),
    (32, 32),
    (224, 224),
    (225, 256),
    (1500, 1100),
]


def noise(width, height):
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


IMAGES = [noise(*size) for size in SIZES]


def library(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name)


def check(preprocess, transform, images=IMAGES):
    for image in images:
        expected = np.asarray(transform(image))
        assert expected.dtype == np.uint8
        assert np.array_equal(preprocess.pixels(image), expected), image.size


@pytest.mark.parametrize(("size", "resize"), [(224, 256), (224, 224), (64, 73), (299, 342)])
def test_torchvisions_preset(size, resize):
    library("torchvision")
    from torchvision.transforms._presets import ImageClassification

    preset = ImageClassification(
        crop_size=size, resize_size=resize, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)
    )

    def transform(image):
        return (preset(image).permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)

    check(Preprocess(size, geometry="crop", resize=resize), transform)


@pytest.mark.parametrize("mode", ["center", "squash"])
@pytest.mark.parametrize("crop_pct", [0.875, 0.9, 0.95, 1.0])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_timms_transform(mode, crop_pct, interpolation):
    create = library("timm.data").create_transform
    composed = create((3, 224, 224), interpolation=interpolation, crop_pct=crop_pct, crop_mode=mode)
    resize, crop = composed.transforms[:2]
    geometry = {"center": "crop", "squash": "squash"}[mode]
    preprocess = Preprocess(interpolation=interpolation, geometry=geometry)
    images = IMAGES if crop_pct == 0.95 else IMAGES[:7]
    check(preprocess.overridden(crop_pct=crop_pct), lambda image: crop(resize(image)), images)


def test_timms_border_without_a_crop_is_padding():
    create = library("timm.data").create_transform
    mean = (0.5, 0.4, 0.3)
    composed = create(
        (3, 224, 224), interpolation="lanczos", crop_pct=1, crop_mode="border", mean=mean
    )
    resize, pad = composed.transforms[:2]
    fill = tuple(round(255 * value) for value in mean)
    # Where a side would be rounded to no pixel, timm fails.
    preprocess = Preprocess(interpolation="lanczos", geometry="pad", fill=fill)
    images = [image for image in IMAGES if min(image.size) > 1]
    check(preprocess, lambda image: pad(resize(image)), images)


@pytest.mark.parametrize(
    ("mode", "geometry"), [("shortest", "crop"), ("squash", "squash"), ("longest", "pad")]
)
@pytest.mark.parametrize("size", [224, 63])
def test_open_clips_transform(mode, geometry, size):
    image_transform = library("open_clip.transform").image_transform
    fill = 7 if mode == "longest" else 0
    composed = image_transform(size, is_train=False, resize_mode=mode, fill_color=fill)
    *steps, _, _, _ = composed.transforms

    def transform(image):
        for step in steps:
            image = step(image)
        return image

    images = [
        image
        for image in IMAGES
        if mode != "longest" or round(size * min(image.size) / max(image.size))
    ]
    preprocess = Preprocess(size, interpolation="bicubic", geometry=geometry, fill=(fill,) * 3)
    check(preprocess, transform, images)


BICUBIC = {"interpolation": "bicubic"}
HUGGING_FACE = {
    "clip": ("CLIP", {}, {**BICUBIC, "geometry": "crop"}),
    "vit": ("ViT", {}, {"geometry": "squash"}),
    "bit": (
        "Bit",
        {"size": {"shortest_edge": 249}},
        {**BICUBIC, "geometry": "crop", "resize": 249},
    ),
    "convnext": (
        "ConvNext",
        {"size": {"shortest_edge": 224}, "crop_pct": 0.95},
        {**BICUBIC, "geometry": "crop", "resize": 235},
    ),
    "convnext at 384": (
        "ConvNext",
        {"size": {"shortest_edge": 384}},
        {**BICUBIC, "size": 384, "geometry": "squash"},
    ),
}


@pytest.mark.parametrize("model", HUGGING_FACE)
def test_hugging_faces_pillow_processors(model):
    name, options, ours = HUGGING_FACE[model]
    model = model.split()[0]
    module = library(f"transformers.models.{model}.image_processing_pil_{model}")
    processor = getattr(module, f"{name}ImageProcessorPil")(**options)

    def transform(image):
        made = processor(image, do_rescale=False, do_normalize=False)["pixel_values"][0]
        return np.moveaxis(made, 0, -1)

    check(Preprocess(**ours, rounding="down"), transform)


@pytest.mark.parametrize(
    ("interpolation", "size"),
    [("bilinear", (2600, 3)), ("bicubic", (2, 1500)), ("lanczos", (1200, 2))],
)
def test_a_panorama_of_a_few_lines_is_made_without_the_rest(interpolation, size):
    """Torchvision makes 57 million pixels of the first."""
    library("torchvision")
    from torchvision.transforms import CenterCrop, InterpolationMode, Resize

    resize, crop = Resize(256, InterpolationMode(interpolation)), CenterCrop(224)
    preprocess = Preprocess(interpolation=interpolation, geometry="crop", resize=256)
    check(preprocess, lambda image: crop(resize(image)), [noise(*size)])


@pytest.mark.parametrize("side", [1, 7, 32, 223])
def test_small_squares_are_enlarged_and_cropped_as_timm_does(side):
    create = library("timm.data").create_transform
    resize, crop = create((3, 224, 224), interpolation="bicubic", crop_pct=0.875).transforms[:2]
    image = noise(side, side)
    preprocess = Preprocess(interpolation="bicubic", geometry="crop", resize=256)
    compact = preprocess.compact([image])
    assert compact.shape == (1, side, side, 3)
    assert np.array_equal(upscale(compact, preprocess)[0], np.asarray(crop(resize(image))))
