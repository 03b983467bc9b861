"""Runs in separate processes, which tests stop and kill."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing

from tests.helpers.runs import weights
from tests.train.test_loop import _events as events_of
from tinyclip.common.distributed import processes
from tinyclip.recipe.recipe import Recipe
from tinyclip.train import loop
from tinyclip.zoo.resolve import MANIFEST

SERVER = multiprocessing.get_context("forkserver")  # it imports everything once, so that processes start instantly
SERVER.set_forkserver_preload(["tests.helpers.warm"])
PATIENCE = 120  # seconds


def work(settings: dict[str, Any], index: int, count: int, port: int, prepare: Callable[[int], None] | None) -> None:
    """Run one process of a run, from the start or its last checkpoint; first call `prepare` with the process's
    number."""
    os.environ |= {"RANK": str(index), "LOCAL_RANK": str(index), "WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    chosen = Recipe.model_validate(settings)
    folder = Path(chosen.output)
    sys.stderr = (folder.parent / f"{folder.name}-{index}.err").open("w")
    if prepare is not None:
        prepare(index)
    try:
        with processes():
            loop.run(loop.start(chosen, resume=(folder / "recipe.yaml").exists()))
    except ValueError as error:
        print(error, file=sys.stderr, flush=True)
        sys.exit(2)


def begin(chosen: Recipe, count: int = 1, prepare: Callable[[int], None] | None = None) -> list[Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = chosen.model_dump(mode="json")
    begun = [SERVER.Process(target=work, args=(settings, i, count, port, prepare)) for i in range(count)]
    for process in begun:
        process.start()
    return begun


def together(task: Callable[..., None], arguments: tuple[Any, ...], count: int) -> None:
    """Call `task(index, *arguments)` in processes of the server; a failure is raised here."""
    torch.multiprocessing.start_processes(task, arguments, count, start_method="forkserver")


def end(begun: list[Any]) -> list[int]:
    """Return the exit codes."""
    for process in begun:
        process.join(PATIENCE)
        assert not process.is_alive()
    return [process.exitcode for process in begun]


def kill(begun: list[Any]) -> None:
    for process in begun:
        process.kill()
    end(begun)


def until(happened: Callable[[], bool], begun: list[Any]) -> None:
    """Poll until a condition holds, as long as the processes live."""
    deadline = time.monotonic() + PATIENCE
    while not happened() and all(process.is_alive() for process in begun):
        assert time.monotonic() < deadline


def last_step(folder: Path) -> int:
    try:
        return max((e["step"] for e in events_of(folder) if e["event"] == "step"), default=0)
    except (OSError, ValueError):
        return 0


def assert_same(one: Path, two: Path) -> None:
    """Assert the same student, and that every step, evaluation and cut is reported once."""
    first, second = weights(one / "student"), weights(two / "student")
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    told = [[(e["stage"], e["step"], e["loss"]) for e in events_of(f) if e["event"] == "step"] for f in (one, two)]
    assert told[0] == told[1]
    rare = [[e for e in events_of(f) if e["event"] in ("evaluation", "cut")] for f in (one, two)]
    assert rare[0] == rare[1]
    assert not [p for p in two.rglob("*") if p.suffix in (".tmp", ".old") or "step-" in p.name or p.name == MANIFEST]
