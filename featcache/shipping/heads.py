"""Heads as parts of an ONNX graph: linear ones, and the vote of nearest neighbours."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ..probes.head import Head
from ..probes.knn import TEMPERATURE, knn_probe
from ..probes.scaling import unit_length
from .graph import Graph


@dataclass(frozen=True, eq=False)
class KnnHead:
    """Training features float32 (N, D) and labels int64 (N,), of which the k nearest vote."""

    features: np.ndarray = field(repr=False)
    labels: np.ndarray = field(repr=False)
    class_names: tuple[str, ...]
    fingerprint: str
    k: int
    task: str = "classes"
    thresholds: None = None

    @property
    def kind(self) -> str:
        """What it is, in words."""
        return f"vote of the {self.k} nearest of {len(self.labels):,} images"

    def probabilities(self, features: np.ndarray) -> np.ndarray:
        """Return each class's share of the votes, as `featcache.knn` counts them: (M, K)."""
        shares = np.empty((len(features), len(self.class_names)))

        def keep(_k: int, rows: np.ndarray, votes: np.ndarray) -> None:
            shares[rows] = votes / votes.sum(axis=1, keepdims=True)

        knn_probe(
            self.features,
            self.labels,
            features,
            len(self.class_names),
            [self.k],
            TEMPERATURE,
            on_votes=keep,
        )
        return shares


def add_head(graph: Graph, features: str, head: Head | KnnHead) -> str:
    """Add a head that reads features float32 (N, D); return float32 (N, K)."""
    if isinstance(head, KnnHead):
        return _votes(graph, features, head)
    if head.scaling == "l2":
        features = _unit(graph, features)
    scores = graph.op("Gemm", features, head.weight, head.bias, transB=1)
    if head.task == "classes":
        return graph.op("Softmax", scores, axis=-1)
    return graph.op("Sigmoid", scores) if head.task == "labels" else scores


def _unit(graph: Graph, features: str) -> str:
    """Divide each feature by its length; zeros stay."""
    squares = graph.op("ReduceSum", graph.op("Mul", features, features), np.array([1]), keepdims=1)
    length = graph.op("Sqrt", squares)
    none = graph.op("Equal", length, np.float32(0))
    return graph.op("Div", features, graph.op("Where", none, np.float32(1), length))


def _votes(graph: Graph, features: str, head: KnnHead) -> str:
    keys = unit_length(head.features).T
    nearness = graph.op("Min", graph.op("MatMul", _unit(graph, features), keys), np.float32(1))
    nearest, rows = graph.ops("TopK", 2, nearness, np.array([head.k]), axis=1)
    largest = graph.op("Slice", nearest, np.array([0]), np.array([1]), np.array([1]))
    weights = graph.op("Sub", nearest, largest)
    weights = graph.op("Exp", graph.op("Div", weights, np.float32(TEMPERATURE)))
    classes = graph.op("Gather", head.labels, rows)  # (N, k)
    classes = graph.op("Unsqueeze", classes, np.array([2]))
    same = graph.op("Equal", classes, np.arange(len(head.class_names)))
    counted = graph.op(
        "Mul", graph.cast(same, np.float32), graph.op("Unsqueeze", weights, np.array([2]))
    )
    votes = graph.op("ReduceSum", counted, np.array([1]), keepdims=0)
    total = graph.op("ReduceSum", votes, np.array([1]), keepdims=1)
    return graph.op("Div", votes, total)
