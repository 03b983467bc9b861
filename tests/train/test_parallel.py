"""Several processes together take the same step as one process with the joined batch."""

from __future__ import annotations

import os
import socket
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.processes import together
from tests.helpers.trainees import CASES, assert_near, batch_of, gradients, part_of, trainee_of
from tinyclip.common.distributed import processes, rank
from tinyclip.data.loader import Batch
from tinyclip.train.step import Trainee

PROCESSES = 2
CHOSEN: list[tuple[str, dict[str, Any]]] = [(case, {}) for case in CASES]
CHOSEN += [
    (case, {"micro_batch": 3}) for case in ("scale learned", "masks, all terms", "uneven", "resnet, checkpointed")
]
SINGLE = "masks, all terms", {"micro_batch": 3}  # in float32 too


def inputs(case: str) -> Batch:
    return batch_of(64 if "resnet" in case else 32)


def steps(case: str, changes: dict[str, Any], batch: Batch) -> tuple[dict[str, Tensor], list[float]]:
    """Return all weights and losses of two steps. A parameter that takes no part would make the second step fail."""
    trainee = trainee_of(case, **changes)
    losses = [trainee.step(batch, step)["loss"].item() for step in (0, 1)]
    return {name: p.detach() for name, p in trainee.student.named_parameters()}, losses


def work(index: int, port: int) -> None:
    os.environ.update(RANK=str(index), LOCAL_RANK=str(index), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    alone = [(gradients(trainee_of(case), inputs(case)), steps(case, {}, inputs(case))) for case, _ in CHOSEN]
    single = gradients(trainee_of(SINGLE[0], torch.float32), inputs(SINGLE[0]))
    os.environ["WORLD_SIZE"] = str(PROCESSES)
    with processes():
        for (case, changes), (reference, (weights, losses)) in zip(CHOSEN, alone, strict=True):
            batch = inputs(case)
            share = part_of(batch, slice(rank() * 4, rank() * 4 + 4))
            assert_near(gradients(trainee_of(case, **changes), share), reference, 1e-10)
            ours, our_losses = steps(case, changes, share)
            assert_near(ours, weights, 1e-9)
            assert our_losses == pytest.approx(losses, rel=1e-10)
        trainee = trainee_of(SINGLE[0], torch.float32, **SINGLE[1])
        assert_near(gradients(trainee, part_of(inputs(SINGLE[0]), slice(rank() * 4, rank() * 4 + 4))), single, 1e-4)
        one_fails()


def one_fails() -> None:
    """One process has a non-finite loss: neither saves, and neither continues alone."""
    trainee, terms = trainee_of("affinity"), Trainee._terms
    if rank() == 1:
        trainee._terms = lambda *a: {k: v * torch.nan for k, v in terms(trainee, *a).items()}  # type: ignore[method-assign]
    trainee.step(part_of(inputs("affinity"), slice(rank() * 4, rank() * 4 + 4)), 0)
    with pytest.raises(ValueError, match=r"the loss of stage s is nan at step 1; samples 0000"):
        trainee.check()


def test_two_processes_take_the_step_of_one() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together(work, (port,), PROCESSES)
