"""PyTorch's exported programs (``.pt2``), turned into OpenVINO graphs once.

PyTorch's own reader would run code from such a file: it evaluates symbolic expressions and guards,
calls whatever function a node names, and falls back to unpickling. So the file is checked for all
four first, and then read in a child process that may not unpickle.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..download import file_digest
from ..errors import EngineUnavailableError, WeightsError, one_line
from ..frameworks import INSTALL_TORCH, openvino_status, torch_status
from ..process import last_line, run_in_child
from .conversion import kept_in
from .graph_file import GraphFile
from .pretrained import cache_folder

_TIMEOUT_S = 600
_MAX_DESCRIPTION_BYTES = 1 << 28  # of a giant's graph; a ViT-Tiny's is half a megabyte
_OPERATORS = re.compile(r"torch\.ops\.aten\.\w+(\.\w+)?|_operator\.(getitem|add|sub|mul|floordiv)")
# What PyTorch writes of shapes, 2*s0 or Mul(Integer(2), Symbol('s77', positive=True)): symbols,
# numbers and arithmetic, and nothing else that could be looked up or called.
_EXPRESSION = re.compile(
    r"(Symbol\('[a-z]{1,8}\d+'(, (positive|nonnegative|integer|finite)=True)*\)"
    r"|\b(Integer|Add|Mul|Pow|Max|Min|Mod|FloorDiv|CleanDiv|CeilDiv|PythonMod)(?=\()"
    r"|\b[su]\d+\b(?!\()|\d+(?![\w(])|[\s,+*/()-])*"
)

# Prints "found" and how far the graph is from the program, on one draw of the input's shape.
_CONVERT = """
import os, sys, warnings
os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
sys.modules["openvino_telemetry"] = None
warnings.simplefilter("ignore")
import numpy as np, openvino as ov, torch
program = torch.export.load(sys.argv[1])
graph = ov.convert_model(program)
name = program.graph_signature.user_inputs[0]
fake = next(n.meta["val"] for n in program.graph.nodes if n.op == "placeholder" and n.name == name)
symbolic = {i for i, n in enumerate(fake.shape) if not isinstance(n, int)}
graph.reshape([-1 if i in symbolic else n for i, n in enumerate(fake.shape)])
shape = [2 if i == 0 and 0 in symbolic else 224 if i in symbolic else n
         for i, n in enumerate(fake.shape)]
x = torch.from_numpy(np.random.default_rng(0).standard_normal(shape, np.float32))
with torch.inference_mode():
    expected = program.module()(x)
expected = [expected] if isinstance(expected, torch.Tensor) else list(expected)
compiled = ov.Core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
results = compiled(x.numpy())
worst = 1.0
for index, value in enumerate(expected):
    a, b = results[index].ravel().astype(float), value.numpy().ravel().astype(float)
    worst = min(worst, float(a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-30)))
ov.save_model(graph, sys.argv[2], compress_to_fp16=False)
print("found", worst)
"""
_LEAST_COSINE = 0.99999

_TO_ONNX = """
import os, sys, warnings
os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
warnings.simplefilter("ignore")
import torch
program = torch.export.load(sys.argv[1])
torch.onnx.export(program, dynamo=True, opset_version=int(sys.argv[3]), verbose=False,
                  external_data=False).save(sys.argv[2])
"""


def exported_graph(path: Path) -> GraphFile:
    """Return an exported program as a graph, converted the first time and kept."""
    check_exported(path)
    versions = f"{openvino_status()[0]} {torch_status()[0]}"
    key = hashlib.sha256(f"{file_digest(path)} {openvino_status()[0]}".encode()).hexdigest()
    folder = cache_folder().parent / "converted" / key[:32]

    def convert(new: Path) -> None:
        if torch_status()[0] is None:
            raise EngineUnavailableError(
                f"{path}: expected PyTorch to convert an exported program once, found {versions}; "
                f"run {INSTALL_TORCH}, or export to ONNX, which needs OpenVINO alone"
            )
        _convert(path, new)

    kept_in(folder, convert)
    return GraphFile(folder / "model.xml", shown=path)


def _convert(path: Path, new: Path) -> None:
    copy = new / "program.pt2"
    _copy_plainly(path, copy)
    check_exported(copy, shown=path)
    child = run_in_child(_CONVERT, str(copy), str(new / "model.xml"), timeout_s=_TIMEOUT_S)
    copy.unlink()
    if child is None:
        raise WeightsError(f"{path}: was not converted within {_TIMEOUT_S} s")
    _, mark, answer = child.stdout.rpartition("found ")
    if child.returncode or not mark:
        raise WeightsError(
            f"{path}: expected a program that OpenVINO can convert, found: "
            f"{one_line(last_line(child))}; export it to ONNX instead"
        )
    if not float(answer) >= _LEAST_COSINE:
        raise WeightsError(
            f"{path}: expected OpenVINO's results to be PyTorch's, found a cosine of "
            f"{float(answer):.6f}; export it to ONNX instead"
        )


def exported_onnx(path: Path, opset: int) -> bytes:
    """Return an exported program as an ONNX model, made by PyTorch in a child."""
    with tempfile.TemporaryDirectory(prefix="featcache-") as folder:
        copy, model = Path(folder, "program.pt2"), Path(folder, "model.onnx")
        _copy_plainly(path, copy)
        check_exported(copy, shown=path)
        child = run_in_child(_TO_ONNX, str(copy), str(model), str(opset), timeout_s=_TIMEOUT_S)
        if child is None or child.returncode:
            found = "no end" if child is None else one_line(last_line(child))
            raise WeightsError(
                f"{path}: expected a program that PyTorch can write as ONNX, found: {found}; "
                "export it to ONNX yourself, and make the features with that file"
            )
        return model.read_bytes()


def _copy_plainly(path: Path, copy: Path) -> None:
    """Write an archive anew, so that PyTorch's reader finds in it what ours did.

    Two readers may see two archives in one file: two directories, or one name twice.
    """
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(copy, "w") as plain:
        for info in archive.infolist():
            new = zipfile.ZipInfo(info.filename)
            new.file_size = info.file_size
            with archive.open(info) as source, plain.open(new, "w") as target:
                shutil.copyfileobj(source, target, 1 << 20)


def check_exported(path: Path, shown: Path | None = None) -> None:
    """Raise WeightsError unless an archive can be read by PyTorch without running code from it.

    ``shown`` is its name for messages.
    """
    shown = shown or path
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.lower() for name in archive.namelist()]  # PyTorch ignores the case
            if len(set(names)) < len(names):
                raise ValueError("two entries of one name")
            described = [
                json.loads(_entry(archive, name))
                for name in archive.namelist()
                if name.lower().endswith(".json")
            ]
            models = [one for one in described if "graph_module" in one]
            for part in described:
                for problem in _problems(part):
                    raise ValueError(problem)
    except (OSError, zipfile.BadZipFile, zlib.error, ValueError, RecursionError) as error:
        raise WeightsError(
            f"{shown}: expected a program of torch.export that runs no code, found "
            f"{one_line(error)}; export it again, or to ONNX"
        ) from None
    if len(models) != 1:
        raise WeightsError(
            f"{shown}: expected one program of torch.export.save, found {len(models)}; save it "
            "again"
        )


def _entry(archive: zipfile.ZipFile, name: str) -> bytes:
    with archive.open(name) as file:
        data = file.read(_MAX_DESCRIPTION_BYTES + 1)
    if len(data) > _MAX_DESCRIPTION_BYTES:
        raise ValueError("a description without end")
    return data


def _problems(part: Any) -> Iterator[str]:
    """Yield what in a description would make PyTorch evaluate, call or unpickle something."""
    if isinstance(part, list):
        for one in part:
            yield from _problems(one)
    if not isinstance(part, Mapping):
        return
    for key, value in part.items():
        if key == "target" and isinstance(value, str) and not _OPERATORS.fullmatch(value):
            if part.keys() >= {"inputs", "outputs"}:
                yield f"a call of {value}"
        elif key == "expr_str" and not (isinstance(value, str) and _EXPRESSION.fullmatch(value)):
            yield f"the expression {value}"
        elif (
            (key == "guards_code" and value)
            or (key == "use_pickle" and value is not False)
            or key in ("as_custom_obj", "as_operator", "as_graph", "custom_obj_name")
        ):
            yield f"{key}"
        yield from _problems(value)
