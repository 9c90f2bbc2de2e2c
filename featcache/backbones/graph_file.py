"""Networks from files, ONNX's and OpenVINO's: run without the framework that made them.

A file is untrusted: it is parsed in a child process first, which also hashes its weights.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import EngineUnavailableError, RecipeError, WeightsError, one_line
from ..frameworks import import_openvino, openvino_core, openvino_status
from ..process import last_line, run_in_child
from .network import POOLED, Network, Shape, unknown_cut

_TIMEOUT_S = 600
_MAX_CUTS = 10_000
_LISTED = 40  # of a graph's inner tensors

# Prints a JSON object; whatever the file does to the parser, it does it here.
_PARSE = """
import hashlib, json, sys
sys.modules["openvino_telemetry"] = None
import openvino as ov
model = ov.Core().read_model(sys.argv[1])
def shape(output):
    partial = output.get_partial_shape()
    if partial.rank.is_dynamic:
        return None
    return [-1 if one.is_dynamic else one.get_length() for one in partial]
def entry(output):
    names = sorted(output.get_names()) or [output.get_node().get_friendly_name()]
    return [names, shape(output), output.get_element_type().get_type_name()]
digest = hashlib.sha256()
inner, n_parameters = [], 0
for op in model.get_ordered_ops():
    if op.get_type_name() == "Constant":
        data = op.get_data() if hasattr(op, "get_data") else op.data
        digest.update(("%s %s" % (op.get_element_type(), list(op.get_output_shape(0)))).encode())
        digest.update(memoryview(data.copy(order="C")).cast("B") if data.size else b"")
        n_parameters += data.size if str(data.dtype).startswith("float") else 0
    elif op.get_type_name() not in ("Parameter", "Result"):
        for output in op.outputs():
            if output.get_names():
                inner.append(entry(output))
with open(sys.argv[1], "rb") as file:
    for block in iter(lambda: file.read(1 << 20), b""):
        digest.update(block)
print("found", json.dumps({
    "inputs": [entry(one) for one in model.inputs],
    "outputs": [entry(one) for one in model.outputs],
    "inner": inner, "sha256": digest.hexdigest(), "n_parameters": n_parameters,
}))
"""


class GraphFile(Network):
    """A graph with one input, float32 (N, 3, s, s).

    Its cuts are the names of tensors; ``pooled`` is the first output of shape (N, D).
    """

    engines = ("openvino",)

    def __init__(self, path: Path, shown: Path | None = None) -> None:
        self._file = path
        self.path = shown or path
        if not os.path.isfile(path):
            raise WeightsError(f"{path}: expected a file, found none; check the path")
        version, why = openvino_status()
        if version is None:
            raise EngineUnavailableError(f"{path}: needs OpenVINO: {why}")
        self._parsed = self._parse()
        self.sha256: str = self._parsed["sha256"]
        self.fixed_size = self._checked_side()  # in pixels, if the file fixes it
        self._size = self.fixed_size or 0
        self._shapes: dict[str, Shape] = {}  # at this size: the file is read to learn them
        length = self._parsed["inputs"][0][1][0]
        self.fixed_batch = length if length > 0 else None

    def sized(self, size: int) -> GraphFile:
        """Take images of this side; RecipeError where the file fixes another."""
        if self.fixed_size not in (None, size):
            raise RecipeError(
                f"{self.path}: expected images of {self.fixed_size} pixels, which the file fixes, "
                f"found {size}; leave out --size"
            )
        self._size = size
        self._shapes.clear()
        return self

    def shapes(self, cuts: Sequence[str]) -> dict[str, Shape]:
        """Return the shape of one image's features at each cut."""
        if all(cut in self._shapes for cut in cuts):
            return {cut: self._shapes[cut] for cut in cuts}
        batch = self.fixed_batch or 1
        outputs = self.graph(cuts, batch).outputs
        found = {}
        for cut, output in zip(cuts, outputs, strict=True):
            shape = output.get_partial_shape()
            if shape.is_dynamic or len(shape) < 2 or shape[0].get_length() != batch:
                raise RecipeError(
                    f"cut: expected a tensor of fixed shape with images first, found {cut!r} of "
                    f"shape {shape} in {self.path}; choose another one"
                )
            found[cut] = tuple(length.get_length() for length in shape)[1:]
        self._shapes.update(found)
        return found

    def cut_shapes(self) -> dict[str, Shape]:
        """Return the outputs, and the last of the inner tensors that have names."""
        names = [POOLED] if self._pooled else []
        names += [names[0] for names, _, _ in self._parsed["outputs"]]
        inner = [names[0] for names, shape, _ in self._parsed["inner"] if shape and len(shape) > 1]
        found = {}
        for name in dict.fromkeys([*names, *inner[-_LISTED:]]):
            try:
                found.update(self.shapes([name]))
            except RecipeError:
                continue  # a tensor that is no feature of an image
        return found

    def tensor(self, cut: str) -> str:
        """Return the name of a cut's tensor in the file."""
        return self._pooled if cut == POOLED else cut

    @property
    def pooled_index(self) -> int:
        """Which of the outputs is the pooled one."""
        return [names[0] for names, _, _ in self._parsed["outputs"]].index(self._pooled)

    def n_parameters(self) -> int:
        """Return how many numbers the weights have."""
        return int(self._parsed["n_parameters"])

    def module(self, cuts: Sequence[str]) -> Any:
        """Raise EngineUnavailableError: a graph has no form for a framework."""
        raise EngineUnavailableError(
            f"{self.path}: expected the engine openvino, which alone runs such a file; use "
            "--engine openvino"
        )

    def graph(self, cuts: Sequence[str], batch: int) -> Any:
        """Return an OpenVINO model: float32 (batch, 3, s, s) -> one output per cut."""
        ov = import_openvino()
        model = openvino_core().read_model(str(self._file))
        places: dict[str, Any] = {}
        for output in [
            *model.outputs,
            *(o for op in model.get_ordered_ops() for o in op.outputs()),
        ]:
            node = output.get_node()
            if node.get_type_name() == "Result":
                output = node.input_value(0)
            for name in output.get_names() or {output.get_node().get_friendly_name()}:
                places.setdefault(name, output)
        taken = []
        for cut in cuts:
            name = self._pooled if cut == POOLED else cut
            if cut == POOLED and not name:
                shown = ", ".join(f"{n[0]} {s}" for n, s, _ in self._parsed["outputs"])
                raise RecipeError(
                    f"cut: {self.path} has no pooled output, of shape (N, D); it has "
                    f"{one_line(shown)}: name one with --cut"
                )
            if name not in places:
                raise unknown_cut(cut, list(places)[-12:], str(self.path))
            taken.append(ov.opset8.convert(places[name], "f32"))
        tapped = ov.Model([ov.opset8.result(one) for one in taken], model.get_parameters())
        size = self._size
        try:
            tapped.reshape([batch, 3, size, size])
            tapped.validate_nodes_and_infer_types()
        except RuntimeError as error:
            raise RecipeError(
                f"{self.path}: expected a network that takes {batch} images of {size} x {size}, "
                f"found {_last_line(error)}; use the --size that it was made for, and export it "
                "with a free number of images"
            ) from None
        return tapped

    @cached_property
    def _pooled(self) -> str:
        return next(
            (names[0] for names, shape, _ in self._parsed["outputs"] if shape and len(shape) == 2),
            "",
        )

    def _parse(self) -> dict[str, Any]:
        child = run_in_child(_PARSE, str(self._file.absolute()), timeout_s=_TIMEOUT_S)
        if child is None:
            raise WeightsError(f"{self.path}: OpenVINO did not read it within {_TIMEOUT_S} s")
        _, mark, answer = child.stdout.rpartition("found ")
        if child.returncode or not mark:
            raise WeightsError(
                f"{self.path}: expected a network that OpenVINO reads, found: "
                f"{one_line(last_line(child))}; export it again"
            )
        parsed: dict[str, Any] = json.loads(answer)
        parsed["inner"] = parsed["inner"][-_MAX_CUTS:]
        return parsed

    def _checked_side(self) -> int | None:
        inputs = self._parsed["inputs"]
        _, shape, dtype = inputs[0] if inputs else ([], None, "none")
        fits = (
            len(inputs) == 1
            and dtype == "f32"
            and shape is not None
            and len(shape) == 4
            and shape[1] in (3, -1)
            and shape[2] == shape[3]
        )
        if not fits:
            shown = "; ".join(f"{n[0]} {t} {s}" for n, s, t in inputs) or "none"
            raise WeightsError(
                f"{self.path}: expected one input, float32 (N, 3, s, s), found {one_line(shown)}; "
                "export the network for normalised RGB images"
            )
        return int(shape[2]) if shape[2] > 0 else None


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return one_line(lines[-1] if lines else type(error).__name__)
