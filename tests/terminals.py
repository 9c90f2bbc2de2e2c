"""A pseudo-terminal for a program under test."""

from __future__ import annotations

import os
import pty
import subprocess


def on_a_terminal(command, environment):
    """Run with a pseudo-terminal for every stream; return exit code and what was shown."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, env=environment, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # how Linux says that the other side is closed
            break
        if not piece:
            break
        shown += piece
    os.close(ours)
    return process.wait(timeout=60), shown.decode()
