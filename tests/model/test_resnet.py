from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers.models import (
    TEXTS,
    filled,
    golden,
    images,
    random_inputs,
    random_resnet,
    resnet_config,
    small_config,
)
from tinyclip.compress.batch_norm import batch_norms
from tinyclip.compress.inheritance import compact, describe, inherit, manual_masks
from tinyclip.inference.pipeline import tokenize
from tinyclip.inputs.tokenizer import clip_tokenizer
from tinyclip.inputs.transforms import Preprocess
from tinyclip.model.axes import axis_kind, axis_sizes, axis_table, count_parameters
from tinyclip.model.config import NAMED, CLIPConfig, ResNetConfig, resnet_tower
from tinyclip.model.costs import macs
from tinyclip.model.model import CLIP, cast
from tinyclip.model.speed import measure
from tinyclip.recipe.recipe import shape_from
from tinyclip.zoo.checkpoint import load_checkpoint, save_checkpoint

NAME = "TinyCLIP-ResNet-19M-Text-19M"


def cut_config() -> CLIPConfig:
    """Return a ResNet CLIP config as calibrated pruning leaves it: no two sizes are equal."""
    fields = {"stem": (3, 5, 4), "channels": (7, 9, 12, 10), "heads": 3}
    fields |= {"conv1": ((2,), (5, 3), (4, 6, 1), (8,)), "conv2": ((6,), (1, 4), (5, 2, 3), (7,))}
    return resnet_config(vision={"image_size": 75, "head_dim": 5} | fields)


def zero_one_masks(config: CLIPConfig, seed: int) -> dict[str, Tensor]:
    """Return random masks of 0 and 1 on every axis of the image tower and the embedding, including whole blocks."""
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for name, size in axis_sizes(config).items():
        if name.startswith("visual.") or name == "embed":
            masks[name] = (torch.rand(size, generator=generator) < 0.6).double()
            if axis_kind(name) != "block":
                masks[name][int(torch.randint(size, (1,), generator=generator))] = 1
    return masks


# --- the model


def test_features_and_layout_are_the_authors() -> None:
    expected = golden(f"forward-{NAME}.npz")
    model = filled(NAMED[NAME], int(expected["salt"]))
    layout = {key: tuple(shape) for key, shape in golden(f"layout-{NAME}.json").items()}
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == layout
    with torch.inference_mode():
        image_features, text_features, _ = model(
            images(model.config, int(expected["salt"])), torch.from_numpy(expected["tokens"])
        )
    assert np.abs(image_features.numpy() - expected["image_features"]).max() < 1e-6
    assert np.abs(text_features.numpy() - expected["text_features"]).max() < 1e-6


def test_the_manual_student_is_the_authors() -> None:
    expected = golden(f"inherit-{NAME}.json")
    student = inherit(filled(NAMED["RN50"], expected["salt"]), NAMED[NAME])
    state = {k: v for k, v in student.state_dict().items() if not k.endswith("num_batches_tracked")}
    assert state.keys() == expected["tensors"].keys()
    for key, figures in expected["tensors"].items():
        flat = state[key].double().flatten()
        assert list(state[key].shape) == figures["shape"], key
        assert flat.sum().item() == pytest.approx(figures["sum"], rel=1e-6, abs=1e-6), key
        assert flat.norm().item() == pytest.approx(figures["norm"], rel=1e-6), key
        assert flat[:4].tolist() == figures["head"] and flat[-4:].tolist() == figures["tail"], key
    with torch.inference_mode():
        image_features, text_features, _ = student(images(student.config, expected["salt"]), tokenize(TEXTS))
    assert np.abs(image_features.numpy() - expected["image_features"]).max() < 1e-6
    assert np.abs(text_features.numpy() - expected["text_features"]).max() < 1e-6


@pytest.mark.parametrize(
    ("name", "image", "text", "gmacs"),
    [("TinyCLIP-ResNet-30M-Text-29M", 29.6, 28.9, 6.9), (NAME, 18.6, 19.5, 4.4)],
)
def test_published_figures(name: str, image: float, text: float, gmacs: float) -> None:
    config = NAMED[name]
    counts = count_parameters(axis_table(config))
    assert counts["image"] / 1e6 == pytest.approx(image, abs=0.05)
    assert counts["text"] / 1e6 == pytest.approx(text, abs=0.05)
    assert sum(macs(config).values()) / 1e9 == pytest.approx(gmacs, abs=0.05)


@pytest.mark.parametrize("config", [resnet_config(), cut_config()], ids=["equal", "cut"])
def test_macs_are_what_torch_counts(config: CLIPConfig) -> None:
    size = config.vision.image_size
    with (
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        CLIP(config).eval().encode_image(torch.rand(1, 3, size, size))
    # The authors' pool, and so the published figures, also computes outputs that are never used.
    vision = config.vision
    assert isinstance(vision, ResNetConfig)
    inner, channels, length = vision.heads * vision.head_dim, vision.channels[3], vision.grid**2 + 1
    unread = (length - 1) * inner * (channels + 2 * length + config.embed_dim)
    assert counter.get_total_flops() / 2 + unread == macs(config)["image"]


def test_measure_counts_parameters_and_no_statistics() -> None:
    model = CLIP(cut_config()).eval()
    figures = measure(model, batch_size=2, seconds=0.01)
    assert figures["params_image"] == sum(p.numel() for p in model.visual.parameters())
    assert figures["images_per_s"] > 0


@pytest.mark.parametrize("size", [31, 32, 47, 63, 64, 75, 96, 100])
def test_the_pool_has_a_position_for_each_place(size: int) -> None:
    config = resnet_config(vision={"image_size": size})
    assert CLIP(config).eval().encode_image(torch.rand(1, 3, size, size)).shape == (1, config.embed_dim)


def test_random_weights_train_and_start_with_closed_branches() -> None:
    torch.manual_seed(0)
    model = CLIP(resnet_config())
    assert model.visual.get_submodule("layer3.2.bn3").weight.abs().max() == 0
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    model.encode_image(torch.rand(2, 3, 64, 64)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.visual.parameters())


# --- axes and cuts


@pytest.mark.parametrize("config", [resnet_config(), cut_config(), NAMED[NAME]], ids=["equal", "cut", "published"])
def test_the_table_is_the_models_state_dict(config: CLIPConfig) -> None:
    model, table = CLIP(config), axis_table(config)
    assert {k: e.shape for k, e in table.items()} == {k: tuple(v.shape) for k, v in model.state_dict().items()}
    assert {key for key, entry in table.items() if entry.buffer} == {key for key, _ in model.named_buffers()}
    used = {axis.name for entry in table.values() for axis in entry.axes if axis is not None}
    assert used | {entry.branch for entry in table.values() if entry.branch} == set(axis_sizes(config))


def reference(model: CLIP, pixels: Tensor, masks: dict[str, Tensor]) -> Tensor:
    """Compute the masked image tower directly from the weights: masks multiply activations, gates multiply branches."""
    w = {k.removeprefix("visual."): v for k, v in model.state_dict().items() if k.startswith("visual.")}
    vision = model.config.vision
    assert isinstance(vision, ResNetConfig)

    def conv(x: Tensor, weight: str, norm: str, **options: Any) -> Tensor:
        y = F.conv2d(x, w[f"{weight}.weight"], **options)
        scale = w[f"{norm}.weight"] / (w[f"{norm}.running_var"] + 1e-5).sqrt()
        shift = w[f"{norm}.bias"] - w[f"{norm}.running_mean"] * scale
        return y * scale[:, None, None] + shift[:, None, None]

    def mask(name: str) -> Tensor:
        return masks[f"visual.{name}"][:, None, None]

    x = conv(pixels, "conv1", "bn1", stride=2, padding=1).relu() * mask("stem.1")
    x = conv(x, "conv2", "bn2", padding=1).relu() * mask("stem.2")
    x = F.avg_pool2d(conv(x, "conv3", "bn3", padding=1).relu() * mask("stem.3"), 2)
    for stage, layers in enumerate(vision.layers, 1):
        for i in range(layers):
            place, stride = f"layer{stage}.{i}", 2 if i == 0 and stage > 1 else 1
            y = conv(x, f"{place}.conv1", f"{place}.bn1").relu() * mask(f"conv1.{stage}.{i}")
            y = conv(y, f"{place}.conv2", f"{place}.bn2", padding=1).relu() * mask(f"conv2.{stage}.{i}")
            y = conv(F.avg_pool2d(y, stride), f"{place}.conv3", f"{place}.bn3")
            if i == 0:
                x = conv(F.avg_pool2d(x, stride), f"{place}.downsample.0", f"{place}.downsample.1")
            else:
                y = y * mask(f"block.{stage}.{i}")
            x = (x + y).relu() * mask(f"stage.{stage}")
    x = x.flatten(2).permute(2, 0, 1)
    x = torch.cat([x.mean(0, keepdim=True), x]) + w["attnpool.positional_embedding"][:, None] * masks["visual.stage.4"]
    q, k, v = (x @ w[f"attnpool.{n}_proj.weight"].T + w[f"attnpool.{n}_proj.bias"] for n in "qkv")
    heads = []
    for h in range(vision.heads):
        part = slice(h * vision.head_dim, (h + 1) * vision.head_dim)
        scores = torch.einsum("nc,lnc->nl", q[0, :, part], k[:, :, part]) / vision.head_dim**0.5
        heads.append(torch.einsum("nl,lnc->nc", scores.softmax(1), v[:, :, part]) * masks["visual.pool_heads"][h])
    return (torch.cat(heads, 1) @ w["attnpool.c_proj.weight"].T + w["attnpool.c_proj.bias"]) * masks["embed"]


@pytest.mark.parametrize("config", [resnet_config(layers=(2, 2, 3, 2)), cut_config()], ids=["equal", "cut"])
@pytest.mark.parametrize("seed", range(5))
def test_a_cut_is_the_masked_model(config: CLIPConfig, seed: int) -> None:
    model, masks = random_resnet(config, seed), zero_one_masks(config, seed)
    pixels, tokens = random_inputs(config)
    expected = reference(model, pixels, masks)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    cut, kept = compact(model, masks), masks["embed"] != 0
    for actual in (cut.encode_image(pixels), model.encode_image(pixels, masks)[:, kept]):
        assert (actual - expected[:, kept]).norm() <= 1e-10 * expected.norm()
    assert (cut.encode_text(tokens) - model.encode_text(tokens, masks)[:, kept]).abs().max() < 1e-10
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    closed = sum(int(axis_kind(name) == "block" and not mask.any()) for name, mask in masks.items())
    assert isinstance(cut.config.vision, ResNetConfig) and isinstance(config.vision, ResNetConfig)
    assert sum(cut.config.vision.layers) == sum(config.vision.layers) - closed
    again = zero_one_masks(cut.config, seed + 100)
    expected, kept = reference(cut, pixels, again), again["embed"] != 0
    actual = compact(cut, again).encode_image(pixels)
    assert (actual - expected[:, kept]).norm() <= 1e-10 * expected.norm()


def test_masks_of_a_model_in_bfloat16() -> None:
    config = resnet_config()
    model, masks = random_resnet(config, dtype=torch.float32), zero_one_masks(config, 0)
    masks = {name: mask.float() for name, mask in masks.items()}
    pixels, _ = random_inputs(config, torch.float32)
    wanted = model.encode_image(pixels, masks)
    found = cast(model, torch.bfloat16).encode_image(pixels, masks)
    kept = masks["embed"] != 0
    assert torch.cosine_similarity(found[:, kept], wanted[:, kept]).min() > 0.99


def test_removed_blocks_are_renumbered_and_need_no_channels() -> None:
    model = random_resnet(resnet_config(layers=(1, 3, 3, 1)))
    masks = {"visual.block.2.1": torch.zeros(1), "visual.conv1.2.1": torch.zeros(8)}
    cut = compact(model, masks | {"visual.block.3.1": torch.zeros(1), "visual.block.3.2": torch.zeros(1)})
    assert isinstance(cut.config.vision, ResNetConfig) and cut.config.vision.layers == (1, 2, 1, 1)
    for name, entry in model.visual.layer2[2].state_dict().items():  # type: ignore[index, union-attr]
        assert torch.equal(cut.visual.layer2[1].state_dict()[name], entry)  # type: ignore[index, union-attr]


def test_gradients_reach_masks_of_ones() -> None:
    config = resnet_config()
    masks = {n: torch.ones(s, dtype=torch.float64) for n, s in axis_sizes(config).items() if n.startswith("visual.")}
    for mask in masks.values():
        mask.requires_grad_()
    random_resnet(config).encode_image(random_inputs(config)[0], masks).square().sum().backward()
    assert all(mask.grad is not None and mask.grad.abs().sum() > 0 for mask in masks.values())


@pytest.mark.parametrize(
    ("name", "mask", "message"),
    [
        ("visual.stage.1", torch.full((16,), 0.5), "'visual.stage.1': a ResNet tower takes masks of 0 and 1 only"),
        ("visual.block.3.1", torch.tensor([2.0]), "'visual.block.3.1': a ResNet tower takes masks of 0 and 1"),
        ("visual.block.3.0", torch.ones(1), "'visual.block.3.0': the model has no such axis"),
        ("visual.hidden", torch.ones(4), "'visual.hidden': the model has no such axis"),
        ("visual.conv1.3.1", torch.ones(4), r"'visual.conv1.3.1': shape \(4,\), expected \(16,\)"),
        ("visual.conv1.3.1", torch.zeros(16), "'visual.conv1.3.1' removes everything"),
        ("visual.conv2.1.0", torch.zeros(4), "'visual.conv2.1.0' removes everything"),
        ("visual.stem.2", torch.zeros(2), "'visual.stem.2' removes everything"),
        ("visual.stage.4", torch.zeros(128), "'visual.stage.4' removes everything"),
        ("visual.pool_heads", torch.zeros(16), "'visual.pool_heads' removes everything"),
    ],
)
def test_a_bad_mask_is_named(name: str, mask: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compact(random_resnet(resnet_config()), {name: mask})


# --- the manual rule and shapes


def test_the_block_rule_holds_in_each_stage() -> None:
    teacher = random_resnet(resnet_config(layers=(3, 4, 6, 3)))
    student = inherit(teacher, resnet_config(layers=(1, 2, 3, 2), width=3))
    for stage, kept in ((1, [0]), (2, [0, 2]), (3, [0, 2, 4]), (4, [0, 1])):
        for new, old in enumerate(kept):
            for norm in ("bn1", "bn2"):
                key = f"visual.layer{stage}.{{}}.{norm}.running_var"
                mine, whole = student.state_dict()[key.format(new)], teacher.state_dict()[key.format(old)]
                assert torch.equal(mine, whole[: len(mine)]) and len(mine) == 3 * 2 ** (stage - 1)
    rows = describe(teacher.config, manual_masks(teacher.config, student.config))
    assert ["visual conv1 of blocks 3.0, 3.2, 3.4", "16", "12", "the first 12"] in rows
    assert ["visual conv1 of blocks 3.1, 3.3, 3.5", "16", "0", "removed"] in rows
    assert ["visual stage 3", "64", "48", "the first 48"] in rows
    assert ["visual pool_heads", "16", "12", "the first 12"] in rows


@pytest.mark.parametrize(
    ("student", "named"),
    [
        (resnet_config(width=5), "visual.conv1.3.0 20 > 16"),
        (resnet_config(width=5), "visual.stem.3 5 > 4"),
        (resnet_config(layers=(1, 2, 4, 1)), "visual.layers of stage 3 4 > 3"),
        (resnet_config(vision={"head_dim": 4}), "visual.head_dim 4, not 8"),
        (small_config(), "a vit student cannot inherit from a resnet teacher"),
    ],
)
def test_a_misfit_is_named(student: CLIPConfig, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        inherit(random_resnet(resnet_config()), student)


def test_positions_of_the_pool_are_interpolated() -> None:
    teacher = random_resnet(resnet_config())
    student = inherit(teacher, resnet_config(vision={"image_size": 96}))
    key = "visual.attnpool.positional_embedding"
    old, new = teacher.state_dict()[key], student.state_dict()[key]
    assert torch.equal(new[0], old[0]) and new.shape == (10, 128)
    wanted = F.interpolate(old[1:, 5].view(1, 1, 2, 2), (3, 3), mode="bicubic", antialias=True, align_corners=False)
    torch.testing.assert_close(new[1:, 5].view(3, 3), wanted[0, 0], rtol=0, atol=1e-6)


def test_shapes_in_recipes_are_proportional() -> None:
    shape = shape_from(["vision.width=44", "vision.layers=[2, 3, 4, 2]", "text.layers=6", "vision.image_size=256"])
    wanted = resnet_tower((2, 3, 4, 2), 44, image_size=256)
    assert shape.apply(NAMED["RN50"]).vision == wanted
    assert shape_from(["vision.width=44", "text.layers=6"]).apply(NAMED["RN50"]) == NAMED[NAME]
    cut = shape_from(["vision.width=1", "vision.heads=2"]).apply(cut_config()).vision
    assert isinstance(cut, ResNetConfig)
    assert (cut.stem, cut.channels, cut.heads, cut.conv2[2]) == ((1, 2, 2), (3, 4, 6, 5), 2, (2, 1, 1))


@pytest.mark.parametrize(
    ("config", "overrides", "message"),
    [
        (resnet_config(), ["vision.layers=3"], "vision.layers: a ResNet has four stages"),
        (resnet_config(), ["vision.mlp_width=3"], "vision.mlp_width: a ResNet has no MLPs"),
        (cut_config(), ["vision.layers=[1, 1, 3, 1]"], "vision.conv1: the blocks to inherit are unequal"),
        (small_config(), ["vision.layers=[1, 1, 3, 1]"], "vision.layers: one number of blocks"),
    ],
)
def test_a_shape_that_does_not_fit_the_family_is_named(config: CLIPConfig, overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shape_from(overrides).apply(config)


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        ({"width": 3}, r"vision: layers must give the blocks of each of four stages.*None"),
        ({"layers": [1, 1, 1], "width": 3}, r"layers must give the blocks of each of four stages.*\[1, 1, 1\]"),
        ({"layers": [1, 1, 1, 1], "width": True}, "width must be the channels .*True"),
        ({"layers": [1, 1, 1, 1], "width": 8, "image_size": 30}, "vision.image_size: .*31"),
        ({"layers": [1, 1, 1, 1], "width": 8, "head_dim": 0}, "vision.head_dim"),
        ({"layers": [2, 1, 1, 1], "width": 8, "conv1": [[8]] * 4}, "conv1 has 1 blocks in stage 1 and conv2 2"),
        ({"layers": [1, 1, 1, 1], "width": 8, "conv1": [[8], [], [8], [8]]}, r"vision.conv1.1: .*at least 1"),
        ({"layers": [1, 1, 1, 1], "width": 8, "depth": 3}, "vision.depth: unknown key"),
    ],
)
def test_a_config_that_fits_nothing_is_named(vision: dict[str, Any], message: str) -> None:
    data = small_config().model_dump(mode="json") | {"vision": {"kind": "resnet"} | vision}
    with pytest.raises(ValueError, match=message):
        CLIPConfig.from_dict(data)


def test_checkpoints_keep_statistics_whole(tmp_path: Path) -> None:
    tokenizer = clip_tokenizer()
    pruned = tokenizer.pruned(tokenizer.kept_ids(["words"]))
    config = cut_config()
    text = config.text.model_copy(update={"vocab_size": pruned.vocab_size})
    model = random_resnet(config.model_copy(update={"text": text}), dtype=torch.float32)
    norm = batch_norms(model)[0]
    assert norm.running_var is not None and norm.num_batches_tracked is not None
    norm.running_var[0] = 1e6  # beyond float16
    norm.num_batches_tracked += 7
    for dtype in (None, torch.float16):
        save_checkpoint(tmp_path / str(dtype), model, pruned, Preprocess(image_size=75), dtype)
        loaded = load_checkpoint(tmp_path / str(dtype))[0]
        assert loaded.config == model.config
        for key, value in loaded.state_dict().items():
            expected = model.state_dict()[key]
            if dtype is not None and key in dict(model.named_parameters()):
                expected = expected.to(dtype).float()
            assert value.dtype == model.state_dict()[key].dtype and torch.equal(value, expected), key
