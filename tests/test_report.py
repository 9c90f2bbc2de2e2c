"""The page that `featcache.report` writes, read without a browser."""

from __future__ import annotations

import base64
import html
import io
import json
import re
import shlex
import socket
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from caches import SplitArrays, write_cache
from PIL import Image
from reports import (
    HOSTILE,
    add_finetune,
    cache_of_images,
    cache_of_names,
    clouds,
    image_folder_of,
    probed,
    provenance,
)

from featcache import few_shot, load, load_dataset, worst_errors
from featcache.cli import main
from featcache.errors import (
    CacheMismatchError,
    DatasetError,
    EngineUnavailableError,
    FeatcacheError,
    OutputError,
    RecipeError,
)
from featcache.progress import silent
from featcache.reporting.pictures import find_pictures
from featcache.reporting.provenance import in_words
from featcache.reporting.report import report

pytest.importorskip("bokeh")
pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

CLASSES = ("cat", "dog", "eel")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A report of a cache with images, a probe, a curve and a fine-tune; and its folder."""
    root = tmp_path_factory.mktemp("report")
    images = image_folder_of(root / "pets", CLASSES)
    cache = cache_of_images(root / "cache" / "pets.h5", images)
    runs = root / "cache" / "runs"
    probed(cache, runs)
    few_shot(cache, shots=(1, 2, "full"), seeds=2, runs=runs)
    add_finetune(cache, runs, top1=1.0)
    return report(cache, dataset=images), root


@pytest.fixture(scope="module")
def page(made):
    return made[0].page.read_text(encoding="utf-8")


def points_in(page, key="d1"):
    """Return what the page's script is given."""
    data = re.search(f'<script type="text/plain" id="{key}-points">(.*?)</script>', page)[1]
    return json.loads(zlib.decompress(base64.b64decode(data)))


def visible(page):
    """Return the text of a page, without scripts, styles and tags."""
    bare = re.sub(r"<(script|style|svg)\b.*?</\1>", "", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", bare)).split())


def test_the_result_says_what_was_written(made):
    result, root = made
    assert result.page == root / "cache" / "report.html"
    assert result.size_bytes == result.page.stat().st_size
    assert 0 < result.thumbnail_bytes < result.size_bytes
    assert (result.datasets, result.n_points, result.n_runs) == (("pets",), 36, 3)
    assert result.thumbnails == "all" and result.notes == ()
    assert {path.parent.name for path in result.figures} == {"report-figures"}
    stems = {path.name for path in result.figures}
    for name in ("accuracy-over-time", "learning-curves", "regularisation-path", "few-shot",
                 "confusion", "per-class", "reliability"):  # fmt: skip
        assert {f"{name}.png", f"{name}.svg"} <= stems
    assert "map.png" in stems
    assert all(path.stat().st_size for path in result.figures)
    assert str(result.page) in result._repr_html_()


def test_every_section_is_there_and_linked(page):
    for name in ("comparison", "probe", "features", "health", "provenance"):
        assert page.count(f'href="#d1-{name}"') == page.count(f'id="d1-{name}"') == 1
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert page.count("<h1") == page.count("<main") == page.count("<nav") == 1
    assert 'class="skip" href="#content"' in page and 'lang="en"' in page
    assert page.count("<svg") >= 7


def test_figures_come_in_the_widths_of_screens(page):
    kinds = re.findall(r'<svg [^>]*class="(\w+)"', page)
    assert kinds.count("plain") == kinds.count("narrow") >= 7
    assert "wide" not in kinds, "the learning curves stand beside accuracy against time"


def test_provenance_is_in_words():
    assert in_words("images_per_s", 112.16106159275859) == ("images per second", ["112"])
    assert in_words("wall_s", 134.494) == ("extraction time", ["2\u00a0min"])
    stages = {"engine_s": 133.595, "waiting_for_pixels_s": 0.898}
    assert in_words("stages_s", stages) == (
        "time by stage",
        ["engine 2\u00a0min; waiting for pixels 898\u00a0ms"],
    )
    pixels = {"size": 64, "mean": [0.485, 0.456], "reducing_gap": 2.0}
    assert in_words("preprocess", pixels)[1] == ["size 64; mean 0.485, 0.456; reducing gap 2"]
    created = in_words("created", "2026-11-07T18:07:25+00:00")[1]
    assert created == ["7 November 2026, 18:07 UTC"]
    assert in_words("created", "then")[1] == ["then"] and in_words("cuts", [])[1] == ["none"]
    names = in_words("class_names", [f"c{n}" for n in range(5000)])[1]
    assert len(names) == 21 and names[-1] == "… and 4,980 more"


def test_a_page_has_one_accuracy_of_a_test_set(made, page):
    root = made[1]
    text = visible(page)
    said = re.search(r"top-1 of the probe is ([\d.]+).% on all test images", text)
    evaluation = json.loads(next((root / "cache" / "runs").glob("*-probe-*/run.json")).read_text())
    assert float(said[1]) == pytest.approx(100 * evaluation["top1"], abs=0.01)
    assert "top-1 of a head of the audit's own" not in text


def test_nothing_is_fetched(page):
    policy = html.unescape(re.search(r'Content-Security-Policy" content="([^"]+)"', page)[1])
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-inline" not in policy.split("script-src")[1].split(";")[0]
    own = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)  # Bokeh's names its home
    for found in re.findall(r'\b(?:src|href)="([^"]*)"', own):
        assert found.startswith(("data:image/webp;base64,", "#")), found[:80]
    assert "@import" not in own and "url(http" not in own


def test_points_are_what_the_cache_has(made, page):
    cache = load(made[1] / "cache" / "pets.h5")
    points = points_in(page)
    assert points["ids"] == [*cache.train.ids, *cache.test.ids]
    assert points["kinds"]["class"]["of"] == [*cache.train.labels, *cache.test.labels]
    assert points["kinds"]["class"]["names"] == [*CLASSES, "no label"]
    assert points["kinds"]["split"]["of"] == [0] * len(cache.train) + [1] * len(cache.test)
    features = np.concatenate([cache.train.features, cache.test.features]).astype(np.float64)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    cosine = unit @ unit.T
    np.fill_diagonal(cosine, -2)
    assert np.array_equal(points["neighbours"], np.argsort(-cosine, axis=1)[:, :10])
    assert len(points["thumbs"]) == 36 and all(points["thumbs"])
    # Both directions have the same scale, and the wider one fills the square.
    centred = features - features.mean(axis=0)
    directions = np.linalg.svd(centred, full_matrices=False)[2][:2]
    directions *= np.sign(directions[[0, 1], np.abs(directions).argmax(axis=1)])[:, None]
    projected = centred @ directions.T
    places = np.stack((points["x"], points["y"]), axis=1)
    scale = np.ptp(projected, axis=0).max()
    assert np.abs(np.diff(places, axis=0) - np.diff(projected, axis=0) / scale).max() < 4e-4
    assert places.max() == 1 and places.min() == 0


def test_the_table_is_sorted_by_price(made, page):
    table = re.search(r'<table class="runs">.*?</table>', page, re.DOTALL)[0]
    methods = re.findall(r'<th scope="row"><bdi>(.*?)</bdi>', table)
    assert methods == ["full", "probe lbfgs"]
    assert table.count('scope="col"') == 6


def test_mistakes_and_health_have_thumbnails(page):
    said = visible(page)
    assert "Near-duplicates" in said and "Likely mislabelled" in said and "Outliers" in said
    shown = page.count('<img class="thumb" src="data:image/webp;base64,')
    assert shown == page.count('<img class="thumb"') > 0


def test_commands_can_be_typed(made, page):
    lines = [
        html.unescape(re.sub(r"<[^>]+>", "", found))
        for found in re.findall(r"<pre><code>(.*?)</code></pre>", page, re.DOTALL)
    ]
    verbs = [shlex.split(line)[:2] for line in lines]
    names = ["extract", "finetune", "probe", "probe", "report"]
    assert sorted(verbs) == [["featcache", name] for name in names]
    cache = str(made[1] / "cache" / "pets.h5")
    assert shlex.split(lines[0])[2] == str(made[1] / "pets")
    named = ["--dataset", str(made[1] / "pets")]
    assert shlex.split(lines[-1])[2:] == [cache, *named, "--output", str(made[0].page)]


def test_the_same_again_replaces_the_page_and_forgets_old_figures(made, tmp_path):
    cache = made[1] / "cache" / "pets.h5"
    target = tmp_path / "page.html"
    first = report(cache, output=target, health=False)
    again = report(cache, output=target, runs=tmp_path / "none", health=False)
    assert (first.n_runs, again.n_runs) == (3, 0)
    left = {path.name for path in (tmp_path / "page-figures").iterdir()}
    assert left == {"map.png"} and {path.name for path in again.figures} == left
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_map_of_some_images_says_so(made, tmp_path):
    options = {"runs": tmp_path / "none", "health": False, "output": tmp_path}
    result = report(made[1] / "cache" / "pets.h5", points=10, thumbnails="none", **options)
    text = result.page.read_text(encoding="utf-8")
    points = points_in(text)
    assert result.n_points == len(points["ids"]) == len(set(points["ids"])) == 10
    assert np.max(points["neighbours"]) < 10 and result.thumbnail_bytes == 0
    assert "a random sample of 10 of the 36 images" in visible(text)
    assert "<img" not in text


def test_images_that_were_skipped_do_not_shift_the_others(tmp_path):
    images = image_folder_of(tmp_path / "pets", CLASSES)
    cache = load(cache_of_images(tmp_path / "pets.h5", images, skip=2))
    pictures, why = find_pictures(cache, images, None, silent)
    assert why == ""
    dataset = load_dataset(images)
    wanted = dataset.train.images[2].resize((32, 32))
    (data,) = pictures.small([("train", 0)], 32, silent).values()
    shown = Image.open(io.BytesIO(base64.b64decode(data)))
    assert shown.size == (32, 32)
    assert np.abs(np.asarray(shown, int) - np.asarray(wanted, int)).mean() < 6


def test_a_limited_extraction_finds_its_images_in_the_whole_set(tmp_path):
    images = image_folder_of(tmp_path / "pets", CLASSES, n_train=9)
    part = load_dataset(images).limited(2 * len(CLASSES), None)
    cache = load(cache_of_images(tmp_path / "pets.h5", part))
    pictures, why = find_pictures(cache, images, None, silent)
    assert pictures is not None and why == ""


def test_a_page_without_images_says_how_to_have_them(made, tmp_path):
    said = []
    cache = made[1] / "cache" / "pets.h5"
    options = {"runs": tmp_path / "none", "health": False, "output": tmp_path}
    result = report(cache, on_note=said.append, **options)
    assert result.thumbnails == "none" and result.thumbnail_bytes == 0
    (note,) = said
    assert note == (
        "There are no thumbnails: name the images with --dataset PATH (the cache was made from "
        f"{made[1] / 'pets'})."
    )
    text = result.page.read_text(encoding="utf-8")
    assert note in visible(text) and "<img" not in text and not points_in(text)["thumbs"]


def test_what_a_cache_names_is_neither_fetched_nor_read(made, tmp_path, monkeypatch):
    """Neither a web address nor a folder, even that of the very images."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        url = f"http://127.0.0.1:{server.getsockname()[1]}/images.zip"
        for place in (url, f"{url}\x1b[2J\n", str(made[1] / "pets")):
            facts = {"dataset": url, "dataset_path": place, "dataset_source": url}
            path = cache_of_names(tmp_path / "x.h5", CLASSES, **facts)
            run = probed(path, tmp_path / "runs").run
            pictures, why = find_pictures(load(path), None, None, silent)
            assert pictures is None and why.isprintable()
            found = worst_errors(run, html=tmp_path / "e.html")
            assert found.notes == (f"no images on the page: {why}",)
        with pytest.raises(BlockingIOError):  # nobody came
            server.accept()


def test_a_cache_without_the_path_of_its_images_has_no_pictures(tmp_path):
    cache = load(cache_of_names(tmp_path / "x.h5", CLASSES, dataset_source="/x, train/ and test/"))
    assert find_pictures(cache, None, None, silent) == (None, "name the images with --dataset PATH")


def test_other_images_are_refused(made, tmp_path):
    root = made[1]
    other = image_folder_of(tmp_path / "pets", CLASSES, n_train=9)
    with pytest.raises(DatasetError, match=r"expected the images that .*pets\.h5 was made from"):
        report(root / "cache" / "pets.h5", dataset=other, output=tmp_path)


def test_data_sets_are_never_mixed(tmp_path):
    runs = tmp_path / "runs"
    folders = []
    for number, name in enumerate(("one", "two")):
        cache = cache_of_names(
            tmp_path / f"{name}.h5", ("x", "y"), dataset=name, dataset_digest=str(number) * 64
        )
        folders.append(probed(cache, runs).run)
    result = report(*folders, output=tmp_path, thumbnails="none", health=False)
    assert result.datasets == ("one", "two") and result.n_runs == 2 and result.n_points == 180
    text = result.page.read_text(encoding="utf-8")
    first, second = re.split(r'<div class="group" id="d2">', text)
    for part, folder in ((first, folders[0]), (second, folders[1])):
        (table,) = re.findall(r'<table class="runs">.*?</table>', part, re.DOTALL)
        assert table.count("<tr>") == 2 and folder.name in table
    assert {path.name.split("-")[0] for path in result.figures} == {"one", "two"}
    # A cache brings the runs on its own data alone.
    alone = report(tmp_path / "one.h5", output=tmp_path, thumbnails="none", health=False)
    assert (alone.datasets, alone.n_runs) == (("one",), 1)
    with pytest.raises(RecipeError, match="of one data set, found 2"):
        report(*folders, output=tmp_path, dataset=tmp_path)


def test_runs_are_found_by_name_and_bring_their_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEATCACHE_DIR", str(tmp_path))
    cache = cache_of_names(tmp_path / "made.h5", ("x", "y"))
    name = probed(cache, tmp_path / "runs").run.name
    result = report(name, thumbnails="none", health=False)
    assert result.page == tmp_path / "report.html" and result.n_points == 90
    assert report(thumbnails="none", health=False).n_runs == 1  # the newest cache, and its runs
    cache.unlink()
    without = report(name, thumbnails="none", health=False)
    assert without.n_points == 0 and "<script" not in without.page.read_text(encoding="utf-8")
    assert "The cache of these runs no longer exists" in visible(
        without.page.read_text(encoding="utf-8")
    )


def test_a_head_that_does_not_fit_is_left_out(tmp_path):
    runs = tmp_path / "runs"
    probed(cache_of_names(tmp_path / "one.h5", ("x", "y")), runs)
    other = cache_of_names(tmp_path / "two.h5", ("x", "y"), weights_sha256="2" * 64)
    text = report(other, output=tmp_path, health=False).page.read_text(encoding="utf-8")
    said = visible(text)
    assert "its head was trained on features other than the cache's: weights_sha256" in said
    assert points_in(text)["predicted"] is None
    assert not list((tmp_path / "report-figures").glob("confusion.*"))


def test_images_without_a_label(tmp_path):
    splits = {}
    for role, n in (("train", 40), ("test", 20)):
        labels = np.arange(n, dtype=np.int64) % 2
        features = clouds(labels, 6, len(role))
        labels[::4] = -1
        ids = tuple(f"{role}/{row}" for row in range(n))
        splits[role] = SplitArrays(features, labels, ids, {})
    write_cache(tmp_path / "some.h5", splits, provenance(("x", "y")))
    probed(tmp_path / "some.h5", tmp_path / "runs")
    result = report(tmp_path / "some.h5", thumbnails="none")
    points = points_in(result.page.read_text(encoding="utf-8"))
    assert (
        points["kinds"]["class"]["of"].count(2) == points["kinds"]["verdict"]["of"].count(2) == 15
    )
    assert result.n_points == 60


def test_hostile_names_are_text_in_the_page(tmp_path):
    cache = cache_of_names(
        tmp_path / "x.h5", HOSTILE, n_train=50, n_test=25, ids=f"{{role}}/{{row}} {HOSTILE[0]}"
    )
    probed(cache, tmp_path / "runs")
    text = report(cache, thumbnails="none").page.read_text(encoding="utf-8")
    assert "<script>window.pwned" not in text and "<img" not in text
    scripts = re.findall(r"<script[^>]*>", text)
    assert scripts.count("<script>") == len(scripts) - 1 == 3  # Bokeh's two, and ours
    assert points_in(text)["kinds"]["class"]["names"][:-1] == list(HOSTILE)
    said = visible(text)
    for name in HOSTILE:
        assert " ".join(name.split()) in said


@pytest.mark.parametrize(
    "wrong, error, match",
    [
        ({"map": "tsne"}, RecipeError, "expected one of pca, umap, found 'tsne'"),
        ({"thumbnails": "some"}, RecipeError, "expected one of auto, all, lists, none"),
        ({"points": 1}, RecipeError, "expected at least 2, found 1"),
        ({"output": "page.pdf"}, OutputError, r"ends in \.html, or a folder, found '\.pdf'"),
    ],
)
def test_options_out_of_range(made, wrong, error, match):
    with pytest.raises(error, match=match):
        report(made[1] / "cache" / "pets.h5", **wrong)


def test_an_empty_selection(tmp_path, monkeypatch):
    monkeypatch.setenv("FEATCACHE_DIR", str(tmp_path / "empty"))
    with pytest.raises(
        FeatcacheError, match="expected a cache or runs to report on, found neither"
    ):
        report()
    with pytest.raises(FeatcacheError, match=r"expected a run .* or a cache, found nothing there"):
        report("20260101-000000-probe-0000")
    (tmp_path / "notes.h5").write_text("no cache")
    with pytest.raises(FeatcacheError, match=r"notes\.h5"):
        report(tmp_path / "notes.h5")
    folder = tmp_path / "runs" / "broken"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text("{}")
    with pytest.raises(FeatcacheError, match="expected the record of a run, found something else"):
        report(folder)
    with pytest.raises(FeatcacheError, match="found something else"):
        report(tmp_path)


def test_two_caches_of_one_data_set(tmp_path):
    one = cache_of_names(tmp_path / "one.h5", ("x", "y"))
    two = cache_of_names(tmp_path / "two.h5", ("x", "y"), weights_sha256="2" * 64)
    with pytest.raises(FeatcacheError, match="expected one cache of each data set"):
        report(one, two)


def test_feature_maps_and_infinite_features(tmp_path):
    from caches import RICH, write_shards

    maps = write_shards(tmp_path / "maps.h5", {**RICH, "cuts": ["layer4"]}, pack=True)
    with pytest.raises(CacheMismatchError, match="expected features"):
        report(maps)


@pytest.mark.parametrize("package", ["bokeh", "jinja2", "matplotlib"])
def test_a_missing_package_names_the_extra(made, monkeypatch, package):
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(EngineUnavailableError, match=r"pip install 'featcache\[report\]'"):
        report(made[1] / "cache" / "pets.h5")


def test_umap_without_its_package(made, monkeypatch):
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(EngineUnavailableError, match=r"pip install 'featcache\[umap\]'"):
        report(made[1] / "cache" / "pets.h5", map="umap")


def test_the_command(made, tmp_path, capsys):
    cache, page = str(made[1] / "cache" / "pets.h5"), tmp_path / "p.html"
    options = ["--no-health", "--json", "--runs", str(tmp_path / "none")]
    assert main(["report", cache, "-o", str(page), *options]) == 0
    result = json.loads(capsys.readouterr().out)
    assert Path(result["page"]) == page and result["size_bytes"] == page.stat().st_size
    assert all(Path(path).is_file() for path in result["figures"])
    assert main(["report", str(tmp_path / "nothing.h5")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "expected a run" in line


@pytest.mark.long
def test_sixty_thousand_images_take_a_minute_and_five_megabytes(tmp_path):
    names = [f"class {number}" for number in range(10)]
    ids = "{role}/class/{row:06d}.jpg"
    cache = cache_of_names(
        tmp_path / "large.h5", names, n_train=50_000, n_test=10_000, dim=512, ids=ids
    )
    probed(cache, tmp_path / "runs")
    begun = time.process_time()
    result = report(cache)
    assert result.n_points == 60_000 and result.thumbnail_bytes == 0
    assert result.size_bytes < 5_000_000
    # Of two cores' time: the machine may have other things to do.
    assert time.process_time() - begun < 2 * 60, result.stages_s


@pytest.mark.slow
def test_umap_lies_the_same_every_time(made, tmp_path):
    pytest.importorskip("umap")
    options = {"runs": tmp_path / "none", "health": False, "thumbnails": "none", "map": "umap"}
    places = []
    for name in ("one.html", "two.html"):
        result = report(made[1] / "cache" / "pets.h5", output=tmp_path / name, **options)
        points = points_in(result.page.read_text(encoding="utf-8"))
        places.append(np.stack((points["x"], points["y"])))
    assert np.array_equal(*places) and len(np.unique(places[0])) > 50
    assert "UMAP of the features" in visible(result.page.read_text(encoding="utf-8"))
