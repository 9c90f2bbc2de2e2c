"""Write the ONNX files that test_backbones.py reads, with the package onnx.

    python tests/data/make_onnx.py

Rewrite them only where what they hold is meant to change.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx import TensorProto, checker, helper, numpy_helper, save

FOLDER = Path(__file__).parent


def network(n_images: int | str, n_channels: int = 3):
    """Return a convolution, ReLU, the mean of the map, and a linear layer: (N, 6)."""
    generator = np.random.default_rng(0)
    kernel = generator.standard_normal((8, n_channels, 3, 3)).astype(np.float32)
    matrix = generator.standard_normal((8, 6)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["images", "kernel"], ["conv"], strides=[2, 2], pads=[1] * 4),
        helper.make_node("Relu", ["conv"], ["stage"]),
        helper.make_node("ReduceMean", ["stage"], ["mean"], axes=[2, 3], keepdims=0),
        helper.make_node("MatMul", ["mean", "matrix"], ["features"]),
    ]
    shape = [n_images, n_channels, 32, 32]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, [n_images, 6])],
        [numpy_helper.from_array(kernel, "kernel"), numpy_helper.from_array(matrix, "matrix")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    checker.check_model(model)
    return model


if __name__ == "__main__":
    save(network("n"), FOLDER / "tiny.onnx")
    save(network(1), FOLDER / "tiny-one.onnx")
    save(network("n", 4), FOLDER / "tiny-four-channels.onnx")
