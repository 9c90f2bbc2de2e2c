"""Images from where they are: tables of paths, tar shards, saved Hugging Face sets, torchvision."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from conftest import colour_image

from featcache import extract, load, load_dataset, load_head
from featcache.cli import main
from featcache.datasets.tar import find_shards, is_tar_pattern
from featcache.errors import DatasetError, TableError
from featcache.prediction import find_places
from featcache.progress import silent
from featcache.reporting.pictures import find_pictures
from featcache.sampling import drawn_sides, text_hashes


def encoded(row, kind="PNG"):
    stream = io.BytesIO()
    colour_image(row % 3, row).save(stream, kind)
    return stream.getvalue()


def write_images(folder, names):
    for row, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(row))
    return folder


@pytest.fixture
def photos(tmp_path):
    """Twelve images in two folders that are no classes."""
    names = [f"{'xy'[row % 2]}/{row:02d}.png" for row in range(12)]
    return write_images(tmp_path / "photos", names)


HEADER = ("path", "species", "age", "fold", "patient")


def rows_of(n=12):
    return [
        (
            f"{'xy'[row % 2]}/{row:02d}.png",
            ["cat", "dog"][row // 2 % 2],
            f"{row / 8}",
            ("train", "Validation", "test")[row % 3],
            f"p{row % 3}",
        )
        for row in range(n)
    ]


def write_table(path, rows, header=HEADER):
    path.write_text("\n".join(",".join(row) for row in (header, *rows)) + "\n")
    return path


def ids_of(data):
    return [id_ for _, split in data.splits() for id_ in split.ids]


# Tables of paths


def test_a_table_names_images_labels_and_sides(photos, tmp_path):
    table = write_table(tmp_path / "t.csv", rows_of())
    data = load_dataset(photos, labels=table, target="species", split_column="fold")
    assert data.class_names == ("cat", "dog") and data.divided_by == "given"
    assert {role: len(split) for role, split in data.splits()} == dict(train=4, val=4, test=4)
    assert data.val.ids == ("x/04.png", "x/10.png", "y/01.png", "y/07.png")
    assert data.val.labels.tolist() == [0, 1, 0, 1]
    assert set(data.table.columns) == set(HEADER[1:]) and len(data.table) == 12
    row = data.table_ids.index("y/07.png")
    assert data.table["age"].values[row] == "0.875"
    drawn = load_dataset(photos, labels=table, target="species")
    assert drawn.divided_by == "content" and sorted(ids_of(drawn)) == sorted(data.table_ids)


def test_a_group_decides_the_side_of_its_images(photos, tmp_path):
    table = write_table(tmp_path / "t.csv", rows_of())
    data = load_dataset(photos, labels=table, target="species", group="patient")
    assert data.divided_by == "group"
    sides = dict(zip(("p0", "p1", "p2"), drawn_sides(text_hashes(["p0", "p1", "p2"])), strict=True))
    patients = dict(zip(data.table_ids, data.table["patient"].values, strict=True))
    assert all(not sides[patients[id_]] for id_ in data.train.ids)
    assert all(sides[patients[id_]] for id_ in data.test.ids)


@pytest.mark.parametrize("form", ["alone", "relative", "absolute", "frame", "no suffix"])
def test_paths_may_be_relative_to_the_table(photos, tmp_path, form):
    start = {"relative": "photos/", "alone": "photos/", "absolute": f"{photos}/"}.get(form, "")
    rows = [(start + row[0], *row[1:]) for row in rows_of()]
    if form == "no suffix":
        rows = [(row[0].removesuffix(".png"), *row[1:]) for row in rows]
    table = write_table(tmp_path / "t.csv", rows)
    if form == "alone":
        data = load_dataset(table, target="species")
        assert data.name == "t" and data.path == str(table)
        assert sorted(data.table_ids)[0] == "photos/x/00.png"
    else:
        labels = table
        if form == "frame":
            columns = zip(*rows, strict=True)
            labels = {name: list(column) for name, column in zip(HEADER, columns, strict=True)}
        data = load_dataset(photos, labels=labels, target="species")
        assert sorted(data.table_ids)[0] == "x/00.png"
    assert len(data.table_ids) == 12 and data.class_names == ("cat", "dog")


def test_images_without_a_row_are_noted_and_left_out(photos, tmp_path):
    table = write_table(tmp_path / "t.csv", [*rows_of(10), rows_of()[3]])
    data = load_dataset(photos, labels=table, target="species")
    assert len(ids_of(data)) == 10
    notes = " ".join(data.notes)
    assert "2 of 12 images have no row: 'x/10.png', 'y/11.png'" in notes
    assert "1 of 11 rows repeat another: line 12" in notes


@pytest.mark.parametrize(
    ("rows", "options", "said"),
    [
        ([("x/99.png", "cat", "1", "test", "p")], {}, r"t\.csv: 1 of 13 rows .* line 14 .*restore"),
        ([("../../etc/passwd", "cat", "1", "test", "p")], {}, r"line 14: expected paths inside"),
        ([("/etc/passwd", "cat", "1", "test", "p")], {}, r"line 14: expected paths inside"),
        ([("x/00.png", "dog", "1", "test", "p")], {}, r"line 14: expected one row per image"),
        ([], {"target": "nope"}, "expected a column 'nope'"),
        ([], {"path_column": "nope"}, "expected a column 'nope'"),
        ([], {"split_column": "species"}, r"lines 2, 4, 6 and 9 more: expected train, val"),
        ([], {"split_column": "fold", "group": "species"}, "lines .*: expected each 'species' in"),
        ([("", "cat", "1", "test", "p")], {}, "1 of 13 rows belongs to no image"),
    ],
)
def test_tables_that_do_not_fit(photos, tmp_path, rows, options, said):
    table = write_table(tmp_path / "t.csv", [*rows_of(), *rows])
    with pytest.raises(TableError, match=said) as caught:
        load_dataset(photos, labels=table, **options)
    assert "\n" not in str(caught.value)


def test_a_table_alone_reads_no_file_outside_of_its_folder(photos, tmp_path):
    table = write_table(
        photos / "x" / "t.csv", [("../y/01.png", "cat"), ("00.png", "dog")], HEADER[:2]
    )
    with pytest.raises(TableError, match=r"line 2: expected paths inside .*x, found '\.\./y/01"):
        load_dataset(table)
    urls = [("file:///etc/passwd", "cat"), ("https://127.0.0.1:9/a.png", "dog")]
    with pytest.raises(TableError, match=r"line 2: expected a URL of another machine"):
        load_dataset(write_table(tmp_path / "u.csv", urls, ("url", "label")))
    with pytest.raises(TableError, match=r"line 3: expected a URL in 'url', as in the other rows"):
        load_dataset(write_table(tmp_path / "u.csv", [urls[1], ("a.png", "dog")], ("url", "label")))
    with pytest.raises(DatasetError, match="expected a table for --target x, found images alone"):
        load_dataset(photos, target="x")
    with pytest.raises(DatasetError, match=r"digits: .*attach the table with featcache label"):
        load_dataset("digits", labels=table)


def test_images_behind_urls_of_a_table(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    store = fsspec.filesystem("memory")
    rows = []
    for row in range(6):
        store.pipe_file(f"/sources/{row}.png", encoded(row))
        rows.append((f"memory://sources/{row}.png", ["cat", "dog"][row % 2]))
    data = load_dataset(write_table(tmp_path / "t.csv", rows, ("url", "label")))
    (whole,) = data.listed()
    assert whole.ids[0] == "memory://sources/0.png" and whole.images[5].size == (40, 32)
    assert pickle.loads(pickle.dumps(whole.images))[5].size == (40, 32)


def test_numbers_stay_in_the_table(photos, tmp_path):
    table = write_table(tmp_path / "t.csv", rows_of())
    data = load_dataset(photos, labels=table, target="age", split_column="fold")
    assert data.class_names == () and "'age' has numbers" in data.notes[0]
    names = [f"{row}.png" for row in range(50)]
    many = write_images(tmp_path / "many", names)
    rows = [(name, str(row % 25)) for row, name in enumerate(names)]
    numbered = write_table(tmp_path / "n.csv", rows, ("path", "label"))
    assert load_dataset(many, labels=numbered).class_names == tuple(map(str, range(25)))


def test_extract_keeps_the_table_with_the_cache(photos, tmp_path, fake_engine, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = write_table(tmp_path / "t.csv", rows_of())
    words = ["--target", "species", "--split-column", "fold", "--weights", "random:0"]
    assert main(["extract", str(photos), "--labels", str(table), *words, "-o", "c.h5"]) == 0
    capsys.readouterr()
    cache = load("c.h5")
    assert [role for role, _ in cache.splits()] == ["train", "val", "test"]
    ids = [id_ for _, split in cache.splits() for id_ in split.ids]
    ages = dict((row[0], row[2]) for row in rows_of())
    assert cache.table["age"].values.tolist() == [ages[id_] for id_ in ids]
    changed = write_table(table, [(*row[:2], "7", *row[3:]) for row in rows_of()])
    again = extract(
        photos,
        labels=changed,
        target="species",
        split_column="fold",
        weights="random:0",
        output="c.h5",
    )
    pictures, why = find_pictures(load("c.h5"), photos, None, silent)
    assert pictures is not None, why
    assert len(pictures.small([("val", 0), ("test", 3)], 32, silent)) == 2
    (photos / "x" / "04.png").write_bytes(encoded(99))
    with pytest.raises(DatasetError, match="found others"):
        find_pictures(load("c.h5"), photos, None, silent)
    assert again.reused and set(again.load().table["age"].values) == {"7"}


# Tar


def tar_of(path, files, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as archive:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def samples(numbers, **more):
    for row in numbers:
        yield f"{row:04d}.png", encoded(row)
        yield f"{row:04d}.cls", str((0, 1, 10)[row % 3]).encode()
        if more:
            yield f"{row:04d}.json", json.dumps({name: f(row) for name, f in more.items()}).encode()


def test_a_tar_of_class_folders_is_like_the_folder(photos, tmp_path):
    with tarfile.open(tmp_path / "photos.tar", "w") as archive:
        archive.add(photos, ".")
    found, expected = load_dataset(tmp_path / "photos.tar"), load_dataset(photos)
    assert found.digest == expected.digest and found.name == "photos"
    assert pickle.loads(pickle.dumps(found.train.images))[0].size == (40, 32)
    for name in "xy":
        tar_of(
            tmp_path / "many" / f"{name}.tar", [(f"{row}.png", encoded(row)) for row in range(3)]
        )
    assert load_dataset(tmp_path / "many").class_names == ("x", "y")


def test_webdataset_shards(tmp_path):
    for shard in range(3):
        numbers = range(10 * shard, 10 * shard + 10)
        tar_of(tmp_path / "s" / f"set-{shard:03d}.tar", samples(numbers, age=float, site=str))
    data = load_dataset(tmp_path / "s")
    assert data.class_names == ("0", "1", "10") and data.divided_by == "content"
    (whole,) = data.listed()
    assert len(whole) == 30 and whole.ids[11] == "set-001/0011.png" and whole.labels[11] == 2
    assert whole.images[11].size == (40, 32)
    assert data.table["age"].values[11] == 11.0 and data.table["site"].values[3] == "3"
    for pattern in ("set-{000..002}.tar", "set-*.tar", "set-{000,001,002}.tar"):
        assert load_dataset(f"{tmp_path}/s/{pattern}").digest == data.digest, pattern
    assert load_dataset(f"{tmp_path}/s/set-00[01].tar").name == "set-00"
    with pytest.raises(DatasetError, match=r"set-003\.tar: expected the shard that .*003"):
        load_dataset(f"{tmp_path}/s/set-{{000..003}}.tar")
    with pytest.raises(DatasetError, match=r"expected \.tar shards, found none"):
        load_dataset(f"{tmp_path}/s/other-*.tar")


def test_what_is_odd_in_shards_is_named(tmp_path):
    files = [*samples(range(5))]
    files.pop(0)  # 0000 without its image
    files += [("0009.png", encoded(9)), ("0001.txt", b"a cat"), ("0002.jpg", encoded(2, "JPEG"))]
    data = load_dataset(tar_of(tmp_path / "odd.tar", files))
    notes = " ".join(data.notes)
    assert "1 samples without an image ignored: 0000" in notes
    assert "1 samples with several images, of which the first is taken: 0002" in notes
    assert (
        "2 samples whose files do not follow each other, joined by their key: 0001, 0002" in notes
    )
    assert "1 samples without .cls, 0009.png the first" in notes
    (whole,) = data.listed()
    assert whole.ids == ("0001.png", "0002.png", "0003.png", "0004.png", "0009.png")
    assert whole.labels.tolist() == [1, 2, 0, 1, -1]


def test_roles_in_the_names_of_shards(tmp_path):
    for role, numbers in {"train": range(12), "val": range(12, 18)}.items():
        tar_of(tmp_path / f"flowers-{role}-000.tar", samples(numbers))
    data = load_dataset(f"{tmp_path}/flowers-*.tar")
    assert (len(data.train), len(data.test), data.val) == (12, 6, None)
    assert "no test split, so the validation split is taken" in data.notes[-1]


def bad_tars():
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as archive:
        for name, data in samples(range(3)):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    data = whole.getvalue()
    huge = bytearray(data)
    header = tarfile.TarInfo("0000.png")
    header.size = 10**9
    huge[:512] = header.tobuf()
    endless = tarfile.TarInfo("0000.png")
    endless.size = 1 << 62
    longname = tarfile.TarInfo("x" * 300).tobuf(tarfile.GNU_FORMAT)
    longname = bytearray(longname[:512])
    longname[124:136] = b"\x80" + struct.pack(">Q", 1 << 60).rjust(11, b"\0")
    damaged = bytearray(data)
    damaged[data.index(b"0001.png")] ^= 1
    outside = io.BytesIO()
    with tarfile.open(fileobj=outside, mode="w") as archive:
        member = tarfile.TarInfo("../x.png")
        member.size = 3
        archive.addfile(member, io.BytesIO(b"abc"))
    yield "empty", b"", "expected a .tar archive, found a file that is none"
    yield "no members", bytes(10240), "found no file"
    yield "cut short", data[: len(data) // 2], "ends before|unexpected end|end mark"
    end = -(-len(data.rstrip(b"\0")) // 512) * 512
    yield "no end", data[:end], "expected the end mark of a .tar, found none"
    yield "huge", bytes(huge), "expected 1,000,000,000 bytes, found that the file ends before"
    yield "endless", endless.tobuf() + data, "damaged or cut short"
    yield "a long name of an exabyte", bytes(longname) + data, "damaged or cut short"
    yield "a bad header", bytes(damaged), "expected the end mark of a .tar, found something else"
    yield "leads out", outside.getvalue(), "leads out of it"
    yield "gzip", gzip.compress(data), "packed by gzip.*gunzip"
    yield "text", b"hello world" * 100, "expected a .tar archive"


@pytest.mark.parametrize(
    ("data", "said"), [pytest.param(data, said, id=name) for name, data, said in bad_tars()]
)
def test_damaged_and_hostile_tars(tmp_path, data, said):
    (tmp_path / "bad.tar").write_bytes(data)
    with pytest.raises(DatasetError, match=said) as caught:
        load_dataset(tmp_path / "bad.tar")
    assert "\n" not in str(caught.value) and "bad.tar" in str(caught.value)


def test_the_images_of_a_tar_can_be_classified(tmp_path):
    path = tar_of(tmp_path / "new.tar", samples(range(3)))
    places = find_places([path])
    assert [name for _, name in places] == ["0000.png", "0001.png", "0002.png"]
    assert places[2][0].read("0002.png") == encoded(2)


def test_links_in_a_tar_are_not_followed(tmp_path):
    path = tar_of(tmp_path / "links.tar", samples(range(4)))
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("0009.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    data = load_dataset(path)
    assert "1 links and special files in archives ignored, 0009.png the first" in data.notes[0]
    assert all("0009" not in id_ for id_ in ids_of(data))


def test_shards_behind_a_url_are_fetched_once(tmp_path, home):
    fsspec = pytest.importorskip("fsspec")
    store = fsspec.filesystem("memory")
    for shard in range(2):
        path = tar_of(tmp_path / f"{shard}.tar", samples(range(5 * shard, 5 * shard + 5)))
        store.pipe_file(f"/tars/set-{shard:03d}.tar", path.read_bytes())
    for url in ("memory://tars/set-{000..001}.tar", "memory://tars/set-*.tar", "memory://tars"):
        heard = []
        data = load_dataset(url, on_progress=heard.append)
        assert len(ids_of(data)) == 10 and data.path == url
        assert bool(heard) == url.endswith("}.tar"), "fetched once"
    assert len([*(home / "data" / "shards").iterdir()]) == 2
    with pytest.raises(DatasetError, match=r"set-002\.tar: expected a \.tar, found nothing"):
        load_dataset("memory://tars/set-{001..002}.tar")


def test_patterns():
    assert is_tar_pattern("a-{0..3}.TAR") and not is_tar_pattern("a.tar")
    assert [str(one) for one in find_shards("memory://b/s-{08..10}.tar")] == [
        f"memory://b/s-{number}.tar" for number in ("08", "09", "10")
    ]
    with pytest.raises(DatasetError, match=r"expected a range such as .*found \{3\.\.1\}"):
        find_shards("s-{3..1}.tar")


# Hugging Face


def arrow_file(path, columns, features, n_files=1):
    schema = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pa.table(columns)
    table = table.replace_schema_metadata(schema)
    path.mkdir(parents=True)
    names = []
    for number in range(n_files):
        part = table.slice(number * len(table) // n_files, len(table) // n_files)
        names.append(f"data-{number:05d}-of-{n_files:05d}.arrow")
        with (
            pa.OSFile(str(path / names[-1]), "wb") as sink,
            pa.ipc.new_stream(sink, table.schema) as out,
        ):
            out.write_table(part)
    (path / "state.json").write_text(json.dumps({"_data_files": [{"filename": n} for n in names]}))


IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
FEATURES = {
    "image": {"_type": "Image"},
    "label": {"names": ["cat", "dog", "eel"], "_type": "ClassLabel"},
    "coarse": {"names": ["furry", "wet"], "_type": "ClassLabel"},
    "age": {"dtype": "float64", "_type": "Value"},
}


def saved_set(path, splits, hide=()):
    for split, rows in splits.items():
        columns = {
            "image": pa.array([{"bytes": encoded(row), "path": None} for row in rows], IMAGE),
            "label": pa.array([-1 if split in hide else row % 2 for row in rows], pa.int64()),
            "coarse": pa.array([row % 2 for row in rows], pa.int64()),
            "age": pa.array([row / 2 for row in rows], pa.float64()),
            "boxes": pa.array([[[1.0, 2.0]] for _ in rows]),
        }
        arrow_file(path / split, columns, FEATURES, n_files=2)
    (path / "dataset_dict.json").write_text(json.dumps({"splits": list(splits)}))
    return path


def test_a_saved_hugging_face_set(tmp_path):
    splits = {"train": range(8), "validation": range(8, 12), "test": range(12, 16)}
    data = load_dataset(saved_set(tmp_path / "pets", splits))
    assert data.name == "pets" and data.class_names == ("cat", "dog", "eel")
    assert {role: len(split) for role, split in data.splits()} == dict(train=8, val=4, test=4)
    assert data.train.ids[7] == "train/000007" and data.train.labels.tolist() == [0, 1] * 4
    assert data.test.images[3].tobytes() == colour_image(0, 15).tobytes()
    assert data.table["coarse"].values[:2].tolist() == ["furry", "wet"]
    assert any("columns not kept: boxes" in note for note in data.notes)
    assert any("labels from 'label'; there are also 'coarse'" in note for note in data.notes)
    assert pickle.loads(pickle.dumps(data.test.images))[3].size == (40, 32)
    other = load_dataset(tmp_path / "pets", target="coarse")
    assert other.class_names == ("furry", "wet")


def test_a_hugging_face_set_without_labels_to_test_on(tmp_path):
    splits = {"train": range(8), "validation": range(8, 12), "test": range(12, 16)}
    data = load_dataset(saved_set(tmp_path / "pets", splits, hide=("test",)))
    assert (len(data.train), data.val, len(data.test)) == (8, None, 4)
    assert data.test.ids[0] == "validation/000000" and len(data.table) == 12
    notes = " ".join(data.notes)
    assert "the test split has no labels and is left out" in notes and "no test split" in notes


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda p: (p / "train/state.json").write_text("{"), "expected '_data_files'"),
        (lambda p: (p / "dataset_dict.json").write_text('{"splits": ["../x"]}'), "name of a file"),
        (
            lambda p: (p / "train/state.json").write_text(
                '{"_data_files": [{"filename": "../../etc/passwd"}]}'
            ),
            "expected the name of a file",
        ),
        (lambda p: (p / "train/data-00000-of-00002.arrow").write_bytes(b"no"), "an Arrow stream"),
        (lambda p: (p / "train/data-00000-of-00002.arrow").unlink(), "an Arrow stream"),
        (
            lambda p: (p / "train/data-00000-of-00002.arrow").write_bytes(
                (p / "train/data-00000-of-00002.arrow").read_bytes()[:3000]
            ),
            "an Arrow stream",
        ),
    ],
)
def test_damaged_hugging_face_sets(tmp_path, damage, said):
    path = saved_set(tmp_path / "pets", {"train": range(8), "test": range(8, 12)})
    damage(path)
    with pytest.raises(DatasetError, match=said) as caught:
        load_dataset(path)
    assert "\n" not in str(caught.value)


def test_a_saved_set_reads_no_file_that_it_names(tmp_path):
    columns = {
        "image": pa.array([{"bytes": None, "path": "/etc/passwd"}] * 2, IMAGE),
        "label": pa.array([0, 1], pa.int64()),
    }
    arrow_file(tmp_path / "s", columns, {"image": {"_type": "Image"}})
    data = load_dataset(tmp_path / "s")
    with pytest.raises(DatasetError, match=r"expected the bytes of an image.*'/etc/passwd' alone"):
        data.listed()[0].images[0]
    with pytest.raises(DatasetError, match=r"expected a column 'x' with images"):
        load_dataset(tmp_path / "s", path_column="x")


def test_the_hub_needs_its_package(tmp_path):
    if Path(tmp_path, "hf").exists() or _has("datasets"):
        pytest.skip("datasets is installed")
    with pytest.raises(DatasetError, match=r"hf:cifar100: .*pip install 'featcache\[hf\]'"):
        load_dataset("hf:cifar100")


def _has(module):
    from importlib.util import find_spec

    return find_spec(module) is not None


# torchvision


@pytest.fixture
def torchvision():
    return pytest.importorskip("torchvision")


def write_mnist(folder, rng):
    folder.mkdir(parents=True)
    for name, n in {"train": 6, "t10k": 4}.items():
        images = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        head = struct.pack(">4i", 0x803, n, 28, 28)
        (folder / f"{name}-images-idx3-ubyte").write_bytes(head + images.tobytes())
        labels = (np.arange(n) % 10).astype(np.uint8)
        head = struct.pack(">2i", 0x801, n)
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(head + labels.tobytes())


def test_torchvision_arrays(torchvision, tmp_path):
    write_mnist(tmp_path / "torchvision/MNIST/MNIST/raw", np.random.default_rng(0))
    data = load_dataset("torchvision:MNIST", data_root=tmp_path)
    assert (len(data.train), len(data.test)) == (6, 4) and data.name == "torchvision-MNIST"
    assert data.test.ids[3] == "test/00003" and data.test.labels.tolist() == [0, 1, 2, 3]
    assert len(data.class_names) == 10 and data.train.images[0].size == (28, 28)


def test_torchvision_files(torchvision, tmp_path):
    folder = tmp_path / "torchvision/EuroSAT/eurosat/2750"
    write_images(folder, [f"{name}/{row}.jpg" for name in ("Forest", "River") for row in range(4)])
    data = load_dataset("torchvision:EuroSAT", data_root=tmp_path)
    assert data.divided_by == "content" and data.class_names == ("Forest", "River")
    (whole,) = data.listed()
    assert whole.ids[4] == "River/0.jpg" and whole.labels.tolist() == [0] * 4 + [1] * 4


def test_torchvision_names_that_are_not_read():
    with pytest.raises(
        DatasetError, match=r"expected one of CIFAR10, .*; did you mean torchvision:CIFAR100"
    ):
        load_dataset("torchvision:cifar100")
    with pytest.raises(DatasetError, match="found none of these; unpack it and name its folder"):
        load_dataset("torchvision:Kinetics")


# Names that are not UTF-8


def test_names_that_are_not_utf_8_from_extract_to_export(
    tmp_path, fake_engine, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for row in range(40):
        folder = os.fsencode(tmp_path / "odd") + (b"/caf\xe9", b"/th\xe9")[row % 2]
        os.makedirs(folder, exist_ok=True)
        with open(folder + b"/\xff%02d.png" % row, "wb") as stream:
            stream.write(encoded(row))
    for words in (
        ["extract", "odd", "--weights", "random:0", "-o", "c.h5"],
        ["info", "c.h5", "--json"],
        ["probe", "c.h5", "--save-head", "head.safetensors"],
        ["audit", "c.h5", "--csv", "audit"],
        ["export", "c.h5", "--to", "parquet", "-o", "c.parquet"],
        ["export", "c.h5", "--to", "npz", "-o", "c.npz"],
        ["verify", "c.h5"],
    ):
        assert main(words) == 0, (words, capsys.readouterr().err)
        capsys.readouterr()
    cache = load("c.h5")
    assert os.fsencode(cache.class_names[0]) == b"caf\xe9"
    assert load_head("head.safetensors").class_names == cache.class_names
    assert all(
        os.fsencode(id_).startswith((b"caf\xe9/\xff", b"th\xe9/\xff")) for id_ in cache.train.ids
    )
