"""`featcache.export`: the same numbers and names in the formats of others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from importlib.util import find_spec

import numpy as np
import pytest
from caches import FORMS, RICH, SplitArrays, ingredients, write_cache, write_roles, write_shards
from conftest import write_gaussian_cache

from featcache import export, label, verify
from featcache.cli import main
from featcache.errors import CacheCorruptError, EngineUnavailableError, OutputError, RecipeError
from featcache.store.cache import load
from featcache.store.export import FORMATS

pytestmark = pytest.mark.numpy1  # its bytes or draws may depend on NumPy

WRITABLE = ("npz", "safetensors", "tensorboard")  # without any other package
ODD_IDS = ("a\tb.png", "two\nlines", "猫/写真.jpg", os.fsdecode(b"not \xff text"), "plain")


@pytest.fixture(params=FORMS)
def rich_cache(request, tmp_path):
    """A cache with two cuts, four views and a skipped image, packed or in shards."""
    return write_shards(tmp_path / "rich.h5", RICH, skip=(3,), **FORMS[request.param])


@pytest.fixture
def odd_cache(tmp_path):
    """Five images a split, whose names and classes are hard to write."""
    meta = ingredients(class_names=['"a"\tb', "é\n", "c"])
    split = SplitArrays(
        np.arange(15, dtype=np.float32).reshape(5, 3), np.arange(5, dtype=np.int64) % 3, ODD_IDS
    )
    write_cache(tmp_path / "odd.h5", {"train": split, "test": split}, meta)
    return tmp_path / "odd.h5"


def expected(path):
    """Return every array of a cache by the name that it has in an export."""
    cache = load(path)
    found = {}
    for role, split in (("train", cache.train), ("test", cache.test)):
        found[f"{role}_labels"], found[f"{role}_ids"] = split.labels, np.array(split.ids)
        if split.skipped:
            found[f"{role}_skipped"] = np.array(split.skipped)
        if split.content_hashes is not None:
            found[f"{role}_content_hashes"] = split.content_hashes
        for cut in cache.cuts:
            for view in cache.views if role == "train" else ("identity",):
                main_cut = cut == cache.cuts[0]
                name = f"views_{view}" if view != "identity" else "features"
                found[f"{role}_{name if main_cut else f'cuts_{cut}_{view}'}"] = split.cut(cut, view)
    return found


def test_npz_is_what_numpy_reads(rich_cache):
    result = export(rich_cache, "npz")
    assert result.output == rich_cache.with_suffix(".npz") and result.n_rows == 13
    wanted = expected(rich_cache)
    with np.load(result.output, allow_pickle=False) as found:
        assert set(found) == {*wanted, "class_names", "meta"}
        for name, array in wanted.items():
            assert found[name].dtype == array.dtype and np.array_equal(found[name], array), name
        assert found["class_names"].tolist() == RICH["class_names"]
        assert json.loads(str(found["meta"]))["backbone"] == "resnet18"
    before = result.output.read_bytes()
    export(rich_cache, "npz", force=True)
    assert result.output.read_bytes() == before


def test_names_that_are_no_text_come_back_from_npz(odd_cache):
    with np.load(export(odd_cache, "npz").output) as found:
        assert tuple(found["train_ids"].tolist()) == ODD_IDS


def test_safetensors_is_what_its_package_reads(rich_cache):
    from safetensors import safe_open

    result = export(rich_cache, "safetensors")
    wanted = expected(rich_cache)
    with safe_open(result.output, "numpy") as found:
        assert set(found.keys()) == set(wanted)
        for name, array in wanted.items():
            tensor = found.get_tensor(name)
            if array.dtype.kind == "U":
                names = tensor.view(f"S{tensor.shape[1]}")[:, 0]
                assert [os.fsdecode(name) for name in names] == array.tolist()
            else:
                assert tensor.dtype == array.dtype and np.array_equal(tensor, array), name
        metadata = found.metadata()
    assert json.loads(metadata["class_names"]) == RICH["class_names"]
    assert json.loads(metadata["meta"])["fingerprint"] == load(rich_cache).fingerprint


def test_float16_and_one_split(tmp_path):
    from safetensors.numpy import load_file

    path = write_shards(tmp_path / "half.h5", ingredients(dtype="float16"), pack=True)
    found = load_file(export(path, "safetensors", split="test").output)
    assert set(found) == {
        "test_content_hashes",
        "test_features",
        "test_ids",
        "test_labels",
    }
    assert found["test_features"].dtype == np.float16
    with np.load(export(path, "npz", split="train").output) as arrays:
        assert arrays["train_features"].dtype == np.float16 and "test_features" not in arrays


def test_parquet_is_one_row_per_image(rich_cache):
    parquet = pytest.importorskip("pyarrow.parquet")
    result = export(rich_cache, "parquet")
    table = parquet.read_table(result.output)
    cache, wanted = load(rich_cache), expected(rich_cache)
    assert table.num_rows == 13
    assert table.column_names[:5] == ["split", "id", "label", "class", "features"]
    assert table["id"].to_pylist() == [*cache.train.ids, *cache.test.ids]
    assert table["split"].to_pylist() == ["train"] * 9 + ["test"] * 4
    labels = [*cache.train.labels, *cache.test.labels]
    assert table["label"].to_pylist() == labels
    assert table["class"].to_pylist() == [cache.class_names[label] for label in labels]
    features = np.array(table["features"].to_pylist(), np.float32)
    assert np.array_equal(features[:9], wanted["train_features"])
    assert np.array_equal(features[9:], wanted["test_features"])
    maps = table["cuts_layer4_hvflip"].to_pylist()
    assert maps[9:] == [None] * 4
    assert np.array_equal(
        np.array(maps[:9], np.float32), wanted["train_cuts_layer4_hvflip"].reshape(9, -1)
    )
    assert json.loads(table.schema.metadata[b"featcache"])["backbone"] == "resnet18"


def test_parquet_of_several_groups_and_odd_names(tmp_path, odd_cache, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    from featcache.store import export as _parquet

    monkeypatch.setattr(_parquet, "_GROUP_ROWS", 2)
    file = parquet.ParquetFile(export(odd_cache, "parquet").output)
    assert file.num_row_groups == 6
    assert file.read()["id"].to_pylist()[:5] == [*ODD_IDS[:3], "not \\udcff text", "plain"]


def projector(folder):
    """Read a folder as TensorBoard's projector does: lines split at tabs."""
    lines = (folder / "tensors.tsv").read_text("utf-8").rstrip("\n").split("\n")
    tensors = np.array([[float(cell) for cell in line.split("\t")] for line in lines], np.float32)
    text = (folder / "metadata.tsv").read_text("utf-8").rstrip("\n")
    header, *rows = (line.split("\t") for line in text.split("\n"))
    return tensors, header, rows


def test_tensorboard_gets_points_and_their_names(rich_cache):
    result = export(rich_cache, "tensorboard")
    assert result.output.name == "rich-projector" and result.n_rows == 13
    tensors, header, rows = projector(result.output)
    cache = load(rich_cache)
    features = np.concatenate([cache.train.features, cache.test.features])
    np.testing.assert_allclose(tensors, features, rtol=1e-6)
    assert header == ["id", "class", "label", "split"]
    assert rows[0] == ["train/00000.png", "blue", "0", "train"] and rows[-1][3] == "test"
    config = (result.output / "projector_config.pbtxt").read_text()
    assert 'tensor_path: "tensors.tsv"' in config and 'metadata_path: "metadata.tsv"' in config
    assert not [path for path in result.output.parent.iterdir() if path.name.startswith(".rich-")]


def test_tensorboard_takes_names_with_tabs_and_line_feeds(odd_cache):
    tensors, _, rows = projector(export(odd_cache, "tensorboard").output)
    assert len(tensors) == len(rows) == 10 and {len(row) for row in rows} == {4}
    assert rows[0][:2] == ["a\\tb.png", '"a"\\tb'] and rows[1][:2] == ["two\\nlines", "é\\n"]


@pytest.mark.parametrize("limit", [1, 2, 7, 50, 179, 180, 1000])
def test_a_limit_keeps_the_proportions(small_cache, limit):
    result = export(small_cache, "tensorboard", limit=limit)
    tensors, _, rows = projector(result.output)
    n_rows = min(limit, 180)
    assert result.n_rows == len(tensors) == len(rows) == n_rows
    assert len({(row[0], row[3]) for row in rows}) == n_rows
    for role, share in (("train", 2 / 9), ("test", 1 / 9)):
        for number in "012":
            count = sum(row[2] == number and row[3] == role for row in rows)
            assert abs(count - n_rows * share) <= 1
    cache = load(small_cache)
    for line, row in zip(tensors, rows, strict=True):
        split = getattr(cache, row[3])
        np.testing.assert_allclose(line, split.features[split.ids.index(row[0])], rtol=1e-6)
    assert export(small_cache, "tensorboard", limit=limit, force=True).n_rows == n_rows
    assert projector(result.output)[2] == rows


def test_a_split_without_images(tmp_path):
    none = SplitArrays(np.zeros((0, 4), np.float32), np.zeros(0, np.int64), ())
    some = SplitArrays(np.ones((2, 4), np.float32), np.zeros(2, np.int64), ("a", "b"))
    write_cache(tmp_path / "x.h5", {"train": some, "test": none}, ingredients())
    verify(tmp_path / "x.h5")
    for to in WRITABLE:
        assert export(tmp_path / "x.h5", to).n_rows == 2
        assert export(tmp_path / "x.h5", to, tmp_path / to, split="test").n_rows == 0
    with np.load(tmp_path / "npz") as found:
        assert found["test_features"].shape == (0, 4) and found["test_ids"].shape == (0,)


def test_outputs(tmp_path, small_cache):
    target = tmp_path / "x.npz"
    target.write_text("mine")
    with pytest.raises(OutputError, match="exists already; use --force"):
        export(small_cache, "npz", target)
    export(small_cache, "npz", target, force=True)
    (tmp_path / "folder").mkdir()
    assert export(small_cache, "npz", tmp_path / "folder").output.name == "small.npz"
    with pytest.raises(OutputError, match="is the cache itself"):
        export(small_cache, "npz", small_cache, force=True)
    with pytest.raises(OutputError, match="name another place"):
        export(small_cache, "npz", target / "below.npz")
    with pytest.raises(OutputError, match="name another output"):
        export(small_cache, "tensorboard", target / "below")
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "cat.jpg").write_text("irreplaceable")
    with pytest.raises(OutputError, match="TensorBoard's files alone"):
        export(small_cache, "tensorboard", photos, force=True)
    assert (photos / "cat.jpg").read_text() == "irreplaceable"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"to": "xls"}, "to: expected one of npz, parquet, csv, safetensors, tensorboard, found"),
        ({"split": "dev"}, "split: expected one of all, train, val, test"),
        ({"split": "val"}, "has no split val"),
        ({"output": "y.h5"}, r"y.h5: expected a name that ends in .npz, .parquet, .csv"),
        ({"to": "npz", "output": "y.csv"}, "for npz, found that of csv; leave out --to npz"),
        ({"limit": 5}, "only for tensorboard, found 5 for npz"),
        ({"to": "tensorboard", "limit": 0}, "1 image or more"),
    ],
)
def test_wrong_options(small_cache, options, said):
    with pytest.raises(RecipeError, match=said):
        export(small_cache, **options)


def test_the_suffix_says_the_format(small_cache, tmp_path):
    for name in ("y.csv", "y.npz", "Y.SAFETENSORS"):
        made = export(small_cache, output=tmp_path / name)
        assert made.to == name.lower().partition(".")[2] and made.output == tmp_path / name
    assert export(small_cache, output=tmp_path / "plain").to == "npz"
    assert export(small_cache, "csv", tmp_path / "y.dat").output.name == "y.dat"


def test_csv_gives_every_number_back(odd_cache, tmp_path):
    pandas = pytest.importorskip("pandas")
    frame = pandas.read_csv(export(odd_cache, output=tmp_path / "odd.csv").output)
    cache = load(odd_cache)
    assert list(frame) == ["split", "id", "label", "class", "f0", "f1", "f2"] and len(frame) == 10
    numbers = frame[["f0", "f1", "f2"]].to_numpy(np.float32)
    assert np.array_equal(numbers[:5], cache.train.features)
    assert frame["id"][0] == ODD_IDS[0] and frame["class"][0] == cache.class_names[0]


def test_a_val_split_goes_into_every_format(tmp_path):
    cache = load(write_roles(tmp_path / "val.h5", train=6, val=3, test=2))
    with np.load(export(cache, "npz").output) as found:
        assert np.array_equal(found["val_features"], cache.val.features)
    lines = export(cache, "csv").output.read_text("utf-8").splitlines()[1:]
    roles = [line.partition(",")[0] for line in lines]
    assert roles == ["train"] * 6 + ["val"] * 3 + ["test"] * 2
    assert export(cache, "safetensors", split="val").n_rows == 3
    assert export(cache, "tensorboard").n_rows == 11
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(export(cache, "parquet").output)
    assert table["split"].to_pylist() == roles


def test_the_attached_table_goes_along(tmp_path):
    cache = load(write_roles(tmp_path / "val.h5", train=4, val=3, test=2))
    ids = [name for _, split in cache.splits() for name in split.ids]
    columns = {"label": [f"own {name}" for name in ids], "age": [None, *range(8)]}
    label(cache, {"id": ids, **columns, "tags": [["a", "b"]] * 8 + [None]})
    pandas = pytest.importorskip("pandas")
    frame = pandas.read_csv(export(cache, "csv").output)
    assert frame["table.label"].tolist() == [f"own {name}" for name in frame["id"]]
    assert frame["age"][1:].tolist() == list(range(8)) and frame["tags"][0] == "a,b"
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(export(cache, "parquet", split="test").output)
    assert table["table.label"].to_pylist() == [f"own {name}" for name in ids[-2:]]
    assert table["age"].to_pylist() == [6.0, 7.0]
    assert table["tags"].to_pylist() == [["a", "b"], None]


@pytest.mark.parametrize("to", FORMATS)
def test_progress_reaches_its_total(rich_cache, to):
    if to == "parquet":
        pytest.importorskip("pyarrow")
    messages = []
    export(rich_cache, to, on_progress=messages.append)
    done = [message.done for message in messages]
    assert done == sorted(done) and done[-1] == messages[-1].total > 0


@pytest.mark.parametrize("to", WRITABLE)
def test_damage_is_found_and_nothing_is_written(small_cache, to):
    data = bytearray(small_cache.read_bytes())
    data[load(small_cache).index.arrays["test/features"].blocks[0].offset] ^= 1
    small_cache.write_bytes(data)
    with pytest.raises(CacheCorruptError, match="test/features, found another"):
        export(small_cache, to)
    assert [path.name for path in small_cache.parent.iterdir()] == [small_cache.name]


def test_labels_of_no_class_are_refused(tmp_path):
    split = SplitArrays(np.ones((1, 4), np.float32), np.full(1, 3), ("a",))
    write_cache(tmp_path / "x.h5", {"train": split, "test": split}, ingredients())
    with pytest.raises(CacheCorruptError, match="labels of train from 0 to 2, found 3 to 3"):
        export(tmp_path / "x.h5", "npz")


def test_a_full_disk_leaves_nothing(small_cache):
    """The limit on a file's size ends writing as a full disk does, for real."""
    formats = [to for to in FORMATS if to != "parquet" or find_spec("pyarrow")]
    code = f"""
        import resource, signal
        from featcache import export
        from featcache.errors import OutputError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        for to in {formats}:
            try:
                export({str(small_cache)!r}, to)
            except OutputError as error:
                print(error)
    """
    child = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    assert child.stdout.count("cannot be written: File too large") == len(formats)
    assert ".part" not in child.stdout + child.stderr, "that name was there for a moment"
    assert [path.name for path in small_cache.parent.iterdir()] == [small_cache.name]


def test_memory_does_not_grow_with_the_cache(tmp_path):
    import tracemalloc

    path = write_gaussian_cache(tmp_path / "big.h5", n_train=5_000, dim=512)
    for to in ("npz", "safetensors"):
        tracemalloc.start()
        assert export(path, to).size_bytes > 40e6
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 15e6, to


def test_the_exports_need_numpy_and_h5py_alone(small_cache):
    code = f"""
        import sys
        for name in ("sklearn", "scipy", "oneflow", "PIL", "pandas", "pyarrow", "torch",
                     "safetensors", "filelock", "typer", "rich"):
            sys.modules[name] = None
        import featcache
        for to in {WRITABLE!r}:
            featcache.export({str(small_cache)!r}, to, limit=9 if to == "tensorboard" else None)
        featcache.verify({str(small_cache)!r})
        assert featcache.diff({str(small_cache)!r}, {str(small_cache)!r}).same
    """
    subprocess.run([sys.executable, "-W", "error", "-c", textwrap.dedent(code)], check=True)


def test_pandas(rich_cache):
    pandas = pytest.importorskip("pandas")
    cache = load(rich_cache)
    frame = cache.train.to_pandas()
    assert isinstance(frame, pandas.DataFrame) and frame.index.name == "id"
    assert frame.index.tolist() == list(cache.train.ids)
    assert frame.columns[:3].tolist() == ["label", "class", "f0"] and frame.shape == (9, 7)
    assert np.array_equal(frame.filter(regex="^f").to_numpy(), cache.train.features)
    assert (frame.dtypes.iloc[2:] == np.float32).all() and frame["label"].dtype == np.int64
    assert frame["class"].iloc[1] == "green"
    frame.iloc[0, 2] = 7  # a copy: the cache's own arrays cannot be written to
    mapped = load(rich_cache, mmap=True).test.to_pandas()
    assert np.array_equal(mapped.filter(regex="^f").to_numpy(), cache.test.features)


def test_torch(rich_cache):
    torch = pytest.importorskip("torch")
    cache = load(rich_cache, mmap=True)
    features, labels = cache.train.to_torch()
    assert features.dtype == torch.float32 and labels.dtype == torch.int64
    assert np.array_equal(features.numpy(), np.asarray(cache.train.features))
    assert labels.tolist() == cache.train.labels.tolist()


@pytest.mark.parametrize(
    ("name", "said", "ask"),
    [
        ("pandas", r"pip install 'featcache\[pandas\]'", lambda path: load(path).train.to_pandas()),
        ("torch", "https://pytorch.org", lambda path: load(path).train.to_torch()),
        ("pyarrow", r"install 'featcache\[parquet\]'", lambda path: export(path, "parquet")),
    ],
)
def test_a_package_that_is_missing_is_named(small_cache, monkeypatch, name, said, ask):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(EngineUnavailableError, match=said):
        ask(small_cache)
    assert [path.name for path in small_cache.parent.iterdir()] == [small_cache.name]


def test_the_command(capsys, tmp_path, small_cache):
    assert main(["export", str(small_cache), "--to", "npz", "-o", str(tmp_path / "x.npz")]) == 0
    assert "180 x 8 features" in capsys.readouterr().out
    arguments = ["export", str(small_cache), "--to", "tensorboard", "--limit", "30"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "30 x 8 features" in out and "tensorboard --logdir" in out
    assert main(arguments) == 1
    assert "use --force" in capsys.readouterr().err
    assert main([*arguments, "--force", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["n_rows"] == 30 and result["to"] == "tensorboard"
    for wrong, said in (
        (["export", str(small_cache), "--to", "xls"], "--to"),
        (["export", str(small_cache), "--to", "npz", "--limit", "3"], "--limit"),
        (["export", str(small_cache), "--to", "tensorboard", "--limit", "0"], "--limit"),
    ):
        assert main(wrong) == 2
        assert said in capsys.readouterr().err
    assert main(["export", "none.h5", "--to", "npz"]) == 1
    assert "no such file" in capsys.readouterr().err
