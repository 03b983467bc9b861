from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import cycle
from typing import Any

import pytest
import torch

from tests.helpers.models import random_model, small_config, uneven_config
from tinyclip.common.progress import Counted, listening
from tinyclip.compress.calibrate import BUDGETS, Calibration, calibrate, fill_budget, settled
from tinyclip.compress.importance import Sample, Score, importance, prunable, taylor
from tinyclip.compress.inheritance import compact
from tinyclip.compress.latency import targets_for_latency
from tinyclip.compress.size import resnet_size, sparsity
from tinyclip.loss import affinity_loss
from tinyclip.model.axes import GATES, axis_kind, axis_sizes, axis_table
from tinyclip.model.config import CLIPConfig, vit_clip
from tinyclip.model.costs import macs
from tinyclip.model.model import CLIP

SCALE = 20.0


def resnet_config() -> CLIPConfig:
    vision = {"kind": "resnet", "image_size": 64, "stem": (4, 4, 8), "channels": (16, 32, 48, 64), "head_dim": 8}
    vision |= {"conv1": ((4, 5), (8,), (12,), (16, 17)), "conv2": ((4, 6), (8,), (12,), (16, 18)), "heads": 8}
    return CLIPConfig.from_dict(small_config().model_dump() | {"vision": vision})


def batches(config: CLIPConfig, count: int, n: int = 6, dtype: torch.dtype = torch.float64) -> list[Sample]:
    generator = torch.Generator().manual_seed(3)
    size, text = config.vision.image_size, config.text
    result = []
    for _ in range(count):
        tokens = torch.randint(1, text.vocab_size - 1, (n, text.context_length), generator=generator)
        tokens[:, -1] = text.vocab_size - 1
        result.append(Sample(torch.randn(n, 3, size, size, generator=generator, dtype=dtype), tokens))
    return result


def ones(config: CLIPConfig, gates: bool = False, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {name: torch.ones(size, dtype=dtype) for name, size in prunable(config, gates=gates).items()}


def random_importance(config: CLIPConfig, gates: bool = False) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.rand(len(mask), generator=generator) for name, mask in ones(config, gates).items()}


def removed(config: CLIPConfig, masks: dict[str, torch.Tensor], budget: str = "both", unit: Any = "params") -> float:
    return sparsity(config, config, masks, BUDGETS[budget], unit).item()


# --- importance -------------------------------------------------------------------------------------------------


def test_taylor_is_half_the_curvature_of_the_affinity_loss() -> None:
    """Compare with second differences of the loss itself as a mask changes slightly in both directions, in float64."""
    model = random_model(small_config())
    (sample,) = batches(model.config, 1, n=4)
    masks = {n: m for n, m in ones(model.config, dtype=torch.float64).items() if axis_kind(n) != "hidden"}
    generator = torch.Generator().manual_seed(0)
    found = taylor(model, [sample] * 120, masks, SCALE, generator)
    with torch.no_grad():
        image, text, _ = model(sample.images, sample.tokens)

        def loss(name: str, j: int, change: float) -> float:
            moved = {name: masks[name].index_add(0, torch.tensor([j]), torch.tensor([change], dtype=torch.float64))}
            features = model(sample.images, sample.tokens, moved)[:2]
            return affinity_loss(*features, image, text, SCALE, SCALE).item()

        estimated, exact = [], []
        for name in ("visual.heads.0", "text.heads.1", "visual.mlp.2", "text.mlp.0"):
            for j in (0, 1):
                step = 1e-3
                curvature = (loss(name, j, step) - 2 * loss(name, j, 0) + loss(name, j, -step)) / step**2
                slope = (loss(name, j, step) - loss(name, j, -step)) / (2 * step)
                estimated.append(found[name][j].item())
                exact.append(curvature / 2)
                assert abs(slope) < 0.01 * curvature  # so a first-order estimate is useless
    assert estimated == pytest.approx(exact, rel=0.5)  # 120 draws have a standard deviation of 13 %
    assert sum(e / x for e, x in zip(estimated, exact, strict=True)) / 8 == pytest.approx(1, abs=0.2)


def test_taylor_ranks_as_removal_does() -> None:
    model = random_model(small_config())
    samples = batches(model.config, 2, n=6)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.7)  # so that one element is a small part of the whole
    masks = ones(model.config, dtype=torch.float64)
    found = taylor(model, samples * 15, masks, SCALE, torch.Generator().manual_seed(0))
    actual, estimated = [], []
    with torch.no_grad():
        for name in ("visual.mlp.0", "text.mlp.1", "text.hidden"):
            for j in range(0, len(masks[name]), 4):
                closed = {name: masks[name].index_fill(0, torch.tensor([j]), 0.0)}
                gain = 0.0
                for s in samples:
                    image, text, _ = model(s.images, s.tokens)
                    cut = model(s.images, s.tokens, closed)[:2]
                    whole = affinity_loss(image, text, image, text, SCALE, SCALE)
                    gain += (affinity_loss(*cut, image, text, SCALE, SCALE) - whole).item()
                actual.append(gain)
                estimated.append(found[name][j].item())
    ranks = torch.stack([torch.tensor(v).argsort().argsort().double() for v in (actual, estimated)])
    assert torch.corrcoef(ranks)[0, 1] > 0.7


def test_gates_are_measured_by_removal() -> None:
    model = random_model(small_config())
    samples = batches(model.config, 2)
    found = importance(model, samples, ones(model.config, True, torch.float64), scale=SCALE)
    gains = []
    with torch.no_grad():
        for s in samples:
            image, text, _ = model(s.images, s.tokens)
            closed = model.encode_text(s.tokens, {"text.attn.1": torch.zeros(1)}, normalize=True)
            whole = affinity_loss(image, text, image, text, SCALE, SCALE)
            gains.append(affinity_loss(image, closed, image, text, SCALE, SCALE) - whole)
    assert found["text.attn.1"].item() == pytest.approx(torch.stack(gains).mean().item(), rel=1e-3)


@pytest.mark.parametrize("score", ["taylor", "activation", "magnitude"])
@pytest.mark.parametrize("config", [small_config(), uneven_config(), resnet_config()], ids=["vit", "uneven", "resnet"])
def test_every_axis_has_a_score_and_what_writes_nothing_has_none(config: CLIPConfig, score: Any) -> None:
    model = random_model(config)
    with torch.no_grad():
        model.transformer.get_submodule("resblocks.1").mlp.c_fc.weight[:2] = 0  # type: ignore[union-attr, index]
        model.transformer.get_submodule("resblocks.1").mlp.c_fc.bias[:2] = 0  # type: ignore[union-attr, index]
        model.transformer.get_submodule("resblocks.1").mlp.c_proj.weight[:, :2] = 0  # type: ignore[union-attr, index]
    masks = ones(config, True, torch.float64)
    found = importance(model, batches(config, 4), masks, scale=SCALE, score=score)
    assert {name: len(v) for name, v in found.items()} == prunable(config, gates=True)
    assert all(torch.isfinite(v).all() for v in found.values())
    assert found["text.mlp.1"][:2].tolist() == [0, 0] and (found["text.mlp.1"][2:] > 0).any()


def test_importance_needs_data() -> None:
    model = random_model(small_config())
    with pytest.raises(ValueError, match="no batches to measure on"):
        importance(model, [], ones(model.config), scale=SCALE)


# --- greedy pruning ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["params", "macs"])
@pytest.mark.parametrize("gates", [False, True])
@pytest.mark.parametrize("config", [small_config(), resnet_config()], ids=["vit", "resnet"])
def test_budget_is_filled_up_to_one_element(config: CLIPConfig, gates: bool, unit: Any) -> None:
    found = random_importance(config, gates)
    masks = fill_budget(found, config, {"both": 0.4}, unit=unit)
    assert removed(config, masks, unit=unit) >= 0.4
    back = []  # restoring some element would miss the target: the last one removed
    for name, mask in masks.items():
        gone = (mask == 0).nonzero().flatten()
        if len(gone):
            again = masks | {name: mask.index_fill(0, gone[found[name][gone].argmax()], 1.0)}
            back.append(removed(config, again, unit=unit))
    assert min(back) < 0.4


@pytest.mark.parametrize("align", [1, 8])
@pytest.mark.parametrize("gates", [False, True])
@pytest.mark.parametrize("unit", ["params", "macs"])
@pytest.mark.parametrize(
    "targets", [{"both": 0.5}, {"both": 0.9}, {"visual": 0.3, "text": 0.7}, {"visual": 0.75}, {"text": 0.25}]
)
def test_any_budget_is_met(targets: dict[str, float], unit: Any, gates: bool, align: int) -> None:
    config = vit_clip(64, (6, 96), (4, 64), 8, image_size=32, head_dim=8, vocab_size=100, context_length=16)
    towers = {tower for name in targets for tower in BUDGETS[name]}
    found = {name: x for name, x in random_importance(config, gates).items() if name.split(".")[0] in towers}
    masks = fill_budget(found, config, targets, unit=unit, align=align)
    student = compact(CLIP(config), masks).config
    for name, target in targets.items():
        left = sparsity(student, config, {}, BUDGETS[name], unit).item()
        assert left == pytest.approx(target, abs=0.01)


def test_what_matters_least_for_its_size_goes_first() -> None:
    config = small_config()
    found = {name: torch.ones(len(mask)) for name, mask in ones(config).items()}
    found["text.mlp.0"][5:] = 0
    found["visual.heads.1"][2] = 0
    dead = fill_budget(found, config, {"both": 0.016})
    gone = {name: (mask == 0).nonzero().flatten().tolist() for name, mask in dead.items() if (mask == 0).any()}
    assert set(gone) <= {"text.mlp.0", "visual.heads.1"}
    masks = fill_budget(found, config, {"both": 0.12})
    assert masks["visual.heads.1"].tolist() == [1, 1, 0, 1]
    assert masks["text.mlp.0"].tolist() == [1.0] * 5 + [0.0] * (len(masks["text.mlp.0"]) - 5)


def test_a_shared_budget_moves_capacity_between_towers() -> None:
    config = small_config()
    found = {n: torch.ones(len(m)) * (5 if n.startswith("text") else 1) for n, m in ones(config).items()}
    shared = fill_budget(found, config, {"both": 0.4})
    assert removed(config, shared, "visual") > 0.4 > removed(config, shared, "text")
    apart = fill_budget(found, config, {"visual": 0.2, "text": 0.6})
    assert removed(config, apart, "visual") == pytest.approx(0.2, abs=0.03)
    assert removed(config, apart, "text") == pytest.approx(0.6, abs=0.05)
    one = fill_budget({n: v for n, v in found.items() if n.startswith("text")}, config, {"text": 0.5})
    assert not any(name.startswith("visual") for name in one)


def test_a_closed_gate_frees_its_whole_branch() -> None:
    config = small_config()
    found = {name: torch.ones(len(mask)) for name, mask in ones(config, True).items()}
    found |= {name: torch.full_like(v, 100.0) for name, v in found.items() if axis_kind(name) in GATES}
    found["visual.ffn.2"][0] = 0
    target = removed(config, {"visual.ffn.2": torch.zeros(1)})
    masks = fill_budget(found, config, {"both": target - 0.001})
    assert masks["visual.ffn.2"].item() == 0
    assert all(mask.all() for name, mask in masks.items() if name != "visual.ffn.2")


def test_alignment() -> None:
    config = small_config()
    masks = fill_budget(random_importance(config), config, {"both": 0.5}, align=8)
    kept = {name: int(mask.sum()) for name, mask in masks.items()}
    assert all(n % 8 == 0 for name, n in kept.items() if axis_kind(name) != "heads")
    assert removed(config, masks) >= 0.5


def test_what_is_gone_stays_gone() -> None:
    config = small_config()
    first = fill_budget(random_importance(config), config, {"both": 0.3})
    reverse = {name: -value for name, value in random_importance(config).items()}
    second = fill_budget(reverse, config, {"both": 0.5}, masks=first)
    assert all((second[name] <= mask).all() for name, mask in first.items())


@pytest.mark.parametrize("target", [{"both": 0.99999}, {"text": 0.99999}])
@pytest.mark.parametrize("config", [small_config(), resnet_config()], ids=["vit", "resnet"])
def test_out_of_reach(target: dict[str, float], config: CLIPConfig) -> None:
    with pytest.raises(ValueError, match=r"target_sparsity 0.99999 of .* cannot be reached: "):
        fill_budget(random_importance(config), config, target)


def test_nothing_to_do() -> None:
    config = small_config()
    masks = fill_budget(random_importance(config), config, {"both": 0.5})
    small = compact(CLIP(config), masks).config
    with pytest.raises(ValueError, match=r"target_sparsity 0.4 of both towers needs no cut: 0\.5\d* of"):
        fill_budget(random_importance(small), small, {"both": 0.4}, original=config)


# --- whole calibration ------------------------------------------------------------------------------------------


def test_dead_parts_go_without_a_change() -> None:
    """Neurons, a head and channels that do nothing are found, even over several rounds."""
    model = random_model(small_config())
    inner = model.config.vision.head_dim
    with torch.no_grad():
        for i in range(3):
            block = model.visual.transformer.get_submodule(f"resblocks.{i}")
            block.mlp.c_proj.weight[:, ::2] = 0  # type: ignore[union-attr, index]
            block.attn.out_proj.weight[:, inner : 2 * inner] = 0  # type: ignore[union-attr, index]
    samples = batches(model.config, 8)
    config = model.config
    dead = {
        f"visual.mlp.{i}": torch.arange(len(torch.ones(axis_sizes(config)[f"visual.mlp.{i}"]))) % 2 for i in range(3)
    }
    dead |= {f"visual.heads.{i}": torch.tensor([1, 0, 1, 1]) for i in range(3)}
    target = removed(config, {name: mask.float() for name, mask in dead.items()}) - 0.002
    masks = calibrate(model, samples, {"both": target}, Calibration(SCALE, batches=8, rounds=4))
    cut = compact(model, masks)
    s = samples[0]
    for ours, theirs in zip(cut(s.images, s.tokens)[:2], model(s.images, s.tokens)[:2], strict=True):
        torch.testing.assert_close(ours, theirs)
    assert removed(config, masks) >= target


@pytest.mark.parametrize("config", [small_config(), resnet_config()], ids=["vit", "resnet"])
def test_a_later_stage_counts_from_the_original(config: CLIPConfig) -> None:
    model = random_model(config)
    samples = batches(config, 4)
    for target in (0.3, 0.5):
        how = Calibration(SCALE, config, gates=True, batches=4)
        model = compact(model, calibrate(model, samples, {"both": target}, how))
        size = sparsity(model.config, config, {}, ("visual", "text"), "params").item()
        assert target <= size < target + 0.03
    assert torch.isfinite(model(samples[0].images, samples[0].tokens)[0]).all()


def test_same_seed_same_masks() -> None:
    model = random_model(small_config())
    samples = batches(model.config, 4)
    first, again = (calibrate(model, samples, {"both": 0.5}, Calibration(SCALE, batches=4)) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_too_little_data() -> None:
    model = random_model(small_config())
    with pytest.raises(ValueError, match="no batches to measure on"):
        calibrate(model, batches(model.config, 1), {"both": 0.5}, Calibration(SCALE, batches=8, rounds=4))


def test_an_endless_source_is_read_only_as_far_as_said() -> None:
    model, taken = random_model(small_config()), []

    def source() -> Iterator[Sample]:
        while True:
            taken.append(1)
            yield from batches(model.config, 1)

    calibrate(model, source(), {"both": 0.5}, Calibration(SCALE, batches=5, rounds=2))
    assert len(taken) == 5


@pytest.mark.parametrize("score", ["taylor", "activation"])
def test_it_stops_when_more_would_change_nothing(score: Score) -> None:
    """The result is the same each time."""
    model, heard = random_model(small_config()), list[tuple[object, ...]]()
    source = Counted(cycle(batches(model.config, 4)))
    how = Calibration(SCALE, score=score, batches=1000, rounds=2)
    with listening(lambda *told: heard.append(told)):
        masks = calibrate(model, source, {"both": 0.5}, how)
    assert 2 * 16 <= source.count <= 2 * 256
    assert heard[0] == ("calibrating", 0, 1000, "batches") and heard[-1] == ("calibrating", 1, 1, "")
    assert ("calibrating", 500, 1000, "batches") in heard  # the second round starts there regardless
    again = Counted(cycle(batches(model.config, 4)))
    assert all(torch.equal(masks[name], other) for name, other in calibrate(model, again, {"both": 0.5}, how).items())
    assert again.count == source.count


def test_it_goes_on_while_the_cut_changes() -> None:
    """Every batch gives different importance, so nothing settles and all are measured."""
    config = small_config()
    axes = prunable(config)

    def found(count: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(count)
        return {name: torch.rand(size, generator=generator) for name, size in axes.items()}

    ones = {name: torch.ones(size) for name, size in axes.items()}
    cuts: list[int] = []

    def cut(importance: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        cuts.append(1)
        return fill_budget(importance, config, {"both": 0.5})

    enough = settled(cut, ones)
    assert not any(enough(count, lambda count=count: found(count)) for count in range(1, 200))  # type: ignore[misc]
    assert len(cuts) == 5  # after 8, 16, 32, 64, 128: a cut costs more than a check
    enough = settled(cut, ones)
    assert [count for count in range(1, 200) if enough(count, lambda: found(0))] == [16, 32, 64, 128]


def test_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(small_config())
    config = model.config
    monkeypatch.setattr(
        "tinyclip.compress.latency.pair_latency_ms",
        lambda m: sum(macs(m.config).values()) / sum(macs(config).values()),
    )
    how, samples = Calibration(SCALE, batches=4), batches(config, 8)
    targets, part = targets_for_latency(model, iter(samples), 0.6, ("visual", "text"), how)
    masks = calibrate(model, samples, targets, Calibration(SCALE, unit="macs", batches=4))
    assert sum(macs(compact(model, masks).config).values()) / sum(macs(config).values()) == pytest.approx(0.6, abs=0.05)
    assert targets["both"] == pytest.approx(part)
    with pytest.raises(ValueError, match="cannot be reached"):
        targets_for_latency(model, iter(samples), 0.0001, ("visual", "text"), how)


# --- ResNet size ------------------------------------------------------------------------------------------------


def test_resnet_size() -> None:
    config = resnet_config()
    assert resnet_size(config, {}, "macs").item() == macs(config)["image"]
    table = axis_table(config).items()
    weights = [e.shape for k, e in table if k.startswith("visual.") and len(e.shape) > 1 and "positional" not in k]
    assert resnet_size(config, {}, "params").item() == sum(torch.Size(shape).numel() for shape in weights)
    masks = fill_budget(random_importance(config, True), config, {"both": 0.5})
    small = compact(CLIP(config), masks).config
    for unit in ("params", "macs"):
        assert resnet_size(config, masks, unit).item() == resnet_size(small, {}, unit).item()
