"""Tables of labels beside a cache that `featcache.label` did not write."""

from __future__ import annotations

import copy
import json
import shutil
from contextlib import suppress
from functools import cache as once
from functools import partial
from pathlib import Path
from tempfile import mkdtemp

from altered_json import DEEP, alter_json, json_bytes
from caches import ingredients, seal_text, write_roles

from featcache import label, load
from featcache.cli.output import cache_facts, cache_summary
from featcache.errors import FeatcacheError
from featcache.probes.question import Question, ask
from featcache.store.format import unseal


@once
def sound():
    """Return a cache with a table of a column of each kind, and what the table holds."""
    folder = Path(mkdtemp(prefix="fuzz-table-"))
    path = write_roles(folder / "x.h5", ingredients(), train=6, test=4)
    ids = [name for _, split in load(path).splits() for name in split.ids]
    lines = [f"{name},{'ab'[row % 2]},{row}.5,x;y" for row, name in enumerate(ids)]
    (folder / "t.csv").write_text("\n".join(["path,word,size,tags", *lines]))
    label(path, folder / "t.csv")
    return path, unseal(path.with_suffix(".table").read_bytes())


def written(content, folder, data=None):
    path = Path(shutil.copy(sound()[0], folder / "x.h5"))
    data = json.dumps(content).encode() if data is None else data
    path.with_suffix(".table").write_bytes(seal_text(data))
    return path


def with_field(where, value, folder):
    content = copy.deepcopy(sound()[1])
    *outer, last = where
    inside = content
    for part in outer:
        inside = inside[part]
    inside[last] = copy.deepcopy(value)
    return written(content, folder)


PLACES = (
    *(("version",), ("fingerprint",), ("n_rows",), ("facts",), ("columns",)),
    *(("facts", "source"), ("facts", "created"), ("facts", "n_rows"), ("facts", "n_matched")),
    *(("columns", 0, "name"), ("columns", 0, "kind"), ("columns", 0, "values")),
    *(("columns", 0, "codes"), ("columns", 0, "dtype"), ("columns", 1, "numbers")),
    *(("columns", 2, "values"), ("columns", 2, "codes")),
)
VALUES = (None, "", -1, 10**400, float("nan"), [], {}, DEEP, "a\0b", "x" * 5000, "\x1b[2J\r\n")
SEEDS = {
    f"{'.'.join(map(str, where))} {number}": partial(with_field, where, value)
    for where in PLACES
    for number, value in enumerate(VALUES)
}


def alter(rng, folder):
    content = copy.deepcopy(sound()[1])
    alter_json(content, rng)
    return written(content, folder, json_bytes(content, rng))


def read(path):
    """Look at the table, and ask for each of its columns."""
    cache = load(path)
    json.dumps(cache_facts(cache), default=str)
    cache_summary(cache)
    table = cache.table
    if table is None:
        return
    for name, column in table.columns.items():
        column.texts()
        with suppress(FeatcacheError):
            ask(cache, Question(target=name))
    ask(cache, Question(target=next(iter(table.columns)), where="size >= 0"))
