from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.golden import fill
from tests.helpers.models import TEXTS, filled, golden, images, random_inputs, random_model, small_config, uneven_config
from tinyclip.compress.budget import BUDGETS, fill_budget
from tinyclip.compress.inheritance import compact
from tinyclip.compress.learned_masks import (
    LARGEST,
    Constraint,
    HardConcrete,
    check_targets,
    deterministic_value,
    lagrangian,
    probability_kept,
    stretched_sample,
)
from tinyclip.compress.size import prunable_size, sparsity, tower_size
from tinyclip.inference.pipeline import tokenize
from tinyclip.model.axes import axis_sizes, axis_table
from tinyclip.model.config import NAMED, CLIPConfig, vit_clip
from tinyclip.model.model import CLIP

AUTO = golden("auto-ViT-B-32.json")
TEACHER = NAMED["ViT-B-32"]
THEIR_NAMES = {"hidden": "hidden", "heads": "heads", "mlp": "intermediate"}


def golden_masks(**options: Any) -> HardConcrete:
    """Return the golden file's log_alpha."""
    hard = HardConcrete(TEACHER, **options)
    with torch.no_grad():
        for key, entry in hard.log_alpha.items():
            tower, kind = key.split("_")
            blocks = list(entry) if isinstance(entry, nn.ParameterList) else [entry]
            shape = (len(blocks), len(blocks[0])) if kind != "hidden" else (len(entry),)
            values = torch.from_numpy(fill.log_alpha(tower, THEIR_NAMES[kind], shape, AUTO["salt"]))
            for block, row in zip(blocks, values.view(len(blocks), -1), strict=True):
                block.copy_(row)
    return hard


# --- the authors' results


@pytest.mark.parametrize("tower", ["visual", "text"])
def test_sizes_and_sparsity_are_the_authors(tower: Any) -> None:
    expected, hard = AUTO[tower], golden_masks()
    keep = {name: probability_kept(value) for name, value in hard.named_log_alpha()}
    assert prunable_size(TEACHER, tower, "params") == expected["prunable"]
    remaining = tower_size(TEACHER, TEACHER, keep, tower, "params").item()
    assert remaining == pytest.approx(expected["expected_remaining"], rel=1e-6)
    assert hard.expected_sparsity(tower).item() == pytest.approx(expected["expected_sparsity"], abs=1e-6)


@pytest.mark.parametrize("name", ["visual", "text", "both"])
def test_the_constraint_and_its_gradients_are_the_authors(name: Any) -> None:
    hard = golden_masks()
    constraint = Constraint(hard, {name: AUTO["target_sparsity"]}, AUTO["ramp_steps"])
    constraint.start = {name: AUTO["start_sparsity"]}
    term = constraint(hard, 400)
    term.backward()
    expected = AUTO["shared_budget"] if name == "both" else AUTO[name]
    assert constraint.target(name, 400) == pytest.approx(expected["target_sparsity_at_step_400"])
    assert term.item() == pytest.approx(
        expected["lagrangian" if name == "both" else "lagrangian_at_step_400"], rel=1e-5
    )
    if name == "both":
        assert hard.expected_sparsity().item() == pytest.approx(expected["expected_sparsity"], abs=1e-6)
        return
    for kind, theirs in THEIR_NAMES.items():
        entry = hard.log_alpha[f"{name}_{kind}"]
        rows = list(entry) if isinstance(entry, nn.ParameterList) else [entry]
        gradient = torch.cat([row.grad for row in rows])
        figures = expected["lagrangian_gradients"][theirs]
        assert gradient.norm().item() == pytest.approx(figures["norm"], rel=1e-5)
        assert gradient[:6].tolist() == pytest.approx(figures["head"], rel=1e-4)
    multipliers = constraint.multipliers[name].grad
    assert multipliers[0].item() == pytest.approx(expected["lagrangian_gradients"]["lambda_1"], rel=1e-5)
    assert multipliers[1].item() == pytest.approx(expected["lagrangian_gradients"]["lambda_2"], rel=1e-5)


@pytest.mark.parametrize("tower", ["visual", "text"])
def test_a_sample_is_the_authors_for_the_same_noise(tower: str) -> None:
    expected = np.array(AUTO[tower]["sampled_heads_for_uniform_of_default_rng_salt"])
    log_alpha = torch.from_numpy(fill.log_alpha(tower, "heads", expected.shape, AUTO["salt"]))
    noise = np.random.default_rng(AUTO["salt"]).uniform(1e-6, 1 - 1e-6, expected.shape).astype(np.float32)
    assert np.abs(stretched_sample(log_alpha, torch.from_numpy(noise)).numpy() - expected).max() < 1e-5


@pytest.mark.parametrize("tower", ["visual", "text"])
def test_deterministic_masks_are_the_authors(tower: str) -> None:
    masks, expected = golden_masks().deterministic(), AUTO[tower]
    hidden = masks[f"{tower}.hidden"]
    assert hidden.nonzero().flatten().tolist() == expected["kept_hidden_indices"]
    assert hidden.tolist() == pytest.approx(expected["hidden_values"], abs=1e-6)
    for i in range(12):
        heads, mlp = masks[f"{tower}.heads.{i}"], masks[f"{tower}.mlp.{i}"]
        assert (int(heads.count_nonzero()), int(mlp.count_nonzero())) == (
            expected["kept_heads"][i],
            expected["kept_intermediate"][i],
        )
        assert heads.tolist() == pytest.approx(expected["heads_values"][i], abs=1e-6)
    head = expected["intermediate_row0_head"]
    assert masks[f"{tower}.mlp.0"][: len(head)].tolist() == pytest.approx(head, abs=1e-6)


def test_masked_features_and_the_cut_layout_are_the_authors() -> None:
    model, masks = filled(TEACHER, AUTO["salt"]), golden_masks().deterministic()
    pixels, tokens = images(TEACHER, AUTO["salt"]), tokenize(TEXTS)
    cut = compact(model, masks)
    layout = {key: tuple(shape) for key, shape in AUTO["layout"].items()}
    assert {key: entry.shape for key, entry in axis_table(cut.config).items()} == layout
    with torch.inference_mode():
        for features, name in (
            (model.encode_image(pixels, masks, normalize=True), "image_features"),
            (model.encode_text(tokens, masks, normalize=True), "text_features"),
            (cut.encode_image(pixels, normalize=True), "image_features"),
            (cut.encode_text(tokens, normalize=True), "text_features"),
        ):
            assert np.abs(features.numpy() - AUTO[name]).max() < 1e-5


# --- properties


@pytest.mark.parametrize("config", [small_config(vocab_size=60), uneven_config()], ids=["equal", "uneven"])
@pytest.mark.parametrize("gates", [False, True])
def test_masks_fit_any_model_and_the_cut_is_exact(config: CLIPConfig, gates: bool) -> None:
    model, hard = random_model(config), HardConcrete(config, gates=gates).double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, value in hard.named_log_alpha():
            value.copy_(torch.randn(value.shape, generator=generator) * 3)
        for tower in ("visual", "text"):
            hard.log_alpha[f"{tower}_hidden"][:3] = 4
    pixels, tokens = random_inputs(config)
    for masks in (hard.deterministic(), hard.sample(generator)):
        masks = {name: value.detach() for name, value in masks.items()}
        wanted = set(axis_sizes(config)) - {"embed", "text.context", "text.vocab"}
        assert set(masks) == {
            n for n in wanted if axis_sizes(config)[n] and (gates or n.split(".")[1] not in ("attn", "ffn"))
        }
        cut = compact(model, masks)
        for ours, theirs in (
            (cut.encode_image(pixels), model.encode_image(pixels, masks)),
            (cut.encode_text(tokens), model.encode_text(tokens, masks)),
        ):
            assert (ours - theirs).norm() <= 1e-10 * theirs.norm()


def test_a_sample_is_kept_as_often_as_its_probability_says() -> None:
    hard = HardConcrete(small_config(vocab_size=60))
    with torch.no_grad():
        hard.log_alpha["visual_mlp"][1].copy_(torch.linspace(-4, 4, 128))
    generator = torch.Generator().manual_seed(0)
    kept = torch.stack([hard.sample(generator)["visual.mlp.1"] != 0 for _ in range(2000)]).float().mean(0)
    expected = probability_kept(hard.log_alpha["visual_mlp"][1])
    assert (kept - expected).abs().max() < 0.05


def test_the_same_generator_gives_the_same_masks() -> None:
    hard = HardConcrete(small_config(vocab_size=60))
    with torch.no_grad():
        hard.log_alpha["text_hidden"].zero_()
    one, two, other = (hard.sample(torch.Generator().manual_seed(seed))["text.hidden"] for seed in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, other)


def test_fresh_masks_keep_everything() -> None:
    config = small_config(vocab_size=60)
    hard = HardConcrete(config, gates=True)
    assert all((mask > 0.99).all() for mask in hard.deterministic().values())
    assert abs(hard.expected_sparsity().item()) < 0.02


def test_the_clamp_leaves_a_head_and_145_neurons() -> None:
    """METHOD of the paper's code: P(kept) is never below 0.047."""
    hard = HardConcrete(TEACHER, towers=("visual",))
    with torch.no_grad():
        for _, value in hard.named_log_alpha():
            value.fill_(-50)
    hard.clamp_()
    masks = hard.deterministic()
    assert all(value.abs().max() <= LARGEST for _, value in hard.named_log_alpha())
    assert int(masks["visual.heads.0"].count_nonzero()) == 1
    assert int(masks["visual.mlp.0"].count_nonzero()) == 145


@pytest.mark.parametrize("align", [1, 8, 16])
def test_kept_counts_are_rounded_up(align: int) -> None:
    values = torch.linspace(-3, 3, 100)
    kept = int(deterministic_value(values, align).count_nonzero())
    plain = int(deterministic_value(values).count_nonzero())
    assert kept % align == 0 and plain <= kept < plain + align
    assert int(deterministic_value(torch.full((5,), 10.0), 8).count_nonzero()) == 5


@pytest.mark.parametrize("unit", ["params", "macs"])
def test_a_cut_students_sparsity_is_what_its_masks_said(unit: Any) -> None:
    config = small_config(vocab_size=60)
    masks = {"visual.hidden": torch.ones(32), "visual.heads.1": torch.zeros(4), "text.mlp.0": torch.ones(96)}
    masks["visual.hidden"][:8] = 0
    masks["text.mlp.0"][:90] = 0
    cut = compact(random_model(config), masks).config
    for towers in (("visual",), ("text",), ("visual", "text")):
        before = sparsity(config, config, masks, towers, unit)
        after = HardConcrete(cut, config, unit=unit)
        start = sparsity(cut, config, {}, towers, unit)
        assert start.item() == pytest.approx(before.item(), abs=1e-6)
        name = towers[0] if len(towers) == 1 else "both"
        assert after.expected_sparsity(name).item() == pytest.approx(start.item(), abs=0.01)


def test_macs_are_those_that_are_measured() -> None:
    from tinyclip.model.costs import macs

    config = uneven_config()
    blocks = {tower: prunable_size(config, tower, "macs") for tower in ("visual", "text")}
    vision, text = config.vision, config.text
    ends = {
        "visual": vision.grid**2 * vision.width * 3 * vision.patch_size**2 + vision.width * config.embed_dim,
        "text": text.width * config.embed_dim,
    }
    whole = {"visual": macs(config)["image"], "text": macs(config)["text"]}
    assert {tower: blocks[tower] + ends[tower] for tower in blocks} == whole


def test_a_gate_takes_its_whole_branch() -> None:
    config = small_config(vocab_size=60)
    closed = {"visual.attn.0": torch.zeros(1), "visual.ffn.0": torch.zeros(1)}
    two_of_three = tower_size(config, config, closed, "visual", "params")
    assert two_of_three.item() == pytest.approx(tower_size(config, config, {}, "visual", "params").item() * 2 / 3)


def test_the_multipliers_ascend_only_while_something_is_missing() -> None:
    multipliers = torch.tensor([10.0, 10.0], requires_grad=True)
    lagrangian(torch.tensor(0.8), 0.75, multipliers).backward()
    assert multipliers.grad.tolist() == [0, 0]
    assert lagrangian(torch.tensor(0.5), 0.75, multipliers).item() == pytest.approx(10 * 0.25 + 10 * 0.0625)


# --- errors


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ({"both": 0.9999}, "target_sparsity 0.9999 of both towers cannot be reached: masks can remove at most 0.9"),
        ({"visual": 0.999}, "of the image tower cannot be reached"),
        ({"text": 0.0}, "of the text tower needs no cut"),
    ],
)
def test_a_target_out_of_reach_is_an_error(targets: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_targets(HardConcrete(small_config(vocab_size=60)), targets)


def test_a_target_that_is_already_passed_is_an_error() -> None:
    config = small_config(vocab_size=60)
    cut = compact(random_model(config), {"visual.hidden": (torch.arange(32) < 8).float()}).config
    with pytest.raises(ValueError, match=r"needs no cut: 0.7\d+ of the teacher has already been removed"):
        check_targets(HardConcrete(cut, config), {"visual": 0.5})


def test_a_resnet_takes_no_learned_masks() -> None:
    with pytest.raises(ValueError, match="resnet image tower cannot learn masks"):
        HardConcrete(NAMED["RN50"])
    assert not math.isnan(HardConcrete(NAMED["RN50"], towers=("text",)).expected_sparsity("text").item())


# --- the cut to an exact size


def half_trained(config: CLIPConfig, **options: Any) -> HardConcrete:
    """Return masks that have moved a little from the clamp, where most still are."""
    hard, generator = HardConcrete(config, **options), torch.Generator().manual_seed(3)
    hard.clamp_()
    with torch.no_grad():
        for _, value in hard.named_log_alpha():
            value.sub_(torch.randn(value.shape, generator=generator).clamp(min=0))
    return hard


@pytest.mark.parametrize("align", [1, 8])
@pytest.mark.parametrize("gates", [False, True])
@pytest.mark.parametrize("unit", ["params", "macs"])
@pytest.mark.parametrize(
    ("towers", "targets"),
    [
        (("visual", "text"), {"both": 0.5}),
        (("visual", "text"), {"both": 0.9}),
        (("visual", "text"), {"visual": 0.3, "text": 0.7}),
        (("visual",), {"visual": 0.75}),
        (("text",), {"text": 0.25}),
    ],
)
def test_a_budget_is_met(towers: Any, targets: dict[str, float], unit: Any, gates: bool, align: int) -> None:
    teacher = vit_clip(64, (6, 96), (4, 64), 8, image_size=32, head_dim=8, vocab_size=100, context_length=16)
    hard = half_trained(teacher, towers=towers, unit=unit, gates=gates)
    masks = hard.budgeted(targets, align)
    student = compact(CLIP(teacher), masks).config
    for name, target in targets.items():
        left = sparsity(student, teacher, {}, BUDGETS[name], unit).item()
        assert left == pytest.approx(target, abs=0.01)


def test_a_budget_keeps_the_most_probable_at_their_values() -> None:
    config = small_config()
    hard = half_trained(config)
    masks, values = hard.budgeted({"both": 0.4}), dict(hard.named_log_alpha())
    for name in ("visual.mlp.0", "visual.hidden", "text.hidden"):
        kept = masks[name] > 0
        assert 0 < kept.sum() < len(kept) and values[name][kept].min() >= values[name][~kept].max() - 1e-5
        untouched = hard.deterministic()[name]
        both = kept & (untouched > 0)
        assert torch.equal(masks[name][both], untouched[both])


@pytest.mark.parametrize("unit", ["params", "macs"])
def test_masks_that_start_from_importance_are_cut_by_it(unit: Any) -> None:
    """As far as the cost of an element does not change during the cut."""
    config, generator = small_config(), torch.Generator().manual_seed(0)
    hard = HardConcrete(config, unit=unit)
    importance = {name: torch.rand(len(value), generator=generator) for name, value in hard.named_log_alpha()}
    hard.start_from(importance)
    values = dict(hard.named_log_alpha())
    assert torch.cat(list(values.values())).min() == 0 and torch.cat(list(values.values())).max() < LARGEST
    for name, value in values.items():
        assert torch.equal(value.argsort(), importance[name].argsort())
    ours, theirs = hard.budgeted({"both": 0.1}), fill_budget(importance, config, {"both": 0.1}, unit=unit)
    same = torch.cat([(ours[name] > 0) == (theirs[name] > 0) for name in importance])
    assert same.float().mean() > 0.97


def test_equal_masks_thin_all_axes_alike() -> None:
    config = vit_clip(64, (4, 96), (4, 64), 8, image_size=32, head_dim=8, vocab_size=100, context_length=16)
    hard = HardConcrete(config)
    hard.clamp_()
    masks = hard.budgeted({"both": 0.5})
    shares = [(mask > 0).float().mean().item() for name, mask in masks.items() if "heads" not in name]
    assert max(shares) - min(shares) < 0.05
    assert all((mask > 0).int().diff().max() <= 0 for mask in masks.values())  # the last of each axis went
