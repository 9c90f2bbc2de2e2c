"""`ship`: one file that answers as `predict` does, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from backbone_models import TINY_ONNX, write_exported, write_modules, write_xml
from conftest import colour_image
from PIL import Image

pytest.importorskip("onnx")

import onnx
import onnxruntime

from featcache import extract, finetune, knn, load, load_head, predict, probe, ship
from featcache.cli import main
from featcache.errors import (
    CacheMismatchError,
    EngineUnavailableError,
    FeatcacheError,
    OutputError,
    RecipeError,
    WeightsError,
)
from featcache.preprocess import Preprocess
from featcache.probes.head import save_head
from featcache.shipping.check import answers, check_images, compared
from featcache.shipping.graph import Graph
from featcache.shipping.pixels import of_any_size
from featcache.shipping.ship import ShipOptions

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples" / "onnx"
NODE = ROOT / ".node" / "node_modules"
SIZES = ((32, 32), (40, 50), (333, 200), (90, 300), (1, 1), (700, 41))


def session(path):
    """Open a shipped file as any program would."""
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def outputs(path, pixels):
    """Return what a shipped file answers, by name."""
    opened = session(path)
    names = [one.name for one in opened.get_outputs()]
    return dict(zip(names, opened.run(None, {"image": pixels}), strict=True))


def read(path):
    """Read an image file as pixels uint8 (1, H, W, 3)."""
    return np.asarray(Image.open(path).convert("RGB"), np.uint8)[None]


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder for what many tests use; where files of networks are is remembered in it."""
    folder = tmp_path_factory.mktemp("ship")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEATCACHE_WEIGHTS", str(folder / "weights"))
        yield folder


@pytest.fixture(autouse=True)
def remembered(home, desk, monkeypatch):
    monkeypatch.setenv("FEATCACHE_WEIGHTS", str(desk / "weights"))


@pytest.fixture(scope="module")
def tiny_cache(desk, image_folder):
    """Features of a tiny ONNX network: 36 images to train on, 18 to test on, three classes."""
    return extract(image_folder, backbone=TINY_ONNX, output=desk / "tiny.h5").cache


@pytest.fixture(scope="module")
def tiny_head(desk, tiny_cache):
    result = probe(tiny_cache, runs=desk / "runs", C=1.0, save_head_to=desk / "head.safetensors")
    return result.head


@pytest.fixture(scope="module")
def resnet(desk, image_folder):
    """The head of a built-in ResNet, with its scaling inside."""
    cache = extract(
        image_folder, weights="tinyimagenet32", size=32, output=desk / "resnet.h5"
    ).cache
    result = probe(
        cache, runs=desk / "runs", C=1.0, scale="l2", save_head_to=desk / "resnet.safetensors"
    )
    return result.head


@pytest.fixture(scope="module")
def shipped(desk, resnet):
    """The ResNet's file, and what `ship` said of it."""
    return ship(resnet, desk / "resnet.onnx", runs=desk / "runs")


@pytest.fixture(scope="module")
def pictures(image_folder):
    return sorted((image_folder / "test").rglob("*.png"))[::4]


# The pixels.


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize(
    "geometry",
    [
        {"geometry": "square"},
        {"geometry": "crop", "resize": 53},
        {"geometry": "squash", "resize": 51, "rounding": "down"},
        {"geometry": "pad", "fill": (3, 200, 77)},
    ],
    ids=lambda one: one["geometry"],
)
def test_pixels_are_those_of_pillow_to_the_byte(interpolation, geometry):
    plain = Preprocess(48, (0, 0, 0), (1 / 255,) * 3, interpolation=interpolation, **geometry)
    graph = Graph()
    graph.output(of_any_size(graph, "image", plain), "pixels")
    ends = {"pixels": (np.float32, [1, 3, 48, 48])}
    model = graph.model({"image": (np.uint8, [1, "H", "W", 3])}, ends, {}, False)
    opened = onnxruntime.InferenceSession(model.SerializeToString())
    generator = np.random.default_rng(0)
    for width, height in SIZES:
        image = generator.integers(0, 256, (height, width, 3), np.uint8)
        (found,) = opened.run(None, {"image": image[None]})
        expected = plain.pixels(Image.fromarray(image))
        assert np.array_equal(found[0].transpose(1, 2, 0).round(), expected), (width, height)


# The answers.


def test_a_resnet_answers_as_predict(shipped, resnet, pictures):
    facts = session(shipped.output).get_modelmeta().custom_metadata_map
    names = json.loads(facts["classes"])
    for picture, expected in zip(pictures, predict(pictures, resnet, top=3), strict=True):
        found = outputs(shipped.output, read(picture))["probabilities"][0]
        assert dict(expected.top) == pytest.approx(dict(zip(names, found, strict=True)), abs=1e-5)
    assert shipped.agreement.largest_difference < 1e-5
    assert shipped.agreement.n_images == 32


def test_what_the_file_says_of_itself(shipped, resnet, desk):
    facts = session(shipped.output).get_modelmeta().custom_metadata_map
    head = load_head(resnet)
    assert json.loads(facts["classes"]) == list(head.class_names)
    assert facts["fingerprint"] == head.fingerprint
    assert facts["weights_sha256"] == head.ingredients["weights_sha256"]
    assert "Tiny-ImageNet" in facts["weights_source"]
    assert json.loads(facts["accuracy"]) == shipped.facts["accuracy"]
    low, high = json.loads(facts["accuracy_interval"])
    assert low <= json.loads(facts["accuracy"]) <= high
    assert {one.name for one in onnx.load(shipped.output).graph.input} == {"image"}
    assert str(desk) not in "".join(facts.values())


def test_the_file_needs_nothing_newer_than_onnx_runtime_1_20(shipped):
    model = onnx.load(shipped.output)
    assert model.opset_import[0].version <= 21 and model.ir_version <= 10
    assert {node.domain for node in model.graph.node} == {""}


def test_the_card(shipped):
    page = shipped.card.read_text()
    assert "| top-1 |" in page and "(95 %: " in page
    assert "| expected calibration error, 15 bins |" in page
    for name in ("blue", "green", "red"):
        assert re.search(rf"\| {name} \| [01]\.\d{{4}} \| 6 \|", page)
    assert "What it was not tested on" in page
    snippet = page.split("```python\n")[1].split("```")[0]
    done = subprocess.run(
        [sys.executable, "-c", snippet], cwd=shipped.output.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_names_of_classes_cannot_change_the_card(tiny_head, tmp_path):
    head = load_head(tiny_head)
    names = ("a|b", "<script>alert(1)</script>", "[x](y)\n# z\x1b[2J")
    result = ship(replace(head, class_names=names), tmp_path / "m.onnx")
    page = result.card.read_text()
    assert r"a\|b" in page and "<script>" not in page and r"\[x\]" in page
    assert "\n# z" not in page and "\x1b" not in page
    facts = session(result.output).get_modelmeta().custom_metadata_map
    assert json.loads(facts["classes"]) == list(names)


@pytest.mark.parametrize("task", ["classes", "labels", "numbers"])
def test_heads_of_every_task(task, tiny_head, tmp_path, pictures):
    thresholds = np.full(3, 0.5, np.float32) if task == "labels" else None
    head = replace(load_head(tiny_head), task=task, thresholds=thresholds)
    path = tmp_path / "head.safetensors"
    save_head(path, head, {})
    result = ship(path, tmp_path / "m.onnx")
    expected = predict(pictures[:1], path, top=3)[0]
    name = "values" if task == "numbers" else "probabilities"
    found = outputs(result.output, read(pictures[0]))[name][0]
    pairs = expected.values if task == "numbers" else expected.top
    named = dict(zip(head.class_names, found, strict=True))
    assert named == pytest.approx(dict(pairs), rel=1e-4, abs=1e-5)
    assert ("thresholds" in result.facts) == (task == "labels")


def test_neighbours_vote_as_in_knn(tiny_cache, tmp_path, image_folder):
    result = ship(tiny_cache, tmp_path / "knn.onnx", knn=5)
    (expected,) = knn(tiny_cache, ks=(5,), runs=tmp_path / "runs")
    assert result.facts["accuracy"] == expected.top1
    cache = load(tiny_cache)
    right = [
        cache.class_names.index(picture.parent.name)
        == outputs(result.output, read(picture))["probabilities"][0].argmax()
        for picture in sorted((image_folder / "test").rglob("*.png"))
    ]
    assert np.mean(right) == expected.top1


@pytest.mark.parametrize("to", ["onnx", "openvino"])
def test_half_precision_takes_half_the_space(to, shipped, resnet, tmp_path):
    suffix = {"onnx": ".onnx", "openvino": ".xml"}[to]
    result = ship(resnet, tmp_path / f"half{suffix}", to=to, precision="f16")
    assert result.size_bytes < 0.52 * shipped.size_bytes
    assert 0 < result.agreement.feature_difference < 5e-3


def test_any_number_of_images(tiny_head, tmp_path, pictures):
    result = ship(tiny_head, tmp_path / "m.onnx", dynamic_batch=True)
    canonical = Preprocess(32).batch([Image.open(one).convert("RGB") for one in pictures])
    assert result.inputs == {"image": "uint8 (N, 32, 32, 3)"}
    expected = predict(pictures, tiny_head, top=3)
    for row, one in zip(outputs(result.output, canonical)["probabilities"], expected, strict=True):
        assert max(row) == pytest.approx(one.probability, abs=1e-5)


def test_openvino_gets_an_xml_with_the_names_of_classes(tiny_head, tmp_path):
    import openvino

    result = ship(tiny_head, tmp_path / "m.xml", to="openvino")
    model = openvino.Core().read_model(result.output)
    assert model.get_rt_info(["featcache", "class_1"]).astype(str) == "green"
    assert sorted(path.name for path in tmp_path.glob("m.*")) == ["m.bin", "m.md", "m.xml"]
    assert result.agreement.largest_difference < 1e-3


def test_a_network_of_openvino_stays_there(tmp_path, image_folder):
    backbone = str(write_xml(tmp_path / "tiny.xml"))
    cache = extract(image_folder, backbone=backbone, output=tmp_path / "c.h5").cache
    head = probe(cache, C=1.0, check=False).head
    with pytest.raises(RecipeError, match=r"tiny\.xml: .*use --to openvino"):
        ship(head, tmp_path / "m.onnx")
    result = ship(head, tmp_path / "m.xml", to="openvino")
    assert result.agreement.largest_difference < 1e-3


@pytest.mark.torch
@pytest.mark.parametrize(
    "kind", ["module", *(pytest.param(one, marks=pytest.mark.slow) for one in ("pt2", "timm"))]
)
def test_models_of_pytorch(kind, tmp_path, image_folder, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    write_modules(tmp_path)
    options = {"timm": {"weights": "random:0", "size": 32}}.get(kind, {})
    backbone = {
        "module": lambda: "featcache_torch_net:build",
        "pt2": lambda: str(write_exported(tmp_path / "tiny.pt2")),
        "timm": lambda: "timm:test_vit",
    }[kind]()
    cache = extract(image_folder, backbone=backbone, output=tmp_path / "c.h5", **options).cache
    head = probe(cache, C=1.0, check=False).head
    given = {"backbone": backbone} if kind == "module" else {}
    for dynamic in (False, True):
        result = ship(head, tmp_path / f"{dynamic}.onnx", dynamic_batch=dynamic, **given)
        assert result.agreement.largest_difference < 1e-4
        assert result.agreement.feature_difference < 1e-4
    for name in ("featcache_numpy_net", "featcache_torch_net"):
        sys.modules.pop(name, None)


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["resnet18", "timm:test_vit"])
def test_a_finetuned_network(backbone, image_folder, tmp_path):
    made = finetune(
        image_folder,
        method="full",
        backbone=backbone,
        weights="random:0",
        size=32,
        epochs=1,
        batch_size=12,
        engine="torch",
        runs=tmp_path / "runs",
    )
    result = ship(made.run / "head.safetensors", tmp_path / "m.onnx")
    assert result.agreement.largest_difference < 1e-4
    assert result.facts["accuracy"] == made.top1
    assert "model.safetensors" in result.facts["weights_source"]
    assert str(tmp_path) not in result.card.read_text()


# What is refused.


def left_by(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_that_is_there_stays(tiny_head, tmp_path):
    for name in ("m.onnx", "m.md"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(OutputError, match=rf"{name}: expected no such file.*--force"):
            ship(tiny_head, tmp_path / "m.onnx")
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()
    (tmp_path / "m.onnx").write_text("mine")
    ship(tiny_head, tmp_path / "m.onnx", force=True)
    assert left_by(tmp_path) == ["m.md", "m.onnx"]


@pytest.mark.parametrize(
    ("name", "options", "error", "says"),
    [
        ("m.pb", {}, OutputError, r"ends in \.onnx, found \.pb"),
        ("m.xml", {}, OutputError, "use --to openvino"),
        ("m.onnx", {"to": "tflite"}, RecipeError, "to: expected one of onnx, openvino"),
        ("m.onnx", {"precision": "f8"}, RecipeError, "precision"),
        ("m.onnx", {"knn": 0}, RecipeError, "at least 1 neighbour"),
        ("m.onnx", {"images": ["nowhere"]}, FeatcacheError, "nowhere: expected an image"),
        ("m.onnx", {"backbone": "resnet18", "weights": "random:0"}, WeightsError, "expected feat"),
    ],
)
def test_wrong_options(name, options, error, says, tiny_head, tmp_path):
    with pytest.raises(error, match=says):
        ship(tiny_head, tmp_path / name, **options)
    assert left_by(tmp_path) == []


def test_more_neighbours_than_images(tiny_cache, tmp_path):
    with pytest.raises(CacheMismatchError, match="found 36; use a smaller --knn"):
        ship(tiny_cache, tmp_path / "m.onnx", knn=37)
    assert left_by(tmp_path) == []


def test_other_answers_than_those_of_predict_are_no_file(tiny_head, tmp_path):
    """The network file is another one than the features were made with, under its digest."""
    images, _ = check_images([], 10**8)
    result = ship(tiny_head, tmp_path / "m.onnx")
    pixels = [np.asarray(one, np.uint8)[None] for one in images]
    found = answers(result.output, pixels)
    assert compared(found, found, "").problem("f32") == ""
    for name in found:
        other = {**found, name: found[name] + 0.01 * np.abs(found[name]).max()}
        assert "above 0.001" in compared(other, found, "").problem("f32")
        assert compared(other, found, "").problem("f16") == ""
    broken = {**found, "features": np.full_like(found["features"], np.nan)}
    assert compared(broken, found, "").problem("f32")


def test_operators_that_a_target_lacks(tmp_path):
    node = onnx.helper.make_node("Foo", ["image"], ["probabilities"], domain="com.example")
    ends = [
        [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.UINT8, [1, 2, 2, 3])]
        for name in ("image", "probabilities")
    ]
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "g", *ends),
        opset_imports=[onnx.helper.make_opsetid("com.example", 1)],
        ir_version=8,
    )
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(EngineUnavailableError, match=r"m\.onnx: expected a model that ONNX") as e:
        answers(tmp_path / "m.onnx", [np.zeros((1, 2, 2, 3), np.uint8)])
    assert "\n" not in str(e.value)
    with pytest.raises(WeightsError, match=r"operators of the domain com\.example"):
        Graph().join(model, "pixels", ["probabilities"], "m.onnx")


def test_a_network_above_what_runtimes_read(tmp_path):
    model = onnx.load(TINY_ONNX)
    model.opset_import[0].version = 25
    with pytest.raises(WeightsError, match="opset 25, above 21;"):
        Graph().join(model, "pixels", ["features"], "m.onnx")


def test_an_old_network_is_converted(tmp_path):
    model = onnx.load(TINY_ONNX)
    model.opset_import[0].version = 11
    graph = Graph()
    (name,) = graph.join(model, "pixels", ["features"], "m.onnx")
    assert graph.opset == 18 and name in {one for node in graph.nodes for one in node.output}


def test_the_command(tiny_head, desk, tmp_path, capsys, pictures):
    words = ["ship", tiny_head, "-o", tmp_path / "m.onnx", "--runs", desk / "runs", "--json"]
    words += ["--images", pictures[0].parent]
    assert main([str(word) for word in words]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["output"].endswith("m.onnx") and answer["agreement"]["n_images"] == 6
    assert answer["agreement"]["images"] == pictures[0].parent.name
    assert main([str(word) for word in words[:-2]]) == 1
    assert capsys.readouterr().err.startswith("error: ")
    plain = ["ship", tiny_head, "-o", tmp_path / "n.onnx", "--runs", desk / "runs"]
    assert main([str(word) for word in plain]) == 0
    said = capsys.readouterr().out
    assert "largest difference of a probability" in said and "top-1 1.0000 (" in said


def test_options_are_checked_when_they_are_made():
    with pytest.raises(RecipeError):
        ShipOptions(to="coreml")


def test_a_head_without_its_record_is_shipped_without_accuracy(tiny_head, tmp_path):
    notes = []
    result = ship(tiny_head, tmp_path / "m.onnx", runs=tmp_path, on_note=notes.append)
    assert "accuracy" not in result.facts and "nothing is known here" in result.card.read_text()
    assert any("no record of its run" in note for note in notes)


# The examples.


@pytest.fixture
def ppm(tmp_path):
    """An image in the format that the examples read without a library."""
    path = tmp_path / "image.ppm"
    colour_image(1, 7, (90, 61)).save(path)
    return path


def told(*command):
    """Run an example, and return its answer: probability by class."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pairs = (line.rsplit(" ", 1) for line in done.stdout.splitlines())
    return {name: float(value) for name, value in pairs}


def expected_of(ppm, head):
    return pytest.approx(dict(predict(ppm, head, top=3)[0].top), abs=1e-4)


def test_the_example_in_python(shipped, ppm, resnet):
    found = told(sys.executable, EXAMPLES / "classify.py", shipped.output, ppm)
    assert found == expected_of(ppm, resnet)


@pytest.mark.skipif(
    shutil.which("node") is None or not NODE.exists(),
    reason="needs Node and onnxruntime-web in .node: npm install --prefix .node onnxruntime-web",
)
def test_the_example_in_node(shipped, ppm, resnet):
    found = told("node", EXAMPLES / "classify.mjs", shipped.output, ppm)
    assert found == expected_of(ppm, resnet)


@pytest.mark.skipif(
    shutil.which("cmake") is None or shutil.which("g++") is None, reason="needs cmake and g++"
)
def test_the_example_in_cpp(resnet, ppm, desk, tmp_path):
    import openvino

    model = ship(resnet, tmp_path / "m.xml", to="openvino", runs=desk / "runs").output
    folder = Path(openvino.__file__).parent / "cmake"
    for step in (
        ["-S", EXAMPLES, "-B", tmp_path / "build", f"-DOpenVINO_DIR={folder}"],
        ["--build", tmp_path / "build"],
    ):
        done = subprocess.run(["cmake", *map(str, step)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert told(tmp_path / "build" / "classify", model, ppm) == expected_of(ppm, resnet)
