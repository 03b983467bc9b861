"""Runs in separate processes, which tests stop and kill."""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, AnyStr

import torch
import torch.multiprocessing

from tests.helpers.runs import events_of, weights
from tinyclip.common.distributed import processes
from tinyclip.recipe.recipe import Recipe
from tinyclip.train import loop
from tinyclip.zoo.resolve import MANIFEST

SERVER = multiprocessing.get_context("forkserver")  # it imports everything once, so that processes start instantly
SERVER.set_forkserver_preload(["tests.helpers.warm"])
PATIENCE = 300  # seconds, before a test fails: a busy machine is slow


def start(task: Callable[..., None], count: int, *arguments: Any) -> list[Any]:
    """Start processes of the server that call `task(*arguments)`, with torchrun's environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    begun = [
        SERVER.Process(target=_one, args=(shared | {"RANK": i, "LOCAL_RANK": i}, task, *arguments))
        for i in range(count)
    ]
    for process in begun:
        process.start()
    return begun


def _one(environment: dict[str, object], task: Callable[..., None], *arguments: Any) -> None:
    os.environ |= {key: str(value) for key, value in environment.items()}
    torch.set_num_threads(1)
    task(*arguments)


def begin(chosen: Recipe, count: int = 1, prepare: Callable[[int], None] | None = None) -> list[Any]:
    """Start the processes of a run, from its start or its last checkpoint; each first calls `prepare` with its
    number."""
    return start(work, count, chosen.model_dump(mode="json"), prepare)


def work(settings: dict[str, Any], prepare: Callable[[int], None] | None) -> None:
    chosen, index = Recipe.model_validate(settings), int(os.environ["RANK"])
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


def start_command(folder: Path, *words: object, count: int = 1) -> list[Any]:
    """Start the command line in processes that each lead a session; process i writes to `i.out` and `i.err` in the
    folder."""
    return start(command, count, [str(word) for word in words], folder)


def command(words: list[str], folder: Path) -> None:
    os.setsid()
    for number, kind in ((1, "out"), (2, "err")):
        with (folder / f"{os.environ['RANK']}.{kind}").open("a") as file:
            os.dup2(file.fileno(), number)
    from tinyclip.cli.main import main

    sys.argv = ["tinyclip", *words]
    main()


def together(task: Callable[..., None], arguments: tuple[Any, ...], count: int) -> None:
    """Call `task(index, *arguments)` in processes of the server; a failure is raised here."""
    torch.multiprocessing.start_processes(task, arguments, count, start_method="forkserver")


def end(begun: list[Any]) -> list[int]:
    """Return the exit codes."""
    for process in begun:
        process.join(PATIENCE)
        assert not process.is_alive()
    return [process.exitcode for process in begun]


def output(process: subprocess.Popen[AnyStr]) -> tuple[AnyStr, AnyStr]:
    """Return what a process writes until it ends; one that does not end is killed."""
    with process:  # closes its pipes and waits, or the next test would be told of them
        try:
            return process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


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
