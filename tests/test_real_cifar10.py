"""The main job on real images: a part of CIFAR-10, from the archive to the comparison."""

from __future__ import annotations

import json
import zipfile

import pytest

from featcache.cli import main
from featcache.finetuning.recipes import METHODS

pytestmark = [pytest.mark.oneflow, pytest.mark.slow]

STARTER = ("--weights", "tinyimagenet32")


@pytest.fixture(scope="module")
def part_of_cifar(cifar_zip, tmp_path_factory):
    """The first 150 training and 100 test images of every class, in a zip of their own."""
    path = tmp_path_factory.mktemp("real") / "cifar10-part.zip"
    kept: dict[str, int] = {}
    with zipfile.ZipFile(cifar_zip) as whole, zipfile.ZipFile(path, "w") as part:
        for name in sorted(whole.namelist()):
            folder = name.rsplit("/", 1)[0]
            kept[folder] = kept.get(folder, 0) + name.endswith(".jpg")
            if name.endswith(".jpg") and kept[folder] <= (150 if name[:5] == "train" else 100):
                part.writestr(name, whole.read(name))
    return path


def run_json(capsys, *arguments):
    assert main([str(argument) for argument in (*arguments, "--json")]) == 0
    return json.loads(capsys.readouterr().out)


def test_extract_and_probe(capsys, part_of_cifar):
    made = run_json(capsys, "extract", part_of_cifar, *STARTER)
    assert (made["n_rows"], made["feature_dim"]) == (2500, 512)
    probed = run_json(capsys, "probe")
    # 2,000 training images gave 0.689 and 200 gave 0.600 of the whole test split.
    assert 0.60 < probed["top1"] < 0.75
    assert abs(probed["top1"] - probed["check"]["top1"]) <= 0.006, "3 of 1,000 images each way"
    assert probed["check"]["agreement"] >= 0.95


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_on_real_images(capsys, cifar_zip, method):
    limits = ("--train-limit", 60, "--test-limit", 30, "--epochs", 1)
    result = run_json(capsys, "finetune", cifar_zip, *STARTER, "--method", method, *limits)
    assert (result["method"], result["n_train"], result["n_test"]) == (method, 60, 30)
    assert 0 <= result["top1"] <= 1 and result["epochs"][0]["train_loss"] > 0
