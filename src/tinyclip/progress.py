"""How far long work is: the library tells it, and the command line listens. To Python alone nothing is shown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
Listener = Callable[[str, int, int | None, str], None]  # the arguments of `tell`
_listeners: list[Listener] = []


def tell(what: str, done: int, total: int | None = None, unit: str = "") -> None:
    """Say how far work is. It ends when `done` reaches `total`; then `what` may begin anew.

    Args:
        what: the work, as `calibrating`.
        total: None where it is not known.
        unit: of both numbers, as `batches`.
    """
    if _listeners:
        _listeners[-1](what, done, total, unit)


def tell_bytes(what: str, done: int, total: int | None) -> None:
    """`tell` in MB."""
    tell(what, done // 10**6, None if total is None else max(1, total // 10**6) if done < total else done // 10**6, "MB")


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Let a listener hear what is told inside, in place of the one outside."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def track(items: Iterable[T], what: str, total: int | None = None, unit: str = "") -> Iterator[T]:
    """The items, told one by one as they are taken and worked on."""
    done = 0
    try:
        for item in items:
            tell(what, done, total, unit)
            yield item
            done += 1
    finally:
        tell(what, done, done, unit)


@contextmanager
def busy(what: str) -> Iterator[None]:
    """Work without parts that could be counted."""
    tell(what, 0)
    try:
        yield
    finally:
        tell(what, 1, 1)
