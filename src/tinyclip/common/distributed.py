"""Devices and precision: what this machine can do; and the processes that share the work."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


# --- several processes ------------------------------------------------------------------------------------------

PATIENCE = timedelta(hours=4)  # others wait this long while the first process evaluates or cuts


@contextmanager
def processes(device: torch.device | str = "cpu") -> Iterator[None]:
    """Join the processes that `torchrun` started, and leave them at the end; alone, do nothing.

    NCCL between GPUs, gloo between CPUs.

    Raises:
        ValueError: when the others cannot be reached, there is no GPU for this process, or another one has died.
        SystemExit: with code 2 when another one has ended with an error, which it says itself.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    cuda = torch.device(device).type == "cuda"
    if cuda:
        local, here = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= here:
            raise ValueError(f"more processes than GPUs ({here} here); take --nproc-per-node {here}")
        torch.cuda.set_device(local)  # what travels as objects between the processes goes through it
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:  # torch's ValueError: a variable that torchrun sets is missing
        raise ValueError(
            f"cannot join the other processes ({str(error).splitlines()[0]}); start with torchrun"
        ) from None
    try:
        yield
    except Exception as error:
        if not claim("an error"):  # asked before the connections close, through which the others would learn of it
            _leave()
        if isinstance(error, RuntimeError) and _is_lost(error):
            raise ValueError("another process has died; run the same command again (a run: with --resume)") from None
        raise
    finally:
        _left.append(dist.group.WORLD)
        dist.destroy_process_group()


# Groups are kept for good. One that only a DDP held would be destroyed with the interpreter's lock taken, while its
# threads wait for that lock, to let go of the last tensors: a deadlock, as the destructor waits for the threads.
_left: list[Any] = []


def _leave() -> NoReturn:
    """End as another process has failed, but not before it has said why: torchrun ends all when the first is gone."""
    time.sleep(1)
    raise SystemExit(2)


def _is_lost(error: RuntimeError) -> bool:
    """Whether an operation failed since the process at the other end is gone."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def claim(what: str) -> bool:
    """Whether this process is the first of those that torchrun started to claim something; alone, always. It asks
    their common store, so it also works before they have joined."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return True
    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        socket.create_connection(
            (address, port), timeout=5
        ).close()  # torch's client would wait longer, and not quietly
        store = dist.TCPStore(  # type: ignore[attr-defined]
            address, port, is_master=False, timeout=timedelta(seconds=10)
        )
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return bool(store.add(f"tinyclip/{attempt}/{what}", 1) == 1)
    except (KeyError, ValueError, OSError, RuntimeError):  # nobody to ask
        return True


_alone = False  # the first process works while the others wait, see `from_main`


def world_size() -> int:
    """Processes that share the work; 1 outside of `processes`, and in what `from_main` calls."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() and not _alone else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def is_main() -> bool:
    """Whether this is the process that writes and speaks."""
    return rank() == 0


def gather(rows: Tensor) -> Tensor:
    """Every process's rows, in the order of ranks, with gradient: (n, ...) -> (world_size * n, ...).

    The gradient of a process's rows is the sum of what the losses of all processes say of them. All must come with
    the same shape.
    """
    return _Gather.apply(rows) if world_size() > 1 else rows


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        joined = rows.new_empty(world_size() * len(rows), *rows.shape[1:])
        dist.all_gather(list(joined.chunk(world_size())), rows.contiguous())
        return joined

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous()
        if total.is_cuda:
            mine = total.new_empty(len(total) // world_size(), *total.shape[1:])
            dist.reduce_scatter(mine, list(total.chunk(world_size())))
            return mine
        total = total.clone()
        dist.all_reduce(total)  # gloo scatters no sums
        return total.chunk(world_size())[rank()]


def gather_uneven(rows: Tensor) -> Tensor:
    """Every process's rows (n, ...) as `gather`, though each has another number of them. One without any may leave out
    their shape, (0, 0)."""
    if world_size() == 1:
        return rows
    shapes = gather_objects(tuple(rows.shape))
    longest = max(shapes, key=lambda shape: shape[0])
    padded = rows.new_zeros(longest)
    if len(rows):
        padded[: len(rows)] = rows
    parts = gather(padded).split(max(1, longest[0]))
    return torch.cat([part[: shape[0]] for part, shape in zip(parts, shapes, strict=True)]) if longest[0] else rows


def gather_objects(mine: T) -> list[T]:
    """What each process has, by rank, in every process; small things only."""
    if world_size() == 1:
        return [mine]
    everyones: list[Any] = [None] * world_size()
    dist.all_gather_object(everyones, mine)
    return everyones


def from_main(call: Callable[[], T]) -> T:
    """What `call` returns in the first process, in every one; the others wait and do not call it. Within it the first
    process is as if alone: a loss there gathers nothing.

    Raises:
        ValueError: the first process's, there.
        SystemExit: in the others then, with code 2, as the first one has said what is wrong.
    """
    global _alone
    if world_size() == 1:
        return call()
    told: list[Any] = [None, False]  # the value, and whether there is one
    try:
        if is_main():
            _alone = True
            told = [call(), True]
    finally:
        _alone = False
        dist.broadcast_object_list(told)
    if not told[1]:
        _leave()
    value: T = told[0]
    return value


def average(value: Tensor) -> Tensor:
    """Mean over the processes of a tensor without gradient."""
    if world_size() == 1:
        return value
    value = value.detach().clone()
    dist.all_reduce(value)
    return value / world_size()


def any_of(*flags: bool, device: torch.device | str = "cpu") -> list[bool]:
    """For each flag, whether any process raised it; all processes get the same answer. It travels from `device`:
    among many GPUs NCCL is the faster way."""
    if world_size() == 1:
        return list(flags)
    raised = torch.tensor(flags, dtype=torch.int32, device=device)
    dist.all_reduce(raised, dist.ReduceOp.MAX)
    return [bool(flag) for flag in raised.tolist()]
