"""Stages that learn masks, and stages that change one tower."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.runs import auto, calibrated, events_of, recipe, run, stage, stopped, vouch, weights
from tinyclip.compress.latency import fraction_for_latency
from tinyclip.compress.size import sparsity
from tinyclip.data.loader import shorten
from tinyclip.recipe.recipe import Recipe
from tinyclip.train import loop, stage_start
from tinyclip.train.pruner import MASKS, Pruner
from tinyclip.train.run import closing, loader_of
from tinyclip.train.step import Trainee
from tinyclip.zoo.checkpoint import load_checkpoint


def test_two_auto_stages_count_from_the_original(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    results, _ = run(recipe(place, out, stages=[auto("75", 0.3), auto("50", 0.6)]))
    assert [r["samples"] for r in results] == [128, 128]
    original = load_checkpoint(place / "teacher")[0].config
    found = []
    for name, target in (("75", 0.3), ("50", 0.6)):
        config = load_checkpoint(out / "stages" / name / "last")[0].config
        found.append(sparsity(config, original, {}, ("visual", "text"), "params").item())
        assert found[-1] == pytest.approx(target, abs=0.01)
        assert not (out / "stages" / name / "last" / MASKS).exists()
    assert found[0] < found[1]
    events = events_of(out)
    steps = [e for e in events if e["event"] == "step" and e["stage"] == "75"]
    assert [e["step"] for e in steps] == list(range(1, 17))
    assert all(("sparsity" in e) == (e["step"] <= 12) for e in steps)
    assert steps[3]["target_sparsity"]["both"] == pytest.approx(0.3)
    assert [e["step"] for e in events if e["event"] == "cut"] == [12, 12]
    assert [e["lr"] for e in steps][11] == pytest.approx(1e-4) and steps[-1]["lr"] < 2e-5
    assert [e["event"] for e in events].count("stage") == 2 and "resumed" not in [e["event"] for e in events]


@pytest.mark.parametrize(("step", "batches"), [(5, None), (5, 3), (12, None), (14, None)])
def test_an_auto_stage_resumes_in_the_middle(place: Path, tmp_path: Path, step: int, batches: int | None) -> None:
    """Stop while masks are learned, at the cut, and after it; the weights match those of an uninterrupted run."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    stages = [auto(target={"image": 0.4, "text": 0.5}, auto={"gates": True, "importance_batches": batches})]
    run(recipe(place, whole, stages=stages))
    started = loop.start(recipe(place, parts, stages=stages))
    stopped(started, step)
    assert (parts / "stages" / "50" / "last" / MASKS).exists() == (step <= 12)
    run(recipe(place, parts, stages=stages), resume=True)
    one, two = weights(whole / "student"), weights(parts / "student")
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    cut = [e for e in events_of(parts) if e["event"] == "cut"]
    assert cut == [e for e in events_of(whole) if e["event"] == "cut"]
    assert [e["step"] for e in events_of(parts) if e["event"] == "step"] == list(range(1, 17))


def test_masks_start_in_the_order_of_importance(place: Path, tmp_path: Path) -> None:
    """Masks that hardly move cut what measured importance would."""
    still = {"lr": 1e-9, "ramp_steps": 1, "steps": 1}
    run(recipe(place, tmp_path / "masks", stages=[auto(auto=still | {"importance_batches": 4})]))
    run(recipe(place, tmp_path / "equal", stages=[auto(auto=still)]))
    run(recipe(place, tmp_path / "measured", stages=[calibrated(batches=4)]))
    kept = {}
    for name in ("masks", "equal", "measured"):
        (cut,) = (e for e in events_of(tmp_path / name) if e["event"] == "cut")
        kept[name] = cut["kept"]
    apart = {n: sum(abs(kept[n][k] - kept["measured"][k]) for k in kept["measured"]) for n in ("masks", "equal")}
    assert apart["masks"] < apart["equal"] / 2


def test_the_cut_student_is_not_read_back(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another node may still see the disk as it was before the cut."""
    chosen = recipe(place, tmp_path / "run", stages=[auto()])
    started = loop.start(chosen)

    def read(*args: Any) -> None:
        raise AssertionError("read from the disk")

    def once_cut(event: dict[str, Any]) -> None:
        if event["event"] == "cut":
            monkeypatch.setattr(loop, "load_checkpoint", read)
            monkeypatch.setattr("tinyclip.train.resume.load_checkpoint", read)

    started.listener = once_cut
    (result,) = loop.run(started)
    assert result["samples"] == 16 * 8


@pytest.mark.parametrize("kind", ["manual", "auto", "none"])
@pytest.mark.parametrize("towers", ["image", "text"])
def test_the_other_tower_stays_the_teachers(place: Path, tmp_path: Path, towers: str, kind: str) -> None:
    shape = {"vision": {"width": 16}} if towers == "image" else {"text": {"layers": 1}}
    chosen = auto(towers=towers) if kind == "auto" else stage(student=shape, towers=towers, inherit=kind)
    run(recipe(place, tmp_path / "run", stages=[chosen]))
    teacher, student = weights(place / "teacher"), weights(tmp_path / "run" / "student")
    changed = [
        key for key, value in student.items() if key not in teacher or not torch.equal(value, teacher[key])
    ]  # fmt: skip
    assert changed and all(key.startswith("visual.") == (towers == "image") for key in changed if key != "logit_scale")
    kept = [key for key in teacher if key.startswith("visual.") == (towers == "text") and key != "logit_scale"]
    assert set(kept) <= set(student)


def test_a_target_that_is_missed_is_said(place: Path, tmp_path: Path) -> None:
    _, events = run(recipe(place, tmp_path / "run", stages=[auto(auto={"lr": 0.01})]))
    (warned,) = [e["text"] for e in events if e["event"] == "warning"]
    assert "masks ended at sparsity 0.0" in warned and "the target is 0.500: the cut removed the rest" in warned
    (cut,) = [e for e in events if e["event"] == "cut"]
    assert cut["removed"]["both"] == pytest.approx(0.5, abs=0.01) and cut["sparsity"]["both"] < 0.1
    teacher, student = (load_checkpoint(place)[0].config for place in (place / "teacher", tmp_path / "run" / "student"))
    left = sparsity(student, teacher, {}, ("visual", "text"), "params").item()
    assert left == pytest.approx(cut["removed"]["both"], abs=1e-6)


def test_a_shape_relative_to_one_that_is_yet_to_be_found_is_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"stages.1.student: the previous stage determines its own shape"):
        recipe(place, tmp_path / "run", stages=[auto("a"), stage("b", student={"text": {"layers": 1}})])
    run(recipe(place, tmp_path / "run", stages=[auto("a"), stage("b", student={})]))


def test_overflow_in_float16_changes_nothing(place: Path, tmp_path: Path) -> None:
    """Masks and multipliers share the gradient norm with the weights, so none of them may step."""
    started = loop.start(recipe(place, tmp_path / "run", stages=[auto()]))
    assert started.teacher is not None
    chosen, student = started.recipe.stages[0], stage_start.starting_student(started, 0, None)
    pruner = Pruner(student.config, started.teacher.model.config, chosen, {"both": 0.5}, 0)
    trainee = Trainee(student, chosen, started.teacher, started.tokenizer, started.preprocess, "float32", pruner)
    trainee.scaler = torch.amp.GradScaler("cpu")
    student.visual.proj.register_hook(lambda gradient: gradient * float("nan"))
    pruner.hard.clamp_()  # as after every step
    before = [p.detach().clone() for p in (*trainee.trained, *pruner.parameters())]
    loader = loader_of(started, 0)
    with closing(loader):
        trainee.step(next(iter(loader)), 0)
    after = [*trainee.trained, *pruner.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_an_untouched_tower_spares_its_computation_and_changes_nothing(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The teacher's text features equal the student's own, so the student does not compute them."""
    started = loop.start(
        recipe(place, tmp_path / "run", stages=[stage(student={"vision": {"width": 16}}, towers="image")])
    )
    student = stage_start.starting_student(started, 0, None)
    assert started.teacher is not None
    chosen = started.recipe.stages[0]
    trainee = Trainee(student, chosen, started.teacher, started.tokenizer, started.preprocess, "float32")
    loader = loader_of(started, 0)
    with closing(loader):
        batch = next(iter(loader))
    own = student.encode_text(shorten(batch.tokens, started.tokenizer.end_id, 12), normalize=True)
    monkeypatch.setattr(student, "encode_text", None)  # not to be called
    theirs = trainee.teacher.features(batch.images, batch.tokens)
    assert torch.equal(trainee.student(batch.images, batch.tokens, 0, theirs)["text"], own)
    trainee.step(batch, 0)


def test_a_later_stage_of_one_tower_needs_the_teachers_other_tower(place: Path, tmp_path: Path) -> None:
    both, image = stage("a"), stage("b", student={}, towers="image")
    with pytest.raises(ValueError, match=r"stages.1 \(b\): towers: image needs a start whose text tower is still"):
        loop.start(recipe(place, tmp_path / "run", stages=[both, image]))


def test_a_latency_is_found_by_trying() -> None:
    assert fraction_for_latency(lambda removed: 10 * (1 - removed), 5.0, tries=12) == pytest.approx(0.5, abs=1e-3)
    with pytest.raises(ValueError, match=r"latency_ms 0.01 cannot be reached: 0.3 with 97 %"):
        fraction_for_latency(lambda removed: 10 * (1 - removed), 0.01)
    with pytest.raises(ValueError, match=r"latency_ms 11 needs no cut: the model already takes 10"):
        fraction_for_latency(lambda removed: 10 * (1 - removed), 11)


def test_a_latency_as_target(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tinyclip.model.axes import axis_table, count_parameters

    def size(model: Any) -> float:
        counts = count_parameters(axis_table(model.config))
        return (counts["image"] + counts["text"]) / 1000

    monkeypatch.setattr(stage_start, "pair_latency_ms", size)
    whole = size(load_checkpoint(place / "teacher")[0])
    target = {"target_sparsity": None, "latency_ms": whole * 0.6, "lr": 0.8}
    run(recipe(place, tmp_path / "run", stages=[auto(auto=target)]))
    found = next(e for e in events_of(tmp_path / "run") if e["event"] == "latency")
    assert 0.2 < found["macs_removed"] < 0.8
    assert size(load_checkpoint(tmp_path / "run" / "student")[0]) < whole * 0.8


# --- errors


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (auto(auto={"steps": 16}), "auto.steps 16 must be below steps 16"),
        (auto(auto={"ramp_steps": 13}), "ramp_steps 13 exceeds steps 12"),
        (auto(auto={"latency_ms": 3.0}), "give either target_sparsity or latency_ms"),
        (auto(auto={"target_sparsity": 1.0}), "target_sparsity"),
        (auto(optimizer={"warmup_steps": 3}), "optimizer.warmup_steps: the learning rate rises while masks"),
        (auto(student={"vision": {"width": 16}}), "inherit: auto finds the student's shape; leave `student` out"),
        (auto(inherit="manual"), "`inherit: auto` and a section `auto` must be given together"),
        ({"name": "x", "steps": 5, "inherit": "calibrated"}, "`inherit: calibrated` and a section `calibrated`"),
        (auto(towers="image", target={"image": 0.4, "text": 0.5}), "one number, since towers is image"),
        (stage(towers="image"), "towers: image leaves the other tower as it is; leave student.text out"),
        (stage(towers="text", student={"embed_dim": 8}), "leave student.embed_dim out"),
    ],
)
def test_a_bad_stage_is_named(place: Path, tmp_path: Path, chosen: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe(place, tmp_path / "run", stages=[chosen])


def test_sparsity_must_rise_from_stage_to_stage(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"stages.1.auto.target_sparsity: 0.3 must exceed the 0.5"):
        recipe(place, tmp_path / "run", stages=[auto("a", 0.5), auto("b", 0.3)])


def test_masks_need_a_teacher(place: Path, tmp_path: Path) -> None:
    scratch = stage(inherit="none", loss={"affinity": 0, "contrastive": 1}, student={})
    changed = {
        "teacher": None,
        "model": "ViT-B-32",
        "stages": [scratch, auto("x", loss={"affinity": 0, "contrastive": 1})],
    }
    with pytest.raises(ValueError, match=r"stages.1.inherit: needs a teacher"):
        Recipe.model_validate(recipe(place, tmp_path / "run").model_dump() | changed)


def test_a_target_out_of_reach_names_the_stage(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"stages.0 \(50\): target_sparsity 0.9999 of both towers cannot be reached"):
        loop.start(recipe(place, tmp_path / "run", stages=[auto(target=0.9999)]))


def test_masks_that_overshot_are_cut_to_the_target(place: Path, tmp_path: Path) -> None:
    fast = {"lr": 1.0, "steps": 15}
    _, events = run(recipe(place, tmp_path / "run", stages=[auto("a", 0.3, auto=fast), auto("b", 0.35)]))
    warned = [e["text"] for e in events if e["event"] == "warning"]
    assert any("masks ended at" in text and "the target is 0.300: the cut kept more" in text for text in warned)
    removed = [e["removed"]["both"] for e in events if e["event"] == "cut"]
    assert removed == pytest.approx([0.3, 0.35], abs=0.01)


def test_a_target_that_the_last_stage_already_met_is_said(place: Path, tmp_path: Path) -> None:
    """A cut removes whole elements, so it may remove a little more than was asked for."""
    _, events = run(recipe(place, tmp_path / "first", stages=[auto("a", 0.3)]))
    (removed,) = [e["removed"]["both"] for e in events if e["event"] == "cut"]
    target = (0.3 + removed) / 2
    assert 0.3 < target < removed
    _, events = run(recipe(place, tmp_path / "run", stages=[auto("a", 0.3), auto("b", target)]))
    warned = [e["text"] for e in events if e["event"] == "warning"]
    assert any(f"is already removed; target_sparsity {target:.3f} removes no more" in text for text in warned)
    first, second = (load_checkpoint(tmp_path / name / "student")[0].config for name in ("first", "run"))
    assert first == second


def test_a_latency_out_of_reach_leaves_no_run(place: Path, tmp_path: Path) -> None:
    target = {"target_sparsity": None, "latency_ms": 1e-6}
    with pytest.raises(ValueError, match="latency_ms 1e-06 cannot be reached"):
        run(recipe(place, tmp_path / "run", stages=[auto(auto=target)]))
    assert not (tmp_path / "run").exists()


def test_masks_of_another_model_are_refused(place: Path, tmp_path: Path) -> None:
    chosen = recipe(place, tmp_path / "run", stages=[auto()])
    started = loop.start(chosen)
    stopped(started, 4)
    file = tmp_path / "run" / "stages" / "50" / "last" / MASKS
    from safetensors.torch import save_file

    save_file({"visual.hidden": torch.zeros(3)}, file, metadata={"targets": '{"both": 0.5}'})
    vouch(file.parent)
    with pytest.raises(ValueError, match="masks of another model"):
        run(chosen, resume=True)
    file.write_bytes(b"torn")
    vouch(file.parent)
    with pytest.raises(ValueError, match=MASKS):
        run(chosen, resume=True)
