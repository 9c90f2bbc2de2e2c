"""Runs that are killed, interrupted or out of space, for real: they resume, and end the same.

None of it depends on the framework; `test_finetuning.py` resumes a run in each.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from featcache import finetune, load_dataset, load_weights
from featcache.datasets.dataset import Dataset, Split
from featcache.datasets.images import ArrayImages
from featcache.errors import RecipeError, WeightsError
from featcache.finetuning import folder as folder_module
from featcache.finetuning import run as run_module
from featcache.finetuning.folder import RunFolder, load_checkpoint, save_checkpoint

LONG_FINETUNE = Path(__file__).with_name("long_finetune.py")
OPTIONS = {"epochs": 2, "batch_size": 9, "schedule": "cosine", "augment": "crop-flip"}
OPTIONS["freeze_until"] = "layer4"  # steps and checkpoints are as quick as they get
N_STEPS = 8


pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def small():
    """What makes runs small."""
    return {"weights": "tinyimagenet32", "size": 32, "engine": "torch"}


class Child:
    """``featcache finetune`` in a process of its own, at work when the constructor returns."""

    def __init__(self, data, small, *options, step_s=0.0, every_s=0.0, limit_bytes=0):
        arguments = [step_s, every_s, limit_bytes, "finetune", data, "--method", "full", "--json"]
        for name, value in {**small, **OPTIONS}.items():
            arguments += [f"--{name.replace('_', '-')}", value]
        self.process = subprocess.Popen(
            [sys.executable, str(LONG_FINETUNE), *map(str, arguments), *map(str, options)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout.readline() == "ready\n", self.process.communicate(timeout=60)

    def end(self):
        """Wait for the end; return the exit code, what was printed, and standard error."""
        out, err = self.process.communicate(timeout=120)
        assert "Traceback" not in err, err
        return self.process.returncode, out, err


@pytest.fixture(scope="module")
def network(image_folder, small, tmp_path_factory):
    """Return the network that an uninterrupted run ends with."""
    runs = tmp_path_factory.mktemp("runs")
    return finetune(image_folder, "full", **small, **OPTIONS, runs=runs).checkpoint


@pytest.fixture(scope="module")
def expected(network):
    """Return its digest."""
    return digest(network)


def digest(path):
    """Return the digest of a network: pytest would look for hours how 45 MB of bytes differ."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def stop_after(step):
    """Return a listener that presses Ctrl-C after so many steps."""
    messages = []

    def listen(message):
        messages.extend([message] * (message.stage.startswith("epoch") and message.done > 0))
        if len(messages) == step:
            messages.append(None)
            raise KeyboardInterrupt

    return listen


def interrupted(data, small, after, **options):
    """Begin a run, stop it after so many steps, and return its folder."""
    with pytest.raises(KeyboardInterrupt) as stopped:
        finetune(data, "full", **{**small, **OPTIONS, **options}, on_progress=stop_after(after))
    return Path(re.search(r"--resume (\S+)", str(stopped.value))[1])


@pytest.mark.parametrize("step", [1, 4, 7])
def test_a_stopped_run_resumes_to_the_same_bytes(image_folder, expected, step, small):
    """In the middle of an epoch, at its end, and before the last step."""
    folder = interrupted(image_folder, small, step)
    for name in ("checkpoint.safetensors", "model.safetensors", "run.json"):
        (folder / f".{name}.7afbbc80.part").write_text("left by a kill")
    notes = []
    options = {**small, **OPTIONS, "on_note": notes.append}
    result = finetune(image_folder, "full", **options, resume=folder)
    assert notes[1:] == [f"{folder}: resuming after step {step} of {N_STEPS}"]
    assert result.resumed and result.run == folder
    assert digest(result.checkpoint) == expected
    assert not list(folder.glob(".*"))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, N_STEPS + 1))


@pytest.mark.parametrize("kills", [1, pytest.param(14, marks=pytest.mark.long)])
def test_kills_at_random_moments_change_not_a_byte(image_folder, home, expected, kills, small):
    generator, killed, resume = random.Random(kills), 0, []
    runs = home / "cache" / "runs"
    while True:
        child = Child(image_folder, small, *resume, step_s=0.25)
        if killed >= kills:
            break
        time.sleep(generator.uniform(0.3, 2.0))
        child.process.send_signal(signal.SIGKILL)
        child.process.communicate(timeout=60)
        killed += 1
        # A run that was killed before its first checkpoint is started anew.
        resume = ["--resume", "latest"] if list(runs.rglob("checkpoint.*")) else []
        assert all(load_checkpoint(path) for path in runs.rglob("checkpoint.safetensors"))
    code, out, _ = child.end()
    assert code == 0 and digest(json.loads(out)["checkpoint"]) == expected
    assert not list(Path(json.loads(out)["run"]).glob(".*.part")), "leftovers of a kill are gone"


def test_ctrl_c_saves_and_says_how_to_resume(image_folder, home, expected, small):
    child = Child(image_folder, small, step_s=0.3, every_s=1e9)
    time.sleep(0.8)
    child.process.send_signal(signal.SIGINT)
    code, _, err = child.end()
    assert code == 130
    said = re.search(
        r"step (\d) of 8: the last good checkpoint, .* is of step (\d); add --resume (\S+)", err
    )
    assert said and said[1] == said[2]
    code, out, _ = Child(image_folder, small, "--resume", said[3]).end()
    assert code == 0 and digest(json.loads(out)["checkpoint"]) == expected


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(image_folder, home, expected, small):
    code, out, err = Child(image_folder, small, limit_bytes=1 << 20).end()
    assert code == 0 and "no checkpoint of step 1: " in err and "there is no checkpoint yet" in err
    assert digest(json.loads(out)["checkpoint"]) == expected


def test_the_checkpoint_before_stays_where_a_new_one_cannot_be_written(
    image_folder, expected, monkeypatch, small
):
    from featcache import files

    write_all, notes = files.write_all, []

    def full_disk(descriptor, *parts):
        if sum(len(part) for part in parts) > 1 << 20 and len(notes) < 4 and wrote:
            raise OSError(28, "No space left on device")
        wrote.append(descriptor)
        write_all(descriptor, *parts)

    write = folder_module.write_atomically

    def plainly(path, data):
        if path.name == "checkpoint.safetensors":
            return write(path, data)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    wrote = []
    monkeypatch.setattr(files, "write_all", full_disk)
    monkeypatch.setattr(run_module, "CHECKPOINT_EVERY_S", 0.0)
    monkeypatch.setattr(folder_module, "write_atomically", plainly)
    options = {**small, **OPTIONS, "on_note": notes.append}
    result = finetune(image_folder, "full", **options)
    notes = notes[1:]
    assert len(notes) == 3 and digest(result.checkpoint) == expected
    assert "no checkpoint of step 2: " in notes[0] and notes[0].endswith("is of step 1")
    assert notes[2].endswith("is of step 1")


def test_early_stopping_resumes_with_its_best_epoch(image_folder, monkeypatch, small):
    def scripted():
        scores = iter([0.75, 0.5, 0.25, 0.25])
        monkeypatch.setattr(run_module, "top1", lambda predicted, labels: next(scores))
        return scores

    options = {"epochs": 4, "patience": 2, "val_fraction": 0.25, "batch_size": 14}
    scripted()
    whole = finetune(image_folder, "full", **{**small, **OPTIONS, **options})
    scripted()
    folder = interrupted(image_folder, small, 3, **options)
    result = finetune(image_folder, "full", **{**small, **OPTIONS, **options}, resume=folder)
    assert (whole.best_epoch, result.best_epoch) == (1, 1) and len(result.epochs) == 3
    assert digest(result.checkpoint) == digest(whole.checkpoint)


def test_latest_is_the_newest_unfinished_run(image_folder, home, small):
    with pytest.raises(WeightsError, match="unfinished run of method full, found none"):
        finetune(image_folder, "full", **small, **OPTIONS, resume="latest")
    older = interrupted(image_folder, small, 1)
    time.sleep(1.1)  # names of runs count seconds
    newer = interrupted(image_folder, small, 2)
    finished = finetune(image_folder, "full", **small, **OPTIONS, resume=True)
    assert finished.run == newer
    assert finetune(image_folder, "full", **small, **OPTIONS, resume=True).run == older
    with pytest.raises(WeightsError, match="found one that is finished"):
        finetune(image_folder, "full", **small, **OPTIONS, resume=newer)


def test_a_checkpoint_of_another_run_is_refused_with_the_fields(image_folder, small):
    folder = interrupted(image_folder, small, 1)

    def refused(said, data=image_folder, method="full", resume=folder, **options):
        with pytest.raises(WeightsError, match=said):
            finetune(data, method, **{**small, **OPTIONS, **options}, resume=resume)

    refused("method: checkpoint 'full', here 'split'; .*recipe backbone_lr", method="split")
    refused("recipe epochs: checkpoint 2, here 3", epochs=3)
    refused("seed: checkpoint 0, here 1", seed=1)
    refused("size: checkpoint 32, here 64", size=64)
    refused("expected the folder of a run, found none", resume="nowhere")
    data = load_dataset(image_folder)
    pixels = np.zeros((36, 8, 8, 3), np.uint8)
    changed = Split(ArrayImages(pixels), data.train.labels, data.class_names, data.train.ids)
    refused("dataset digest", data=Dataset("colours", changed, data.test, "changed by a test"))
    (folder / "checkpoint.safetensors").write_bytes(b"half a checkp")
    refused("expected the checkpoint of a run of featcache finetune, found")
    (folder / "checkpoint.safetensors").unlink()
    refused("No such file")


def test_weights_are_no_checkpoint(network):
    with pytest.raises(WeightsError, match=r"without featcache\.checkpoint in its metadata"):
        load_checkpoint(network)
    assert load_weights(network).state


def test_a_checkpoint_comes_back_to_the_bit(tmp_path):
    arrays = {"a": np.float32([[0.1, 2]]), "n": np.array(7), "empty": np.zeros((0, 3), np.float32)}
    facts = {"progress": {"loss_sum": 0.1 + 0.2}, "name": "é"}
    save_checkpoint(tmp_path / "x", arrays, facts)
    loaded, facts_read = load_checkpoint(tmp_path / "x")
    assert facts_read["progress"] == facts["progress"] and facts_read["name"] == "é"
    for name, array in arrays.items():
        assert loaded[name].tobytes() == array.tobytes() and loaded[name].shape == array.shape


EPOCH = {"epoch": 1, "train_loss": 0.5, "top1": 0.5, "wall_s": 1.0}
PROGRESS = {
    "step": 3, "curve": [EPOCH], "batch": 1, "loss_sum": 0.5, "epoch_s": 1.0, "trained_s": 1.0,
    "wall_s": 1.0,
}  # fmt: skip


def test_any_changed_bit_of_a_checkpoint_is_found(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    arrays = {"model.a": np.ones((3, 4), np.float32), "optimizer.0.m": np.zeros(5, np.float32)}
    save_checkpoint(path, arrays, {"identity": {}, "progress": PROGRESS})
    data = path.read_bytes()
    generator = np.random.default_rng(0)
    for at in [*generator.integers(0, len(data), 200), len(data) - 1]:
        changed = bytearray(data)
        changed[at] ^= 1 << int(generator.integers(8))
        path.write_bytes(changed)
        try:
            load_checkpoint(path)
        except WeightsError:
            continue
        # What may change unseen: white space and the spelling of the header, never a value.
        path.write_bytes(changed)
        loaded, facts = load_checkpoint(path)
        assert facts["progress"] == PROGRESS and loaded.keys() == arrays.keys()
        assert all((loaded[name] == arrays[name]).all() for name in arrays)


def test_a_link_in_the_place_of_the_log_is_not_followed(tmp_path):
    """A stranger's folder that is resumed may have one."""
    (tmp_path / "metrics.jsonl").symlink_to(tmp_path / "elsewhere")
    notes = []
    folder = RunFolder(tmp_path, {}, notes.append)
    folder.log(step=1)
    assert not (tmp_path / "elsewhere").exists()
    assert len(notes) == 1 and "no more lines" in notes[0] and "symbolic link" in notes[0]


@pytest.mark.parametrize("name", [*PROGRESS])
@pytest.mark.parametrize("odd", [None, "x", -1, 10**400, float("nan"), [], {}, [{}], True])
def test_odd_progress_is_one_line(tmp_path, name, odd):
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, {}, {"identity": {}, "progress": {**PROGRESS, name: odd}})
    usable = (name, odd) in [("curve", []), ("loss_sum", -1)]
    if usable:
        RunFolder(tmp_path, {"engine": "oneflow", "precision": "f32"}, print).load()
        return
    with pytest.raises(WeightsError, match=f"found no usable {name}; start anew"):
        RunFolder(tmp_path, {"engine": "oneflow", "precision": "f32"}, print).load()


def test_a_run_resumes_in_the_engine_that_started_it(tmp_path):
    """Two engines round differently, so that the other would end with another network."""
    identity = {"method": "full", "engine": "torch", "precision": "f32", "seed": 0}
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, {}, {"identity": identity, "progress": PROGRESS})
    _, progress = RunFolder(tmp_path, identity, print).load()
    assert progress == PROGRESS
    with pytest.raises(WeightsError, match="engine: checkpoint 'torch', here 'oneflow'; repeat"):
        RunFolder(tmp_path, {**identity, "engine": "oneflow"}, print).load()
    # A checkpoint of an earlier featcache says neither: it was OneFlow's, in float32.
    earlier = {"method": "full", "seed": 0}
    save_checkpoint(path, {}, {"identity": earlier, "progress": PROGRESS})
    RunFolder(tmp_path, {**identity, "engine": "oneflow"}, print).load()
    with pytest.raises(WeightsError, match="engine: checkpoint 'oneflow', here 'torch'"):
        RunFolder(tmp_path, identity, print).load()


def test_a_diverging_run_names_its_last_good_checkpoint(image_folder, monkeypatch, small):
    monkeypatch.setattr(run_module, "CHECKPOINT_EVERY_S", 0.0)
    with pytest.raises(RecipeError) as stopped:
        finetune(image_folder, "full", **{**small, **OPTIONS, "schedule": "constant"}, lr=1e12)
    said = str(stopped.value)
    assert re.search("found (nan|inf) at step", said) or "diverged" in said
    assert "the last good checkpoint" in said or "no checkpoint yet" in said
    assert "use a smaller --lr" in said
