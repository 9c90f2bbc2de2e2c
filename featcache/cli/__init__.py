"""The command line: parse, one library call, print.

`main` is the only place that turns errors into exit codes: 0; 1 for an error of
featcache's own tree; 2 for wrong arguments; 130 for Ctrl-C. Each is one line on
standard error. Anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
import errno
import os
import re
import shlex
import signal
import sys
import threading
from collections.abc import Sequence

__all__ = ["main"]

_NAME = "featcache"

# What the parser says of a value, and how it is said here.
_PLAINER = (
    (r"Invalid value for '?(-[-\w]+)'?: ", r"\1: "),
    (r"Value error, ", ""),
    (r"('.*?') is not one of (.*?)\.?$", r"expected one of \2; found \1"),
    (r"Input should be a valid integer.*", "expected a whole number"),
    (r"Input should be a valid number.*", "expected a number"),
    (r"Input should be greater than or equal to (.*)", r"expected at least \1"),
    (r"Input should be less than or equal to (.*)", r"expected at most \1"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Parameters
    ----------
    arguments : sequence of str, optional
        Without the program's name; those of the process by default.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["help"]:
        arguments = [*arguments[1:], "--help"]
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
        return _complain_usage(error, arguments, list(getattr(command, "commands", ())))
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


def _complain_usage(error: Exception, arguments: Sequence[str], commands: Sequence[str]) -> int:
    text = getattr(error, "format_message", lambda: str(error))()
    if not arguments:  # the bare program name: its help is the answer
        print(text)
        return 2
    topic = " ".join([_NAME, *(word for word in arguments[:1] if word in commands)])
    option = getattr(error, "option_name", None)
    if option is not None and hasattr(error, "possibilities"):
        near = difflib.get_close_matches(option, error.possibilities or (), 1, cutoff=0.75)
        text = f"{topic} has no option {option}" + "".join(f"; did you mean {it}?" for it in near)
    for theirs, ours in _PLAINER:
        text = re.sub(theirs, ours, text)
    return _complain(f"error: {text} (see {topic} --help)", 2)


def _complain(message: str, code: int) -> int:
    print(" ".join(message.splitlines()), file=sys.stderr)
    return code
