"""Tables: read from every form, joined to images, asked for targets and conditions."""

import json
import sys

import numpy as np
import pytest

from featcache.errors import EngineUnavailableError, TableError
from featcache.tables.joining import join
from featcache.tables.reading import read_table
from featcache.tables.table import Column, Table
from featcache.tables.target import read_target
from featcache.tables.where import rows_where


def written(folder, text, name="t.csv"):
    """Write a file and return its path; text as UTF-8."""
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def plain(table):
    """Return the columns as lists."""
    return {name: column.values.tolist() for name, column in table.columns.items()}


def test_csv_is_text_with_missing_fields_and_line_numbers(tmp_path):
    path = written(tmp_path, 'id, note,age\na,"two\nlines",1\n\nb,"a,b",\nc,,007\n')
    table = read_table(path)
    assert plain(table) == {
        "id": ["a", "b", "c"],
        "note": ["two\nlines", "a,b", None],
        "age": ["1", None, "007"],
    }
    assert table.lines.tolist() == [2, 5, 6]
    assert table.where(1) == f"{path}, line 5"
    assert len(table.sha256) == 64


@pytest.mark.parametrize("delimiter", [";", "\t", ","])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_delimiters_marks_and_line_ends_are_recognised(tmp_path, delimiter, mark, end):
    lines = [delimiter.join(row) for row in (("id", "кот"), ("a", "x y"), ("b", "é"))]
    table = read_table(written(tmp_path, mark + end.join(lines).encode(), "t.txt"))
    assert plain(table) == {"id": ["a", "b"], "кот": ["x y", "é"]}


def test_a_column_of_pandas_without_a_name_is_numbered(tmp_path):
    assert list(read_table(written(tmp_path, ",id\n0,a\n1,b\n")).columns) == ["column 1", "id"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty file"),
        (b"\n \n", "empty file"),
        (b"id,label\n", "expected rows"),
        (b"id,id\na,b\n", "line 1: expected columns of different names, found 'id' twice"),
        (b"id,label\na,b\nc\n", "line 3: expected 2 fields as in the header, found 1"),
        (b"id,label\na,b\n\nc,d,e\n", "line 4: expected 2 fields as in the header, found 3"),
        (b'id,label\na,"b\nc,d\n', "line 2: expected fields separated by ','"),
        (b'id,label\na,"b"c\n', "line 2: expected fields separated by ','"),
        (b"a/1.png,cat\na/2.png,dog\n", "expected a header"),
        (b"1,2\n3,4\n", "expected a header"),
        (b"id,label\na,b\nb,\0\n", "line 3: expected text, found a NUL byte"),
        ("id,label\na,b\n".encode("utf-16"), "looks like UTF-16"),
        ("id,label\na,b\n".encode("utf-16-le"), "looks like UTF-16"),
        ("id,label\na,b\nc,caf\xe9\n".encode("latin-1"), r"line 3: .*looks like Latin-1 \(cp1252"),
        ("id,label\na,кошка\n".encode("cp1251"), "such as cp1251"),
    ],
)
def test_what_is_no_csv_is_refused_in_one_line(tmp_path, content, message):
    with pytest.raises(TableError, match=message) as error:
        read_table(written(tmp_path, content))
    assert "\n" not in str(error.value)


def test_a_field_of_any_length_is_not_taken_for_the_rest_of_the_file(tmp_path):
    with pytest.raises(TableError, match=r"line 2: .*field larger"):
        read_table(written(tmp_path, 'id,label\na,"' + "x,y\n" * 50_000))


@pytest.mark.parametrize(
    ("name", "message"),
    [("none.csv", "No such file"), ("t.xlsx", "found .xlsx"), ("folder.csv", "directory")],
)
def test_what_is_no_file_is_refused(tmp_path, name, message):
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(TableError, match=message):
        read_table(tmp_path / name)


def test_tables_are_read_from_urls():
    fsspec = pytest.importorskip("fsspec")
    with fsspec.open("memory://tables/t.csv", "wb") as stream:
        stream.write(b"id,label\na,b\n")
    table = read_table("memory://tables/t.csv")
    assert plain(table) == {"id": ["a"], "label": ["b"]}
    assert table.source == "memory://tables/t.csv"
    with pytest.raises(TableError, match=r"memory://tables/none\.csv: .*no such file"):
        read_table("memory://tables/none.csv")


def test_json_lines(tmp_path):
    rows = [
        {"id": "a", "n": 1, "tags": ["x", "y"], "ok": True, "mixed": 1},
        {"id": "b", "n": None, "tags": [], "mixed": "two"},
        {"id": "c", "n": 2.5, "tags": None, "ok": False, "late": 2**60},
    ]
    text = "\n\n".join(json.dumps(row) for row in rows)
    table = read_table(written(tmp_path, text, "t.jsonl"))
    assert {name: column.kind for name, column in table.columns.items()} == {
        "id": "text",
        "n": "number",
        "tags": "list",
        "ok": "text",
        "mixed": "text",
        "late": "text",
    }
    np.testing.assert_array_equal(table["n"].values, [1, np.nan, 2.5])
    assert table["tags"].values.tolist() == [("x", "y"), (), None]
    assert table["ok"].values.tolist() == ["true", None, "false"]
    assert table["mixed"].values.tolist() == ["1", "two", None]
    assert table["late"].values.tolist() == [None, None, str(2**60)]
    assert table.lines.tolist() == [1, 3, 5]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"id": "a"}\n{"id": \n', "line 2: expected one JSON object per line"),
        ('{"id": "a"}\n[1]\n', "line 2: .*found list"),
        ('{"id": "a"}\n\n{"id": {"b": 1}}\n', "line 3: .*in the column 'id', found"),
        ('{"id": ["a"]}\n{"id": "b"}\n', "line 2: .*in the column 'id', found 'b'|found \\\\'b"),
        ('{"id": [["a"]]}\n', "line 1: .*in the column 'id'"),
        ("[" * 100_000, "line 1: expected one JSON object per line"),
        ("{}\n", "expected JSON objects with values"),
    ],
)
def test_wrong_json_lines_are_named(tmp_path, text, message):
    with pytest.raises(TableError, match=message) as error:
        read_table(written(tmp_path, text, "t.jsonl"))
    assert len(str(error.value)) < 400


def test_parquet_and_frames_read_alike(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    frame = pa.table(
        {
            "id": pa.array(["a", "b", None]),
            "kind": pa.array(["x", "y", "x"]).dictionary_encode(),
            "n": pa.array([1, None, 3], pa.int32()),
            "big": pa.array([2**60 + 1, 1, None], pa.int64()),
            "ok": pa.array([True, None, False]),
            "day": pa.array([0, 1, None], pa.date32()),
            "tags": pa.array([["p", "q"], [], None]),
            "x": pa.array([0.5, None, 2.0]),
        }
    )
    parquet.write_table(frame, tmp_path / "t.parquet")
    tables = [read_table(tmp_path / "t.parquet"), read_table(frame)]
    tables.append(read_table({name: frame[name].to_pylist() for name in frame.column_names}))
    for table in tables:
        assert [column.kind for column in table.columns.values()] == [
            *("text", "text", "number", "text", "text", "text", "list", "number")
        ]
        np.testing.assert_array_equal(table["n"].values, [1, np.nan, 3])
        np.testing.assert_array_equal(table["x"].values, [0.5, np.nan, 2])
        values = plain(table.without(["n", "x"]))
        assert values == {
            "id": ["a", "b", None],
            "kind": ["x", "y", "x"],
            "big": [str(2**60 + 1), "1", None],
            "ok": ["true", None, "false"],
            "day": ["1970-01-01", "1970-01-02", None],
            "tags": [("p", "q"), (), None],
        }
    assert len(tables[0].sha256) == 64


def test_data_frames(tmp_path):
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame(
        {"label": pd.Categorical(["cat", None, "dog"]), 7: [1.0, None, 2.0]},
        index=pd.Index(["a", "b", "c"], name="id"),
    )
    table = read_table(frame)
    assert list(table.columns) == ["id", "label", "7"]
    assert table["label"].values.tolist() == ["cat", None, "dog"]
    np.testing.assert_array_equal(table["7"].values, [1, np.nan, 2])
    assert list(read_table(frame.reset_index(drop=True)).columns) == ["label", "7"]
    with pytest.raises(TableError, match="'a' twice"):
        read_table(pd.DataFrame([[1, 2]], columns=["a", "a"]))


def test_nested_and_damaged_parquet_is_refused(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    for values in ([{"a": 1}], [[{"a": 1}]], [b"bytes"]):
        parquet.write_table(pa.table({"id": ["a"], "inner": values}), tmp_path / "t.parquet")
        with pytest.raises(TableError, match="in the column 'inner'"):
            read_table(tmp_path / "t.parquet")
    data = (tmp_path / "t.parquet").read_bytes()
    for damaged in (data[:-20], b"PAR1" + b"\0" * 40 + b"PAR1", b"id,label\na,b\n"):
        with pytest.raises(TableError, match="expected a Parquet file") as error:
            read_table(written(tmp_path, damaged, "t.parquet"))
        assert "\n" not in str(error.value)


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(EngineUnavailableError, match=r"featcache\[parquet\]"):
        read_table(written(tmp_path, b"PAR1", "t.parquet"))


@pytest.mark.parametrize("source", [3, {}, {"a": "text"}, {"a": [1, 2], "b": [1]}, {"a": []}])
def test_other_sources_are_refused(source):
    with pytest.raises(TableError, match="expected"):
        read_table(source)


IDS = ("train/cat/1.png", "train/dog/1.png", "train/dog/2.png", "test/cat/3.png")


def labelled(keys, name="id", **columns):
    """Return a table with a key column and labels."""
    return read_table({name: keys, "label": [f"l{n}" for n in range(len(keys))], **columns})


@pytest.mark.parametrize(
    ("keys", "how"),
    [
        (IDS, "equal to the id"),
        ([f"./{id_}" for id_ in IDS], "the path"),
        ([id_.replace("/", "\\") for id_ in IDS], "the path"),
        ([f"/data/set/{id_}" for id_ in IDS], "the path of the file"),
        ([f"/data/else/../set/{id_}" for id_ in IDS], "the path of the file"),
        ([f"/old/place/{id_}" for id_ in IDS], "the last 3 parts of the path"),
        ([id_.partition("/")[2] for id_ in IDS], "the last 2 parts of the path"),
    ],
)
def test_rows_find_their_images_by_name(keys, how):
    table = labelled(list(reversed(keys)), "path")
    found = join(table, IDS, dataset_path="/data/set")
    assert found.rows.tolist() == [3, 2, 1, 0]
    assert found.key == f"path, {how}"
    assert bool(found.notes) == how.startswith("the last")


def test_file_names_count_only_where_they_are_unique():
    for keys in (["1.png", "2.png", "3.png"], ["1", "2", "3"]):
        found = join(labelled(keys, "image"), IDS)
        assert found.rows.tolist() == [-1, -1, 1, 2]
        assert "no value of 'image' is an id; matched by the file name" in found.notes[0]
    found = join(labelled(["x/2.png", "y/2.png", "3.png"], "image"), IDS)
    assert found.rows.tolist() == [-1, -1, -1, 2]


def test_paths_relative_to_the_table_find_images(tmp_path):
    (tmp_path / "set").mkdir()
    text = "file,label\n" + "".join(f"set/{id_},x\n" for id_ in IDS)
    found = join(read_table(written(tmp_path, text)), IDS, dataset_path=str(tmp_path / "set"))
    assert found.rows.tolist() == [0, 1, 2, 3]
    assert found.key == "file, the path of the file"


def test_content_hashes_find_images_under_any_name():
    hashes = np.random.default_rng(0).integers(0, 256, (4, 32)).astype(np.uint8)
    hashes[3] = hashes[0]
    keys = [hashes[row].tobytes().hex().upper() for row in (2, 0)]
    found = join(labelled(keys, "sha256"), IDS, hashes)
    assert found.rows.tolist() == [1, -1, 0, 1]
    with pytest.raises(TableError, match="expected rows of these images"):
        join(labelled(keys, "sha256"), IDS)


def test_the_key_column_that_matches_most_is_taken_or_the_named_one():
    table = labelled(["x", "y", "z", IDS[0]], "id", File=list(IDS))
    assert join(table, IDS).column == "File"
    assert join(table, IDS, by="id").rows.tolist() == [3, -1, -1, -1]
    numbers = labelled([2.0, 1.0], "id")
    assert join(numbers, ["1", "2", "3"]).rows.tolist() == [1, 0, -1]


def test_missing_doubled_and_left_over_rows_are_named(tmp_path):
    text = "id,label\n" + "".join(f"{key},x\n" for key in ("a", "b", "a", "q", "", "a"))
    found = join(read_table(written(tmp_path, text)), ["a", "b", "c", "d"])
    assert found.rows.tolist() == [0, 1, -1, -1]
    assert (found.n_missing, found.n_doubled, found.n_left_over) == (2, 2, 2)
    notes = [note.partition(": ")[2] for note in found.notes]
    assert notes == [
        "2 of 4 images have no row: 'c', 'd'",
        "2 of 6 rows repeat another: line 4, line 7",
        "2 of 6 rows belong to no image here: line 5 ('q'), line 6 (None)",
    ]


def test_two_rows_of_one_image_that_differ_are_refused(tmp_path):
    table = read_table(written(tmp_path, "id,label\na,x\nb,y\na,z\n"))
    with pytest.raises(TableError, match=r"line 4: .*another of 'a' .*\(line 2\)"):
        join(table, ["a", "b"])


def test_a_table_of_other_images_is_refused_with_a_pair():
    with pytest.raises(TableError, match=r"'id' has 'q' where an id here is 'train/cat/1.png'"):
        join(labelled(["q"]), IDS)
    with pytest.raises(TableError, match=r"expected a column that names the images .* --by"):
        join(labelled(["q"], "what"), IDS)
    with pytest.raises(TableError, match="did you mean what"):
        join(labelled(["q"], "what"), IDS, by="wat")


def test_text_becomes_classes_in_order():
    target = read_target(read_table({"y": ["b", "a", None, "b"]}), ["y"])
    assert (target.task, target.names, target.note) == ("classes", ("a", "b"), "")
    assert target.values.tolist() == [1, 0, -1, 1]
    assert target.values.dtype == np.int64
    assert target.missing.tolist() == [False, False, True, False]


@pytest.mark.parametrize("as_text", [False, True])
def test_few_whole_numbers_become_classes_in_numeric_order_and_say_so(as_text):
    values = [10, 1, 0, 2, 10, 1, 0, 2, None]
    given = [None if value is None else str(value) for value in values] if as_text else values
    target = read_target(read_table({"y": given}), ["y"])
    assert (target.task, target.names) == ("classes", ("0", "1", "2", "10"))
    assert target.values.tolist() == [3, 1, 0, 2, 3, 1, 0, 2, -1]
    assert "taken as 4 classes in numeric order" in target.note
    explicit = read_target(read_table({"y": given}), ["y"], task="classification")
    assert explicit.names == target.names
    assert explicit.note == ""


@pytest.mark.parametrize(
    "values", [[0.5, 1, 1, None], [*range(21), None], ["0.5", "1", "NA", None]]
)
def test_other_numbers_become_numbers_and_say_so(values):
    target = read_target(read_table({"y": values}), ["y"])
    assert (target.task, target.names) == ("numbers", ("y",))
    assert target.values.shape == (len(values), 1)
    assert np.isnan(target.values[-1])
    assert "taken as numbers" in target.note


def test_columns_of_flags_become_labels():
    table = read_table(
        {"a": ["1", "0", None], "b": ["True", "false", "true"], "c": [0.0, 1.0, 1.0]}
    )
    target = read_target(table, ["a", "b", "c"])
    assert (target.task, target.names, target.name) == ("labels", ("a", "b", "c"), "a, b, c")
    assert target.values.tolist() == [[1, 1, 0], [0, 0, 1], [-1, 1, 1]]
    assert target.values.dtype == np.int8


def test_separated_text_and_lists_become_labels():
    expected = [[1, 0, 1], [0, 1, 0], [-1, -1, -1]]
    target = read_target(read_table({"y": ["x| z", "y|", None]}), ["y"], separator="|")
    assert (target.task, target.names) == ("labels", ("x", "y", "z"))
    assert target.values.tolist() == expected
    target = read_target(read_table({"y": [["z", "x"], ["y"], None]}), ["y"])
    assert target.values.tolist() == expected
    target = read_target(read_table({"y": [["x"], [], ["x", "y"]]}), ["y"])
    assert target.values.tolist() == [[1, 0], [0, 0], [1, 1]]


def test_columns_of_numbers_become_numbers():
    target = read_target(read_table({"a": [1, 2, 3], "b": ["4", "NA", "5.5"]}), ["a", "b"])
    assert (target.task, target.names) == ("numbers", ("a", "b"))
    np.testing.assert_array_equal(target.values, [[1, 4], [2, np.nan], [3, 5.5]])


@pytest.mark.parametrize(
    ("columns", "task", "message"),
    [
        (["none"], "auto", "expected a column 'none'"),
        (["empty"], "auto", "all 4 missing"),
        (["one"], "auto", "at least two classes in 'one', found only 'x'"),
        (["id"], "auto", "4 different values in 4 rows, like an id"),
        (["fold"], "classification", "4 different values in 4 rows, like an id"),
        (["id"], "regression", "expected numbers in 'id', found 'a'"),
        (["constant"], "regression", "expected different numbers in 'constant', found only 3"),
        (["far"], "regression", "row 1: expected a finite number in 'far', found inf"),
        (["species"], "multilabel", "give the separator"),
        (["species", "fold"], "auto", "expected numbers in 'species', found 'cat'"),
        (["species", "flag"], "multilabel", "'species', found 'cat'"),
        (["species", "flag"], "classification", "expected one column of classes, found 2"),
        (["flag", "flag"], "auto", "'flag' twice"),
        (["tags"], "regression", "expected single values in 'tags', found lists"),
        (["same", "same 2"], "multilabel", "the same in every row"),
        (["flag"], "guess", "expected a task auto"),
        ([], "auto", "expected the name of a target"),
    ],
)
def test_targets_that_do_not_fit_are_refused(columns, task, message):
    table = read_table(
        {
            "id": ["a", "b", "c", "d"],
            "empty": [None] * 4,
            "one": ["x", None, "x", "x"],
            "species": ["cat", "dog", "cat", None],
            "fold": [1, 2, 3, 4],
            "constant": [3, 3, 3, 3],
            "far": [1, float("inf"), 2, 3],
            "flag": [0, 1, 1, 0],
            "same": [1, 1, 1, 1],
            "same 2": [0, 0, 0, None],
            "tags": [["a"], ["b"], None, []],
        }
    )
    with pytest.raises(TableError, match=message):
        read_target(table, columns, task=task)


PEOPLE = {
    "site": ["A", "B", None, "C"],
    "age": ["39", "40", "41", None],
    "size": [1.0, np.nan, 2.5, -3.0],
    "class": ["x", "y", "y", "x"],
    "the day": ["2024-01-02", "2024-02-01", None, "2023-12-31"],
    "tags": [["p", "q"], ["q"], None, []],
    "ok": [True, False, None, True],
}


@pytest.mark.parametrize(
    ("expression", "rows"),
    [
        ('site != "B"', [0, 3]),
        ("not site == 'B'", [0, 3]),
        ('site == "B" or missing(site)', [1, 2]),
        ("age >= 40 and (site in ['A', 'B'])", [1]),
        ("age == '40'", [1]),
        ("site not in ('A', 'B')", [3]),
        ("age in [39, 41]", [0, 2]),
        ("39 < age <= 41", [1, 2]),
        ("size > -3.5 and size < 2", [0, 3]),
        ("size == '2.5'", [2]),
        ("not missing(age)", [0, 1, 2]),
        ("class == 'x'", [0, 3]),
        ("`the day` >= '2024-01-01'", [0, 1]),
        ("'q' in tags", [0, 1]),
        ("'p' not in tags", [1, 3]),
        ("ok == True", [0, 3]),
        ("age > size", [0, 2]),
        ("  site == 'class' or class == 'y' ", [1, 2]),
        ("missing(size) or (site == 'A' and not age == 3)", [0, 1]),
    ],
)
def test_conditions(expression, rows):
    assert np.flatnonzero(rows_where(read_table(PEOPLE), expression)).tolist() == rows


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("site = 'B'", "expected a condition such as .* at character"),
        ("", "expected a condition"),
        ("site", "expected a comparison, found 'site' at character 1"),
        ("nope == 3", "expected a column 'nope'"),
        ("site == 3", "expected numbers on both sides, found text in 'site' at character 1"),
        ("age == 'old'", None),
        ("size == 'old'", "expected numbers on both sides, found text in .*old.* at character 9"),
        ("1 == 2", "expected a column on one side"),
        ("__import__('os').system('true')", "expected a comparison|another call"),
        ("site.upper() == 'B'", "expected a column, a text in quotes or a number"),
        ("age + 1 > 3", "expected a column, a text in quotes or a number, found 'age \\+ 1'"),
        ("(lambda: 1)() == 1", "expected a condition|expected a column"),
        ("site in 'AB'", "expected a column in a list"),
        ("missing('x')", "expected missing"),
        ("[site for site in age] == 1", "expected a condition|expected a column"),
        ("tags == 'p'", "in a column of lists"),
        ("site is None", "expected"),
        ("age > " + "9" * 400, "expected a condition"),
        ("(" * 5000 + "age > 1" + ")" * 5000, "expected a condition"),
        ("site == 'кошка' and `the day` + 1 == 2", "found '`the day` \\+ 1' at character 21"),
        ("site == 'a\0'", "expected a condition"),
    ],
)
def test_other_code_is_refused_with_its_place(expression, message):
    table = read_table(PEOPLE)
    if message is None:
        assert not rows_where(table, expression).any()
        return
    with pytest.raises(TableError, match=message) as error:
        rows_where(table, expression)
    assert "\n" not in str(error.value)


def test_columns_give_numbers_and_texts():
    column = Column("number", np.array([1.0, np.nan, 2.5]))
    assert column.texts().tolist() == ["1", None, "2.5"]
    assert Column("text", np.array(["1_0", None], object)).numbers() is None
    table = Table({"a": column}, "t.csv")
    assert table.take(np.array([2, -1])).columns["a"].texts().tolist() == ["2.5", None]
