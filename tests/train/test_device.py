"""On a make-believe GPU the results are the CPU's, and a training step never waits for the device."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.make_believe import GPU, make_believe
from tests.helpers.trainees import CASES, batch_of, infinite, named, trainee_of
from tinyclip.data.loader import Batch
from tinyclip.teachers.teacher import CachedTeacher
from tinyclip.train.step import MOST_UNREAD, Trainee

KINDS: dict[str, dict[str, Any]] = {
    "micro-batches": {"case": "scale learned", "micro_batch": 3},
    "micro-batches of masks": {"case": "masks, all terms", "micro_batch": 3},
    "batch norm": {"case": "resnet", "batch_norm": None},
    "float16": {"case": "scale learned", "precision": "float16"},
    "float16, masks": {"case": "masks", "precision": "float16"},
    "bfloat16": {"case": "checkpointed", "precision": "bfloat16"},
    "cached": {"case": "scale fixed", "cached": 1},
    "cached, several": {"case": "affinity", "cached": 2},
    **{name: {"case": name} for name in CASES},
}


def on(device: str, case: str, precision: str = "float32", cached: int = 0, **changes: Any) -> Trainee:
    """Return a trainee from `trainee_of`, with its model and teacher moved as in a run."""
    made = trainee_of(case, torch.float32, **changes)
    teacher = made.teacher
    if cached:
        teacher = CachedTeacher(8, [torch.tensor(50.0, device=device)] * cached)
    else:
        teacher.network.to(device)  # type: ignore[union-attr]
    if made.pruner:
        made.pruner.hard.to(device)
        made.pruner.constraint.to(device)
    arguments = made.tokenizer, made.preprocess, precision, made.pruner
    trainee = Trainee(made.model.to(device), made.stage, teacher, *arguments)
    with torch.no_grad():
        for mine, theirs in zip(trainee.projections.parameters(), made.projections.parameters(), strict=True):
            mine.copy_(theirs)
    trainee.train()
    return trainee


def inputs(case: str, cached: int = 0, **_: Any) -> Batch:
    batch = batch_of(64 if "resnet" in case else 32)
    generator = torch.Generator().manual_seed(1)
    rows = [torch.nn.functional.normalize(torch.randn(8, 8, generator=generator), dim=1) for _ in range(2 * cached)]
    batch.teacher = list(zip(rows[::2], rows[1::2], strict=True))
    return batch.pin_memory() if torch.cuda.is_available() else batch


def state(trainee: Trainee) -> dict[str, Tensor]:
    moments = {
        f"{i}.{name}": value
        for optimizer in (trainee.optimizer, *([trainee.pruner.optimizer] if trainee.pruner else []))
        for i, entry in enumerate(optimizer.state.values())
        for name, value in entry.items()
    }
    return {
        k: v.detach().cpu().clone() for k, v in (named(trainee) | moments | dict(trainee.model.named_buffers())).items()
    }  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_three_steps_of_each_kind_are_those_of_the_cpu_and_wait_once(kind: str) -> None:
    settings = KINDS[kind]
    reference, batch = on("cpu", **settings), inputs(**settings)
    for step in range(3):
        reference.step(batch, step)
    expected = reference.figures(3)
    with make_believe() as gpu:
        trainee, batch = on("cuda", **settings), inputs(**settings)
        gpu.waits.clear()
        overflowed = 0
        for step in range(3):
            trainee.step(batch, step)
            overflowed += trainee.overflowed
        # Steps that overflow in float16 must be skipped: each step checks once, and reads the scale after an overflow.
        assert len(gpu.waits) == (3 + overflowed if kind.startswith("float16") else 0), [*map(str, gpu.waits)]
        gpu.waits.clear()
        assert trainee.figures(3) == expected
        assert len(gpu.waits) == 1, [*map(str, gpu.waits)]
        assert all(p.device == GPU for p in named(trainee).values())
        found = state(trainee)
    for name, value in state(reference).items():
        assert torch.equal(found[name], value), name


# --- non-finite values ----------------------------------------------------------------------------------------------


def poisoned(trainee: Trainee) -> None:
    """Make the loss NaN from now on."""
    with torch.no_grad():
        trainee.model.visual.conv1.weight.fill_(math.nan)


def test_a_loss_that_is_no_number_is_found_when_it_is_read_and_names_its_step() -> None:
    with make_believe():
        trainee, batch = on("cuda", "affinity"), inputs("affinity")
        trainee.step(batch, 0)
        trainee.check()
        poisoned(trainee)
        trainee.step(batch, 1)
        trainee.step(batch, 2)
        with pytest.raises(ValueError, match=r"the loss of stage s is nan at step 2; samples 00000, 00001.*is kept"):
            trainee.figures(3)


def test_what_is_not_finite_is_never_saved() -> None:
    for spoil, message in (
        (lambda t: t.model.visual.proj.fill_(math.inf), "the loss of stage s is nan at step 1"),
        (
            lambda t: t.model.text_projection.register_hook(lambda g: g * math.inf),
            "the gradient of stage s is inf at step 1",
        ),
    ):
        trainee = on("cpu", "affinity")
        with torch.no_grad():
            spoil(trainee)
        trainee.step(batch_of(), 0)
        with pytest.raises(ValueError, match=message):
            trainee.check()
    trainee = on("cpu", "affinity")
    trainee.step(batch_of(), 0)
    poisoned(trainee)  # the step itself was finite
    with pytest.raises(ValueError, match="a weight of stage s is not finite at step 1"):
        trainee.check()


def test_steps_that_nobody_reads_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinyclip.train.step.MOST_UNREAD", 2)
    assert MOST_UNREAD > 2
    with make_believe() as gpu:
        trainee, batch = on("cuda", "affinity"), inputs("affinity")
        gpu.waits.clear()
        for step in range(5):
            trainee.step(batch, step)
        assert len(gpu.waits) == 2 and len(trainee._unread) == 1


# --- float16 --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("case", ["affinity", "masks", "resnet"])
def test_a_step_that_overflows_in_float16_changes_nothing_but_the_scale(case: str, device: str) -> None:
    with make_believe():
        settings: dict[str, Any] = {"case": case, "precision": "float16", "batch_norm": None}
        trainee, batch = on(device, **settings), inputs(case)
        while not trainee.optimizer.state:  # the initial scale is too large for some
            trainee.step(batch, 0)
        scale, before = trainee.scaler.get_scale(), state(trainee)
        broken = trainee.model.visual.conv1.register_forward_hook(infinite)
        trainee.step(batch, 1)
        assert trainee.overflowed and trainee.scaler.get_scale() == scale / 2
        assert all(torch.equal(before[name], value) for name, value in state(trainee).items())
        assert all(math.isfinite(value) for value in trainee.figures(1).values() if isinstance(value, float))
        broken.remove()
        trainee.step(batch, 1)
        assert not trainee.overflowed and trainee.scaler.get_scale() == scale / 2
        assert not any(torch.equal(before[name], value) for name, value in state(trainee).items() if "step" in name)
        trainee.check()


def test_float16_that_overflows_for_ever_is_one_error() -> None:
    trainee = on("cpu", "affinity", "float16")
    trainee.model.visual.conv1.register_forward_hook(infinite)
    before = state(trainee)
    with pytest.raises(ValueError, match=r"of stage s is too large for float16 in many batches in a row .* at step 1"):
        for _ in range(40):
            trainee.step(batch_of(), 0)
            assert trainee.overflowed
    assert all(torch.equal(before[name], value) for name, value in state(trainee).items())
