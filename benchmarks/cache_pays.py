"""The cost of k questions, from the cache and end to end, for k from 1 to 100.

    python benchmarks/cache_pays.py CIFAR10.zip [--images 1000] [--questions 100] [--engine torch]
                                    [--results docs/results]

A question is how good a linear head is, with one of k penalties or one of k seeds. End to end, the
backbone runs for every question, as in the tutorial's method 3: `featcache.finetune` with method
frozen for 3 epochs. With the cache, the backbone runs once (included in the cost), and
`featcache.probe` answers each question exactly; a seed draws the images on which the best of 20
penalties is chosen. All run in turn in one process, and nothing is extrapolated. Writes
cache-pays.json and cache-pays.svg.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import featcache

ROOT = Path(__file__).resolve().parents[1]
SIZE = 64


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Return the seconds of the extraction, and of each question asked in each way."""
    limits = {"train_limit": options.images, "test_limit": options.images // 2}
    common: dict[str, Any] = {"weights": "tinyimagenet32", "size": SIZE, "engine": options.engine}
    common["precision"] = options.precision
    seconds: dict[str, list[float]] = {"end to end": [], "penalties": [], "seeds": []}
    penalties = np.geomspace(1e-5, 1e-1, options.questions).tolist()
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder) / "runs"
        started = time.perf_counter()
        made = featcache.extract(
            options.data, output=Path(folder) / "f.h5", reuse=False, **limits, **common
        )
        extract_s = time.perf_counter() - started
        asked: dict[str, Any] = {"check": False, "runs": runs}
        featcache.probe(made.cache, **asked)  # what is loaded once is loaded now
        for number, penalty in enumerate(penalties):
            questions = {
                "end to end": lambda penalty=penalty: featcache.finetune(
                    options.data, "frozen", weight_decay=penalty, runs=runs, **limits, **common
                ),
                "penalties": lambda penalty=penalty: featcache.probe(
                    made.cache, weight_decay=penalty, **asked
                ),
                "seeds": lambda number=number: featcache.probe(made.cache, seed=number, **asked),
            }
            for name, ask in questions.items():
                started = time.perf_counter()
                ask()
                seconds[name].append(time.perf_counter() - started)
            print(
                f"{number + 1}/{options.questions}: "
                + ", ".join(f"{name} {times[-1]:.2f} s" for name, times in seconds.items()),
                file=sys.stderr,
                flush=True,
            )
    return {
        "images": options.images,
        "size": SIZE,
        "engine": made.engine,
        "precision": options.precision,
        "featcache": featcache.__version__,
        "extract_s": extract_s,
        "seconds": seconds,
    }


def lines(found: dict[str, Any]) -> dict[str, list[float]]:
    """Return the seconds that the first k questions took, k from 1 on, in each way."""
    sums = {name: list(itertools.accumulate(times)) for name, times in found["seconds"].items()}
    once = found["extract_s"]
    return {
        "end to end": sums["end to end"],
        "cache, k penalties": [once + spent for spent in sums["penalties"]],
        "cache, k seeds": [once + spent for spent in sums["seeds"]],
    }


def draw(found: dict[str, Any]) -> Any:
    from featcache.reporting.style import SERIES, head, label_beside, sheet

    with sheet(6.4, 3.2) as figure:
        caption = (
            f"{found['images']:,} training images of CIFAR-10 at {found['size']} px, "
            f"{found['engine']} {found['precision']}. The cache's lines include the extraction."
        )
        head(figure, "The cost of k questions", caption)
        axes = figure.add_subplot()
        for (name, spent), colour in zip(lines(found).items(), SERIES, strict=False):
            axes.plot(range(1, len(spent) + 1), spent, color=colour)
            label_beside(axes, len(spent), spent[-1], f"{name}: {spent[-1]:,.0f} s", colour)
        axes.set(xscale="log", yscale="log", xlabel="questions, k", ylabel="seconds")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="a zip or folder of train/ and test/ with class folders")
    parser.add_argument(
        "--images", type=int, default=1000, help="training images; half as many test images"
    )
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--engine", default="torch", choices=("oneflow", "torch"))
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "results")
    options = parser.parse_args()
    from featcache.reporting.style import save_figure

    found = measure(options)
    options.results.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found, indent=1)
    (options.results / "cache-pays.json").write_text(text + "\n", encoding="utf-8")
    save_figure(draw(found), options.results / "cache-pays.svg")
    print(f"extraction: {found['extract_s']:.1f} s")
    for name, spent in lines(found).items():
        places = [k for k in (1, 10, 100) if k <= len(spent)]
        print(f"{name:20}", ", ".join(f"k = {k}: {spent[k - 1]:,.1f} s" for k in places))


if __name__ == "__main__":
    main()
