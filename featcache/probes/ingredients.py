"""The ingredients of features: what made them, and whether two sets can be used together.

A head is valid only for features made like those it was trained on, so it carries the ingredients
of its cache. Two sets of features can differ in

* **what** is computed: backbone, weights, cut, preprocessing. A head on such features would still
  predict classes, confidently and at random: an error (`feature_differences`).
* **who** computes it: engine, version, device, precision, dtype, version of the image decoder. All
  approximate the same function, and a class changes only where two scores are closer than their
  rounding. A head must survive an upgrade and a move from GPU to laptop: a note
  (`rounding_differences`).

A cache's fingerprint covers both, since one cache must not mix them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import one_line

# The provenance that a head keeps: all that the fingerprint covers, and the name of the weights.
INGREDIENTS = (
    "backbone",
    "calibration",
    "cuts",
    "dataset_digest",
    "device",
    "dtype",
    "engine",
    "engine_version",
    "format_version",
    "library",
    "precision",
    "preprocess",
    "views",
    "weights",
    "weights_sha256",
)
_WHAT = ("backbone", "cut", "weights_sha256")  # and every field of the preprocessing but one:
_DECODER_VERSION = "preprocess decoder version"
_WHO = ("engine", "engine_version", "library", "device", "precision", "dtype", _DECODER_VERSION)


def head_cuts(ingredients: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the cuts whose features a head reads, side by side: by default the cache's first."""
    cuts = ingredients.get("head_cuts") or list(ingredients.get("cuts") or [])[:1]
    return tuple(str(cut) for cut in cuts)


def feature_ingredients(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a cache's provenance that a head keeps."""
    return {name: meta[name] for name in INGREDIENTS if name in meta}


def feature_differences(
    head_ingredients: Mapping[str, Any], other: Mapping[str, Any], mine: str = "head"
) -> list[str]:
    """List the ingredients that make other features than the head's, as ``name: head …, here …``.

    An ingredient that the head lacks counts as different. ``mine`` replaces the word head.
    """
    return _differences(head_ingredients, other, mine, who=False)


def rounding_differences(
    head_ingredients: Mapping[str, Any], other: Mapping[str, Any], mine: str = "head"
) -> list[str]:
    """List the ingredients that change the head's features by rounding alone, in the same form."""
    return _differences(head_ingredients, other, mine, who=True)


def class_differences(mine: Sequence[str], theirs: Sequence[str], name: str = "head") -> list[str]:
    """Return how two lists of class names differ, in one line; an empty list if they do not."""
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
    if "head_cuts" in ours:  # a cache may have more cuts, in any order
        used, there = head_cuts(ours), other.get("cuts") or []
        own["cut"] = ", ".join(used)
        theirs["cut"] = own["cut"] if set(used) <= set(there) else ", ".join(map(str, there))
    return [
        f"{name}: {mine} {own.get(name)!r:.80}, here {theirs.get(name)!r:.80}"
        for name in sorted({*own, *theirs})
        if (name in _WHO) == who
        and (own.get(name) is None or own[name] != theirs.get(name))
        and not (name == "library" and own.get(name) is theirs.get(name) is None)
    ]


def _compared(ingredients: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is compared by name: preprocessing by field, the decoder's version apart."""
    facts = {name: ingredients.get(name) for name in (*_WHAT, *_WHO)}
    cuts = ingredients.get("cuts")  # a head uses the first cut of its cache
    facts["cut"] = cuts[0] if isinstance(cuts, list) and cuts else None
    preprocess = ingredients.get("preprocess")
    if not isinstance(preprocess, Mapping):
        return {**facts, "preprocess size": None}
    if not preprocess:  # imported features: nobody knows their pixels
        del facts[_DECODER_VERSION]
        return facts
    given = {name: value for name, value in preprocess.items() if value is not None}
    facts.update({f"preprocess {one_line(name)}": value for name, value in given.items()})
    decoder, _, version = str(preprocess.get("decoder", "")).partition(" ")
    return {**facts, "preprocess decoder": decoder or None, _DECODER_VERSION: version or None}
