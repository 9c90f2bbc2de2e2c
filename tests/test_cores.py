"""How many threads: affinity, control groups, and the override."""

from __future__ import annotations

import os

import pytest

from featcache import cores
from featcache.cores import quota_cores, usable_cores
from featcache.errors import RecipeError

pytestmark = pytest.mark.numpy1  # its bytes or draws may depend on NumPy


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.fixture(autouse=True)
def no_override(monkeypatch):
    monkeypatch.delenv(cores.THREADS_VARIABLE, raising=False)


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/app\n", {"app/cpu.max": "150000 100000\n"}, 1.5),
        ("0::/app\n", {"app/cpu.max": "max 100000\n"}, None),
        ("0::/a/b\n", {"a/cpu.max": "200000 100000", "a/b/cpu.max": "max 100000"}, 2),
        ("0::/a/b\n", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "50000 100000"}, 0.5),
        # In a container the kernel may name the group by the host's path.
        ("0::/docker/1f2e\n", {"cpu.max": "400000 100000"}, 4),
        ("0::/../app\n", {"app/cpu.max": "100000 100000"}, 1),
        (
            "4:memory:/m\n3:cpu,cpuacct:/app\n",
            {
                "cpu,cpuacct/app/cpu.cfs_quota_us": "250000",
                "cpu,cpuacct/app/cpu.cfs_period_us": "100000",
            },
            2.5,
        ),
        (
            "1:cpu:/\n0::/\n",
            {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"},
            None,
        ),
        ("4:memory:/m\n", {"memory/m/cpu.max": "100000 100000"}, None),
        ("0::/app\n", {"app/cpu.max": "0 0"}, None),
        ("0::/app\n", {"app/cpu.max": "rubbish"}, None),
        ("rubbish\n", {}, None),
    ],
)
def test_quotas(tmp_path, membership, files, expected):
    mount = write(tmp_path / "cgroup", files)
    mount.mkdir(exist_ok=True)
    write(tmp_path, {"membership": membership})
    assert quota_cores(tmp_path / "membership", mount) == expected


def test_without_control_groups(tmp_path):
    assert quota_cores(tmp_path / "none", tmp_path / "neither") is None


@pytest.mark.parametrize(
    ("machine", "affinity", "quota", "expected"),
    [(8, 8, None, 8), (8, 3, None, 3), (8, 8, 1.5, 2), (8, 8, 0.2, 1), (4, 4, 16, 4)],
)
def test_the_least_of_all_limits(monkeypatch, machine, affinity, quota, expected):
    monkeypatch.setattr(os, "cpu_count", lambda: machine)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(affinity), raising=False)
    monkeypatch.setattr(cores, "quota_cores", lambda: quota)
    assert usable_cores() == expected


def test_a_machine_that_does_not_say(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(cores, "quota_cores", lambda: None)
    assert usable_cores() == 1


def test_the_override(monkeypatch):
    monkeypatch.setenv("FEATCACHE_THREADS", " 7 ")
    assert usable_cores() == 7
    monkeypatch.setenv("FEATCACHE_THREADS", "")
    assert usable_cores() >= 1


@pytest.mark.parametrize("wrong", ["0", "-1", "two", "1.5", "²"])
def test_an_override_that_is_no_number_is_refused(monkeypatch, wrong):
    monkeypatch.setenv("FEATCACHE_THREADS", wrong)
    with pytest.raises(RecipeError, match=f"FEATCACHE_THREADS: expected .*found '{wrong}'"):
        usable_cores()
