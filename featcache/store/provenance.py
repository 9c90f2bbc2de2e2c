"""What the provenance of a cache may be: one schema, when a cache is written and when it is read.

A field that is wrong refuses the cache, also where it only informs: the index is sealed, so no
accident on a disk can have made it, and a command that went on would show or copy what nobody
wrote. Fields that are not listed here need only be plain (``docs/format.md``).
"""

from __future__ import annotations

from typing import Any

from ..errors import one_line
from ..schema import count, list_of, number, object_of, optional, plain, text, words
from .format import DTYPES, FORMAT, FORMAT_VERSION, fingerprint

IMPORTED = "imported"  # the backbone and engine of features that featcache did not compute
_MAX_LEVELS = 4  # of lists and objects in a field

_plain = plain(_MAX_LEVELS)
_names = list_of(words, least=1, distinct=True)
_PIXELS = object_of(
    {"size": count(1)},
    {
        "decoder": words,
        "geometry": words,
        "interpolation": words,
        "mean": list_of(number(), 3),
        "std": list_of(number(), 3),
    },
)
_MUST = {
    "format": lambda value: value == FORMAT,
    "format_version": count(FORMAT_VERSION, FORMAT_VERSION),
    "fingerprint": words,
    "backbone": words,
    "class_names": list_of(text),  # none where nothing is labelled
    "cuts": _names,
    "dataset_digest": words,
    "device": words,
    "dtype": lambda value: isinstance(value, str) and value in DTYPES,
    "engine": words,
    "engine_version": text,  # none where a function computes
    "precision": words,
    "preprocess": lambda value: value == {} or (_plain(value) and _PIXELS(value)),
    "views": lambda value: _names(value) and value[0] == "identity",
    "weights_sha256": words,
}
_MAY = {
    "bottleneck": words,
    "calibration": words,
    "created": words,
    "dataset": text,
    "dataset_path": optional(text),
    "dataset_source": text,
    "featcache_version": words,
    "features_sha256": words,
    "images_per_s": number(0),
    "imported_from": object_of({}),
    "library": words,
    "merged_from": list_of(object_of({})),
    "precision_evidence": object_of({}),
    "reused_rows": number(0),
    "split": words,
    "stages_s": lambda value: isinstance(value, dict) and all(map(number(), value.values())),
    "wall_s": number(0),
    "weights": text,
    "weights_source": text,
}


def check_provenance(meta: Any) -> dict[str, Any]:
    """Return the provenance of a cache; raise a ValueError that says which field is wrong."""
    if not isinstance(meta, dict):
        raise ValueError(f"{one_line(meta)} as its provenance")
    for name, check in {**dict.fromkeys(meta, _plain), **_MAY, **_MUST}.items():
        if name not in meta and name in _MUST:
            raise ValueError(f"no field {name!r}")
        if name not in meta:
            continue
        value = meta[name]
        known = name == "dataset_path" or (value is not None and text(name) and _plain(value))
        if not (known and check(value)):
            raise ValueError(f"{one_line(repr(value))} in the field '{one_line(name)}'")
    if not meta["preprocess"] and meta["backbone"] != IMPORTED:
        raise ValueError("{} in the field 'preprocess', which only imported features lack")
    if fingerprint(meta) != meta["fingerprint"]:
        raise ValueError(
            f"fields that do not hash to its fingerprint {one_line(meta['fingerprint'][:8])}: "
            "someone edited them"
        )
    return dict(meta)
