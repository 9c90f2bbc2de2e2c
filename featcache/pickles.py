"""Read a pickle without running it: checkpoints, and the batches of CIFAR-10.

A pickle is a program for a small stack machine, and Python's own machine imports any module
that the program names and calls what it finds there. The machine here has no instruction that
imports or calls: a name such as ``torch.FloatStorage`` stays text, and where the program asks
for a call, the file format says which harmless function of ours runs instead.

The cost of a program is bounded too. Dictionary keys are text or whole numbers (a deeply nested
tuple as a key overflows the C stack of Python's reader), every length is checked against the
bytes that are there, and a program has at most `PickleFormat.max_bytes` bytes.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from .errors import FeatcacheError, one_line

# Instructions whose argument is the value. Two of the texts are Python 2's.
_NUMBERS = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT")
_TEXTS = ("BINUNICODE", "SHORT_BINUNICODE", "BINSTRING", "SHORT_BINSTRING")
_BYTES = ("BINBYTES", "SHORT_BINBYTES", "BINBYTES8")
_VALUES = frozenset((*_NUMBERS, *_TEXTS, *_BYTES))
_CONSTANTS: Mapping[str, Callable[[], object]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
# What an invalid program raises, in the machine or in a function that stands for a name.
_DAMAGE = (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError)


@dataclass(frozen=True)
class Name:
    """A class or function that a pickle mentions: its name, and nothing behind it."""

    text: str


@dataclass
class Record:
    """An object that a pickle describes: its class's name and its state as plain data."""

    name: str
    state: object = None


# What runs in place of a name that is called; None where it may only be mentioned.
Names = Mapping[str, Callable[..., object] | None]


@dataclass(frozen=True)
class PickleFormat:
    """What a pickle of one kind of file may hold, and how to report one that does not.

    ``names`` are all the names that may occur; their functions get arguments from the file, which
    they must check. ``content`` and ``advice`` go into the message of ``error``.
    """

    names: Names
    error: type[FeatcacheError]
    content: str
    advice: str
    max_bytes: int


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
    kind: PickleFormat,
    persistent: Callable[[Any], object] | None = None,
) -> tuple[Any, int]:
    """Read the pickle that begins at ``start``; return its content, and where it ends.

    The content is dictionaries, lists, tuples, text, bytes, numbers, `Name`, `Record` and what the
    functions of the format returned. ``persistent`` turns a reference to data outside of the
    pickle into an object. Anything else raises the format's error.
    """
    file = io.BytesIO(data[start : start + kind.max_bytes])
    machine = _Machine(source, kind, persistent)
    try:
        return machine.run(file), start + file.tell()
    except _DAMAGE as failure:
        raise kind.error(
            f"{source}: expected {kind.content}, found a damaged pickle ({one_line(failure)}); "
            "nothing was executed; get the file again"
        ) from failure


class _Machine:
    """A stack, its marks, and a memo: all the state that a pickle has."""

    def __init__(
        self, source: str, kind: PickleFormat, persistent: Callable[[Any], object] | None
    ) -> None:
        self.source = source
        self.kind = kind
        self.persistent = persistent
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, file: io.BytesIO) -> object:
        """Execute one instruction after the other, until STOP."""
        push, pop, memo = self.stack.append, self.stack.pop, self.memo
        argument: Any
        for opcode, argument, _ in pickletools.genops(file):
            instruction = opcode.name
            if instruction in _VALUES:
                push(argument)
            elif instruction in _CONSTANTS:
                push(_CONSTANTS[instruction]())
            elif instruction in _TUPLES:
                push(tuple(self.cut(len(self.stack) - _TUPLES[instruction])))
            else:
                match instruction:
                    case "STOP":
                        return pop()
                    case "PROTO" | "FRAME":  # genops has handled these
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
        """Stop at what the format does not need, and what Python's machine might have run."""
        raise self.kind.error(
            f"{self.source}: expected {self.kind.content} alone, found the {what}; nothing was "
            f"executed; {self.kind.advice}"
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
        if text not in self.kind.names:
            self.refuse(f"name '{one_line(text)}'")
        return Name(text)

    def call(self, function: object, arguments: object) -> object:
        """Run our own function in place of the one that the pickle asks for."""
        ours = self.kind.names.get(function.text) if isinstance(function, Name) else None
        if ours is None or not isinstance(arguments, tuple):
            what = repr(function.text) if isinstance(function, Name) else type(function).__name__
            self.refuse(f"call of {what}")
        return ours(*arguments)

    def describe(self, of: object, arguments: object) -> Record:
        """Stand for an instance of a class; BUILD fills it."""
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
    if type(key) is bytes:
        key = key.decode("latin-1")
    if not isinstance(key, (str, int)):
        raise TypeError(f"a key is a {type(key).__name__}")
    items[key] = value


def _array_record(*_: object) -> Record:
    return Record("numpy.ndarray")


def _dtype_record(code: object, *_: object) -> Record:
    return Record(f"numpy.dtype {code}")


def _encoded(text: Any, encoding: object = "latin1") -> bytes:
    """Stand for ``_codecs.encode``, by which protocol 2 of Python 3 writes bytes."""
    if encoding not in ("latin1", "latin-1"):
        raise ValueError("bytes in an unknown encoding")
    return bytes(text.encode("latin-1"))


# How a pickle describes a NumPy array, by NumPy 1 and 2; `uint8_array` reads the result.
NUMPY_NAMES: Names = {
    "numpy.core.multiarray._reconstruct": _array_record,
    "numpy._core.multiarray._reconstruct": _array_record,
    "numpy.ndarray": None,
    "numpy.dtype": _dtype_record,
    "_codecs.encode": _encoded,
}


def uint8_array(described: object) -> np.ndarray:
    """Return the uint8 array that a record describes; anything else is a `ValueError`."""
    state = described.state if isinstance(described, Record) else None
    if not isinstance(state, tuple) or len(state) != 5:
        raise ValueError("expected an array")
    _version, shape, dtype, fortran, data = state
    if not isinstance(dtype, Record) or dtype.name != "numpy.dtype u1" or fortran is not False:
        raise ValueError("expected an array of uint8 in C order")
    if isinstance(data, str):  # Python 2's bytes, which genops reads as latin-1
        data = data.encode("latin-1")
    if not isinstance(data, bytes) or not isinstance(shape, tuple):
        raise ValueError("expected an array's bytes and shape")
    return np.frombuffer(data, np.uint8).reshape(shape)
