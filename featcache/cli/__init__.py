"""The command line: parse, one library call, print.

`main` is the only place that turns errors into exit codes: 0; 1 for an error of
featcache's own tree; 2 for wrong arguments; 130 for Ctrl-C. Each is one line on
standard error. Anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import errno
import os
import shlex
import signal
import sys
import threading
from collections.abc import Sequence

__all__ = ["main"]

_NAME = "featcache"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Parameters
    ----------
    arguments : sequence of str, optional
        Without the program's name; those of the process by default.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    _open_streams()
    try:
        if arguments and not {"-h", "--help", "--version"} & {*arguments}:
            _start_deaf_threads()
        code = _run(arguments)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt as interrupt:
        again = shlex.join([_NAME, *arguments])
        saved = f": {interrupt}" if str(interrupt) else ""
        print(file=sys.stderr)
        return _complain(f"interrupted{saved}; nothing is half-written; again: {again}", 130)
    except MemoryError:
        return _complain("error: not enough memory; use a smaller --batch-size or --size", 1)
    except BrokenPipeError:
        # The reader of our output went away (featcache … | head): nothing left to say.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        return _complain("error: standard output: cannot be written: the disk is full", 1)


def _run(arguments: list[str]) -> int:
    import typer

    from ..errors import FeatcacheError
    from ._commands import app

    command = typer.main.get_command(app)
    if "_FEATCACHE_COMPLETE" in os.environ:
        command.main(prog_name=_NAME)
    # The parser's own error classes are not public, the base of this one is what they share.
    usage_error: type[Exception] = typer.BadParameter.__mro__[1]
    try:
        with command.make_context(_NAME, list(arguments)) as context:
            command.invoke(context)
    except typer.Exit as stop:
        return stop.exit_code
    except FeatcacheError as error:
        return _complain(f"error: {error}", 1)
    except usage_error as error:
        return _complain_usage(error, arguments)
    return 0


def _start_deaf_threads() -> None:
    """Have the threads of NumPy's BLAS start with Ctrl-C blocked, so that only we hear it.

    A signal goes to any thread that does not block it. While OneFlow is imported, none may hear
    this one: see `frameworks`.
    """
    if threading.current_thread() is not threading.main_thread() or os.name == "nt":
        return
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        import numpy  # noqa: F401
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _open_streams() -> None:
    """Make sure that there is something to print to, and that any file name can be printed."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the caller
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _complain_usage(error: Exception, arguments: Sequence[str]) -> int:
    text = getattr(error, "format_message", lambda: str(error))()
    if not text:  # the bare program name: its help was the answer
        return 2
    known = next((word for word in arguments if not word.startswith("-")), "")
    context = getattr(error, "ctx", None)
    topic = f"{_NAME} {known}" if context is not None and context.parent else _NAME
    return _complain(f"error: {text} (see {topic} --help)", 2)


def _complain(message: str, code: int) -> int:
    print(" ".join(message.splitlines()), file=sys.stderr)
    return code
