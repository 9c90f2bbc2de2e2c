"""The command line: parse, one library call, print.

`main` alone turns exceptions into exit codes: 0 for success, 1 for an error of featcache's own
tree, 2 for wrong arguments, 130 for Ctrl-C. An error is one line on standard error. Any other
exception is a bug and keeps its traceback.
"""

from __future__ import annotations

import sys

try:
    import errno
    import os
    import shlex
    from collections.abc import Sequence
    from typing import Any

    from ..process import ignore_ctrl_c, take_one_ctrl_c, torchrun_rank
except KeyboardInterrupt:  # the first tenth of a second, before `main` can answer
    raise SystemExit(130) from None

_NAME = "featcache"


def run() -> None:
    """Run the command of this process, and leave."""
    take_one_ctrl_c()
    code = main()
    ignore_ctrl_c()  # the interpreter is about to end: one more would print a traceback
    sys.exit(code)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Parameters
    ----------
    arguments : sequence of str, optional
        Arguments without the program's name; by default those of the process.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments:
        main(["--help"])
        return 2
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
        return _complain(f"interrupted{saved}; no file is half-written; run again{again}", 130)
    except MemoryError:
        return _complain("error: not enough memory; use a smaller --batch-size or --size", 1)
    except BrokenPipeError:
        # The reader of our output has gone (featcache … | head).
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
    # Typer does not export the base class of its usage errors.
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
        topic = [word for word in arguments[:1] if word in getattr(command, "commands", ())]
        help_line = " ".join([_NAME, *topic, "--help"])
        return _complain(f"error: {_usage_message(error)} (see {help_line})", 2)
    return 0


def _open_streams() -> None:
    """Open streams that the caller closed, and let any file name be printed."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _usage_message(error: Any) -> str:
    """Return what is wrong with the arguments, in one line."""
    import typer

    possible = getattr(error, "possibilities", None)
    if possible:
        return f"{error.message}; did you mean {possible[0]}?"
    if not isinstance(error, typer.BadParameter) or not error.message:
        return str(error.format_message()).removesuffix(".")
    reason = error.message.removesuffix(".")
    invalid = getattr(error.__cause__, "errors", lambda: ())()  # newer typers validate by pydantic
    if invalid:
        reason = str(invalid[0].get("ctx", {}).get("error", reason)).removesuffix(".")
        if invalid[0]["type"] != "value_error":
            reason += f", found {invalid[0]['input']!r}"
    parameter = error.param
    if error.param_hint:
        return f"{error.param_hint}: {reason}"
    if parameter is None:
        return reason
    is_option = parameter.param_type_name == "option"
    return f"{parameter.opts[0] if is_option else parameter.metavar or parameter.name}: {reason}"


def _complain(message: str, code: int) -> int:
    from ..errors import visible

    print(visible(" ".join(message.splitlines())), file=sys.stderr)
    return code
