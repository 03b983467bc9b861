"""The make-believe GPU refuses what a GPU refuses, counts what waits for one, and allows everything else."""

from __future__ import annotations

import copy
import io
import os
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from tests.helpers.make_believe import CPU, GPU, make_believe

WAITS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool((x > 2).any()),
    "float": lambda x: float(x[0]),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "to the CPU": lambda x: x.to("cpu", torch.float64),
    "a copy into a tensor of the CPU": lambda x: torch.zeros(4).copy_(x),
    "a copy of data": lambda x: torch.tensor([1.0], device="cuda"),
    "a copy of a number": lambda x: torch.as_tensor(3.0, device=x.device),
    "a copy that blocks": lambda x: torch.zeros(4).to(x),
    "a mask": lambda x: x[x > 2],
    "an index from the CPU": lambda x: x[torch.tensor([1])],
    "nonzero": lambda x: x.nonzero(),
    "unique": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x),
    "synchronize": lambda x: torch.cuda.synchronize(),
    "save": lambda x: torch.save(x, io.BytesIO()),
    "the gradient of a move": lambda x: torch.zeros(4, requires_grad=True).to(x, non_blocking=True).sum().backward(),
}
REFUSED: dict[str, Callable[[Tensor, Tensor], object]] = {
    "sum": lambda here, there: here + there,
    "in place": lambda here, there: here.add_(there),
    "in place, into a scalar": lambda here, there: here.sum().add_(there.sum()),
    "a scalar of the GPU": lambda here, there: here + there.sum(),
    "product": lambda here, there: there[None] @ here[:, None],
    "joined": lambda here, there: torch.cat([here, there]),
    "stacked scalars": lambda here, there: torch.stack([here.sum(), there.sum()]),
    "where": lambda here, there: torch.where(there > 0, here, 0),
    "embedding": lambda here, there: F.embedding(here.long(), there[:, None]),
    "index of the GPU": lambda here, there: here[there.long()],
    "gathered": lambda here, there: there.gather(0, here.long()),
    "layer": lambda here, there: nn.Linear(4, 2)(there),
    "loss": lambda here, there: F.mse_loss(there, here),
    "numpy": lambda here, there: there.numpy(),
    "array": lambda here, there: torch.zeros(4).numpy() + there,
    "a copy that nobody waits for": lambda here, there: there.to("cpu", non_blocking=True),
    "generator": lambda here, there: torch.rand(3, generator=torch.Generator(), device="cuda"),
    "generator of labels": lambda here, there: there.softmax(0).multinomial(1, generator=torch.Generator()),
    "pinned": lambda here, there: there.pin_memory(),
    "another GPU": lambda here, there: here.to("cuda:1"),
}
FREE: dict[str, Callable[[Tensor], Tensor]] = {
    "number": lambda x: x * 2 + torch.tensor(3.0),
    "made there": lambda x: torch.arange(4, device=x.device) + torch.full((), 2.0, device="cuda") + x,
    "mask without counting": lambda x: x.masked_fill(x > 2, 0.0) + torch.where(x > 1, x, 0.0),
    "set": lambda x: x.clone().index_fill_(0, torch.arange(1, device="cuda"), 5.0),
    "row": lambda x: x[1:3] + x[0],
    "pinned": lambda x: torch.ones(4).pin_memory().to("cuda", non_blocking=True),
    "view": lambda x: x.view(2, 2).T.contiguous().flatten(),
    "generator": lambda x: torch.rand(4, generator=torch.Generator("cuda").manual_seed(1), device="cuda"),
    "inference": lambda x: torch.inference_mode()(lambda: x @ x)(),
    "like": lambda x: torch.zeros_like(x) + x.new_ones(4) + torch.zeros(4).to("cuda", non_blocking=True),
}


@pytest.mark.parametrize("case", WAITS)
def test_what_waits_for_the_gpu_is_counted(case: str) -> None:
    with make_believe() as gpu:
        x = torch.arange(4.0, device="cuda")
        WAITS[case](x)
        assert len(gpu.waits) == 1 and "test_make_believe.py" in gpu.waits[0].where


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_gpu_refuses_is_refused(case: str) -> None:
    with make_believe(), pytest.raises((RuntimeError, TypeError)):
        REFUSED[case](torch.ones(4), torch.ones(4, device="cuda"))


@pytest.mark.parametrize("case", FREE)
def test_the_rest_waits_for_nothing_and_stays_on_the_gpu(case: str) -> None:
    with make_believe() as gpu:
        x = torch.arange(4.0, device="cuda")
        result = FREE[case](x)
        assert result.device == GPU and result.is_cuda and not gpu.waits
        values = result.cpu()
        assert values.device == CPU and not values.is_cuda and values.numpy().shape == values.shape


def test_training_is_that_of_the_cpu_and_its_state_is_on_the_gpu() -> None:
    def trained(device: str) -> dict[str, Tensor]:
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 2)).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        scaler = torch.amp.GradScaler(device)
        for _ in range(3):
            with torch.autocast(device, torch.bfloat16):
                y = checkpoint(model, torch.randn(5, 4).to(device, non_blocking=True), use_reentrant=False)
            scaler.scale(y.float().square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert all(value.device.type == device for state in optimizer.state.values() for value in state.values())
        return model.cpu().state_dict()

    expected = trained("cpu")
    with make_believe():
        found = trained("cuda")
    assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize("kernel", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
def test_what_kernels_make_for_themselves_is_no_fault(kernel: SDPBackend) -> None:
    with make_believe() as gpu, sdpa_kernel(kernel):
        q = torch.randn(2, 3, 5, 4, device="cuda", requires_grad=True)
        F.scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()
        assert q.grad is not None and q.grad.device == GPU and not gpu.waits


def test_copies_and_files_stay_where_they_were() -> None:
    with make_believe():
        layer = nn.Linear(3, 3, device="cuda")
        assert copy.deepcopy(layer).weight.device == GPU
        file = io.BytesIO()
        torch.save(layer.state_dict(), file)
        assert torch.load(io.BytesIO(file.getvalue()))["weight"].device == GPU
        assert torch.load(io.BytesIO(file.getvalue()), map_location="cpu")["weight"].device == CPU
        with torch.device("meta"):
            assert nn.Linear(3, 3).weight.device.type == "meta"
    with pytest.raises(RuntimeError, match="CUDA"):  # as on any machine without a GPU
        torch.load(io.BytesIO(file.getvalue()))


def test_a_forked_process_may_not_use_the_gpu() -> None:
    with make_believe():
        child = os.fork()
        if child == 0:
            try:
                torch.zeros(3, device="cuda")
            except RuntimeError:
                os._exit(7)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_it_ends() -> None:
    before = torch.zeros, torch.Tensor.to, torch.Tensor.device, torch.Generator
    with make_believe():
        assert torch.cuda.is_available()
    assert not torch.cuda.is_available() and torch.zeros(1).numpy().shape == (1,)
    assert before == (torch.zeros, torch.Tensor.to, torch.Tensor.device, torch.Generator)
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1, device="cuda")
    torch._dynamo.reset()  # the compiler recognises torch's functions again too
    compiled = torch.compile(lambda x: x + torch.zeros(2, device=x.device), backend="eager", fullgraph=True)
    assert compiled(torch.ones(2)).tolist() == [1, 1]
