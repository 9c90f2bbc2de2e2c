"""The page of labelling in a real Chromium, behind the server's own checks."""

from __future__ import annotations

import pytest
from reports import HOSTILE, image_folder_of

pytest.importorskip("uvicorn")
from servers import served
from test_report_browser import browser  # noqa: F401

from featcache import extract, probe
from featcache.tables.reading import read_table

CLASSES = ("cat", HOSTILE[0].replace("/", "|"), "eel")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Serve a cache of 36 images, three of whose labels are wrong."""
    root = tmp_path_factory.mktemp("label-page")
    images = image_folder_of(root / "pets", CLASSES, n_train=12)
    cache = extract(images, output=root / "pets.h5", weights="tinyimagenet32", size=32).cache
    head, table = root / "head.safetensors", root / "labels.csv"
    probe(cache, save_head_to=head, check=False, runs=root / "runs")
    table.write_text(
        "id,label,corrected\n" + "".join(f"train/{name}/03.png,eel,\n" for name in CLASSES[:2])
    )
    with served(head, cache=cache, dataset=images, label=table) as client:
        client.table = table
        yield client


@pytest.fixture
def tab(browser, server):  # noqa: F811
    """Open the page in a tab; nobody complains, and nothing comes from another host."""
    contexts, complaints, requests = [], [], []

    def opened(**options):
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.on("console", lambda said: complaints.append(said.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(server.url + "/label")
        page.wait_for_function("() => item && !waiting && picture.complete", timeout=60_000)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert [said for said in complaints if "409" not in said] == []
    assert all(url.startswith((server.url, "data:")) for url in requests)


def press(page, key):
    """Press a key, and wait for the image that comes then."""
    before = page.evaluate("item.id")
    page.keyboard.press(key)
    page.wait_for_function("id => item && item.id !== id && !waiting", arg=before)


def labels(server):
    table = read_table(server.table)
    return dict(zip(table["id"].values, table["label"].values, strict=True))


def test_keys_correct_accept_skip_and_undo_and_two_tabs_do_not_meet(tab, server):
    mine, yours = tab(), tab()
    first, other = mine.evaluate("item"), yours.evaluate("item")
    assert first["id"] != other["id"] and first["why"] == other["why"] == "suspect"
    assert {first["id"], other["id"]} == {f"train/{name}/03.png" for name in CLASSES[:2]}
    assert mine.evaluate("picture.naturalWidth") == 256
    press(mine, "Enter")
    assert labels(server)[first["id"]] == first["suggested"] == first["id"].split("/")[1]
    # The other tab answers for it too: refused, shown, and nothing changed.
    yours.evaluate("one => { versions.set(one.id, one.version); show(one); }", first)
    yours.keyboard.press("3")
    yours.wait_for_selector("#trouble:not([hidden])")
    assert "Somebody else" in yours.inner_text("#trouble")
    assert yours.inner_text("#label") == first["suggested"] == labels(server)[first["id"]]
    press(mine, " ")
    press(mine, "z")
    assert mine.evaluate("item.id") == first["id"] and labels(server)[first["id"]] == "eel"
    press(mine, "Enter")
    mine.wait_for_function("() => state.curve.length > 1 && !state.training", timeout=60_000)
    assert mine.evaluate("document.querySelectorAll('#curve .line').length") == 1
    assert mine.evaluate("window.pwned") is None


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_phone(tab, scheme):
    page = tab(viewport={"width": 390, "height": 844}, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    sizes = page.evaluate(
        "[...document.querySelectorAll('.choices button, .ways button')]"
        ".map((one) => one.getBoundingClientRect().height)"
    )
    assert len(sizes) == 6 and min(sizes) >= 40
