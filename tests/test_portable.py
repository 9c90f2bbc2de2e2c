"""What other systems lack, taken away here: calls of Linux that have a way around them.

None of this is a run on Windows or macOS. It holds that the code does not fall over the first
function that is not there.
"""

from __future__ import annotations

import os
import signal
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest

from featcache import cores
from featcache.datasets.zip import ZipArchive
from featcache.process import ctrl_c_later
from featcache.store.h5py_view import limit_this_process


@pytest.fixture
def archive(image_folder, tmp_path):
    path = tmp_path / "colours.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(image_folder.rglob("*.png")):
            archive.write(file, file.relative_to(image_folder))
    return path


def test_a_zip_is_read_by_threads_without_pread(archive, monkeypatch):
    zipped = ZipArchive(archive)
    names = [name for name in zipped.names() if name.endswith(".png")]
    expected = [zipped.read(name) for name in names]
    assert len(expected) == 54
    monkeypatch.delattr(os, "pread")
    with ThreadPoolExecutor(8) as threads:
        for _ in range(5):
            assert list(threads.map(zipped.read, names)) == expected


def test_ctrl_c_waits_for_an_import_without_signal_masks(monkeypatch):
    monkeypatch.delattr(signal, "pthread_sigmask")
    reached = False
    with pytest.raises(KeyboardInterrupt), ctrl_c_later():
        signal.raise_signal(signal.SIGINT)
        reached = True
    assert reached and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_child_lives_where_no_limit_can_be_set(monkeypatch):
    resource = pytest.importorskip("resource")

    def refuse(*_):
        raise ValueError("current limit exceeds maximum limit")  # what macOS says

    monkeypatch.setattr(resource, "setrlimit", refuse)
    limit_this_process(60)


def test_cores_are_counted_without_affinity_or_control_groups(monkeypatch, tmp_path):
    monkeypatch.delenv("FEATCACHE_THREADS", raising=False)
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    nothing = tmp_path / "nothing"
    assert cores.quota_cores(nothing, nothing) is None
    monkeypatch.setattr(cores, "quota_cores", lambda: None)
    assert cores.usable_cores() == 3
