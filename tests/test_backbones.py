"""The contract that a backbone of any library, file or function keeps.

The ONNX files in tests/data were written by ``python tests/data/make_onnx.py``.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
import zipfile

import h5py
import numpy as np
import pytest
from backbone_models import (
    DATA,
    TINY_ONNX,
    add_open_clip,
    save_hf,
    write_exported,
    write_modules,
    write_xml,
)
from caches import content
from conftest import colour_image
from engine_features import noise

from featcache import evaluate_head, extract, load, load_dataset, load_weights, predict
from featcache.backbones import conversion, graph_file, library_network, pretrained
from featcache.backbones.choice import choose_engine
from featcache.backbones.conversion import agreement, is_intact, kept_in
from featcache.backbones.engine import build_engine, settled
from featcache.backbones.exported_program import _copy_plainly, check_exported
from featcache.backbones.listing import describe_backbone, list_backbones
from featcache.backbones.naming import parse_backbone, recorded_backbone
from featcache.backbones.network import drawn
from featcache.cli import main
from featcache.download import NetworkError
from featcache.errors import (
    EngineUnavailableError,
    RecipeError,
    WeightsError,
)
from featcache.extraction import extract as extraction
from featcache.extraction.options import ExtractOptions
from featcache.frameworks import openvino_precisions, openvino_status, torch_precisions
from featcache.progress import silent
from featcache.store.format import fingerprint

TORCH, ONEFLOW = pytest.mark.torch, pytest.mark.oneflow
needs_openvino = pytest.mark.skipif(
    openvino_status()[0] is None, reason="the package openvino is not installed"
)
RANDOM_32 = {"weights": "random:0", "size": 32}
# Kind: the engines that run it, and the mark of what makes it.
KINDS = {
    "timm": (("openvino", "torch"), TORCH),
    "torchvision": (("openvino", "torch"), TORCH),
    "hf": (("openvino", "torch"), TORCH),
    "open_clip": (("openvino", "torch"), TORCH),
    "module": (("openvino", "torch"), TORCH),
    "pt2": (("openvino",), TORCH),
    "onnx": (("openvino",), needs_openvino),
    "xml": (("openvino",), needs_openvino),
    "callable": (("auto",), ()),
    "flowvision": (("oneflow",), ONEFLOW),
}
EVERY = [
    pytest.param((kind, engine), id=f"{kind}-{engine}", marks=mark)
    for kind, (engines, mark) in KINDS.items()
    for engine in engines
]
# What a run writes does not depend on how its graph came about: timm's stands for these.
_CONVERTED_TOO = {f"{kind}-openvino" for kind in ("torchvision", "hf", "open_clip", "module")}


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Where the tests of this file keep facts of backbones and conversions."""
    return tmp_path_factory.mktemp("kept")


@pytest.fixture(autouse=True)
def small_and_alone(monkeypatch, tmp_path, kept):
    """Keep this machine's caches out; 20 + 10 images make 3 + 2 shards."""
    monkeypatch.setenv("FEATCACHE_WEIGHTS", str(kept / "weights"))
    for name in ("HOME", "XDG_CACHE_HOME", "HF_HOME", "TORCH_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(extraction, "SHARD_ROWS", 8)
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


@pytest.fixture
def alone(monkeypatch, tmp_path):
    """Keep nothing that other tests remember."""
    monkeypatch.setenv("FEATCACHE_WEIGHTS", str(tmp_path / "own" / "weights"))
    return tmp_path / "own"


class Models:
    """Backbones by kind, each made when it is first asked for."""

    def __init__(self, folder):
        self.folder = folder
        self._made = {}

    def __call__(self, kind):
        """Return a backbone's name and the options that it needs."""
        if kind not in self._made:
            self._made[kind] = self._make(kind)
        return self._made[kind]

    def hf(self, kind):
        folder = self.folder / kind.replace(" ", "-")
        return str(folder if folder.is_dir() else save_hf(folder, kind))

    def _make(self, kind):
        if kind == "timm":
            return "timm:test_vit", RANDOM_32
        if kind == "torchvision":
            return "torchvision:resnet18", RANDOM_32
        if kind == "flowvision":
            return "flowvision:mobilenet_v2", {"weights": "random:0", "size": 64}
        if kind == "open_clip":
            return add_open_clip(self.folder / "open_clip"), {"weights": "random:0"}
        if kind == "hf":
            return self.hf("vit"), {}
        if kind == "module":
            return "featcache_torch_net:build", {}
        if kind == "callable":
            return "featcache_numpy_net:build", {}
        if kind == "pt2":
            return str(write_exported(self.folder / "tiny.pt2")), {}
        if kind == "xml":
            return str(write_xml(self.folder / "tiny.xml")), {}
        return str(TINY_ONNX), {}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_modules(folder)
    sys.path.insert(0, str(folder))
    yield Models(folder)
    sys.path.remove(str(folder))
    for name in ("featcache_numpy_net", "featcache_torch_net"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits").limited(20, 10)


def built(backbone, engine="auto", precision="f32", cut="pooled", **options):
    """Return the weights and the engine that an extraction would use."""
    weights = load_weights(options.pop("weights", None), backbone, **options)
    choice = choose_engine(engine, "auto", precision, weights.engines)
    cuts = tuple(cut.split(","))
    choice = settled(choice, weights, cuts)
    return weights, build_engine(choice, weights, cuts)


def fingerprint_of(digits, backbone, **options):
    """Return the fingerprint of a cache that would be made."""
    plan, _ = extraction._plan(digits, ExtractOptions(backbone, **options), silent, silent)
    return fingerprint(plan.meta("0" * 64))


def same(some, others):
    return some.keys() == others.keys() and all(
        np.array_equal(some[cut], others[cut]) for cut in some
    )


def one_line_of(capsys, *arguments):
    """Run a command that fails; return the one line that it says, without a traceback."""
    assert main([str(word) for word in arguments]) in (1, 2)
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in said, said
    assert said.splitlines()[-1] == lines[0], said
    return lines[0]


def nothing_written():
    folder = os.environ["FEATCACHE_DIR"]
    return not os.path.isdir(folder) or not [
        name for name in os.listdir(folder) if not name.endswith(".lock")
    ]


# What every backbone does.


@pytest.mark.parametrize("case", [one for one in EVERY if one.id != "torchvision-openvino"])
def test_an_image_gives_the_same_bytes_in_any_company(models, case):
    kind, engine = case
    backbone, options = models(kind)
    weights, ready = built(backbone, engine, **options)
    images = noise(37, weights.preprocess.size)
    features = ready.extract(images)
    (pooled,) = features.values()
    assert pooled.dtype == np.float32 and pooled.shape == (37, pooled.shape[1])
    assert np.isfinite(pooled).all() and pooled.std(axis=0).max() > 0
    order = np.random.default_rng(1).permutation(37)
    assert same(ready.extract(images[order]), {cut: a[order] for cut, a in features.items()})
    for row in (0, 36):
        alone = ready.extract(images[row : row + 1])
        assert same(alone, {cut: a[row : row + 1] for cut, a in features.items()})
    if weights.preprocess.enlarges:
        assert np.isfinite(ready.extract(noise(3, 8))["pooled"]).all()


@pytest.mark.parametrize("case", [one for one in EVERY if one.id not in _CONVERTED_TOO])
def test_a_run_that_was_interrupted_ends_in_the_same_bytes(models, digits, tmp_path, case):
    kind, engine = case
    backbone, options = models(kind)
    options = {**options, "backbone": backbone, "engine": engine}
    whole = extract(digits, output=tmp_path / "whole/", **options)

    def interrupt(progress):
        if progress.done >= 16:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(digits, output=tmp_path / "torn/", on_progress=interrupt, **options)
    resumed = extract(digits, output=tmp_path / "torn/", batch_size=3, **options)
    assert resumed.n_resumed > 0 and resumed.cache.name == whole.cache.name
    assert content(resumed.cache) == content(whole.cache)
    assert extract(digits, output=tmp_path / "torn/", **options).reused
    meta = load(whole.cache).meta
    assert meta["backbone"] == parse_backbone(backbone).stored
    assert str(tmp_path.parent) not in meta["backbone"]
    with h5py.File(whole.cache) as file:  # and nothing of featcache
        features, labels = file["train/features"], file["train/labels"]
        assert features.shape == (20, features.shape[1]) and features.dtype == np.float32
        assert labels.shape == (20,) and np.isfinite(features[:]).all()


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=m) for kind, (_, m) in KINDS.items()])
def test_the_fingerprint_is_of_every_ingredient(models, digits, tmp_path, kind, monkeypatch):
    backbone, options = models(kind)
    engines = KINDS[kind][0]
    if "torch" in engines:  # which needs no conversion for each
        options = {**options, "engine": "torch"}
    base = fingerprint_of(digits, backbone, **options)
    for unchanged in ({}, {"output": str(tmp_path / "other/")}, {"batch_size": 3}):
        assert fingerprint_of(digits, backbone, **{**options, **unchanged}) == base
    changes = [
        {"mean": (0.1, 0.2, 0.3)},
        {"std": (0.1, 0.2, 0.3)},
        {"interpolation": "lanczos"},
        {"geometry": "pad"},
        {"geometry": "crop", "crop_pct": 0.5},
        {"dtype": "float16"},
        {"views": "flips"},
    ]
    if options.get("weights"):
        changes.append({"weights": "random:1"})
    if kind in ("timm", "torchvision", "flowvision", "module", "callable"):
        changes.append({"size": 96})
    if _other_cut(kind):
        changes.append({"cut": _other_cut(kind)})
    if "torch" in engines:
        changes.append({"engine": "openvino"})
    native = torch_precisions("cpu") if "torch" in engines else openvino_precisions()
    if "openvino" in engines and "bf16" in native:
        changes.append({"precision": "bf16"})
    found = [fingerprint_of(digits, backbone, **{**options, **change}) for change in changes]
    assert len({base, *found}) == 1 + len(changes)
    if kind in ("timm", "torchvision", "hf", "open_clip"):
        monkeypatch.setattr(library_network, "library_version", lambda kind: f"{kind} 99.0")
        assert fingerprint_of(digits, backbone, **options) not in (base, *found)


def _other_cut(kind):
    return {
        "timm": "cls,mean",
        "hf": "tokens",
        "torchvision": "layer3",
        "open_clip": "projected",
        "module": "conv",
        "callable": "tokens",
        "flowvision": "features.3",
        "onnx": "stage",
        "xml": "stage",
    }.get(kind)


def test_another_source_or_file_is_another_backbone(digits, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    found = set()
    for seed in (0, 1):
        write_modules(tmp_path)
        path = tmp_path / f"featcache_other_{seed}.py"
        path.write_text((tmp_path / "featcache_numpy_net.py").read_text() + f"# {seed}")
        found.add(fingerprint_of(digits, f"featcache_other_{seed}:build"))
        again = load_weights(None, f"featcache_other_{seed}:build").sha256
        assert again == load_weights(None, f"featcache_other_{seed}:build").sha256
    assert len(found) == 2


@needs_openvino
def test_a_graph_is_known_by_its_numbers_and_not_by_its_folder(tmp_path):
    first = load_weights(None, str(write_xml(tmp_path / "a" / "net.xml", seed=0)))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    second = load_weights(None, str(tmp_path / "b" / "net.xml"))
    other = load_weights(None, str(write_xml(tmp_path / "c" / "net.xml", seed=1)))
    assert first.sha256 == second.sha256 != other.sha256
    assert first.backbone == "net.xml" and first.name == "net"


@TORCH
def test_random_weights_are_the_same_on_every_engine(models):
    for kind in ("timm", "open_clip"):
        backbone, options = models(kind)
        images = noise(5, 32)
        features = [
            built(backbone, engine, **{**options, "weights": seed})[1].extract(images)
            for engine, seed in (
                ("torch", "random:7"),
                ("openvino", "random:7"),
                ("torch", "random:8"),
            )
        ]
        assert agreement(features[1], features[0]).cosine > 0.99999
        assert agreement(features[2], features[0]).cosine < 0.9


def test_random_weights_are_drawn_in_the_order_of_their_names():
    arrays = {
        "b.weight": np.random.default_rng(0).normal(size=(4, 2, 3, 3)),
        "b.bias": np.random.default_rng(1).normal(size=4),
        "a.weight": np.random.default_rng(2).normal(size=(500, 40)),
        "norm.weight": np.ones(4),
    }
    first = drawn(arrays, {"b.weight": 2}, 3)
    assert same(first, drawn(dict(reversed(arrays.items())), {"b.weight": 2}, 3))
    assert set(first) == {"a.weight", "b.weight", "b.bias"} and not first["b.bias"].any()
    assert 0.019 < first["a.weight"].std() < 0.021
    assert not np.array_equal(drawn(arrays, {}, 4)["a.weight"], first["a.weight"])


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(("timm", "torch"), marks=TORCH),
        pytest.param(("timm", "openvino"), marks=TORCH),
        pytest.param(("xml", "openvino"), marks=needs_openvino),
    ],
)
def test_half_precision_is_close(models, case):
    kind, engine = case
    native = torch_precisions("cpu") if engine == "torch" else openvino_precisions()
    if "bf16" not in native:
        pytest.skip("this processor has no bf16")
    backbone, options = models(kind)
    images = noise(9, 32)
    half = built(backbone, engine, "bf16", **options)[1].extract(images)
    full = built(backbone, engine, "f32", **options)[1].extract(images)
    assert not same(half, full)
    assert agreement(half, full).cosine > 0.99
    ready = built(backbone, engine, "bf16", **options)[1]
    assert same(ready.extract(images[4:5]), {cut: a[4:5] for cut, a in half.items()})


# Cuts.


@TORCH
@pytest.mark.parametrize(
    ("kind", "cuts", "shapes"),
    [
        ("vit", "pooled,cls,mean,tokens", [(32,), (32,), (32,), (17, 32)]),
        ("vit classifier", "pooled,cls", [(32,), (32,)]),
        ("dinov2", "pooled,encoder.layer.1", [(32,), (17, 32)]),
        ("clip", "pooled,projected,mean", [(32,), (16,), (32,)]),
        ("siglip", "pooled,mean", [(32,), (32,)]),
        ("convnext", "pooled,encoder.stages.3", [(16,), (16, 1, 1)]),
    ],
)
def test_cuts_of_transformers(models, kind, cuts, shapes):
    """On PyTorch; each as its library gives it."""
    import torch
    import transformers

    weights, ready = built(models.hf(kind), "torch", cut=cuts)
    images = noise(2, 32)
    features = ready.extract(images)
    assert [array.shape[1:] for array in features.values()] == shapes
    reference = transformers.AutoModel.from_pretrained(models.hf(kind)).eval()
    if kind in ("clip", "siglip"):
        reference = reference.vision_model
    mean, std = np.array(weights.preprocess.mean), np.array(weights.preprocess.std)
    x = torch.tensor(((images / 255 - mean) / std).transpose(0, 3, 1, 2), dtype=torch.float32)
    with torch.inference_mode():
        result = reference(x)
    last = result.last_hidden_state.numpy()
    pooled = last[:, 0] if kind == "vit classifier" else result.pooler_output.flatten(1).numpy()
    np.testing.assert_allclose(features["pooled"], pooled, atol=1e-4)
    if "cls" in cuts:
        np.testing.assert_allclose(features["cls"], last[:, 0], atol=1e-4)
    if "mean" in cuts:
        start = 0 if kind == "siglip" else 1
        np.testing.assert_allclose(features["mean"], last[:, start:].mean(1), atol=1e-4)
    assert (kind == "vit classifier") == any("no pooler" in note for note in weights.notes)


@TORCH
def test_a_head_on_several_cuts_predicts_and_is_evaluated(models, digits, tmp_path, capsys):
    backbone, _ = models("hf")
    made = extract(digits, backbone=backbone, cut="cls,mean", engine="torch")
    head = tmp_path / "head.npz"
    command = ["probe", made.cache, "--cut", "cls,mean", "--save-head", head]
    assert main([str(word) for word in command]) == 0
    assert evaluate_head(head, made.cache).n_test == 10
    image = tmp_path / "image.png"
    colour_image(0, 0).save(image)
    capsys.readouterr()
    said = one_line_of(capsys, "predict", image, "--head", head)
    assert "--backbone" in said and "hf:vit" in said
    assert main(["predict", str(image), "--head", str(head), "--backbone", backbone]) == 0
    (found,) = predict(image, head, backbone=backbone)
    assert 0 < found.probability <= 1


def test_a_strangers_head_names_neither_code_nor_files(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for name in (
        "os:system",
        "net.onnx",
        "../net.pt2",
        "hf:folder",
        "hf:../folder",
        "hf:elsewhere",
        "hf:/etc/model",
        "hf:~/model",
        "timm:local-dir:folder",
        "",
        None,
        5,
    ):
        with pytest.raises(RecipeError, match="--backbone"):
            recorded_backbone(name, "head.npz")
    for name in ("resnet18", "timm:test_vit", "hf:org/model", "open_clip:RN50/openai"):
        assert recorded_backbone(name, "head.npz") == name


_RANDOM = ("--weights", "random:0")


# Bad input: one line, and nothing half-written.


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--backbone", "resnet19"], "timm:NAME"),
        (["--backbone", "timm:"], "timm:NAME"),
        (["--backbone", "nowhere.onnx"], "expected a file, found none"),
        (["--backbone", "no_such_module_here:build"], "ModuleNotFoundError"),
        (["--backbone", "featcache_numpy_net:nothing"], "AttributeError"),
        (["--backbone", "featcache_numpy_net:matrix"], "expected a function, found ndarray"),
        (["--backbone", "featcache_numpy_net:build", "--weights", "x.pth"], "leave out --weights"),
        (["--backbone", "featcache_numpy_net:build", "--cut", "layer9"], "pooled, tokens"),
        (["--backbone", "featcache_numpy_net:build", "--engine", "torch"], "--engine auto"),
        (["--backbone", "featcache_numpy_net:build", "--precision", "bf16"], "--precision f32"),
        (["--backbone", "featcache_numpy_net:build", "--device", "cuda"], "--device cpu"),
    ],
)
def test_what_needs_no_library_is_refused_in_one_line(models, capsys, arguments, said):
    assert said in one_line_of(capsys, "extract", "digits", *arguments)
    assert nothing_written()


@pytest.mark.parametrize("name", ["timm:test_vit", "hf:org/name", "open_clip:RN50/openai"])
def test_a_library_that_is_missing_is_named_with_its_extra(name, monkeypatch, capsys):
    import importlib.metadata

    def missing(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr("importlib.metadata.version", missing)
    if name.startswith("hf"):
        said = "pip install 'featcache[hf]'"
    else:
        said = f"pip install 'featcache[{name.partition(':')[0]}]'"
    with pytest.raises(EngineUnavailableError, match="is not installed") as caught:
        load_weights("random:0", name)
    assert said in str(caught.value)


@TORCH
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--backbone", "timm:test_vitt", "--weights", "random:0"], "did you mean timm:test_vit"),
        (["--backbone", "torchvision:resnet19"], "did you mean torchvision:resnet18?"),
        (["--backbone", "torchvision:resnet18/NONE"], "IMAGENET1K_V1"),
        (["--backbone", "open_clip:nothing/x"], "featcache backbones 'open_clip:*'"),
        (["--backbone", "open_clip:RN50/nothing"], "openai"),
        (["--backbone", "hf:./nowhere"], "folder"),
        (["--backbone", "timm:test_vit", "--weights", "nowhere.pth"], "leave --weights out"),
        (["--backbone", "timm:test_vit"], "copy"),
        (["--backbone", "torchvision:resnet18"], "resnet18-f37072fd.pth"),
        (["--backbone", "hf:org/name"], "copy"),
        (["--backbone", "open_clip:RN50/openai"], "copy"),
        (["--backbone", "timm:test_vit", "--weights", "random:x"], "random:SEED"),
        (
            ["--backbone", "timm:test_vit", *["--weights", "random:0", "--cut", "blocks.99"]],
            "blocks",
        ),
        (["--backbone", "torchvision:squeezenet1_1", *["--weights", "random:0"]], "--cut"),
        (["--backbone", "featcache_torch_net:number"], "torch.nn.Module"),
        (["--backbone", "featcache_torch_net:fails"], "KeyError"),
        (["--backbone", "featcache_torch_net:leaves"], "SystemExit"),
        (["--backbone", "featcache_torch_net:nothing"], "found NoneType"),
        (["--backbone", "featcache_torch_net:pair"], "found tuple"),
        (["--backbone", "featcache_torch_net:empty"], "found (1, 0)"),
        (["--backbone", "featcache_torch_net:one_row"], "1 rows for"),
        (["--backbone", "featcache_torch_net:with_a_number", "--cut", "n"], "one of pooled"),
        (["--backbone", "featcache_torch_net:five"], "other channels"),
        (["--backbone", "featcache_torch_net:nan", "--engine", "torch"], "finite features"),
        (["--backbone", "featcache_torch_net:nan", "--engine", "openvino"], "--engine torch"),
        (["--backbone", "featcache_torch_net:one", "--engine", "torch"], "one image at a time"),
        (["--backbone", "featcache_torch_net:one", "--engine", "openvino"], "--engine torch"),
        (["--backbone", "vit_b", "--size", "31"], "timm:NAME"),
    ],
)
def test_what_a_library_refuses_is_one_line(models, capsys, arguments, said):
    assert said in one_line_of(capsys, "extract", "digits", "--train-limit", "20", *arguments)
    assert nothing_written()


@ONEFLOW
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["flowvision:nothing"], "featcache backbones 'flowvision:*'"),
        (["flowvision:mobilenet_v2", *_RANDOM, "--cut", "nothing"], "one of pooled, features.0"),
        (["flowvision:mobilenet_v2", "--weights", "nowhere.pth"], "nowhere.pth"),
        (["flowvision:mobilenet_v2", *_RANDOM, "--engine", "openvino"], "--engine auto"),
        (["flowvision:mobilenet_v2"], "put flowvision-mobilenet_v2.zip"),
    ],
)
def test_what_flowvision_refuses_is_one_line(capsys, monkeypatch, arguments, said):
    def unreachable(*_, **__):
        raise WeightsError("no network") from NetworkError("no network")

    monkeypatch.setattr(pretrained, "_fetch", unreachable)
    found = one_line_of(capsys, "extract", "digits", "--size", "64", "--backbone", *arguments)
    assert said in found and "tinyimagenet32" not in found
    assert nothing_written()


@TORCH
@pytest.mark.parametrize("kind", ["bert", "five channels"])
def test_a_model_that_takes_no_rgb_images_is_refused(models, capsys, kind):
    said = one_line_of(capsys, "extract", "digits", "--backbone", models.hf(kind))
    assert "expected a network of float32 images (N, 3, " in said
    assert nothing_written()


@TORCH
def test_a_network_of_fixed_size_names_it(capsys):
    for arguments in (
        ["--backbone", "torchvision:vit_b_32", "--weights", "random:0", "--size", "33"],
        ["--backbone", "timm:test_vit", "--weights", "random:0", "--size", "33"],
    ):
        assert "size" in one_line_of(capsys, "extract", "digits", *arguments)
    assert nothing_written()


@TORCH
def test_weights_of_another_architecture_are_refused(models, tmp_path, capsys):
    import safetensors.torch
    import timm
    import torch

    torch.manual_seed(0)
    own = timm.create_model("test_vit", pretrained=False)
    path = tmp_path / "own.safetensors"
    safetensors.torch.save_file(own.state_dict(), path)
    weights, _ = built("timm:test_vit", "torch", weights=str(path))
    assert weights.name == "own"
    command = ["extract", "digits", "--weights", path, "--backbone"]
    assert "of this very architecture" in one_line_of(capsys, *command, "timm:test_vit2")
    assert "of this very architecture" in one_line_of(capsys, *command, "torchvision:resnet18")
    state = own.state_dict()
    state["blocks.0.attn.qkv.weight"][0, 0] = float("nan")
    safetensors.torch.save_file(state, path)
    assert "finite numbers" in one_line_of(capsys, *command, "timm:test_vit")
    (tmp_path / "text.pth").write_text("no weights")
    one_line_of(capsys, *command[:3], tmp_path / "text.pth", "--backbone", "timm:test_vit")
    shutil.copytree(models.hf("vit"), tmp_path / "torn")
    data = (tmp_path / "torn" / "model.safetensors").read_bytes()
    (tmp_path / "torn" / "model.safetensors").write_bytes(data[:-100])
    one_line_of(capsys, "extract", "digits", "--backbone", tmp_path / "torn")
    (tmp_path / "torn" / "model.safetensors").unlink()
    one_line_of(capsys, "extract", "digits", "--backbone", tmp_path / "torn")
    (tmp_path / "torn" / "config.json").write_text("{")
    one_line_of(capsys, "extract", "digits", "--backbone", tmp_path / "torn")
    assert nothing_written()


@TORCH
def test_a_folder_with_weights_of_another_model_is_refused(models, tmp_path, capsys):
    shutil.copytree(models.hf("vit"), tmp_path / "mixed")
    shutil.copy(models.hf("dinov2") + "/model.safetensors", tmp_path / "mixed")
    one_line_of(capsys, "extract", "digits", "--backbone", tmp_path / "mixed")
    shutil.copytree(models.hf("vit"), tmp_path / "code")
    config = json.loads((tmp_path / "code" / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}
    config["model_type"] = "evil"
    (tmp_path / "code" / "config.json").write_text(json.dumps(config))
    (tmp_path / "code" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    one_line_of(capsys, "extract", "digits", "--backbone", tmp_path / "code")
    assert nothing_written() and not (tmp_path / "ran").exists()


# Files.


def _program(**changes):
    node = {
        "target": "torch.ops.aten.relu.default",
        "inputs": [{"name": "self", "arg": {"as_tensor": {"name": "x"}}}],
        "outputs": [{"as_tensor": {"name": "relu"}}],
        **changes.pop("node", {}),
    }
    return {"graph_module": {"graph": {"nodes": [node]}}, "guards_code": [], **changes}


def _write_program(path, *described):
    with zipfile.ZipFile(path, "w") as archive:
        for number, one in enumerate(described):
            archive.writestr(f"net/models/model{number}.json", json.dumps(one))
    return path


def _expression(text):
    return {"range": {"as_expr": {"expr_str": text, "hint": {"as_int": 2}}}}


@pytest.mark.parametrize(
    "text",
    ["s0", "2*s77 + 1", "Symbol('s77', positive=True, integer=True)", "Mul(Integer(2), s0)"],
)
def test_a_program_without_code_is_read(tmp_path, text):
    check_exported(_write_program(tmp_path / "net.pt2", _program(**_expression(text))))


@pytest.mark.parametrize(
    "described",
    [
        _program(node={"target": "torch.serialization.os.system"}),
        _program(node={"target": "torch.ops.aten.relu.default.__globals__"}),
        _program(node={"target": "torch.ops.higher_order.cond"}),
        _program(guards_code=["__import__('os').system('true')"]),
        _program(weights={"w": {"use_pickle": True}}),
        _program(weights={"w": {"use_pickle": 1}}),
        _program(constants=[{"as_custom_obj": {"name": "x"}}]),
        *(
            _program(**_expression(text))
            for text in (
                "__import__('os').system('true')",
                "s0.__class__",
                "Symbol('s0').name",
                "Symbol('s0', **x)",
                "exec('1')",
                "Lambda(s0, s0)",
                "s0(1)",
                "Symbol('__import__')",
                "[s0]",
                "'s0'",
                "s0 if s0 else s0",
                "lambda: s0",
                "9e9",
                5,
                None,
            )
        ),
    ],
)
def test_a_program_that_would_run_code_is_refused_before_pytorch_reads_it(
    tmp_path, described, monkeypatch
):
    path = _write_program(tmp_path / "net.pt2", described)
    with pytest.raises(WeightsError, match=r"expected a program .* runs no code"):
        check_exported(path)


def test_two_readers_cannot_see_two_programs(tmp_path):
    hostile = json.dumps(_program(guards_code=["1"]))
    for name in ("net/models/model0.json", "net/MODELS/MODEL0.JSON", "net/models/other.JSON"):
        path = _write_program(tmp_path / "net.pt2", _program())
        with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as archive:
            warnings.simplefilter("ignore")  # of a name that is there
            archive.writestr(name, hostile)
        with pytest.raises(WeightsError, match=r"two entries of one name|guards_code"):
            check_exported(path)
    clean = _write_program(tmp_path / "clean.pt2", _program()).read_bytes()
    both = tmp_path / "both.pt2"  # as a file in front of another, which readers take differently
    both.write_bytes(_write_program(tmp_path / "net.pt2", json.loads(hostile)).read_bytes() + clean)
    _copy_plainly(both, tmp_path / "copy.pt2")
    check_exported(tmp_path / "copy.pt2")
    assert b'guards_code": ["1' not in (tmp_path / "copy.pt2").read_bytes()


def test_archives_that_are_no_program_are_refused(tmp_path):
    for data in (b"", b"text", b"PK\3\4" + bytes(100)):
        (tmp_path / "net.pt2").write_bytes(data)
        with pytest.raises(WeightsError, match="expected a program"):
            check_exported(tmp_path / "net.pt2")
    for described in ([], [_program(), _program()], [{"other": 1}]):
        with pytest.raises(WeightsError, match="expected one program"):
            check_exported(_write_program(tmp_path / "net.pt2", *described))
    (tmp_path / "net.pt2").unlink()
    with pytest.raises(WeightsError, match="No such file"):
        check_exported(tmp_path / "net.pt2")


@needs_openvino
@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
@pytest.mark.parametrize("harm", ["cut", "random", "text", "empty"])
def test_a_damaged_graph_is_one_line(tmp_path, capsys, suffix, harm):
    path = tmp_path / f"net{suffix}"
    shutil.copy(TINY_ONNX if suffix == ".onnx" else write_xml(tmp_path / "good.xml"), path)
    data = path.read_bytes()
    path.write_bytes(
        {
            "cut": data[: len(data) // 2],
            "random": np.random.default_rng(0).bytes(500),
            "text": b"no network",
            "empty": b"",
        }[harm]
    )
    assert str(path) in one_line_of(capsys, "extract", "digits", "--backbone", path)
    assert nothing_written()


@needs_openvino
def test_a_graph_that_crashes_its_reader_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(graph_file, "_PARSE", "import os\nos.abort()")
    assert "export it again" in one_line_of(capsys, "extract", "digits", "--backbone", TINY_ONNX)
    monkeypatch.setattr(graph_file, "_PARSE", "import time\ntime.sleep(60)")
    monkeypatch.setattr(graph_file, "_TIMEOUT_S", 1)
    assert "within 1 s" in one_line_of(capsys, "extract", "digits", "--backbone", TINY_ONNX)


@needs_openvino
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["tiny.onnx", "--size", "64"], "leave out --size"),
        (["tiny.onnx", "--cut", "nothing"], "expected one of"),
        (["tiny.onnx", "--weights", "random:0"], "leave out --weights"),
        (["tiny.onnx", "--engine", "torch"], "--engine auto"),
        (["tiny.onnx", "--device", "cuda"], "--device cpu"),
        (["tiny-four-channels.onnx"], "expected one input, float32 (N, 3, s, s), found images"),
    ],
)
def test_what_a_graph_does_not_take(capsys, arguments, said):
    name, *others = arguments
    found = one_line_of(capsys, "extract", "digits", "--backbone", DATA / name, *others)
    assert said in found
    assert nothing_written()


@needs_openvino
def test_a_graph_of_one_image_gives_what_one_of_many_gives():
    images = noise(5, 32)
    one = built(str(DATA / "tiny-one.onnx"))[1].extract(images)
    many = built(str(TINY_ONNX))[1].extract(images)
    np.testing.assert_allclose(one["pooled"], many["pooled"], rtol=1e-4, atol=1e-4)


@needs_openvino
def test_a_graph_computes_what_its_numbers_say(tmp_path):
    weights, ready = built(str(TINY_ONNX), cut="pooled,stage")
    assert any("tiny.json" in note for note in weights.notes)
    images = noise(3, 32)
    features = ready.extract(images)
    assert features["stage"].shape == (3, 8, 16, 16)
    matrix = np.random.default_rng(0)
    matrix.standard_normal((8, 3, 3, 3))
    expected = features["stage"].mean((2, 3)) @ matrix.standard_normal((8, 6)).astype(np.float32)
    np.testing.assert_allclose(features["pooled"], expected, rtol=1e-3, atol=1e-3)


@needs_openvino
def test_the_file_beside_a_graph_says_how_images_are_prepared(tmp_path, capsys):
    path = tmp_path / "net.onnx"
    shutil.copy(TINY_ONNX, path)
    beside = tmp_path / "net.json"
    fields = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bicubic", "geometry": "crop"}
    beside.write_text(json.dumps({**fields, "crop_pct": 0.5}))
    found = load_weights(None, str(path))
    assert not found.notes
    assert found.preprocess.mean == (0.5,) * 3 and found.preprocess.resized == 64
    for text in ("{", "[]", '{"mean": 3}', '{"crop_pct": 0}', '{"colour": 1}', "5"):
        beside.write_text(text)
        said = one_line_of(capsys, "extract", "digits", "--backbone", path)
        assert str(beside) in said


# Conversions.


@TORCH
def test_a_model_that_does_not_convert_runs_in_pytorch(models, digits, alone, monkeypatch, capsys):
    from featcache.frameworks import import_openvino

    def fails(*_, **__):
        raise RuntimeError("no rule for this operation")

    monkeypatch.setattr(import_openvino(), "convert_model", fails)
    heard = []
    backbone, options = models("module")
    made = extract(digits, backbone=backbone, on_note=heard.append, **options)
    assert load(made.cache).meta["engine"] == "torch"
    assert any("OpenVINO cannot run this model (RuntimeError: no rule" in note for note in heard)
    command = ["extract", "digits", "--backbone", backbone, "--engine", "openvino"]
    assert "--engine torch" in one_line_of(capsys, *command)


@TORCH
def test_a_converted_model_that_differs_is_noticed(models, digits, alone, capsys):
    backbone, _ = models("module")
    extract(digits, backbone=backbone, engine="openvino")
    (path,) = alone.rglob("reference.npz")
    with np.load(path) as arrays:
        wrong = {name: array[::-1] for name, array in arrays.items()}
    np.savez(path, **wrong)
    conversion.seal(path.parent)  # as if it had always been so
    command = ["extract", "digits", "--train-limit", "20", "--backbone", backbone]
    said = one_line_of(capsys, *command)
    assert "to be PyTorch's, found cosine" in said and "--engine torch" in said


@TORCH
@pytest.mark.parametrize("name", ["model.xml", "model.bin", "reference.npz", "all"])
@pytest.mark.parametrize("harm", ["cut", "flip", "gone"])
def test_a_damaged_conversion_is_made_anew(models, digits, alone, capsys, name, harm):
    backbone, options = models("module")
    first = extract(digits, backbone=backbone, engine="openvino", **options)
    (path,) = alone.rglob("model.xml")
    for damaged in path.parent.iterdir() if name == "all" else [path.with_name(name)]:
        data = bytearray(damaged.read_bytes())
        if harm == "gone":
            damaged.unlink()
        elif harm == "cut":
            damaged.write_bytes(data[: len(data) // 2])
        else:
            data[len(data) // 2] ^= 0xFF
            damaged.write_bytes(data)
    again = extract(digits, backbone=backbone, engine="openvino", force=True, **options)
    assert content(again.cache) == content(first.cache)


@TORCH
def test_a_damaged_conversion_of_a_program_is_made_anew(models, kept):
    backbone, _ = models("pt2")
    first = built(backbone)[1].extract(noise(2, 32))
    for path in kept.rglob("model.xml"):  # among them the program's
        path.write_text("no network")
    assert same(built(backbone)[1].extract(noise(2, 32)), first)


def test_a_link_in_the_place_of_a_conversion_is_replaced(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").write_text("mine")
    (tmp_path / "kept").symlink_to(tmp_path / "precious")
    kept_in(tmp_path / "kept", lambda new: (new / "model.xml").write_text("<net/>"))
    assert is_intact(tmp_path / "kept") and not (tmp_path / "kept").is_symlink()
    assert [path.name for path in (tmp_path / "precious").iterdir()] == ["thesis.tex"]


@TORCH
def test_a_conversion_that_cannot_be_kept_is_one_line(models, alone, monkeypatch, capsys):
    backbone, _ = models("module")
    alone.mkdir()
    (alone / "converted").write_text("in the way")
    said = one_line_of(capsys, "extract", "digits", "--backbone", backbone, "--engine", "openvino")
    assert "cannot be kept" in said


@TORCH
def test_weights_that_changed_behind_the_memory_are_noticed(models, digits, tmp_path, alone):
    import safetensors.torch

    folder = tmp_path / "net"
    shutil.copytree(models.hf("vit"), folder)
    first = extract(digits, backbone=str(folder), engine="torch")
    path = folder / "model.safetensors"
    before = os.stat(path)
    state = safetensors.torch.load_file(path)
    state["layernorm.weight"] += 1
    safetensors.torch.save_file(state, path, {"format": "pt"})
    second = extract(digits, backbone=str(folder), engine="torch")
    assert second.cache != first.cache and not second.reused
    state["layernorm.weight"] += 1
    safetensors.torch.save_file(state, path, {"format": "pt"})
    after = os.stat(path)
    assert after.st_size == before.st_size
    for memo in (alone / "backbones").iterdir():  # as if the file's time had not changed
        facts = json.loads(memo.read_bytes())
        facts["sha256"] = "0" * 64
        memo.write_text(json.dumps(facts))
    backbone = library_network.LibraryNetwork(parse_backbone(str(folder)), None, None)
    memo = backbone._memo()
    memo.write_text(json.dumps(facts))
    with pytest.raises(WeightsError, match="they changed since the last run"):
        extract(digits, backbone=str(folder), engine="torch", force=True)
    third = extract(digits, backbone=str(folder), engine="torch")
    assert third.cache not in (first.cache, second.cache)
    memo.write_text("{")
    assert extract(digits, backbone=str(folder), engine="torch").reused


_NOTHING_TO_DO = """
import sys
from featcache.cli import main
assert main(sys.argv[1:]) == 0
assert not {"torch", "timm", "transformers"} & set(sys.modules), "a framework was imported"
"""


@TORCH
@pytest.mark.parametrize("kind", ["timm", "hf"])
def test_where_nothing_is_to_do_no_framework_is_imported(models, kind):
    backbone, options = models(kind)
    command = ["extract", "digits", "--train-limit", "20", "--backbone", backbone]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    assert main(command) == 0
    child = [sys.executable, "-c", _NOTHING_TO_DO, *command]
    again = subprocess.run(child, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr


# The list.


def test_the_list_has_the_resnets_everywhere(capsys):
    assert main(["backbones", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert {"resnet18", "resnet34", "resnet50"} <= {line["name"] for line in listed}
    assert main(["backbones"]) == 0
    assert "resnet18" in capsys.readouterr().out
    assert [line.name for line in list_backbones("resnet1*")] == ["resnet18"]
    assert main(["backbones", "resnet18", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cuts"]["avgpool"] == [512]
    assert "found 'nothing'" in one_line_of(capsys, "backbones", "nothing")


@TORCH
def test_the_list_of_libraries(models, capsys):
    assert main(["backbones", "timm:test_vit*", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    (line,) = [line for line in listed if line["name"] == "timm:test_vit"]
    assert line == {
        "name": "timm:test_vit",
        "feature_dim": 64,
        "size": 160,
        "n_parameters": line["n_parameters"],
        "weights_here": False,
    }
    assert main(["backbones", "torchvision:resnet1*"]) == 0
    assert "torchvision:resnet18" in capsys.readouterr().out
    assert main(["backbones", "open_clip:RN50/*", "--json"]) == 0
    assert "open_clip:RN50/openai" in capsys.readouterr().out
    assert main(["backbones", "hf:*", "--json"]) == 0
    assert main(["backbones", "timm:test_vit", "--size", "32"]) == 0
    assert "blocks.5" in capsys.readouterr().out
    facts = describe_backbone(models.hf("vit"))
    assert facts["size"] == 32 and facts["cuts"]["pooled"] == (32,)


@needs_openvino
def test_the_facts_of_a_graph(capsys):
    assert main(["backbones", str(TINY_ONNX), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["engines"] == ["openvino"] and facts["size"] == 32
    assert facts["cuts"]["pooled"] == [6] and facts["cuts"]["stage"] == [8, 16, 16]
    assert facts["n_parameters"] >= 8 * 27 + 48
    assert main(["backbones", str(TINY_ONNX)]) == 0


@pytest.mark.torch
def test_efficientnet_lite_as_a_function_and_as_an_onnx_file(home, tmp_path):
    """The worked example of the guide: the file gives the features of the function."""
    pytest.importorskip("efficientnet_lite_pytorch")
    import torch

    from featcache.backbones import efficientnet_lite

    network = efficientnet_lite.lite0().eval()
    path = tmp_path / "lite0.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network,
            (torch.zeros(2, 3, 224, 224),),
            str(path),
            dynamo=False,
            input_names=["x"],
            dynamic_axes={"x": {0: "n"}},
        )
    fields = network.preprocess.as_dict()
    path.with_suffix(".json").write_text(
        json.dumps({name: fields[name] for name in ("size", "mean", "std")})
    )
    features = []
    for backbone in (efficientnet_lite.NAME, str(path)):
        made = extract(
            "digits", backbone=backbone, train_limit=10, test_limit=10, output=tmp_path / "caches"
        )
        features.append(made.load().train.features)
    assert features[0].shape == (10, 1280)
    np.testing.assert_allclose(features[1], features[0], atol=1e-4 * np.abs(features[0]).max())
