"""Made the OneFlow checkpoint here, with oneflow 0.9.0: python make_oneflow_folder.py"""

from collections import OrderedDict

import numpy as np
import oneflow as flow

flow.manual_seed(0)
state = OrderedDict(
    float32=flow.randn(2, 3),
    transposed=flow.randn(2, 3).t(),
    parameter=flow.nn.Parameter(flow.randn(2)),
    float64=flow.randn(2).to(flow.float64),
    float16=flow.randn(3).to(flow.float16),
    scalar=flow.tensor(5, dtype=flow.int64),
    int32=flow.tensor([0, 1, 2], dtype=flow.int32),
    int8=flow.tensor([-1, 0, 1], dtype=flow.int8),
    uint8=flow.tensor([0, 1, 2], dtype=flow.uint8),
    bool=flow.tensor([True, False], dtype=flow.bool),
)
flow.save({"state_dict": state, "epoch": 3}, "oneflow")
np.savez_compressed("oneflow.npz", **{key: t.numpy() for key, t in state.items()})
