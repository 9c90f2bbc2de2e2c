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
import sys
from collections.abc import Sequence

from ..process import torchrun_rank

_NAME = "featcache"

# What the parser says, and how it is said here.
_PLAINER = (
    (r"^Invalid value: ", ""),
    (r"^Invalid value for '?\[?([-|.\w]+)\]?'?(?: / '-\w')?: ", r"\1: "),
    (r"^Missing (?:option|argument) '([-|.\w]+)'(?: / '-\w')?\.?", r"\1: expected one, found none"),
    (r"^Option '(\S+)' requires an argument\.?", r"\1: expected a value, found none"),
    (r"^Got unexpected extra argument(?:s|\(s\))? \((.*)\)", r"expected nothing more, found \1"),
    (r"Value error, ", ""),
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
    rank = torchrun_rank()
    try:
        code = _run(arguments, rank)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt as interrupt:
        if rank:
            return 130  # the first process says so
        again = ", by the same launcher: " * (rank is not None) or ": "
        again += shlex.join([_NAME, *arguments])
        saved = f": {interrupt}" if str(interrupt) else ""
        print(file=sys.stderr)
        return _complain(f"interrupted{saved}; nothing is half-written; again{again}", 130)
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


def _run(arguments: list[str], rank: int | None) -> int:
    import typer

    from ..errors import FeatcacheError
    from .commands import app

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
        return _complain(f"error: rank {rank}: {error}" if rank else f"error: {error}", 1)
    except usage_error as error:
        if rank:
            return 2  # the first process says so
        return _complain_usage(error, arguments, list(getattr(command, "commands", ())))
    return 0


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
    for theirs, ours in _PLAINER:
        text = re.sub(theirs, ours, text)
    if hasattr(error, "possibilities"):
        word, known = str(getattr(error, "option_name", "")), error.possibilities or ()
        text = f"{topic} has no option {word}{_nearest(word, known)}"
    elif found := re.match(r"No such command '(.*?)'", text):
        text = f"{topic} has no command {found[1]}{_nearest(found[1], commands)}"
    elif found := re.fullmatch(r"(\S+: )(['\"](.*)['\"]) is not one of (.*?)\.?", text):
        known = re.findall(r"'(.*?)'", found[4])
        text = f"{found[1]}expected one of {', '.join(known)}, found {found[2]}"
        text += _nearest(found[3], known)
    elif refused := getattr(error.__cause__, "errors", lambda: ())():
        text += f", found {refused[0]['input']!r}"
    return _complain(f"error: {text} (see {topic} --help)", 2)


def _nearest(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, 1)
    return "".join(f"; did you mean {name}?" for name in near)


def _complain(message: str, code: int) -> int:
    print(" ".join(message.splitlines()), file=sys.stderr)
    return code
