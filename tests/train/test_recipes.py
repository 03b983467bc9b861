"""The shipped recipes, `tinyclip plan` and the dry run."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.models import ROOT, small_config
from tinyclip.cli.live import _prefixed, plan_table
from tinyclip.cli.main import app
from tinyclip.model.axes import axis_table, count_parameters
from tinyclip.model.config import CLIPConfig, ResNetConfig, vit_clip
from tinyclip.model.costs import macs
from tinyclip.model.model import CLIP
from tinyclip.recipe.recipe import Recipe, load_recipe
from tinyclip.recipe.stage import Target
from tinyclip.train.plan import activation_bytes, expected_shape, memory, plan, step_macs
from tinyclip.train.setup import evaluator
from tinyclip.train.smoke import measured_speed, shortened, smoke
from tinyclip.zoo import catalogue

SMALL = vit_clip(32, (2, 64), (1, 64), 32)
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
BIG = [path for path in RECIPES if not path.stem.startswith("emoji")]
STEPS = re.compile(r"steps: (\d+)  # (\d+) epochs x ([\d,]+) pairs / ([\d,]+) a step")
# METHOD 6: parameters in millions (image, text), MACs in G (the published column).
PUBLISHED = {
    "vit-b-32-manual": [(61.4, 28.7, 5.3), (39.7, 19.2, 3.5)],
    "vit-39m-16-yfcc": [None, (38.6, 19.2, 9.5)],
    "vit-8m-16-yfcc": [None, (8.3, 2.5, 2.0)],
    "resnet-30m": [(29.6, 28.9, 6.9)],
    "resnet-19m": [(29.6, 28.9, 6.9), (18.6, 19.5, 4.4)],
}


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def recipe(stages: list[dict[str, Any]], **changes: Any) -> Recipe:
    data: dict[str, Any] = {"teacher": "nowhere", "teacher_shape": "ViT-B-32", "data": "nowhere", "output": "x"}
    return Recipe.model_validate(data | {"stages": stages} | changes)


# --- shipped recipes --------------------------------------------------------------------------------------------


def test_the_papers_recipes_are_there() -> None:
    assert {path.stem for path in BIG} == {"vit-b-32-auto", *PUBLISHED}


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_names_its_command_and_its_own_folder(path: Path) -> None:
    chosen = load_recipe(path)
    command = "distill" if chosen.teacher else "train"
    assert f"tinyclip {command} recipes/{path.name}" in chosen.description
    assert chosen.output == f"runs/{path.stem}"


@pytest.mark.parametrize("path", BIG, ids=lambda p: p.stem)
def test_arithmetic_of_a_big_recipe(path: Path) -> None:
    text, chosen = path.read_text(), load_recipe(path)
    found = STEPS.findall(text)
    assert len(found) == len(chosen.stages)
    for stage, (steps, epochs, pairs, batch) in zip(chosen.stages, found, strict=True):
        pairs, batch = int(pairs.replace(",", "")), int(batch.replace(",", ""))
        assert stage.steps == int(steps) == int(epochs) * pairs // batch and stage.batch_size == batch
        assert plan(chosen, samples=pairs)["stages"][0]["epochs"] == pytest.approx(int(epochs), rel=1e-4)
        resnet = "resnet" in path.stem
        assert (stage.optimizer.betas[1], stage.optimizer.eps) == ((0.999, 1e-8) if resnet else (0.98, 1e-6))
        assert (stage.optimizer.lr, stage.optimizer.weight_decay, stage.optimizer.grad_clip) == (1e-4, 0.2, 5)
        assert stage.optimizer.warmup_steps == (0 if stage.auto else 2000)
        assert (stage.loss.student_scale, stage.loss.teacher_scale, stage.loss.contrastive) == (50, 50, 0)
    for devices, held in re.findall(r"(\d+) (?:holds|hold) ([\d,]+) each", chosen.description):
        assert int(devices) * int(held.replace(",", "")) == chosen.stages[0].batch_size
    hours = plan(chosen, devices=32, tflops=100)["total"]["hours"]
    assert f"Time: {hours:.1f} hours on 32 devices at 100 sustained TFLOP/s" in chosen.description
    assert "--nproc-per-node 8" in chosen.description and "--nnodes 4" in chosen.description
    assert "published" in chosen.description and "not run by this project" in chosen.description


@pytest.mark.parametrize("name", PUBLISHED)
def test_manual_recipes_make_the_published_models(name: str) -> None:
    stages = plan(load_recipe(ROOT / "recipes" / f"{name}.yaml"))["stages"]
    for stage, published in zip(stages, PUBLISHED[name], strict=True):
        if published is not None:
            image, text, operations = published
            assert round(stage["params_image"] / 1e6, 1) == image and round(stage["params_text"] / 1e6, 1) == text
            counted = (stage["macs_image"] + stage["macs_text"]) / 1e9
            assert counted == pytest.approx(operations, rel=0.015)


def test_the_automatic_recipe_is_planned_near_the_published_sizes() -> None:
    chosen = load_recipe(ROOT / "recipes" / "vit-b-32-auto.yaml")
    assert [s.auto and (s.auto.target_sparsity, s.auto.steps) for s in chosen.stages] == [
        (0.25, 3000),
        (0.5, 5000),
        (0.75, 8000),
    ]
    published = [((63, 31), 5.6), ((45, 18), 3.7), ((22, 10), 1.9)]
    for stage, (sizes, operations) in zip(plan(chosen)["stages"], published, strict=True):
        assert stage["estimated"]
        assert (stage["params_image"] + stage["params_text"]) / 1e6 == pytest.approx(sum(sizes), rel=0.02)
        assert (stage["macs_image"] + stage["macs_text"]) / 1e9 == pytest.approx(operations, rel=0.02)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_smokes(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = set(ROOT.iterdir())
    chosen = load_recipe(path, ["workers=0"])
    results = smoke(chosen, small=True, evaluator=lambda data: evaluator(data, None))
    assert [r["stage"] for r in results] == [s.name for s in chosen.stages]
    assert all(r["seconds"] > 0 and "text" in r["shape"] for r in results)
    assert not list(tmp_path.glob("tinyclip*")) and set(ROOT.iterdir()) == before


def test_a_smoke_at_full_width_has_the_planned_shapes() -> None:
    chosen = load_recipe(ROOT / "recipes" / "emoji-50.yaml", ["workers=0"])
    planned = [stage["shape"] for stage in plan(chosen)["stages"]]
    assert [r["shape"] for r in smoke(chosen)] == planned == ["6 x 160, text 3 x 192", "6 x 128, text 2 x 192"]


# --- plan -------------------------------------------------------------------------------------------------------

FLOPS = {"student": {"like": "TinyCLIP-ViT-40M-32-Text-19M"}}


def test_operations_and_hours_are_sums_over_steps() -> None:
    chosen = recipe([{"name": "50", "steps": 10, "batch_size": 100} | FLOPS])
    result = plan(chosen, devices=4, tflops=0.5, samples=500)
    student, teacher = (1.9591e9 + 0.0395e9, 1.4870e9), (4.3726e9 + 0.0411e9, 2.9732e9)  # see test_measurement
    stage = result["stages"][0]
    assert stage["macs_image"] == pytest.approx(student[0], rel=0.01)
    expected = 2 * 1000 * (3 * (stage["macs_image"] + stage["macs_text"]) + sum(teacher))
    assert stage["flops"] == result["total"]["flops"] == pytest.approx(expected, rel=2e-3)
    assert stage["epochs"] == 2 and stage["samples"] == 1000
    assert stage["hours"] == pytest.approx(stage["flops"] / (4 * 0.5e12) / 3600)
    fixed = plan(chosen, devices=4, speed=lambda stage, config: 25.0)
    assert fixed["total"]["hours"] == pytest.approx(1000 / 100 / 3600)
    assert plan(chosen)["total"]["hours"] is None and plan(chosen)["total"]["epochs"] is None


def test_masked_steps_cost_what_the_start_costs() -> None:
    def flops(steps: int, masked: int) -> int:
        auto = {"target_sparsity": 0.5, "steps": masked}
        return plan(recipe([{"name": "a", "inherit": "auto", "auto": auto, "steps": steps}]))["total"]["flops"]

    later = flops(102, 99) - flops(101, 99)
    masked = later + flops(101, 100) - flops(101, 99)
    whole = plan(recipe([{"name": "a", "steps": 1}]))["total"]["flops"]  # a stage that changes nothing
    assert masked == whole > 1.5 * later


def test_one_tower_and_its_budget() -> None:
    both = {"name": "a", "inherit": "calibrated", "calibrated": {"target_sparsity": {"image": 0.5, "text": 0.25}}}
    split = plan(recipe([both | {"steps": 5}]))["stages"][0]
    one = {"name": "a", "inherit": "calibrated", "calibrated": {"target_sparsity": 0.5}, "towers": "image", "steps": 5}
    result = plan(recipe([one]))
    image, whole = result["stages"][0], result["teacher"]
    assert image["shape"].endswith("text 12 x 512") and image["params_text"] == whole["params_text"]
    assert split["params_image"] == image["params_image"] and split["params_text"] == pytest.approx(
        0.75 * whole["params_text"], rel=0.02
    )
    assert image["flops"] < split["flops"] and image["memory_bytes"]["optimizer"] == 8 * whole["params_image"]


@pytest.mark.parametrize("unit", ["params", "macs"])
def test_an_expected_shape_meets_its_target(unit: str) -> None:
    config = CLIPConfig.named("ViT-B-32")
    target = Target.model_validate({"target_sparsity": 0.5, "unit": unit})
    once = expected_shape(config, config, target)
    measure = macs if unit == "macs" else lambda c: count_parameters(axis_table(c))
    halves = (sum(measure(c)[tower] for tower in ("image", "text")) for c in (once, config))
    assert next(halves) == pytest.approx(0.5 * next(halves), rel=0.02)
    twice = expected_shape(once, config, target)
    assert twice == once, "what is gone counts from the original"


def saved_bytes(config: CLIPConfig, images: Tensor, tokens: Tensor, checkpointed: bool = False) -> int:
    """Return the bytes that autograd actually saves, excluding weights."""
    model, kept = CLIP(config), {}
    model.set_grad_checkpointing(checkpointed)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        features = model.encode_image(images), model.encode_text(tokens)
    assert len(features) == 2
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_activations_are_what_autograd_keeps(family: str) -> None:
    config = vit_clip(64, (4, 128), (3, 64), 8, image_size=64, head_dim=32, vocab_size=600, context_length=40)
    if family == "resnet":
        vision = ResNetConfig.model_validate({"layers": (2, 2, 2, 2), "width": 16, "image_size": 64})
        config = config.model_copy(update={"vision": vision})
    images, tokens = torch.randn(4, 3, 64, 64), torch.randint(599, (4, 40))
    real = saved_bytes(config, images, tokens)
    assert 4 * activation_bytes(config, "both", 4) == pytest.approx(real, rel=0.15)
    image, text = (activation_bytes(config, tower, 4) for tower in ("image", "text"))
    assert image + text == activation_bytes(config, "both", 4)
    # With checkpointing, autograd keeps the inputs of blocks, and later one more block.
    checkpointed = 4 * activation_bytes(config, "both", 4, True)
    kept = saved_bytes(config, images, tokens, checkpointed=True)
    if family == "vit":
        assert checkpointed == pytest.approx(kept + 4 * max(image / 4, text / 3), rel=0.1)
    assert 1.1 * kept < checkpointed < kept + 0.3 * real


def test_memory_is_divided_among_devices() -> None:
    chosen = recipe([{"name": "50", "steps": 10, "batch_size": 1000} | FLOPS])
    one, eight = (plan(chosen, devices=n)["stages"][0]["memory_bytes"] for n in (1, 8))
    parameters = 39_680_000 + 19_190_000 + 49408 * 512
    assert one["optimizer"] == 2 * one["gradients"] == pytest.approx(8 * parameters, rel=2e-3)
    assert one["activations"] == 8 * eight["activations"] and one["features"] == 8 * eight["features"]
    assert one["total"] == sum(v for k, v in one.items() if k != "total")
    full = plan(chosen.model_copy(update={"precision": "float32"}))["stages"][0]["memory_bytes"]
    assert full["activations"] > 1.5 * one["activations"] and full["weights"] < one["weights"]


def test_micro_batches_and_checkpointing_cost_time_and_spare_memory() -> None:
    entry = {"name": "50", "steps": 10, "batch_size": 1024} | FLOPS
    plain, micro, checkpointed, whole = (
        plan(recipe([entry | changes]), devices=2)["stages"][0]
        for changes in ({}, {"micro_batch": 64}, {"grad_checkpointing": True}, {"micro_batch": 512})
    )
    parts = [stage["memory_bytes"] for stage in (plain, micro, checkpointed)]
    assert parts[0]["activations"] == 8 * parts[1]["activations"] > 4 * parts[2]["activations"]
    assert {key for key in parts[0] if parts[0][key] != parts[1][key]} == {"activations", "total"}
    student = plain["macs_image"] + plain["macs_text"]
    teacher = sum(macs(CLIPConfig.named("ViT-B-32")).values())
    assert plain["flops"] == pytest.approx(2 * 10 * 1024 * (3 * student + teacher), rel=1e-9)
    for stage in (micro, checkpointed):  # one more forward pass of the student
        assert stage["flops"] == pytest.approx(plain["flops"] + 2 * 10 * 1024 * student, rel=1e-9)
    assert whole == plain  # a device has at most 512 pairs


def test_the_loss_takes_tiles() -> None:
    one = plan(recipe([{"name": "50", "steps": 10, "batch_size": 32768, "micro_batch": 256} | FLOPS]))["stages"][0]
    assert one["memory_bytes"]["loss"] < 1e9  # a single matrix would take 4.3e9


def test_what_is_absent_is_said() -> None:
    chosen = recipe([{"name": "a", "steps": 5, "start": "runs/none"}, {"name": "b", "steps": 5}])
    notes = plan(chosen)["notes"]
    assert "nowhere is not here: using the shape in teacher_shape" in notes[0]
    assert "runs/none, where stage a starts, is not here" in notes[1]
    late = {"name": "a", "steps": 5, "inherit": "auto", "auto": {"latency_ms": 3, "steps": 2}}
    assert "only a run can measure" in plan(recipe([late]))["notes"][1]


def test_masks_that_cannot_get_there_are_noted() -> None:
    masks = {"target_sparsity": 0.5, "steps": 75}
    slow, by_default = (
        plan(recipe([{"name": "a", "steps": 100, "inherit": "auto", "auto": masks | changes}]))["notes"][1:]
        for changes in ({"lr": 0.02}, {})
    )
    assert slow == [
        "stage a: 75 steps at auto.lr 0.02 move the masks only 25 % of the way, so the cut decides for them; use more "
        "auto.steps, or leave auto.lr out"
    ]
    assert not by_default


def test_a_teacher_that_is_here_gives_its_shape(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(small_config().model_dump_json())
    (tmp_path / "preprocess.json").write_text("{}")  # weights are not needed
    result = plan(recipe([{"name": "a", "steps": 5}], teacher=str(tmp_path)))
    assert result["teacher"]["shape"] == "3 x 32, text 2 x 24" and not result["notes"]


def test_a_name_of_the_zoo_gives_its_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(catalogue.CACHE_VARIABLE, str(tmp_path))
    manual, auto = catalogue.get("ViT-40M-32"), catalogue.get("ViT-22M-32")
    chosen = recipe([{"name": "a", "steps": 5, "start": "ViT-8M-16"}], teacher=manual.name, teacher_shape=None)
    result = plan(chosen)
    assert result["teacher"]["shape"] == "12 x 512, text 6 x 512" and not result["notes"]
    assert result["stages"][0]["shape"] == "10 x 256, text 3 x 256"
    chosen = recipe([{"name": "a", "steps": 5}], teacher=auto.name, teacher_shape=None)
    with pytest.raises(ValueError, match=r"no such checkpoint; put it there, or set `teacher_shape`"):
        plan(chosen)  # only its file gives the shape
    torch.save(CLIP(SMALL).state_dict(), tmp_path / auto.file)
    assert plan(chosen)["teacher"]["shape"] == "2 x 64, text 1 x 64"
    assert plan(recipe([{"name": "a", "steps": 5}], teacher="hf:org/name"))["teacher"]["shape"].startswith("12 x 768")


@pytest.mark.parametrize(
    ("change", "taught"),
    [
        ({"loss": {"affinity": 0, "image_affinity": 1, "text_affinity": 1}}, True),
        ({"loss": {"affinity": 0, "contrastive": 1}}, False),
        ({"loss": {"affinity": 0, "contrastive": 1}, "towers": "image"}, True),
    ],
)
def test_the_teacher_counts_where_it_is_asked(change: dict[str, Any], taught: bool) -> None:
    config = small_config()
    stage = recipe([{"name": "a", "steps": 5, "batch_size": 8} | change]).stages[0]
    counts = macs(config)
    trained = counts["image"] + (0 if stage.towers == "image" else counts["text"])
    assert step_macs(config, stage, config) == 3 * trained + (sum(counts.values()) if taught else 0)
    weights = sum(count_parameters(axis_table(config)).values())
    assert memory(config, stage, config, 8, 2)["teacher"] == (4 * weights if taught else 0)


@pytest.mark.parametrize("way", ["auto", "calibrated"])
def test_a_latency_is_tried_as_half_of_the_macs(way: str, tmp_path: Path) -> None:
    target = {"latency_ms": 3.0} | ({"steps": 2} if way == "auto" else {})
    stages = [{"name": name, "steps": 5, "inherit": way, way: target} for name in "ab"]
    short = shortened(recipe(stages, teacher_shape=small_config()), tmp_path, small=True)
    found = [stage.target and (stage.target.target_sparsity, stage.target.counted) for stage in short.stages]
    assert found == [(0.5, "macs"), (0.75, "macs")]


@pytest.mark.parametrize(("key", "there"), [("data", "templates"), ("templates", "data")])
def test_an_evaluation_that_is_not_here(key: str, there: str, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    evaluation = {key: str(tmp_path / "nowhere"), there: str(tmp_path / "x")}
    chosen = recipe([{"name": "a", "steps": 5}], evaluation=evaluation, teacher_shape=small_config())
    shortened(chosen, tmp_path / "absent", small=True)  # nor is the training data
    with pytest.raises(ValueError, match=rf"evaluation\.{key}: .*nowhere does not exist"):
        shortened(chosen.model_copy(update={"data": str(tmp_path / "x")}), tmp_path / "present", small=True)


def test_measured_speed_is_that_of_real_steps() -> None:
    chosen = recipe([{"name": "a", "steps": 5}], teacher_shape=small_config(), device="cpu")
    assert measured_speed(chosen, steps=1, pairs=4)(chosen.stages[0], small_config()) > 1
    assert plan(chosen, speed=measured_speed(chosen, steps=1, pairs=4))["total"]["hours"] > 0


# --- command line -----------------------------------------------------------------------------------------------


def command(*arguments: str) -> str:
    """Run the command in this process and return its output."""
    import io
    from contextlib import redirect_stdout

    out = io.StringIO()
    with redirect_stdout(out):
        app(list(arguments), standalone_mode=False)
    return out.getvalue()


def test_plan_prints_a_table_or_json() -> None:
    before = set(ROOT.iterdir()) | set((ROOT / "assets" / "emoji" / "train").iterdir())
    arguments = ("plan", "recipes/vit-b-32-manual.yaml", "--devices", "32", "--tflops", "100")
    table = command(*arguments, "--samples", "400000000")
    rows = [" ".join(line.split()) for line in table.splitlines()]
    assert "50 12 x 512, text 6 x 512 39.7 + 19.2 2 + 1.49 73,242 2.4 G 6.0 85.7 E 21.0 7.4" in rows
    assert rows[-1].startswith("note: checkpoints/ViT-B-32-laion2b_e16.bin is not here")
    figures = json.loads(command(*arguments, "--json"))
    assert figures["devices"] == 32 and figures["stages"][1]["params_image"] == 39_691_776
    assert "epochs" not in table.splitlines()[0] or figures["total"]["epochs"] is None
    assert set(ROOT.iterdir()) | set((ROOT / "assets" / "emoji" / "train").iterdir()) == before


def test_table_leaves_out_what_is_not_known() -> None:
    columns, rows = plan_table(plan(recipe([{"name": "a", "steps": 5}])))
    assert "hours" not in columns and "epochs" not in columns and len({len(r) for r in rows} | {len(columns)}) == 1
    assert [_prefixed(n) for n in (0, 7, 999.9, 1000, 2.4e9, 117e18)] == ["0", "7", "1 k", "1 k", "2.4 G", "117 E"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("plan", "recipes/emoji-50.yaml", "--tflops", "1", "--measure"), "only one of --tflops"),
        (
            ("plan", "recipes/emoji-50.yaml", "--set", "teacher=nowhere"),
            "nowhere: no such checkpoint; put it there, or",
        ),
        (("plan", "recipes/emoji-50.yaml", "--set", "stages.1.student.vision.width=999"), r"stages.1 \(50\): .*999"),
        (
            ("plan", "recipes/vit-b-32-auto.yaml", "--set", "teacher_shape=ViT-Z"),
            "teacher_shape: no model named 'ViT-Z'",
        ),
        (("plan", "recipes/emoji-teacher.yaml", "--set", "teacher_shape=RN50"), "teacher_shape: there is no teacher"),
        (("plan", "nowhere.yaml"), "no such recipe"),
        (("distill", "recipes/emoji-50.yaml", "--small"), "--small needs --smoke"),
        (("train", "recipes/emoji-50.yaml", "--smoke"), "has a teacher: use `tinyclip distill`"),
        (("distill", "recipes/emoji-50.yaml", "--smoke", "--set", "teacher=nowhere"), "no such checkpoint"),
    ],
)
def test_what_does_not_fit_is_named(arguments: tuple[str, ...], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        command(*arguments)


def test_smoke_ends_with_a_line_for_each_stage() -> None:
    lines = command("distill", "recipes/emoji-50.yaml", "--smoke", "--small").splitlines()
    assert [line.rpartition(", ")[0] for line in lines] == [
        "stage 75: ok, 6 x 40, text 3 x 48",
        "stage 50: ok, 6 x 32, text 2 x 48",
    ]
