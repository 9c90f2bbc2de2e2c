"""Attaching a table of labels to a cache, and reading it back."""

import json

import numpy as np
import pytest
from caches import FORMS, ingredients, write_shards

import featcache
from featcache.cli import main
from featcache.errors import (
    CacheCorruptError,
    CacheMismatchError,
    CacheMissError,
    FeatcacheError,
)
from featcache.store.format import seal, unseal
from featcache.store.label import detach
from featcache.store.table_file import attach, attached, table_path
from featcache.tables.table import Column, Table

N = 14  # images of `write_shards`


@pytest.fixture(params=FORMS)
def cache(request, tmp_path):
    """Return the path of a small cache, in either form."""
    return write_shards(tmp_path / "small.h5", ingredients(), **FORMS[request.param])


@pytest.fixture
def packed(tmp_path):
    """Return the path of a small cache in one file."""
    return write_shards(tmp_path / "small.h5", ingredients(), pack=True)


def ids_of(path):
    """Return the ids of a cache in the order of its splits."""
    return [id_ for _, split in featcache.load(path).splits() for id_ in split.ids]


def rows_for(path):
    """Return columns of every kind for a cache, in the order of its images."""
    return {
        "id": ids_of(path),
        "species": ["cat", "dog"] * (N // 2),
        "age": [*np.arange(N - 1) / 2, None],
        "tags": [["x", "y"], None, *[[]] * (N - 2)],
    }


def test_a_table_comes_back_with_the_rows_of_the_cache(cache):
    before = featcache.load(cache)
    assert before.table is None
    columns = {name: values[::-1] for name, values in rows_for(cache).items()}
    result = featcache.label(before, columns)
    for opened in (before, featcache.load(cache)):
        table = opened.table
        assert list(table.columns) == ["species", "age", "tags"]
        assert table["species"].values.tolist() == ["cat", "dog"] * (N // 2)
        np.testing.assert_array_equal(table["age"].values, [*np.arange(N - 1) / 2, np.nan])
        assert table["tags"].values.tolist()[:3] == [("x", "y"), None, ()]
    assert result.table == table_path(cache)
    assert (result.n_images, result.n_matched, result.n_missing) == (N, N, 0)
    assert result.key == "id, equal to the id"
    assert result.notes == ("the table: values are missing of 'age' in 1, 'tags' in 1 images",)


def test_features_stay_and_the_newest_cache_is_no_table(packed):
    before = packed.read_bytes()
    featcache.label(packed, rows_for(packed))
    assert packed.read_bytes() == before
    assert featcache.newest_cache(packed.parent) == packed
    assert featcache.verify(packed).n_train == 10


def test_another_table_leaves_nothing_of_the_one_before(packed):
    featcache.label(packed, rows_for(packed))
    featcache.label(packed, {"id": ids_of(packed)[:3], "other": ["a", "b", "c"]})
    table = featcache.load(packed).table
    assert list(table.columns) == ["other"]
    assert table["other"].values.tolist() == ["a", "b", "c", *[None] * (N - 3)]
    detach(packed)
    assert featcache.load(packed).table is None
    with pytest.raises(CacheMissError, match="expected a table"):
        detach(packed)


def test_content_hashes_join_and_file_names_are_said(packed):
    opened = featcache.load(packed)
    hashes = [row.tobytes().hex() for row in opened.test.content_hashes]
    result = featcache.label(packed, {"content_hash": hashes, "y": list("abcd")})
    assert (result.n_matched, result.n_missing, result.n_left_over) == (4, 10, 0)
    assert opened.table["y"].values.tolist() == [*[None] * 10, *"abcd"]
    heard = []
    featcache.label(packed, {"image": ["00007"], "y": ["q"]}, on_note=heard.append)
    assert "matched by the file name without suffix" in heard[0]


@pytest.mark.parametrize("n_values", [1, 127, 128, 129, 40_000])
def test_any_number_of_values_is_kept(tmp_path, n_values):
    values = np.array([f"v{n}" for n in range(n_values)] + [None], object)
    facts = dict.fromkeys(("source", "sha256", "created", "key"), "") | dict.fromkeys(
        ("n_rows", "n_matched", "n_missing", "n_doubled", "n_left_over"), 0
    )
    attach(tmp_path / "c.h5", "f", Table({"y": Column("text", values)}, "t"), facts)
    read = attached(tmp_path / "c.h5", "f", n_values + 1)
    assert read.table["y"].values.tolist() == values.tolist()
    assert read.facts == facts


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("id,label\nq,x\n", "'id' has 'q' where an id here is 'train/00000.png'"),
        ("name,label\ntrain/00000.png,x\n", "column that names the images"),
        ("id\ntrain/00000.png\n", "expected columns besides 'id'"),
        ("id,label\ntrain/00000.png,x\ntrain/00000.png,y\n", "line 3: expected one row per image"),
        ("id;label\ntrain/00000.png\n", "line 2: expected 2 fields"),
    ],
)
def test_a_table_that_does_not_fit_is_one_line_and_leaves_the_old_one(
    packed, tmp_path, capsys, table, message
):
    featcache.label(packed, rows_for(packed))
    before = table_path(packed).read_bytes()
    path = tmp_path / "t.csv"
    path.write_text(table, encoding="utf-8")
    assert main(["label", str(packed), str(path)]) == 1
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert table_path(packed).read_bytes() == before


def test_the_table_of_a_cache_that_was_replaced_is_refused(packed):
    featcache.label(packed, rows_for(packed))
    packed.unlink()
    write_shards(packed, ingredients(dataset_digest="2" * 64), pack=True)
    with pytest.raises(CacheMismatchError, match=r"another cache.* featcache label"):
        featcache.load(packed).table  # noqa: B018
    featcache.label(packed, rows_for(packed))
    assert featcache.load(packed).table is not None


def _put(column, name, value):
    column[name] = value


@pytest.mark.parametrize(
    "change",
    [
        lambda it: it.update(version=2),
        lambda it: it.update(n_rows=3),
        lambda it: it.update(fingerprint=None),
        lambda it: it.update(facts=[]),
        lambda it: it["facts"].update(source=["x"]),
        lambda it: it["facts"].update(n_rows=True),
        lambda it: it.update(columns=[]),
        lambda it: it.update(columns={"a": 1}),
        lambda it: it["columns"].append(it["columns"][0]),
        lambda it: _put(it["columns"][0], "kind", "object"),
        lambda it: _put(it["columns"][0], "kind", ["text"]),
        lambda it: _put(it["columns"][0], "name", 3),
        lambda it: _put(it["columns"][0], "name", ["a"]),
        lambda it: _put(it["columns"][0], "values", "cat"),
        lambda it: _put(it["columns"][0], "values", ["cat"]),
        lambda it: _put(it["columns"][0], "values", ["cat", 3]),
        lambda it: _put(it["columns"][0], "values", ["cat", None]),
        lambda it: _put(it["columns"][0], "dtype", "|O"),
        lambda it: _put(it["columns"][0], "dtype", ["|i1"]),
        lambda it: _put(it["columns"][0], "codes", "AAAA"),
        lambda it: _put(it["columns"][0], "codes", "é"),
        lambda it: _put(it["columns"][0], "codes", 7),
        lambda it: _put(it["columns"][1], "numbers", "AAAA"),
        lambda it: _put(it["columns"][2], "values", [3]),
        lambda it: _put(it["columns"][2], "values", [["x", 3], []]),
    ],
)
def test_a_table_that_someone_built_is_refused(packed, change):
    featcache.label(packed, rows_for(packed))
    path = table_path(packed)
    content = unseal(path.read_bytes())
    change(content)
    path.write_bytes(seal(content))
    with pytest.raises(FeatcacheError, match="featcache label") as error:
        featcache.load(packed).table  # noqa: B018
    assert "\n" not in str(error.value)


def test_damage_is_found_and_can_be_detached(packed, capsys):
    featcache.label(packed, rows_for(packed))
    path = table_path(packed)
    data = path.read_bytes()
    generator = np.random.default_rng(0)
    for at in generator.integers(0, len(data), 40):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        try:
            featcache.load(packed).table  # noqa: B018
        except (CacheCorruptError, CacheMismatchError):
            continue
        assert at < data.index(b"\n")  # the version or so of the seal
    for cut in (0, 10, len(data) - 1):
        path.write_bytes(data[:cut])
        with pytest.raises(CacheCorruptError, match="--detach"):
            featcache.load(packed).table  # noqa: B018
    assert main(["info", str(packed)]) == 0
    assert "expected a table that featcache label wrote" in " ".join(
        capsys.readouterr().out.split()
    )
    assert main(["label", str(packed), "--detach"]) == 0
    assert not path.exists()


def test_the_command_names_rows_by_line_and_info_shows_the_table(packed, tmp_path, capsys):
    lines = ["path,species,age", *(f"{id_},cat,{n}" for n, id_ in enumerate(ids_of(packed)[:-1]))]
    lines += ["train/99999.png,dog,7", lines[1]]
    table = tmp_path / "t.csv"
    table.write_text("\n".join(lines), encoding="utf-8")
    assert main(["label", str(packed), str(table), "--json"]) == 0
    printed = capsys.readouterr()
    assert printed.err.splitlines() == [
        f"{table}: 1 of 14 images has no row: 'test/00003.png'",
        f"{table}: 1 of 15 rows repeat another: line 16",
        f"{table}: 1 of 15 rows belongs to no image here: line 15 ('train/99999.png')",
    ]
    said = json.loads(printed.out)
    assert said["columns"][0] == {
        "name": "species",
        "kind": "text",
        "n_values": 1,
        "n_missing": 1,
    }
    assert main(["info", str(packed), "--json"]) == 0
    kept = json.loads(capsys.readouterr().out)["table"]
    assert kept["source"] == str(table)
    assert kept["columns"] == said["columns"]
    assert len(kept["sha256"]) == 64
    for name in ("n_rows", "n_matched", "n_missing", "n_doubled", "n_left_over", "key"):
        assert kept[name] == said[name]
    assert main(["info", str(packed)]) == 0
    assert "species: text, 1 value, 1 missing" in capsys.readouterr().out


def test_names_from_a_table_never_reach_the_terminal_as_they_are(packed, capsys):
    featcache.label(packed, {"id": ids_of(packed), "\x1b[31mred": ["a"] * N})
    for arguments in (["info", str(packed)], ["label", str(packed), "none.csv"]):
        main(arguments)
        printed = capsys.readouterr()
        assert "\x1b[31m" not in printed.out + printed.err


def test_wrong_arguments_are_usage_errors(packed, capsys):
    assert main(["label", str(packed)]) == 2
    assert main(["label", str(packed), "t.csv", "--detach"]) == 2
    assert "--detach" in capsys.readouterr().err


def test_a_table_goes_with_a_cache_behind_a_url(packed, monkeypatch, tmp_path):
    fsspec = pytest.importorskip("fsspec")
    monkeypatch.setenv("FEATCACHE_DIR", str(tmp_path / "here"))
    url = "memory://labelled/small.h5"
    with fsspec.open(url, "wb") as stream:
        stream.write(packed.read_bytes())
    featcache.label(url, rows_for(packed))
    monkeypatch.setenv("FEATCACHE_DIR", str(tmp_path / "there"))
    assert featcache.load(url).table["species"].values[1] == "dog"
    opened = featcache.load(url)
    featcache.label(opened, {"id": ids_of(packed)[:1], "new": ["x"]})
    monkeypatch.setenv("FEATCACHE_DIR", str(tmp_path / "here"))
    assert list(featcache.load(url).table.columns) == ["new"]
    detach(url)
    monkeypatch.setenv("FEATCACHE_DIR", str(tmp_path / "there"))
    assert featcache.load(url).table is None
