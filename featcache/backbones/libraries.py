"""Models of timm, torchvision, transformers and open_clip, each with its own preprocessing.

A library is imported when one of its models is asked for. It downloads its own weights, into its
own cache; weights that carry code are refused (PyTorch's ``weights_only``, safetensors).
"""

from __future__ import annotations

import importlib
import inspect
import io
import logging
import os
import re
import socket
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ..errors import EngineUnavailableError, FeatcacheError, RecipeError, WeightsError, one_line
from ..files import user_path
from ..options import did_you_mean
from ..preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from ..process import ctrl_c_later, installed_version
from .naming import did_you_mean_model
from .pretrained import torch_hub_folder, user_cache

if TYPE_CHECKING:
    from .torch_network import Outputs

# Our name, the module, the package, and the extra that installs it.
PACKAGES = {
    "timm": ("timm", "timm", "timm"),
    "torchvision": ("torchvision", "torchvision", "torchvision"),
    "hf": ("transformers", "transformers", "hf"),
    "open_clip": ("open_clip", "open_clip_torch", "open_clip"),
}
_HUB = "https://huggingface.co"
_LOOKUP_S = 5.0
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model of a library."""

    model: Any  # without its classifier, so that its own output is what it pools
    outputs: Outputs  # the model's own outputs by name
    preprocess: Preprocess  # as the library prepares images for these weights
    head: tuple[str, ...]  # how the names of a classifier's tensors begin, in a checkpoint with one
    source: str  # where the weights come from, for a person
    notes: tuple[str, ...] = ()  # what the user should know
    whole: Any = None  # the model with its text tower, where it has one


def library_version(kind: str) -> str:
    """Return ``"timm 1.0.31"`` without importing it, or raise EngineUnavailableError."""
    _, package, extra = PACKAGES[kind]
    version = installed_version(package)
    if version is None:
        raise EngineUnavailableError(
            f"backbone {kind}: expected the package {package}, found that it is not installed; run "
            f"pip install 'featcache[{extra}]'"
        )
    return f"{package} {version}"


def import_library(kind: str) -> Any:
    """Import a library, quietly."""
    version = library_version(kind)
    module, _, extra = PACKAGES[kind]
    try:
        with ctrl_c_later(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            library = importlib.import_module(module)
            if kind == "hf":  # its own bars and remarks would stand between ours
                library.logging.set_verbosity_error()
                library.logging.disable_progress_bar()
            return library
    except Exception as error:  # a build for another PyTorch raises what it likes
        raise EngineUnavailableError(
            f"backbone {kind}: expected {version} to import, found {type(error).__name__}: "
            f"{one_line(error)}; run pip install 'featcache[{extra}]', with torch and torchvision "
            "of the same build"
        ) from error


def load_model(kind: str, rest: str, *, pretrained: bool, size: int | None) -> Loaded:
    """Build a model of a library, with its own weights or with arbitrary ones.

    ``size`` is the side of the input in pixels, where the model can take several.
    """
    import_library(kind)
    load = {"timm": _timm, "torchvision": _torchvision, "hf": _hf, "open_clip": _open_clip}[kind]
    with library_call(kind, rest, pretrained=pretrained):
        return load(rest, pretrained, size)


@contextmanager
def library_call(kind: str, rest: str, *, pretrained: bool) -> Iterator[None]:
    """Let a library work quietly, with the hub where it is needed; its errors become ours."""
    with _quietly(), _hub_access(pretrained):
        try:
            yield
        except FeatcacheError:
            raise
        except Exception as error:  # whatever a library and a hub may raise
            raise _failure(kind, rest, error, pretrained) from error


def _failure(kind: str, rest: str, error: Exception, pretrained: bool) -> FeatcacheError:
    """Return one line for an error of a library: no such name, no network, or anything else."""
    name = f"{kind}:{rest}"
    shown = f"{type(error).__name__}: {one_line(error)}"
    if pretrained and _is_network(error):
        return WeightsError(
            f"{name}: expected its weights in the library's cache or on the network, found neither "
            f"({shown}); {_by_hand(kind, rest)}, or use --weights FILE or --weights random:0"
        )
    return WeightsError(
        f"{name}: expected a model that {kind} can build, found {shown}; featcache backbones "
        f"'{kind}:*' lists names"
    )


def _is_network(error: BaseException | None) -> bool:
    """Tell whether an error, or one that caused it, is of the network."""
    words = ("connect", "locate the file", "offline", "resolve", "urlopen", "Failed to download")
    while error is not None:
        if isinstance(error, (ConnectionError, TimeoutError, socket.gaierror)):
            return True
        if any(word in str(error) for word in words):
            return True
        error = error.__cause__ or error.__context__
    return False


def _by_hand(kind: str, rest: str) -> str:
    if kind == "torchvision":
        return f"put {_torchvision_url(rest)} into {torch_hub_folder()}"
    return (
        "on a machine with a network run the same command (or hf download), and copy "
        f"{_hub_cache()} here"
    )


def _torchvision_url(rest: str) -> str:
    name, _, tag = rest.partition("/")
    url: str = import_library("torchvision").models.get_model_weights(name)[tag or "DEFAULT"].url
    return url


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep warnings, log lines, progress bars and remarks of a library off the terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    variables = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1"}
    saved = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
        for name, value in saved.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@contextmanager
def _hub_access(needed: bool) -> Iterator[None]:
    """Do without the hub where it cannot be found: its client would retry for half a minute."""
    try:
        constants: Any = importlib.import_module("huggingface_hub.constants")
    except ImportError:
        yield
        return
    offline = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = offline or not needed or not _hub_is_there()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline


def _hub_is_there() -> bool:
    place = urlsplit(os.environ.get("HF_ENDPOINT") or _HUB)
    try:
        socket.create_connection(
            (place.hostname or "", place.port or (80 if place.scheme == "http" else 443)),
            timeout=_LOOKUP_S,
        ).close()
        return True
    except OSError:
        return bool(os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"))


def _timm(rest: str, pretrained: bool, size: int | None) -> Loaded:
    import timm

    if not timm.is_model(rest.partition(".")[0]) and not rest.startswith("hf-hub:"):
        raise RecipeError(
            f"backbone: expected a model of timm {timm.__version__}, found '{one_line(rest)}'"
            + did_you_mean_model("timm", rest, timm.list_models())
        )
    options: dict[str, Any] = {"pretrained": pretrained, "num_classes": 0}
    if size is None:
        model = timm.create_model(rest, **options)
    else:
        try:  # a transformer's position embeddings are resampled to the size
            model = timm.create_model(rest, img_size=size, **options)
        except TypeError:  # a network that takes any size
            model = timm.create_model(rest, **options)
    config = timm.data.resolve_model_data_config(model)
    own = config["input_size"]
    if own[0] != 3 or own[1] != own[2]:
        raise RecipeError(
            f"timm:{rest}: expected a network of square RGB images, found input of {own}; choose "
            "another model"
        )
    side = own[1]
    crop_mode = config.get("crop_mode") or "center"
    geometry = {"center": "crop", "squash": "squash", "border": "pad"}[crop_mode]
    mean, std = tuple(config["mean"]), tuple(config["std"])
    preprocess = Preprocess(
        side,
        mean,
        std,
        config["interpolation"],
        geometry,
        None if geometry == "pad" else max(side, int(side // config["crop_pct"])),
        fill=tuple(round(255 * value) for value in mean) if geometry == "pad" else (0, 0, 0),
    )

    def outputs(model: Any, x: Any) -> Mapping[str, Any]:
        features = model.forward_features(x)
        values = {"pooled": model.forward_head(features, pre_logits=True)}
        if getattr(features, "ndim", 0) == 3:
            values.update(_of_tokens(features, getattr(model, "num_prefix_tokens", 0)))
            if getattr(model, "cls_token", None) is None:
                values.pop("cls", None)
        return values

    classifier = model.pretrained_cfg.get("classifier") or ()
    head = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    hub = model.pretrained_cfg.get("hf_hub_id") or model.pretrained_cfg.get("url") or rest
    return Loaded(model, outputs, preprocess, tuple(f"{name}." for name in head), f"timm's {hub}")


def _of_tokens(tokens: Any, n_prefix: int) -> dict[str, Any]:
    """Return tokens (N, T, D), the mean of the patches' (N, D), and the first if it is a prefix."""
    values = {"mean": tokens[:, n_prefix:].mean(1), "tokens": tokens}
    return {"cls": tokens[:, 0], **values} if n_prefix else values


def _torchvision(rest: str, pretrained: bool, size: int | None) -> Loaded:
    import torch
    import torchvision

    models = torchvision.models
    name, _, tag = rest.partition("/")
    if name not in models.list_models(module=models):
        raise RecipeError(
            f"backbone: expected a classifier of torchvision {torchvision.__version__}, found "
            f"'{one_line(rest)}'"
            + did_you_mean_model("torchvision", name, models.list_models(module=models))
        )
    try:
        weights = models.get_model_weights(name)[tag or "DEFAULT"]
    except KeyError:
        raise RecipeError(
            f"torchvision:{name}: expected weights of {', '.join(_tags(models, name))}, found "
            f"'{one_line(tag)}'{did_you_mean(tag, _tags(models, name))}"
        ) from None
    options: dict[str, Any] = {}
    if name.startswith(("googlenet", "inception")):
        options["init_weights"] = False
    if size is not None and name.startswith("vit_"):
        if pretrained and size != weights.meta["min_size"][0]:
            raise RecipeError(
                f"torchvision:{name}: expected its own size of {weights.meta['min_size'][0]} "
                f"pixels, which its position embeddings fix, found --size {size}; leave out --size"
            )
        options["image_size"] = size
    model = models.get_model(name, weights=None, **options)
    linear = [path for path, one in model.named_modules() if isinstance(one, torch.nn.Linear)]
    if pretrained:
        state = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
        model.load_state_dict(state)
    model.aux_logits = False
    head: tuple[str, ...] = ()
    if linear:  # the classifier: what it reads is what the model pools
        parent, _, last = linear[-1].rpartition(".")
        setattr(model.get_submodule(parent), last, torch.nn.Identity())
        head = (f"{linear[-1]}.", "AuxLogits.", "aux1.", "aux2.")
    transforms = weights.transforms()

    def outputs(model: Any, x: Any) -> Mapping[str, Any]:
        return {"pooled": model(x)} if linear else {"logits": model(x)}

    preprocess = Preprocess(
        transforms.crop_size[0],
        tuple(transforms.mean),
        tuple(transforms.std),
        transforms.interpolation.value,
        "crop",
        max(transforms.resize_size[0], transforms.crop_size[0]),
    )
    return Loaded(model, outputs, preprocess, head, f"torchvision's {weights}")


def _tags(models: Any, name: str) -> list[str]:
    return [one.name for one in models.get_model_weights(name)]


def _open_clip(rest: str, pretrained: bool, size: int | None) -> Loaded:
    import open_clip

    name, _, tag = rest.partition("/")
    if name not in open_clip.list_models():
        raise RecipeError(
            f"backbone: expected a model of open_clip {open_clip.__version__}, found "
            f"'{one_line(name)}'" + did_you_mean_model("open_clip", name, open_clip.list_models())
        )
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained and tag not in tags:
        raise RecipeError(
            f"open_clip:{name}: expected /PRETRAINED to name the weights ({', '.join(tags[:8])}), "
            f"found '{one_line(tag)}'{did_you_mean(tag, tags)}"
        )
    model = open_clip.create_model(
        name,
        pretrained=tag if pretrained else None,
        load_weights=pretrained,
        force_image_size=size,
        precision="fp32",
    )
    config = open_clip.get_model_preprocess_cfg(model)
    visual = model.visual
    outputs, notes = _visual_outputs(visual)
    side = config["size"] if isinstance(config["size"], int) else config["size"][0]
    preprocess = Preprocess(
        side,
        tuple(config["mean"]),
        tuple(config["std"]),
        config["interpolation"],
        {"shortest": "crop", "squash": "squash", "longest": "pad"}[config["resize_mode"]],
        fill=(int(config["fill_color"]),) * 3,
    )
    return Loaded(visual, outputs, preprocess, (), f"open_clip's {rest}", notes, model)


def _visual_outputs(visual: Any) -> tuple[Outputs, tuple[str, ...]]:
    """Return an image tower's outputs.

    ``pooled`` is before the projection into the space shared with text, as in the linear probes
    of Radford et al., "Learning Transferable Visual Models", ICML 2021, appendix A.3;
    ``projected`` is after it.
    """
    if getattr(visual, "proj", None) is not None and hasattr(visual, "transformer"):
        # The tower computes pooled @ proj: without proj it returns what it pools.
        projection = visual.proj
        visual.proj = None
        visual.register_parameter("projection", projection)

        def transformer(visual: Any, x: Any) -> Mapping[str, Any]:
            pooled = visual(x)
            return {"pooled": pooled, "projected": pooled @ visual.projection}

        return transformer, ()
    if hasattr(visual, "trunk") and hasattr(visual, "head"):

        def trunk(visual: Any, x: Any) -> Mapping[str, Any]:
            pooled = visual.trunk(x)
            return {"pooled": pooled, "projected": visual.head(pooled)}

        return trunk, ()

    def whole(visual: Any, x: Any) -> Mapping[str, Any]:
        return {"pooled": visual(x)}

    note = "pooled is after the projection: this network pools and projects in one layer"
    return whole, (note,)


def _hf(rest: str, pretrained: bool, size: int | None) -> Loaded:
    import transformers

    folder = user_path(rest)
    if not folder.is_dir() and not _HUB_NAME.fullmatch(rest):
        raise RecipeError(
            f"hf:{one_line(rest)}: expected ORG/NAME, or a folder that save_pretrained wrote, "
            "found neither; check the path"
        )
    place = str(folder) if folder.is_dir() else rest
    common = {"trust_remote_code": False}
    config = transformers.AutoConfig.from_pretrained(place, **common)
    if getattr(config, "is_encoder_decoder", False):
        raise RecipeError(f"hf:{rest}: expected a vision model, found an encoder-decoder")
    missing: list[str] = []
    if pretrained:
        model, info = transformers.AutoModel.from_pretrained(
            place, output_loading_info=True, use_safetensors=True, **common
        )
        missing = sorted(info["missing_keys"])
    else:
        model = transformers.AutoModel.from_config(config, **common)
    vision = getattr(config, "vision_config", config)
    tower = model.vision_model if hasattr(model, "vision_model") else model
    own_pooler = not any("pooler" in name for name in missing)
    if not own_pooler:
        drop_pooler(tower)
    missing = [name for name in missing if "pooler" not in name]
    if missing:
        raise WeightsError(
            f"hf:{rest}: expected every tensor of {type(model).__name__}, found none for "
            f"'{one_line(missing[0])}' ({len(missing)} in all); its weights are of another model"
        )
    patch = getattr(vision, "patch_size", None)
    projection = getattr(model, "visual_projection", None)
    if projection is not None:
        tower.add_module("featcache_projection", projection)
    interpolates = "interpolate_pos_encoding" in inspect.signature(tower.forward).parameters

    def outputs(tower: Any, x: Any) -> Mapping[str, Any]:
        resized = interpolates and x.shape[-1] != getattr(vision, "image_size", x.shape[-1])
        result = tower(x, **({"interpolate_pos_encoding": True} if resized else {}))
        values: dict[str, Any] = {}
        last = result.last_hidden_state
        if last.ndim == 3 and isinstance(patch, int):
            n_prefix = last.shape[1] - (x.shape[-1] // patch) ** 2
            values.update(_of_tokens(last, max(0, n_prefix)))
        pooled = getattr(result, "pooler_output", None)
        if pooled is not None:
            values["pooled"] = pooled.flatten(1)
        elif "cls" in values:
            values["pooled"] = values["cls"]
        if hasattr(tower, "featcache_projection") and "pooled" in values:
            values["projected"] = tower.featcache_projection(values["pooled"])
        return values

    preprocess, notes = _hf_preprocess(transformers, place, vision)
    if not own_pooler:
        notes = (*notes, "its weights have no pooler: pooled is the class token")
    whole = model if hasattr(model, "get_text_features") else None
    return Loaded(tower, outputs, preprocess, _HF_HEADS, f"Hugging Face's {rest}", notes, whole)


def drop_pooler(tower: Any) -> None:
    """Take off a pooler that no weights are known for: pooled is then the class token."""
    if hasattr(getattr(tower, "pooler", None), "parameters"):
        tower.pooler = None


_HF_HEADS = ("classifier.", "head.", "decoder.", "lm_head.", "text_model.", "text_projection.")


def _hf_preprocess(
    transformers: Any, place: str, config: Any
) -> tuple[Preprocess, tuple[str, ...]]:
    """Return what an image processor's configuration asks for."""
    try:
        fields = transformers.AutoImageProcessor.from_pretrained(
            place, trust_remote_code=False, backend="pil"
        ).to_dict()
    except (OSError, ValueError):
        side = getattr(config, "image_size", 224)
        side = side if isinstance(side, int) else side[0]
        note = (
            "no preprocessor_config.json: images are cropped and normalised with ImageNet's mean "
            "and standard deviation; override with --mean, --std and --geometry"
        )
        return Preprocess(side, IMAGENET_MEAN, IMAGENET_STD, "bicubic", "crop"), (note,)
    return processor_preprocess(fields, place), ()


def processor_preprocess(fields: Mapping[str, Any], where: str) -> Preprocess:
    """Translate the configuration of an image processor (Pillow's backend) of transformers."""
    size = dict(fields.get("size") or {})
    crop = fields.get("crop_size") or {}
    crop = {"height": crop, "width": crop} if isinstance(crop, int) else dict(crop)
    shortest = size.get("shortest_edge")
    squash = size.get("height")
    resize = shortest or squash
    side = crop.get("height") if fields.get("do_center_crop") else None
    geometry = "crop" if shortest else "squash"
    crop_pct = fields.get("crop_pct")
    if crop_pct and shortest and not side:  # ConvNeXt's: below 384 pixels a crop of a larger image
        side = shortest
        geometry, resize = ("crop", int(side / crop_pct)) if side < 384 else ("squash", side)
    side = side or (resize if geometry == "squash" else None)
    resample = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
    unfit = [
        what
        for what, wrong in (
            ("a size that is not square", size.get("width", squash) != squash),
            ("a crop that is not square", crop.get("width") != crop.get("height")),
            ("no fixed size", side is None or resize is None),
            ("padding", bool(fields.get("do_pad"))),
            ("no resizing", not fields.get("do_resize", True)),
        )
        if wrong
    ]
    if unfit or side is None or resize is None:
        raise WeightsError(
            f"{one_line(where)}: expected an image processor that resizes and crops to a square, "
            f"found {unfit[0]}; give --size, --geometry, --mean and --std, or another model"
        )
    scaled = fields.get("do_normalize", True)
    mean = tuple(fields.get("image_mean") or IMAGENET_MEAN) if scaled else (0.0, 0.0, 0.0)
    std = tuple(fields.get("image_std") or IMAGENET_STD) if scaled else (1.0, 1.0, 1.0)
    factor = fields.get("rescale_factor", 1 / 255) if fields.get("do_rescale", True) else 1.0
    scale = 1 / (255 * factor)  # of what the processor gives for white
    return Preprocess(
        side,
        tuple(value * scale for value in mean),
        tuple(value * scale for value in std),
        resample[int(fields.get("resample", 2))],
        geometry,
        max(side, resize),
        rounding="down",
    )


def weights_files(kind: str, rest: str) -> list[Path]:
    """Return the files of a Hugging Face model's own weights on this machine."""
    if kind != "hf":
        return []
    folder = user_path(rest)
    return _files_in(folder) if folder.is_dir() else _in_hub(rest)


def _files_in(folder: Path) -> list[Path]:
    return sorted(one for one in folder.iterdir() if one.is_file())


def _in_hub(repository: str) -> list[Path]:
    """Return the files of a repository in the hub's cache."""
    folder = Path(_hub_cache()) / f"models--{repository.replace('/', '--')}"
    try:
        commit = (folder / "refs" / "main").read_text("ascii").strip()
        return _files_in(folder / "snapshots" / commit)
    except (OSError, ValueError):
        return []


def names_of(kind: str) -> Sequence[str]:
    """Return the names that a library lists."""
    if kind == "flowvision":
        from .flowvision import registry

        return sorted(registry().model_list())
    library = import_library(kind)
    if kind == "open_clip":
        return [f"{name}/{tag}" for name, tag in library.list_pretrained()]
    if kind == "hf":
        return _hub_models()
    if kind == "timm":
        return list(library.list_models())
    return list(library.models.list_models(module=library.models))


def catalogue_facts(
    kind: str, name: str, *, build: bool
) -> tuple[int | None, int | None, int | None]:
    """Return features, side of the input and parameters, as far as they are known.

    With ``build`` the network is laid out without its numbers, which takes a moment each.
    """
    if kind == "torchvision":
        weights = import_library(kind).models.get_model_weights(name).DEFAULT
        return None, weights.transforms().crop_size[0], int(weights.meta["num_params"])
    if kind == "timm":
        library = import_library(kind)
        config = library.get_pretrained_cfg(name)
        side = config.input_size[-1] if config else None
        if not build:
            return None, side, None
        import torch

        with _quietly(), torch.device("meta"):
            model = library.create_model(name, pretrained=False, num_classes=0)
        count = sum(value.numel() for value in model.parameters())
        return getattr(model, "head_hidden_size", None) or model.num_features, side, count
    if kind == "open_clip":
        config = import_library(kind).get_model_config(name.partition("/")[0])
        return config["embed_dim"], config["vision_cfg"].get("image_size"), None
    return None, None, None


def weights_are_here(kind: str, rest: str) -> bool:
    """Tell whether a model's own weights are on this machine, without the network."""
    if kind == "hf":
        return any(path.suffix == ".safetensors" for path in weights_files(kind, rest))
    if kind == "flowvision":
        return False
    library = import_library(kind)
    if kind == "torchvision":
        return (torch_hub_folder() / _torchvision_url(rest).rpartition("/")[2]).is_file()
    if kind == "timm":
        config = library.get_pretrained_cfg(rest)
        repository = getattr(config, "hf_hub_id", None) or ""
        if repository.endswith("/"):  # in timm's table the model's name follows
            repository += rest
        return bool(repository and _in_hub(repository))
    name, _, tag = rest.partition("/")
    repository = library.get_pretrained_cfg(name, tag).get("hf_hub", "").rstrip("/")
    return bool(repository and _in_hub(repository))


def _hub_models() -> list[str]:
    """Return the repositories in the hub's cache; the hub itself is too large to list."""
    try:
        folders = sorted(os.listdir(_hub_cache()))
    except OSError:
        return []
    return [
        one.removeprefix("models--").replace("--", "/", 1)
        for one in folders
        if one.startswith("models--")
    ]


def _hub_cache() -> str:
    home = os.environ.get("HF_HOME") or user_cache() / "huggingface"
    return os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")
