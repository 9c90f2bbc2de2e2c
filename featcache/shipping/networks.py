"""Backbones as parts of an ONNX graph: our ResNets, PyTorch's models, and files."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

from ..backbones.architectures import check_cuts
from ..backbones.exported_program import exported_onnx
from ..backbones.graph_file import GraphFile
from ..backbones.library_network import LibraryNetwork
from ..backbones.network import POOLED
from ..backbones.weights import Weights
from ..errors import EngineUnavailableError, RecipeError, WeightsError, one_line
from ..frameworks import INSTALL_TORCH, torch_status
from .graph import OPSET, Graph, import_onnx, resnet


def runs_in_openvino_alone(weights: Weights) -> bool:
    """Tell whether a backbone is a file in OpenVINO's own format, which ONNX cannot hold."""
    network = weights.network
    return isinstance(network, GraphFile) and network.path.suffix.lower() == ".xml"


def add_backbone(
    graph: Graph, pixels: str, weights: Weights, cuts: Sequence[str], *, dynamic: bool
) -> str:
    """Add a backbone that reads ``pixels`` float32 (N, 3, s, s); return its features (N, D).

    ``dynamic`` asks for any N; else it is 1.
    """
    network = weights.network
    if network is None:
        parts = resnet(graph, pixels, weights, check_cuts(cuts))
    elif isinstance(network, GraphFile):
        model, names = _file_model(network, cuts, dynamic)
        parts = graph.join(model, pixels, names, str(network.path))
    elif isinstance(network, LibraryNetwork):
        model = _torch_model(network, weights, cuts, dynamic)
        names = [one.name for one in model.graph.output]
        parts = graph.join(model, pixels, names, weights.backbone)
    else:
        raise WeightsError(
            f"{weights.backbone}: expected a ResNet, a model of PyTorch or a file, found a "
            "backbone that has no graph to write; export it to ONNX and make the features again"
        )
    return parts[0] if len(parts) == 1 else graph.op("Concat", *parts, axis=1)


def _file_model(network: GraphFile, cuts: Sequence[str], dynamic: bool) -> tuple[Any, list[str]]:
    batch = network.fixed_batch
    if batch is not None and (dynamic or batch != 1):
        raise RecipeError(
            f"{network.path}: expected a network that takes {'any number of images' * dynamic}"
            f"{'one image' * (not dynamic)}, found one that takes {batch}; export it with a free "
            f"number of images{', or leave out --dynamic-batch' * (batch == 1)}"
        )
    onnx = import_onnx()
    if network.path.suffix.lower() == ".pt2":
        if tuple(cuts) != (POOLED,):
            raise RecipeError(
                f"cut: expected pooled of {network.path}, found {', '.join(cuts)}; export the "
                "program with that output alone"
            )
        model = onnx.load_from_string(exported_onnx(network.path, OPSET))
        return model, [model.graph.output[network.pooled_index].name]
    try:
        model = onnx.load(network.path)
    except Exception as error:  # protobuf's errors, and those of weights in another file
        raise WeightsError(
            f"{network.path}: expected a file that the package onnx reads, found "
            f"{one_line(error)}; export it again"
        ) from None
    return model, [network.tensor(cut) for cut in cuts]


def _torch_model(
    network: LibraryNetwork, weights: Weights, cuts: Sequence[str], dynamic: bool
) -> Any:
    """Export a model of PyTorch; its outputs are the cuts, in order."""
    if torch_status()[0] is None:
        raise EngineUnavailableError(
            f"{weights.backbone}: expected PyTorch, which writes its own models as ONNX, found "
            f"none; run {INSTALL_TORCH}"
        )
    import torch

    size, module = weights.preprocess.size, network.module(cuts)
    shapes = ({0: torch.export.Dim("n", min=1)},) if dynamic else None
    said = io.StringIO()
    try:
        with redirect_stdout(said), redirect_stderr(said), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module,
                (torch.zeros(2 if dynamic else 1, 3, size, size),),
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=shapes,
                verbose=False,
            )
        model = program.model_proto
        if dynamic and model.graph.input[0].type.tensor_type.shape.dim[0].dim_value:
            raise ValueError("a fixed number of images in its code")
        return model
    except ModuleNotFoundError as error:
        raise EngineUnavailableError(
            f"{weights.backbone}: expected the package onnxscript, with which PyTorch writes "
            f"ONNX, found: {one_line(error)}; run pip install onnxscript"
        ) from None
    except Exception as error:  # an operator without a form in ONNX, a shape that must be fixed
        less = "; leave out --dynamic-batch" if dynamic else "; choose another backbone"
        raise WeightsError(
            f"{weights.backbone}: expected a model that PyTorch can write as ONNX, found "
            f"{type(error).__name__}: {one_line(error)}{less}"
        ) from None
    finally:
        module.close()
