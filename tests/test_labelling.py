"""`featcache serve --label`: what comes up, what is kept, and who may change what."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import threading

import numpy as np
import pytest
from caches import SplitArrays, write_cache
from reports import cache_of_names, clouds, image_folder_of, provenance

from featcache import extract, label, load, probe
from featcache.errors import (
    CacheMismatchError,
    DatasetError,
    OutputError,
    RecipeError,
    TableError,
)
from featcache.prediction import checked_head
from featcache.serving.cached import Cached
from featcache.serving.corrections import Corrections
from featcache.serving.labelling import Labelling
from featcache.tables.reading import read_table

CLASSES = ("cat", "dog", "eel")
ME, YOU = "me", "you"


def flipped_cache(path, *, n_train=90, wrong=(3, 10, 20), unlabelled=(), val=False):
    """Write a cache of three clear classes, some of whose labels are wrong; return the truth."""
    splits = {}
    for role, n in (("train", n_train), ("val", 30 * val), ("test", 30)):
        if not n:
            continue
        truth = np.arange(n) % 3
        given = truth.copy()
        if role == "train":
            given[list(wrong)] = (truth[list(wrong)] + 1) % 3
            given[list(unlabelled)] = -1
        ids = tuple(f"{role}/{row:03d}.png" for row in range(n))
        splits[role] = SplitArrays(clouds(truth, 6, len(role), 0.4), given, ids, {})
    write_cache(path, splits, provenance(CLASSES))
    return path


def labelling(cache, head, table, **options):
    """Return a session on a cache and a head's file."""
    head, where = checked_head(head)
    return Labelling(Cached(load(cache), head, where), head, table, **options)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A cache with three wrong labels, and a head."""
    root = tmp_path_factory.mktemp("labelled")
    cache = flipped_cache(root / "flipped.h5")
    head = root / "head.safetensors"
    probe(cache, save_head_to=head, check=False, runs=root / "runs")
    return cache, head


@pytest.fixture
def session(made, tmp_path):
    """A session that learns only when it is asked to."""
    with contextlib.closing(labelling(*made, tmp_path / "labels.csv")) as session:
        session.find_neighbours()
        session.learn()
        yield session


def truth_of(item):
    return CLASSES[item.row % 3]


# ---- the table


def labels_in(path):
    """Return label by id, as every reader of tables sees it."""
    table = read_table(path)
    return dict(zip(table["id"].values, table["label"].values, strict=True))


def rows_of(path):
    return path.read_text().splitlines()[1:]


def test_a_table_begins_with_the_labels_and_each_correction_is_a_row(tmp_path):
    path = tmp_path / "labels.csv"
    given = {"a": "cat", "b, c": "dog", 'd"': None}
    with contextlib.closing(Corrections(path, given)) as table:
        assert path.read_text() == 'id,label,corrected\na,cat,\n"b, c",dog,\n'
        table.correct('d"', "eel")
        table.correct("a", "dog")
        assert [row.split(",")[1] for row in rows_of(path)[-2:]] == ["eel", "dog"]
        assert table.undo("a") and rows_of(path)[-1] == "a,cat,"
        assert not table.undo("a") and not table.undo("b, c")
        assert table.state("a") == ("cat", "") and table.version("a") == 2
        assert list(table.corrected) == ['d"']
    with contextlib.closing(Corrections(path, given)) as again:
        assert again.state("a") == ("cat", "") and again.state('d"')[0] == "eel"
        assert again.version("a") == 2 and again.first == given
        assert again.undo('d"') and again.state('d"') == (None, "")
    assert read_table(path)["label"].values.tolist() == ["cat", "dog", None]


def test_a_torn_last_line_is_dropped_on_reading_and_cut_off_on_opening(tmp_path):
    path = tmp_path / "labels.csv"
    with contextlib.closing(Corrections(path, {"a": "cat", "b": "dog"})) as table:
        table.correct("a", "dog")
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        n_rows = max(0, whole[:length].count(b"\n") - 1)
        if n_rows:
            labels = labels_in(path)
            assert labels == {"a": "cat", "b": "dog"} if n_rows == 2 else {"a": "cat"}
        with contextlib.closing(Corrections(path, {"a": "cat", "b": "dog"})) as table:
            assert table.state("a")[0] == "cat" and table.state("b")[0] == "dog"
        assert path.read_text() == "id,label,corrected\na,cat,\nb,dog,\n"


def test_a_killed_writer_loses_no_correction_that_it_told_of(tmp_path):
    path = tmp_path / "labels.csv"
    code = (
        "import sys; from featcache.serving.corrections import Corrections\n"
        "table = Corrections(sys.argv[1], {'a': 'cat'})\n"
        "for n in range(10**6): table.correct('a', f'cat {n}'); print(n, flush=True)"
    )
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        told = [int(child.stdout.readline()) for _ in range(30)]
        child.kill()
        told += [int(line) for line in child.stdout.read().split()]
    with contextlib.closing(Corrections(path, {"a": "cat"})) as table:
        assert table.version("a") >= len(told) == told[-1] + 1


def test_a_second_server_is_refused_in_one_line(tmp_path):
    path = tmp_path / "labels.csv"
    with (
        contextlib.closing(Corrections(path, {"a": "cat"})),
        pytest.raises(TableError, match="another featcache serve is using this table"),
    ):
        Corrections(path, {"a": "cat"})
    Corrections(path, {"a": "cat"}).close()


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("id,label\na,cat\n", TableError, "found 'id', 'label'; name a new file"),
        ("x\n", TableError, "expected a table with the columns id, label, corrected"),
        ("id,label,corrected\na,b,c,d\n", TableError, "line 2: expected 3 fields"),
        ("id,label,corrected\n\xff", TableError, "UTF-8"),
    ],
)
def test_another_table_is_left_alone(tmp_path, text, error, message):
    path = tmp_path / "labels.csv"
    path.write_bytes(text.encode("latin-1"))
    if text.endswith("\n"):
        with pytest.raises(error, match=message):
            Corrections(path, {"a": "cat"})
        assert path.read_bytes() == text.encode("latin-1")


def test_what_a_line_does_not_hold_and_other_kinds_are_refused(tmp_path):
    for id_ in ("a\nb", " a", "", "\udc80"):
        with pytest.raises(DatasetError, match="that a line of CSV holds"):
            Corrections(tmp_path / "labels.csv", {id_: "cat"})
    with pytest.raises(TableError, match=r"ends in \.csv"):
        Corrections(tmp_path / "labels.parquet", {})
    with pytest.raises(OutputError):
        Corrections("/dev/null/labels.csv", {})


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/dev/full")
def test_a_full_disk_changes_nothing(session, monkeypatch):
    item, before = session.next(ME), session.state()["n_changed"]
    table = session._corrections
    whole, real = table.path.read_bytes(), table._file
    with open("/dev/full", "wb") as full:
        table._file = full.fileno()
        monkeypatch.setattr("os.ftruncate", lambda *_: None)  # which a device does not know
        with pytest.raises(OutputError, match="cannot be written"):
            session.correct(item.id, truth_of(item), item.version)
        table._file = real
    assert table.path.read_bytes() == whole and session.state()["n_changed"] == before
    assert session.next(ME).version == item.version


# ---- the session


def test_wrong_labels_come_first_with_the_right_suggestion(session):
    rows = []
    for _ in range(3):
        item = session.next(ME)
        assert item.why == "suspect" and item.suggested == truth_of(item) != item.label
        assert item.probability > 0.5 and item.likely[0] == (item.suggested, item.probability)
        rows.append(item.row)
        assert session.correct(item.id, item.suggested, item.version)[0]
    assert sorted(rows) == [3, 10, 20]
    first = session.state()["curve"][-1]
    session.learn()
    state = session.state()
    assert state["curve"][-1]["n_corrected"] == 3 and state["n_changed"] == 3
    assert state["curve"][-1]["accuracy"] > first["accuracy"]
    assert state["n_left"] == 0 and session.next(ME).why == "uncertain"


def test_images_without_a_label_come_in_turn_with_suspects(made, tmp_path):
    cache = flipped_cache(tmp_path / "part.h5", unlabelled=range(40, 90))
    with contextlib.closing(labelling(cache, made[1], tmp_path / "labels.csv")) as session:
        assert session.next(ME) is None and not session.state()["ready"]
        session.learn()
        items = [session.next(f"browser-{number}") for number in range(6)]
        assert [item.why for item in items] == ["suspect", "unlabelled"] * 3
        assert items[1].label is None and items[1].suggested == truth_of(items[1])
        session.correct(items[1].id, items[1].suggested, items[1].version)
        assert session.undo(items[1].id, 1)[1].label is None
        assert session.state()["n_reviewed"] == 0


def test_val_measures_where_there_is_one_and_test_never_does(made, tmp_path):
    cache = flipped_cache(tmp_path / "val.h5", val=True)
    with contextlib.closing(labelling(cache, made[1], tmp_path / "labels.csv")) as session:
        session.learn()
        state = session.state()
        assert state["holdout"] == "val" and state["n_holdout"] == 30
        rows = {session.next(f"browser-{number}").id for number in range(90)}
        assert len(rows) == 90 and all(id_.startswith("train/") for id_ in rows)


def test_a_table_is_taken_up_again_and_taken_back_by_probe_and_label(made, tmp_path):
    path = tmp_path / "labels.csv"
    with contextlib.closing(labelling(*made, path)) as session:
        session.learn()
        for _ in range(3):
            item = session.next(ME)
            session.correct(item.id, item.suggested, item.version)
        kept = session.next(ME)
        session.correct(kept.id, kept.label, kept.version)  # confirmed
    with contextlib.closing(labelling(*made, path)) as session:
        assert session.state()["n_reviewed"] == 4 and session.state()["n_changed"] == 3
    result = probe(made[0], labels=path, check=False, runs=tmp_path / "runs")
    assert result.top1 == 1.0
    own = flipped_cache(tmp_path / "own.h5")
    assert label(own, path).n_matched == 120
    assert load(own).table["label"].values[[3, 10, 20]].tolist() == ["cat", "dog", "eel"]


def test_a_stale_correction_changes_nothing_and_shows_the_present(session):
    item = session.next(ME)
    assert session.correct(item.id, "cat", item.version)[0]
    done, now = session.correct(item.id, "dog", item.version)
    assert not done and (now.label, now.version) == ("cat", item.version + 1)
    done, now = session.undo(item.id, item.version)
    assert not done and now.label == "cat"
    done, now = session.undo(item.id, now.version)
    assert done and now.label == item.label and session.state()["n_reviewed"] == 0


def test_an_image_is_shown_to_one_browser_for_a_minute(made, tmp_path):
    now = [0.0]
    table = tmp_path / "labels.csv"
    with contextlib.closing(labelling(*made, table, clock=lambda: now[0])) as session:
        session.learn()
        mine, yours = session.next(ME), session.next(YOU)
        assert mine.id != yours.id and session.next(ME).id == mine.id
        now[0] = 59.0
        assert session.next("third").id not in (mine.id, yours.id)
        now[0] = 61.0 + 59.0
        assert session.next("third").id == mine.id
        after = session.next(YOU, skip=yours.id)
        assert after.id not in (mine.id, yours.id)


def test_two_browsers_at_once_lose_nothing(made, tmp_path):
    table = tmp_path / "labels.csv"
    given, lock = {}, threading.Lock()
    with labelling(*made, table) as session:
        assert session.settled(60)

        def label_on(browser):
            for _ in range(15):
                item = session.next(browser)
                assert session.correct(item.id, "eel", item.version)[0]
                with lock:
                    assert given.setdefault(item.id, browser) == browser

        threads = [threading.Thread(target=label_on, args=(name,)) for name in (ME, YOU)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert session.settled(60) and session.state()["curve"][-1]["n_corrected"] == 30
    assert len(given) == 30
    labels = labels_in(table)
    assert {labels[id_] for id_ in given} == {"eel"}


def test_a_problem_of_the_training_is_shown_and_not_the_end(made, tmp_path):
    cache = flipped_cache(tmp_path / "none.h5", wrong=(), unlabelled=range(90))
    with labelling(cache, made[1], tmp_path / "labels.csv") as session:
        assert session.settled(60)
        assert session.state()["problem"] == "expected labels of at least 2 classes, found 0"
        session.correct("train/000.png", "cat", 0)
        session.correct("train/001.png", "dog", 0)
        assert session.settled(60)
        assert session.state()["problem"] is None and session.state()["ready"]


def test_a_head_of_other_features_or_classes_is_refused(made, tmp_path):
    other = cache_of_names(tmp_path / "other.h5", ("cat", "dog", "emu"))
    with pytest.raises(CacheMismatchError, match="expected classes of the head, found 'emu'"):
        labelling(other, made[1], tmp_path / "labels.csv")
    wide = cache_of_names(tmp_path / "wide.h5", CLASSES, dim=9)
    with pytest.raises(CacheMismatchError, match="length: head 6, here 9"):
        labelling(wide, made[1], tmp_path / "labels.csv")
    assert not (tmp_path / "labels.csv").exists()
    table = tmp_path / "emu.csv"
    table.write_text("id,label,corrected\ntrain/000.png,emu,\n")
    with pytest.raises(CacheMismatchError, match=r"found 'emu' of 'train/000\.png'"):
        labelling(*made, table)
    with contextlib.closing(labelling(*made, tmp_path / "labels.csv")) as session:
        for id_, name in (("train/999.png", "cat"), ("train/000.png", "emu")):
            with pytest.raises(DatasetError):
                session.correct(id_, name, 0)


# ---- the routes


@pytest.fixture
def app(session):
    """The routes of a session."""
    pytest.importorskip("starlette")
    from starlette.routing import Router

    from featcache.serving.labelling_routes import labelling_routes

    return Router(labelling_routes(session))


def ask(app, method, path, given=None, query="browser=me"):
    """Return status, kind and body of an answer of an ASGI application."""
    body = given if isinstance(given, bytes) else json.dumps(given).encode()
    sent = []

    async def receive():
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "headers": [],
    }
    from starlette.exceptions import HTTPException
    from starlette.middleware.exceptions import ExceptionMiddleware

    async def answer(request, error):
        from starlette.responses import JSONResponse

        return JSONResponse({"error": error.detail}, error.status_code)

    guarded = ExceptionMiddleware(app, handlers={HTTPException: answer})
    asyncio.run(guarded(scope, receive, send))
    kind = dict(sent[0]["headers"])[b"content-type"].decode()
    content = b"".join(message.get("body", b"") for message in sent[1:])
    return sent[0]["status"], kind, json.loads(content) if "json" in kind else content


def test_the_routes_correct_and_refuse(app):
    status, _, answer = ask(app, "GET", "/label/next")
    item = answer["item"]
    assert status == 200 and answer["state"]["classes"] == list(CLASSES)
    assert item["image"] == f"/picture/train/{item['row']}"
    given = {"id": item["id"], "label": item["suggested"], "version": item["version"]}
    status, _, answer = ask(app, "POST", "/label/correct", given)
    assert status == 200 and answer["item"]["label"] == item["suggested"]
    assert answer["next"]["id"] != item["id"] and answer["state"]["n_reviewed"] == 1
    status, _, stale = ask(app, "POST", "/label/correct", given, "browser=you")
    assert status == 409 and stale["item"] == {**answer["item"]} and "error" in stale
    undo = {"id": item["id"], "version": answer["item"]["version"]}
    status, _, answer = ask(app, "POST", "/label/undo", undo)
    assert status == 200 and answer["item"]["label"] == item["label"]
    status, _, answer = ask(app, "POST", "/label/skip", {"id": item["id"]})
    assert status == 200 and answer["item"]["id"] != item["id"]
    assert ask(app, "GET", "/label/state")[2]["n_reviewed"] == 0


@pytest.mark.parametrize(
    ("path", "given", "query", "status"),
    [
        ("correct", {"id": "x", "label": "cat", "version": 0}, "browser=me", 400),
        ("correct", {"id": "train/000.png", "label": "emu", "version": 0}, "browser=me", 400),
        ("correct", {"id": "train/000.png", "label": "cat", "version": "0"}, "browser=me", 400),
        ("correct", {"id": "train/000.png", "label": "cat"}, "browser=me", 400),
        ("correct", b"[" * 5000, "browser=me", 400),
        ("correct", b"\xff", "browser=me", 400),
        ("correct", b" " * 70_000, "browser=me", 413),
        ("undo", {"id": "train/000.png", "version": 0}, "browser=me", 409),
        ("skip", {"id": 3}, "browser=me", 400),
        ("skip", {"id": "train/000.png"}, "browser=../x", 400),
    ],
)
def test_a_wrong_request_is_answered_in_one_line(app, path, given, query, status):
    found, _, answer = ask(app, "POST", f"/label/{path}", given, query)
    assert found == status and "\n" not in answer["error"] and "Traceback" not in answer["error"]


@pytest.fixture
def pets(tmp_path):
    """A head, and options of a server of it: a cache of real images with three classes."""
    pytest.importorskip("uvicorn")
    images = image_folder_of(tmp_path / "pets", CLASSES, n_train=12)
    cache = extract(images, output=tmp_path / "pets.h5", weights="tinyimagenet32", size=32).cache
    head = tmp_path / "head.safetensors"
    probe(cache, save_head_to=head, check=False, runs=tmp_path / "runs")
    return head, {"cache": cache, "dataset": images, "label": tmp_path / "labels.csv"}


def test_pictures_are_of_the_data_set_that_is_named(pets):
    from servers import served

    head, options = pets
    with served(head, **options) as client:
        status, headers, picture = client.get("/picture/train/0")
        assert (status, headers["content-type"]) == (200, "image/webp") and len(picture) < 50_000
        assert client.get("/picture/train/36")[0] == 404
        for path in ("/label", "/label.js", "/common.js"):
            status, _, text = client.get(path)
            assert status == 200 and b"http://" not in text.replace(b"http://www.w3.org", b"")
    del options["dataset"]
    with pytest.raises(DatasetError, match="--dataset"), served(head, **options):
        pass
    with pytest.raises(RecipeError, match="add --cache"), served(head, label=options["label"]):
        pass


def test_predict_answers_with_the_newest_head(pets):
    """The given head answers until somebody corrects a label; then what was learnt last."""
    from servers import served, until

    head, options = pets
    image = (options["dataset"] / "train" / "cat" / "00.png").read_bytes()

    def row():
        return client.predict(image, "?top=3")[2][0]

    with served(head, **options) as client:
        until(lambda: not client.get("/label/state")[2]["training"], 60)
        model, before = client.get("/model")[2], row()
        assert model["labelling"] and model["learnt"] is None and model["accuracy"]["n_test"]
        for number in range(12):
            given = {"id": f"train/cat/{number:02d}.png", "label": "eel", "version": 0}
            assert client.ask("POST", "/label/correct?browser=me", json.dumps(given))[0] == 200
        until(lambda: not client.get("/label/state")[2]["training"], 60)
        model = client.get("/model")[2]
        assert before["class_name"] == "cat" and row()["class_name"] == "eel"
        assert model["classes"] == ["dog", "eel"] and model["accuracy"] is None
        assert model["learnt"]["n_corrected"] == 12 and 0 <= model["learnt"]["accuracy"] <= 1
        notes = client.notes
    assert "type: featcache probe" in notes[-1] and "--labels" in notes[-1]


def test_counts_and_the_order_follow_every_change(session):
    """What is kept between requests equals what a whole look would find."""
    rng = np.random.default_rng(0)

    def check():
        state, learnt = session.state(), session.learnt
        seen = session._reviewed | session._skipped
        first = next(row for row in learnt.order.tolist() if row not in seen)
        assert state["n_left"] == len(learnt.why.keys() - seen)
        assert state["n_changed"] == (session._labels != session._first).sum()
        assert state["n_holdout"] == (session._labels >= 0).sum()
        assert session.next(ME).row == first

    for step in range(40):
        item = session.next(ME)
        done = session._corrections.version(item.id)
        if step % 5 == 4:
            session.next(ME, skip=item.id)
        else:
            session.correct(item.id, CLASSES[rng.integers(3)], done)
        if step % 3 == 2:
            session.undo(item.id, session._corrections.version(item.id))
        if step % 9 == 8:
            session.learn()
        check()
