"""Fine-tuning by several processes: the run of one, to rounding; and processes that die."""

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
from conftest import TRAINERS

from featcache import finetune
from featcache.cli import launch as _launch
from featcache.errors import DatasetError, EngineUnavailableError, RankError
from featcache.finetuning import joining as _joining
from featcache.finetuning.batch_norm import SharedStatistics
from featcache.finetuning.framework import get_framework
from featcache.finetuning.ranks import JoinedRanks, Ranks, Stopped, Watch, open_watch
from featcache.finetuning.run import ctrl_c_noted
from featcache.process import LAUNCH_VARIABLES, Launch, launched, run_in_child

TESTS = Path(__file__).parent
OPTIONS = {"epochs": 2, "batch_size": 15, "schedule": "cosine", "augment": "crop-flip"}
SMALL = {"weights": "tinyimagenet32", "size": 64}
N_STEPS = 6  # 36 images; the last batch of an epoch has 6


@pytest.fixture(scope="module", params=TRAINERS)
def engine(request):
    return request.param


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Threads of a process beside those of others that test wait for each other for ever."""
    monkeypatch.setenv("FEATCACHE_THREADS", "1")


# --- a group of threads in place of processes: in PyTorch, since OneFlow's must not be shared


class Group:
    """So many ranks, each a thread, that add their arrays up over a table."""

    def __init__(self, size):
        self.size, self.flow = size, get_framework("torch").module
        self.barrier, self.table = threading.Barrier(size, timeout=60), [None] * size

    def all_reduce(self, rank):
        def reduce(tensor):
            self.table[rank] = np.array(tensor.numpy())
            self.barrier.wait()
            total = np.sum(self.table, axis=0, dtype=tensor.numpy().dtype)
            self.barrier.wait()
            tensor.numpy()[...] = total

        return reduce

    def run(self, work):
        """Return what ``work(ranks)`` returns or raises on each rank."""
        found = [None] * self.size

        def one(rank):
            try:
                ranks = JoinedRanks(rank, self.size, self.flow, self.all_reduce(rank))
                found[rank] = work(ranks)
            except BaseException as error:
                found[rank] = error

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found


def test_one_process_is_the_trivial_case():
    ranks = Ranks()
    assert ranks.is_first and ranks.part(slice(3, 10)) == slice(3, 10)
    assert ranks.agreed(lambda: 7) == 7 and ranks.from_first(b"x") == b"x"
    ranks.heed(lambda: True, str)
    with pytest.raises(Stopped):
        ranks.agreed(lambda: 7)


@pytest.mark.torch
def test_parts_are_in_order_and_leave_nothing_out():
    for size, n in ((2, 9), (3, 8), (4, 3), (3, 2)):
        parts = Group(size).run(lambda ranks, n=n: ranks.part(slice(5, 5 + n)))
        rows = [row for part in parts for row in range(part.start, part.stop)]
        assert rows == list(range(5, 5 + n))
        assert max(part.stop - part.start for part in parts) <= -(-n // size)


@pytest.mark.torch
def test_ranks_tell_each_other_texts_and_sums():
    text = "größer".encode() + bytes(range(256))
    group = Group(3)
    assert group.run(lambda ranks: ranks.from_first(text if ranks.is_first else b"")) == [text] * 3
    assert group.run(lambda ranks: ranks.from_first(b"")) == [b""] * 3
    big = np.array([2**62, -1])
    totals = group.run(lambda ranks: ranks.total_array(big * (ranks.rank == 1) + ranks.rank))
    assert [total.tolist() for total in totals] == [(big + 3).tolist()] * 3

    def totals_of(ranks):
        tensors = [group.flow.ones(2, 2) * ranks.rank, group.flow.ones(3) * 10]
        ranks.totals(tensors)
        return [tensor.numpy().tolist() for tensor in tensors]

    assert group.run(totals_of) == [[[[3.0, 3.0]] * 2, [30.0] * 3]] * 3


@pytest.mark.torch
def test_an_error_of_one_rank_is_raised_on_all_and_told_once():
    def work(ranks):
        def read():
            if ranks.rank == 1:
                raise DatasetError("b.png: expected an image")
            return ranks.rank

        return ranks.agreed(read)

    first, second, third = Group(3).run(work)
    assert str(first) == "rank 1 of 3: b.png: expected an image" == str(second)
    assert [error.is_told for error in (first, second, third)] == [False, True, True]

    def all_fail(ranks):
        return ranks.agreed(lambda: load_nothing())

    def load_nothing():
        raise DatasetError("nowhere")

    errors = Group(2).run(all_fail)
    assert [type(error) for error in errors] == [DatasetError, RankError] and errors[1].is_told


@pytest.mark.torch
def test_all_ranks_stop_at_the_same_place():
    def work(ranks):
        done = []
        ranks.heed(lambda: ranks.rank == 1 and len(done) == 3, str)
        try:
            while True:
                done.append(ranks.agreed(lambda: 1))
        except Stopped:
            return len(done)

    assert Group(2).run(work) == [3, 3]


@pytest.mark.torch
def test_ranks_that_are_about_to_do_another_run_are_refused():
    def work(ranks):
        digest = "b" if ranks.rank == 1 else "a"
        _joining.check_alike(ranks, {"dataset digest": digest, "seed": 0})

    errors = Group(3).run(work)
    assert "rank 1 of 3: expected the same run as rank 0, found another" in str(errors[0])
    assert "dataset digest: rank 0 'a', here 'b'; give every machine" in str(errors[0])
    assert Group(2).run(lambda ranks: _joining.check_alike(ranks, {"a": 1})) == [None] * 2


@pytest.mark.torch
def test_cores_are_shared_by_those_who_may_use_the_same(monkeypatch):
    monkeypatch.setattr(_joining, "usable_cores", lambda: 5)
    assert Group(2).run(_joining._own_cores) == [2, 2]
    assert Group(6).run(_joining._own_cores) == [1] * 6


# --- batch normalisation


def normalised(flow, x, dy, swap=None):
    """Return output, gradients and kept statistics of a normalisation, as arrays."""
    module = flow.nn.BatchNorm2d(x.shape[1])
    for name, value in (("weight", 0.5), ("bias", -1.0)):
        parameter = getattr(module, name)
        parameter.data = flow.ones(x.shape[1]) * value
    module.to("cpu").train()
    if swap is not None:
        swap(module)
    tensor = flow.tensor(x, requires_grad=True)
    y = module(tensor)
    y.backward(flow.tensor(dy))
    found = {"y": y.detach(), "dx": tensor.grad, "dweight": module.weight.grad}
    found |= {"dbias": module.bias.grad, "mean": module.running_mean}
    found |= {"var": module.running_var, "n": module.num_batches_tracked}
    return {name: np.array(value.numpy()) for name, value in found.items()}


@pytest.mark.torch
@pytest.mark.parametrize(("n", "size"), [(8, 2), (7, 3), (2, 3)])
def test_batch_normalisation_over_ranks_is_that_of_the_whole_batch(n, size):
    """With uneven parts; and, of two images for three ranks, with an idle one."""
    generator = np.random.default_rng(0)
    x = generator.normal(3, 2, (n, 4, 3, 5)).astype(np.float32)  # a mean that is not small
    dy = generator.normal(0, 1, x.shape).astype(np.float32)
    group = Group(size)
    whole = normalised(group.flow, x, dy)

    def work(ranks):
        part = ranks.part(slice(0, n))
        statistics = SharedStatistics(group.flow, ranks)
        statistics.share = float(part.stop > part.start)
        mine = (x[part], dy[part]) if statistics.share else (x[:1] + 9, dy[:1] * 0)
        return normalised(group.flow, *mine, statistics.swap_into)

    parts = group.run(work)
    idle = [part for part in parts if part["dx"].shape[0] and not part["dbias"].any()]
    assert len(idle) == (1 if n < size else 0)
    busy = [part for part in parts if part["dbias"].any()]
    for name in ("y", "dx"):
        joined = np.concatenate([part[name] for part in busy])
        np.testing.assert_allclose(joined, whole[name], rtol=1e-4, atol=1e-5, err_msg=name)
    for name in ("dweight", "dbias"):
        total = sum(part[name] for part in parts)
        np.testing.assert_allclose(total, whole[name], rtol=1e-4, atol=1e-4, err_msg=name)
    for part in parts:
        for name in ("mean", "var", "n"):
            np.testing.assert_allclose(part[name], whole[name], rtol=1e-5, err_msg=name)
    assert all(not part["dx"].any() for part in idle), "an idle rank's image counts for nothing"


def test_its_gradient_is_the_slope_of_what_it_computes(engine):
    flow = get_framework(engine).module
    generator = np.random.default_rng(1)
    x = generator.normal(0, 1, (3, 2, 2, 2)).astype(np.float32)
    dy = generator.normal(0, 1, x.shape).astype(np.float32)
    swap = SharedStatistics(flow, Ranks()).swap_into
    found = normalised(flow, x, dy, swap)
    step = 1e-2
    for place in ((0, 0, 0, 0), (1, 1, 0, 1), (2, 0, 1, 1)):
        values = []
        for sign in (1, -1):
            moved = x.copy()
            moved[place] += sign * step
            values.append(float((normalised(flow, moved, dy, swap)["y"] * dy).sum()))
        slope = (values[0] - values[1]) / (2 * step)
        assert found["dx"][place] == pytest.approx(slope, abs=5e-3)


# --- hearing of a process that ends


@pytest.fixture
def pair():
    """Two ranks that are connected, and the socket of the second."""
    ours, theirs = socket.socketpair()
    first, second = Watch(0, 2, {1: ours}), Watch(1, 2, {0: theirs})
    yield first, second, theirs
    for watch in (first, second):
        watch.close(failed=False)
    for watch in (first, second):
        watch._thread.join(timeout=5)


def wait_for(condition):
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_rank_that_leaves_in_good_order_is_not_missed(pair):
    first, second, _ = pair
    second.close(failed=False)
    time.sleep(0.1)
    first.check()
    assert not first.is_lost


def test_a_rank_that_is_killed_is_told_of_by_the_first(pair):
    first, second, connection = pair
    first.advise(lambda: "step 4 of 8: add --resume x")
    second.part()
    connection.shutdown(socket.SHUT_RDWR)
    wait_for(lambda: first.is_lost)
    with pytest.raises(RankError, match="rank 1 of 2 ended without a word: killed") as told:
        first.check()
    assert str(told.value).endswith("; step 4 of 8: add --resume x") and not told.value.is_told


def test_a_rank_that_fails_speaks_for_itself(pair):
    first, second, _ = pair
    second.close(failed=True)
    wait_for(lambda: first.is_lost)
    assert first.cause(None).is_told


def test_strangers_do_not_join():
    """Whoever connects without the token is sent away, and the rank is still waited for."""
    port = []

    def tell(text):
        port.append(text)
        number = int(text.partition(b" ")[0])
        with socket.create_connection(("127.0.0.1", number)) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n" + bytes(40))
        joining = threading.Thread(target=lambda: port.append(open_second(text)))
        joining.start()
        return text

    def open_second(text):
        return open_watch(1, 2, "127.0.0.1", lambda _: text)

    first = open_watch(0, 2, "127.0.0.1", tell)
    wait_for(lambda: len(port) == 2)
    for watch in (port[1], first):
        watch.close(failed=False)
    for watch in (port[1], first):
        watch._thread.join(timeout=5)


# --- the launchers, by what they set


def set_launch(monkeypatch, **changes):
    values = {"MASTER_ADDR": "h", "MASTER_PORT": "1", "WORLD_SIZE": "2", "RANK": "1"}
    for name in ("TORCHELASTIC_RUN_ID", "GLOG_log_dir"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**values, "LOCAL_RANK": "1", **changes}.items():
        monkeypatch.setenv(name, value)


def test_which_launcher_it_was(monkeypatch):
    set_launch(monkeypatch)
    assert launched() == Launch(1, 2, 1, "h", None) and launched().launcher == "a launcher"
    set_launch(monkeypatch, TORCHELASTIC_RUN_ID="x")
    assert (launched().engine, launched().launcher) == ("torch", "torchrun")
    set_launch(monkeypatch, GLOG_log_dir="/here/log/local_rank_1")
    assert launched().engine == "oneflow"
    for alone in ({"WORLD_SIZE": "1", "RANK": "0"}, {"RANK": "-1"}, {"RANK": "2"}, {"RANK": ""}):
        set_launch(monkeypatch, **alone)
        assert launched() is None and _launch.place() is None
    monkeypatch.delenv("WORLD_SIZE")
    assert _launch.place() is None


def test_a_child_does_not_hear_of_the_launcher(monkeypatch):
    set_launch(monkeypatch)
    code = f"import os; print([os.environ.get(name) for name in {LAUNCH_VARIABLES!r}])"
    child = run_in_child(code, timeout_s=30)
    assert child.stdout.strip() == str([None] * len(LAUNCH_VARIABLES))


@pytest.mark.parametrize(("rank", "told"), [("0", True), ("1", False)])
def test_commands_for_one_process_are_refused_once(monkeypatch, capsys, rank, told):
    from featcache import cli

    set_launch(monkeypatch, TORCHELASTIC_RUN_ID="x", RANK=rank)
    assert cli.main(["probe"]) == 2
    said = capsys.readouterr().err
    assert said == "" or said.startswith(
        "error: featcache probe: expected one process, found 2, started by torchrun; "
    )
    assert bool(said) == told
    assert cli.main(["finetune", "--epoch", "3"]) == 2
    assert bool(capsys.readouterr().err) == told
    assert cli.main(["finetune", "--engine", "oneflow"]) == 1, "before anything is waited for"
    said = capsys.readouterr().err
    assert ("expected torch, whose launcher, torchrun, started this process" in said) == told


def test_a_rank_says_who_it_is(monkeypatch):
    launch = Launch(1, 2, 1, "h", "torch")
    assert _launch.spoken(launch, DatasetError("x")) == "error: rank 1 of 2: x"
    assert _launch.spoken(launch, RankError("rank 0 of 2 ended")) == "error: rank 0 of 2 ended"
    assert _launch.spoken(launch, RankError("x", is_told=True)) is None
    assert _launch.spoken(None, DatasetError("x")) == "error: x"


def test_each_process_needs_a_gpu_of_its_own(monkeypatch):
    set_launch(monkeypatch)
    taken = []
    cuda = SimpleNamespace(device_count=lambda: 2, set_device=taken.append)
    framework = SimpleNamespace(module=SimpleNamespace(cuda=cuda))
    _joining.take_gpu(framework, "cuda")
    assert taken == [1]
    cuda.device_count = lambda: 1
    with pytest.raises(EngineUnavailableError, match="a GPU for each process of a machine, found"):
        _joining.take_gpu(framework, "cuda")
    with pytest.raises(EngineUnavailableError, match="expected cpu or cuda with several"):
        _joining.take_gpu(framework, "mps")
    _joining.take_gpu(framework, "cpu")


def test_the_launchers_echo_of_ctrl_c_counts_once():
    with ctrl_c_noted(launched=True) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop()
    with ctrl_c_noted() as stop, pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


# --- processes of the launchers themselves


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def launcher(engine, size=2):
    """Return the command that starts a script in so many processes."""
    if engine == "torch":
        module, dash = "torch.distributed.run", "-"
    else:
        module, dash = "oneflow.distributed.launch", "_"
    options = {"nproc-per-node": size, "master-port": free_port()}
    named = [f"--{name.replace('-', dash)}={value}" for name, value in options.items()]
    return [sys.executable, "-m", module, *named]


def start(engine, *arguments):
    return subprocess.Popen(
        [*launcher(engine), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a shell does so; OneFlow's launcher counts on it
        env={**os.environ, "PYTHONPATH": str(TESTS)},
    )


def command(data, engine, *more):
    words = ["finetune", data, "--method", "full", "--json"]
    for name, value in {**SMALL, **OPTIONS}.items():
        words += [f"--{name.replace('_', '-')}", value]
    return [*words, *more]


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def json_of(out):
    """Return the one line of JSON; a launcher prints to standard output too."""
    (line,) = [line for line in out.splitlines() if line.startswith("{")]
    return json.loads(line)


def test_two_processes_take_the_steps_of_one(engine, tmp_path):
    from shared_steps import CASES, shared_steps

    process = start(engine, TESTS / "shared_steps.py", tmp_path / "found.json")
    try:
        _, err = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 0, err
    found = json.loads((tmp_path / "found.json").read_text())
    assert found.pop("size") == 2 and list(found) == list(CASES)
    for case, shared in found.items():
        alone = shared_steps(case, Ranks(), engine)
        assert shared["counts"] == alone["counts"] == [[15, 15], [9, 24]]
        np.testing.assert_allclose(shared["losses"], alone["losses"], rtol=1e-4, err_msg=case)
        assert shared["predicted"] == alone["predicted"], case
        for name, norm in alone["norms"].items():
            assert shared["norms"][name] == pytest.approx(norm, rel=1e-3, abs=1e-6), (case, name)
        assert shared["same everywhere"], "ranks drift apart"


def test_a_run_is_gone_on_with_by_two_processes(image_folder, home, engine):
    """Begun by one: the same losses and accuracy, one folder, one JSON, and a note."""
    options = {**SMALL, **OPTIONS, "engine": engine}
    whole = finetune(image_folder, "full", **options, runs=home / "whole")

    def stop_after_four(message):
        heard.extend([1] * (message.stage.startswith("epoch") and message.done > 0))
        if len(heard) == 4:
            raise KeyboardInterrupt

    heard = []
    with pytest.raises(KeyboardInterrupt):
        finetune(image_folder, "full", **options, on_progress=stop_after_four)
    (folder,) = (home / "cache" / "runs").iterdir()
    process = start(engine, "-m", "featcache", *command(image_folder, engine, "--resume", "latest"))
    try:
        out, err = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 0, err
    result = json_of(out)
    assert (result["run"], result["resumed"]) == (str(folder), True)
    assert (result["engine"], result["n_train"]) == (engine, 36)
    assert result["top1"] == whole.top1
    np.testing.assert_allclose(losses(folder), losses(whole.run), rtol=1e-3)
    assert err.count(f"{folder}: going on after step 4 of {N_STEPS}") == 1, "rank 0 alone speaks"
    assert err.count("begun by 1, gone on with by 2 processes: expect rounding") == 1
    assert [path.name for path in (home / "cache" / "runs").iterdir()] == [folder.name]
    assert {path.name for path in folder.iterdir()} == {path.name for path in whole.run.iterdir()}
    assert json.loads((folder / "run.json").read_text())["processes"] == 2


@pytest.mark.slow
def test_an_unreadable_image_ends_all_with_one_line(image_folder, home, engine, tmp_path):
    import shutil

    data = tmp_path / "colours"
    shutil.copytree(image_folder, data)
    (data / "train" / "red" / "03.png").write_bytes(b"no image")
    process = start(engine, "-m", "featcache", *command(data, engine))
    _, err = process.communicate(timeout=240)
    assert process.returncode != 0
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "red/03.png" in lines[0], err
    assert "featcache/cli" not in err, "no traceback of ours"


class Slow:
    """A run of two processes, with steps that take their time, in a session of its own."""

    def __init__(self, engine, *arguments):
        script = [TESTS / "long_finetune.py", 0.5, 0, 0]
        self.process = start(engine, *script, *arguments)
        self.err = []
        self._reader = threading.Thread(target=lambda: self.err.extend(self.process.stderr))
        self._reader.start()

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
        found = {}
        for pid in map(int, children.read_text().split()):
            environment = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
            found.update({int(one[5:]): pid for one in environment if one.startswith("RANK=")})
        return found

    def end(self):
        """Wait for the end of the launcher and of its processes; return the lines of ours."""
        code = self.process.wait(timeout=120)
        self._reader.join(timeout=60)  # ends with the last process that can write
        assert not self._reader.is_alive(), "a process hangs"
        self.process.stdout.close()
        self.process.stderr.close()
        assert "featcache/cli" not in "".join(self.err), "no traceback of ours"
        return code, [line for line in self.err if line.startswith(("error: ", "interrupted: "))]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_costs_what_came_after(image_folder, home, engine, rank):
    options = {**SMALL, **OPTIONS, "engine": engine}
    whole = finetune(image_folder, "full", **options, runs=home / "whole")
    runs = home / "cache" / "runs"
    slow = Slow(engine, *command(image_folder, engine))
    slow.reach(runs, 3)
    os.kill(slow.ranks()[rank], signal.SIGKILL)
    code, lines = slow.end()
    assert code != 0 and len(lines) == 1, slow.err
    (folder,) = runs.iterdir()
    assert lines[0].startswith(f"error: rank {rank} of 2 ended without a word: killed, or out of ")
    assert f"add --resume {folder} to the same command to go on" in lines[0]
    process = start(engine, "-m", "featcache", *command(image_folder, engine, "--resume", folder))
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert "begun by" not in err and json_of(out)["top1"] == whole.top1
    np.testing.assert_allclose(losses(folder), losses(whole.run), rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_stops_all_after_the_same_step(image_folder, home, engine, sent):
    runs = home / "cache" / "runs"
    slow = Slow(engine, *command(image_folder, engine))
    slow.reach(runs, 3)
    os.killpg(slow.process.pid, sent)  # as a terminal does
    _, lines = slow.end()
    (folder,) = runs.iterdir()
    assert len(lines) == 1, slow.err
    said = re.search(r"interrupted: step (\d) of 6: the last good .* is of step (\d);", lines[0])
    assert said and said[1] == said[2] == str(len(losses(folder)))
    assert f"add --resume {folder} to" in lines[0] and "by the same launcher: " in lines[0]
