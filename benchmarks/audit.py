"""Claim: a cosine of 0.95 finds near-duplicates, and the suspects are ahead of cleanlab's.

    python benchmarks/audit.py CACHE IMAGES [--labels-only] [--peer-python PYTHON]

CACHE holds features of CIFAR-10 (featcache extract IMAGES --weights tinyimagenet32 --size 64);
IMAGES is the .zip or folder it was made from. Three measurements:

1. How many test images above a similarity threshold show the same picture as their nearest training
   image: a pixel correlation of 0.85 or more at the best shift of up to 4 pixels, mirrored or not.
2. How similar 1,000 test images are to themselves after a slight alteration.
3. How many of the first suspects are wrong, after 3 or 10 % of the training labels are changed: to
   any other class, to the next one, or to one fixed class from a third of the classes only. With
   ``--peer-python``, a Python that has cleanlab, its rankings of the same probabilities (the heads'
   alone) and the lists of its filters stand beside. --labels-only takes no IMAGES.
"""

from __future__ import annotations

import argparse
import io
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

import featcache
from featcache.auditing.labels import doubts, fit_heads, reference_of, with_neighbours
from featcache.probes.knn import nearest

THRESHOLDS = (0.90, 0.92, 0.94, 0.95, 0.96, 0.97, 0.98)
SHIFT, SAME = 4, 0.85
N_ALTERED = 1000


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return Image.open(stream).convert("RGB")


def shifted(image: Image.Image, by: int) -> Image.Image:
    padded = np.pad(np.asarray(image), ((by, by), (by, by), (0, 0)), "edge")
    return Image.fromarray(np.ascontiguousarray(padded[: image.height, : image.width]))


ALTERATIONS = {
    "colour x 0.7": lambda image: ImageEnhance.Color(image).enhance(0.7),
    "brightness x 1.15": lambda image: ImageEnhance.Brightness(image).enhance(1.15),
    "shifted by 1 pixel": lambda image: shifted(image, 1),
    "contrast x 0.8": lambda image: ImageEnhance.Contrast(image).enhance(0.8),
    "mirrored": ImageOps.mirror,
    "shifted by 2 pixels": lambda image: shifted(image, 2),
    "JPEG at quality 30": lambda image: jpeg(image, 30),
    "JPEG at quality 50": lambda image: jpeg(image, 50),
    "the middle 28 pixels": lambda image: image.crop((2, 2, 30, 30)).resize((32, 32)),
    "24 pixels and back": lambda image: image.resize((24, 24)).resize((32, 32)),
}


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Return the best correlation of two images (32, 32, 3) over shifts and mirroring."""
    best, shifts = -1.0, range(-SHIFT, SHIFT + 1)
    for other in (b, b[:, ::-1]):
        for dy in shifts:
            for dx in shifts:
                p = a[max(0, dy) : 32 + min(0, dy), max(0, dx) : 32 + min(0, dx)].astype(float)
                q = other[max(0, -dy) : 32 + min(0, -dy), max(0, -dx) : 32 + min(0, -dx)]
                p, q = p - p.mean((0, 1)), q - q.mean((0, 1))
                scale = np.sqrt(np.square(p).sum() * np.square(q).sum())
                best = max(best, float((p * q).sum() / scale) if scale else -1.0)
    return best


def thresholds(cache: featcache.Cache, data: featcache.Dataset) -> None:
    similarity, rows = nearest(cache.test.features, cache.train.features, 1)
    similarity, rows = similarity[:, 0], rows[:, 0]
    same = {}
    for row in np.flatnonzero(similarity >= THRESHOLDS[0]).tolist():
        a, b = data.test.images[row], data.train.images[int(rows[row])]
        same[row] = correlation(np.asarray(a), np.asarray(b)) >= SAME
    for threshold in THRESHOLDS:
        chosen = [same[row] for row in np.flatnonzero(similarity >= threshold).tolist()]
        print(f"cosine {threshold:.2f}: {len(chosen)} test images, {np.mean(chosen):.3f} the same")


def alterations(cache: featcache.Cache, data: featcache.Dataset) -> None:
    chosen = np.sort(np.random.default_rng(0).choice(len(cache.test), N_ALTERED, replace=False))
    with tempfile.TemporaryDirectory() as place:
        root = Path(place) / "altered"
        for number, (_, alter) in enumerate(ALTERATIONS.items()):
            for role, rows in (("train", chosen), ("test", chosen[:1])):
                folder = root / role / f"{number:02d}"
                folder.mkdir(parents=True)
                for row in rows.tolist():
                    image = Image.fromarray(np.asarray(data.test.images[row]))
                    alter(image).save(folder / f"{row:05d}.png")
        made = featcache.extract(
            str(root), weights=cache.meta["weights"], size=cache.meta["preprocess"]["size"],
            output=Path(place) / "altered.h5",
        )  # fmt: skip
        altered = made.load().train
        extracted, kinds = altered.features, altered.labels
    originals = cache.test.features[chosen]
    originals = originals / np.linalg.norm(originals, axis=1, keepdims=True)
    for number, name in enumerate(ALTERATIONS):
        features = extracted[kinds == number]
        features = features / np.linalg.norm(features, axis=1, keepdims=True)
        cosine = (features * originals).sum(axis=1)
        shares = ", ".join(f"{t:.2f}: {np.mean(cosine >= t):.2f}" for t in THRESHOLDS[::3])
        print(f"{name}: median {np.median(cosine):.3f}; at {shares}")


def noise(
    labels: np.ndarray, n_classes: int, kind: str, share: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return changed labels (N,), and which rows were changed."""
    generator, changed = np.random.default_rng(7), labels.copy()
    some = labels < max(1, n_classes // 3) if kind == "one class to another" else labels >= 0
    wrong = generator.choice(np.flatnonzero(some), round(share * len(labels)), replace=False)
    if kind == "any":
        changed[wrong] += generator.integers(1, n_classes, len(wrong))
    elif kind == "the next":
        changed[wrong] += 1
    else:
        changed[wrong] = n_classes - 1 - changed[wrong]
    return changed % n_classes, wrong


PEER = """
import sys, warnings
import numpy as np
warnings.simplefilter("ignore")
from cleanlab.filter import find_label_issues
from cleanlab.rank import get_label_quality_scores
with np.load(sys.argv[1]) as held:
    labels, p = held["labels"], held["p"]
found = {}
for method in ("self_confidence", "normalized_margin"):
    for adjust in (False, True):
        scores = get_label_quality_scores(labels, p, method=method, adjust_pred_probs=adjust)
        name = f"cleanlab {method}{', adjusted' if adjust else ''}"
        found[name] = np.argsort(scores, kind="stable")
for name in ("prune_by_noise_rate", "low_self_confidence"):
    found[f"cleanlab's list {name}"] = find_label_issues(
        labels, p, filter_by=name, return_indices_ranked_by="self_confidence", n_jobs=1
    )
np.savez(sys.argv[2], **found)
"""


def flips(cache: featcache.Cache, peer: str | None) -> None:
    features, n_classes = cache.train.features, len(cache.class_names)
    similarity, rows = nearest(features, features, 10, exclude_self=True)
    for kind in ("any", "the next", "one class to another"):
        for share in (0.03, 0.1):
            labels, wrong = noise(cache.train.labels, n_classes, kind, share)
            p = fit_heads(features, labels, features[:1], 5, 0, lambda message: None).train
            joined = with_neighbours(p, similarity, labels[rows])
            lists = {"featcache": doubts(joined, labels, reference_of(joined, labels)).rows}
            if peer is not None:
                with tempfile.TemporaryDirectory() as place:
                    given, made = Path(place) / "given.npz", Path(place) / "made.npz"
                    np.savez(given, labels=labels, p=p)
                    subprocess.run([peer, "-c", PEER, str(given), str(made)], check=True)
                    with np.load(made) as held:
                        lists |= dict(held)
            print(f"{len(wrong)} labels changed to {kind}; of the first third, two thirds, all:")
            for name, found in lists.items():
                hits = np.isin(found, wrong)
                firsts = (len(wrong) // 3, 2 * len(wrong) // 3, len(wrong))
                shares = " ".join(f"{hits[:n].sum() / n:.3f}" for n in firsts)
                list_ = f"; list of {len(found)} has {hits.sum() / len(wrong):.3f} of them"
                print(f"  {name:40} {shares}{list_ if len(found) < len(labels) else ''}")


def main() -> None:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("cache")
    parser.add_argument("images", nargs="?")
    parser.add_argument("--labels-only", action="store_true")
    parser.add_argument("--peer-python")
    arguments = parser.parse_args()
    cache = featcache.load(arguments.cache)
    if not arguments.labels_only:
        data = featcache.load_dataset(arguments.images)
        thresholds(cache, data)
        alterations(cache, data)
    flips(cache, arguments.peer_python)


if __name__ == "__main__":
    main()
