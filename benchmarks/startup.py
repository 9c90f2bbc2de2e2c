"""Claim: a command answers at once: help, one image, the first of 100 images, a probe.

    python benchmarks/startup.py [--against CHECKOUT] [--size 224] [--rounds 3]

Runs each command in a process of its own, in turn with another checkout's where one is given, and
prints the median of the processor seconds (user and system, all threads) and of the seconds until
the first line of the answer. Compiled Python files are kept, as in an installation. On a machine
that others use too, believe the processor seconds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parents[1]
STARTER = next((HERE / "cache").glob("*.h5"))


def measure(checkout: Path, *words: str) -> tuple[float, float]:
    """Return processor seconds, and seconds until the first line of the answer."""
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    environment["PYTHONPYCACHEPREFIX"] = str(Path(tempfile.gettempdir()) / "featcache-startup")
    began = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, "-m", "featcache", *words],
        env=environment,
        cwd=checkout,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert child.stdout is not None
    child.stdout.readline()
    first_s = time.perf_counter() - began
    child.stdout.read()
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{checkout}: featcache {' '.join(words)} failed")
    return used.ru_utime + used.ru_stime, first_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", type=Path, help="another checkout of featcache")
    parser.add_argument("--size", type=int, default=224, help="side of the images in pixels")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    checkouts = [HERE, *filter(None, [options.against])]
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder, "images")
        images.mkdir()
        for number in range(100):
            pixels = generator.integers(0, 256, (28, 28, 3), np.uint8)
            side = (options.size, options.size)
            Image.fromarray(pixels).resize(side).save(images / f"{number:02}.jpg")
        digits, head = f"{folder}/digits.h5", f"{folder}/head.safetensors"
        measure(HERE, *f"extract digits --weights tinyimagenet32 --size 224 -o {digits}".split())
        runs = f"--runs {folder}/runs"
        measure(HERE, *f"probe {digits} --no-check --save-head {head} {runs}".split())
        commands = {
            "help": "--help",
            "predict, 1 image": f"predict {images}/00.jpg --head {head} --format csv",
            "predict, 100 images": f"predict {images} --head {head} --format csv",
            "probe, starter cache": f"probe {STARTER} {runs}",
        }
        print("command, processor s, s to the first line")
        for name, words in commands.items():
            found = [
                [measure(checkout, *words.split()) for checkout in checkouts]
                for _ in range(options.rounds + 1)
            ][1:]  # the first one compiles
            for place, checkout in enumerate(checkouts):
                cpu, first = (
                    statistics.median(times)
                    for times in zip(*(one[place] for one in found), strict=True)
                )
                print(f"{name}, {checkout}: {cpu:.2f}, {first:.2f}", flush=True)


if __name__ == "__main__":
    main()
