"""Tiny backbones of every kind, made on the spot, with a fixed seed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

DATA = Path(__file__).parent / "data"
TINY_ONNX = DATA / "tiny.onnx"

_NUMPY_MODULE = """
import numpy as np
matrix = np.random.default_rng({seed}).standard_normal((3, 6)).astype(np.float32)
def build():
    def forward(x):
        tokens = x.reshape(len(x), 3, -1)[:, :, ::64].transpose(0, 2, 1) @ matrix
        return {{"pooled": x.mean((2, 3)) @ matrix, "tokens": tokens}}
    forward.preprocess = {{"size": 32}}
    return forward
"""

_TORCH_MODULE = """
import torch
class Net(torch.nn.Module):
    preprocess = {"size": 32}
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3, 2, 1)
        self.norm = torch.nn.BatchNorm2d(8)
    def forward(self, x):
        return torch.relu(self.norm(self.conv(x))).mean((2, 3))
def build():
    torch.manual_seed(0)
    return Net()
class Broken(Net):
    def forward(self, x):
        return super().forward(x) * float("nan")
def nan():
    return Broken()
class OneByOne(Net):
    def forward(self, x):
        if len(x) > 1:
            raise ValueError("one image at a time")
        return super().forward(x)
def one():
    return OneByOne()
class FiveChannels(Net):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(5, 8, 3, 2, 1)
def five():
    return FiveChannels()
class Strange(Net):
    def __init__(self, result):
        super().__init__()
        self.result = result
    def forward(self, x):
        return self.result(x)
def nothing():
    return Strange(lambda x: None)
def pair():
    return Strange(lambda x: (x.mean((2, 3)), x))
def empty():
    return Strange(lambda x: torch.zeros(len(x), 0))
def one_row():
    return Strange(lambda x: x.mean((0, 2, 3))[None])
def with_a_number():
    return Strange(lambda x: {"pooled": x.mean((2, 3)), "n": len(x)})
def leaves():
    raise SystemExit(3)
def number():
    return 5
def fails():
    raise KeyError("no such thing")
"""

_VISION = {
    "hidden_size": 32,
    "image_size": 32,
    "patch_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}
_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 50,
    "max_position_embeddings": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_OPEN_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 1, "layers": 1},
}


def write_modules(folder):
    """Write Python modules with functions that build backbones."""
    (folder / "featcache_numpy_net.py").write_text(_NUMPY_MODULE.format(seed=0))
    (folder / "featcache_torch_net.py").write_text(_TORCH_MODULE)


def write_xml(path, *, seed=0, size=32, batch=-1):
    """Build an OpenVINO network by hand: a convolution, ReLU, and the mean of the map."""
    from featcache.frameworks import import_openvino

    ov = import_openvino()
    ops = ov.opset8
    kernel = np.random.default_rng(seed).standard_normal((8, 3, 3, 3)).astype(np.float32)
    x = ops.parameter(ov.PartialShape([batch, 3, size, size]), np.float32, name="images")
    stage = ops.relu(ops.convolution(x, kernel, [2, 2], [1, 1], [1, 1], [1, 1]))
    stage.output(0).set_names({"stage"})
    pooled = ops.reduce_mean(stage, np.array([2, 3]), False)
    pooled.output(0).set_names({"features"})
    path.parent.mkdir(exist_ok=True)
    ov.save_model(ov.Model([ops.result(pooled)], [x], "tiny"), path, compress_to_fp16=False)
    return path


def write_exported(path):
    """Write a program of torch.export with a free number of images."""
    import featcache_torch_net
    import torch

    net = featcache_torch_net.build().eval()
    free = {"x": {0: torch.export.Dim("n")}}
    program = torch.export.export(net, (torch.zeros(2, 3, 32, 32),), dynamic_shapes=free)
    torch.export.save(program, path)
    return path


def save_hf(folder, kind):
    """Write a folder of save_pretrained."""
    import torch
    import transformers as library

    torch.manual_seed(0)
    library.logging.set_verbosity_error()
    library.logging.disable_progress_bar()
    if kind == "clip":
        config = library.CLIPConfig(text_config=_TEXT, vision_config=_VISION, projection_dim=16)
        model = library.CLIPModel(config)
    elif kind == "siglip":
        config = library.SiglipConfig(text_config=_TEXT, vision_config=_VISION)
        model = library.SiglipModel(config)
    elif kind == "convnext":
        sizes = {"hidden_sizes": [8, 8, 16, 16], "depths": [1] * 4, "image_size": 32}
        model = library.ConvNextModel(library.ConvNextConfig(**sizes))
    elif kind == "bert":
        wanted = {name: _TEXT[name] for name in list(_TEXT)[:5]}
        model = library.BertModel(library.BertConfig(**wanted))
    else:
        architecture, config, options = {
            "vit": (library.ViTModel, library.ViTConfig, {}),
            "vit classifier": (library.ViTForImageClassification, library.ViTConfig, {}),
            "dinov2": (library.Dinov2Model, library.Dinov2Config, {"mlp_ratio": 2}),
            "five channels": (library.ViTModel, library.ViTConfig, {"num_channels": 5}),
        }[kind]
        model = architecture(config(**_VISION, **options))
    model.save_pretrained(folder)
    if kind in ("vit", "clip"):
        processor = {
            "image_processor_type": "ViTImageProcessor",
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
            "resample": 2,
            "rescale_factor": 1 / 255,
            "size": {"height": 32, "width": 32},
        }
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def add_open_clip(folder):
    """Teach open_clip a tiny architecture, and return its name."""
    import open_clip

    folder.mkdir(exist_ok=True)
    (folder / "featcache-tiny.json").write_text(json.dumps(_OPEN_CLIP))
    open_clip.add_model_config(folder)
    return "open_clip:featcache-tiny/none"


def add_tokenizer(folder):
    """Write a tokenizer of letters beside a tiny CLIP."""
    import transformers

    letters = [f"{letter}{end}" for letter in "abcdefghijklmnopqrst." for end in ("", "</w>")]
    tokens = ["<|startoftext|>", *letters, "<|endoftext|>"]
    vocab = {token: number for number, token in enumerate(tokens)}
    transformers.CLIPTokenizer(vocab=vocab, merges=[]).save_pretrained(folder)
    return folder


def add_pretrained_open_clip(folder):
    """Teach open_clip a tiny architecture that reads words, with weights; return its name."""
    import open_clip
    import torch

    folder.mkdir(exist_ok=True)
    text = {**_OPEN_CLIP["text_cfg"], "vocab_size": 49408}
    config = {**_OPEN_CLIP, "text_cfg": text}
    (folder / "featcache-words.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    model = open_clip.create_model("featcache-words")
    torch.save(model.state_dict(), folder / "words.pt")
    tags = {"local": {"file": str(folder / "words.pt")}}
    open_clip.pretrained._PRETRAINED["featcache-words"] = tags
    return "open_clip:featcache-words/local"
