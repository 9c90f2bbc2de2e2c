"""Many jobs make one cache: the same bytes as one machine makes, whatever happens to them."""

from __future__ import annotations

import json
import os
import random
import shlex
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from caches import content, ingredients

from featcache import extract, extract_share, load, load_dataset, pack
from featcache.cli import main
from featcache.datasets.dataset import dataset_digest, split_digest
from featcache.datasets.images import Folder
from featcache.errors import (
    CacheCorruptError,
    CacheError,
    CacheMismatchError,
    CacheMissError,
    DatasetError,
    OutputError,
    RecipeError,
)
from featcache.extraction import extract as extraction
from featcache.store.shards import (
    ShardRange,
    ShardWriter,
    claim,
    complete_meta,
    read_ingredients,
    single_writer,
)

STARTER = {"weights": "tinyimagenet32", "reuse": False}  # what is compared is made twice
TIMES = {"created", "wall_s", "images_per_s", "stages_s", "bottleneck"}
SLOW_EXTRACT = Path(__file__).with_name("slow_extract.py")


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """36 + 18 images make 5 + 3 shards; flushes to the disk change no file and are left out."""
    monkeypatch.setattr(extraction, "SHARD_ROWS", 8)
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


def run_jobs(dataset, n_jobs, order=None, **options):
    return [
        extract_share(dataset, share=(number, n_jobs), **{**STARTER, **options})
        for number in order or range(1, n_jobs + 1)
    ]


def assert_same(one, other):
    """Assert that two caches are the same to the byte, and all they say of themselves but times."""
    one, other = load(one), load(other)
    assert content(one.path) == content(other.path)
    assert list(one.meta) == list(other.meta)
    different = {name for name, value in one.meta.items() if other.meta[name] != value}
    assert different <= TIMES
    assert one.fingerprint == other.fingerprint
    assert list(one.index.arrays) == list(other.index.arrays)
    for name, array in one.index.arrays.items():
        same = other.index.arrays[name]
        assert (same.dtype, same.shape) == (array.dtype, array.shape)
        if one.path.suffix == other.path.suffix:
            assert [block.sha256 for block in same.blocks] == [b.sha256 for b in array.blocks]


@pytest.mark.parametrize("n_jobs", [1, 3, 8, 11])
def test_jobs_make_what_one_machine_makes(image_folder, fake_engine, tmp_path, n_jobs):
    local = extract(image_folder, output=tmp_path / "local/", **STARTER)
    order = random.Random(n_jobs).sample(range(1, n_jobs + 1), n_jobs)
    parts = run_jobs(image_folder, n_jobs, order, output=tmp_path / "jobs/")
    assert sum(part.n_images for part in parts) == 54
    assert parts[-1].n_shards_there == parts[-1].n_shards_wanted == 8
    assert not [path for path in (tmp_path / "jobs").iterdir() if path.name[0] != "."]
    made = pack(tmp_path / "jobs/")
    assert made.cache.name == local.cache.name and not made.reused
    assert_same(local.cache, made.cache)
    others = set(os.listdir(tmp_path / "jobs")) - {made.cache.name, ".hashes"}
    assert len(others) <= 1, "a lock and no more"
    assert extract(image_folder, output=tmp_path / "jobs/", **STARTER).reused


@pytest.mark.parametrize(
    "options",
    [
        {"views": "flips", "cut": "avgpool,layer3", "batch_size": 3},
        {"dtype": "float16", "pack": False},
        {"train_limit": 21, "test_limit": 9},
    ],
)
def test_every_form_of_extraction(image_folder, fake_engine, tmp_path, options):
    local = extract(image_folder, output=tmp_path / "local.h5", **STARTER, **options)
    run_jobs(image_folder, 3, output=tmp_path / "jobs.h5", **options)
    made = pack(tmp_path / "jobs.h5")
    assert made.cache.suffix == local.cache.suffix
    assert_same(local.cache, made.cache)
    assert {path.suffix for path in tmp_path.glob(".*") if path.name != ".hashes"} == {".lock"}


def test_an_option_that_extract_lacks_or_does_not_share_is_named():
    for name in ("wieghts", "force", "executor"):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            extract_share("digits", share=(1, 2), **{name: True})


def test_a_zip_and_images_in_memory(image_folder, fake_engine, tmp_path):
    archive = tmp_path / "colours.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        for path in sorted(image_folder.rglob("*.png")):
            packed.write(path, path.relative_to(image_folder))
    digits = load_dataset("digits").limited(40, 20)
    for name, dataset in (("zip", archive), ("digits", digits)):
        local = extract(dataset, output=tmp_path / f"{name}-local.h5", **STARTER)
        run_jobs(dataset, 2, output=tmp_path / f"{name}.h5")
        assert_same(local.cache, pack(tmp_path / f"{name}.h5").cache)


@pytest.mark.parametrize("n_jobs", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"views": "flips", "cut": "avgpool,layer3", "batch_size": 3},
        {"pack": False},
        {"on_error": "skip"},
    ],
)
def test_an_undivided_data_set(image_folder, fake_engine, tmp_path, options, n_jobs):
    copy = tmp_path / "colours"
    shutil.copytree(image_folder / "train", copy)
    if "on_error" in options:
        (copy / "blue/02.png").write_bytes(b"not an image")
        (copy / "red/11.png").unlink()
        (copy / "red/11.png").symlink_to("nowhere.png")
    local = extract(copy, output=tmp_path / "local.h5", **STARTER, **options)
    parts = run_jobs(copy, n_jobs, output=tmp_path / "jobs.h5", **options)
    assert [part.n_shards_wanted for part in parts] == [5] * n_jobs
    made = pack(tmp_path / "jobs.h5")
    assert_same(local.cache, made.cache)
    assert load(made.cache).meta["split"] == "content"
    dataset = load_dataset(copy)
    assert dataset.digest_with(lambda _: None, "skip") == load(made.cache).meta["dataset_digest"]
    assert extract(copy, output=local.cache, **STARTER, **options).reused


@pytest.fixture
def torn_folder(image_folder, tmp_path):
    """The same images; two hold something else, one cannot be read, and no red one is left."""
    folder = tmp_path / "torn"
    shutil.copytree(image_folder, folder)
    for name in ("train/blue/03.png", "train/blue/09.png"):
        (folder / name).write_bytes(b"not an image")
    (folder / "train/green/00.png").unlink()
    (folder / "train/green/00.png").symlink_to("nowhere.png")
    for path in (folder / "test/red").iterdir():
        path.write_bytes(b"")
    return folder


def test_images_that_do_not_decode(torn_folder, fake_engine, tmp_path):
    heard, told = [], []
    local = extract(
        torn_folder, output=tmp_path / "a.h5", on_error="skip", on_note=heard.append, **STARTER
    )
    run_jobs(torn_folder, 4, output=tmp_path / "b.h5", on_error="skip")
    made = pack(tmp_path / "b.h5", on_note=told.append)
    assert made.n_skipped == local.n_skipped == 9
    assert_same(local.cache, made.cache)
    assert told == ["test: every image of class 'red' was skipped"] == heard[-1:]
    with pytest.raises(DatasetError, match=r"03\.png: expected an image"):
        extract_share(torn_folder, share=(1, 4), output=tmp_path / "c.h5", **STARTER)


def test_a_split_without_one_good_image_is_not_packed(torn_folder, fake_engine, tmp_path):
    for path in (torn_folder / "test").rglob("*.png"):
        path.write_bytes(b"")
    run_jobs(torn_folder, 2, output=tmp_path / "b.h5", on_error="skip")
    with pytest.raises(DatasetError, match=r"test: expected at least one .* remove .*\.b\.h5\.par"):
        pack(tmp_path / "b.h5")


def test_a_job_reads_its_own_images_and_each_once(image_folder, fake_engine, tmp_path, monkeypatch):
    read, honest = [], Folder.read
    monkeypatch.setattr(Folder, "read", lambda self, name: read.append(name) or honest(self, name))
    first, second = run_jobs(image_folder, 2, output=tmp_path / "x.h5")
    assert len(read) == len(set(read)) == 54
    assert sorted(read[: first.n_images]) == sorted(load_dataset(image_folder).train.ids[:32])
    assert second.n_images == 22


def test_what_is_missing_is_named_with_the_command_that_makes_it(
    capsys, image_folder, fake_engine, tmp_path
):
    output = tmp_path / "with space.h5"
    run_jobs(image_folder, 3, order=[2], output=output, on_error="skip")
    with pytest.raises(CacheMissError, match=r"expected 8 shards in .*, found 3; missing") as said:
        pack(output)
    text = str(said.value)
    assert "missing are train images 0 to 7, train images 8 to 15, test images 0 to 7 and 2" in text
    command, _, others = text.partition("; run featcache ")[2].partition(", and shares ")
    assert others == "3/3" and command.endswith("--shard 1/3")
    for option in ("--weights tinyimagenet32", "--output '", "--on-error skip"):
        assert option in command
    assert main(shlex.split(command)) == 0
    assert main([*shlex.split(command)[:-1], "3/3", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["next_step"] == f"featcache pack '{output}'" and result["n_shards_there"] == 8
    assert main(shlex.split(result["next_step"])[1:]) == 0
    assert load(output).train.features.shape == (36, 8)
    assert pack(output).reused, "packing again is no error"


def test_jobs_with_other_ingredients_are_told_which_fields_differ(
    image_folder, fake_engine, tmp_path, monkeypatch
):
    output = tmp_path / "x.h5"
    run_jobs(image_folder, 2, order=[1], output=output)
    for options, said in (
        ({"size": 32}, r"preprocess\.size: found 64, wanted 32; remove .*\.parts to start over"),
        ({"views": "flips"}, r"views: found \['identity'\], wanted \['identity', 'hflip'"),
        ({"train_limit": 21}, r"dataset_digest: found 'names:.*n_train: found 36, wanted 21"),
    ):
        with pytest.raises(CacheMismatchError, match=said):
            run_jobs(image_folder, 2, order=[2], output=output, **options)
    with monkeypatch.context() as patch:
        patch.setattr(extraction, "SHARD_ROWS", 16)
        with pytest.raises(CacheMismatchError, match="shard_rows: found 8, wanted 16"):
            run_jobs(image_folder, 2, order=[2], output=output)
    with pytest.raises(CacheMismatchError, match=r"size: found 64, wanted 32; use --force to"):
        extract(image_folder, output=output, size=32, **STARTER)
    assert extract(image_folder, output=output, **STARTER).n_resumed == 32
    with pytest.raises(OutputError, match=r"x\.h5: .*is there already; remove it"):
        run_jobs(image_folder, 2, output=output)


def test_jobs_and_a_run_on_one_machine_continue_each_other(image_folder, fake_engine, tmp_path):
    def stop(message):
        if message.done == 16:
            raise KeyboardInterrupt

    output = tmp_path / "x.h5"
    with pytest.raises(KeyboardInterrupt):
        extract(image_folder, output=output, on_progress=stop, batch_size=8, **STARTER)
    with pytest.raises(CacheMissError, match=r"expected 8 shards in .*, found 2; missing are"):
        pack(output)
    first, second = run_jobs(image_folder, 2, output=output, batch_size=8)
    assert (first.n_resumed, second.n_resumed) == (16, 0)
    local = extract(image_folder, output=tmp_path / "a.h5", batch_size=8, **STARTER)
    assert_same(local.cache, pack(output).cache)
    run_jobs(image_folder, 2, order=[1], output=tmp_path / "b.h5", batch_size=8)
    made = extract(image_folder, output=tmp_path / "b.h5", batch_size=8, **STARTER)
    assert made.n_resumed == 32
    assert_same(local.cache, made.cache)


def test_the_number_of_jobs_may_change_on_the_way(image_folder, fake_engine, tmp_path):
    local = extract(image_folder, output=tmp_path / "a.h5", **STARTER)
    run_jobs(image_folder, 2, order=[1], output=tmp_path / "b.h5")
    rest = run_jobs(image_folder, 4, order=[2, 3, 4], output=tmp_path / "b.h5")
    assert [part.n_resumed for part in rest] == [16, 0, 0]
    assert_same(local.cache, pack(tmp_path / "b.h5").cache)


def test_an_interrupted_job_goes_on(image_folder, fake_engine, tmp_path):
    def stop(message):
        if message.done == 20:
            raise KeyboardInterrupt

    arguments = {"share": (1, 2), "output": tmp_path / "x.h5", "batch_size": 4, **STARTER}
    with pytest.raises(KeyboardInterrupt, match="16 of 32 images are kept, and the same command"):
        extract_share(image_folder, on_progress=stop, **arguments)
    notes = []
    again = extract_share(image_folder, on_note=notes.append, **arguments)
    assert again.n_resumed == 16 and "resuming after 16 of 32 images of this share" in notes[-1]
    fake_engine.clear()
    assert extract_share(image_folder, **arguments).n_resumed == 32
    assert not fake_engine, "a share that is done loads no engine"


@pytest.mark.parametrize(
    "file", ["train-000000000008-features.npy", ".commits/train-000000000008-hashes.npy"]
)
def test_a_damaged_shard_alone_is_made_again(image_folder, fake_engine, tmp_path, file):
    local = extract(image_folder, output=tmp_path / "a.h5", **STARTER)
    parts = run_jobs(image_folder, 2, output=tmp_path / "b.h5")
    damaged = parts[0].folder / file
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    notes = []
    with pytest.raises(
        CacheMissError, match=r"found 7; missing are train images 8 to 15; run .*1/2$"
    ):
        pack(tmp_path / "b.h5", on_note=notes.append)
    assert f"{Path(file).name} was damaged" in notes[-1]
    assert run_jobs(image_folder, 2, order=[1], output=tmp_path / "b.h5")[0].n_resumed == 24
    assert_same(local.cache, pack(tmp_path / "b.h5").cache)


def test_a_commit_of_other_ingredients_does_not_count(image_folder, fake_engine, tmp_path):
    """As it may lie there on a file system without links, where two jobs came first at once."""
    run_jobs(image_folder, 1, output=tmp_path / "b.h5")
    other = run_jobs(image_folder, 1, output=tmp_path / "c.h5", size=32)[0].folder
    shutil.copy(other / ".commits/train-000000000008.json", tmp_path / ".b.h5.parts/.commits/")
    with pytest.raises(CacheMissError, match="missing are train images 8 to 15; run"):
        pack(tmp_path / "b.h5")


def test_a_sweep_leaves_the_files_of_others_alone(image_folder, fake_engine, tmp_path):
    folder = run_jobs(image_folder, 2, order=[1], output=tmp_path / "b.h5")[0].folder
    mine = ["train-000000000032-features.npy", ".test-000000000000-ids.npy.0a0b0c0d.part"]
    others = ["train-000000000016-views-hflip.npy", ".train-000000000024-ids.npy.0a0b0c0d.part"]
    for name in mine + others:
        (folder / name).write_bytes(b"half")
    share = [ShardRange("train", 32, 36), ShardRange("test", 0, 8)]
    content = read_ingredients(folder)
    ShardWriter(tmp_path / "b.h5", content["meta"], jobs=content["jobs"], share=share)
    assert not any((folder / name).exists() for name in mine)
    assert all((folder / name).exists() for name in others)


def test_of_many_that_come_first_at_once_one_decides(tmp_path):
    found, gate = [], threading.Barrier(16)

    def first(number):
        gate.wait()
        meta = complete_meta(ingredients(engine_version=str(number)))
        found.append(claim(tmp_path, {"meta": meta})["meta"]["fingerprint"])

    threads = [threading.Thread(target=first, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 16 and len(set(found)) == 1
    assert os.listdir(tmp_path / ".commits") == ["ingredients.json"]


@pytest.mark.parametrize("links", [True, False])
def test_the_same_job_twice_and_file_systems_that_lack_something(
    image_folder, fake_engine, tmp_path, monkeypatch, links
):
    output = tmp_path / "x.h5"
    if not links:
        monkeypatch.setattr("os.link", lambda *_: (_ for _ in ()).throw(OSError(95, "no links")))
    (tmp_path / ".x.h5.parts/.commits").mkdir(parents=True)
    with (
        single_writer(tmp_path / ".x.h5.parts/.commits/share-1-of-2"),
        pytest.raises(CacheError, match=rf"share 1/2: .*being written by process {os.getpid()}"),
    ):
        run_jobs(image_folder, 2, order=[1], output=output)
    notes = []
    with monkeypatch.context() as patch:
        patch.setattr(
            "fcntl.flock", lambda *_: (_ for _ in ()).throw(OSError(37, "No locks available"))
        )
        run_jobs(image_folder, 2, output=output, on_note=notes.append)
    assert "No locks available" in notes[1] and "continuing without a lock" in notes[1]
    assert pack(output).n_rows == 54


def test_packing_finds_the_one_there_is_and_leaves_other_caches_alone(
    image_folder, fake_engine, tmp_path
):
    with pytest.raises(CacheMissError, match=r"cache: expected the shards of jobs, found none"):
        pack()
    run_jobs(image_folder, 2)
    run_jobs(image_folder, 2, size=32)
    with pytest.raises(CacheMissError, match=r"found those of 2; run featcache pack .*\.h5, or fe"):
        pack()
    parts = sorted((tmp_path / "cache").glob(".*.parts"))
    assert pack(parts[0]).n_rows == 54 and pack().n_rows == 54
    local = extract(image_folder, output=tmp_path / "b.h5", **STARTER)
    stamp = local.cache.stat().st_mtime_ns
    local.cache.rename(tmp_path / "kept.h5")
    run_jobs(image_folder, 2, output=tmp_path / "b.h5")
    shutil.copy2(tmp_path / "kept.h5", local.cache)
    assert pack(local.cache).reused and local.cache.stat().st_mtime_ns == stamp
    local.cache.unlink()
    run_jobs(image_folder, 2, output=local.cache, size=32)
    shutil.copy2(tmp_path / "kept.h5", local.cache)
    with pytest.raises(CacheMismatchError, match=r"preprocess\.size: found 64, wanted 32; use --f"):
        pack(local.cache)
    assert load(pack(local.cache, force=True).cache).meta["preprocess"]["size"] == 32
    assert pack(local.cache).reused


def test_shards_of_other_images_are_found_out(image_folder, fake_engine, tmp_path):
    """A commit that fits in every number but is of other images: labels that were changed."""
    folder = run_jobs(image_folder, 1, output=tmp_path / "b.h5")[0].folder
    content = read_ingredients(folder)
    writer = ShardWriter(tmp_path / "b.h5", content["meta"], jobs=content["jobs"])
    commit = writer.commits[0]
    arrays = {name.removeprefix("train/"): writer.read(commit, name) for name in commit["arrays"]}
    arrays["labels"] = arrays["labels"] + 1
    writer.commit("train", 0, 8, arrays, {}, hashes=writer.read(commit, "hashes"))
    with pytest.raises(CacheCorruptError, match="shards of the images that were listed, found oth"):
        pack(tmp_path / "b.h5")


def test_the_digest_of_parts_is_that_of_the_whole(image_folder):
    dataset = load_dataset(image_folder)
    whole, names = dataset.digest, ("ä\udcff", 'quo"te')

    def parts(split):
        hashes = np.frombuffer(bytes(split.images.hashes), np.uint8).reshape(-1, 32)
        labels = split.labels
        return split_digest(
            split.class_names, iter(split.ids), [labels[:5], labels[5:]], [hashes[:7], hashes[7:]]
        )

    assert dataset_digest(parts(dataset.train), parts(dataset.test)) == whole
    assert split_digest(names, (), (), ()) != split_digest(names[:1], (), (), ())


def test_shards_grow_so_that_there_are_never_too_many(monkeypatch):
    monkeypatch.setattr(extraction, "SHARD_ROWS", 1024)
    sizes = {10**6: 4096, 10**8: 4096, 10**9: 16_384, 10**10: 262_144}
    assert extraction._shard_rows(1 << 18) == 1024
    for n_images, rows in sizes.items():
        assert extraction._shard_rows(n_images) == rows and n_images / rows <= 1 << 16


@pytest.mark.parametrize("share", [(0, 3), (4, 3), (1, 0), (-1, 3)])
def test_shares_that_cannot_be(image_folder, fake_engine, share):
    with pytest.raises(RecipeError, match=f"expected I/N .*found {share[0]}/{share[1]}"):
        extract_share(image_folder, share=share, **STARTER)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--shard", "0/3"], "expected I/N with I from 1 to N, such as 3/8, found '0/3'"),
        (["--shard", "4/3"], "expected I/N with I from 1 to N, such as 3/8, found '4/3'"),
        (["--shard", "3"], "such as 3/8, found '3'"),
        (["--shard", "1/²"], "such as 3/8"),
        (["--shard", "1/3", "--force"], "--force: not with --shard"),
        (["--shard", "1/3", "--executor", "ray"], "--executor: not with --shard"),
    ],
)
def test_wrong_usage_is_one_line(capsys, image_folder, fake_engine, words, said):
    assert main(["extract", str(image_folder), *words]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and said in err


@pytest.mark.parametrize("divided", [True, False])
def test_killed_jobs_that_run_at_once_change_not_a_byte(
    image_folder, fake_engine, tmp_path, divided
):
    if not divided:
        image_folder = image_folder / "train"
    local = extract(image_folder, output=tmp_path / "local.h5", batch_size=4, **STARTER)
    output, n_jobs = tmp_path / "jobs" / "x.h5", 3

    def start(number):
        arguments = ["0.03", "0.002", "8", "0", "extract", image_folder, "--batch-size", "4"]
        arguments += ["--weights", "tinyimagenet32", "--output", output]
        return subprocess.Popen(
            [sys.executable, SLOW_EXTRACT, *arguments, "--shard", f"{number}/{n_jobs}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    jobs = {number: start(number) for number in range(1, n_jobs + 1)}
    for process in jobs.values():
        assert process.stdout.readline() == "ready\n"
    time.sleep(0.15)
    for process in jobs.values():
        process.kill()
        process.communicate(timeout=60)
    for number in jobs:
        jobs[number] = start(number)
    for process in jobs.values():
        assert process.communicate(timeout=120)[0] and process.returncode == 0
    made = pack(output)
    # The engine of the processes has 64 numbers per feature, that of this one 8.
    assert load(made.cache).train.ids == load(local.cache).train.ids
    whole = tmp_path / "whole.h5"
    arguments = [
        "0",
        "0",
        "8",
        "0",
        "extract",
        image_folder,
        "--batch-size",
        "4",
        "--output",
        whole,
    ]
    subprocess.run(
        [sys.executable, SLOW_EXTRACT, *arguments, "--weights", "tinyimagenet32"],
        check=True,
        capture_output=True,
    )
    assert_same(whole, made.cache)
