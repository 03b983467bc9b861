"""One training step: the gradient of the whole batch, in one piece or several."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.models import resnet_config
from tests.helpers.trainees import CASES, assert_near, batch_of, gradients, named, plain_gradients, stage_of, trainee_of
from tinyclip.recipe.recipe import Recipe
from tinyclip.train.setup import _fixed, plan
from tinyclip.train.student import check_compiler


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_one_graph_in_one_piece_and_in_many(case: str) -> None:
    batch = batch_of(64 if "resnet" in case else 32)
    reference = plain_gradients(trainee_of(case, grad_checkpointing=False), batch)
    assert_near(gradients(trainee_of(case), batch), reference, 1e-10)
    for size in (1, 3, 4):  # the last piece may be smaller
        assert_near(gradients(trainee_of(case, micro_batch=size), batch), reference, 1e-10)


@pytest.mark.parametrize("case", CASES)
def test_gradients_in_float32_stay_near(case: str) -> None:
    batch = batch_of(64 if "resnet" in case else 32)
    reference = plain_gradients(trainee_of(case, torch.float32), batch)
    for size in (None, 3):
        assert_near(gradients(trainee_of(case, torch.float32, micro_batch=size), batch), reference, 1e-4)


def dropped(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return nn.functional.dropout(output, 0.5)


def noisy(**changes: Any) -> Any:
    """Return a trainee with dropout, which our models do not have."""
    trainee = trainee_of("scale learned", **changes)
    towers = trainee.model.visual.transformer, trainee.model.transformer
    for module in (*trainee.projections.values(), *(tower.resblocks[0].mlp for tower in towers)):
        module.register_forward_hook(dropped)
    return trainee


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_replay_draws_the_same_random_numbers(checkpointing: bool) -> None:
    """The reference keeps the graphs of all pieces, computed one after the other."""
    batch, reference = batch_of(), noisy()
    torch.manual_seed(11)
    outputs = []
    for start in (0, 3, 6):
        piece = slice(start, start + 3)
        outputs.append(reference.student(batch.images[piece], batch.tokens[piece], 0))
    after = torch.get_rng_state()
    whole = {name: torch.cat([o[name] for o in outputs]) for name in outputs[0] if name != "scale"}
    theirs = reference.teacher.features(batch.images, batch.tokens)
    theirs = theirs[0].clone(), theirs[1].clone()
    reference._terms(whole | {"scale": outputs[0]["scale"]}, [theirs], batch)["loss"].backward()
    trainee = noisy(micro_batch=3, grad_checkpointing=checkpointing)
    torch.manual_seed(11)
    trainee.backward(batch, 0)
    assert torch.equal(torch.get_rng_state(), after)  # a replay draws no additional numbers
    expected = {name: p.grad for name, p in named(reference).items()}
    assert_near({name: p.grad for name, p in named(trainee).items()}, expected, 1e-10)  # type: ignore[misc, arg-type]


def saved_bytes(trainee: Any, batch: Any) -> int:
    """Return the peak bytes of tensors saved for a backward pass, excluding weights."""
    weights = {p.data_ptr() for p in trainee.student.parameters()}
    held: dict[int, int] = {}
    most = 0

    class Kept:
        def __init__(self, tensor: Tensor) -> None:
            nonlocal most
            self.tensor = tensor
            held[id(self)] = 0 if tensor.data_ptr() in weights else tensor.nbytes
            most = max(most, sum(held.values()))

        def __del__(self) -> None:
            held.pop(id(self), None)

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        trainee.backward(batch, 0)
    return most


@pytest.mark.parametrize("case", ["affinity", "resnet"])
def test_micro_batches_and_checkpointing_keep_less(case: str) -> None:
    batch = batch_of(64 if case == "resnet" else 32, pairs=32)
    plain, micro, checkpointed, both = (
        saved_bytes(trainee_of(case, batch_norm="frozen" if case == "resnet" else None, **changes), batch)
        for changes in (
            {},
            {"micro_batch": 4},
            {"grad_checkpointing": True},
            {"micro_batch": 4, "grad_checkpointing": True},
        )
    )
    assert micro < plain / 6 and checkpointed < plain / 2 and both < micro / 2


@pytest.mark.parametrize(("case", "size"), [("affinity", None), ("masks, all terms", 4)])
def test_compiled_towers_give_the_same_and_settle(case: str, size: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced as for the real compiler, each tower in one piece, but run without it, which would take minutes."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager", fullgraph=True))
    torch._dynamo.reset()
    batch = batch_of()
    trainee = trainee_of(case, compile=True, micro_batch=size)
    assert_near(gradients(trainee, batch), gradients(trainee_of(case), batch), 1e-10)
    for cut in (5, 7, 8):
        with torch._dynamo.config.patch(error_on_recompile=True):  # no recompilation for any text length
            gradients(trainee, replace(batch, tokens=shortened(batch.tokens, cut)))


def shortened(tokens: Tensor, length: int) -> Tensor:
    tokens = tokens.clone()
    tokens[:, length - 1] = tokens.max()
    tokens[:, length:] = 0
    return tokens


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("affinity", {"micro_batch": 0}, r"micro_batch"),
        ("resnet", {"batch_norm": "train", "micro_batch": 4}, r"micro_batch: computes parts of the batch twice"),
        ("resnet", {"batch_norm": "train", "grad_checkpointing": True}, r"grad_checkpointing: computes parts"),
        ("image_affinity", {"towers": "both"}, r"loss: image_affinity alone does not train the text tower"),
        ("text_affinity", {"towers": "image"}, r"loss: text_affinity alone does not train the image tower"),
    ],
)
def test_what_cannot_be_exact_is_refused(case: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stage_of(case, **changes)


def resnet_from_scratch(**changes: Any) -> Recipe:
    stage = {"name": "s", "steps": 2, "inherit": "none", "loss": {"affinity": 0, "contrastive": 1}} | changes
    return Recipe.model_validate({"model": resnet_config().model_dump(), "data": "d", "output": "o", "stages": [stage]})


def test_what_a_resnet_cannot_is_refused_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    for key, value in (("micro_batch", 4), ("grad_checkpointing", True)):
        with pytest.raises(ValueError, match=rf"stages.0 \(s\): {key}: this stage trains batch norm, which must see"):
            plan(resnet_from_scratch(**{key: value}), resnet_config(), device)
    plan(resnet_from_scratch(), resnet_config(), device)
    monkeypatch.setattr("tinyclip.train.setup.world_size", lambda: 2)
    with pytest.raises(ValueError, match=r"batch_norm: processes without GPUs cannot share batch statistics"):
        plan(resnet_from_scratch(), resnet_config(), device)


def test_a_resumed_run_may_have_another_memory_but_no_other_batch() -> None:
    def settings(**changes: Any) -> dict[str, Any]:
        return resnet_from_scratch(**changes).model_dump(mode="json")

    before = settings()
    for key in ("micro_batch", "grad_checkpointing", "compile"):
        del before["stages"][0][key]  # a run from a version without this key
        assert _fixed(settings(**{key: 2 if key == "micro_batch" else True}), "stages") == _fixed(before, "stages")
    assert _fixed(settings(batch_size=4), "stages") != _fixed(before, "stages")
    assert _fixed({"stages": "damaged"}, "stages") == "damaged"


def test_a_missing_compiler_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile(call: object) -> object:
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\n\nSet TORCHDYNAMO_VERBOSE=1")

    monkeypatch.setattr(torch, "compile", compile)
    with pytest.raises(ValueError, match=r"^compile: [^\n]*No working C\+\+ compiler found\); install a C\+\+[^\n]*$"):
        check_compiler(torch.device("cpu"))
