"""A graph whose convolutions and products compute in 8-bit integers, by OpenVINO's own nncf.

Each layer's input is scaled to 256 steps between the least and the greatest number seen while
calibration images pass, and each channel of its weights likewise. Features depend on these images,
so the digest of their pixels is an ingredient of a cache.

nncf's correction of biases is left out: by its means over batches the starter's features came out
at a least cosine of 0.975 to float32's, without it at 0.995 (512 images of CIFAR-10 at 64 pixels).
"""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from typing import Any

import numpy as np

from ..errors import EngineUnavailableError, one_line
from ..frameworks import import_nncf


def quantized(graph: Any, pixels: np.ndarray) -> Any:
    """Return the graph in INT8, scaled by pixels uint8 (n, s, s, 3), n >= 1."""
    nncf = import_nncf()
    batch = graph.inputs[0].shape[0]
    starts = range(0, len(pixels), batch)
    # The first images again, where the last batch has room.
    batches = [pixels[np.arange(start, start + batch) % len(pixels)] for start in starts]
    try:
        with redirect_stdout(io.StringIO()):  # it draws bars of progress
            return nncf.quantize(
                graph,
                nncf.Dataset(batches),
                subset_size=len(batches),
                advanced_parameters=nncf.AdvancedQuantizationParameters(
                    disable_bias_correction=True
                ),
            )
    except Exception as error:  # nncf, and OpenVINO below it, raise what they like
        raise EngineUnavailableError(
            f"precision int8: expected nncf to scale this backbone, found "
            f"{type(error).__name__}: {one_line(error)}; use --precision f32"
        ) from error
