from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers.models import random_resnet, resnet_config, small_config
from tests.helpers.runs import buffers, events_of, resnet_recipe, stopped
from tests.helpers.runs import resnet_place as resnet_place
from tinyclip.compress.batch_norm import batch_norms, freeze, reestimate, synchronise
from tinyclip.compress.inheritance import inherit
from tinyclip.data.loader import image_input
from tinyclip.inputs.transforms import Preprocess
from tinyclip.model.model import CLIP
from tinyclip.recipe.stage import Stage
from tinyclip.train import loop
from tinyclip.train.run import loader_of
from tinyclip.train.step import Trainee
from tinyclip.zoo.checkpoint import load_checkpoint, save_checkpoint


def test_reestimated_statistics_are_the_batches_averages() -> None:
    model = random_resnet(resnet_config())
    batches = [torch.randn(5, 3, 64, 64, dtype=torch.float64) * (i + 1) + i for i in range(3)]
    parameters = [p.clone() for p in model.parameters()]
    convolved = [F.conv2d(b, model.visual.conv1.weight, stride=2, padding=1) for b in batches]
    model.eval()
    reestimate(model, batches)
    first = model.visual.bn1
    assert isinstance(first, nn.BatchNorm2d) and first.running_mean is not None and first.running_var is not None
    torch.testing.assert_close(first.running_mean, torch.stack([c.mean((0, 2, 3)) for c in convolved]).mean(0))
    torch.testing.assert_close(first.running_var, torch.stack([c.var((0, 2, 3)) for c in convolved]).mean(0))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), parameters, strict=True))
    assert not any(module.training for module in model.modules())
    assert all(norm.momentum == 0.1 and norm.num_batches_tracked == 3 for norm in batch_norms(model))


def test_frozen_statistics_stay_and_several_gpus_share_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = CLIP(resnet_config())
    before = {key: value.clone() for key, value in model.named_buffers()}
    freeze(model.train())
    model.encode_image(torch.rand(2, 3, 64, 64)).sum().backward()
    assert all(torch.equal(value, before[key]) for key, value in model.named_buffers())
    assert model.visual.get_submodule("bn1").weight.grad is not None
    keys, parameters = list(model.state_dict()), list(model.parameters())
    synchronise(model, torch.device("cuda"))  # one process
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    synchronise(model, torch.device("cpu"))
    assert not any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())
    synchronise(model, torch.device("cuda"))
    assert all(isinstance(norm, nn.SyncBatchNorm) for norm in batch_norms(model))
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


def test_a_frozen_stage_starts_from_reestimated_statistics(resnet_place: Path, tmp_path: Path) -> None:
    run = loop.start(resnet_recipe(resnet_place, tmp_path / "run"))
    loop.run(run)
    teacher = load_checkpoint(resnet_place / "teacher")[0]
    wanted = inherit(teacher, run.configs[0])
    source = iter(loader_of(run, 0))
    reestimate(wanted, [image_input(next(source).images, run.preprocess) for _ in range(3)])
    found = buffers(tmp_path / "run" / "student")
    assert all(torch.equal(value, found[key]) for key, value in wanted.named_buffers())
    assert any(not torch.equal(value, p) for value, p in zip(wanted.parameters(), teacher.parameters(), strict=False))
    events = events_of(tmp_path / "run")
    assert {"event": "batch_norm", "stage": "half", "batches": 3} in events


@pytest.mark.parametrize("mode", ["frozen", "train"])
def test_a_resumed_stage_is_the_same_to_the_bit(resnet_place: Path, tmp_path: Path, mode: str) -> None:
    changes = {"batch_norm": mode, "batch_norm_batches": 3 if mode == "frozen" else None}
    loop.run(loop.start(resnet_recipe(resnet_place, tmp_path / "whole", **changes)))
    chosen = resnet_recipe(resnet_place, tmp_path / "stopped", **changes)
    run = loop.start(chosen)
    stopped(run, 3, number=signal.SIGTERM)
    again = loop.start(chosen, resume=True)
    events: list[dict[str, Any]] = []
    again.listener = events.append
    loop.run(again)
    assert [e["step"] for e in events if e["event"] == "step"] == [4, 5, 6]
    assert not [e for e in events if e["event"] == "batch_norm"]
    whole = load_checkpoint(tmp_path / "whole" / "student")[0].state_dict()
    resumed = load_checkpoint(tmp_path / "stopped" / "student")[0].state_dict()
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())
    tracked = {int(value) for key, value in whole.items() if key.endswith("num_batches_tracked")}
    assert tracked == {3 if mode == "frozen" else 6}


@pytest.mark.parametrize("mode", ["frozen", "train"])
def test_only_statistics_that_are_learned_are_shared(
    resnet_place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """The first process measures frozen statistics, and would wait there forever for the others."""
    shared: list[bool] = []

    def as_on_two_gpus(model: CLIP, device: torch.device) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(torch.distributed, "is_initialized", lambda: True)
            patch.setattr(torch.distributed, "get_world_size", lambda: 2)
            synchronise(model, torch.device("cuda"))

    def step(self: Trainee, *args: Any) -> dict[str, Tensor]:
        shared.append(any(isinstance(norm, nn.SyncBatchNorm) for norm in batch_norms(self.model)))
        return own(self, *args)

    own = Trainee.step
    monkeypatch.setattr(loop, "synchronise", as_on_two_gpus)
    monkeypatch.setattr(Trainee, "step", step)
    changes = {"batch_norm": mode, "batch_norm_batches": 3 if mode == "frozen" else None}
    loop.run(loop.start(resnet_recipe(resnet_place, tmp_path / "run", **changes)))
    assert shared == [mode == "train"] * 6


def test_from_scratch_learns_its_statistics(resnet_place: Path, tmp_path: Path) -> None:
    config = resnet_config(vision={"image_size": 32}).model_dump(mode="json")
    loss = {"affinity": 0, "contrastive": 1}
    scratch = {"inherit": "none", "loss": loss, "student": {}, "batch_norm_batches": None}
    model = {"teacher": None, "model": config, "vocabulary": "data"}
    loop.run(loop.start(resnet_recipe(resnet_place, tmp_path / "run", model, **scratch)))
    found = buffers(tmp_path / "run" / "student")
    assert all(value == 6 for key, value in found.items() if key.endswith("num_batches_tracked"))


def test_an_untouched_image_tower_keeps_its_statistics() -> None:
    stage = Stage(name="text", steps=5, towers="text", batch_norm="train")
    assert stage.freezes_batch_norm


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inherit": "none", "batch_norm": "frozen"}, "random weights have no statistics to freeze"),
        ({"batch_norm": "train"}, "batch_norm_batches: only with `batch_norm: frozen`"),
        ({"inherit": "none"}, "batch_norm_batches: only with `batch_norm: frozen`"),
        ({"batch_norm_batches": 0}, "greater than or equal to 1"),
        ({"batch_norm": "thaw"}, "'frozen' or 'train'"),
    ],
)
def test_batch_norm_keys_that_contradict_are_refused(
    resnet_place: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        resnet_recipe(resnet_place, tmp_path, **changes)


def test_masks_of_a_resnet_are_not_learned(resnet_place: Path, tmp_path: Path) -> None:
    auto = {"inherit": "auto", "auto": {"target_sparsity": 0.5, "steps": 3}, "student": {}}
    with pytest.raises(ValueError, match="resnet image tower cannot learn masks"):
        loop.start(resnet_recipe(resnet_place, tmp_path / "run", **auto))


def test_a_vit_has_no_batch_norm(resnet_place: Path, tmp_path: Path) -> None:
    _, tokenizer, _ = load_checkpoint(resnet_place / "teacher")
    config = small_config(vocab_size=tokenizer.vocab_size)
    save_checkpoint(tmp_path / "vit", CLIP(config), tokenizer, Preprocess(image_size=32))
    chosen = resnet_recipe(
        resnet_place, tmp_path / "run", {"teacher": str(tmp_path / "vit")}, student={}, batch_norm="frozen"
    )
    with pytest.raises(ValueError, match=r"stages.0 \(half\): batch_norm: a ViT has no batch norm; leave the key out"):
        loop.start(chosen)
    assert not (tmp_path / "run").exists()
