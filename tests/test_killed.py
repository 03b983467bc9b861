"""Runs that are killed, stopped and damaged go on as if nothing had been: to the bit, in one process and in two."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import test_train
from test_auto import auto
from test_train import _events as events_of
from test_train import recipe, run, stage, weights
from tinyclip import train
from tinyclip.distributed import processes, rank
from tinyclip.recipe import Recipe
from tinyclip.resume import MANIFEST, Interrupted, Progress, restore, save
from tinyclip.run import loader_of
from tinyclip.step import Trainee

place = test_train.place
SERVER = multiprocessing.get_context("forkserver")  # it imports all once; a process is then there in no time
SERVER.set_forkserver_preload(["warm"])
PATIENCE = 120  # seconds


# --- processes --------------------------------------------------------------------------------------------------


def work(settings: dict[str, Any], index: int, count: int, port: int) -> None:
    """One process of a run, from the start or from where it stands; each leaves the weights it ends with."""
    os.environ |= {"RANK": str(index), "LOCAL_RANK": str(index), "WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    chosen = Recipe.model_validate(settings)
    folder = Path(chosen.output)
    sys.stderr = (folder.parent / f"{folder.name}-{index}.err").open("w")
    try:
        with processes():
            train.run(train.start(chosen, resume=(folder / "recipe.yaml").exists()))
    except ValueError as error:
        print(error, file=sys.stderr, flush=True)
        sys.exit(2)


def begin(chosen: Recipe, count: int = 1) -> list[Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = chosen.model_dump(mode="json")
    begun = [SERVER.Process(target=work, args=(settings, i, count, port)) for i in range(count)]
    for process in begun:
        process.start()
    return begun


def end(begun: list[Any]) -> list[int]:
    """Exit codes."""
    for process in begun:
        process.join(PATIENCE)
        assert not process.is_alive()
    return [process.exitcode for process in begun]


def kill(begun: list[Any]) -> None:
    for process in begun:
        process.kill()
    end(begun)


def until(happened: Callable[[], bool], begun: list[Any]) -> None:
    """Look as often as can be, and no longer than the processes live."""
    deadline = time.monotonic() + PATIENCE
    while not happened() and all(process.is_alive() for process in begun):
        assert time.monotonic() < deadline


def last_step(folder: Path) -> int:
    try:
        return max((e["step"] for e in events_of(folder) if e["event"] == "step"), default=0)
    except (OSError, ValueError):
        return 0


def assert_same(one: Path, two: Path) -> None:
    """The same student, and every step told once."""
    first, second = weights(one / "student"), weights(two / "student")
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    told = [[(e["stage"], e["step"], e["loss"]) for e in events_of(f) if e["event"] == "step"] for f in (one, two)]
    assert told[0] == told[1]
    assert not [p for p in two.rglob("*") if p.suffix in (".tmp", ".old") or "step-" in p.name or p.name == MANIFEST]


# --- kills ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2])
def test_kills_at_random_moments_change_nothing(place: Path, tmp_path: Path, count: int) -> None:
    """Of all processes or of one, and once in the middle of writing a checkpoint."""
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")  # shown when the test fails
    moments = random.Random(seed)
    changes = {"stages": [stage("a", steps=14), stage("b", steps=10)], "save_every": 2, "workers": 2 - count}
    whole, parts = (recipe(place, tmp_path / name, **changes) for name in ("whole", "parts"))
    assert end(begin(whole, count)) == [0] * count
    out = Path(parts.output)
    for moment in ("any", "writing", "any"):
        begun = begin(parts, count)
        if moment == "writing":
            until(lambda: bool(list(out.glob("stages/*/.last.*.tmp"))), begun)
            victim = begun.pop(0)
        else:
            time.sleep(moments.uniform(0.1, 2.0))
            victim = begun.pop(moments.randrange(count))
        victim.kill()
        assert end([victim]) == [-signal.SIGKILL]
        if moment == "writing":
            assert list(out.glob("stages/*/.last.*.tmp"))
            assert end(begun) in ([], [2])
        kill(begun)
    for index in range(count):
        said = (tmp_path / f"parts-{index}.err").read_text().splitlines()
        assert len(said) <= 1 and all("another process of the run has died; go on" in line for line in said)
    assert end(begin(parts, count)) == [0] * count
    assert_same(Path(whole.output), out)
