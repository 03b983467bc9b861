from __future__ import annotations

import json
import math
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from tests.helpers.models import small_config
from tests.helpers.runs import events_of, recipe, run, stage, stopped, vouch, weights
from tests.helpers.shards import good, write_shard
from tinyclip.common.folders import recover
from tinyclip.data.loader import Batch, image_input, shorten
from tinyclip.inputs.tokenizer import clip_tokenizer
from tinyclip.inputs.transforms import Preprocess
from tinyclip.loss import affinity_loss, contrastive_loss
from tinyclip.model.model import CLIP
from tinyclip.recipe.recipe import Recipe
from tinyclip.recipe.stage import Stage
from tinyclip.teachers.teacher import Teacher
from tinyclip.train import loop
from tinyclip.train.resume import Interrupted
from tinyclip.train.step import Trainee, learning_rate, make_optimizer
from tinyclip.zoo.checkpoint import load_checkpoint


def test_two_stages_leave_checkpoints_metrics_and_a_student(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    results, _ = run(recipe(place, out))
    assert [r["stage"] for r in results] == ["75", "50"] and results[0]["samples"] == 40
    student, _, preprocess = load_checkpoint(out / "student")
    assert (student.config.vision.width, student.config.text.layers) == (16, 1) and preprocess.image_size == 16
    assert not (out / "stages" / "50" / "last" / "state.pt").exists()
    events = events_of(out)
    assert [e["step"] for e in events if e["event"] == "step"] == [1, 2, 3, 4, 5] * 2
    assert all(math.isfinite(e["loss"]) and e["affinity"] == e["loss"] for e in events if e["event"] == "step")


def test_distillation_lowers_the_loss_and_leaves_the_teacher_alone(place: Path, tmp_path: Path) -> None:
    before = weights(place / "teacher")
    shaped = stage(steps=60, optimizer={"lr": 3e-3}, loss={"student_scale": 50, "teacher_scale": 50})
    _, events = run(recipe(place, tmp_path / "run", stages=[shaped]))
    losses = [e["loss"] for e in events if e["event"] == "step"]
    assert np.mean(losses[-10:]) < np.mean(losses[:10]) - 0.02
    after = weights(place / "teacher")
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_an_inherited_student_starts_as_the_teachers_slice(place: Path, tmp_path: Path) -> None:
    tiny = stage(steps=1, optimizer={"lr": 1e-12, "weight_decay": 0})
    run(recipe(place, tmp_path / "run", stages=[tiny]))
    teacher, student = weights(place / "teacher"), weights(tmp_path / "run" / "student")
    key = "visual.conv1.weight"
    assert torch.allclose(student[key], teacher[key][:16], atol=1e-9)
    run(recipe(place, tmp_path / "random", stages=[tiny | {"inherit": "none"}], seed=7))
    assert not torch.allclose(weights(tmp_path / "random" / "student")[key], teacher[key][:16], atol=1e-3)


def test_every_term_trains_through_its_projection_and_resumes(place: Path, tmp_path: Path) -> None:
    terms = {"affinity": 1, "contrastive": 0.5, "feature": 2, "interactive": 1, "image_affinity": 1, "text_affinity": 1}
    shape = {"embed_dim": 12, "vision": {"width": 16}}
    stages = [stage(loss=terms, student=shape, steps=6, optimizer={"lr": 3e-3})]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    _, events = run(recipe(place, whole, stages=stages))
    for event in (e for e in events if e["event"] == "step"):
        assert event["loss"] == pytest.approx(sum(weight * event[name] for name, weight in terms.items()), rel=1e-5)
    started = loop.start(recipe(place, parts, stages=stages))
    stopped(started, 3)
    run(recipe(place, parts, stages=stages), resume=True)
    one, two = weights(whole / "student"), weights(parts / "student")
    assert all(torch.equal(one[k], two[k]) for k in one)


def judged(chosen: Recipe, stop_at: int | None, scores: dict[int, float], **options: Any) -> list[dict[str, Any]]:
    """Run with made-up evaluations; return all evaluations logged so far."""
    started = loop.start(chosen, **options)
    step = 0

    def follow(event: dict[str, Any]) -> None:
        nonlocal step
        step = event.get("step", step)
        if event["event"] == "step" and step == stop_at:
            os.kill(os.getpid(), signal.SIGINT)

    started.listener = follow
    started.evaluator = lambda *_: {"acc1": scores[step]}
    if stop_at is None:
        loop.run(started)
    else:
        with pytest.raises(Interrupted):
            loop.run(started)
    return [e for e in events_of(Path(chosen.output)) if e["event"] == "evaluation"]


@pytest.mark.parametrize("stop_at", [4, 5])
def test_evaluations_and_the_best_survive_a_stop(place: Path, tmp_path: Path, stop_at: int) -> None:
    """Including one that falls between the save and the evaluation."""
    chosen = recipe(place, tmp_path / "run", stages=[stage(steps=8)], evaluation={"data": "unused", "every": 2})
    scores = {2: 0.1, 4: 0.9, 6: 0.2, 8: 0.3}
    judged(chosen, stop_at, scores)
    found = judged(chosen, None, scores, resume=True)
    assert {e["step"]: e["acc1"] for e in found} == scores and len(found) == 4
    assert json.loads((tmp_path / "run" / "stages" / "50" / "result.json").read_text())["best_step"] == 4


def test_resuming_runs_nothing_from_the_run_folder(place: Path, tmp_path: Path) -> None:
    chosen = recipe(place, tmp_path / "run", stages=[stage()])
    started = loop.start(chosen)
    stopped(started, 3)
    state = tmp_path / "run" / "stages" / "50" / "last" / "state.pt"
    whole = torch.load(state, weights_only=True)

    class Hostile:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "ran"),)

    class HostileStorage:
        def __reduce__(self) -> Any:
            return torch.storage._load_from_bytes, (pickle.dumps(Hostile(), protocol=2),)

    def stored(value: Any) -> torch.Tensor:
        return torch.frombuffer(bytearray(pickle.dumps(value, protocol=4)), dtype=torch.uint8)

    def write(data: Any) -> None:
        torch.save(data, state)
        vouch(state.parent)

    hostile = stored(Hostile())
    ranks = [[whole["ranks"][0] | {"loader": loader}] for loader in (hostile, hostile[:9], stored(HostileStorage()))]
    for damaged in ({"optimizer": Hostile()}, *(whole | {"ranks": rank} for rank in ranks)):
        write(damaged)
        with pytest.raises(ValueError, match=r"state.pt: damaged"):
            run(chosen, resume=True)
        assert not (tmp_path / "ran").exists()
    write({"optimizer": {}})
    with pytest.raises(ValueError, match=r"state.pt: damaged \(no layout, masks, progress"):
        run(chosen, resume=True)


def test_a_run_with_a_decoding_process_resumes(place: Path, tmp_path: Path) -> None:
    """Its random state passes through torch's own pickling of tensors."""
    chosen = recipe(place, tmp_path / "run", stages=[stage()], workers=1)
    started = loop.start(chosen)
    stopped(started, 3)
    assert run(chosen, resume=True)[0][0]["steps"] == 5


def test_a_checkpoint_left_aside_by_a_kill_is_put_back(tmp_path: Path) -> None:
    (tmp_path / ".last.abc.old").mkdir()
    recover(tmp_path / "last")
    assert (tmp_path / "last").is_dir()
    (tmp_path / ".last.xyz.old").mkdir()
    recover(tmp_path / "last")
    assert (tmp_path / ".last.xyz.old").exists()


def test_a_stage_can_start_from_a_checkpoint_or_the_teacher(place: Path, tmp_path: Path) -> None:
    first = stage("first", steps=1)
    second = stage("second", steps=1, start="teacher", student={"text": {"layers": 1}})
    run(recipe(place, tmp_path / "a", stages=[first, second]))
    third = stage("third", steps=1, start=str(tmp_path / "a" / "student"), student={"vision": {"layers": 1}})
    run(recipe(place, tmp_path / "b", stages=[third]))
    config = load_checkpoint(tmp_path / "b" / "student")[0].config
    assert (config.vision.layers, config.vision.width, config.text.layers) == (1, 32, 1)


def test_training_from_scratch_makes_its_vocabulary(place: Path, tmp_path: Path) -> None:
    config = small_config(image_size=16).model_dump(mode="json")
    loss = {"affinity": 0, "contrastive": 1, "positives": "class"}
    scratch = stage(inherit="none", loss=loss, student={})
    chosen = recipe(place, tmp_path / "run", teacher=None, model=config, vocabulary="data", stages=[scratch])
    run(chosen)
    model, tokenizer, _ = load_checkpoint(tmp_path / "run" / "student")
    assert 514 < tokenizer.vocab_size < 700 and model.config.text.vocab_size == tokenizer.vocab_size
    words = clip_tokenizer().encode("caption")
    assert len(tokenizer.encode("caption")) == len(words)


def test_results_do_not_depend_on_an_interruption(place: Path, tmp_path: Path) -> None:
    """Ctrl-C in the middle, then --resume: the weights equal those of an uninterrupted run, bit for bit."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(recipe(place, whole))
    started = loop.start(recipe(place, parts))
    stopped(started, 3, "50")
    run(recipe(place, parts), resume=True)
    one, two = weights(whole / "student"), weights(parts / "student")
    assert all(torch.equal(one[k], two[k]) for k in one)
    steps = [(e["stage"], e["step"]) for e in events_of(parts) if e["event"] == "step"]
    assert steps == [(s, i) for s in ("75", "50") for i in range(1, 6)]


@pytest.mark.parametrize("names", [("float32", "float16"), ("float16", "bfloat16")])
def test_a_run_goes_on_in_the_precision_of_another_device(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, str]
) -> None:
    chosen = recipe(place, tmp_path / "run", stages=[stage()], precision="auto")
    monkeypatch.setattr("tinyclip.train.setup.best_precision", lambda device: names[0])
    started = loop.start(chosen)
    stopped(started, 3)
    monkeypatch.setattr("tinyclip.train.setup.best_precision", lambda device: names[1])
    (result,), events = run(chosen, resume=True)
    assert [e["step"] for e in events if e["event"] == "step"] == [4, 5]
    assert result["samples"] == 8 * (5 + result["skipped_steps"])  # a float16 overflow does not count as a step
    (warned,) = [e["text"] for e in events if e["event"] == "warning" and "overflowed" not in e["text"]]
    assert warned == f"resuming in {names[1]}, chosen for this device; earlier steps used {names[0]}"


def test_a_killed_run_goes_on_from_its_last_checkpoint(place: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    long = stage(steps=60)
    run(recipe(place, whole, stages=[long]))
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(place, killed, stages=[long]).model_dump(mode="json")))
    command = [sys.executable, "-m", "tinyclip", "distill", str(path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # sums depend on the number of threads
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    deadline = time.monotonic() + 120
    while not (killed / "stages" / "50" / "last").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (killed / "stages" / "50" / "last").exists()
    load_checkpoint(killed / "stages" / "50" / "last")
    run(recipe(place, killed, stages=[long]), resume=True)
    one, two = weights(whole / "student"), weights(killed / "student")
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_evaluation_keeps_the_best_and_the_last(place: Path, tmp_path: Path) -> None:
    scores = iter([0.1, 0.5, 0.2])
    chosen = recipe(place, tmp_path / "run", stages=[stage(steps=6)], evaluation={"data": "x", "every": 2})
    started = loop.start(chosen)
    started.evaluator = lambda model, tokenizer, preprocess: {"acc1": next(scores)}
    (result,) = loop.run(started)
    assert result["best_step"] == 4 and result["evaluation"] == {"acc1": 0.2}
    best, last = (weights(tmp_path / "run" / "stages" / "50" / kind) for kind in ("best", "last"))
    assert not torch.equal(best["visual.proj"], last["visual.proj"])


def test_a_loss_that_is_not_finite_stops_the_run(place: Path, tmp_path: Path) -> None:
    wild = stage(steps=50, optimizer={"lr": 1.0, "grad_clip": 1e30, "eps": 1e-30, "weight_decay": 1e20})
    with pytest.raises(ValueError, match=r"(loss|gradient) of stage 50 is \w+ at .*0.*a checkpoint from before"):
        run(recipe(place, tmp_path / "run", stages=[wild]))


def test_folders_are_not_overwritten_by_accident(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    chosen = recipe(place, out, stages=[stage(steps=1)])
    run(chosen)
    with pytest.raises(ValueError, match="--resume or replace it with --overwrite"):
        loop.start(chosen)
    for changes, named in (
        ({"stages": [stage(steps=2, optimizer={"lr": 1}, micro_batch=4)]}, "stages.0.steps, stages.0.optimizer.lr"),
        ({"stages": [stage(steps=1), stage("b")]}, "stages"),
        ({"evaluation": {"data": "x"}, "workers": 3}, "evaluation"),
    ):
        with pytest.raises(ValueError, match=rf"from a different recipe; the difference is in {named}$"):
            loop.start(recipe(place, out, **{"stages": [stage(steps=1)]} | changes), resume=True)
    with pytest.raises(ValueError, match="no run to resume"):
        loop.start(recipe(place, tmp_path / "new"), resume=True)
    assert not (tmp_path / "new").exists()
    results, events = run(chosen, resume=True)
    assert len(results) == 1 and not [e for e in events if e["event"] == "step"]
    other = recipe(place, out, stages=[stage(steps=2)])
    run(other, overwrite=True)
    with pytest.raises(ValueError, match="either --overwrite or --resume"):
        loop.start(other, overwrite=True, resume=True)
    with pytest.raises(ValueError, match=r"has no \.tinyclip\.json"):
        loop.start(recipe(place, place / "data"), overwrite=True)
    inside = recipe(place, out, stages=[stage(start=str(out / "student"), student={})])
    with pytest.raises(ValueError, match=r"student is inside .*run, which --overwrite would delete"):
        loop.start(inside, overwrite=True)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot write"):
        loop.start(recipe(place, tmp_path / "file" / "run"))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"data": "nowhere"}, "no such data folder"),
        ({"teacher": "nowhere"}, "teacher: nowhere: no such checkpoint"),
        ({"stages": [stage("big", student={"vision": {"width": 64}})]}, r"stages.0 \(big\): .*visual.hidden 64 > 32"),
        ({"stages": [stage(student={"like": "ViT-B-32"})]}, "does not fit into the teacher"),
        ({"stages": [stage(student={"like": "RN50"})]}, "a resnet student cannot inherit from a vit teacher"),
        ({"stages": [stage(student={"like": "nothing"})]}, "no model named"),
        (
            {"stages": [stage(student={"like": "ViT-B-32"}, inherit="none")]},
            "vocabulary has 49408 tokens",
        ),
        ({"stages": [stage(start="nowhere")]}, r"stages.0 \(50\): nowhere: no such checkpoint"),
    ],
)
def test_misfits_are_found_before_anything_is_written(
    place: Path, tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        loop.start(recipe(place, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_mostly_bad_data_is_one_clear_error(place: Path, tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    bad = [{"key": f"{i}", "jpg": b"junk", "txt": b"t"} for i in range(9)]
    write_shard(tmp_path / "bad" / "0.tar", bad)
    chosen = recipe(place, tmp_path / "run", data=str(tmp_path / "bad"))
    with pytest.raises(
        ValueError, match=r"^[^\n]*bad: 1,000 samples in a row are bad; the last: 0\.tar, \d: not a[^\n]*$"
    ):
        run(chosen)
    write_shard(tmp_path / "bad" / "0.tar", [*bad, good(1)])
    chosen = recipe(place, tmp_path / "run", data=str(tmp_path / "bad"), stages=[stage(steps=50)])
    with pytest.raises(
        ValueError, match=r"^[^\n]*bad: more than half of the samples are bad \(5\d\d corrupt_image\);[^\n]*$"
    ):
        run(chosen)


def test_skipped_samples_are_logged(place: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    samples = [good(i) for i in range(20)] + [{"key": "bad", "jpg": b"junk", "txt": b"t"}]
    write_shard(tmp_path / "data" / "0.tar", samples)
    results, _ = run(recipe(place, tmp_path / "run", data=str(tmp_path / "data"), stages=[stage(steps=8)]))
    lines = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert results[0]["skipped"] == len(lines) >= 2
    assert {(line["shard"], line["key"]) for line in lines} == {("0.tar", "bad")}


def test_the_loss_is_the_weighted_sum_of_its_terms(place: Path, tmp_path: Path) -> None:
    loss = {"affinity": 0.5, "contrastive": 2.0, "student_scale": "learned", "teacher_scale": 20, "positives": "class"}
    chosen = recipe(place, tmp_path / "run", stages=[stage(loss=loss)])
    started = loop.start(chosen)
    assert started.teacher is not None
    student = CLIP(started.configs[0]).eval()
    tokens = torch.from_numpy(started.tokenizer(["caption a", "words", "caption b", "words"], 12))
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    groups = torch.tensor([1, 2, 3, 2])
    trainee = Trainee(student, chosen.stages[0], started.teacher, started.tokenizer, started.preprocess, "float32")
    terms = trainee.backward(Batch(images, tokens, groups, list("abcd")), 0)
    x = image_input(images, started.preprocess)
    si, st, scale = student(x, tokens)
    ti, tt, _ = started.teacher.model(x, tokens)
    affinity = affinity_loss(si, st, ti, tt, scale, 20.0)
    contrastive = contrastive_loss(si, st, scale, groups)
    assert torch.allclose(terms["affinity"], affinity) and torch.allclose(terms["contrastive"], contrastive)
    assert torch.allclose(terms["loss"], 0.5 * affinity + 2 * contrastive)


def test_schedule_and_weight_decay() -> None:
    shaped = Stage(name="s", steps=110, optimizer={"lr": 2.0e-3, "warmup_steps": 10})  # type: ignore[arg-type]
    rates = [learning_rate(step, shaped) for step in range(110)]
    assert rates[0] == pytest.approx(2e-4) and rates[9] == rates[10] == pytest.approx(2e-3)
    assert rates[60] == pytest.approx(1e-3) and rates[-1] < 1e-6
    model = CLIP(small_config())
    decayed, plain = make_optimizer(model.parameters(), shaped).param_groups
    assert decayed["weight_decay"] == 0.2 and all(p.ndim >= 2 for p in decayed["params"])
    assert plain["weight_decay"] == 0 and any(p is model.logit_scale for p in plain["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))


def test_shorten_keeps_features_and_end_tokens() -> None:
    tokens = torch.tensor([[8, 1, 2, 9, 0, 0], [8, 3, 9, 0, 0, 0]])
    assert shorten(tokens, 9, 6).tolist() == [[8, 1, 2, 9], [8, 3, 9, 0]]
    assert shorten(tokens, 9, 3).tolist() == [[8, 1, 9], [8, 3, 9]]


def test_a_teacher_of_another_size_sees_resized_images() -> None:
    torch.manual_seed(0)
    teacher = Teacher(CLIP(small_config(image_size=32)), Preprocess(image_size=32))
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    tokens = torch.tensor([[5, 49407], [6, 49407]])
    features, _ = teacher.features(images, tokens)
    assert features.shape == (2, 24) and not features.requires_grad and teacher.scale.item() == pytest.approx(1 / 0.07)
    assert not teacher.model.training
