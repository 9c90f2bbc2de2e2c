"""Reads altered files, one after the other, in a process of its own.

    python tests/fuzzing.py READER SECONDS [SEED [FOLDER]]

READER names a module ``fuzz_READER.py`` beside this one, which has

    SEEDS: dict[str, Callable[[Path], Path]]       # writes one input that once went wrong
    def alter(rng: random.Random, folder: Path) -> Path   # writes one altered input
    def read(path: Path) -> None                          # reads it as users do

Every input gets an empty folder; valid originals may be kept in the folder above it. Reading must
end in a return, or in a `FeatcacheError` of one visible line, soon and in little memory. Prints one
JSON object. What went wrong keeps its folder; so does the input that a process dies of.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from contextlib import contextmanager
from pathlib import Path

from featcache.errors import FeatcacheError, visible_line

SLOWEST_S = 10
MEMORY_BYTES = 2 << 30  # of address space, above what the process has before it reads
LONGEST_MESSAGE = 2000
FEWEST = 10  # inputs, however slow the machine


class TooSlow(BaseException):
    """No `Exception`: the code under test may not catch it."""


@contextmanager
def limits(memory_bytes=MEMORY_BYTES):
    """Let a block take so much time and memory, and give pytest its own alarm back."""

    def ring(*_):
        raise TooSlow(f"more than {SLOWEST_S} s")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    room = pages * resource.getpagesize() + memory_bytes
    resource.setrlimit(resource.RLIMIT_AS, (room, hard))
    handler = signal.signal(signal.SIGALRM, ring)
    timer = signal.setitimer(signal.ITIMER_REAL, SLOWEST_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def outcome(read, path, memory_bytes=MEMORY_BYTES):
    """Read a file: the message that refused it or None, and what was wrong with that or None."""
    message = wrong = None
    began = time.monotonic()
    try:
        with limits(memory_bytes):
            read(path)
    except FeatcacheError as error:
        message = str(error)
        if not message.strip() or visible_line(message) != message:
            wrong = f"no visible line: {message[:LONGEST_MESSAGE]!r}"
        elif len(message) >= LONGEST_MESSAGE:
            wrong = f"{len(message):,} characters: {message[:LONGEST_MESSAGE]}"
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:
        wrong = traceback.format_exc()
    if wrong is None and time.monotonic() - began > SLOWEST_S:
        wrong = f"{time.monotonic() - began:.0f} s"
    return message, wrong


def kind(message, path):
    """Return what a message says apart from names and numbers."""
    return re.sub(r"'[^']*'|\"[^\"]*\"|\d+", "", message.replace(str(path), ""))


def main(reader, seconds, seed="0", folder=None):
    faulthandler.enable()
    module = importlib.import_module(f"fuzz_{reader}")
    room = Path(folder or tempfile.mkdtemp(prefix=f"fuzz-{reader}-"))
    tried, refused, messages, wrong = 0, 0, set(), []
    end = time.monotonic() + float(seconds)
    while (time.monotonic() < end or tried < FEWEST) and len(wrong) < 5:
        place = room / f"{tried:06d}"
        place.mkdir(parents=True)
        path = module.alter(random.Random(f"{seed} {tried}"), place)
        # A call into C that does not come back hears no alarm.
        faulthandler.dump_traceback_later(3 * SLOWEST_S, exit=True)
        if not tried:  # what is imported on first use is not the file's fault
            warm = room / "first"  # reading may use an input up
            warm.mkdir()
            outcome(module.read, module.alter(random.Random(seed), warm), 1 << 40)
            shutil.rmtree(warm)
        message, fault = outcome(module.read, path)
        faulthandler.cancel_dump_traceback_later()
        tried += 1
        if message is not None:
            refused += 1
            messages.add(kind(message, path))
        if fault is None:
            shutil.rmtree(place)
        else:
            wrong.append({"input": str(path), "why": fault})
    counts = {"tried": tried, "refused": refused, "read": tried - refused - len(wrong)}
    print(json.dumps({**counts, "messages": sorted(messages), "wrong": wrong}))


if __name__ == "__main__":
    main(*sys.argv[1:])
