"""Extraction on a Ray cluster of several nodes: the same bytes, whatever is lost on the way."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_shard_jobs import assert_same

from featcache import extract, extract_share, load, pack
from featcache.cli import main
from featcache.errors import DatasetError, EngineUnavailableError, FeatcacheError, RecipeError
from featcache.extraction import extract as extraction
from featcache.extraction import ray as on_ray
from featcache.extraction.ray import make_shard, makers, shape_of_workers

OPTIONS = {"weights": "tinyimagenet32", "engine": "openvino"}
ON_RAY = {**OPTIONS, "executor": "ray"}


def test_without_ray_the_error_names_the_extra(capsys, monkeypatch, image_folder, home):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["extract", str(image_folder), "--executor", "ray"]) == 1
    assert "executor ray: not available: " in (said := capsys.readouterr().err)
    assert "pip install 'featcache[ray]'" in said and not (home / "cache").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"executor": "dask"}, "executor: expected local or ray, found 'dask'"),
        ({"workers": 2}, "workers: belongs to --executor ray"),
        ({"address": "auto"}, "address: belongs to --executor ray"),
        ({"executor": "ray", "workers": 0}, "workers: expected at least 1, found 0"),
    ],
)
def test_wrong_arguments(image_folder, options, said):
    with pytest.raises(RecipeError, match=said):
        extract(image_folder, **OPTIONS, **options)


@pytest.mark.parametrize(
    ("machines", "wanted", "on_gpu", "found"),
    [
        ([(2, 0)], None, False, (1, 2)),
        ([(4, 0), (64, 0)], None, False, (2, 32)),
        ([(4, 0), (4, 0), (0, 0)], None, False, (2, 4)),
        ([(8, 0), (8, 0)], 5, False, (5, 2)),
        ([(2, 0)], 9, False, (2, 1)),
        ([(16, 4), (16, 4), (8, 0)], None, True, (8, 4)),
        ([(2, 8)], None, True, (2, 1)),
        ([(16, 4)], 2, True, (2, 8)),
        ([], None, False, (1, 1)),
        ([], 3, True, (1, 1)),
    ],
)
def test_how_many_workers_fit(machines, wanted, on_gpu, found):
    nodes = [
        {"Alive": True, "Resources": {"CPU": float(cores), "GPU": float(gpus)}}
        for cores, gpus in machines
    ]
    nodes.append({"Alive": False, "Resources": {"CPU": 99.0}})
    assert shape_of_workers(nodes, wanted, on_gpu) == found


def workers():
    """Return this one's processes that make a shard: Ray names them after the function."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            name = (folder / "cmdline").read_bytes()
            if name.startswith((b"ray::make_shard", b"ray::fragile")) and is_ours(int(folder.name)):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def is_ours(process):
    """Tell whether a process descends from this one: other tests may have clusters of their own."""
    while process > 1:
        if process == os.getpid():
            return True
        stat = Path("/proc", str(process), "stat").read_text()
        process = int(stat.rpartition(")")[2].split()[1])
    return False


@pytest.fixture(scope="module")
def cluster():
    """A head without cores, and two nodes with one each."""
    pytest.importorskip("openvino")
    pytest.importorskip("ray", reason="needs Ray: pip install 'featcache[ray]'")
    from featcache.extraction.ray import import_ray

    import_ray()
    from ray.cluster_utils import Cluster

    made = Cluster(True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    made.nodes = [made.add_node(num_cpus=1) for _ in range(2)]
    yield made
    made.shutdown()


@pytest.fixture
def small_shards(monkeypatch):
    """36 + 18 images make 5 + 3 shards."""
    monkeypatch.setattr(extraction, "SHARD_ROWS", 8)


@pytest.fixture
def local(image_folder, small_shards, tmp_path):
    """What one machine makes."""
    pytest.importorskip("openvino")
    return extract(image_folder, output=tmp_path / "local/", **OPTIONS).cache


class Once:
    """Does something when the first shard is there."""

    def __init__(self, action):
        self.action = action
        self.done = False
        self.messages = []

    def __call__(self, message):
        self.messages.append(message)
        if message.stage == "images" and message.done and not self.done:
            self.done = True
            self.action()


@pytest.mark.ray
@pytest.mark.slow
class TestOnACluster:
    def extract(self, cluster, images, output, **options):
        return extract(images, output=output, address=cluster.address, **{**ON_RAY, **options})

    def test_the_bytes_are_those_of_one_machine(self, cluster, image_folder, local, tmp_path):
        heard = Once(lambda: None)
        made = self.extract(cluster, image_folder, tmp_path / "ray/", on_progress=heard)
        assert made.cache.name == local.name and not made.reused
        assert_same(local, made.cache)
        done = [message.done for message in heard.messages if message.stage == "images"]
        assert done == sorted(done) and (done[0], done[-1], len(done)) == (0, 54, 9)
        assert not [path for path in (tmp_path / "ray").iterdir() if path.suffix == ".parts"]
        assert self.extract(cluster, image_folder, tmp_path / "ray/").reused
        again = self.extract(cluster, image_folder, tmp_path / "ray/", force=True, pack=False)
        assert again.cache.suffix == ".shards" and not again.reused
        assert_same(local, again.cache)
        assert not workers()

    def test_views_and_images_that_do_not_decode(self, cluster, image_folder, tmp_path):
        torn = tmp_path / "torn"
        shutil.copytree(image_folder, torn)
        (torn / "train/blue/03.png").write_bytes(b"no image")
        notes = []
        options = {"views": "flips", "on_error": "skip", "batch_size": 3}
        one = extract(torn, output=tmp_path / "a.h5", **OPTIONS, **options)
        other = self.extract(cluster, torn, tmp_path / "b.h5", on_note=notes.append, **options)
        assert other.n_skipped == 1 and any("03.png: expected an image" in note for note in notes)
        assert_same(one.cache, other.cache)
        undivided = torn / "train"
        # Ray computes every row; here the rows of a.h5 would serve.
        one = extract(undivided, output=tmp_path / "d.h5", reuse=False, **OPTIONS, **options)
        other = self.extract(cluster, undivided, tmp_path / "e.h5", **options)
        assert other.load().meta["split"] == "content"
        assert_same(one.cache, other.cache)
        with pytest.raises(DatasetError, match=r"03\.png: expected an image"):
            self.extract(cluster, torn, tmp_path / "c.h5")

    def test_a_killed_worker_is_replaced(self, cluster, image_folder, local, tmp_path):
        killed = []

        def kill_one(message):
            if message.stage == "images" and message.done and not killed and workers():
                killed.append(workers()[0])
                os.kill(killed[0], signal.SIGKILL)

        made = self.extract(
            cluster, image_folder, tmp_path / "b.h5", workers=1, on_progress=kill_one
        )
        assert killed
        assert_same(local, made.cache)

    def test_a_removed_node_is_done_without(self, cluster, image_folder, tmp_path, monkeypatch):
        monkeypatch.setattr(extraction, "SHARD_ROWS", 2)
        local = extract(image_folder, output=tmp_path / "local.h5", **OPTIONS).cache
        lost = cluster.add_node(num_cpus=2)
        cluster.wait_for_nodes()
        removed = []

        def remove_once_all_are_at_work(message):
            if message.stage != "images" or not message.done or removed:
                return
            if len(workers()) >= 4 or message.done > 20:
                cluster.remove_node(lost, allow_graceful=False)
                removed.append(message.done)

        made = self.extract(
            cluster,
            image_folder,
            tmp_path / "b.h5",
            workers=4,
            on_progress=remove_once_all_are_at_work,
        )
        assert removed and removed[0] < 54
        assert_same(local, made.cache)

    def test_ctrl_c_leaves_what_is_done_to_whoever_goes_on(
        self, cluster, image_folder, local, tmp_path
    ):
        def interrupt():
            raise KeyboardInterrupt

        output = tmp_path / "b.h5"
        with pytest.raises(KeyboardInterrupt, match="of 54 images are kept, and the same command"):
            self.extract(cluster, image_folder, output, on_progress=Once(interrupt))
        assert not workers(), "none is left running"
        rest = extract_share(image_folder, share=(1, 1), output=output, **OPTIONS)
        assert 8 <= rest.n_resumed < 54
        assert_same(local, pack(output).cache)

    def test_workers_with_other_versions_are_refused(
        self, cluster, image_folder, small_shards, tmp_path, monkeypatch
    ):
        monkeypatch.setattr(
            on_ray, "makers", lambda *of: {**makers(*of), "engine_version": "1", "numpy": "0"}
        )
        said = r"worker on .*engine_version: expected '1', found '20.*; numpy: expected '0', found "
        with pytest.raises(EngineUnavailableError, match=said):
            self.extract(cluster, image_folder, tmp_path / "b.h5")
        assert not list(tmp_path.glob(".b.h5.parts")), "nothing was done, nothing is left"

    def test_a_shard_that_ends_three_workers_is_named(
        self, cluster, image_folder, small_shards, tmp_path, monkeypatch
    ):
        import ray

        def fragile(order, part, place):
            if (place.role, place.start) == ("test", 8):
                os._exit(1)
            return make_shard(order, part, place)

        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
        monkeypatch.setattr(on_ray, "make_shard", fragile)
        said = r"test images 8 to 15: expected a worker that makes this shard, lost 3 that tried: "
        try:
            with pytest.raises(FeatcacheError, match=said):
                self.extract(cluster, image_folder, tmp_path / "b.h5")
        finally:
            ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
        monkeypatch.undo()
        monkeypatch.setattr(extraction, "SHARD_ROWS", 8)
        made = self.extract(cluster, image_folder, tmp_path / "b.h5")
        assert made.n_resumed >= 36 and made.n_rows == 54

    def test_a_worker_that_cannot_start_is_told_of(
        self, cluster, image_folder, tmp_path, monkeypatch
    ):
        import ray

        def broken(order, part, place):
            raise ModuleNotFoundError("No module named 'featcache'")

        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
        monkeypatch.setattr(on_ray, "make_shard", broken)
        try:
            with pytest.raises(EngineUnavailableError, match=r"No module named 'featcache'.*every"):
                self.extract(cluster, image_folder, tmp_path / "b.h5")
        finally:
            ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])

    @pytest.mark.parametrize(
        ("address", "said"),
        [
            ("127.0.0.1:1", "expected a cluster at '127.0.0.1:1', found: .*refused"),
            ("nonsense", "no address of the form host:port"),
            ("ray://127.0.0.1:1", "an address of Ray Client"),
        ],
    )
    def test_no_cluster_at_the_address(self, cluster, image_folder, tmp_path, address, said):
        began = time.monotonic()
        with pytest.raises(EngineUnavailableError, match=said):
            extract(image_folder, output=tmp_path / "b.h5", address=address, **ON_RAY)
        assert time.monotonic() - began < 10 and not list(tmp_path.glob(".b.h5.parts"))

    def test_the_command_is_quiet_and_one_bar(self, cluster, image_folder, tmp_path):
        words = ["extract", image_folder, "--weights", "tinyimagenet32", "--engine", "openvino"]
        words += ["--executor", "ray", "--workers", "1", "--output", tmp_path / "b.h5", "--json"]
        run = subprocess.run(
            [sys.executable, "-m", "featcache", *map(str, words), "--address", cluster.address],
            capture_output=True,
            text=True,
            check=True,
        )
        result = json.loads(run.stdout)
        assert result["n_rows"] == 54 and load(result["cache"]).meta["engine"] == "openvino"
        lines = run.stderr.splitlines()
        assert lines[0] == "OpenVINO on the CPU in f32, as asked for"
        assert lines[1:] and all(line.startswith("images: ") for line in lines[1:]), run.stderr
