"""Claim: a cosine of 0.95 finds near-duplicates, and low self-confidence finds wrong labels.

    python benchmarks/audit.py CACHE IMAGES

CACHE holds features of CIFAR-10 (featcache extract IMAGES --weights tinyimagenet32 --size 64);
IMAGES is the .zip or folder it was made from. Three measurements:

1. How many test images above a similarity threshold show the same picture as their nearest training
   image: a pixel correlation of 0.85 or more at the best shift of up to 4 pixels, mirrored or not.
2. How similar 1,000 test images are to themselves after a slight alteration.
3. How many of the first suspects are wrong, after 3 % of the training labels are changed at random,
   ranked by self-confidence and by the margin to the suggested class.
"""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

import featcache
from featcache.auditing.labels import doubts, fit_heads, thresholds_of
from featcache.probes.knn import nearest

THRESHOLDS = (0.90, 0.92, 0.94, 0.95, 0.96, 0.97, 0.98)
SHIFT, SAME = 4, 0.85
N_ALTERED = 1000
FLIPPED = 0.03


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


def flips(cache: featcache.Cache) -> None:
    generator = np.random.default_rng(7)
    labels = cache.train.labels.copy()
    wrong = generator.choice(len(labels), round(FLIPPED * len(labels)), replace=False)
    n_classes = len(cache.class_names)
    labels[wrong] = (labels[wrong] + generator.integers(1, n_classes, len(wrong))) % n_classes
    heads = fit_heads(cache.train.features, labels, cache.test.features, 5, 0, lambda message: None)
    found = doubts(heads.train, labels, thresholds_of(heads.train, labels))
    hits = np.isin(found.rows, wrong)
    print(
        f"{len(wrong)} labels changed: {len(hits)} suspects, precision {hits.mean():.3f}, "
        f"recall {hits.sum() / len(wrong):.3f}"
    )
    by_margin = hits[np.argsort(found.self_confidence - found.confidence, kind="stable")]
    for n in (100, 200, 500, 1000, 1500):
        print(
            f"of the first {n}: {hits[:n].mean():.3f} by self-confidence, "
            f"{by_margin[:n].mean():.3f} by margin"
        )


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    cache, data = featcache.load(sys.argv[1]), featcache.load_dataset(sys.argv[2])
    thresholds(cache, data)
    alterations(cache, data)
    flips(cache)


if __name__ == "__main__":
    main()
