"""`featcache import`: features of other programs become a cache on which everything works."""

from __future__ import annotations

import json

import h5py
import numpy as np
import pytest
from caches import ingredients, write_roles
from conftest import write_gaussian_cache

import featcache
from featcache import Cache, export, import_features, load, verify
from featcache.cli import main
from featcache.errors import (
    CacheMismatchError,
    DatasetError,
    OutputError,
    ShapeMismatchError,
    TableError,
)
from featcache.sampling import drawn_sides, text_hashes

N, D = 60, 6


def clouds(n=N, dim=D, n_classes=3, seed=0):
    """Return float32 (n, dim) features of classes that a head can tell, and labels."""
    generator = np.random.default_rng(seed)
    labels = np.arange(n) % n_classes
    centres = 4 * generator.normal(size=(n_classes, dim))
    return (centres[labels] + generator.normal(size=(n, dim))).astype(np.float32), labels


def whole(cache):
    """Return features by id of all splits."""
    return {
        name: row
        for _, split in cache.splits()
        for name, row in zip(split.ids, np.asarray(split.features), strict=True)
    }


@pytest.fixture
def features():
    return clouds()[0]


def test_arrays_in_memory_become_a_cache(tmp_path):
    values, labels = clouds()
    names = np.array(["кошка", "собака", "猫"])
    cache = Cache.from_arrays(values, names[labels], path=tmp_path / "a.h5")
    assert (
        cache.class_names == ("кошка", "собака", "猫") and len(cache.train) + len(cache.test) == N
    )
    found = whole(cache)
    for row in range(N):
        assert np.array_equal(found[str(row)], values[row])
    sides = drawn_sides(text_hashes([str(row) for row in range(N)]))
    assert {int(name) for name in cache.test.ids} == set(np.flatnonzero(sides).tolist())
    assert cache.meta["weights"] == "imported, not computed here" and cache.meta["split"] == "id"
    verify(cache.path)
    assert featcache.probe(cache, check=False).top1 > 0.8


def test_given_splits_labels_and_hashes(tmp_path, features):
    splits = ["training", "Valid", "TEST"] * (N // 3)
    hashes = np.random.default_rng(0).integers(0, 256, (N, 32), np.uint8)
    cache = Cache.from_arrays(
        features,
        np.arange(N) % 4 - 1,
        path=tmp_path / "a.h5",
        class_names=["a", "b", "c"],
        ids=[f"i{row}" for row in range(N)],
        splits=splits,
        hashes=hashes,
    )
    assert [len(split) for _, split in cache.splits()] == [20, 20, 20]
    assert np.array_equal(cache.val.content_hashes, hashes[1::3])
    assert cache.train.labels.tolist() == (np.arange(N) % 4 - 1)[::3].tolist()
    drawn = Cache.from_arrays(features, path=tmp_path / "b.h5", hashes=hashes)
    assert drawn.meta["split"] == "content" and len(drawn.test) == drawn_sides(hashes).sum()
    assert drawn.class_names == () and set(drawn.train.labels.tolist()) == {-1}


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"features": np.zeros((0, 4))}, DatasetError, "expected features of one or more images"),
        ({"features": np.zeros(5)}, ShapeMismatchError, r"\(N, D\) or maps .* found \(5,\)"),
        ({"features": np.array([["a"]])}, ShapeMismatchError, "found <U1"),
        ({"features": np.zeros((2, 3), complex)}, ShapeMismatchError, "found complex128"),
        ({"features": [[1.0, np.nan]]}, DatasetError, "NaN or infinity in row 0"),
        ({"features": [[1.0, 1e300]]}, DatasetError, "too large for float32 in row 0"),
        ({"ids": ["a", "b"]}, ShapeMismatchError, "expected 3 ids, one per row"),
        ({"ids": ["a", "b", "a"]}, DatasetError, "found twice or more: 'a'; give others"),
        ({"labels": [0.5, 1, 2]}, DatasetError, "whole numbers or the names of classes"),
        ({"labels": [0, 1]}, ShapeMismatchError, "expected 3 labels, found 2"),
        ({"labels": [0, 1, 9], "class_names": ["a", "b"]}, DatasetError, "expected 0 to 1"),
        ({"labels": ["a", "b", "z"], "class_names": ["a", "b"]}, DatasetError, "found 'z'"),
        ({"splits": ["train", "test", "later"]}, DatasetError, "found 'later' in row 2"),
        ({"hashes": np.zeros((3, 8))}, ShapeMismatchError, r"uint8 \(N, 32\), found float64"),
        ({"path": "features.npz"}, OutputError, r"name it features.npz.h5"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, monkeypatch, changes, error, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=said) as caught:
        Cache.from_arrays(**{"features": np.ones((3, 4), np.float32), **changes})
    assert "\n" not in str(caught.value) and list(tmp_path.rglob("*.h5")) == []


def test_dtypes_are_kept_or_said(tmp_path, features):
    for dtype, kept, said in (
        ("float16", "float16", []),
        ("float64", "float32", ["features: float64 is kept as float32, rounded"]),
        ("uint8", "float32", ["features: uint8 is kept as float32, exactly"]),
        (">f4", "float32", []),
    ):
        notes = []
        values = np.abs(features).astype(dtype)
        cache = Cache.from_arrays(values, path=tmp_path / f"{dtype[-3:]}.h5", on_note=notes.append)
        assert cache.meta["dtype"] == kept and notes == said
        assert np.array_equal(cache.test.features[0], values[int(cache.test.ids[0])].astype(kept))


def test_the_same_again_is_there_already(tmp_path, features):
    np.save(tmp_path / "f.npy", features)
    first = import_features(tmp_path / "f.npy")
    assert first.cache.name.startswith("f-imported-") and not first.existed
    assert import_features(tmp_path / "f.npy").existed
    np.save(tmp_path / "g.npy", features + 1)
    with pytest.raises(OutputError, match="with other content; use --force"):
        import_features(tmp_path / "g.npy", first.cache)
    assert not import_features(tmp_path / "g.npy", first.cache, force=True).existed


def test_a_plain_array_with_a_file_of_ids(tmp_path, features):
    np.save(tmp_path / "f.npy", features)
    (tmp_path / "ids.txt").write_text("\n".join(f"img/{row}.jpg" for row in range(N)), "utf-8-sig")
    made = import_features(tmp_path / "f.npy", ids=tmp_path / "ids.txt")
    assert made.layout == "an array (N, D)" and made.split == "id"
    assert np.array_equal(whole(made.load())["img/7.jpg"], features[7])
    assert "numbers of the rows" in import_features(tmp_path / "f.npy").notes[0]
    (tmp_path / "short.txt").write_text("a\nb\n")
    with pytest.raises(ShapeMismatchError, match=r"short.txt: expected 60 ids.*found 2"):
        import_features(tmp_path / "f.npy", ids=tmp_path / "short.txt")
    (tmp_path / "latin.txt").write_bytes("Käse".encode("latin-1"))
    with pytest.raises(DatasetError, match="expected UTF-8, found the byte 0xe4 at 1"):
        import_features(tmp_path / "f.npy", ids=tmp_path / "latin.txt")


def test_named_arrays(tmp_path):
    values, labels = clouds()
    ids = np.array([f"n{row}" for row in range(N)])
    np.savez(tmp_path / "f.npz", embeddings=values, labels=labels, filenames=ids, seed=7)
    made = import_features(tmp_path / "f.npz")
    assert made.layout == "named arrays, features in 'embeddings'" and made.n_classes == 3
    assert np.array_equal(whole(made.load())["n4"], values[4])
    np.savez(tmp_path / "two.npz", one=values, other=values)
    with pytest.raises(DatasetError, match=r"found one float32 \(60, 6\), other.*--array"):
        import_features(tmp_path / "two.npz")
    assert import_features(tmp_path / "two.npz", array="other").feature_dim == D
    with pytest.raises(DatasetError, match="expected an array 'third'"):
        import_features(tmp_path / "two.npz", array="third")
    np.save(tmp_path / "scalar.npy", np.float32(3))
    with pytest.raises(DatasetError, match="expected features of one or more images, found none"):
        import_features(tmp_path / "scalar.npy")


def test_thingsvision(tmp_path, features):
    folder = tmp_path / "out"
    folder.mkdir()
    np.save(folder / "features.npy", features)
    (folder / "file_names.txt").write_text("\n".join(f"images/{n}.jpg" for n in range(N)))
    made = import_features(folder)
    assert made.layout == "thingsvision"
    assert np.array_equal(whole(made.load())["images/3.jpg"], features[3])
    (folder / "features.npy").unlink()
    with h5py.File(folder / "features.h5", "w") as file:
        file["features"] = features
    again = import_features(folder)
    assert again.layout == "thingsvision" and again.existed


def test_clip_retrieval(tmp_path, features):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    for folder in ("img_emb", "metadata"):
        (tmp_path / "out" / folder).mkdir(parents=True)
    for number, rows in enumerate((slice(0, 10), slice(10, N))):
        np.save(tmp_path / f"out/img_emb/img_emb_{number}.npy", features[rows].astype("float16"))
        paths = [f"/data/{n}.jpg" for n in range(N)][rows]
        table = pa.table({"image_path": paths, "caption": ["a cat"] * len(paths)})
        parquet.write_table(table, tmp_path / f"out/metadata/metadata_{number}.parquet")
    made = import_features(tmp_path / "out")
    assert made.layout == "clip-retrieval" and made.load().meta["dtype"] == "float16"
    assert np.array_equal(whole(made.load())["/data/11.jpg"], features[11].astype("float16"))
    (tmp_path / "out/metadata/metadata_1.parquet").unlink()
    with pytest.raises(DatasetError, match=r"as many rows in metadata/ as in img_emb/ \(60\)"):
        import_features(tmp_path / "out")


def test_patches_of_slides_stay_together(tmp_path, features):
    folder = tmp_path / "clam" / "h5_files"
    folder.mkdir(parents=True)
    for number in range(20):
        with h5py.File(folder / f"slide{number}.h5", "w") as file:
            rows = features[3 * number : 3 * number + 3]
            file.create_dataset("features", data=rows, chunks=True, compression="gzip")
            file["coords"] = np.array([[0, 0], [0, 256], [256, 0]])
    made = import_features(tmp_path / "clam")
    assert "CLAM" in made.layout and made.split == "group"
    cache = made.load()
    assert np.array_equal(whole(cache)["slide7/0_256"], features[22])
    slides = [{name.partition("/")[0] for name in split.ids} for _, split in cache.splits()]
    assert not slides[0] & slides[1] and len(slides[0] | slides[1]) == 20


def test_a_vector_per_slide_or_image(tmp_path, features):
    for number in range(4):
        with h5py.File(tmp_path / f"s{number}.h5", "w") as file:
            file["features"] = features[number]
    assert np.array_equal(whole(import_features(tmp_path).load())["s2"], features[2])
    folder = tmp_path / "npy"
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for number in range(3):
            np.save(folder / name / f"{number}.npy", features[number] + len(name) * (name == "dog"))
    found = whole(import_features(folder).load())
    assert np.array_equal(found["cat/1"], features[1]) and len(found) == 6


def test_anndata(tmp_path, features):
    with h5py.File(tmp_path / "a.h5ad", "w") as file:
        file.attrs["encoding-type"] = "anndata"
        file["X"] = features
        obs = file.create_group("obs")
        obs.attrs["_index"] = "_index"
        obs["_index"] = [f"cell{n}" for n in range(N)]
        obs["depth"] = features[:, 0]
        obs["type/codes"] = (np.arange(N) % 3 - 1).astype(np.int8)
        obs["type/categories"] = ["B", "T"]
    made = import_features(tmp_path / "a.h5ad")
    assert made.layout == "AnnData (X, obs)"
    cache = made.load()
    assert np.array_equal(whole(cache)["cell9"], features[9])
    rows = [int(name[4:]) for _, split in cache.splits() for name in split.ids]
    assert cache.table["type"].values.tolist() == [[None, "B", "T"][row % 3] for row in rows]
    assert np.allclose(cache.table["depth"].values, features[rows, 0])
    with h5py.File(tmp_path / "s.h5ad", "w") as file:
        file["X/data"], file["X/indices"], file["X/indptr"] = features[0], [0], [0]
        file["obs/_index"] = ["a"]
    with pytest.raises(DatasetError, match="found a sparse matrix"):
        import_features(tmp_path / "s.h5ad")


@pytest.mark.parametrize("to", ["npz", "safetensors", "parquet", "csv"])
def test_our_own_exports_come_back(tmp_path, to):
    if to == "parquet":
        pytest.importorskip("pyarrow")
    names = ["кошка", "b", "a"]
    path = write_roles(tmp_path / "a.h5", ingredients(class_names=names), train=6, val=3, test=3)
    before = load(path)
    made = import_features(export(path, to).output, tmp_path / "back.h5")
    after = made.load()
    assert made.layout == "featcache export" and made.split == "given"
    assert after.class_names == tuple(names) and made.n_val == 3
    for (role, one), (_, other) in zip(before.splits(), after.splits(), strict=True):
        assert one.ids == other.ids and np.array_equal(one.labels, other.labels), role
        assert one.features.tobytes() == other.features.tobytes()
        if to in ("npz", "safetensors"):
            assert np.array_equal(one.content_hashes, other.content_hashes)


def test_parquet_of_others(tmp_path, features):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    frame = pandas.DataFrame({"path": [f"{n}.png" for n in range(N)], "vec": list(features)})
    frame["note"], frame["tags"] = "x", [["a"], ["b", "c"]] * (N // 2)
    frame["odd"] = [{"deep": [1]}] * N
    frame.to_parquet(tmp_path / "lists.parquet")
    made = import_features(tmp_path / "lists.parquet")
    cache = made.load()
    assert np.array_equal(whole(cache)["5.png"], features[5])
    assert set(cache.table.columns) == {"note", "tags"} and "'odd'" in made.notes[0]
    featcache.label(cache, {"id": ["5.png"], "mine": ["y"]})
    assert import_features(tmp_path / "lists.parquet").existed  # and the table stays
    assert list(load(made.cache).table.columns) == ["mine"]
    frame["vec"] = [row[: 1 + number % 2] for number, row in enumerate(features)]
    frame.to_parquet(tmp_path / "ragged.parquet")
    with pytest.raises(DatasetError, match="lists of one length"):
        import_features(tmp_path / "ragged.parquet")


@pytest.mark.torch
@pytest.mark.parametrize("legacy", [False, True])
def test_a_tensor_that_torch_saved(tmp_path, features, legacy):
    torch = pytest.importorskip("torch")
    options = {"_use_new_zipfile_serialization": not legacy}
    torch.save(torch.from_numpy(features), tmp_path / "lone.pt", **options)
    torch.save({"features": torch.from_numpy(features)}, tmp_path / "named.pth", **options)
    for name in ("lone.pt", "named.pth"):
        assert np.array_equal(whole(import_features(tmp_path / name).load())["8"], features[8])


def test_hostile_and_damaged_files_are_one_line(tmp_path, features, capsys):
    np.save(tmp_path / "objects.npy", np.array([{}], object), allow_pickle=True)
    (tmp_path / "cut.npy").write_bytes((tmp_path / "objects.npy").read_bytes()[:20])
    for name in ("text.npz", "text.h5", "text.parquet", "text.safetensors", "text.pt", "text.csv"):
        (tmp_path / name).write_bytes(b"no such thing\n" * 10)
    (tmp_path / "text.pkl").write_bytes(b"")
    np.save(tmp_path / "whole.npy", features)
    damaged = (tmp_path / "whole.npy").read_bytes().replace(b"'shape'", b"'sh\x01pe")
    (tmp_path / "header.npy").write_bytes(damaged)
    (tmp_path / "whole.npy").unlink()
    with h5py.File(tmp_path / "good.h5", "w") as file:
        file["features"] = features
    data = bytearray((tmp_path / "good.h5").read_bytes())
    data[100:400] = bytes(300)
    (tmp_path / "broken.h5").write_bytes(data)
    with h5py.File(tmp_path / "outside.h5", "w") as file:
        file.create_dataset("x", (3, 4), "f4", external=[("/etc/passwd", 0, 48)])
    with h5py.File(tmp_path / "bomb.h5", "w") as file:
        file.create_dataset("x", (1 << 34, 4), "f4", chunks=(1 << 14, 4), compression="gzip")
    with h5py.File(tmp_path / "linked.h5", "w") as file:
        file["features"] = h5py.ExternalLink(str(tmp_path / "good.h5"), "features")
    (tmp_path / "empty").mkdir()
    names = [path.name for path in tmp_path.iterdir() if path.name != "good.h5"]
    for name in [*names, "missing.npy"]:
        assert main(["import", str(tmp_path / name)]) == 1, name
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1 and name in said, said


def test_a_table_gives_labels_and_splits(tmp_path, features, capsys):
    np.save(tmp_path / "f.npy", features)
    lines = ["id,species,fold,age"]
    lines += [
        f"{n},{'cat' if n % 2 else 'dog'},{'test' if n < 9 else 'train'},{n}" for n in range(N)
    ]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    arguments = ["import", str(tmp_path / "f.npy"), "--labels", str(tmp_path / "t.csv"), "--json"]
    assert main([*arguments, "--target", "species", "--split-column", "fold"]) == 0
    made = json.loads(capsys.readouterr().out)
    cache = load(made["cache"])
    assert cache.class_names == ("cat", "dog") and len(cache.test) == 9
    assert [cache.class_names[label] for label in cache.test.labels[:2]] == ["dog", "cat"]
    assert cache.table["age"].values.tolist()[-9:] == list("012345678")
    for words, code, said in (
        (["--target", "colour"], 2, "expected a column 'colour'"),
        (["--by", "species"], 1, "expected rows of these images"),
        (["--split-column", "species"], 1, "expected train, val or test as splits"),
    ):
        assert main([*arguments, *words]) == code
        assert said in capsys.readouterr().err
    assert main(["import", str(tmp_path / "f.npy"), "--target", "species"]) == 2
    with pytest.raises(TableError, match="expected a table in labels"):
        import_features(tmp_path / "f.npy", target="species")


def test_everything_but_extraction_works(tmp_path, capsys):
    values, labels = clouds(90)
    np.savez(tmp_path / "f.npz", features=values, labels=labels)
    assert main(["import", str(tmp_path / "f.npz"), "-o", str(tmp_path / "c.h5")]) == 0
    said = capsys.readouterr().out
    assert "recognised: named arrays" in said and "next: featcache probe" in said
    cache, other = str(tmp_path / "c.h5"), str(tmp_path / "d.h5")
    np.savez(tmp_path / "g.npz", features=values + 1, labels=labels)
    assert main(["import", str(tmp_path / "g.npz"), "-o", other]) == 0
    for words in (
        ["info", cache],
        ["verify", cache],
        ["probe", cache, "--save-head", str(tmp_path / "head")],
        ["probe", cache, "--knn", "3"],
        ["probe", cache, "--shots", "1", "--seeds", "1"],
        ["audit", cache],
        ["compare"],
        ["export", cache, "-o", str(tmp_path / "y.npz")],
    ):
        assert main(words) == 0, (words, capsys.readouterr().err)
    assert main(["diff", cache, other]) == 1
    capsys.readouterr()
    assert main(["finetune", "digits", "--method", "frozen", "--cache", cache]) == 2
    assert capsys.readouterr().err.count("error: ") == 1
    capsys.readouterr()
    (tmp_path / "x.png").write_bytes(b"")
    heads = [str(path) for path in tmp_path.glob("head*")]
    assert main(["predict", str(tmp_path / "x.png"), "--head", heads[0]]) == 1
    said = capsys.readouterr().err
    assert "found imported ones" in said and said.count("\n") == 1


def test_a_report_of_imported_features(tmp_path, capsys):
    for package in ("bokeh", "jinja2", "matplotlib"):
        pytest.importorskip(package)
    values, labels = clouds(90)
    splits = ["train", "train", "val", "test", "test"] * 18
    cache = Cache.from_arrays(values, labels, splits=splits, path=tmp_path / "c.h5")
    assert main(["probe", str(cache.path)]) == 0
    assert main(["report", str(cache.path), "-o", str(tmp_path / "r.html")]) == 0
    page = (tmp_path / "r.html").read_text("utf-8")
    assert "imported" in page and "featcache import" in page
    assert "36 training, 18 validation and 36 test images" in page


def test_caches_of_one_backbone_go_together(tmp_path):
    values, labels = clouds(90)

    def part(name, rows, **options):
        ids = [f"{name}{row}" for row in rows]
        given = {"ids": ids, "path": tmp_path / f"{name}.h5", "name": name, **options}
        return Cache.from_arrays(values[rows], labels[rows], **given)

    first, second = range(60), range(60, 90)
    a, b = part("a", first, made_by="DINOv2 g"), part("b", second, made_by="DINOv2 g")
    both = featcache.merge([a, b], tmp_path / "both.h5").load()
    assert len(both.train) + len(both.test) == 90 and "DINOv2 g" in both.meta["weights"]
    assert featcache.probe(a, test=b, check=False).top1 > 0.8
    other, unnamed = part("c", second, made_by="CLIP"), part("d", second)
    for stranger in (other, unnamed, write_gaussian_cache(tmp_path / "g.h5")):
        with pytest.raises(CacheMismatchError, match="weights_sha256"):
            featcache.merge([a, stranger], tmp_path / "none.h5")
    values += 1
    with pytest.raises(OutputError, match="with other content"):
        part("a", first, made_by="DINOv2 g")
