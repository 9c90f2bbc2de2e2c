"""Fine-tuning by two processes of torchrun: close to one process, written once, ended together."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from featcache import finetune, load_weights
from featcache.errors import EngineUnavailableError, RankError
from featcache.finetuning import processes as processes_module
from featcache.finetuning.processes import Processes, joined, take_gpu
from featcache.finetuning.run import ctrl_c_noted
from featcache.process import LAUNCH_VARIABLES, run_in_child, torchrun_rank

TESTS = Path(__file__).parent
# With the weights' statistics in batch normalisation two processes compute what one does.
OPTIONS = {"bn": "eval", "schedule": "cosine", "augment": "crop-flip", "freeze_until": "layer3"}
OPTIONS |= {"epochs": 2, "batch_size": 15, "weights": "tinyimagenet32", "size": 32}
N_STEPS = 6  # 36 images; the last batch of an epoch has 6


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Threads of one process that wait for those of another waste both."""
    monkeypatch.setenv("FEATCACHE_THREADS", "1")


# --- parts of a batch


def test_one_process_shares_nothing():
    one = Processes()
    assert one.is_first and one.part(slice(3, 10)) == (slice(3, 10), 1.0)
    assert one.from_first(lambda: 7) == 7 and one.any(True) and not one.any(False)
    one.check_alike({"seed": 0})


@pytest.mark.parametrize(("size", "n"), [(2, 9), (3, 8), (4, 8)])
def test_parts_leave_nothing_out_and_weigh_by_images(size, n):
    parts = [Processes(rank, size).part(slice(5, 5 + n)) for rank in range(size)]
    rows = [row for part, _ in parts for row in range(part.start, part.stop)]
    assert rows == list(range(5, 5 + n))
    weighted = [weight / size for _, weight in parts]
    assert weighted == pytest.approx([(part.stop - part.start) / n for part, _ in parts])


@pytest.mark.parametrize(("size", "n"), [(2, 3), (4, 7), (3, 2)])
def test_a_batch_too_small_to_share_is_computed_whole_by_all(size, n):
    """Batch normalisation needs two images."""
    for rank in range(size):
        assert Processes(rank, size).part(slice(5, 5 + n)) == (slice(5, 5 + n), 1.0)
    ranges = [Processes(rank, size).range(slice(0, n)) for rank in range(size)]
    assert sum(one.stop - one.start for one in ranges) == n


def test_processes_that_are_about_to_do_another_run_are_refused():
    class Second(Processes):
        def from_first(self, make):
            return {"dataset digest": "a", "seed": 0}

    with pytest.raises(RankError, match="dataset digest: rank 0 'a', here 'b'; give every machine"):
        Second(1, 2).check_alike({"dataset digest": "b", "seed": 0})


# --- what torchrun sets


def set_torchrun(monkeypatch, **changes):
    values = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "x"}
    for name, value in {**values, **changes}.items():
        monkeypatch.setenv(name, value)


def test_the_rank_under_torchrun(monkeypatch):
    assert torchrun_rank() is None
    set_torchrun(monkeypatch)
    assert torchrun_rank() == 1
    for alone in ({"WORLD_SIZE": "1", "RANK": "0"}, {"RANK": "-1"}, {"RANK": "2"}, {"RANK": ""}):
        set_torchrun(monkeypatch, **alone)
        assert torchrun_rank() is None
    set_torchrun(monkeypatch)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    assert torchrun_rank() is None


def test_a_child_is_not_part_of_the_launch(monkeypatch):
    set_torchrun(monkeypatch)
    code = f"import os; print([os.environ.get(name) for name in {LAUNCH_VARIABLES!r}])"
    child = run_in_child(code, timeout_s=30)
    assert child.stdout.strip() == str([None] * len(LAUNCH_VARIABLES))


def test_oneflow_does_not_train_by_several_processes(monkeypatch):
    set_torchrun(monkeypatch)
    said = "engine oneflow: expected torch, with which several processes train together"
    with pytest.raises(EngineUnavailableError, match=said), joined("oneflow"):
        pass


def test_each_process_needs_a_gpu_of_its_own(monkeypatch):
    from featcache import frameworks

    taken = []
    cuda = SimpleNamespace(device_count=lambda: 2, set_device=taken.append)
    monkeypatch.setattr(frameworks, "import_torch", lambda: SimpleNamespace(cuda=cuda))
    take_gpu("cuda")
    set_torchrun(monkeypatch)
    take_gpu("cuda")
    assert taken == [1]
    cuda.device_count = lambda: 1
    with pytest.raises(EngineUnavailableError, match="a GPU for each process of a machine, found"):
        take_gpu("cuda")
    with pytest.raises(EngineUnavailableError, match="expected cpu or cuda with several"):
        take_gpu("mps")
    take_gpu("cpu")


def test_a_rank_names_itself_in_an_error_and_only_the_first_speaks_of_usage(monkeypatch, capsys):
    from featcache import cli

    set_torchrun(monkeypatch)
    assert cli.main(["finetune", "nowhere", "--engine", "oneflow"]) == 1
    assert capsys.readouterr().err.startswith("error: rank 1: engine oneflow: ")
    assert cli.main(["finetune", "--epoch", "3"]) == 2
    assert capsys.readouterr().err == ""


def test_only_a_lost_process_is_told_as_one():
    lost = processes_module._is_lost_peer
    assert lost(RuntimeError("[gloo/transport/tcp/pair.cc:537] Connection closed by peer"))
    assert not lost(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_torchruns_repetition_of_ctrl_c_counts_once():
    with ctrl_c_noted(launched=True) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop()
    with ctrl_c_noted() as stop, pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


# --- torchrun itself


class Launched:
    """A run of two processes, in a session of its own; steps take ``step_s`` longer."""

    def __init__(self, data, *more, step_s=0.0, options=OPTIONS):
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
        words += [f"--master-port={port}", TESTS / "long_finetune.py", step_s, 0, 0, "finetune"]
        words += [data, "--method", "full", "--json", *more]
        for name, value in options.items():
            words += [f"--{name.replace('_', '-')}", value]
        self.process = subprocess.Popen(
            [str(word) for word in words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(TESTS)},
        )
        self.out, self.err = [], []
        streams = (self.process.stdout, self.out), (self.process.stderr, self.err)
        self._readers = [
            threading.Thread(target=lines.extend, args=(stream,)) for stream, lines in streams
        ]
        for reader in self._readers:
            reader.start()

    def reach(self, runs, step):
        end = time.monotonic() + 120
        while time.monotonic() < end:
            time.sleep(0.05)
            logs = list(runs.glob("*/metrics.jsonl"))
            if logs and len(logs[0].read_text().splitlines()) >= step:
                return
        raise AssertionError("".join(self.err))

    def ranks(self):
        """Return the processes by rank."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        by_rank = {}
        for pid in map(int, children.read_text().split()):
            environment = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
            by_rank.update({int(one[5:]): pid for one in environment if one.startswith("RANK=")})
        return by_rank

    def end(self):
        """Wait for the end of torchrun and of its processes; return the exit code."""
        code = self.process.wait(timeout=200)
        for reader in self._readers:
            reader.join(timeout=60)  # ends with the last process that can write
            assert not reader.is_alive(), "a process hangs"
        self.process.stdout.close()
        self.process.stderr.close()
        assert "featcache/cli" not in "".join(self.err), "no traceback of ours"
        return code

    def lines(self, *starts):
        return [line for line in self.err if line.startswith(starts)]


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.torch
def test_a_killed_process_ends_all_and_two_others_finish_the_run_of_one(image_folder, home):
    """Every file is written once, by rank 0; losses and network are close to one process's."""
    whole = finetune(image_folder, "full", **OPTIONS, engine="torch", runs=home / "whole")
    runs = home / "cache" / "runs"
    first = Launched(image_folder, step_s=0.5)
    first.reach(runs, 3)
    os.kill(first.ranks()[1], signal.SIGKILL)
    assert first.end() != 0
    (folder,) = runs.iterdir()
    assert len(first.lines("error: ")) <= 1, first.err

    second = Launched(image_folder, "--resume", "latest")
    assert second.end() == 0, second.err
    (line,) = [line for line in second.out if line.startswith("{")]
    result = json.loads(line)
    assert (result["run"], result["resumed"], result["n_train"]) == (str(folder), True, 36)
    assert result["engine"] == "torch" and result["top1"] == whole.top1
    np.testing.assert_allclose(losses(folder), losses(whole.run), rtol=1e-3)
    ours, theirs = (load_weights(run / "model.safetensors").state for run in (folder, whole.run))
    for name, array in theirs.items():
        np.testing.assert_allclose(ours[name], array, atol=1e-4, err_msg=name)
    assert sum("resuming after step" in line for line in second.err) == 1, "rank 0 alone speaks"
    assert [path.name for path in runs.iterdir()] == [folder.name]
    assert {path.name for path in folder.iterdir()} == {path.name for path in whole.run.iterdir()}
    assert json.loads((folder / "run.json").read_text())["processes"] == 2


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.parametrize("more", [{"freeze_until": "blocks.3"}, {"lora": 2}])
def test_two_processes_train_a_librarys_model_as_one_does(image_folder, home, more):
    pytest.importorskip("timm")
    if "lora" in more:
        pytest.importorskip("peft")
    options = {"backbone": "timm:test_vit", "weights": "random:0", "size": 32, "lr": 0.05}
    options |= {"epochs": 2, "batch_size": 15, **more}
    whole = finetune(image_folder, "full", **options, engine="torch", runs=home / "whole")
    launched = Launched(image_folder, options=options)
    assert launched.end() == 0, launched.err
    (folder,) = (home / "cache" / "runs").iterdir()
    np.testing.assert_allclose(losses(folder), losses(whole.run), rtol=1e-3)
    assert json.loads((folder / "run.json").read_text())["processes"] == 2


@pytest.mark.torch
@pytest.mark.slow
def test_ctrl_c_stops_all_after_the_same_step(image_folder, home):
    """Batch statistics are each process's own here: it trains, and says how to resume."""
    runs = home / "cache" / "runs"
    launched = Launched(image_folder, "--bn", "train", step_s=0.5)
    launched.reach(runs, 3)
    os.killpg(launched.process.pid, signal.SIGINT)  # as a terminal does
    launched.end()
    (folder,) = runs.iterdir()
    (line,) = launched.lines("error: ", "interrupted: ")
    step = re.search(r"interrupted: step (\d) of 6: the last good .* is of step (\d);", line)
    assert step and step[1] == step[2] == str(len(losses(folder)))
    assert f"add --resume {folder} to" in line and "by the same launcher: " in line


@pytest.mark.torch
@pytest.mark.slow
def test_an_unreadable_image_ends_all_with_its_name(image_folder, home, tmp_path):
    import shutil

    data = tmp_path / "colours"
    shutil.copytree(image_folder, data)
    (data / "train" / "red" / "03.png").write_bytes(b"no image")
    launched = Launched(data)
    assert launched.end() != 0
    assert any("red/03.png" in line for line in launched.lines("error: ")), launched.err
