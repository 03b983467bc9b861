from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers.models import (
    TEXTS,
    filled,
    golden,
    images,
    random_inputs,
    random_masks,
    random_model,
    small_config,
    small_tokenizer,
    uneven_config,
)
from tinyclip.compress.inheritance import compact, describe, inherit, kept_blocks, prune_vocabulary
from tinyclip.inference.pipeline import tokenize
from tinyclip.model.axes import axis_sizes
from tinyclip.model.config import NAMED, CLIPConfig, TransformerConfig, vit_clip
from tinyclip.model.model import CLIP, cast

SMALL = small_config(vocab_size=60)  # image: 3 blocks, 4 heads, 128 neurons; text: 2 blocks, 3 heads, 96 neurons


def assert_same_features(cut: CLIP, model: CLIP, masks: dict[str, Tensor]) -> None:
    """Assert that `compact` changed no output, and that what it removed from the embedding was 0."""
    pixels, tokens = random_inputs(model.config)
    kept = masks["embed"] != 0 if "embed" in masks else torch.ones(model.config.embed_dim, dtype=torch.bool)
    pairs = [
        (cut.encode_image(pixels), model.encode_image(pixels, masks)),
        (cut.encode_text(tokens), model.encode_text(tokens, masks)),
    ]
    for actual, expected in pairs:
        assert not expected[:, ~kept].any()
        assert actual.shape == expected[:, kept].shape
        assert (actual - expected[:, kept]).norm() <= 1e-10 * expected.norm()


# --- the manual rule


def test_the_manual_student_is_the_authors() -> None:
    expected = golden("inherit-TinyCLIP-ViT-61M-32-Text-29M.json")
    teacher = filled(NAMED[expected["teacher"]], expected["salt"])
    student = inherit(teacher, NAMED[expected["student"]])
    state = student.state_dict()
    assert state.keys() == expected["tensors"].keys()
    for key, figures in expected["tensors"].items():
        flat = state[key].double().flatten()
        assert list(state[key].shape) == figures["shape"], key
        assert flat.sum().item() == pytest.approx(figures["sum"], rel=1e-6, abs=1e-6), key
        assert flat.norm().item() == pytest.approx(figures["norm"], rel=1e-6), key
        assert flat[:4].tolist() == figures["head"], key
        assert flat[-4:].tolist() == figures["tail"], key
    with torch.inference_mode():
        image_features, text_features, _ = student(images(student.config, expected["salt"]), tokenize(TEXTS))
    assert np.abs(image_features.numpy() - expected["image_features"]).max() < 1e-5
    assert np.abs(text_features.numpy() - expected["text_features"]).max() < 1e-5


@pytest.mark.parametrize(
    ("teacher", "student", "kept"),
    [
        (12, 6, [0, 2, 4, 6, 8, 10]),
        (12, 9, list(range(9))),
        (12, 10, list(range(10))),
        (12, 5, [0, 2, 4, 6, 8]),
        (12, 3, [0, 4, 8]),
        (6, 6, list(range(6))),
    ],
)
def test_kept_blocks(teacher: int, student: int, kept: list[int]) -> None:
    assert kept_blocks(teacher, student) == kept


def test_heads_are_sliced_one_by_one_and_the_teacher_stays() -> None:
    teacher = random_model(vit_clip(24, (4, 32), (4, 24), 8, image_size=32, head_dim=8, vocab_size=60))
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    student = inherit(teacher, vit_clip(16, (2, 16), (3, 8), 8, image_size=32, head_dim=8, vocab_size=60))
    source = before["visual.transformer.resblocks.2.attn.in_proj_weight"].view(3, 4, 8, 32)
    wanted = source[:, :2, :, :16].reshape(48, 16)
    assert torch.equal(student.visual.transformer.resblocks[1].attn.in_proj_weight, wanted)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.fill_(7)
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())


def test_a_student_may_differ_in_activation() -> None:
    teacher = random_model(SMALL)
    with pytest.warns(UserWarning, match="activation is quick_gelu, the teacher's gelu"):
        student = inherit(teacher, SMALL.model_copy(update={"activation": "quick_gelu"}))
    assert student.config.activation == "quick_gelu"
    assert all(torch.equal(value, teacher.state_dict()[key]) for key, value in student.state_dict().items())
    pixels, _ = random_inputs(SMALL)
    assert not torch.allclose(student.encode_image(pixels), teacher.encode_image(pixels))


def test_a_cut_model_can_be_a_teacher() -> None:
    teacher = random_model(uneven_config())
    student = inherit(teacher, teacher.config)
    assert_same_features(student, teacher, {})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"embed_dim": 25}, "embed 25 > 24"),
        ({"vision": (3, 40)}, "visual.hidden 40 > 32"),
        ({"vision": (3, 40)}, "visual.heads.0 5 > 4"),
        ({"vision": (3, 40)}, "visual.mlp.0 160 > 128"),
        ({"vision": (4, 32)}, "visual.layers 4 > 3"),
        ({"text": (2, 32)}, "text.hidden 32 > 24"),
        ({"text": (3, 24)}, "text.layers 3 > 2"),
        ({"context_length": 13}, "text.context 13 > 12"),
        ({"vocab_size": 59}, "text.vocab_size 59, not 60"),
        ({"head_dim": 4}, "visual.head_dim 4, not 8"),
        ({"head_dim": 4}, "text.head_dim 4, not 8"),
        ({"patch_size": 16}, "visual.patch_size 16, not 8"),
    ],
)
def test_a_misfit_is_named(changes: dict[str, Any], named: str) -> None:
    arguments = {"embed_dim": 24, "vision": (3, 32), "text": (2, 24), "patch_size": 8, "image_size": 32}
    student = vit_clip(**({"head_dim": 8, "context_length": 12, "vocab_size": 60} | arguments | changes))
    with pytest.raises(ValueError, match="does not fit into the teacher") as error:
        inherit(random_model(SMALL), student)
    assert named in str(error.value)


def test_another_family_and_a_missing_branch_are_named() -> None:
    with pytest.raises(ValueError, match="resnet student cannot inherit from a vit teacher"):
        inherit(random_model(SMALL), NAMED["TinyCLIP-ResNet-19M-Text-19M"])
    uneven = uneven_config()
    text = uneven.text.model_copy(update={"heads": (1, 2, 3)})
    with pytest.raises(ValueError, match=r"text\.attn\.0: the teacher has no such branch"):
        inherit(random_model(uneven), uneven.model_copy(update={"text": text}))


@pytest.mark.parametrize(("teacher_size", "student_size"), [(32, 48), (48, 32), (32, 32)])
def test_positions_are_interpolated_across_image_sizes(teacher_size: int, student_size: int) -> None:
    teacher = random_model(small_config(vocab_size=60, image_size=teacher_size))
    student = inherit(teacher, small_config(vocab_size=60, image_size=student_size))
    old, new = teacher.visual.positional_embedding, student.visual.positional_embedding
    side, target = teacher_size // 8, student_size // 8
    for channel in range(32):
        grid = old[1:, channel].view(1, 1, side, side)
        wanted = F.interpolate(grid, (target, target), mode="bicubic", antialias=True, align_corners=False)
        torch.testing.assert_close(new[1:, channel].view(target, target), wanted[0, 0], rtol=0, atol=1e-6)
    assert torch.equal(new[0], old[0])
    others = {key for key, value in student.state_dict().items() if torch.equal(value, teacher.state_dict()[key])}
    assert student.state_dict().keys() - others <= {"visual.positional_embedding"}
    assert student.encode_image(torch.zeros(1, 3, student_size, student_size, dtype=torch.float64)).shape == (1, 24)


def test_a_shorter_context_keeps_the_first_positions() -> None:
    teacher = random_model(SMALL)
    student = inherit(teacher, small_config(vocab_size=60, context_length=7))
    assert torch.equal(student.positional_embedding, teacher.positional_embedding[:7])
    _, tokens = random_inputs(SMALL)
    torch.testing.assert_close(student.encode_text(tokens[:, :7]), teacher.encode_text(tokens), rtol=0, atol=1e-12)


# --- pruning


@pytest.mark.parametrize("config", [SMALL, uneven_config()], ids=["equal", "uneven"])
@pytest.mark.parametrize("seed", range(8))
def test_a_cut_changes_no_output_and_can_be_repeated(config: CLIPConfig, seed: int) -> None:
    model = random_model(config, seed)
    masks = random_masks(config, seed)
    cut = compact(model, masks)
    assert_same_features(cut, model, masks)
    again = random_masks(cut.config, seed + 100)
    assert_same_features(compact(cut, again), cut, again)


def zeros(*names: str) -> dict[str, Tensor]:
    return {name: torch.zeros(axis_sizes(SMALL)[name]) for name in names}


@pytest.mark.parametrize(
    ("masks", "visual", "text"),
    [
        ({}, [(4, 128)] * 3, [(3, 96)] * 2),
        (zeros("visual.heads.1", "text.heads.0"), [(4, 128), (0, 128), (4, 128)], [(0, 96), (3, 96)]),
        (zeros("visual.mlp.0", "text.mlp.1"), [(4, 0), (4, 128), (4, 128)], [(3, 96), (3, 0)]),
        (zeros("visual.heads.2", "visual.mlp.2"), [(4, 128), (4, 128), (0, 0)], [(3, 96)] * 2),
        (zeros("visual.attn.0", "text.ffn.1"), [(None, 128), (4, 128), (4, 128)], [(3, 96), (3, None)]),
        (zeros("visual.attn.0", "visual.ffn.0", "text.attn.0", "text.ffn.0"), [(4, 128)] * 2, [(3, 96)]),
        (zeros("visual.attn.2", "visual.ffn.2", "text.attn.1", "text.ffn.1"), [(4, 128)] * 2, [(3, 96)]),
        (zeros("visual.attn.1", "visual.ffn.1", "visual.heads.2"), [(4, 128), (0, 128)], [(3, 96)] * 2),
        (zeros("visual.attn.1", "visual.heads.1"), [(4, 128), (None, 128), (4, 128)], [(3, 96)] * 2),
        (zeros("text.attn.0", "text.ffn.0", "text.attn.1", "text.ffn.1"), [(4, 128)] * 3, []),
        ({"visual.attn.1": torch.tensor([0.3]), "text.ffn.0": torch.tensor([2.5])}, [(4, 128)] * 3, [(3, 96)] * 2),
        (
            {"visual.heads.0": torch.tensor([1, 0, 0.5, 0]), "text.mlp.0": torch.arange(96) % 2},
            [(2, 128), (4, 128), (4, 128)],
            [(3, 48), (3, 96)],
        ),
    ],
)
def test_what_a_cut_leaves(
    masks: dict[str, Tensor], visual: list[tuple[int | None, int | None]], text: list[tuple[int | None, int | None]]
) -> None:
    model = random_model(SMALL)
    cut = compact(model, masks)
    for tower, blocks in ((cut.config.vision, visual), (cut.config.text, text)):
        assert isinstance(tower, TransformerConfig)
        assert list(zip(tower.heads, tower.mlp_width, strict=True)) == blocks
    assert_same_features(cut, model, masks)


def test_a_cut_keeps_dtype_and_mode_and_leaves_the_model_alone() -> None:
    model = random_model(SMALL, dtype=torch.float32).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    cut = compact(model, random_masks(SMALL, 0))
    assert {value.dtype for value in cut.state_dict().values()} == {torch.float32}
    assert cut.training
    assert not compact(model.eval(), {}).training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.requires_grad and p.is_leaf for p in cut.parameters())


@pytest.mark.parametrize(
    ("name", "mask", "message"),
    [
        ("visual.heads.3", torch.ones(4), "'visual.heads.3': the model has no such axis"),
        ("hidden", torch.ones(32), "'hidden': the model has no such axis"),
        ("visual.heads.0", torch.ones(5), r"'visual.heads.0': shape \(5,\), expected \(4,\)"),
        ("visual.attn.0", torch.tensor(1.0), r"'visual.attn.0': shape \(\), expected \(1,\)"),
        ("visual.hidden", torch.zeros(32), "'visual.hidden' removes everything"),
        ("text.hidden", torch.zeros(24), "'text.hidden' removes everything"),
        ("text.context", torch.zeros(12), "'text.context' removes everything"),
        ("text.vocab", torch.zeros(60), "'text.vocab' removes everything"),
        ("embed", torch.zeros(24), "'embed' removes everything"),
    ],
)
def test_a_bad_mask_is_named(name: str, mask: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compact(random_model(SMALL), {name: mask})


# --- the vocabulary


def test_a_pruned_vocabulary_is_exact_within_and_writes_everything_else() -> None:
    tokenizer = small_tokenizer()
    model = random_model(small_config(vocab_size=tokenizer.vocab_size))
    within, outside = ["the cat in", "her other ant", "on and on", ""], ["string theory", "日本", "shall 42!"]
    kept = tokenizer.kept_ids(within)
    pruned = tokenizer.pruned(kept)
    small = prune_vocabulary(model, kept)
    assert small.config.text.vocab_size == pruned.vocab_size == len(kept) < tokenizer.vocab_size
    expected = model.encode_text(torch.from_numpy(tokenizer(within)))
    actual = small.encode_text(torch.from_numpy(pruned(within)))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)
    assert small.encode_text(torch.from_numpy(pruned(outside))).isfinite().all()


def test_what_is_kept_for_people_with_open_and_closed_gates() -> None:
    masks = {
        "visual.attn.0": torch.ones(1),
        "visual.heads.0": torch.tensor([1.0, 0, 1, 0]),
        "visual.attn.1": torch.zeros(1),
    }
    rows = {row[0]: row[1:] for row in describe(SMALL, masks)}
    assert rows["visual heads of block 0"] == ["4", "2", "the first 2"]
    assert rows["visual heads of block 1"] == ["4", "0", "removed"]
    assert rows["visual heads of block 2"] == ["4", "4", "all"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_compact_keeps_the_dtype_of_every_weight(dtype: torch.dtype) -> None:
    for whole in (True, False):
        model = random_model(SMALL, dtype=torch.float32)
        model = model.to(dtype) if whole else cast(model, dtype)
        masks = {"visual.heads.0": torch.tensor([0.3] + [1.0] * (axis_sizes(SMALL)["visual.heads.0"] - 1))}
        small = compact(model, masks)
        before, after = model.state_dict(), small.state_dict()
        assert {key: value.dtype for key, value in after.items()} == {key: before[key].dtype for key in after}
        key = "visual.transformer.resblocks.0.attn.out_proj.weight"
        expected = before[key].to(torch.promote_types(dtype, torch.float32))
        expected[:, : SMALL.vision.head_dim] *= torch.tensor(0.3)
        assert torch.equal(after[key], expected.to(before[key].dtype))
