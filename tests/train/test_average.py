"""`ema`: the average of the weights is evaluated, saved and inherited, and survives a stop."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.runs import auto, recipe, run, stage, stopped, weights
from tests.helpers.trainees import batch_of, trainee_of
from tinyclip.train import loop
from tinyclip.train.plan import plan


@pytest.mark.parametrize("case", ["affinity", "resnet", "image only"])
def test_it_is_the_average_of_all_steps(case: str) -> None:
    """Against the definition, in float64. The default trainee has ten steps, and the last ends in the average."""
    changes: dict[str, Any] = {"ema": 0.7, "steps": 10}
    changes |= {"batch_norm": "train"} if case == "resnet" else {}
    changes |= {"towers": "image"} if case == "image only" else {}
    trainee = trainee_of("resnet" if case == "resnet" else "affinity", **changes)
    assert trainee.average is not None
    batch = batch_of(64 if case == "resnet" else 32)
    expected = _copy(trainee.model.state_dict())
    start = _copy(expected)
    copied: dict[str, Tensor] = {}
    trainee.optimizer.register_step_post_hook(lambda *_: copied.update(_copy(trainee.model.state_dict())))
    for step in range(10):
        torch.testing.assert_close(dict(trainee.average.state_dict()), expected, rtol=1e-12, atol=1e-12)
        trainee.step(batch, step)
        decay = min(0.7, (1 + step) / (10 + step))
        for key, value in copied.items():
            expected[key] = decay * expected[key] + (1 - decay) * value if value.is_floating_point() else value
    torch.testing.assert_close(_copy(trainee.model.state_dict()), expected, rtol=1e-12, atol=1e-12)
    untrained = [k for k, p in trainee.model.named_parameters() if not p.requires_grad]
    assert all(torch.equal(trainee.model.state_dict()[key], start[key]) for key in untrained)
    assert ("text_projection" in untrained) == (case == "image only")


def _copy(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in state.items()}


@pytest.mark.parametrize(("kind", "at"), [("manual", 13), ("auto", 2), ("auto", 13), ("auto", 15)])
def test_a_stopped_run_goes_on_with_its_average(place: Path, tmp_path: Path, kind: str, at: int) -> None:
    """At 2, masks are learned; at 12 the student is cut; 16 is the last step."""
    chosen = auto(ema=0.6) if kind == "auto" else stage(steps=16, ema=0.6)
    seen: dict[str, list[float]] = {"whole": [], "parts": []}

    def started(name: str, resume: bool = False) -> Any:
        settings = {"stages": [chosen], "save_every": 100, "evaluation": {"data": "unused", "every": 4}}
        made = loop.start(recipe(place, tmp_path / name, **settings), resume=resume)

        def judge(model: Any, *_: Any) -> dict[str, float]:
            seen[name].append(sum(p.sum().item() for p in model.parameters()))
            return {"acc1": len(seen[name])}

        made.evaluator = judge
        return made

    loop.run(started("whole"))
    stopped(started("parts"), at, number=signal.SIGTERM)
    loop.run(started("parts", resume=True))
    assert seen["whole"] == seen["parts"] and len(set(seen["whole"])) == len(seen["whole"])
    for place_of in ("student", f"stages/{chosen['name']}/last"):
        ours, theirs = (weights(tmp_path / name / place_of) for name in ("whole", "parts"))
        assert all(torch.equal(theirs[key], value) for key, value in ours.items())
    total = sum(value.sum().item() for value in weights(tmp_path / "whole" / "student").values())
    assert total == pytest.approx(seen["whole"][-1], rel=1e-5)  # what was judged is what was saved


def test_the_next_stage_inherits_the_average(place: Path, tmp_path: Path) -> None:
    frozen = stage("b", student={}, optimizer={"lr": 1e-12}, steps=2)
    run(recipe(place, tmp_path / "run", stages=[stage("a", steps=6, ema=0.9), frozen]))
    first, last = weights(tmp_path / "run" / "stages" / "a" / "last"), weights(tmp_path / "run" / "student")
    for key, value in first.items():
        torch.testing.assert_close(last[key], value, rtol=0, atol=1e-6)


def test_the_plan_counts_it(place: Path, tmp_path: Path) -> None:
    without, with_it = (
        plan(recipe(place, tmp_path / "run", stages=[stage(**changes)]))["stages"][0]["memory_bytes"]
        for changes in ({}, {"ema": 0.9})
    )
    assert with_it["average"] > 0 == without["average"]
    assert with_it["total"] - without["total"] == with_it["average"]


@pytest.mark.parametrize("decay", [0, 1, 1.5, "much"])
def test_a_decay_that_is_none_is_refused(place: Path, tmp_path: Path, decay: Any) -> None:
    with pytest.raises(ValueError, match=r"stages.0.ema"):
        recipe(place, tmp_path / "run", stages=[stage(ema=decay)])
