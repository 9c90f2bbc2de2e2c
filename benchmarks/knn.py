"""Claim: k-NN takes no longer than faiss on one core, with scikit-learn's predictions.

    FEATCACHE_THREADS=1 OMP_NUM_THREADS=1 python benchmarks/knn.py CACHE [QUERIES]

Finds the 200 training images nearest to each test image, in turn: ours, faiss's IndexFlatIP where
it is installed (pip install faiss-cpu), and the bare product of the features in blocks, the least
that any exact search needs. Prints CPU seconds, the best of three. Then compares the predictions of
one vote per neighbour with scikit-learn's brute force on the first 2,000 queries, at every k.
"""

from __future__ import annotations

import math
import sys
import time

import numpy as np
from sklearn.neighbors import KNeighborsClassifier

import featcache
from featcache.probes.blocks import one_blas_thread
from featcache.probes.knn import knn_probe, nearest

K, BLOCK, KS = 200, 1024, (1, 10, 20, 100, 200)


def unit(features: np.ndarray) -> np.ndarray:
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def product(queries: np.ndarray, keys: np.ndarray) -> None:
    with one_blas_thread():
        for first in range(0, len(queries), BLOCK):
            for other in range(0, len(keys), BLOCK):
                queries[first : first + BLOCK] @ keys[other : other + BLOCK].T


def main() -> None:
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    cache = featcache.load(sys.argv[1])
    keys, labels = np.asarray(cache.train.features, np.float32), cache.train.labels
    queries = np.asarray(cache.test.features, np.float32)[: int((*sys.argv, 10**9)[2])]
    methods = {
        "ours": lambda: nearest(queries, keys, K),
        "the product alone": lambda: product(unit(queries), unit(keys)),
    }
    try:
        import faiss
    except ImportError:
        print("faiss: not installed")
    else:

        def search() -> None:
            index = faiss.IndexFlatIP(keys.shape[1])
            index.add(unit(keys))
            index.search(unit(queries), K)

        methods["faiss"] = search
    best = dict.fromkeys(methods, math.inf)
    for _ in range(3):
        for name, run in methods.items():
            started = time.process_time()
            run()
            best[name] = min(best[name], time.process_time() - started)
    for name, cpu_s in best.items():
        print(f"{name}: {cpu_s:.2f} s of CPU, {best['ours'] / cpu_s:.2f} times as long is ours")
    some = queries[:2000]
    for distance in ("cosine", "euclidean"):
        ours = knn_probe(
            keys, labels, some, len(cache.class_names), KS, math.inf, distance=distance
        )
        for k in KS:
            other = KNeighborsClassifier(k, metric=distance, algorithm="brute").fit(keys, labels)
            differ = np.count_nonzero(other.predict(some) != ours[k])
            print(f"{distance}, k = {k}: {differ} of {len(some):,} differ from scikit-learn's")


if __name__ == "__main__":
    main()
