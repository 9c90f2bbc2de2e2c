"""The page of `featcache serve` in a real Chromium."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace

import numpy as np
import pytest
from conftest import colour_image

pytest.importorskip("uvicorn")
from servers import served
from test_report_browser import browser  # noqa: F401

from featcache import extract, probe
from featcache.probes.head import load_head

HOSTILE = "<img src=x onerror=alert(1)>"
DROP = """(base64) => {
const bytes = Uint8Array.from(atob(base64), (one) => one.charCodeAt(0));
const files = new DataTransfer();
files.items.add(new File([bytes], "dropped.png", { type: "image/png" }));
dispatchEvent(new DragEvent("drop", { dataTransfer: files, bubbles: true, cancelable: true }));
}"""
PASTE = DROP.replace("DragEvent", "ClipboardEvent").replace('"drop"', '"paste"')
PASTE = PASTE.replace("dataTransfer", "clipboardData")


def png(index=2, seed=7):
    buffer = io.BytesIO()
    colour_image(index, seed).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def server(image_folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("page")
    cache = extract(
        image_folder, output=root / "colours.h5", weights="tinyimagenet32", size=32
    ).cache
    probe(cache, save_head_to=root / "head.safetensors", runs=root / "runs", check=False)
    head = load_head(root / "head.safetensors")
    with served(head, cache=cache, dataset=image_folder, max_bytes=100_000) as client:
        client.head = head
        yield client


@pytest.fixture
def tab(browser, server):  # noqa: F811
    """Open the page of a server in a tab; no complaint, and nothing from another host."""
    contexts, complaints, requests = [], [], []

    def opened(client=server, path="/", width=1200, **options):
        context = browser.new_context(viewport={"width": width, "height": 844}, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda said: complaints.append(said.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(dialog.message))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(client.url + path)
        return page

    yield opened
    for context in contexts:
        context.close()
    # What is answered with an error, Chromium says in its console.
    assert not [one for one in complaints if "the server responded with a status of" not in one]
    assert all(re.match(r"(http://127\.0\.0\.1:\d+/|blob:|data:)", url) for url in requests)


def answer_of(page):
    page.wait_for_selector("#found:not([hidden])")
    page.wait_for_selector("#busy", state="hidden")
    return page.locator("#headline").inner_text().split("\n")[0]


@pytest.mark.parametrize("way", ["file", "drop", "paste"])
def test_an_image_gets_an_answer_with_bars_and_neighbours(tab, server, way):
    page = tab()
    page.wait_for_function("() => document.getElementById('about').textContent.includes('top-1')")
    if way == "file":
        image = {"name": "mine.png", "mimeType": "image/png", "buffer": png()}
        page.set_input_files("#file", image)
    else:
        page.evaluate(DROP if way == "drop" else PASTE, base64.b64encode(png()).decode())
    assert answer_of(page).startswith("red")
    (row,) = server.predict(png(), "?top=3&neighbours=12")[2]
    bars = [text.split("\n") for text in page.locator("#bars li").all_inner_texts()]
    assert [bar[0] for bar in bars] == [name for name, _ in row["top"]]
    assert bars[0][-1] == f"{100 * row['probability']:.1f}\u00a0%"
    assert page.locator("#nearest li").count() == 12
    assert "red" in page.locator("#nearest li").first.inner_text()
    page.wait_for_function("() => document.querySelector('#nearest img').naturalWidth === 256")
    assert re.match(r"\d+ ms \(decode \d+, wait \d+, compute \d+\)", page.inner_text("#latency"))
    assert page.is_visible("#picture") and page.is_hidden("#invite")


def test_the_keyboard_alone_and_a_camera(tab):
    page = tab(permissions=["camera"])
    # Listened for early: Chromium takes a moment until it hands over its dialogs.
    image = {"name": "a.png", "mimeType": "image/png", "buffer": png(1)}
    page.on("filechooser", lambda chooser: chooser.set_files(image))
    page.reload()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("o")
    assert answer_of(page).startswith("green")
    page.evaluate(
        "navigator.mediaDevices.getUserMedia = async () => {"
        "const canvas = document.createElement('canvas'); canvas.width = canvas.height = 64;"
        "const pen = canvas.getContext('2d'); pen.fillStyle = 'rgb(60,60,200)';"
        "const draw = () => pen.fillRect(0, 0, 64, 64); draw(); setInterval(draw, 20);"
        "return canvas.captureStream(30); }"
    )
    page.keyboard.press("c")
    page.wait_for_function("() => document.getElementById('camera').videoWidth > 0")
    assert page.is_hidden("#picture")
    page.keyboard.press("Escape")
    assert page.is_visible("#picture") and page.is_hidden("#camera")
    page.keyboard.press("c")
    page.wait_for_function("() => document.getElementById('camera').videoWidth > 0")
    page.keyboard.press(" ")
    page.wait_for_function("() => document.getElementById('said-of').textContent === 'camera'")
    answer_of(page)
    page.wait_for_function("() => document.getElementById('picture').naturalWidth === 64")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_the_dark(tab, scheme):
    page = tab(width=390, color_scheme=scheme)
    page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": png()})
    answer_of(page)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    red = int(re.findall(r"\d+", background)[0])
    assert red < 40 if scheme == "dark" else red > 200


def test_errors_are_shown_in_words(tab):
    page = tab()
    for buffer, said in ((b"garbage", "do not decode"), (bytes(100_001), "takes up to 0 MB")):
        page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": buffer})
        page.wait_for_selector(f"#trouble:has-text('{said}')")
        assert page.is_hidden("#found")
    page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": png()})
    assert answer_of(page).startswith("red") and page.is_hidden("#trouble")


@pytest.mark.parametrize("task", ["labels", "numbers"])
def test_hostile_names_stay_text_in_other_heads(tab, server, task):
    thresholds = np.array([0, 0, 1], np.float32) if task == "labels" else None
    names = (HOSTILE, "green", "red")
    head = replace(server.head, task=task, thresholds=thresholds, class_names=names)
    with served(head) as other:
        page = tab(other)
        page.set_input_files("#file", {"name": HOSTILE, "mimeType": "", "buffer": png()})
        said = answer_of(page)
        assert HOSTILE in said if task == "labels" else said == "3 numbers"
        assert HOSTILE in page.locator("#bars").inner_text()
        assert page.locator("img").count() == 1 and page.is_hidden("#near")


def test_the_page_for_programs(tab, server):
    page = tab(path="/docs")
    page.wait_for_selector("text=/predict")
    assert f"curl --data-binary @image.jpg '{server.url}/predict?top=5'" in page.inner_text("main")
