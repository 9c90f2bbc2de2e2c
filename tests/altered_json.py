"""Changes to JSON that mostly keep its structure, for the fuzz of what reads JSON from files."""

from __future__ import annotations

import copy
import json

DEEP: list = []
for _ in range(200):
    DEEP = [DEEP]
VALUES = [
    *(None, True, False, 0, 1, -1, 2, 5, 255, 1 << 20, 1 << 31, 1 << 63, (1 << 64) + 1, 10**300),
    *(0.0, 1.5, -0.0, 1e308, float("nan"), float("inf"), 10**400),
    *("", "x", "../x.npy", "/etc/passwd", "a\0b", "\ud800", "\udc80", "0" * 64, "x" * 5000),
    *("\x1b]0;owned\x07\r\n", "https://example.invalid/x.zip", "{}", "-1", "nan"),
    *("<f2", "<f4", "<f8", ">f4", "<i8", "|S1", "|S999999", "|S0", "|O", "|V4", "<U4"),
    *("train/features", "test/labels", "train/views/hflip", "avgpool", "layer4"),
    *([], {}, [[]], [0], [1, 1, 1], [1 << 40], {"a": 1}, DEEP),
]


def places(value, found):
    """Collect every container of a JSON value, the value first."""
    if isinstance(value, (list, dict)) and value:
        found.append(value)
        for part in value.values() if isinstance(value, dict) else value:
            places(part, found)
    return found


def alter_json(value, rng):
    """Change one to three things anywhere in a JSON value, in place."""
    for _ in range(rng.choice([1, 1, 2, 3])):
        containers = places(value, [])
        if not containers:
            return
        inside = rng.choice(containers)
        key = rng.choice(list(inside) if isinstance(inside, dict) else range(len(inside)))
        old, kind = inside[key], rng.randrange(7)
        if kind == 0:
            del inside[key]
        elif kind == 1 and isinstance(inside, list):
            inside.insert(rng.randrange(len(inside) + 1), copy.deepcopy(old))
        elif kind == 2 and isinstance(old, (int, float)):
            inside[key] = old + rng.choice([-8, -1, 1, 8, 64, 4096, old])
        elif kind == 3:
            other = rng.choice(containers)
            part = rng.choice(list(other.values() if isinstance(other, dict) else other))
            inside[key] = copy.deepcopy(part)
        elif kind == 4 and isinstance(old, str):
            at = rng.randrange(len(old) + 1)
            inside[key] = old[:at] + rng.choice("/.-\0aé0") + old[at + 1 :]
        elif kind == 5 and isinstance(inside, dict):
            inside[rng.choice([*inside, *map(str, VALUES[20:40])])] = inside.pop(key)
        else:
            inside[key] = copy.deepcopy(rng.choice(VALUES))


def altered_bytes(data, rng):
    """Flip a byte, or cut the end off."""
    if rng.random() < 0.3:
        return data[: rng.randrange(len(data))]
    at = rng.randrange(len(data))
    return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]


def json_bytes(value, rng):
    """Return JSON text, one time in ten with damage."""
    data = json.dumps(value).encode()
    return altered_bytes(data, rng) if rng.random() < 0.1 else data
