"""ONNX graphs: built from nodes, joined, written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..backbones.openvino_engine import ResnetGraph
from ..backbones.weights import Weights
from ..errors import EngineUnavailableError, OutputError, WeightsError, one_line

# ONNX Runtime 1.20 reads up to opset 21; below 13 the axes of reductions are attributes.
OPSET, _LEAST_OPSET, _MOST_OPSET = 18, 13, 21
_MOST_BYTES = 2**31 - 2**20  # of a protobuf message
_SMALL = 1024  # numbers: a smaller constant stays in float32, those of the preprocessing among them


def import_onnx() -> Any:
    """Import what writes a graph and what checks it, or say how to install them."""
    try:
        import onnx
        import onnxruntime  # noqa: F401  # the check comes last: do not work in vain
    except ImportError as error:
        raise EngineUnavailableError(
            f"ship: expected the packages onnx and onnxruntime, found: {one_line(error)}; run "
            "pip install 'featcache[ship]'"
        ) from None
    return onnx


class Graph:
    """Nodes of the domain of ONNX; a value is the name of a tensor, an array becomes a constant."""

    def __init__(self) -> None:
        self._onnx = import_onnx()
        self.opset = OPSET
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}  # tensors in ONNX's form
        self._n = 0

    def op(self, kind: str, *inputs: str | np.ndarray | np.generic, **attributes: Any) -> str:
        """Add a node, and return its result."""
        return self.ops(kind, 1, *inputs, **attributes)[0]

    def ops(
        self, kind: str, n: int, *inputs: str | np.ndarray | np.generic, **attributes: Any
    ) -> list[str]:
        """Add a node of several results, and return the first ``n``."""
        names = [one if isinstance(one, str) else self.constant(one) for one in inputs]
        results = [self._name(kind.lower()) for _ in range(n)]
        self.nodes.append(self._onnx.helper.make_node(kind, names, results, **attributes))
        return results

    def constant(self, array: np.ndarray | np.generic) -> str:
        """Add a constant."""
        name = self._name("constant")
        array = np.asarray(array)  # np.ascontiguousarray makes a vector of a number
        self.constants[name] = self._onnx.numpy_helper.from_array(array.copy(order="C"), name)
        return name

    def cast(self, value: str, dtype: Any) -> str:
        """Convert a value to a NumPy type."""
        code = self._onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        return self.op("Cast", value, to=code)

    def either(self, condition: str, then: Callable[[], str], other: Callable[[], str]) -> str:
        """Run one of two branches, and return its result, float32."""
        branches = []
        for make in (then, other):
            outside, self.nodes = self.nodes, []
            result = make()
            kind = self._onnx.helper.make_tensor_value_info(result, 1, None)
            name = self._name("branch")
            branches.append(self._onnx.helper.make_graph(self.nodes, name, [], [kind]))
            self.nodes = outside
        return self.op("If", condition, then_branch=branches[0], else_branch=branches[1])

    def output(self, value: str, name: str) -> None:
        """Give a value the name of an output."""
        self.nodes.append(self._onnx.helper.make_node("Identity", [value], [name]))

    def join(self, other: Any, pixels: str, taken: Sequence[str], where: str) -> list[str]:
        """Add a whole model, fed with ``pixels``; return the values named ``taken`` in it."""
        onnx = self._onnx
        try:
            opsets = {one.domain: one.version for one in other.opset_import}
            opset = opsets.get("", opsets.get("ai.onnx", 0))
            foreign = {node.domain for node in other.graph.node} - {"", "ai.onnx"}
            if other.functions:
                other = onnx.inliner.inline_local_functions(other)
                foreign = {node.domain for node in other.graph.node} - {"", "ai.onnx"}
            if foreign:
                raise ValueError(f"operators of the domain {min(foreign)}")
            if opset > _MOST_OPSET:
                raise ValueError(f"opset {opset}, above {_MOST_OPSET}")
            if opset < _LEAST_OPSET:
                other, opset = onnx.version_converter.convert_version(other, OPSET), OPSET
            graph = onnx.compose.add_prefix(other, "backbone/").graph
        except Exception as error:  # the converter and the parser raise what they like
            raise WeightsError(
                f"{where}: expected a graph of ONNX's own operators, opset {_LEAST_OPSET} to "
                f"{_MOST_OPSET}, found {one_line(error)}; export it again with opset {OPSET}"
            ) from None
        self.opset = opset
        known = {one.name for one in graph.initializer}
        known |= {name for node in graph.node for name in node.output}
        (entry,) = (one.name for one in graph.input if one.name not in known)
        wanted = [f"backbone/{name}" for name in taken]
        missing = [name for name in wanted if name not in known]
        if missing:
            raise WeightsError(
                f"{where}: expected the tensor '{one_line(taken[wanted.index(missing[0])])}' of "
                "its cut in the graph, found none of that name; use a cut that is an output"
            )
        self.nodes.append(onnx.helper.make_node("Identity", [pixels], [entry]))
        self.nodes.extend(graph.node)
        self.constants.update({one.name: one for one in graph.initializer})
        if graph.sparse_initializer:
            raise WeightsError(
                f"{where}: expected dense weights, found sparse ones, which OpenVINO does not "
                "read; export it again with dense ones"
            )
        return wanted

    def model(
        self, inputs: dict[str, Any], outputs: dict[str, Any], facts: dict[str, str], half: bool
    ) -> Any:
        """Return the model; inputs and outputs are (dtype, shape) by name.

        ``half`` keeps large weights in float16. What is computed stays float32.
        """
        onnx = self._onnx
        used = {name for node in self.nodes for name in _reads(node)}
        self.constants = {name: one for name, one in self.constants.items() if name in used}
        casts = self._halved() if half else []
        size = sum(one.ByteSize() for one in self.constants.values())
        if size > _MOST_BYTES:
            raise OutputError(
                f"model: expected at most {_MOST_BYTES / 1e9:.2f} GB of weights, which is what an "
                f"ONNX file holds, found {size / 1e9:.2f} GB; use --precision f16, a smaller "
                "backbone, or fewer images"
            )
        ends = [
            [
                onnx.helper.make_tensor_value_info(
                    name, onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape
                )
                for name, (dtype, shape) in part.items()
            ]
            for part in (inputs, outputs)
        ]
        graph = onnx.helper.make_graph(
            [*casts, *self.nodes], "featcache", *ends, [*self.constants.values()]
        )
        model = onnx.helper.make_model(
            graph,
            opset_imports=[onnx.helper.make_opsetid("", self.opset)],
            ir_version=8 if self.opset <= OPSET else 10,
            producer_name="featcache",
        )
        onnx.helper.set_model_props(model, facts)
        return model

    def _halved(self) -> list[Any]:
        """Keep large float32 constants in float16, and return the nodes that convert them back."""
        onnx, casts = self._onnx, []
        for name, tensor in list(self.constants.items()):
            if tensor.data_type != onnx.TensorProto.FLOAT or np.prod(tensor.dims) < _SMALL:
                continue
            array = onnx.numpy_helper.to_array(tensor)
            if np.abs(array).max() > np.finfo(np.float16).max:
                continue
            del self.constants[name]
            short = self.constant(array.astype(np.float16))
            casts.append(onnx.helper.make_node("Cast", [short], [name], to=onnx.TensorProto.FLOAT))
        return casts

    def _name(self, kind: str) -> str:
        self._n += 1
        return f"{kind}_{self._n}"


def _reads(node: Any) -> Iterator[str]:
    """Yield the values that a node reads, those of its branches too."""
    yield from node.input
    for attribute in node.attribute:
        for inner in attribute.g.node:
            yield from _reads(inner)
        yield from (one.name for one in attribute.g.output)


def write_model(model: Any, path: Path) -> None:
    """Write a model as ONNX, checked against the operators' own definitions."""
    onnx = import_onnx()
    try:
        onnx.checker.check_model(model)
        data = model.SerializeToString()
    except Exception as error:  # onnx's own errors have no common base
        raise WeightsError(
            f"{path}: expected a graph that ONNX takes for valid, found {one_line(error)}; export "
            "the backbone again"
        ) from None
    path.write_bytes(data)


class _ResnetOps:
    """The operators that `ResnetGraph` uses, by OpenVINO's names."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph

    def relu(self, x: str) -> str:
        return self._graph.op("Relu", x)

    def add(self, x: str, y: str | np.ndarray) -> str:
        return self._graph.op("Add", x, y)

    def reduce_mean(self, x: str, _axes: np.ndarray, _keep: bool) -> str:
        return self._graph.op("Flatten", self._graph.op("GlobalAveragePool", x))

    def max_pool(
        self, x: str, strides: Sequence[int], _dilations: Any, begin: Any, end: Any, kernel: Any
    ) -> Any:
        pads = [*begin, *end]
        return _Pooled(
            self._graph.op("MaxPool", x, kernel_shape=kernel, strides=strides, pads=pads)
        )

    def convolution(
        self, x: str, kernel: np.ndarray, strides: Any, begin: Any, end: Any, _dilations: Any
    ) -> str:
        return self._graph.op("Conv", x, kernel, strides=strides, pads=[*begin, *end])


class _Pooled(str):
    """A result that is asked for its first output, as OpenVINO's, which has two."""

    def output(self, _: int) -> str:
        return str(self)


def resnet(graph: Graph, pixels: str, weights: Weights, cuts: Sequence[str]) -> list[str]:
    """Add a built-in ResNet from its arrays, BatchNorm folded; return its cuts (N, D)."""
    taken = ResnetGraph(weights, _ResnetOps(graph)).stages(pixels, tuple(cuts))
    return [taken[cut] for cut in cuts]
