"""Read other people's pickles as plain data: nothing is imported, nothing is called.

The standard library's `pickletools` parses the opcodes without running anything; this module applies them to plain
values. Whatever a pickle names (classes, functions, their instances and results) becomes an `Inert`.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

OPCODES = 20_000_000  # a large model's training file has a few hundred thousand; a pickle bomb may have any number
# Opcodes whose argument is the value itself.
VALUES = {
    code.name
    for code in pickletools.opcodes
    if code.arg is not None and [kind.name for kind in code.stack_after] not in ([], ["any"])
}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple}
IGNORED = ("PROTO", "FRAME")
RECONSTRUCTORS = ("copyreg._reconstructor", "copy_reg._reconstructor", "copyreg.__newobj__")


class Damaged(Exception):
    """Not a pickle, or an inconsistent one; the message says how."""


@dataclass(eq=False, slots=True)
class Inert:
    """Placeholder for something a pickle names: a class or function, or (with `arguments`) the result of calling it.
    `state`, `items` and `values` are what the pickle would have put into that result."""

    name: str
    arguments: tuple[Any, ...] | None = None
    state: Any = None
    items: dict[Any, Any] | None = None
    values: list[Any] | None = None


def printable(text: str) -> str:
    """Return a name from a file, safe for a one-line message: truncated, with no terminal control characters."""
    return "".join(c if c.isprintable() else "?" for c in text[:200])


Builders = Mapping[str, Callable[..., Any]]


def unpickle(source: BinaryIO, builders: Builders, persistent: Callable[[Any], Any]) -> Any:
    """Return the value of the pickle at the file's current position, and leave the position after its end.

    Args:
        builders: functions to call for these names (`module.name`) instead of creating an `Inert`.
        persistent: function that resolves a persistent id.

    Raises:
        Damaged: if the pickle is incomplete or invalid.
    """
    machine = _Machine(builders, persistent)
    count, begun = 0, False
    try:
        for opcode, argument, _ in pickletools.genops(source):
            count, begun = count + 1, begun or opcode.name == "PROTO"  # PyTorch's pickles all begin with it
            if opcode.name == "STOP":
                return machine.stack.pop()
            if count > OPCODES:
                raise Damaged(f"a pickle of more than {OPCODES:,} steps")
            machine.step(opcode.name, argument)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, UnicodeError) as error:
        raise Damaged(f"not a complete pickle: {type(error).__name__}" if begun else "not a pickle") from None
    raise Damaged("not a complete pickle")


class _Machine:
    """The stack, marks and memo of the pickle format."""

    def __init__(self, builders: Builders, persistent: Callable[[Any], Any]) -> None:
        self.stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._builders, self._persistent = builders, persistent

    def step(self, name: str, argument: Any) -> None:
        if name in VALUES:
            self.stack.append(argument)
        elif name in CONSTANTS:
            self.stack.append(CONSTANTS[name])
        elif name in EMPTY:
            self.stack.append(EMPTY[name]())
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            self.stack.append(self._memo[argument])
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            self._memo[argument] = self.stack[-1]
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = self.stack[-1]
        elif name not in IGNORED:
            step = getattr(self, f"_{name.lower()}", None)
            if step is None:
                raise Damaged(f"it asks for {name}, which weights files do not contain")
            step() if argument is None else step(argument)

    def _pop_mark(self) -> list[Any]:
        mark = self._marks.pop()
        items = self.stack[mark:]
        del self.stack[mark:]
        return items

    def _top(self, count: int) -> list[Any]:
        """Pop the topmost values."""
        if len(self.stack) < count:
            raise Damaged("not a complete pickle")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def _mark(self) -> None:
        self._marks.append(len(self.stack))

    def _pop(self) -> None:
        if self._marks and self._marks[-1] == len(self.stack):
            self._marks.pop()
        else:
            self.stack.pop()

    def _dup(self) -> None:
        self.stack.append(self.stack[-1])

    # --- containers

    def _tuple(self) -> None:
        self.stack.append(tuple(self._pop_mark()))

    def _tuple1(self) -> None:
        self.stack.append(tuple(self._top(1)))

    def _tuple2(self) -> None:
        self.stack.append(tuple(self._top(2)))

    def _tuple3(self) -> None:
        self.stack.append(tuple(self._top(3)))

    def _list(self) -> None:
        self.stack.append(self._pop_mark())

    def _dict(self) -> None:
        self.stack.append(_pairs(self._pop_mark()))

    def _empty_set(self) -> None:  # never hash the members: that may take forever, or recurse without end
        self.stack.append(Inert("builtins.set", ()))

    def _frozenset(self) -> None:
        self.stack.append(Inert("builtins.frozenset", (), values=self._pop_mark()))

    def _append(self) -> None:
        self._extend(self._top(1))

    def _appends(self) -> None:
        self._extend(self._pop_mark())

    _additems = _appends

    def _extend(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target += values
        elif isinstance(target, Inert):
            if target.values is None:
                target.values = []
            target.values += values

    def _setitem(self) -> None:
        self._update(_pairs(self._top(2)))

    def _setitems(self) -> None:
        self._update(_pairs(self._pop_mark()))

    def _update(self, items: dict[Any, Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, dict):
            target.update(items)
        elif isinstance(target, Inert):
            if target.items is None:
                target.items = {}
            target.items.update(items)

    # --- names and calls

    def _global(self, name: str) -> None:
        self.stack.append(Inert(printable(name.replace(" ", ".", 1))))

    def _stack_global(self) -> None:
        module, name = self._top(2)
        if not (isinstance(module, str) and isinstance(name, str)):
            raise Damaged("a name in it is not text")
        self.stack.append(Inert(printable(f"{module}.{name}")))

    def _ext1(self, code: int) -> None:
        self.stack.append(Inert(f"extension {code}"))

    _ext2 = _ext4 = _ext1

    def _persid(self, pid: str) -> None:
        self.stack.append(self._persistent(pid))

    def _binpersid(self) -> None:
        self.stack.append(self._persistent(self.stack.pop()))

    def _reduce(self) -> None:
        self._call(*self._top(2))

    _newobj = _reduce

    def _newobj_ex(self) -> None:
        kind, arguments, _ = self._top(3)
        self._call(kind, arguments)

    def _obj(self) -> None:
        kind, *arguments = self._pop_mark()
        self._call(kind, tuple(arguments))

    def _inst(self, name: str) -> None:
        self._call(Inert(printable(name.replace(" ", ".", 1))), tuple(self._pop_mark()))

    def _call(self, named: Any, arguments: Any) -> None:
        """Push the result of one of our builders, or else an `Inert` for the result of the call."""
        arguments = arguments if isinstance(arguments, tuple) else (arguments,)
        name = named.name if isinstance(named, Inert) else type(named).__name__
        if isinstance(named, Inert) and named.arguments is None and name in self._builders:
            self.stack.append(self._builders[name](*arguments))
            return
        if name in RECONSTRUCTORS and arguments and isinstance(arguments[0], Inert):
            name = arguments[0].name
        self.stack.append(Inert(name, arguments))

    def _build(self) -> None:
        (state,) = self._top(1)
        target = self.stack[-1]
        if isinstance(target, Inert):
            target.state = state


def _pairs(values: list[Any]) -> dict[Any, Any]:
    """Build a dictionary from alternating keys and values. A key that is not a plain value is replaced by an object,
    because hashing a tuple may recurse without end."""
    keys = [key if isinstance(key, str | int | float | bytes | None) else object() for key in values[::2]]
    return dict(zip(keys, values[1::2], strict=True))
