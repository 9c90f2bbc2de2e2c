"""Text towers: texts in, vectors in the space of a model's image features out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import RecipeError, WeightsError, one_line
from ..progress import OnProgress, Progress, silent
from .libraries import Loaded, import_library, library_call, load_model
from .naming import BackboneName, parse_backbone, recorded_backbone
from .network import POOLED

PROJECTED = "projected"  # the cut after the projection into the space shared with text
_TEXTS_AT_ONCE = 64
_GIVE_VECTORS = "compute the vectors with the model's own library and give them as a .npy file"


def encode_texts(
    meta: Mapping[str, Any],
    texts: Sequence[str],
    where: str,
    *,
    backbone: str | Path | None = None,
    on_progress: OnProgress = silent,
) -> np.ndarray:
    """Return float32 (M, D): texts by the text tower of the model that made image features.

    ``meta`` records the model and the cuts that were taken; ``where`` names it in messages. Texts
    that are longer than the tower takes are cut off, as its library does.

    Raises
    ------
    WeightsError
        A model without a text tower, other weights than recorded, or no tokenizer.
    RecipeError
        Features of another cut than the one in the space of texts, or an empty text.
    """
    if not texts or not all(text.strip() for text in texts):
        raise RecipeError("text: expected words, found none; try --text 'a red car'")
    name = _model_name(meta, where, backbone)
    size = meta["preprocess"]["size"]
    loaded = load_model(name.kind, name.rest, pretrained=True, size=size)
    _check(loaded, name, meta, where)
    rows: list[np.ndarray] = []
    with library_call(name.kind, name.rest, pretrained=True):
        import torch

        encode = _encoder(loaded.whole.eval(), name)
        with torch.inference_mode():
            for start in range(0, len(texts), _TEXTS_AT_ONCE):
                part = list(texts[start : start + _TEXTS_AT_ONCE])
                rows.append(encode(part).to(torch.float32).numpy())
                on_progress(Progress("texts", start + len(part), len(texts)))
    return np.concatenate(rows)


def _model_name(meta: Mapping[str, Any], where: str, backbone: str | Path | None) -> BackboneName:
    """Return the model that made the features, if it may have a text tower."""
    recorded = str(meta["backbone"])
    if recorded.partition(":")[0] not in ("open_clip", "hf"):
        raise WeightsError(
            f"{where}: expected features of a model with a text tower (open_clip:… or hf:…), found "
            f"'{one_line(recorded)}'; {_GIVE_VECTORS}"
        )
    name = parse_backbone(backbone or recorded_backbone(recorded, where))
    if name.stored != recorded or not name.brings_weights(meta["weights"]):
        raise WeightsError(
            f"{where}: expected texts by the model of its features, '{one_line(recorded)}' with "
            f"the weights '{one_line(meta['weights'])}', found {one_line(name.stored)} with its "
            f"own; {_GIVE_VECTORS}"
        )
    return name


def _check(loaded: Loaded, name: BackboneName, meta: Mapping[str, Any], where: str) -> None:
    """Refuse a model without a text tower, other weights, and another cut."""
    from .torch_network import TorchNetwork, model_digest

    if loaded.whole is None:
        raise WeightsError(
            f"{where}: expected a model with a text tower, found none in {name.stored}; "
            "extract the images with a CLIP or SigLIP model"
        )
    digest, expected = model_digest(loaded.model), meta["weights_sha256"]
    if digest != expected:
        raise WeightsError(
            f"{where}: expected {name.stored} with the weights that made its features "
            f"({one_line(expected):.8}), found others ({digest[:8]}); get the same ones, or "
            "extract the images again"
        )
    network = TorchNetwork(name.stored, loaded.model, loaded.outputs, meta["preprocess"]["size"])
    cut = PROJECTED if PROJECTED in network.cut_shapes() else POOLED
    if cut not in meta["cuts"]:
        taken = one_line(",".join(map(str, meta["cuts"])))
        raise RecipeError(
            f"{where}: expected the cut '{cut}', which lies in the space of texts, found {taken}; "
            f"extract it too, with --cut {taken},{cut}"
        )


def _encoder(model: Any, name: BackboneName) -> Callable[[list[str]], Any]:
    """Return the function from texts to a tensor (M, D), if its tokenizer is here."""
    library = import_library(name.kind)
    try:
        if name.kind == "open_clip":
            tokenizer = library.get_tokenizer(name.rest.partition("/")[0])
            return lambda texts: model.encode_text(tokenizer(texts))
        tokenizer = library.AutoTokenizer.from_pretrained(
            model.name_or_path, trust_remote_code=False
        )
        config = model.config.text_config
        if 2 * len(tokenizer) < config.vocab_size:  # what transformers makes without its files
            raise ValueError(f"one of {len(tokenizer):,} of {config.vocab_size:,} tokens")
    except Exception as error:  # whatever a library and a hub may raise
        raise WeightsError(
            f"{name.stored}: expected the tokenizer of its text tower beside its weights or in the "
            f"library's cache, found {type(error).__name__}: {one_line(error)}; run it once with a "
            "network, or copy the files here"
        ) from None
    # SigLIP was trained on texts of full length; for CLIP, padding changes nothing.
    most = {"padding": "max_length", "max_length": config.max_position_embeddings}

    def encode(texts: list[str]) -> Any:
        tokens = tokenizer(texts, truncation=True, return_tensors="pt", **most)
        found = model.get_text_features(**tokens)
        return getattr(found, "pooler_output", found)  # a tensor, before transformers 5

    return encode
