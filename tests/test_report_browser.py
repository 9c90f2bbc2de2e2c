"""The page of `featcache.report` in a real Chromium, opened from the disk."""

from __future__ import annotations

import importlib.util
import io
import os
import re
import shutil

import numpy as np
import pytest
from PIL import Image
from reports import HOSTILE, add_finetune, cache_of_images, cache_of_names, image_folder_of, probed

from featcache import few_shot, load
from featcache.frameworks import oneflow_status
from featcache.reporting.report import report

CLASSES = ("cat", "dog", "eel")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# Offline, in a container, without a graphics card.
OPTIONS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--use-angle=swiftshader", "--enable-unsafe-swiftshader"),
)


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium; what misses it skips, and fails in CI."""
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    driver = importlib.util.find_spec("playwright")
    # The environment for analysis alone, which has no OneFlow, does without a browser.
    wanted = os.environ.get("CI") == "true" and oneflow_status()[0] is not None
    if path is None or driver is None:
        missing = "Chromium" if path is None else "playwright"
        if wanted:
            pytest.fail(f"expected Chromium and playwright in CI, found no {missing}")
        pytest.skip(f"no {missing} here")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=list(OPTIONS))
        yield started
        started.close()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A page of a cache with images, a probe, a curve and a fine-tune; and its cache."""
    root = tmp_path_factory.mktemp("browser")
    images = image_folder_of(root / "pets", CLASSES, n_train=12)
    cache = cache_of_images(root / "pets.h5", images)
    probed(cache, root / "runs")
    few_shot(cache, shots=(1, 2, "full"), seeds=2, runs=root / "runs")
    add_finetune(cache, root / "runs")
    return report(cache, dataset=images).page, load(cache)


class Opened:
    """A page in a tab of its own, and everything that it asked for or complained of."""

    def __init__(self, browser, path, *, width=1200, height=900, webgl=False, **options):
        self.context = browser.new_context(viewport={"width": width, "height": height}, **options)
        self.page = self.context.new_page()
        self.requests, self.complaints = [], []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda said: self.complaints.append((said.type, said.text)))
        self.page.on("pageerror", lambda error: self.complaints.append(("error", str(error))))
        self.page.on("dialog", lambda dialog: self.complaints.append(("dialog", dialog.message)))
        if webgl:  # else the page sees that this is software, and does without
            self.page.add_init_script(
                "WebGLRenderingContext.prototype.getExtension = new Proxy("
                "WebGLRenderingContext.prototype.getExtension, {apply: (own, on, [name]) => "
                "name === 'WEBGL_debug_renderer_info' ? null : own.call(on, name)})"
            )
        self.page.goto(path.absolute().as_uri())
        self.page.evaluate("typeof featcache === 'object' && featcache.ready")
        self.url = path.absolute().as_uri()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.context.close()

    def map(self, script, argument=None):
        """Evaluate a function of the map and an argument."""
        return self.page.evaluate(
            f"argument => ({script})(document.querySelector('.map').map, argument)", argument
        )

    def at(self, point):
        """Return where a point is in the window."""
        self.page.locator(".stage").scroll_into_view_if_needed()
        return self.map(
            "(map, i) => { const box = map.stage.getBoundingClientRect(); const [x, y] = "
            "map.place(i); return [x + box.left, y + box.top]; }",
            point,
        )

    def shown(self):
        """Return the points that are drawn, which are as many as Bokeh has."""
        assert self.map("map => map.drawn.length === map.dots.data_source.data.x.length")
        return sorted(self.map("map => map.drawn"))

    def errors(self):
        return [text for kind, text in self.complaints if kind not in ("log", "info")]


def lonely(cache, opened):
    """Return the point that is furthest from its neighbour on the map: no other is under it."""
    places = np.array(opened.map("map => Array.from(map.x, (x, i) => [x, map.y[i]])"))
    apart = np.linalg.norm(places[:, None] - places[None], axis=2)
    np.fill_diagonal(apart, np.inf)
    return int(apart.min(axis=1).argmax())


def test_one_visit(browser, made):
    """Open, hover, click, search, filter, colour, drag and zoom: what CI looks at."""
    path, cache = made
    features = np.concatenate([cache.train.features, cache.test.features]).astype(np.float64)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    labels = np.concatenate([cache.train.labels, cache.test.labels])
    ids = [*cache.train.ids, *cache.test.ids]
    is_test = np.arange(48) >= len(cache.train)
    with Opened(browser, path) as opened:
        page = opened.page
        assert page.locator(".map.ready").count() == 1
        assert opened.shown() == list(range(48))
        assert page.locator(".shown").inner_text() == "48 images"

        # Hovering shows the image, its class, the prediction, the split and the name.
        point = lonely(cache, opened)
        tip, label = page.locator(".tip"), cache.class_names[labels[point]]
        assert tip.is_hidden()
        page.mouse.move(*opened.at(point))
        tip.wait_for(state="visible")
        assert tip.locator(".class").inner_text() == label
        said = tip.locator(".said").inner_text().replace("\u00a0", " ")
        assert re.fullmatch(r"predicted \w+, \d+ % (✓ correct|✗ wrong)", said)
        split = ["training image", "test image"][int(is_test[point])]
        assert tip.locator(".split").inner_text() == split
        assert tip.locator(".id").inner_text() == ids[point]
        # The thumbnail is that image: of one colour by its class, the number its brightness.
        colours = tip.locator("img").evaluate(
            "async image => { await image.decode(); const canvas = document.createElement('canvas')"
            "; const context = canvas.getContext('2d'); context.drawImage(image, 0, 0); "
            "return Array.from(context.getImageData(16, 16, 1, 1).data).slice(0, 3); }"
        )
        number = int(ids[point][-6:-4])
        assert abs(colours.pop(labels[point]) - 220) < 12
        assert max(abs(value - 40 - 15 * number) for value in colours) < 12
        page.mouse.move(2, 2)
        tip.wait_for(state="hidden")

        # A click lists the ten nearest, each a button.
        page.mouse.click(*opened.at(point))
        chosen = page.locator(".chosen")
        assert chosen.get_attribute("data-point") == str(point)
        cosine = unit @ unit[point]
        cosine[point] = -2
        buttons = chosen.locator(".near button")
        near = buttons.evaluate_all("all => all.map(button => Number(button.dataset.point))")
        assert near == np.argsort(-cosine)[:10].tolist()
        assert chosen.locator("img.thumb").count() == 11
        assert opened.map("map => map.rings.data_source.data.x.length") == 11
        buttons.nth(3).focus()
        page.keyboard.press("Enter")
        assert chosen.get_attribute("data-point") == str(near[3])
        assert chosen.locator(".title").evaluate("title => title === document.activeElement")
        page.locator(".chosen .close").click()
        assert opened.map("map => map.rings.data_source.data.x.length") == 0

        # A search finds an image by its name, and the map goes there.
        search, wanted = page.locator(".search input"), cache.test.ids[3]
        search.fill("no such image")
        assert "no image" in page.locator(".results").inner_text()
        search.fill("")
        page.keyboard.type(wanted.upper())
        assert wanted in page.locator(".results").inner_text()
        page.keyboard.press("Enter")
        assert chosen.locator(".one .id").inner_text() == wanted
        page.locator(".stage").focus()
        for key in ("+", "+", "+", "ArrowRight", "ArrowRight", "ArrowDown"):
            page.keyboard.press(key)
        assert opened.map("map => map.view[2]") == pytest.approx(1.04 / 1.5**3, rel=1e-6)
        search.fill(wanted)
        search.press("Enter")
        x, y = opened.at(int(chosen.get_attribute("data-point")))
        box = page.locator(".stage").bounding_box()
        assert box["x"] < x < box["x"] + box["width"] and box["y"] < y < box["y"] + box["height"]
        page.locator(".stage").focus()
        page.keyboard.press("0")
        assert opened.map("map => map.view") == pytest.approx([0.5, 0.5, 1.04])
        page.keyboard.press("Escape")
        assert page.locator(".chosen[data-point]").count() == 0

        # Boxes leave classes and splits out, for the eye and for the pointer.
        page.locator(".by-class .item").filter(has_text="dog").locator("input").uncheck()
        kept = np.flatnonzero(labels != 1).tolist()
        assert opened.shown() == kept
        assert page.locator(".shown").inner_text() == f"{len(kept)} of 48 images"
        page.locator(".by-split .item").filter(has_text="train").locator("input").uncheck()
        assert opened.shown() == np.flatnonzero((labels != 1) & is_test).tolist()
        page.get_by_role("button", name="show eel only").click()
        assert opened.shown() == np.flatnonzero((labels == 2) & is_test).tolist()
        page.mouse.move(*opened.at(int(np.flatnonzero(labels == 0)[0])))
        assert opened.map("map => map.tipped === -1 || map.drawn.includes(map.tipped)")
        for kind in ("class", "split"):
            page.locator(f".by-{kind} .all").click()
        assert opened.shown() == list(range(48))

        # Colours follow the choice.
        def n_colours():
            return opened.map("map => new Set(map.dots.data_source.data.c).size")

        assert n_colours() == 3 and page.locator(".swatch:visible").count() == 3
        page.get_by_label("split", exact=True).check()
        assert n_colours() == 2 and page.locator(".swatch:visible").count() == 2
        page.get_by_label("prediction").check()
        assert 1 <= n_colours() <= 2

        # A drag moves the map and selects nothing.
        x, y = opened.at(point)
        before = opened.map("map => map.view")
        page.mouse.move(x, y)
        page.mouse.down()
        page.mouse.move(x + 40, y + 30, steps=4)
        page.mouse.up()
        after, width = opened.map("map => map.view"), box["width"]
        assert after[0] == pytest.approx(before[0] - 40 / width * 1.04, abs=0.01)
        assert after[1] == pytest.approx(before[1] + 30 / width * 1.04, abs=0.01)
        assert page.locator(".chosen[data-point]").count() == 0

        # Nothing was fetched, and nothing was reported as an error.
        assert [url for url in opened.requests if not url.startswith("data:")] == [opened.url]
        assert opened.errors() == []


@pytest.mark.long
def test_every_control_has_a_name_and_shows_its_focus(browser, made):
    with Opened(browser, made[0]) as opened:
        seen = set()
        for _ in range(60):
            opened.page.keyboard.press("Tab")
            told = opened.page.evaluate(
                """() => { const at = document.activeElement; if (at === document.body) return null;
                const box = at.closest('.segments label') || at;
                return [at.outerHTML.slice(0, 60), (at.innerText || at.ariaLabel || at.title ||
                (at.labels && [...at.labels].map(label => label.innerText).join()) || '').trim(),
                getComputedStyle(box).outlineStyle]; }"""
            )
            if told is None:
                break
            seen.add(told[0])
            assert told[1] and told[2] != "none", told
        assert len(seen) > 15


@pytest.mark.long
@pytest.mark.parametrize("webgl", [False, True], ids=["canvas", "webgl"])
def test_points_are_really_drawn(browser, made, webgl):
    with Opened(browser, made[0], webgl=webgl) as opened:
        # The layers lie within a shadow of a shadow: a picture is the plain way to see them.
        opened.page.locator(".stage").scroll_into_view_if_needed()
        opened.page.wait_for_timeout(300)
        picture = Image.open(io.BytesIO(opened.page.locator(".stage").screenshot()))
        pixels = np.asarray(picture.convert("RGB"), int)
        background = pixels[3, 3]
        assert (np.abs(pixels - background).max(axis=2) > 60).sum() > 500
        box = opened.page.locator(".stage").bounding_box()
        for point in (0, 20, 47):
            x, y = opened.at(point)
            around = pixels[int(y - box["y"]) - 2 :, int(x - box["x"]) - 2 :][:5, :5]
            assert np.abs(around - background).max() > 60, point
        assert [text for text in opened.errors() if "GPU stall" not in text] == []


SCHEMES = [("light", 1200), ("dark", 1200), ("light", 400), ("dark", 400)]


@pytest.mark.long
@pytest.mark.parametrize("scheme, width", SCHEMES)
def test_schemes_and_widths(browser, made, tmp_path, scheme, width):
    with Opened(browser, made[0], width=width, color_scheme=scheme) as opened:
        page = opened.page
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        colours = page.evaluate(
            "(() => { const of = e => getComputedStyle(e).backgroundColor.match(/[0-9.]+/g);"
            "return [of(document.body), of(document.querySelector('.card'))]; })()"
        )
        bright = [sum(map(float, colour[:3])) / 3 > 127 for colour in colours]
        assert bright == [scheme == "light"] * 2
        page.screenshot(path=tmp_path / f"{scheme}-{width}.png", full_page=True)
        # On paper it is light, whatever the screen is.
        page.emulate_media(media="print")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == (
            "rgb(255, 255, 255)"
        )
        assert opened.errors() == []


def test_hostile_names_are_text(browser, tmp_path):
    cache = cache_of_names(
        tmp_path / "x.h5", HOSTILE, n_train=50, n_test=25, ids=f"{{role}}/{{row}} {HOSTILE[1]}"
    )
    probed(cache, tmp_path / "runs")
    page = report(cache, thumbnails="none").page
    for width, scheme in ((1200, "light"), (400, "dark")):
        with Opened(browser, page, width=width, color_scheme=scheme) as opened:
            assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
            boxes = opened.page.locator(".by-class .item bdi").all_text_contents()
            assert boxes[:-1] == list(HOSTILE)
            opened.page.locator(".search input").fill("onerror")
            assert opened.page.locator(".results button").count() == 8
            opened.page.locator(".search input").press("Enter")
            chosen = opened.page.locator(".chosen")
            assert HOSTILE[1] in chosen.locator(".one .id").text_content()
            assert chosen.locator(".one .class").text_content() == HOSTILE[0]
            opened.page.mouse.move(*opened.at(2))
            opened.page.locator(".tip").wait_for(state="visible")
            shown = opened.page.locator(".tip .class").text_content()
            assert shown in HOSTILE
            assert opened.page.evaluate("window.pwned") is None
            assert opened.page.locator("main img, main script").count() == 0
            assert opened.errors() == []
            assert [url for url in opened.requests if url != opened.url] == []


@pytest.mark.long
def test_sixty_thousand_points_stay_smooth(browser, tmp_path):
    names = [f"class {number}" for number in range(10)]
    cache = cache_of_names(tmp_path / "x.h5", names, n_train=50_000, n_test=10_000, dim=16)
    page = report(cache, thumbnails="none", health=False).page
    with Opened(browser, page) as opened:
        opened.page.locator(".stage").scroll_into_view_if_needed()
        box = opened.page.locator(".stage").bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        opened.page.evaluate(
            "() => { window.frames_ms = []; let last = performance.now(); const next = () => {"
            "const now = performance.now(); window.frames_ms.push(now - last); last = now;"
            "requestAnimationFrame(next); }; requestAnimationFrame(next); }"
        )
        opened.page.mouse.move(x, y)
        opened.page.mouse.down()
        opened.page.mouse.move(x + 120, y + 60, steps=60)
        opened.page.mouse.up()
        # No graphics card here, and other work on the cores: far from what a laptop does.
        assert np.median(opened.page.evaluate("window.frames_ms")) < 120
        hits_ms = opened.map(
            "map => { const start = performance.now(); for (let i = 0; i < 100; i += 1)"
            "map.under({ clientX: i, clientY: 300 });"
            "return (performance.now() - start) / 100; }"
        )
        assert hits_ms < 5, "the nearest of 60,000 points, at each move of the pointer"
