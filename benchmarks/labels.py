"""Tables, targets, folds and rows found again: how long they take, and beside what.

    python benchmarks/labels.py --walk CIFAR10.zip [--images 10000]
    python benchmarks/labels.py --table [--rows 1000000]
    python benchmarks/labels.py --targets [--rounds 1]
    python benchmarks/labels.py --again CIFAR10.zip

--walk is the walk of docs/guides/labels.md, each command in a process of its own, as users type
it: a folder of real images, a table with two targets, groups and folds, a question of each kind,
100 more images, 20 corrected labels; wall time of each step, and the images computed.
--table joins a table of so many rows (CSV) to as many ids in a child process, which also reports
its peak memory; then it attaches the table to a cache of as many rows, and asks it.
--targets compares, in turn and in one process on made-up features (50,000 x 512 to train, 10,000 to
test): 80 labels with scikit-learn's LogisticRegression per label at one C (5 of them, times 16);
ridge with RidgeCV; cross-validation by groups with LogisticRegression at one C in GroupKFold.
--again times extract on all 60,000 images, in a folder, where the cache is there already.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np

ANIMALS = ("bird", "cat", "deer", "dog", "frog", "horse")
WEIGHTS = ("--weights", "tinyimagenet32")


def timed(work):
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def featcache(folder: Path, *words: str) -> dict:
    """Run a command as a user would; return its facts, and the wall time of the whole process."""
    command = [sys.executable, "-m", "featcache", *words, "--json"]
    started = time.perf_counter()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    wall_s = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}: {done.stderr}")
    facts = json.loads(done.stdout)
    return {**(facts if isinstance(facts, dict) else {"all": facts}), "process_s": wall_s}


def told(step: str, facts: dict, said: str) -> None:
    print(f"| {step} | {facts['process_s']:.1f} s | {said} |")


def unpacked(archive: Path, folder: Path, chosen: range) -> list[str]:
    """Write these images of each class of the training split; return their names."""
    written = []
    with zipfile.ZipFile(archive) as images:
        names = [name for name in images.namelist() if name.startswith("train/")]
        classes = sorted({name.split("/")[1] for name in names})
        for label in classes:
            own = [name for name in names if name.split("/")[1] == label]
            for name in own[chosen.start : chosen.stop]:
                short = name.removeprefix("train/")
                (folder / short).parent.mkdir(parents=True, exist_ok=True)
                (folder / short).write_bytes(images.read(name))
                written.append(short)
    return written


def brightness(path: Path) -> float:
    from PIL import Image

    return float(np.asarray(Image.open(path).convert("L")).mean())


def write_table(path: Path, photos: Path, names: list[str], wrong: int = 0) -> None:
    """Write path, species, kind, camera, brightness; the first labels of ``wrong`` are swapped."""
    with path.open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["path", "species", "kind", "camera", "brightness"])
        for number, name in enumerate(names):
            species = name.split("/")[0]
            if number % (len(names) // max(wrong, 1)) == 0 and wrong:
                species = "cat" if species != "cat" else "dog"
            kind = "animal" if name.split("/")[0] in ANIMALS else "vehicle"
            # Nobody knows who photographed CIFAR-10: 25 images in a row are one camera's here.
            camera = f"camera-{int(Path(name).stem) // 25}"
            table.writerow([name, species, kind, camera, f"{brightness(photos / name):.3f}"])


def walk(archive: Path, n_images: int) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder, per_class = Path(place), n_images // 10
        photos = folder / "photos"
        names = unpacked(archive, photos, range(per_class))
        write_table(folder / "labels.csv", photos, names, wrong=20)
        print("| step | time | result |\n| --- | --- | --- |")
        made = featcache(folder, "extract", "photos", *WEIGHTS)
        told("extract", made, f"{made['computed']:,} images computed")
        cache = made["cache"]
        told("label", featcache(folder, "label", cache, "labels.csv"), f"{len(names):,} rows")

        def top1(words: list[str], step: str, at: str) -> None:
            facts = featcache(folder, "probe", at, *words)
            told(step, facts, f"top-1 {100 * facts['top1']:.2f} %")

        top1(["--target", "species"], "probe --target species", cache)
        top1(["--target", "kind"], "probe --target kind", cache)
        facts = featcache(folder, "probe", cache, "--target", "brightness")
        told("probe --target brightness", facts, f"R2 {facts['r2']:.3f}")
        facts = featcache(
            folder, "probe", cache, "--target", "species", "--cv", "5", "--group", "camera"
        )
        low, high = facts["interval"]
        said = f"{100 * facts['mean']:.2f} % ({100 * low:.1f} to {100 * high:.1f})"
        told("probe --cv 5 --group camera", facts, said)
        names += unpacked(archive, photos, range(per_class, per_class + 10))
        again = featcache(folder, "extract", "photos", *WEIGHTS)
        told(
            "100 more images: extract",
            again,
            f"{again['computed']} computed, {again['reused_rows']:,} reused",
        )
        write_table(folder / "labels.csv", photos, names)
        facts = featcache(folder, "label", again["cache"], "labels.csv")
        told("20 labels corrected: label", facts, "0 images computed")
        top1(["--target", "species"], "probe --target species", again["cache"])
        last = featcache(folder, "extract", "photos", *WEIGHTS)
        told("extract, nothing to do", last, f"{last['computed']} images computed")


def table(n_rows: int) -> None:
    """Join a table of so many rows in a child, whose memory is its own."""
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "labels.csv"
        generator = np.random.default_rng(0)
        columns = generator.integers(0, 100, (4, n_rows)).tolist()
        with path.open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["path", "species", "fold", "patient", "age"])
            for row, (species, fold, patient, age) in enumerate(zip(*columns, strict=True)):
                writer.writerow([f"{row:08d}.jpg", f"species {species}", fold % 5, patient, age])
        subprocess.run([sys.executable, __file__, "--joined", str(path)], check=True)
        from featcache.store.cache import Cache

        ids = [f"{row:08d}.jpg" for row in range(n_rows)]
        features = generator.normal(size=(n_rows, 16)).astype(np.float32)
        Cache.from_arrays(features, path=Path(place) / "rows.h5", ids=ids)
        facts = featcache(Path(place), "label", "rows.h5", "labels.csv")
        print(f"featcache label of {facts['n_matched']:,} rows: {facts['process_s']:.1f} s")
        asked = ("--target", "species", "--group", "patient", "--where", "age > 20")
        quick = ("--solver", "ridge", "--C", "1", "--no-check")
        facts = featcache(Path(place), "probe", "rows.h5", *asked, *quick)
        n_images = facts["n_train"] + facts["n_test"]
        print(f"featcache probe of {n_images:,} of them, by group: {facts['process_s']:.1f} s")


def joined(path: Path) -> None:
    from featcache.tables.joining import join
    from featcache.tables.reading import read_table

    n_rows = sum(1 for _ in path.open()) - 1
    ids = [f"{row:08d}.jpg" for row in range(n_rows)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    wall_s, found = timed(lambda: join(read_table(path), ids, None))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    assert (found.rows >= 0).all()
    print(
        f"{n_rows:,} rows read and joined in {wall_s:.1f} s; peak {peak:,.0f} MB, of which "
        f"{before:,.0f} before, the ids among them"
    )


def made_up(n: int, dim: int, generator: np.random.Generator) -> np.ndarray:
    """Return features with the spectrum of a ResNet's: non-negative, correlated."""
    mixing = generator.normal(size=(dim, dim)) * (1 / np.arange(1, dim + 1) ** 0.5)
    x = np.maximum(generator.normal(size=(n, dim)) @ mixing.T * 0.2 + 0.3, 0)
    return x.astype(np.float32)


def targets(rounds: int) -> None:
    import featcache
    from featcache.store.cache import Cache

    generator = np.random.default_rng(0)
    n, n_train, dim, n_labels = 60_000, 50_000, 512, 80
    x = made_up(n, dim, generator)
    scores = x @ generator.normal(size=(dim, n_labels)).astype(np.float32) * 0.3
    scores += generator.normal(size=scores.shape) * scores.std()
    cuts = np.quantile(scores, np.linspace(0.5, 0.98, n_labels), axis=0).diagonal()
    many = scores > cuts
    classes = scores[:, :10].argmax(axis=1)
    groups = generator.integers(0, 500, n)
    ids = [f"{row:05d}" for row in range(n)]
    table = {
        "id": ids,
        "tags": [[f"tag {label:02d}" for label in np.flatnonzero(row)] for row in many],
        "height": scores[:, 0].astype(float).tolist(),
        "width": scores[:, 1].astype(float).tolist(),
        "kind": [f"kind {label}" for label in classes],
        "patient": [f"patient {group}" for group in groups],
    }
    walls: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as place:
        sides = ["train"] * n_train + ["test"] * (n - n_train)
        path = Path(place) / "made-up.h5"
        cache = Cache.from_arrays(x, path=path, ids=ids, splits=sides)
        featcache.label(cache, table)
        cache = featcache.load(path)
        fifty = f"cache of {n_train:,} x {dim}"
        given = {"check": False, "runs": place}
        contenders = {
            f"80 labels, {fifty}: featcache, C of each chosen": lambda: featcache.probe(
                cache, target="tags", **given
            ),
            "80 labels: scikit-learn, one C, 5 labels times 16": lambda: [
                sklearn_binary(x[:n_train], many[:n_train, label]) for label in range(0, 80, 16)
            ],
            "2 numbers: featcache, penalty chosen": lambda: featcache.probe(
                cache, target=["height", "width"], **given
            ),
            "2 numbers: RidgeCV, 20 values": lambda: sklearn_ridge(
                x[:n_train], scores[:n_train, :2]
            ),
            "5 folds by groups of all 60,000: featcache, C chosen in each": lambda: featcache.probe(
                cache, target="kind", cv=5, group="patient", **given
            ),
            "5 folds by groups of all 60,000: scikit-learn, one C": lambda: sklearn_folds(
                x, classes, groups
            ),
        }
        for _ in range(rounds):
            for name, work in contenders.items():
                wall_s, _ = timed(work)
                walls.setdefault(name, []).append(wall_s * (16 if "times 16" in name else 1))
                print(f"{name}: {walls[name][-1]:.1f} s", file=sys.stderr)
    for name, all_s in walls.items():
        print(f"| {name} | {statistics.median(all_s):.1f} s |")


def sklearn_binary(x: np.ndarray, y: np.ndarray) -> None:
    from sklearn.linear_model import LogisticRegression

    LogisticRegression(C=1.0, max_iter=1000).fit(x, y)


def sklearn_ridge(x: np.ndarray, y: np.ndarray) -> None:
    from sklearn.linear_model import RidgeCV

    RidgeCV(np.logspace(-4, 4, 20)).fit(x, y)


def sklearn_folds(x: np.ndarray, y: np.ndarray, groups: np.ndarray) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold, cross_val_score

    model = LogisticRegression(C=1.0, max_iter=1000)
    cross_val_score(model, x, y, groups=groups, cv=GroupKFold(5))


def again(archive: Path) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        with zipfile.ZipFile(archive) as images:
            images.extractall(folder / "photos")
        first = featcache(folder, "extract", "photos", *WEIGHTS)
        print(f"extract of {first['computed']:,} images: {first['process_s']:.0f} s")
        os.sync()
        time.sleep(3)  # files of the last two seconds are hashed again
        featcache(folder, "extract", "photos", *WEIGHTS)
        walls = [featcache(folder, "extract", "photos", *WEIGHTS)["process_s"] for _ in range(5)]
        print(f"the same command again: {statistics.median(walls):.2f} s (median of 5)")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--walk", type=Path)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--joined", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--targets", action="store_true")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--again", type=Path)
    options = parser.parse_args()
    if options.walk:
        walk(options.walk.resolve(), options.images)
    if options.table:
        table(options.rows)
    if options.joined:
        joined(options.joined)
    if options.targets:
        targets(options.rounds)
    if options.again:
        again(options.again.resolve())


if __name__ == "__main__":
    main()
