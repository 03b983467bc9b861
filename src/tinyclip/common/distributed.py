"""Distributed processes: joining them, ranks, and collective operations."""

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


PATIENCE = timedelta(hours=4)  # how long the others wait while the first process evaluates or cuts


@contextmanager
def processes(device: torch.device | str = "cpu") -> Iterator[None]:
    """Join the processes that `torchrun` started and leave them at the end; do nothing in a single process.

    Uses NCCL between GPUs and gloo between CPUs.

    Raises:
        ValueError: when the others cannot be reached, there is no GPU for this process, or another one has died.
        SystemExit: with code 2 when another process failed; that process reports the error itself.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    cuda = torch.device(device).type == "cuda"
    if cuda:
        local, here = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= here:
            raise ValueError(f"more processes than GPUs ({here} here); use --nproc-per-node {here}")
        torch.cuda.set_device(local)  # object collectives use the current GPU
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:  # ValueError: a variable set by torchrun is missing
        raise ValueError(
            f"cannot join the other processes ({str(error).splitlines()[0]}); start with torchrun"
        ) from None
    try:
        yield
    except Exception as error:
        if not claim("an error"):  # before the connections close, which the others would notice
            _leave()
        if isinstance(error, RuntimeError) and _is_lost(error):
            raise ValueError(
                "another process has died; run the same command again (add --resume for a training run)"
            ) from None
        raise
    finally:
        _left.append(dist.group.WORLD)
        dist.destroy_process_group()


# Groups are never freed. If only a DDP held one, it would be destroyed while holding the GIL; its destructor waits for
# its threads, and they wait for the GIL to release their last tensors: a deadlock.
_left: list[Any] = []


def _leave() -> NoReturn:
    """Exit after another process failed, but give it time to report why: torchrun kills all once one exits."""
    time.sleep(1)
    raise SystemExit(2)


def _is_lost(error: RuntimeError) -> bool:
    """Whether an operation failed because the process at the other end is gone."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def claim(what: str) -> bool:
    """Whether this process is the first one started by torchrun to claim `what`; a single process always is.

    Uses torchrun's store, so it also works before the processes have joined.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return True
    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        socket.create_connection((address, port), timeout=5).close()  # torch's client would wait longer and log
        store = dist.TCPStore(  # type: ignore[attr-defined]
            address, port, is_master=False, timeout=timedelta(seconds=10)
        )
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return bool(store.add(f"tinyclip/{attempt}/{what}", 1) == 1)
    except (KeyError, ValueError, OSError, RuntimeError):  # no store to ask
        return True


_alone = False  # the first process works while the others wait (see `from_main`)


def world_size() -> int:
    """Number of processes that share the work; 1 outside `processes` and inside a `from_main` call."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() and not _alone else 1


def rank() -> int:
    """Rank of this process, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def is_main() -> bool:
    """Whether this is the process that writes files and prints."""
    return rank() == 0


def gather(rows: Tensor) -> Tensor:
    """Gather every process's rows in rank order, with gradient: (n, ...) -> (world_size * n, ...).

    The gradient of a process's rows is summed over the losses of all processes. All must pass the same shape.
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
        dist.all_reduce(total)  # gloo has no reduce_scatter
        return total.chunk(world_size())[rank()]


def gather_uneven(rows: Tensor) -> Tensor:
    """Gather rows (n, ...) like `gather`, with a different n per process. A process without rows may pass (0, 0)."""
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
    """Gather one small object from each process, in rank order, in every process."""
    if world_size() == 1:
        return [mine]
    everyones: list[Any] = [None] * world_size()
    dist.all_gather_object(everyones, mine)
    return everyones


def from_main(call: Callable[[], T]) -> T:
    """Run `call` in the first process only and return its result in every process; the others wait.

    Inside `call` the first process acts as if it were alone: a loss computed there gathers nothing.

    Raises:
        ValueError: in the first process, when `call` raises it.
        SystemExit: in the others in that case, with code 2, since the first one reports the error.
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
    """Average a tensor over the processes, without gradient."""
    if world_size() == 1:
        return value
    value = value.detach().clone()
    dist.all_reduce(value)
    return value / world_size()


def any_of(*flags: bool, device: torch.device | str = "cpu") -> list[bool]:
    """Return for each flag whether any process raised it; all processes get the same answer.

    The flags are reduced on `device`: with many GPUs, NCCL is faster.
    """
    if world_size() == 1:
        return list(flags)
    raised = torch.tensor(flags, dtype=torch.int32, device=device)
    dist.all_reduce(raised, dist.ReduceOp.MAX)
    return [bool(flag) for flag in raised.tolist()]
