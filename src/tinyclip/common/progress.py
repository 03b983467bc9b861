"""How far long work is: the library tells it, and the command line listens. To Python alone nothing is shown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
Listener = Callable[[str, int, int | None, str], None]  # the arguments of `tell`
_listeners: list[Listener] = []


def heard() -> bool:
    """Whether anybody listens, where there is something to be found out first."""
    return bool(_listeners)


def tell(what: str, done: int, total: int | None = None, unit: str = "") -> None:
    """Say how far work is. It ends when `done` reaches `total`; then `what` may begin anew.

    Args:
        what: the work, as `calibrating`.
        total: None where it is not known.
        unit: of both numbers, as `batches`.
    """
    if _listeners:
        _listeners[-1](what, done, total, unit)


def ended(what: str) -> None:
    """Say that work is over."""
    tell(what, 1, 1)


def tell_bytes(what: str, done: int, total: int | None) -> None:
    """`tell` in MB."""
    ended = total is not None and done >= total
    tell(what, done // 10**6, done // 10**6 if ended else None if total is None else 1 + total // 10**6, "MB")


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
        ended(what)


@dataclass
class Counted(Iterator[T]):
    """Items, with the number of those that were taken."""

    items: Iterator[T]
    count: int = 0

    def __next__(self) -> T:
        item = next(self.items)
        self.count += 1
        return item


def counter(what: str, total: int, unit: str = "") -> Callable[[], None]:
    """What is to be called after every one of so many."""
    done = 0

    def one() -> None:
        nonlocal done
        done += 1
        tell(what, done, total, unit)

    return one


@contextmanager
def busy(what: str) -> Iterator[None]:
    """Work without parts that could be counted."""
    tell(what, 0)
    try:
        yield
    finally:
        ended(what)
