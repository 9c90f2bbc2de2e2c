"""The contract that every engine keeps, and how far each one is from the reference."""

from __future__ import annotations

import io
import itertools
import zipfile
from dataclasses import replace

import numpy as np
import pytest
from engine_features import CASES, STORED, ingredients, noise, random_weights, stark
from PIL import Image

from featcache import load_weights
from featcache.backbones.architectures import BACKBONES, CUTS, get_backbone
from featcache.backbones.choice import choose_engine
from featcache.backbones.conversion import agreement, canonical_images
from featcache.backbones.engine import build_engine
from featcache.backbones.reference import resnet_features
from featcache.errors import EngineUnavailableError, RecipeError, ShapeMismatchError, WeightsError
from featcache.frameworks import openvino_precisions, torch_gpu_status, torch_precisions
from featcache.preprocess import FLIP_VIEWS, Preprocess, apply_view, upscale


def _openvino():
    """Yield what OpenVINO runs here; without it, one contender whose tests say so."""
    try:
        precisions = openvino_precisions()
    except EngineUnavailableError:
        precisions = ("f32",)
    for precision in precisions:
        yield pytest.param(("openvino", precision, "cpu"), id=f"openvino-{precision}")


def _torch():
    """Yield what PyTorch runs here, on its GPU too where there is one."""
    devices = ["cpu"]
    if torch_gpu_status()[0] is not None:
        devices.append(torch_gpu_status()[0])
    for device, precision in ((d, p) for d in devices for p in torch_precisions(d)):
        yield pytest.param(
            ("torch", precision, device),
            marks=pytest.mark.torch,
            id=f"torch-{precision}" + ("" if device == "cpu" else f"-{device}"),
        )


REFERENCE = ("oneflow", "f32", "cpu")
ONEFLOW = pytest.param(REFERENCE, marks=pytest.mark.oneflow, id="oneflow-f32")
OTHERS = [*_openvino(), *_torch()]
# Least cosine of any image's features with OneFlow's in float32, and largest difference of any
# number, at every cut. Measured on 1,000 images of CIFAR-10 with the starter weights on AVX-512:
# f32 1 - 1e-12 and 1.5e-5, bf16 0.99996 and 0.16 (after the pooling 0.034), of features up to 20.
AT_LEAST = {"f32": 0.99999, "bf16": 0.999, "f16": 0.999}
AT_MOST = {"f32": 1e-4, "bf16": 0.5, "f16": 0.5}


def made(contender, weights, cuts=CUTS):
    """Build an engine, or skip with the reason why it cannot run."""
    name, precision, device = contender
    try:
        return build_engine(choose_engine(name, device, precision), weights, cuts)
    except EngineUnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def starter():
    return load_weights("tinyimagenet32")


@pytest.fixture(scope="module", params=[ONEFLOW, *OTHERS])
def contender(request):
    return request.param


@pytest.fixture(scope="module")
def engine(contender, starter):
    return made(contender, starter)


def same(some, others):
    return some.keys() == others.keys() and all(
        np.array_equal(some[cut], others[cut]) for cut in some
    )


@pytest.mark.parametrize("n", [1, 2, 3, 65])
def test_any_number_of_images_at_every_cut(engine, n):
    features = engine.extract(noise(n))
    assert tuple(features) == CUTS
    for cut, array in features.items():
        assert array.dtype == np.float32 and np.isfinite(array).all()
        assert array.shape == (n, *get_backbone("resnet18").cut_shape(cut, 64))
        array[...] = 0  # the caller's own
    assert np.isfinite(engine.extract(noise(n))["avgpool"]).all()
    assert engine.batch_size >= 1


def test_the_same_images_give_the_same_bytes_in_any_company(engine):
    images = noise(37)
    features = engine.extract(images)
    assert same(engine.extract(images), features)
    order = np.random.default_rng(1).permutation(37)
    assert same(engine.extract(images[order]), {cut: a[order] for cut, a in features.items()})
    assert same(engine.extract(images[5:6]), {cut: a[5:6] for cut, a in features.items()})


def test_the_pooled_features_are_the_mean_of_the_last_stage(engine):
    features = engine.extract(noise(3))
    expected = features["layer4"].mean(axis=(2, 3))
    np.testing.assert_allclose(features["avgpool"], expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("cuts", [("layer1",), ("avgpool",), ("layer3", "layer2")])
def test_fewer_cuts_are_the_same_features(contender, engine, starter, cuts):
    features = made(contender, starter, cuts).extract(noise(3))
    assert tuple(features) == cuts
    every = engine.extract(noise(3))
    for cut in cuts:
        tolerance = 0 if contender[1] == "f32" else 0.1  # the last stage stays in float32
        np.testing.assert_allclose(features[cut], every[cut], rtol=0, atol=tolerance)


@pytest.mark.parametrize("side", [1, 8, 32, 33, 50, 63])
def test_small_images_are_enlarged_exactly(engine, side):
    """Also in half precision: what is compared is bytes."""
    small = noise(3, side)
    assert same(engine.extract(small), engine.extract(upscale(small, Preprocess(64))))


@pytest.mark.parametrize("interpolation", ["bicubic", "lanczos"])
def test_small_images_are_enlarged_exactly_by_every_filter(contender, starter, interpolation):
    preprocess = Preprocess(64, interpolation=interpolation, geometry="crop", resize=72)
    engine = made(contender, replace(starter, preprocess=preprocess), ("layer1",))
    for small in (noise(2, 1), stark(2, 21)):
        large = upscale(small, preprocess)
        assert same(engine.extract(small), engine.extract(large))
        flipped = engine.extract(apply_view(small, "hvflip"))
        assert same(flipped, engine.extract(apply_view(large, "hvflip")))


def test_what_no_engine_enlarges_is_refused(contender, starter):
    for geometry in (Preprocess(64, geometry="pad"), Preprocess(64, geometry="crop", resize=73)):
        engine = made(contender, replace(starter, preprocess=geometry), ("avgpool",))
        with pytest.raises(ShapeMismatchError, match=r"expected uint8 .* with s of 64, found"):
            engine.extract(noise(2, 32))
        assert np.isfinite(engine.extract(noise(2))["avgpool"]).all()


def test_a_flip_before_or_after_enlarging_is_the_same(engine):
    small = noise(3, 32)
    large = upscale(small, Preprocess(64))
    for view in FLIP_VIEWS:
        flipped = engine.extract(apply_view(small, view))
        assert same(flipped, engine.extract(apply_view(large, view)))


def test_the_input_stays_as_it_is(engine):
    images = noise(3)
    images.flags.writeable = False
    engine.extract(images)
    assert np.array_equal(images, noise(3))


@pytest.mark.parametrize(
    "wrong",
    [
        noise(2).astype(np.float32),
        noise(2)[:0],
        noise(2)[:, :32],
        noise(2)[..., :1],
        noise(2)[0],
        noise(2, 65),
        noise(2)[:, :0, :0],
    ],
    ids=["dtype", "none", "not square", "one channel", "one image", "too large", "no pixel"],
)
def test_other_arrays_are_refused(engine, wrong):
    with pytest.raises(ShapeMismatchError, match=r"expected uint8 \(N >= 1, s, s, 3\) with s up"):
        engine.extract(wrong)


@pytest.mark.parametrize(
    ("cuts", "said"), [((), "none"), (("layer5",), "'layer5'"), (("avgpool",) * 2, "once")]
)
def test_cuts_that_do_not_exist_are_refused(contender, starter, cuts, said):
    with pytest.raises(RecipeError, match=f"cut: expected .*{said}"):
        made(contender, starter, cuts)


def assert_close(features, reference, precision, at_most=1.0):
    for cut, array in features.items():
        rows, expected = (a.reshape(len(a), -1).astype(np.float64) for a in (array, reference[cut]))
        norms = np.linalg.norm(rows, axis=1) * np.linalg.norm(expected, axis=1)
        cosine = (rows * expected).sum(axis=1) / norms
        assert cosine.min() >= AT_LEAST[precision], (cut, cosine.min())
        difference = np.abs(rows - expected).max()
        assert difference <= AT_MOST[precision] * at_most, (cut, difference)


@pytest.mark.parametrize("contender", [ONEFLOW, *OTHERS])
@pytest.mark.parametrize("case", CASES)
def test_parity_with_what_oneflow_gave(contender, case):
    """Where OneFlow cannot be, too: its features are kept."""
    weights, images, cuts = ingredients(case)
    with np.load(STORED) as stored:
        expected = {cut: stored[f"{case} {cut}"] for cut in cuts}
    assert_close(made(contender, weights, cuts).extract(images), expected, contender[1])


@pytest.mark.oneflow
@pytest.mark.parametrize("contender", OTHERS)
def test_parity_on_noise(contender, starter):
    expected = made(REFERENCE, starter).extract(noise(16))
    assert_close(made(contender, starter).extract(noise(16)), expected, contender[1])


@pytest.mark.parametrize("compact", [False, True])
def test_parity_on_real_images_with_an_independent_framework(
    contender, engine, starter, reference, compact
):
    files, expected = reference
    images = [Image.open(io.BytesIO(data)).convert("RGB") for data in files]
    preprocess = starter.preprocess
    pixels = preprocess.compact(images) if compact else preprocess.batch(images)
    assert pixels.shape[1] == (32 if compact else 64)
    features = {"avgpool": engine.extract(pixels)["avgpool"]}
    assert_close(features, {"avgpool": expected}, contender[1])


@pytest.mark.slow
@pytest.mark.oneflow
@pytest.mark.parametrize("contender", OTHERS)
def test_parity_on_a_thousand_real_images(contender, starter, cifar_zip):
    with zipfile.ZipFile(cifar_zip) as archive:
        names = [name for name in archive.namelist() if name.endswith((".jpg", ".jpeg"))]
        files = [archive.read(name) for name in names[:: len(names) // 1000][:1000]]
    images = [Image.open(io.BytesIO(data)).convert("RGB") for data in files]
    some, reference = made(contender, starter), made(REFERENCE, starter)
    for start in range(0, 1000, 100):
        batch = images[start : start + 100]
        features = some.extract(starter.preprocess.compact(batch))
        assert_close(features, reference.extract(starter.preprocess.batch(batch)), contender[1])


@pytest.mark.oneflow
@pytest.mark.parametrize("contender", [other for other in OTHERS if "f32" in other.id])
@pytest.mark.parametrize(("name", "size"), [("resnet18", 33), ("resnet34", 64), ("resnet50", 50)])
def test_parity_of_the_whole_family(contender, name, size):
    weights = random_weights(name, size)
    expected = made(REFERENCE, weights).extract(noise(3, size))
    for cut, array in expected.items():
        assert array.shape == (3, *get_backbone(name).cut_shape(cut, size))
        assert 0.1 < array.std() < 10
    features = made(contender, weights).extract(noise(3, size))
    scale = max(abs(array).max() for array in expected.values())
    assert_close(features, expected, "f32", at_most=scale)


def test_every_cut_of_every_backbone_has_a_shape():
    shapes = {
        (name, cut): get_backbone(name).cut_shape(cut, 224)
        for name, cut in itertools.product(("resnet18", "resnet34", "resnet50"), CUTS)
    }
    assert shapes["resnet18", "layer1"] == (64, 56, 56)
    assert shapes["resnet34", "layer4"] == (512, 7, 7)
    assert shapes["resnet50", "layer3"] == (1024, 14, 14)
    assert shapes["resnet50", "avgpool"] == (2048,)
    with pytest.raises(RecipeError, match="layer1, layer2, layer3, layer4, avgpool, found 'fc'"):
        get_backbone("resnet18").cut_shape("fc", 224)


def test_numpy_and_every_engine_agree_on_every_backbone(contender):
    """What `build_engine` compares an engine with is the network itself."""
    for name in BACKBONES:
        weights = load_weights("random:3", name, size=64)
        image = canonical_images(64)[:1]
        reference = resnet_features(weights.state, BACKBONES[name], weights.preprocess, image[0])
        found = made(contender, weights).extract(image)
        agreed = agreement(found, {cut: reference[cut] for cut in CUTS})
        assert agreed.cosine > AT_LEAST[contender[1]], name


@pytest.mark.parametrize("key", ["layer1.0.conv1.weight", "bn1.bias"])
def test_weights_that_overflow_are_refused_by_every_engine(contender, starter, key):
    """OpenVINO's ReLU turns NaN into 0: its features would be finite and mean nothing."""
    state = {**starter.state, key: np.full_like(starter.state[key], 1e38)}
    with pytest.raises(WeightsError, match="expected weights that give finite features"):
        made(contender, replace(starter, state=state))
