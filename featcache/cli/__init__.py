"""The command line: parse, one library call, print.

`main` alone turns exceptions into exit codes: 0 for success, 1 for an error of featcache's own
tree, 2 for wrong arguments, 130 for Ctrl-C. An error is one line on standard error. Any other
exception is a bug and keeps its traceback.

Nothing is imported before `run` has said what Ctrl-C does, not even `typing`.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

_NAME = "featcache"


def run() -> None:
    """Run the command of this process, and leave."""
    # `signal` itself takes longer, since it imports `enum`.
    import _signal as signal  # type: ignore[import-not-found]

    # Where a shell started this process in the background, Ctrl-C is not for it.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)
        _open_streams()
        from ..process import take_one_ctrl_c
        from .commands import app  # noqa: F401

        take_one_ctrl_c()
    code = main()
    from ..process import ignore_ctrl_c

    ignore_ctrl_c()  # the interpreter is about to end: one more would print a traceback
    sys.exit(code)


def _leave(*_: object) -> None:
    """Leave while modules are loaded, when there is nothing yet to put in order."""
    os.write(2, b"\ninterrupted before it began; run the same command again\n")
    os._exit(130)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Parameters
    ----------
    arguments : sequence of str, optional
        Arguments without the program's name; by default those of the process.
    """
    import errno
    import shlex

    from ..process import memory_problem, ran_out_of_memory, torchrun_rank

    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments:
        main(["--help"])
        return 2
    if arguments[0] == "help":
        arguments = [*arguments[1:], "--help"]
    if arguments[0] == "version":
        arguments = ["--version"]
    _open_streams()
    rank = torchrun_rank()
    asks = arguments[0].startswith("-") or "--help" in arguments
    problem = "" if asks else memory_problem(arguments[0])
    if problem:
        return _complain(f"error: {problem}", 1)
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
    except BrokenPipeError:
        # The reader of our output has gone (featcache … | head).
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            return _complain("error: standard output: cannot be written: the disk is full", 1)
        if not ran_out_of_memory(error):
            raise
        return _complain(f"error: not enough memory{_smaller(arguments[0])}", 1)


def _smaller(name: str) -> str:
    """Return the options of a command that make it need less memory, as advice."""
    from .options import parser

    command = getattr(parser(name), "commands", {}).get(name)
    has = {option for one in getattr(command, "params", ()) for option in one.opts}
    less = [f"a smaller {one}" for one in ("--batch-size", "--size") if one in has]
    less += ["--mmap"] * ("--mmap" in has)
    return f"; use {' or '.join(less)}" if less else "; close other programs, or use fewer images"


def _run(arguments: list[str], rank: int | None) -> int:
    import typer

    from ..errors import DivergedError, FeatcacheError, RecipeError
    from ..process import had_ctrl_c
    from .commands import app  # noqa: F401
    from .options import parser
    from .usage import unknown_command, usage_message

    command = parser(arguments[0])
    if "_FEATCACHE_COMPLETE" in os.environ:
        command.main(prog_name=_NAME)
    # Typer does not export the base class of its usage errors.
    usage_error: type[Exception] = typer.BadParameter.__mro__[1]
    commands = getattr(command, "commands", {})
    topic = [_NAME, *(word for word in arguments[:1] if word in commands), "--help"]
    try:
        if not topic[2:] and arguments[0][:1] not in ("", "-"):
            raise typer.BadParameter(unknown_command(arguments[0], commands))
        with command.make_context(_NAME, list(arguments)) as context:
            command.invoke(context)
    except typer.Exit as stop:
        return stop.exit_code
    except FeatcacheError as error:
        if had_ctrl_c():
            raise KeyboardInterrupt from None
        line = f"error: rank {rank}: {error}" if rank else f"error: {error}"
        is_argument = isinstance(error, RecipeError) and not isinstance(error, DivergedError)
        return _complain(line, 2 if is_argument else 1)
    except usage_error as error:
        if rank:
            return 2  # the first process says so
        return _complain(f"error: {usage_message(error)} (see {' '.join(topic)})", 2)
    except Exception:
        if had_ctrl_c():
            raise KeyboardInterrupt from None
        raise
    return 0


def _open_streams() -> None:
    """Open streams that the caller closed, and let any file name be printed."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _complain(message: str, code: int) -> int:
    from ..errors import visible

    print(visible(" ".join(message.splitlines())), file=sys.stderr)
    return code
