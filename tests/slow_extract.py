"""The command line with an engine and a disk that take their time, to be killed by the tests.

    python slow_extract.py ENGINE_S DISK_S SHARD_ROWS LIMIT_BYTES ARGUMENTS...

The engine is the fake one of conftest.py; every other line is what a user runs. Each
forward pass takes ENGINE_S longer, each write DISK_S; no file may grow beyond
LIMIT_BYTES (0: as large as it likes). "ready" is printed when the work begins.
"""

from __future__ import annotations

import resource
import sys
import time

from conftest import FakeEngine

from featcache import cli, files
from featcache.backbones.choice import EngineChoice
from featcache.extraction import extract as extraction
from featcache.store import writer as _pack


def slowed(function, seconds):
    def slow(*arguments):
        time.sleep(seconds)
        return function(*arguments)

    return slow


def main(engine_s, disk_s, shard_rows, limit_bytes, *arguments):
    class SlowEngine(FakeEngine):
        dim = 64
        extract = slowed(FakeEngine.extract, float(engine_s))

    def build_engine(choice, weights, cuts, **_):
        print("ready", flush=True)
        return SlowEngine(weights, cuts)

    choice = EngineChoice("fake", "1", "cpu", "f32", "a test asked for it")
    extraction.choose_engine = lambda *_: choice
    extraction.build_engine = build_engine
    extraction.SHARD_ROWS = int(shard_rows)
    files.write_all = slowed(files.write_all, float(disk_s))
    _pack._write = slowed(_pack._write, float(disk_s))
    if int(limit_bytes):
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit_bytes), int(limit_bytes)))
    return cli.main(arguments)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
