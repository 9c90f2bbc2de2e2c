"""Shards: committed one by one, resumed where they are sound, indexed as one array."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest
from caches import (
    RICH,
    SplitArrays,
    commit_rows,
    content,
    ingredients,
    rows_of,
    write_cache,
    write_shards,
)

from featcache import label, load
from featcache.errors import (
    CacheCorruptError,
    CacheMismatchError,
    CacheMissError,
    FeatcacheError,
)
from featcache.store.index import COMMITS
from featcache.store.shards import (
    INGREDIENTS,
    ShardRange,
    ShardWriter,
    discard_unfinished,
    remove_unfinished,
    shards_path,
    single_writer,
    unfinished_folder,
)

N_TRAIN, N_TEST, SHARD_ROWS = 10, 4, 4  # shards of 4, 4, 2 and of 4 rows
FINISHED = {"packed": 1 << 40, "shards": -1}


@pytest.fixture(autouse=True)
def no_power_is_cut(monkeypatch):
    """Leave out the flushes to the disk, which take most of the time here and change no file."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


@pytest.fixture
def sharded(tmp_path):
    """Features in shards of uneven lengths, one of them empty, beside the same as an array."""
    skip = (8, 9, 10, 11, 17, 26)
    options = {"n_train": 27, "skip": skip, "shard_rows": 4}
    meta = ingredients(cuts=["avgpool", "layer4"])
    train = load(write_shards(tmp_path / "x.h5", meta, **options), mmap=True).train
    kept = rows_of("train", 27, meta=meta, skip=skip)
    return {
        "avgpool": (train.features, kept["features"]),
        "layer4": (train.cut("layer4"), kept["cuts/layer4/identity"]),
    }


def some_rows(generator, n):
    """Draw an index of rows of every kind that NumPy knows."""
    start, stop = generator.integers(-n - 3, n + 3, 2).tolist()
    step = int(generator.choice([-3, -2, -1, 1, 2, 5]))
    return [
        int(generator.integers(-n, n)),
        np.int32(generator.integers(-n, n)),
        slice(start, stop),
        slice(start, stop, step),
        slice(None, None, step),
        generator.integers(-n, n, generator.integers(0, 9)),
        generator.integers(-n, n, generator.integers(0, 9)).tolist(),
        generator.integers(-n, n, (2, 3)),
        generator.integers(0, n, 3).astype(np.uint8),
        generator.random(n) < 0.3,
        (generator.random(n) < 0.3).tolist(),
        Ellipsis,
        (),
        (Ellipsis,),
    ]


def further(generator, shape):
    """Draw indices of what is in a row."""
    return [
        (),
        (Ellipsis,),
        *((int(generator.integers(-length, length)),) for length in shape[:1]),
        (slice(None, None, -1),),
        (generator.random(shape[0]) < 0.5, *(slice(None) for _ in shape[1:])),
        (Ellipsis, slice(0, 2)),
        (Ellipsis, 0),
        (*(slice(None) for _ in shape[1:]), [1, 0]),
    ]


@pytest.mark.parametrize("cut", ["avgpool", "layer4"])
def test_shards_are_indexed_as_one_array_is(sharded, cut):
    mapped, whole = sharded[cut]
    generator, compared = np.random.default_rng(7), 0
    assert (mapped.shape, mapped.ndim, mapped.nbytes) == (whole.shape, whole.ndim, whole.nbytes)
    for _ in range(60):
        for rows in some_rows(generator, len(whole)):
            for rest in further(generator, whole.shape[1:]):
                if rest and isinstance(rows, tuple):
                    continue
                if rows is Ellipsis and Ellipsis in [part for part in rest if part is Ellipsis]:
                    continue
                index = (rows, *rest) if rest else rows
                try:
                    wanted = whole[index]
                except IndexError:  # lists of two lengths
                    with pytest.raises(IndexError):
                        mapped[index]
                    continue
                found = mapped[index]
                assert np.array_equal(found, wanted) and found.shape == wanted.shape, index
                compared += 1
    assert compared > 3000


def test_pairs_of_lists_choose_pairs(sharded):
    mapped, whole = sharded["layer4"]
    for index in (
        ([0, 5, -1], [2, 1, 0]),
        ([[0], [5]], [2, 1, 0], 1),
        (np.arange(3), slice(None), [0, 1, 0]),
        (3, slice(None), [0, 1]),
        (np.arange(len(whole)) % 2 == 0, 1, 0),
    ):
        assert np.array_equal(mapped[index], whole[index]), index


def test_shards_turn_into_an_array(sharded):
    mapped, whole = sharded["avgpool"]
    assert type(np.asarray(mapped)) is np.ndarray and np.array_equal(np.asarray(mapped), whole)
    assert np.asarray(mapped, np.float64).dtype == np.float64
    assert np.array_equal(np.stack(list(mapped)), whole)
    assert np.array_equal(mapped @ np.ones(5, np.float32), whole @ np.ones(5, np.float32))


def test_rows_of_one_shard_are_not_copied(sharded):
    mapped, _ = sharded["avgpool"]
    assert isinstance(mapped[4:8], np.memmap) and isinstance(mapped[5:7], np.memmap)
    assert not isinstance(mapped[3:5], np.memmap)


def test_few_shards_are_mapped_at_a_time(sharded, tmp_path, monkeypatch):
    """Linux allows a process 65,530 maps, and a cache may have more shards."""
    monkeypatch.setattr("featcache.store.reader._MAX_MAPS", 1)
    _, whole = sharded["avgpool"]
    one = load(tmp_path / "x.shards", mmap=True).train.features
    kept = one[:3]
    for start in range(0, len(whole), 3):
        assert np.array_equal(one[start : start + 5], whole[start : start + 5])
    assert np.array_equal(one[::-2], whole[::-2]) and one._part.cache_info().currsize == 1
    assert np.array_equal(kept, whole[:3]), "what was handed out stays mapped"


@pytest.mark.parametrize("index", [99, -99, [0, 99], 1.5, "x", None, [True, False], (0, 0, 0)])
def test_indices_that_mean_nothing_are_refused(sharded, index):
    with pytest.raises(IndexError):
        sharded["avgpool"][0][index]


def begun(path, n_train=8, **changes):
    """Commit the first rows of a run, as if it had been killed then."""
    writer = ShardWriter(path, ingredients(**changes))
    commit_rows(writer, "train", N_TRAIN, SHARD_ROWS, meta=ingredients(), upto=n_train)
    return writer.folder


def finished(path, form="packed", *, force=False):
    """Do what is left of the run, and finish it; return the cache and the resumed rows."""
    writer = ShardWriter(path, ingredients(), force=force)
    resumed = writer.done("train"), writer.done("test")
    commit_rows(writer, "train", N_TRAIN, SHARD_ROWS, meta=ingredients())
    commit_rows(writer, "test", N_TEST, SHARD_ROWS, meta=ingredients())
    return writer.finish({"wall_s": writer.total("wall_s")}, pack_limit=FINISHED[form]), resumed


@pytest.fixture
def wanted(tmp_path):
    """Return what an uninterrupted run makes."""
    return content(write_shards(tmp_path / "wanted" / "x.h5", ingredients()))


@pytest.mark.parametrize("form", FINISHED)
def test_a_run_goes_on_after_what_is_done(tmp_path, wanted, form):
    begun(tmp_path / "x.h5")
    path, resumed = finished(tmp_path / "x.h5", form)
    assert resumed == (8, 0) and content(path) == wanted
    assert load(path).meta["wall_s"] == 4.0, "the seconds of all runs are added up"
    assert sorted(os.listdir(tmp_path)) == sorted([path.name, "wanted"])


def test_packing_gives_the_bytes_of_writing_at_once(tmp_path):
    packed = write_shards(tmp_path / "packed.h5", RICH, pack=True)
    splits = {}
    for role, n in (("train", N_TRAIN), ("test", N_TEST)):
        rows = rows_of(role, n, meta={**RICH, "cuts": ["avgpool"]})
        ids = tuple(name.decode() for name in rows["ids"].tolist())
        views = {view: rows[f"views/{view}"] for view in RICH["views"][1:] if role == "train"}
        splits[role] = SplitArrays(rows["features"], rows["labels"], ids, views)
    write_cache(tmp_path / "at once.h5", splits, {**RICH, "cuts": ["avgpool"]})
    one, other = load(packed).index.arrays, load(tmp_path / "at once.h5").index.arrays
    assert len(other) == 9
    for name, array in other.items():
        assert [block.sha256 for block in array.blocks] == [b.sha256 for b in one[name].blocks]


def damage(file, how):
    data = bytearray(file.read_bytes())
    if how == "removed":
        file.unlink()
    elif how == "cut short":
        file.write_bytes(data[:-1])
    elif how == "emptied":
        file.write_bytes(b"")
    elif how == "a pipe":  # nobody writes to it: a reader would wait for ever
        file.unlink()
        os.mkfifo(file)
    else:
        data[-1] ^= 1
        file.write_bytes(data)


@pytest.mark.parametrize(
    ("how", "array", "shard", "resumed"),
    [
        ("removed", "features", "train-000000000000", 0),
        ("cut short", "labels", "train-000000000000", 0),
        ("emptied", "ids", "train-000000000000", 0),
        ("a pipe", "labels", "train-000000000004", 4),
        ("a flipped bit", "features", "train-000000000004", 4),
        ("a flipped bit", "labels", "train-000000000000", 0),
        ("a flipped bit", "ids", "train-000000000004", 4),
    ],
)
def test_a_damaged_shard_is_done_again(tmp_path, wanted, how, array, shard, resumed):
    folder = begun(tmp_path / "x.h5")
    damage(folder / f"{shard}-{array}.npy", how)
    writer = ShardWriter(tmp_path / "x.h5", ingredients())
    assert writer.n_done == 4 and writer.damaged == f"{shard}-{array}.npy"
    path, found = finished(tmp_path / "x.h5")
    assert found == (resumed, 0) and content(path) == wanted


@pytest.mark.parametrize("how", ["removed", "cut short", "emptied", "a pipe", "a flipped bit"])
def test_damaged_ingredients_mean_to_begin_again(tmp_path, wanted, how):
    damage(begun(tmp_path / "x.h5") / ".commits" / "ingredients.json", how)
    path, found = finished(tmp_path / "x.h5")
    assert found == (0, 0) and content(path) == wanted


def test_what_killed_runs_left_is_swept_away(tmp_path, wanted):
    folder = begun(tmp_path / "x.h5")
    for stray in (".train-000000000008-ids.npy.abcd1234.part", "train-000000000099-labels.npy"):
        (folder / stray).write_bytes(b"half")
    (tmp_path / ".x.h5.abcd1234.part").write_bytes(b"half a packed file")
    (tmp_path / ".x.h5.other.h5.abcd1234.part").write_bytes(b"of another cache")
    path, found = finished(tmp_path / "x.h5", "shards")
    assert found == (8, 0) and content(path) == wanted
    assert not [name for name in os.listdir(path) if name.startswith(".") or "99" in name]
    assert sorted(os.listdir(tmp_path)) == [".x.h5.other.h5.abcd1234.part", "wanted", "x.shards"]


@pytest.fixture
def precious(tmp_path):
    """A folder that is somebody's own."""
    folder = tmp_path / "precious"
    folder.mkdir()
    for name in ("thesis.tex", "train-000000000000-features.npy", INGREDIENTS, "x.h5", COMMITS):
        (folder / name).write_text("mine")
    return folder


def told_and_untouched(folder, work):
    """Do some work, which is refused or not; what is in a folder stays as it is."""
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    try:
        work()
        said = ""
    except FeatcacheError as error:
        said = str(error)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    return said


@pytest.mark.parametrize("name", [".x.h5.parts", f".x.h5.parts/{COMMITS}"])
@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("share", [None, [ShardRange("train", 0, 4)]])
def test_a_link_in_the_place_of_unfinished_shards_is_not_followed(
    tmp_path, precious, name, force, share
):
    """Of a link to somebody's files, an extraction deleted what was no shard of its own."""
    link = tmp_path / name
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(precious)
    path, meta = tmp_path / "x.h5", ingredients()
    said = told_and_untouched(precious, lambda: ShardWriter(path, meta, force=force, share=share))
    assert f"{link}: expected a file or folder that featcache made" in said and "remove it" in said
    assert told_and_untouched(precious, lambda: remove_unfinished(unfinished_folder(path))) == ""
    assert told_and_untouched(precious, lambda: discard_unfinished(path)) == ""
    assert write_shards(path, meta) and not os.path.lexists(link)


def test_a_link_that_appears_during_a_run_is_not_followed(tmp_path, precious):
    path, meta = tmp_path / "x.h5", ingredients()
    writer = ShardWriter(path, meta)
    commit_rows(writer, "train", 10, 4, meta=meta, upto=4)
    writer.folder.rename(tmp_path / "away")
    writer.folder.symlink_to(precious)
    for work in (lambda: commit_rows(writer, "train", 10, 4, meta=meta), lambda: writer.finish({})):
        assert "found a symbolic link" in told_and_untouched(precious, work)


def test_links_beside_an_output_are_not_followed(tmp_path, precious):
    """Whoever may write there foresees the names of hidden files."""
    path, meta = tmp_path / "x.h5", ingredients()
    for name, target in (
        ("holder", precious / "thesis.tex"),
        ("replaced", precious),
        ("1234.part", precious),
    ):
        (tmp_path / f".x.h5.{name}").symlink_to(target)
    (tmp_path / ".x.shards.replaced").symlink_to(precious)
    (tmp_path / "x.table").symlink_to(precious / "thesis.tex")

    def work():
        with single_writer(path):
            assert write_shards(path, meta, pack=True) == path
            assert write_shards(path, meta) == write_shards(path, meta) == shards_path(path)
            label(shards_path(path), {"id": ["train/00000.png"], "age": [1]})

    assert told_and_untouched(precious, work) == ""
    assert load(shards_path(path)).table is not None
    (tmp_path / ".x.h5.lock").unlink()
    (tmp_path / ".x.h5.lock").symlink_to(precious / "thesis.tex")
    assert "found a symbolic link" in told_and_untouched(precious, work)


@pytest.mark.parametrize("pack", [True, False])
def test_an_output_that_is_a_link_is_replaced_and_what_it_leads_to_stays(tmp_path, pack):
    (tmp_path / "elsewhere").mkdir()
    there = write_shards(tmp_path / "elsewhere" / "x.h5", ingredients(), pack=pack)
    before = content(there)
    (tmp_path / there.name).symlink_to(there)
    path = tmp_path / "x.h5"
    for again in (pack, not pack):
        made = write_shards(path, ingredients(), seed=1, pack=again)
        assert content(there) == before != content(made)
        assert not made.is_symlink()
    assert sorted(path.name for path in tmp_path.glob("x.*")) == [made.name]


def test_the_rest_of_other_ingredients_is_refused_with_what_differs(tmp_path):
    begun(tmp_path / "x.h5", engine_version="2")
    with pytest.raises(
        CacheMismatchError, match=r"engine_version: found '2', wanted '1'; use --force"
    ):
        finished(tmp_path / "x.h5")
    path, found = finished(tmp_path / "x.h5", force=True)
    assert found == (0, 0) and load(path).meta["engine_version"] == "1"


@pytest.mark.parametrize("after", FINISHED)
@pytest.mark.parametrize("before", FINISHED)
def test_making_it_again_replaces_whichever_form_was_there(tmp_path, wanted, before, after):
    finished(tmp_path / "x.h5", before)
    path, _ = finished(tmp_path / "x.h5", after, force=True)
    assert content(path) == wanted
    assert sorted(os.listdir(tmp_path)) == sorted([path.name, "wanted"])


class Killed(BaseException):
    """Stands for SIGKILL at one line: nothing behind it runs that a handler would not stop."""


@pytest.mark.parametrize(
    ("form", "line"),
    [
        ("shards", "featcache.store.shards._replace_folder"),
        ("shards", "featcache.files.os.rename"),
        ("packed", "featcache.store.shards.remove_unfinished"),
    ],
)
def test_a_kill_between_the_last_steps_loses_nothing(tmp_path, wanted, monkeypatch, form, line):
    def killed(*arguments, **options):
        raise Killed

    begun(tmp_path / "x.h5")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(line, killed)
        finished(tmp_path / "x.h5", form)
    visible = [path for path in tmp_path.iterdir() if path.suffix in (".h5", ".shards")]
    assert all(content(path) == wanted for path in visible)
    path, found = finished(tmp_path / "x.h5", form)
    assert found == (N_TRAIN, N_TEST), "every shard is still there"
    assert content(path) == wanted
    assert sorted(os.listdir(tmp_path)) == sorted([path.name, "wanted"])


@pytest.mark.parametrize("how", ["removed", "cut short", "emptied"])
def test_a_missing_shard_of_a_finished_cache_is_an_error(tmp_path, how):
    path, _ = finished(tmp_path / "x.h5", "shards")
    damage(path / "train-000000000004-features.npy", how)
    with pytest.raises(CacheCorruptError, match=r"shard train-000000000004-features\.npy"):
        load(path)


def test_a_flipped_bit_in_a_shard_is_found_on_reading(tmp_path):
    path, _ = finished(tmp_path / "x.h5", "shards")
    damage(path / "train-000000000004-features.npy", "a flipped bit")
    with pytest.raises(
        CacheCorruptError, match=r"train/features, found another in block 1 \(rows 4"
    ):
        load(path).train.features  # noqa: B018


def test_a_damaged_shard_is_not_packed(tmp_path):
    path = tmp_path / "x.h5"
    writer = ShardWriter(path, ingredients())
    for role, n in (("train", N_TRAIN), ("test", N_TEST)):
        commit_rows(writer, role, n, SHARD_ROWS, meta=ingredients())
    damage(writer.folder / "train-000000000004-features.npy", "a flipped bit")
    with pytest.raises(CacheCorruptError, match="train/features, found another in block 1"):
        writer.finish({})
    assert not path.exists() and writer.folder.exists()


def test_an_unfinished_folder_is_no_cache(tmp_path):
    folder = begun(tmp_path / "x.h5")
    shutil.copytree(folder, tmp_path / "copied.shards")
    with pytest.raises(
        CacheMissError, match=r"unfinished extraction; run the same featcache extract"
    ):
        load(tmp_path / "copied.shards")


def test_shards_have_the_name_of_the_file_that_they_stand_for(tmp_path):
    path, _ = finished(tmp_path / "x.h5", "shards")
    assert path == shards_path(tmp_path / "x.h5") == tmp_path / "x.shards"
