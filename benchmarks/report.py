"""The time of `featcache report`, part by part, and the frame rate of its map.

    python benchmarks/report.py CACHE [--thumbnails all] [--dataset PATH]
    python benchmarks/report.py --made 60000
    python benchmarks/report.py CACHE --browser /usr/bin/chromium

Writes the page into a temporary folder. Prints wall time by part, processor time of all threads,
and the size of the page and of its thumbnails. --made N writes a cache of N random features (512
dimensions, ten classes, one sixth test) instead of reading one. --browser opens the page in that
Chromium, without a graphics card, drags the map, zooms and hovers, and prints the median and the
95th percentile of the time between frames. Needs featcache[report], and playwright for --browser.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from scale import make_cache

import featcache

DIM, CLASSES = 512, 10
FRAMES = """() => { window.frames_ms = []; let last = performance.now(); const next = () => {
const now = performance.now(); window.frames_ms.push(now - last); last = now;
window.frames_asked = requestAnimationFrame(next); }; requestAnimationFrame(next); }"""


def frames(page, act) -> str:
    page.evaluate(FRAMES)
    act()
    times = page.evaluate("(cancelAnimationFrame(window.frames_asked), window.frames_ms)")
    return f"{statistics.median(times):6.1f} ms, 95 %: {np.percentile(times, 95):6.1f} ms"


def browse(path: Path, chromium: str) -> None:
    from playwright.sync_api import sync_playwright

    options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=options)
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        started = time.perf_counter()
        page.goto(path.as_uri())
        page.evaluate("featcache.ready")
        print(f"{'open':12} {time.perf_counter() - started:6.2f} s")
        page.locator(".stage").scroll_into_view_if_needed()
        box = page.locator(".stage").bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2

        def drag() -> None:
            page.mouse.move(x, y)
            page.mouse.down()
            page.mouse.move(x + 120, y + 60, steps=60)
            page.mouse.up()

        def zoom() -> None:
            page.mouse.click(x, y)
            for _ in range(12):
                page.mouse.wheel(0, -120)
                page.wait_for_timeout(30)

        def hover() -> None:
            page.mouse.move(x - 200, y - 100)
            page.mouse.move(x + 200, y + 100, steps=120)

        for name, act in (("drag", drag), ("zoom", zoom), ("hover", hover)):
            print(f"{name:12} {frames(page, act)}")
            page.wait_for_timeout(1500)
        browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("cache", nargs="?", type=Path)
    parser.add_argument("--made", type=int, metavar="N")
    parser.add_argument("--thumbnails", default="auto")
    parser.add_argument("--dataset")
    parser.add_argument("--map", default="pca")
    parser.add_argument("--browser", metavar="CHROMIUM")
    asked = parser.parse_args()
    if (asked.cache is None) == (asked.made is None):
        parser.error("give a cache, or --made N")
    with tempfile.TemporaryDirectory() as folder:
        cache = asked.cache or make_cache(
            Path(folder) / "made.h5", asked.made - asked.made // 6, asked.made // 6, DIM, CLASSES
        )
        before = os.times()
        result = featcache.report(
            cache,
            output=Path(folder) / "report.html",
            thumbnails=asked.thumbnails,
            dataset=asked.dataset,
            map=asked.map,
        )
        after = os.times()
        for name, spent in result.stages_s.items():
            print(f"{name:12} {spent:6.1f} s")
        processor = after.user + after.system - before.user - before.system
        print(f"{'all':12} {result.wall_s:6.1f} s, {processor:.1f} s of processor time")
        size, thumbnails = result.size_bytes / 1e6, result.thumbnail_bytes / 1e6
        print(f"{'page':12} {size:6.2f} MB, {thumbnails:.2f} MB of it thumbnails")
        for note in result.notes:
            print(note)
        if asked.browser:
            browse(result.page, asked.browser)


if __name__ == "__main__":
    main()
