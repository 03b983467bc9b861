"""Progress of long work: the library reports it and the command line listens. Plain Python use shows nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
Listener = Callable[[str, int, int | None, str], None]  # the arguments of `tell`
_listeners: list[Listener] = []


def heard() -> bool:
    """Whether anyone is listening; check before computing something just for the report."""
    return bool(_listeners)


def tell(what: str, done: int, total: int | None = None, unit: str = "") -> None:
    """Report progress. The work ends when `done` reaches `total`; `what` may then start again.

    Args:
        what: the work, e.g. `calibrating`.
        total: None if unknown.
        unit: of both numbers, e.g. `batches`.
    """
    if _listeners:
        _listeners[-1](what, done, total, unit)


def ended(what: str) -> None:
    """Report that work is over."""
    tell(what, 1, 1)


def tell_bytes(what: str, done: int, total: int | None) -> None:
    """`tell` in MB."""
    ended = total is not None and done >= total
    tell(what, done // 10**6, done // 10**6 if ended else None if total is None else 1 + total // 10**6, "MB")


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Send the progress reported inside to a listener, in place of the outer one."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def track(items: Iterable[T], what: str, total: int | None = None, unit: str = "") -> Iterator[T]:
    """Yield the items and report progress after each."""
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
    """An iterator that counts the items taken from it."""

    items: Iterator[T]
    count: int = 0

    def __next__(self) -> T:
        item = next(self.items)
        self.count += 1
        return item


def counter(what: str, total: int, unit: str = "") -> Callable[[], None]:
    """Return a function to call after each of `total` items."""
    done = 0

    def one() -> None:
        nonlocal done
        done += 1
        tell(what, done, total, unit)

    return one


@contextmanager
def busy(what: str) -> Iterator[None]:
    """Report work that has no countable parts."""
    tell(what, 0)
    try:
        yield
    finally:
        ended(what)
