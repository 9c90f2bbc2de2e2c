"""Read a pickle without running it.

A pickle is a program for a small stack machine, and Python's own machine may
import any module and call whatever it finds there. The machine here cannot: it
knows only the instructions with which PyTorch and OneFlow write tensors down,
and none of them imports. A name such as ``torch.FloatStorage`` is kept as text.
Where the program wants a name called, the reader of the format says which
harmless function of ours stands for it; a name it did not foresee is an error.

The machine also bounds what a program can cost. Dictionary keys are text or
whole numbers (a deeply nested tuple as a key, in a pickle of 200 KB, overflows
the C stack of Python's own reader and kills the process), every length is
checked against the bytes that are there, and a program of more than
`MAX_PROGRAM_BYTES` is not begun.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from ..errors import WeightsError
from .tensors import quote

# A ResNet-50's is 35 KB, with its optimizer's state under 200 KB.
MAX_PROGRAM_BYTES = 1 << 20

# Instructions whose argument is the value.
_NUMBERS = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT")
_TEXTS = ("BINUNICODE", "SHORT_BINUNICODE", "BINSTRING", "SHORT_BINSTRING")  # two are Python 2's
_CONSTANTS: Mapping[str, Callable[[], object]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
}
# What a program that makes no sense ends in, here or in a function that stands for a name.
_DAMAGE = (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError)
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclass(frozen=True)
class Name:
    """A class or function that a pickle mentions: its name, and nothing behind it."""

    text: str


@dataclass
class Record:
    """An object that a pickle describes: its class's name and its state as plain data."""

    name: str
    state: object = None


# What a name stands for when it is called; None where it may only be mentioned or described.
Names = Mapping[str, Callable[..., object] | None]


def ordered_dict(pairs: Iterable[Any] = ()) -> dict[Any, object]:
    """Stand for ``collections.OrderedDict``, which Python 2 pickled with its items."""
    items: dict[Any, object] = {}
    for key, value in pairs:
        _set_item(items, key, value)
    return items


def read_pickle(
    data: bytes,
    start: int,
    source: str,
    names: Names,
    persistent: Callable[[Any], object] | None = None,
) -> tuple[Any, int]:
    """Read the pickle that begins at ``start``.

    Parameters
    ----------
    data : bytes
        A file's bytes; others may follow the pickle.
    start : int
        Where in ``data`` it begins.
    source : str
        Path or name, for the message.
    names : mapping of str to callable or None
        Every name that may occur; a callable gets the arguments of a call,
        which come from the file: it must check them.
    persistent : callable, optional
        Turns a reference to data outside of the pickle into an object.

    Returns
    -------
    loaded : object
        Dictionaries, lists, tuples, text, numbers, `Name`, `Record`, and what
        the callables returned.
    end : int
        Where in ``data`` it ends.

    Raises
    ------
    WeightsError
        A name that was not foreseen, or a damaged pickle.
    """
    file = io.BytesIO(data[start : start + MAX_PROGRAM_BYTES])
    machine = _Machine(source, names, persistent)
    try:
        return machine.run(file), start + file.tell()
    except _DAMAGE as failure:
        raise WeightsError(
            f"{source}: expected a checkpoint's table of tensors, found a damaged one "
            f"({quote(failure)}); nothing was executed; get the file again"
        ) from failure


class _Machine:
    """A stack, its marks, and a memo: all the state that a pickle has."""

    def __init__(
        self, source: str, names: Names, persistent: Callable[[Any], object] | None
    ) -> None:
        self.source = source
        self.names = names
        self.persistent = persistent
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, file: io.BytesIO) -> object:
        """Take one instruction after the other, until STOP."""
        push, pop, memo = self.stack.append, self.stack.pop, self.memo
        argument: Any
        for opcode, argument, _ in pickletools.genops(file):
            instruction = opcode.name
            if instruction in _NUMBERS or instruction in _TEXTS:
                push(argument)
            elif instruction in _CONSTANTS:
                push(_CONSTANTS[instruction]())
            elif instruction in _TUPLES:
                push(tuple(self.cut(len(self.stack) - _TUPLES[instruction])))
            else:
                match instruction:
                    case "STOP":
                        return pop()
                    case "PROTO" | "FRAME":  # how to read on: genops has taken care of it
                        pass
                    case "MARK":
                        self.marks.append(len(self.stack))
                    case "TUPLE":
                        push(tuple(self.cut(self.marks.pop())))
                    case "BINPUT" | "LONG_BINPUT":
                        memo[argument] = self.stack[-1]
                    case "MEMOIZE":
                        memo[len(memo)] = self.stack[-1]
                    case "BINGET" | "LONG_BINGET":
                        push(memo[argument])
                    case "APPEND" | "APPENDS":
                        self.append(self.values(instruction == "APPENDS", 1))
                    case "SETITEM" | "SETITEMS":
                        self.set_items(self.values(instruction == "SETITEMS", 2))
                    case "GLOBAL":
                        push(self.name(*argument.split(" ", 1)))
                    case "STACK_GLOBAL":
                        push(self.name(*self.cut(len(self.stack) - 2)))
                    case "REDUCE":
                        push(self.call(*self.cut(len(self.stack) - 2)))
                    case "NEWOBJ":
                        push(self.describe(*self.cut(len(self.stack) - 2)))
                    case "BUILD":
                        self.build(pop())
                    case "BINPERSID" if self.persistent:
                        push(self.persistent(pop()))
                    case _:
                        self.refuse(f"instruction {instruction}")
        raise ValueError("it ends early")

    def refuse(self, what: str) -> NoReturn:
        """Stop at what no tensor needs, and what Python's machine might have run."""
        raise WeightsError(
            f"{self.source}: expected tensors alone, found the {what}; nothing was executed; "
            "save the state dict alone, best as .safetensors"
        )

    def cut(self, start: int) -> list[Any]:
        """Take everything from ``start`` upwards off the stack."""
        if start < 0:
            raise ValueError("it takes from an empty stack")
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def values(self, many: bool, count: int) -> list[Any]:
        """Take the items for a container: all above the mark, or ``count`` of them."""
        return self.cut(self.marks.pop() if many else len(self.stack) - count)

    def append(self, values: list[Any]) -> None:
        """Extend the list on top of the stack."""
        if not isinstance(self.stack[-1], list):
            raise TypeError("it appends to what is no list")
        self.stack[-1].extend(values)

    def set_items(self, values: list[Any]) -> None:
        """Fill the dictionary on top of the stack with alternating keys and values."""
        if not isinstance(self.stack[-1], dict):
            raise TypeError("it sets items of what is no dictionary")
        for key, value in zip(values[::2], values[1::2], strict=True):
            _set_item(self.stack[-1], key, value)

    def name(self, module: object, attribute: object) -> Name:
        """Stand for a class or function, if the format has it."""
        if not isinstance(module, str) or not isinstance(attribute, str):
            raise TypeError("it names something with what is no text")
        text = f"{module}.{attribute}"
        if text not in self.names:
            self.refuse(f"name '{quote(text)}'")
        return Name(text)

    def call(self, function: object, arguments: object) -> object:
        """Let our own function stand for the one that the pickle wants called."""
        ours = self.names.get(function.text) if isinstance(function, Name) else None
        if ours is None or not isinstance(arguments, tuple):
            what = repr(function.text) if isinstance(function, Name) else type(function).__name__
            self.refuse(f"call of {what}")
        return ours(*arguments)

    def describe(self, of: object, arguments: object) -> Record:
        """Stand for an instance of a class, to be filled by BUILD."""
        if not isinstance(of, Name) or arguments != ():
            raise TypeError("it makes an object of what is no class")
        return Record(of.text)

    def build(self, state: object) -> None:
        """Give a record its state; an OrderedDict's attributes are of no use here."""
        target = self.stack[-1]
        if isinstance(target, Record):
            target.state = state
        elif not isinstance(target, dict):
            raise TypeError("it gives a state to what has none")


def _set_item(items: dict[Any, object], key: object, value: object) -> None:
    if not isinstance(key, (str, int)):
        raise TypeError(f"a key is a {type(key).__name__}")
    items[key] = value
