"""Stages with `inherit: calibrated`, and `tinyclip inherit --calibrate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.runs import calibrated, recipe, run, stopped, weights
from tinyclip.cli import main
from tinyclip.compress.size import sparsity
from tinyclip.train import setup, stage_start
from tinyclip.zoo.checkpoint import load_checkpoint


def gone(place: Path, checkpoint: Path, *towers: Any) -> float:
    original = load_checkpoint(place / "teacher")[0].config
    return sparsity(load_checkpoint(checkpoint)[0].config, original, {}, towers, "params").item()


def test_two_stages_count_from_the_original(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    _, events = run(recipe(place, out, stages=[calibrated("75", 0.3), calibrated("50", 0.6, gates=True)]))
    for name, target in (("75", 0.3), ("50", 0.6)):
        assert target <= gone(place, out / "stages" / name / "last", "visual", "text") < target + 0.05
    cuts = [event for event in events if event["event"] == "cut"]
    assert [(event["stage"], event["step"]) for event in cuts] == [("75", 0), ("50", 0)]
    config = load_checkpoint(out / "stages" / "75" / "last")[0].config
    assert cuts[0]["kept"]["text.hidden"] == config.text.width


def test_a_stage_resumes_without_measuring_again(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(recipe(place, whole, stages=[calibrated()]))
    started = setup.start(recipe(place, parts, stages=[calibrated()]))
    stopped(started, 2)
    monkeypatch.setattr(stage_start, "calibrate", None)
    run(recipe(place, parts, stages=[calibrated()]), resume=True)
    one, two = weights(whole / "student"), weights(parts / "student")
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_one_tower_alone(place: Path, tmp_path: Path) -> None:
    run(recipe(place, tmp_path / "run", stages=[calibrated(towers="image")]))
    teacher, student = weights(place / "teacher"), weights(tmp_path / "run" / "student")
    kept = [key for key in teacher if not key.startswith("visual.") and key != "logit_scale"]
    assert all(torch.equal(teacher[key], student[key]) for key in kept)
    assert 0.5 <= gone(place, tmp_path / "run" / "student", "visual") < 0.55


def test_a_latency_is_aimed_at(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = lambda model: sum(p.numel() for p in model.transformer.parameters()) / 1000  # noqa: E731
    monkeypatch.setattr("tinyclip.compress.latency.pair_latency_ms", size)
    whole = size(load_checkpoint(place / "teacher")[0])
    wanted = calibrated(target=None, latency_ms=0.6 * whole)
    _, events = run(recipe(place, tmp_path / "run", stages=[wanted]))
    assert next(e for e in events if e["event"] == "latency")["latency_ms"] == 0.6 * whole
    assert size(load_checkpoint(tmp_path / "run" / "student")[0]) == pytest.approx(0.6 * whole, rel=0.25)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (
            [calibrated(target=0.9999)],
            r"stages.0 \(50\): target_sparsity 0.9999 of both towers cannot be reached",
        ),
        ([calibrated(target=0.0)], r"stages.0 \(50\): target_sparsity 0.0 of both towers needs no cut"),
    ],
)
def test_bad_targets_are_refused_before_anything_is_written(
    place: Path, tmp_path: Path, stages: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        setup.start(recipe(place, tmp_path / "run", stages=stages))
    assert not (tmp_path / "run").exists()


def inherit(*arguments: Any) -> None:
    main.app(["inherit", *map(str, arguments)], standalone_mode=False)


def test_inherit_by_importance(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--calibrate", place / "data", "--batch-size", 8, "--batches", 2, "--device", "cpu"]
    inherit(place / "teacher", tmp_path / "small", *options, "--target", 0.4, "--gates", "--align", 4)
    assert 0.4 <= gone(place, tmp_path / "small", "visual", "text") < 0.5
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert config["text"]["width"] % 4 == 0
    shown = capsys.readouterr().out
    assert "most important" in shown and "parameters before" in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--target", 1.5), "--calibrate: target_sparsity"),
        (("--unit", "bytes"), "--calibrate: unit"),
        (("--score", "luck"), "--calibrate: score"),
        (("--batches", 0), "--calibrate: batches"),
        (("--towers", "left"), "--towers left: choose both, image, text"),
        (("--batch-size", 1000), "batch size 1000 exceeds the 40 samples"),
        (("--shape", "text.layers=1"), "give one of --like, --shape and --calibrate"),
        (("--target", 0.9999), "cannot be reached"),
    ],
)
def test_inherit_refuses(place: Path, tmp_path: Path, options: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        inherit(place / "teacher", tmp_path / "small", "--calibrate", place / "data", "--device", "cpu", *options)
    assert not (tmp_path / "small").exists()
