"""Pickles read as descriptions: nothing in them is imported, called or changed, whatever they ask for.

The interpreter knows the instructions by which plain values and named calls are written. A global is looked
up by the caller, who alone decides what a call of it returns; other objects cannot be called, and no object's
state can be set. Memory: the pickle, and values in proportion to it.
"""

from __future__ import annotations

import dataclasses
import pickle
import struct
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True, eq=False)
class Global:
    """A name that a pickle may mention.

    Attributes:
        name: with its module.
        call: returns the value of a call of it; None for a name that is only mentioned.
    """

    name: str
    call: Callable[..., Any] | None = None


def load_inert(
    data: bytes, find_global: Callable[[str, str], Global], find_reference: Callable[[Any], Any]
) -> Any:
    """Return the value that a pickle describes.

    Args:
        data: the pickle; what follows it is ignored.
        find_global: returns the global of a module and a name, or raises an error.
        find_reference: returns the object that a persistent id means, or raises an error.

    Raises:
        ValueError, IndexError, KeyError, TypeError, struct.error: the pickle is damaged, or has an
            instruction that is not among those that describe.
    """
    return _Machine(data, find_global, find_reference).run()


class _Machine:
    """The stack machine that a pickle is a program of, as in the standard library's `pickletools`."""

    def __init__(
        self, data: bytes, find_global: Callable[[str, str], Global], find_reference: Callable[[Any], Any]
    ):
        self.data, self.position = data, 0
        self.find_global, self.find_reference = find_global, find_reference
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks that marks have put aside
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        while (code := self.take(1)) != pickle.STOP:
            if (instruction := _INSTRUCTIONS.get(code)) is None:
                raise ValueError(
                    f"instruction {code!r} at byte {self.position - 1}, which weights do not need"
                )
            instruction(self)
        return self.stack.pop()

    def take(self, count: int) -> bytes:
        """Return the next bytes."""
        begin, self.position = self.position, self.position + count
        if self.position > len(self.data):
            raise ValueError(f"expected {count} bytes at byte {begin}, found {len(self.data) - begin}")
        return self.data[begin : self.position]

    def number(self, form: str) -> int:
        """Return the next number, in a format of `struct`."""
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def line(self) -> str:
        """Return the next line."""
        end = self.data.index(b"\n", self.position)
        return self.take(end + 1 - self.position)[:-1].decode()

    def text(self, form: str) -> str:
        """Return a text behind its length."""
        return self.take(self.number(form)).decode("utf-8", "surrogatepass")

    def skip(self, count: int) -> None:
        self.take(count)

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def mark(self) -> None:
        self.below.append(self.stack)
        self.stack = []

    def marked(self) -> list[Any]:
        """Return the values since the last mark, and drop the mark."""
        values, self.stack = self.stack, self.below.pop()
        return values

    def tuple_of(self, count: int) -> None:
        if len(self.stack) < count:
            raise IndexError("a tuple of more values than there are")
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def append(self, values: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise TypeError(f"values are appended to {type(self.stack[-1]).__name__}")
        self.stack[-1].extend(values)

    def set_items(self, values: list[Any]) -> None:
        if not isinstance(self.stack[-1], dict):
            raise TypeError(f"items are set in {type(self.stack[-1]).__name__}")
        for key, value in zip(values[::2], values[1::2], strict=True):
            # The hash of nested tuples may take forever.
            if type(key) not in (str, int):
                raise TypeError(f"a key of type {type(key).__name__}")
            self.stack[-1][key] = value

    def set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items([key, value])

    def put_global(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise TypeError("a global whose name is no text")
        self.stack.append(self.find_global(module, name))

    def stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.put_global(module, name)

    def call(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if type(function) is not Global or function.call is None or type(arguments) is not tuple:
            raise TypeError("a call of something that cannot be called")
        self.stack.append(function.call(*arguments))

    def drop_state(self) -> None:
        """Ignore the attributes of a dict, where torch notes versions of its modules."""
        self.stack.pop()
        if not isinstance(self.stack[-1], dict):
            raise TypeError(f"state is set of {type(self.stack[-1]).__name__}")

    def reference(self) -> None:
        self.stack.append(self.find_reference(self.stack.pop()))

    def memoize(self, index: int) -> None:
        self.memo[index] = self.stack[-1]


def _pushing(value: Callable[[_Machine], Any]) -> Callable[[_Machine], None]:
    return lambda machine: machine.push(value(machine))


_INSTRUCTIONS: dict[bytes, Callable[[_Machine], None]] = {
    pickle.PROTO: lambda m: m.skip(1),
    pickle.FRAME: lambda m: m.skip(8),
    pickle.MARK: _Machine.mark,
    pickle.NONE: _pushing(lambda m: None),
    pickle.NEWTRUE: _pushing(lambda m: True),
    pickle.NEWFALSE: _pushing(lambda m: False),
    pickle.BININT: _pushing(lambda m: m.number("<i")),
    pickle.BININT1: _pushing(lambda m: m.number("B")),
    pickle.BININT2: _pushing(lambda m: m.number("<H")),
    pickle.LONG1: _pushing(lambda m: int.from_bytes(m.take(m.number("B")), "little", signed=True)),
    pickle.BINFLOAT: _pushing(lambda m: m.number(">d")),
    pickle.BINUNICODE: _pushing(lambda m: m.text("<I")),
    pickle.SHORT_BINUNICODE: _pushing(lambda m: m.text("B")),
    pickle.BINUNICODE8: _pushing(lambda m: m.text("<Q")),
    pickle.BINBYTES: _pushing(lambda m: m.take(m.number("<I"))),
    pickle.SHORT_BINBYTES: _pushing(lambda m: m.take(m.number("B"))),
    pickle.EMPTY_LIST: _pushing(lambda m: []),
    pickle.EMPTY_DICT: _pushing(lambda m: {}),
    pickle.EMPTY_TUPLE: _pushing(lambda m: ()),
    pickle.TUPLE: lambda m: m.push(tuple(m.marked())),
    pickle.TUPLE1: lambda m: m.tuple_of(1),
    pickle.TUPLE2: lambda m: m.tuple_of(2),
    pickle.TUPLE3: lambda m: m.tuple_of(3),
    pickle.APPEND: lambda m: m.append([m.stack.pop()]),
    pickle.APPENDS: lambda m: m.append(m.marked()),
    pickle.SETITEM: _Machine.set_item,
    pickle.SETITEMS: lambda m: m.set_items(m.marked()),
    pickle.BINGET: _pushing(lambda m: m.memo[m.number("B")]),
    pickle.LONG_BINGET: _pushing(lambda m: m.memo[m.number("<I")]),
    pickle.BINPUT: lambda m: m.memoize(m.number("B")),
    pickle.LONG_BINPUT: lambda m: m.memoize(m.number("<I")),
    pickle.MEMOIZE: lambda m: m.memoize(len(m.memo)),
    pickle.GLOBAL: lambda m: m.put_global(m.line(), m.line()),
    pickle.STACK_GLOBAL: _Machine.stack_global,
    pickle.REDUCE: _Machine.call,
    pickle.BUILD: _Machine.drop_state,
    pickle.BINPERSID: _Machine.reference,
}
