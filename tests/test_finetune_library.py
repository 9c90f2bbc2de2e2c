"""Training models of libraries: what moves and what does not, adapters, resuming, and what is left.

The models are the smallest that the libraries build, with random weights.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import closing

import numpy as np
import pytest

from featcache import extract, finetune, fit, load_dataset, load_head, load_weights, predict, probe
from featcache.backbones import choice
from featcache.cli import main
from featcache.errors import EngineUnavailableError, RecipeError, WeightsError
from featcache.finetuning.batches import ImageSource
from featcache.finetuning.framework import get_framework
from featcache.finetuning.recipes import FinetuneOptions, finetune_recipe
from featcache.finetuning.trainer import Trainer

pytestmark = pytest.mark.torch

SMALL = {"weights": "random:0", "size": 32, "engine": "torch"}
VIT = {"backbone": "timm:test_vit", **SMALL}
CNN = {"backbone": "timm:test_resnet", **SMALL}


@pytest.fixture(autouse=True)
def libraries():
    pytest.importorskip("timm")


@pytest.fixture
def source(image_folder):
    """Six images of each of three classes, for the model that is asked for."""
    train = load_dataset(image_folder).train
    return lambda weights: ImageSource(train.take(np.arange(0, len(train), 2)), weights.preprocess)


def trainer_of(backbone, method="full", weights="random:0", **changes):
    loaded = load_weights(weights, backbone, size=32)
    recipe = finetune_recipe(method, **{"batch_size": 9, "augment": "none", **changes})
    return loaded, Trainer(get_framework("torch"), loaded, 3, recipe)


def trained(trainer, source):
    """Train for an epoch; return the names of the tensors that moved, and the losses."""
    before = trainer.network.state()
    with closing(trainer.steps(source, 0)) as steps:
        losses = [step.loss for step in steps]
    after = trainer.network.state()
    assert before.keys() == after.keys()
    return {name for name in before if before[name].tobytes() != after[name].tobytes()}, losses


def digest(module):
    """Return SHA-256 of every parameter and buffer, saved ones and others."""
    found = hashlib.sha256()
    for name, value in [*module.named_parameters(), *module.named_buffers()]:
        found.update(name.encode() + value.detach().numpy().tobytes())
    return found.hexdigest()


def dropping():
    """A network whose dropout draws in every step, with batch normalisation."""
    import torch
    from torch import nn

    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 8, 8),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(8 * 16, 12),
    )
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(0.1 * torch.randn(value.shape, generator=generator))
    model.preprocess = {"size": 32}
    return model


def means():
    """A callable that is no module."""
    return lambda x: x.mean((2, 3))


DROPPING = f"{__name__}:dropping"
MEANS = f"{__name__}:means"


# --- what trains


@pytest.mark.parametrize("backbone", ["timm:test_vit", "timm:test_resnet"])
@pytest.mark.parametrize("method", ["full", "scratch"])
def test_every_parameter_trains(backbone, method, source):
    loaded, trainer = trainer_of(backbone, method)
    moved, losses = trained(trainer, source(loaded))
    assert np.isfinite(losses).all()
    names = {f"backbone.{name}" for name, _ in trainer.network.backbone.named_parameters()}
    assert names | {"head.weight", "head.bias"} <= moved


@pytest.mark.parametrize("backbone", ["timm:test_vit", "timm:test_resnet", DROPPING])
def test_frozen_is_frozen(backbone, source):
    weights = None if backbone == DROPPING else "random:0"
    loaded, trainer = trainer_of(backbone, "frozen", weights)
    before = digest(trainer.network.backbone)
    moved, _ = trained(trainer, source(loaded))
    assert moved == {"head.weight", "head.bias"}
    assert digest(trainer.network.backbone) == before
    trainer.network.train()
    assert not any(module.training for module in trainer.network.backbone.modules())
    assert not any(value.requires_grad for value in trainer.network.backbone.parameters())
    assert all(value.grad is None for value in trainer.network.backbone.parameters())


@pytest.mark.parametrize(
    ("backbone", "block", "frozen", "free"),
    [
        ("timm:test_vit", "blocks.3", "cls_token pos_embed patch_embed blocks.3", "blocks.4 norm"),
        ("timm:test_resnet", "layer2", "conv1 bn1 layer1 layer2", "layer3 layer4"),
        ("timm:test_convnext", "stages.1", "stem stages.0 stages.1", "stages.2 head"),
    ],
)
def test_a_block_and_all_before_it_are_frozen(backbone, block, frozen, free, source):
    loaded, trainer = trainer_of(backbone, freeze_until=block)
    network = trainer.network
    parts = dict(network.backbone.named_modules())
    own = dict(network.backbone.named_parameters(recurse=False))
    before = {one: digest(parts[one]) for one in frozen.split() if one in parts}
    moved, _ = trained(trainer, source(loaded))
    assert before == {one: digest(parts[one]) for one in before}
    assert not {f"backbone.{name}" for name in own} & moved
    for one in free.split():
        assert any(name.startswith(f"backbone.{one}.") for name in moved), one
    network.train()
    for path, module in parts.items():
        if any(f"{path}.".startswith(f"{one}.") for one in frozen.split()):
            assert not module.training, path
        if any(f"{path}.".startswith(f"{one}.") for one in free.split()):
            assert module.training, path


def test_bn_eval_keeps_the_statistics(source):
    loaded, trainer = trainer_of("timm:test_resnet", bn="eval")
    moved, _ = trained(trainer, source(loaded))
    assert not [name for name in moved if "running" in name or "num_batches" in name]


def test_layers_decay_by_timms_groups():
    _, trainer = trainer_of("timm:test_vit", lr=0.1, layer_decay=0.5)
    blocks = [f"blocks.{index}" for index in reversed(range(6))]
    assert list(trainer.network.rates) == ["head", *blocks, "stem"]
    np.testing.assert_allclose(
        list(trainer.network.rates.values()), [0.1 * 0.5**k for k in range(8)]
    )
    grouped = [id(one) for group in trainer.optimizer.param_groups for one in group["params"]]
    assert len(set(grouped)) == len(grouped) == 2 + len(list(trainer.network.backbone.parameters()))
    last = trainer.optimizer.param_groups[1]["params"]
    norm = trainer.network.backbone.norm.weight
    assert any(one is norm for one in last), "timm's last group has the final norm"
    _, part = trainer_of("timm:test_vit", lr=0.1, layer_decay=0.5, freeze_until="blocks.3")
    assert list(part.network.rates) == ["head", "blocks.5", "blocks.4"]
    assert part.network.rates["blocks.4"] == pytest.approx(0.1 * 0.25)


def test_layers_of_other_models():
    torchvision = pytest.importorskip("torchvision")
    from featcache.finetuning.blocks import blocks_of, layers_of

    resnet = torchvision.models.resnet18(weights=None)
    resnet.fc = resnet.relu
    blocks = [f"layer{stage}.{block}" for stage in range(1, 5) for block in range(2)]
    assert list(layers_of(resnet)) == ["stem", *blocks] == ["stem", *blocks_of(resnet)]
    vit = torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=9)
    layers = layers_of(vit)
    assert list(layers)[:3] == ["stem", *(f"encoder.layers.encoder_layer_{k}" for k in (0, 1))]
    assert "encoder.ln.weight" in layers["encoder.layers.encoder_layer_1"]
    names = [name for layer in layers.values() for name in layer]
    assert sorted(names) == sorted(name for name, _ in vit.named_parameters())


# --- adapters


@pytest.fixture
def lora():
    pytest.importorskip("peft")
    return {"lora": 4, "lr": 0.05}


def test_adapters_train_and_the_weights_do_not(lora, source):
    loaded, trainer = trainer_of("timm:test_vit", layer_decay=0.5, **lora)
    network = trainer.network
    before = network.checkpoint()
    start = load_weights("random:0", "timm:test_vit", size=32).network.load().model.state_dict()
    assert before.keys() == start.keys()
    assert all(before[name].tobytes() == start[name].numpy().tobytes() for name in before)
    moved, _ = trained(trainer, source(loaded))
    assert moved and all(".lora_" in name or name.startswith("head.") for name in moved)
    assert sum(".lora_B." in name for name in moved) == 4 * 6, "four linear layers in each block"
    assert list(network.rates) == ["head", *(f"blocks.{k}" for k in reversed(range(6)))]
    after = network.checkpoint()
    changed = {name for name in after if after[name].tobytes() != before[name].tobytes()}
    assert len(changed) == 24 and all(name.endswith(".weight") for name in changed)
    import torch

    merged = load_weights("random:0", "timm:test_vit", size=32).network.load()
    merged.model.load_state_dict({name: torch.tensor(one) for name, one in after.items()})
    x = torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)
    network.eval()
    with torch.no_grad():
        expected = network._run(x, None, None).numpy()
        found = merged.outputs(merged.model, x)["pooled"].numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_adapters_above_a_frozen_block(lora):
    _, trainer = trainer_of("timm:test_vit", freeze_until="blocks.3", **lora)
    assert list(trainer.network.rates) == ["head", "blocks.5", "blocks.4"]


def test_adapters_of_attention_in_one_piece(lora):
    """PyTorch's attention reads the weights of its layers itself."""
    torchvision = pytest.importorskip("torchvision")
    import torch

    from featcache.finetuning.adapters import Adapted, adapted_path, linear_layers

    model = torchvision.models.VisionTransformer(32, 8, 1, 2, 16, 32).eval()
    paths = linear_layers(model, "vit")
    assert "encoder.layers.encoder_layer_0.self_attention" in paths
    names = set(model.state_dict())
    layer_names = {name for name, _ in model.named_parameters()}
    adapted = Adapted(model, paths, 2, 0)
    for name, value in adapted.model.named_parameters():
        if ".lora_B." in name:
            assert f"{adapted_path(name)}.weight" in layer_names | {
                f"{path}.weight" for path in paths
            }
            torch.nn.init.constant_(value, 0.1)
    merged = adapted.merged()
    assert set(merged.state_dict()) == names
    x = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(merged(x), adapted.model(x), atol=1e-5, rtol=1e-5)


def test_what_adapters_need(image_folder, lora, monkeypatch):
    with pytest.raises(RecipeError, match=r"linear layers .* in timm:test_resnet, found none \(\d"):
        finetune(image_folder, "split", **CNN, lora=4)
    with pytest.raises(RecipeError, match=r"lora: expected a library's model .* found resnet18"):
        finetune(image_folder, "split", **SMALL, lora=4)
    import importlib.metadata as metadata

    version = metadata.version

    def without_peft(name):
        if name == "peft":
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(metadata, "version", without_peft)
    with pytest.raises(EngineUnavailableError, match=r"pip install 'featcache\[lora\]'"):
        finetune(image_folder, "split", **VIT, lora=4)


# --- resuming


@pytest.mark.parametrize(
    ("backbone", "options"),
    [
        (DROPPING, {"patience": 3, "val_fraction": 0.25}),
        ("timm:test_vit", {"lora": 2, "layer_decay": 0.9, "schedule": "cosine", "warmup": 2}),
    ],
)
def test_a_resumed_run_ends_with_the_same_bytes(backbone, options, image_folder, tmp_path):
    if "lora" in options:
        pytest.importorskip("peft")
    import torch

    weights = None if backbone == DROPPING else "random:0"
    options = {"backbone": backbone, "weights": weights, "size": 32, "engine": "torch", **options}
    options |= {"epochs": 2, "batch_size": 9, "lr": 0.05, "seed": 3}
    torch.manual_seed(1)
    whole = finetune(image_folder, "full", **options, runs=tmp_path / "whole")
    seen = []

    def stop(progress):
        seen.append(progress)
        if progress.stage == "epoch 2/2" and progress.done == 18:
            raise KeyboardInterrupt

    runs = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt, match="--resume"):
        finetune(image_folder, "full", **options, runs=runs, on_progress=stop)
    torch.manual_seed(2)
    resumed = finetune(image_folder, "full", **options, runs=runs, resume=True)
    assert resumed.resumed and resumed.epochs[-1].train_loss == whole.epochs[-1].train_loss
    assert resumed.checkpoint.read_bytes() == whole.checkpoint.read_bytes()
    heads = [load_head(result.run / "head.safetensors") for result in (whole, resumed)]
    assert heads[0].weight.tobytes() == heads[1].weight.tobytes()
    with pytest.raises(KeyboardInterrupt):
        finetune(image_folder, "full", **options, runs=runs, on_progress=stop)
    for name, value in (("backbone", "timm:test_vit2"), ("weights", "random:1"), ("size", 64)):
        if backbone == DROPPING:
            continue
        with pytest.raises(WeightsError, match=f"one of another: .*{name}"):
            finetune(image_folder, "full", **{**options, name: value}, runs=runs, resume=True)


# --- what a run leaves


@pytest.fixture
def without_openvino(monkeypatch):
    """Let the engine that trained predict too: to convert a model takes longer than to train it."""
    monkeypatch.setattr(choice, "openvino_status", lambda: (None, "a test is without it"))


@pytest.mark.parametrize(
    ("backbone", "method", "options"),
    [
        ("timm:test_resnet", "full", {"freeze_until": "layer2"}),
        ("timm:test_vit", "scratch", {}),
        ("timm:test_vit", "full", {"lora": 4}),
        ("torchvision:shufflenet_v2_x0_5", "split", {}),
    ],
)
def test_the_network_is_a_checkpoint_that_extracts_and_predicts(
    backbone, method, options, image_folder, tmp_path, capsys, without_openvino
):
    pytest.importorskip(backbone.partition(":")[0])
    if "lora" in options:
        pytest.importorskip("peft")
    saved = tmp_path / "mine.safetensors"
    options = {**SMALL, "backbone": backbone, "epochs": 1, "batch_size": 12, "lr": 0.02, **options}
    if backbone.startswith("torchvision"):
        options["size"] = 64
    if method == "scratch":
        options["weights"] = None
    result = finetune(image_folder, method, **options, save=saved)
    assert saved.read_bytes() == result.checkpoint.read_bytes()
    record = json.loads((result.run / "run.json").read_text())
    library = backbone.partition(":")[0]
    assert record["backbone"] == backbone and record["library"].startswith(f"{library} ")
    assert record["preprocess"]["size"] == options["size"]
    model = load_weights("random:0", backbone, size=options["size"]).network.load().model
    weights = load_weights(saved, backbone)
    assert weights.preprocess == load_weights("random:0", backbone, size=options["size"]).preprocess
    state = weights.network.load().model.state_dict()
    assert list(state) == list(model.state_dict())
    head = result.run / "head.safetensors"
    found = predict(image_folder / "test", head)
    right = [item.path.split("/")[-2] == item.class_name for item in found]
    assert np.mean(right) == pytest.approx(result.top1)
    arguments = ["--backbone", backbone, "--weights", str(saved), "--engine", "torch"]
    cache = tmp_path / "tuned.h5"
    assert main(["extract", str(image_folder), *arguments, "--output", str(cache)]) == 0
    assert main(["probe", str(cache), "--json"]) == 0
    assert '"top1"' in capsys.readouterr().out
    with pytest.raises(WeightsError, match=r"found timm|found torchvision"):
        load_weights(saved, "timm:test_convnext")


def test_a_folder_of_hugging_face(image_folder, tmp_path, without_openvino):
    transformers = pytest.importorskip("transformers")
    import torch

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 32, "image_size": 32, "patch_size": 8}
    folder = tmp_path / "tiny"
    model = transformers.ViTModel(transformers.ViTConfig(**sizes), add_pooling_layer=False)
    model.save_pretrained(folder)
    options = {"backbone": f"hf:{folder}", "engine": "torch", "epochs": 1, "lr": 0.05}
    options |= {"layer_decay": 0.5, "freeze_until": "layers.0"}
    result = finetune(image_folder, "full", **options)
    lines = (result.run / "metrics.jsonl").read_text().splitlines()
    assert list(json.loads(lines[0])["lr"]) == ["head", "layers.2", "layers.1"]
    names = set(load_weights(result.checkpoint, f"hf:{folder}").network.load().model.state_dict())
    assert names == set(model.state_dict())
    found = predict(image_folder / "test", result.run / "head.safetensors", backbone=folder)
    right = [item.path.split("/")[-2] == item.class_name for item in found]
    assert np.mean(right) == pytest.approx(result.top1)


def test_a_run_from_a_probes_head_begins_with_a_lower_loss(image_folder, tmp_path):
    cache = extract(image_folder, **VIT, views="flips", output=tmp_path).cache
    head = probe(cache, check=False).head
    options = {**VIT, "epochs": 1, "freeze_until": "blocks.4"}
    plain = finetune(image_folder, "full", **options)
    begun = finetune(image_folder, "full", init_head=head, **options)
    assert begun.epochs[0].train_loss < plain.epochs[0].train_loss
    with pytest.raises(WeightsError, match="weights_sha256: head"):
        finetune(image_folder, "full", init_head=head, **{**options, "weights": "random:1"})


def test_a_frozen_run_on_a_cache_equals_the_one_on_images(image_folder, tmp_path):
    cache = extract(image_folder, **VIT, views="flips", output=tmp_path).cache
    options = {"epochs": 2, "batch_size": 6, "seed": 5, "engine": "torch"}
    cached = finetune(None, "frozen", cache=cache, **options)
    uncached = finetune(image_folder, "frozen", **{**VIT, **options})
    for one, other in zip(cached.epochs, uncached.epochs, strict=True):
        assert one.train_loss == pytest.approx(other.train_loss, rel=1e-4)
    with pytest.raises(RecipeError, match="cache: expected method frozen with timm:test_vit"):
        finetune(None, "split", cache=cache, freeze_until="blocks.3")


def test_fit_climbs_to_fine_tunes(image_folder, monkeypatch):
    from featcache.finetuning import fit as fitting

    monkeypatch.setattr(fitting, "top1", lambda predicted, labels: 0.1)
    result = fit(image_folder, 1.0, **{**VIT, "backbone": DROPPING, "weights": None}, epochs=1)
    assert [one.name for one in result.attempts] == ["probe", "split", "full"]
    assert {one.status for one in result.attempts[1:]} <= {"done", "not needed"}
    head = result.attempts[1].outcome.head
    assert len(predict(image_folder / "test", head, backbone=DROPPING)) == 18
    with pytest.raises(WeightsError, match="name it with --backbone"):
        predict(image_folder / "test", head)


def test_fit_probes_what_cannot_be_trained(image_folder, monkeypatch):
    from featcache.finetuning import fit as fitting

    monkeypatch.setattr(fitting, "top1", lambda predicted, labels: 0.5)
    result = fit(image_folder, 1.0, backbone=MEANS, size=32)
    assert result.attempts[1].status == "not possible"
    assert "can be probed but not trained" in result.attempts[1].why


# --- what is refused


def test_what_is_refused_before_the_long_work(image_folder, tmp_path):
    def refused(error, said, method="full", **options):
        with pytest.raises(error, match=said) as caught:
            finetune(image_folder, method, **{**VIT, **options})
        assert "\n" not in str(caught.value)

    refused(EngineUnavailableError, "engine oneflow: expected torch", engine="oneflow")
    blocks = r"freeze until: expected a block of timm:test_vit \(blocks.0, .*blocks.5\), found"
    refused(RecipeError, blocks, freeze_until="layer3")
    refused(RecipeError, blocks, freeze_until="pos_drop")
    said = "can be probed but not trained"
    for name in ("net.onnx", "net.xml", "net.pt2"):
        refused(RecipeError, said, backbone=tmp_path / name, weights=None)
    refused(RecipeError, said, backbone=MEANS, weights=None)
    with pytest.raises(RecipeError, match="freeze until: expected one of layer1, layer2"):
        FinetuneOptions("full", finetune_recipe("full", freeze_until="blocks.3"))
    assert not list(tmp_path.rglob("config.json"))


def test_the_command_line(image_folder, capsys):
    words = ["finetune", str(image_folder), "--backbone", "timm:test_vit", "--weights", "random:0"]
    words += ["--size", "32", "--epochs", "1", "--engine", "torch", "--train-limit", "9"]
    assert main([*words, "--freeze-until", "blocks.9"]) == 2
    assert capsys.readouterr().err.count("freeze until: expected a block") == 1
    assert main([*words, "--freeze-until", "blocks.4", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["recipe"]["freeze_until"] == "blocks.4"
