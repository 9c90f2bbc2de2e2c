"""Claim: the tutorial's weight decay, 5e-4, is a good default for a linear head on CIFAR-10.

    python benchmarks/weight_decay.py CACHE

CACHE holds features of CIFAR-10 (featcache extract … --weights tinyimagenet32). Fits the exact
optimum with scikit-learn at six values on 80 % of the training features and scores the other 20 %,
for two seeded stratified holdouts. It does not read the test split. Also prints the spread of the
variances of the features' principal components, the reason why the probe whitens.
"""

from __future__ import annotations

import sys

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedShuffleSplit

import featcache

VALUES = (1e-3, 5e-4, 2e-4, 1e-4, 5e-5, 2e-5)


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    train = featcache.load(sys.argv[1]).train
    x, y = train.features - train.features.mean(axis=0), train.labels
    variances = np.linalg.eigvalsh(np.cov(x.T))
    print(
        f"variances of principal components: {variances[0]:.4f} to {variances[-1]:.4f}, "
        f"a factor of {variances[-1] / variances[0]:.0f}"
    )
    splits = list(StratifiedShuffleSplit(2, test_size=0.2, random_state=0).split(x, y))
    for value in VALUES:
        scores = []
        for fit, hold in splits:
            model = LogisticRegression(C=1 / (len(fit) * value), max_iter=2000)
            scores.append(model.fit(x[fit], y[fit]).score(x[hold], y[hold]))
        print(
            f"weight decay {value:.0e}: {np.mean(scores):.4f} "
            f"({', '.join(f'{score:.4f}' for score in scores)})",
            flush=True,
        )


if __name__ == "__main__":
    main()
