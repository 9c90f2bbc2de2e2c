"""What made features, and whether two sets of them can be used together.

A head means something only for features made as those that it was trained on, so it
carries the ingredients of its cache; test features of another cache are compared in the
same way. Features differ in one of two ways:

* **What** is computed differs: the backbone, its weights, where it is cut, how an image
  becomes its input. Such features have nothing to do with the head, which would still name
  a class for each, with confidence: it is refused (`feature_differences`).
* **Who** computes it differs: engine, version, device, precision, the numbers' type in the
  file, the version of the image decoder. All approximate the same function. Each engine
  states its tolerance in a test, float16 rounds by one part in 2,048, and Pillow 12.3 and
  13.0 gave the same bytes for 1,000 of CIFAR-10's JPEG files at 64 pixels. A class changes
  only where two scores are closer than that, and a head has to outlive an upgrade and to
  move from the GPU to a laptop: this is said, and not refused (`rounding_differences`).

A cache's fingerprint covers both, since one cache must not mix them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# What a head keeps of its cache's provenance: all that the fingerprint covers, and the weights'
# name, to find them by.
INGREDIENTS = (
    "backbone",
    "cuts",
    "dataset_digest",
    "device",
    "dtype",
    "engine",
    "engine_version",
    "format_version",
    "precision",
    "preprocess",
    "views",
    "weights",
    "weights_sha256",
)
_WHAT = ("backbone", "cut", "weights_sha256")  # and every field of the preprocessing but one:
_DECODER_VERSION = "preprocess decoder version"
_WHO = ("engine", "engine_version", "device", "precision", "dtype", _DECODER_VERSION)


def feature_ingredients(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a head keeps of a cache's provenance."""
    return {name: meta[name] for name in INGREDIENTS if name in meta}


def feature_differences(
    head_ingredients: Mapping[str, Any], other: Mapping[str, Any], mine: str = "head"
) -> list[str]:
    """List what makes other features than the head's, as ``name: head …, here …``.

    Whatever the head does not say counts as different. ``mine`` names what stands in the
    place of the head, such as another cache.
    """
    return _differences(head_ingredients, other, mine, who=False)


def rounding_differences(
    head_ingredients: Mapping[str, Any], other: Mapping[str, Any], mine: str = "head"
) -> list[str]:
    """List what makes the same features as the head's up to rounding, in the same form."""
    return _differences(head_ingredients, other, mine, who=True)


def class_differences(mine: Sequence[str], theirs: Sequence[str], name: str = "head") -> list[str]:
    """Say in one line how two lists of class names differ; an empty list if they do not."""
    if mine == theirs:
        return []
    if sorted(mine) == sorted(theirs):
        return ["the same classes in another order"]
    if len(mine) != len(theirs):
        return [f"classes: {name} {len(mine)}, here {len(theirs)}"]
    index = next(row for row, pair in enumerate(zip(mine, theirs, strict=True)) if len({*pair}) > 1)
    return [f"class {index}: {name} {mine[index]!r:.80}, here {theirs[index]!r:.80}"]


def _differences(
    ours: Mapping[str, Any], other: Mapping[str, Any], mine: str, *, who: bool
) -> list[str]:
    own, theirs = _compared(ours), _compared(other)
    return [
        f"{name}: {mine} {own.get(name)!r:.80}, here {theirs.get(name)!r:.80}"
        for name in sorted({*own, *theirs})
        if (name in _WHO) == who and (own.get(name) is None or own[name] != theirs.get(name))
    ]


def _compared(ingredients: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is compared, by name: preprocessing field by field, the decoder in two."""
    facts = {name: ingredients.get(name) for name in (*_WHAT, *_WHO)}
    cuts = ingredients.get("cuts")  # a head uses the first cut of its cache
    facts["cut"] = cuts[0] if isinstance(cuts, list) and cuts else None
    preprocess = ingredients.get("preprocess")
    if not isinstance(preprocess, Mapping):
        return {**facts, "preprocess size": None}
    facts.update({f"preprocess {ascii(name)[1:-1]}": preprocess[name] for name in preprocess})
    decoder, _, version = str(preprocess.get("decoder", "")).partition(" ")
    return {**facts, "preprocess decoder": decoder or None, _DECODER_VERSION: version or None}
