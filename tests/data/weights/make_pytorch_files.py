"""Made the PyTorch checkpoints here, with torch 2.13: python make_pytorch_files.py"""

from collections import OrderedDict

import numpy as np
import torch

torch.manual_seed(0)
base = torch.randn(4, 6)
state = OrderedDict(
    float32=torch.randn(2, 3),
    transposed=torch.randn(2, 3).t(),
    shared=base,
    slice=base[1:, 2:4],
    parameter=torch.nn.Parameter(torch.randn(2)),
    empty=torch.zeros(0, 3),
    scalar=torch.tensor(5),
    float64=torch.randn(2).double(),
    float16=torch.randn(3).half(),
    bfloat16=torch.randn(3).bfloat16(),
    int32=torch.arange(3, dtype=torch.int32),
    int16=torch.arange(3, dtype=torch.int16),
    int8=torch.arange(-1, 2, dtype=torch.int8),
    uint8=torch.arange(3, dtype=torch.uint8),
    bool=torch.tensor([True, False]),
)
state._metadata = OrderedDict([("", {"version": 1})])  # as a module's state dict has it
torch.save(state, "tensors-zip.pth")
torch.save(state, "tensors-stream.pth", _use_new_zipfile_serialization=False)
state["bfloat16"] = state["bfloat16"].float()
np.savez_compressed("tensors.npz", **{key: t.detach().numpy() for key, t in state.items()})

model = torch.nn.DataParallel(torch.nn.Linear(3, 2))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
model(torch.ones(1, 3)).sum().backward()
optimizer.step()
training = {"epoch": 3, "state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}
torch.save(training, "training.pth")
state = model.module.state_dict()
np.savez_compressed("training.npz", **{key: t.numpy() for key, t in state.items()})
