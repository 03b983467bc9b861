"""Whole runs and commands on a make-believe GPU match the CPU, and can be saved and resumed on either."""

from __future__ import annotations

import copy
import json
import math
import signal
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from safetensors.numpy import load_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import tinyclip
from tests.helpers import commands
from tests.helpers.commands import strict
from tests.helpers.judged import grey
from tests.helpers.make_believe import GPU, MakeBelieve, make_believe
from tests.helpers.models import random_inputs, random_model, random_resnet, resnet_config, small_config
from tests.helpers.runs import SHAPE, recipe, run, stage, stopped, weights
from tests.helpers.trainees import infinite
from tinyclip.compress.batch_norm import reestimate
from tinyclip.compress.calibrate import Calibration, Sample, calibrate
from tinyclip.data.loader import Batch
from tinyclip.inputs.augment import Augment
from tinyclip.teachers.make_cache import make_cache
from tinyclip.train import loop
from tinyclip.train.step import Trainee, learning_rate

AUTO = {"inherit": "auto", "student": {}, "steps": 6}
AUTO |= {"auto": {"target_sparsity": 0.4, "steps": 3, "ramp_steps": 2, "lr": 0.1}}
RUNS: dict[str, dict[str, Any]] = {
    "manual": {"student": {"text": {"layers": 1}}, "loss": {"contrastive": 1, "feature": 1, "affinity": 1}},
    "auto": AUTO,
    "calibrated": {"inherit": "calibrated", "student": {}, "calibrated": {"target_sparsity": 0.4, "batches": 4}},
}


@pytest.fixture(autouse=True)
def one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU attention has its own training kernel; use the same one everywhere, so that results are equal bit for bit."""

    def same(device: torch.device) -> AbstractContextManager[None]:
        kernel: AbstractContextManager[None] = sdpa_kernel(SDPBackend.MATH)
        return kernel

    for name in ("loop", "stage_start"):
        monkeypatch.setattr(f"tinyclip.train.{name}.attention", same)


def on(device: str) -> AbstractContextManager[Any]:
    return make_believe() if device == "cuda" else nullcontext()


def stopped_run(place: Path, out: Path, kind: str, device: str, at: int, **changes: Any) -> None:
    """Run until a signal stops the run after a step."""
    started = loop.start(recipe(place, out, stages=[stage(**RUNS[kind])], device=device, **changes))
    stopped(started, at, number=signal.SIGTERM)


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_saved_on_one_device_and_resumed_on_another_is_that_of_the_cpu(
    kind: str, place: Path, tmp_path: Path
) -> None:
    run(recipe(place, tmp_path / "cpu", stages=[stage(**RUNS[kind])]))
    expected = weights(tmp_path / "cpu" / "student")
    for first, second in (("cuda", "cpu"), ("cpu", "cuda")):
        out = tmp_path / f"{first}-{second}"
        with on(first):
            stopped_run(place, out, kind, first, 2)
        with on(second):
            changed = recipe(place, out, stages=[stage(**RUNS[kind])], device=second)
            run(changed, resume=True)
        found = weights(out / "student")
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(found[name], value), (first, second, name)


def test_a_runs_loop_waits_once_a_logged_step(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Trainee.step

    def pinned(self: Trainee, batch: Batch, step: int) -> dict[str, Tensor]:
        assert batch.images.is_pinned() and batch.tokens.is_pinned() and self.model.logit_scale.device == GPU
        return real(self, batch, step)

    monkeypatch.setattr(Trainee, "step", pinned)
    for kind in ("manual", "auto"):
        chosen = recipe(place, tmp_path / kind, stages=[stage(**RUNS[kind] | {"steps": 6})], device="cuda")
        chosen = chosen.model_copy(update={"log_every": 3, "save_every": 100})
        with make_believe() as gpu:
            started, seen = loop.start(chosen), dict[int, int]()

            def count(event: dict[str, Any], gpu: MakeBelieve = gpu, seen: dict[int, int] = seen) -> None:
                if event["event"] in ("tick", "step"):
                    seen[event["step"]] = len(gpu.waits)

            started.listener = count
            loop.run(started)
        assert seen[2] == seen[1] and seen[3] == seen[2] + 1, [*map(str, gpu.waits)]
        assert seen[5] == seen[4] and seen[6] == seen[5] + 1, [*map(str, gpu.waits)]


def test_a_run_in_float16_leaves_out_what_overflows_and_says_so(place: Path, tmp_path: Path) -> None:
    out, settings = tmp_path / "run", {"precision": "float16"}
    chosen = recipe(place, out, stages=[stage(steps=8, student=SHAPE)], **settings)
    started, events = loop.start(chosen), list[dict[str, Any]]()
    broken = iter([False, True, True, False, False, True] + 20 * [False])
    real = Trainee.step

    def sometimes(self: Trainee, batch: Batch, step: int) -> dict[str, Tensor]:
        hooks = [self.model.visual.conv1.register_forward_hook(infinite)] if next(broken) else []
        try:
            return real(self, batch, step)
        finally:
            for hook in hooks:
                hook.remove()

    started.listener = events.append
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Trainee, "step", sometimes)
        results = loop.run(started)
    left_out = results[0]["skipped_steps"]
    assert left_out >= 3 and results[0]["steps"] == 8 and results[0]["samples"] == 8 * (8 + left_out)
    steps = [event for event in events if event["event"] == "step"]
    assert [event["step"] for event in steps] == [1, 2, 3, 4, 5, 6, 7, 8] and steps[-1]["skipped_steps"] == left_out
    # The schedule matches that of a run without overflows.
    assert [event["lr"] for event in steps] == [learning_rate(n, chosen.stages[0]) for n in range(8)]
    said = [event["text"] for event in events if event["event"] == "warning"]
    assert len(said) == left_out and all("overflowed in float16" in text for text in said)
    for line in (out / "metrics.jsonl").read_text().splitlines():
        strict(line)


def test_a_run_in_float16_resumes_to_the_bit(place: Path, tmp_path: Path) -> None:
    chosen = {"stages": [stage(**RUNS["manual"])], "precision": "float16"}
    run(recipe(place, tmp_path / "whole", **chosen))
    expected = weights(tmp_path / "whole" / "student")
    stopped_run(place, tmp_path / "cut", "manual", "cpu", 3, precision="float16")
    run(recipe(place, tmp_path / "cut", **chosen), resume=True)
    found = weights(tmp_path / "cut" / "student")
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_loss_that_is_no_number_leaves_the_last_checkpoint(place: Path, tmp_path: Path) -> None:
    """Nothing is logged between the last good checkpoint and the next one."""
    chosen = recipe(place, tmp_path / "run", stages=[stage(steps=20)], log_every=100, save_every=4)
    started, real = loop.start(chosen), Trainee.step

    def spoiled(self: Trainee, batch: Batch, step: int) -> dict[str, Tensor]:
        if step == 5:
            with torch.no_grad():
                self.model.logit_scale.fill_(math.nan)
                self.model.visual.proj.fill_(math.nan)
        return real(self, batch, step)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Trainee, "step", spoiled)
        with pytest.raises(ValueError, match=r"the loss of stage 50 is nan at step 6; samples .*is kept"):
            loop.run(started)
    last = tmp_path / "run" / "stages" / "50" / "last"
    assert json.loads((last / "checksums.json").read_text())["step"] == 4
    assert all(value.isfinite().all() for value in weights(last).values())


# --- commands -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders: three of six pictures."""
    folder = tmp_path_factory.mktemp("classes")
    for i in range(18):
        path = folder / ("apple", "dog", "bicycle")[i % 3] / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(grey(10 * i + 5))
    return folder


COMMANDS: dict[str, list[str]] = {
    "zero-shot": ["evaluate", "{teacher}", "{classes}", "--per-class", "--json"],
    "retrieval": ["evaluate", "{teacher}", "{data}", "--json"],
    "probe": ["probe", "{teacher}", "{classes}", "--solver", "torch", "--json"],
    "embed": ["embed", "{teacher}", "{data}", "--output", "{out}", "--json"],
    "classify": ["classify", "{teacher}", "{classes}/dog/1.png", "words", "caption", "--runtime", "torch", "--json"],
    "inherit": ["inherit", "{teacher}", "{out}", "--calibrate", "{data}", "--batches", "4", "--batch-size", "8"],
    "cache": ["cache", "{teacher}", "{data}", "--output", "{out}", "--workers", "0"],
    "index": ["index", "{teacher}", "{classes}", "--output", "{out}", "--json"],
}
# Different by nature, by bit order (checksums), or because the probe's GPU solver uses float32.
UNLIKE = {"vectors_state", "converged", "device", "images_per_s", "texts_per_s", "computed", "seconds"}


def assert_near(found: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name in expected.keys() - UNLIKE:
            assert_near(found[name], expected[name])
    elif isinstance(expected, list) and expected and isinstance(expected[0], dict | list):
        for mine, theirs in zip(found, expected, strict=True):
            assert_near(mine, theirs)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
    else:
        assert found == expected


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_on_the_gpu_say_what_they_say_on_the_cpu(
    command: str, place: Path, classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinyclip.evaluate.probe.STEPS", 20)
    outputs, files = {}, {}
    for device in ("cpu", "cuda"):
        out = tmp_path / device / "out"
        places = {"teacher": place / "teacher", "data": place / "data", "classes": classes, "out": out}
        arguments = [argument.format(**places) for argument in COMMANDS[command]]
        precision = "--precision" if command == "cache" else "--compute-dtype" if command == "embed" else "--dtype"
        arguments += [] if command == "inherit" else [precision, "float32"]
        with make_believe() as gpu:
            outputs[device] = said = commands.tinyclip(*arguments, "--device", device)
        if "--json" in arguments:
            outputs[device] = json.loads(said.replace(str(out), "OUT"))
        assert bool(gpu.waits) == (device == "cuda")  # the GPU was used
        files[device] = {p.name: p for p in out.rglob("*") if p.suffix in (".safetensors", ".parquet", ".npy")}
    if "--json" in COMMANDS[command]:
        assert_near(outputs["cuda"], outputs["cpu"])
    assert files["cpu"].keys() == files["cuda"].keys()
    assert bool(files["cpu"]) == (command in ("embed", "inherit", "cache"))
    for name, path in files["cpu"].items():
        for mine, theirs in zip(values(files["cuda"][name]), values(path), strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-3)


def values(path: Path) -> list[np.ndarray]:
    if path.suffix == ".parquet":
        return [np.stack(pyarrow.parquet.read_table(path)["features"].to_numpy())]
    return [np.load(path)] if path.suffix == ".npy" else [array for _, array in sorted(load_file(path).items())]


def test_a_loaded_model_encodes_and_measures_on_the_gpu(place: Path) -> None:
    words, pixels = ["caption words", "words"], torch.rand(2, 3, 16, 16)
    expected = tinyclip.load(place / "teacher")
    with make_believe(), torch.no_grad():
        clip = tinyclip.load(place / "teacher", device="cuda")
        assert clip.device == GPU and clip.computing["device"] == "cuda:0"
        image, text = clip.encode_image(pixels), clip.encode_text(words)
        assert image.device == text.device == GPU and clip.classify(pixels, words).device == GPU
        assert torch.equal(image.cpu(), expected.encode_image(pixels))
        assert torch.equal(text.cpu(), expected.encode_text(words))
        figures = tinyclip.measure(clip.model, seconds=0.01)
        assert figures["pairs_per_s"] > 0 and figures["device"] == "cuda:0"
        half = tinyclip.load(place / "teacher", device="cuda", dtype="auto")
        assert half.dtype == torch.bfloat16 and half.encode_text(words).device == GPU
        assert clip.fingerprint() == expected.fingerprint()
        compacted = tinyclip.compact(clip.model, {"visual.hidden": torch.ones(32).to("cuda")})
        assert compacted.logit_scale.device == GPU
    with make_believe(capability=(7, 5)):
        old = tinyclip.load(place / "teacher", device="cuda", dtype="auto")
        assert old.dtype == torch.float16 and old.encode_image(pixels).device == GPU


@pytest.mark.parametrize("score", ["taylor", "activation", "magnitude"])
@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_importance_and_masks_on_the_gpu_are_those_of_the_cpu(score: Any, kind: str) -> None:
    config = resnet_config() if kind == "resnet" else small_config()
    model = random_resnet(config) if kind == "resnet" else random_model(config, dtype=torch.float32)
    model = model.float().eval()
    pixels, tokens = random_inputs(config, torch.float32)
    how = Calibration(20.0, score=score, gates=kind == "vit", batches=4, rounds=2)

    def found(device: str) -> dict[str, Tensor]:
        placed = copy.deepcopy(model).to(device)
        batches = [Sample(pixels.to(device), tokens.to(device))] * 4
        return calibrate(placed, batches, {"both": 0.4}, how)

    expected = found("cpu")
    with make_believe():
        masks = found("cuda")
    assert masks.keys() == expected.keys() and all(torch.equal(masks[name], value) for name, value in expected.items())


def test_batch_norm_statistics_on_the_gpu_are_those_of_the_cpu() -> None:
    model = random_resnet(resnet_config()).float()
    pixels = torch.randn(6, 3, 64, 64)
    expected, found = copy.deepcopy(model), copy.deepcopy(model)
    reestimate(expected, pixels.split(2))
    with make_believe():
        found.to("cuda")
        reestimate(found, [part.to("cuda") for part in pixels.split(2)])
        for name, value in found.named_buffers():
            assert value.device == GPU and torch.equal(value.cpu(), expected.get_buffer(name)), name


def test_a_run_with_a_stored_teacher_on_the_gpu_is_that_of_the_cpu(place: Path, tmp_path: Path) -> None:
    teacher, cache, settings = tinyclip.load(place / "teacher"), tmp_path / "cache", {"workers": 0, "batch_size": 8}
    make_cache(teacher, "teacher", place / "data", cache, augment=Augment(), **settings)
    start = {"student": SHAPE, "augment": Augment().model_dump(mode="json"), "start": str(place / "teacher")}
    chosen: dict[str, Any] = {"teacher": {"cache": str(cache)}, "stages": [stage(**start)]}
    run(recipe(place, tmp_path / "cpu", **chosen))
    with make_believe():
        run(recipe(place, tmp_path / "cuda", **chosen | {"device": "cuda"}))
    expected, found = (weights(tmp_path / name / "student") for name in ("cpu", "cuda"))
    assert all(torch.equal(found[name], value) for name, value in expected.items())
