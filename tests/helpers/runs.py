"""Recipes with a few steps, and the results of their runs."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.models import random_resnet, resnet_config, small_config
from tests.helpers.shards import good, write_shard
from tinyclip.common.files import checksum
from tinyclip.inputs.tokenizer import clip_tokenizer
from tinyclip.inputs.transforms import Preprocess
from tinyclip.model.model import CLIP
from tinyclip.recipe.recipe import Recipe
from tinyclip.train import loop
from tinyclip.train.resume import Interrupted
from tinyclip.zoo.checkpoint import load_checkpoint, save_checkpoint
from tinyclip.zoo.resolve import MANIFEST

SHAPE = {"vision": {"width": 16}, "text": {"layers": 1}}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data` (40 pairs) and `teacher`."""
    folder = tmp_path_factory.mktemp("train")
    (folder / "data").mkdir()
    write_shard(folder / "data" / "0.tar", [good(i % 30) | {"key": f"{i:05d}"} for i in range(40)])
    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    pruned = tokenizer.pruned(tokenizer.kept_ids(["caption words"]))
    config = small_config(vocab_size=pruned.vocab_size, image_size=16)
    save_checkpoint(folder / "teacher", CLIP(config), pruned, Preprocess(image_size=16))
    return folder


def recipe(place: Path, output: Path, **changes: Any) -> Recipe:
    data: dict[str, Any] = {
        "teacher": str(place / "teacher"),
        "data": str(place / "data"),
        "output": str(output),
        "workers": 0,
        "device": "cpu",
        "precision": "float32",
        "log_every": 1,
        "save_every": 2,
        "stages": [stage("75", student={"text": {"layers": 1}}), stage("50", student=SHAPE)],
    }
    return Recipe.model_validate(data | changes)


def stage(name: str = "50", **changes: Any) -> dict[str, Any]:
    return {"name": name, "steps": 5, "batch_size": 8, "student": SHAPE, "optimizer": {"lr": 1e-3}} | changes


def run(chosen: Recipe, **options: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the results of a run, and its events."""
    events: list[dict[str, Any]] = []
    started = loop.start(chosen, **options)
    started.listener = events.append
    return loop.run(started), events


def stopped(started: Any, step: int, stage: str | None = None, number: int = signal.SIGINT) -> Any:
    """Run until a signal stops the run after a step, by default of any stage; return what was started."""
    heard = started.listener

    def listen(event: dict[str, Any]) -> None:
        if heard is not None:
            heard(event)
        if event["event"] == "step" and event["step"] == step and stage in (None, event["stage"]):
            os.kill(os.getpid(), number)

    started.listener = listen
    with pytest.raises(Interrupted, match=f"stopped at step {step}") as error:
        loop.run(started)
    assert error.value.signal_number == number
    return started


def events_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(folder)[0].state_dict()


def vouch(folder: Path) -> None:
    """Update a checkpoint's checksums after a change, as an attacker would."""
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["crc32"] = {name: checksum(folder / name) for name in manifest["crc32"]}
    (folder / MANIFEST).write_text(json.dumps(manifest))


def auto(name: str = "50", target: Any = 0.5, **changes: Any) -> dict[str, Any]:
    settings = {"target_sparsity": target, "steps": 12, "ramp_steps": 4, "lr": 0.6} | changes.pop("auto", {})
    return {"name": name, "inherit": "auto", "auto": settings, "steps": 16, "batch_size": 8} | changes


def calibrated(name: str = "50", target: Any = 0.5, towers: str = "both", **settings: Any) -> dict[str, Any]:
    found = {"target_sparsity": target, "batches": 4} | settings
    return {"name": name, "inherit": "calibrated", "calibrated": found, "steps": 4, "batch_size": 8, "towers": towers}


@pytest.fixture(scope="module")
def resnet_place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data` (40 pairs) and a ResNet `teacher` for 32 px."""
    folder = tmp_path_factory.mktemp("resnet")
    (folder / "data").mkdir()
    write_shard(folder / "data" / "0.tar", [good(i % 30) | {"key": f"{i:05d}"} for i in range(40)])
    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    pruned = tokenizer.pruned(tokenizer.kept_ids(["caption words"]))
    config = resnet_config(vocab_size=pruned.vocab_size, vision={"image_size": 32})
    teacher = random_resnet(config, dtype=torch.float32)
    save_checkpoint(folder / "teacher", teacher, pruned, Preprocess(image_size=32))
    return folder


def resnet_recipe(place: Path, output: Path, recipe_changes: dict[str, Any] | None = None, **changes: Any) -> Recipe:
    stage: dict[str, Any] = {"name": "half", "steps": 6, "batch_size": 8, "optimizer": {"lr": 1e-3}}
    stage |= {"student": {"vision": {"width": 3}, "text": {"layers": 1}}, "batch_norm_batches": 3}
    stage = {key: value for key, value in (stage | changes).items() if value is not None}
    data: dict[str, Any] = {"data": str(place / "data"), "output": str(output), "stages": [stage], "workers": 0}
    data |= {"teacher": str(place / "teacher"), "device": "cpu", "precision": "float32", "log_every": 1}
    return Recipe.model_validate(data | (recipe_changes or {}))


def buffers(folder: Path) -> dict[str, Tensor]:
    return dict(load_checkpoint(folder)[0].named_buffers())
