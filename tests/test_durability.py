"""Runs that are killed, interrupted or out of space, for real: nothing lost, and nothing half."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from caches import content

from featcache.errors import OutputError
from featcache.files import write_atomically
from featcache.store.shards import discard_unfinished, single_writer

SLOW_EXTRACT = Path(__file__).with_name("slow_extract.py")
N_IMAGES = 54


class Run:
    """``featcache extract`` in a process of its own, at work when the constructor returns."""

    def __init__(
        self, images, output, *, engine_s=0.0, disk_s=0.0, shard_rows=5, limit_bytes=0, options=()
    ):
        arguments = [engine_s, disk_s, shard_rows, limit_bytes, "extract", images, "--json"]
        arguments += ["--weights", "tinyimagenet32", "--batch-size", 4, "--output", output]
        arguments += ["--no-reuse"]  # what is compared is made twice
        self.process = subprocess.Popen(
            [sys.executable, str(SLOW_EXTRACT), *map(str, arguments), *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        # Where nothing but packing is left to do, no engine is built, and the result comes first.
        first = self.process.stdout.readline()
        self.out = "" if first == "ready\n" else first
        assert first == "ready\n" or first.startswith("{") or self.process.wait(60)

    def end(self):
        """Wait for the end; return the exit code, and the last line of standard error."""
        out, err = self.process.communicate(timeout=120)
        self.out += out
        assert "Traceback" not in err
        return self.process.returncode, err.splitlines()[-1]

    def kill(self):
        self.process.kill()
        self.process.communicate(timeout=60)


def visible(folder):
    """Return the caches that one sees in a folder; hidden files are nobody's business."""
    return [folder / name for name in os.listdir(folder) if not name.startswith(".")]


def assert_whole(folder, wanted):
    """Assert that whatever is visible is a complete cache; tell whether there is one."""
    caches = visible(folder)
    for path in caches:
        assert content(path) == wanted, path
    return bool(caches)


@pytest.fixture(scope="module")
def wanted(image_folder, tmp_path_factory):
    """Return what an uninterrupted run makes."""
    output = tmp_path_factory.mktemp("wanted") / "x.h5"
    assert Run(image_folder, output).end()[0] == 0
    return content(output)


@pytest.mark.parametrize("kills", [4, pytest.param(30, marks=pytest.mark.long)])
def test_kills_at_random_moments_change_not_a_byte(image_folder, tmp_path, wanted, kills):
    generator, states, killed = random.Random(kills), set(), 0
    speed = {"engine_s": 0.01, "disk_s": 0.003}
    folder = tmp_path / "caches"
    while killed < kills or not assert_whole(folder, wanted):
        if folder.exists() and visible(folder):
            shutil.rmtree(folder)  # complete; begin anew
        options = ["--shards"] if generator.random() < 0.4 else []
        run = Run(image_folder, folder / "x.h5", options=options, **speed)
        end = time.monotonic() + (generator.uniform(0, 1.5) if killed < kills else 60)
        while time.monotonic() < end and run.process.poll() is None:
            assert_whole(folder, wanted)
            time.sleep(0.005)
        if run.process.poll() is None:
            run.kill()
            killed += 1
            parts = folder / ".x.h5.parts"
            states.add((len(os.listdir(parts)) if parts.exists() else -1, *visible(folder)))
        else:
            assert run.end()[0] == 0
    # The last kill may have come between the final rename and the end; the next call does this.
    discard_unfinished(folder / "x.h5")
    assert len(states) > kills / 3, "the kills fell into many different moments"
    leftovers = {path.name for path in folder.iterdir()} - {path.name for path in visible(folder)}
    assert leftovers <= {".x.h5.lock", ".hashes"}


def test_ctrl_c_says_what_is_kept_and_the_same_command_goes_on(image_folder, tmp_path, wanted):
    output = tmp_path / "x.h5"
    run = Run(image_folder, output, engine_s=0.1)
    first = tmp_path / ".x.h5.parts" / ".commits" / "train-000000000000.json"
    while not first.exists():
        time.sleep(0.01)
    run.process.send_signal(signal.SIGINT)
    code, said = run.end()
    assert code == 130 and visible(tmp_path) == [] and "again: featcache extract" in said
    kept = int(said.partition("interrupted: ")[2].partition(f" of {N_IMAGES} images are kept")[0])
    assert 5 <= kept < 36 and kept % 5 == 0
    again = Run(image_folder, output)
    assert again.end()[0] == 0
    assert json.loads(again.out)["n_resumed"] == kept
    assert content(output) == wanted


def test_the_second_writer_is_told_who_the_first_is(image_folder, tmp_path, wanted):
    output = tmp_path / "x.h5"
    first = Run(image_folder, output, engine_s=1.0)
    second = Run(image_folder, output)
    code, said = second.end()
    holder = f"process {first.process.pid} on {socket.gethostname()}"
    assert code == 1 and f"x.h5: is being written by {holder}; wait for it" in said
    first.kill()  # and a killed one holds nothing
    assert Run(image_folder, output).end()[0] == 0
    assert content(output) == wanted


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EIO])
def test_a_disk_without_locks_says_what_to_do(tmp_path, monkeypatch, number):
    def refused(descriptor, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refused)
    said = rf"\.x\.h5\.lock: cannot be locked: {os.strerror(number)}; .* --output on a local disk"
    with pytest.raises(OutputError, match=said), single_writer(tmp_path / "x.h5"):
        pass


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_cannot_flush_folders_keeps_the_file(tmp_path, monkeypatch, number):
    flush = os.fsync

    def refuse_folders(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    write_atomically(tmp_path / "x.json", b"all of it")
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
    assert (tmp_path / "x.json").read_bytes() == b"all of it"


def test_a_disk_that_fails_to_flush_a_folder_is_an_error(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OutputError, match="Input/output error"):
        write_atomically(tmp_path / "x.json", b"all of it")


def test_an_error_in_the_work_is_not_taken_for_one_of_the_lock(tmp_path):
    with pytest.raises(FileNotFoundError, match="elsewhere"), single_writer(tmp_path / "x.h5"):
        (tmp_path / "elsewhere").read_bytes()
    with single_writer(tmp_path / "x.h5"):
        pass


def finishes(run, folder):
    """Tell whether a run ends well; else it must be for want of space, with nothing to be seen."""
    code, said = run.end()
    if code:
        assert code == 1 and said.startswith("error: ") and "free space" in said, said
        assert visible(folder) == []
    return not code


FORMS = pytest.mark.parametrize(
    "options",
    [
        pytest.param([], id="packed"),
        pytest.param(["--shards"], id="shards", marks=pytest.mark.slow),
    ],
)


@FORMS
def test_a_file_that_may_not_grow_is_a_full_disk(image_folder, tmp_path, wanted, options):
    in_the_way = {"the holder's name": 20, "a shard": 1000, "the manifest": 6000}
    if not options:
        in_the_way["the packed file"] = 16_000
    for limit_bytes in in_the_way.values():
        run = Run(image_folder, tmp_path / "x.h5", limit_bytes=limit_bytes, options=options)
        assert not finishes(run, tmp_path)
    run = Run(image_folder, tmp_path / "x.h5", options=options)
    assert finishes(run, tmp_path) and assert_whole(tmp_path, wanted)
    assert options or json.loads(run.out)["n_resumed"] == N_IMAGES, "packing alone was left to do"


@pytest.fixture
def small_disk(tmp_path):
    """A disk in memory, and a function that gives it another size."""
    folder = tmp_path / "small"
    folder.mkdir()

    def mount(options):
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        return subprocess.run(command, capture_output=True, text=True)

    mounted = mount("size=16k") if shutil.which("mount") else None
    if mounted is None or mounted.returncode:
        pytest.skip(f"no disk can be mounted here: {mounted.stderr if mounted else 'no mount'}")
    yield folder, lambda size: mount(f"remount,size={size}")
    subprocess.run(["umount", str(folder)], check=True)


@FORMS
def test_a_full_disk_is_an_error_and_more_room_is_enough(image_folder, small_disk, wanted, options):
    folder, resize = small_disk
    finished = []
    for size_kib in range(16, 160, 24):
        assert resize(f"{size_kib}k").returncode == 0
        run = Run(image_folder, folder / "x.h5", shard_rows=20, options=options)
        finished.append(finishes(run, folder))
        if finished[-1]:
            break
    assert finished[-1] and len(finished) >= 2
    assert assert_whole(folder, wanted)
