"""Corrections raise a head: labels of CIFAR-10 are flipped, and put right in two orders.

``python benchmarks/label.py CACHE`` takes a cache of CIFAR-10, flips a share of the training labels
to another class, drawn evenly, and answers each image that `featcache serve --label` would show
with its true label. The head is trained again after every ten. In the other order, images come at
random. Test accuracy is reported and chooses nothing: C is the one that the session chooses.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from featcache import load, probe
from featcache.auditing.labels import probabilities_of
from featcache.metrics import top1
from featcache.prediction import checked_head
from featcache.serving.cached import Cached
from featcache.serving.labelling import Labelling
from featcache.store.cache import Cache

EVERY = 10


def flipped(cache: Cache, n: int, share: float, seed: int, folder: Path) -> tuple[Cache, list[str]]:
    """Return a cache of n training images of which a share is labelled wrongly, and the truth."""
    generator = np.random.default_rng(seed)
    n_classes = len(cache.class_names)
    chosen = np.sort(generator.choice(len(cache.train), n, replace=False))
    truth = cache.train.labels[chosen]
    labels = truth.copy()
    wrong = generator.choice(n, round(share * n), replace=False)
    labels[wrong] = (truth[wrong] + generator.integers(1, n_classes, len(wrong))) % n_classes
    ids = [f"train/{row}" for row in chosen] + [f"test/{row}" for row in range(len(cache.test))]
    made = Cache.from_arrays(
        np.concatenate([cache.train.features[chosen], cache.test.features]),
        np.concatenate([labels, cache.test.labels]),
        path=folder / f"flipped-{seed}.h5",
        class_names=cache.class_names,
        ids=ids,
        splits=["train"] * n + ["test"] * len(cache.test),
        made_by="benchmarks/label.py",
    )
    return made, [cache.class_names[label] for label in truth.tolist()]


def shown(session: Labelling, n: int, seed: int, *, at_random: bool) -> Iterator[tuple[int, int]]:
    """Yield row and version of the images in one of the two orders."""
    drawn = iter(np.random.default_rng(seed).permutation(n).tolist())
    while True:
        if at_random:
            yield next(drawn), 0
        elif (item := session.next("benchmark")) is not None:
            yield item.row, item.version


def curve(
    cache: Cache,
    truth: list[str],
    folder: Path,
    marks: list[int],
    seed: int,
    *,
    at_random: bool,
) -> list[dict[str, float]]:
    """Correct images until the last mark; return what the head is worth at each."""
    points: list[dict[str, float]] = []
    n_found = 0
    given = [cache.class_names[label] for label in cache.train.labels.tolist()]
    table = folder / f"labels-{seed}-{at_random}.csv"
    head, where = checked_head(folder / "head.safetensors")
    with contextlib.closing(Labelling(Cached(cache, head, where), head, table)) as session:
        session.find_neighbours()
        images = shown(session, len(truth), seed, at_random=at_random)
        for done in range(max(marks) + 1):
            if done % EVERY == 0:
                session.learn()
            if done in marks:
                learnt = session.learnt
                likely = probabilities_of(learnt.heads.whole, cache.test.features).argmax(axis=1)
                point = {
                    "corrections": done,
                    "wrong_labels_found": n_found,
                    "holdout_top1": session.state()["curve"][-1]["accuracy"],
                    "test_top1": top1(learnt.classes[likely], cache.test.labels),
                }
                print(f"  {point}", file=sys.stderr)
                points.append(point)
            row, version = next(images)
            n_found += given[row] != truth[row]
            session.correct(cache.train.ids[row], truth[row], version)
    return points


def main() -> None:
    """Run both orders for every seed, and print the means."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cache")
    parser.add_argument("--train", type=int, default=5_000, help="training images that are drawn")
    parser.add_argument("--wrong", type=float, default=0.05, help="share with a wrong label")
    parser.add_argument("--marks", type=int, nargs="+", default=[0, 50, 100, 150, 200])
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    source = load(args.cache)
    found: dict[str, list[list[dict[str, float]]]] = {"ours": [], "random": []}
    started = time.process_time()
    for seed in range(args.seeds):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            cache, truth = flipped(source, args.train, args.wrong, seed, folder)
            probe(cache, save_head_to=folder / "head.safetensors", runs=folder / "runs")
            for order, curves in found.items():
                print(f"seed {seed}, {order}", file=sys.stderr)
                at_random = order == "random"
                curves.append(curve(cache, truth, folder, args.marks, seed, at_random=at_random))
    for order, curves in found.items():
        for points in zip(*curves, strict=True):
            means = {name: np.mean([point[name] for point in points]) for name in points[0]}
            spread = np.std([point["test_top1"] for point in points], ddof=min(1, args.seeds - 1))
            print(
                f"{order:7s} {means['corrections']:4.0f} corrections: "
                f"{means['wrong_labels_found']:6.1f} wrong labels found, "
                f"held out {means['holdout_top1']:.2%}, "
                f"test {means['test_top1']:.2%} (standard deviation {spread:.2%})"
            )
    print(json.dumps({**vars(args), "curves": found, "cpu_s": time.process_time() - started}))


if __name__ == "__main__":
    main()
