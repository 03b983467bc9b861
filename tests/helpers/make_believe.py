"""A make-believe GPU: CUDA code runs on the CPU, and whatever a GPU would refuse or wait for is detected.

`with make_believe() as gpu:` makes `.to("cuda")`, `device="cuda"`, autocast, scalers, pinned memory, generators and
`torch.cuda` work without a GPU. Every tensor is an ordinary CPU tensor. `gpu` remembers for each storage which device
it pretends to be on, so views share it. The computation is real: results are those of the CPU.

    an operation on tensors of two devices      raises, as in PyTorch (0-dim CPU tensors and CPU indices excepted)
    `numpy()` of a tensor on the GPU            raises, as in PyTorch
    a worker process that uses the GPU          raises, as in PyTorch
    an asynchronous copy to the CPU             raises: PyTorch returns memory that may not be written yet
    whatever makes the CPU wait for the GPU     is recorded in `gpu.waits` with its location: `.item()`, `bool()`,
                                                `.cpu()`, boolean masks, `nonzero`, blocking copies to the GPU

Tensors that C++ code creates itself (`at::ones` within a kernel) have no device here until they meet a tensor that has
one. Modes are per thread, so other threads, such as decoding threads, compute on the CPU as they should.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode

CPU, GPU, ANYWHERE = torch.device("cpu"), torch.device("cuda", 0), None
Place = torch.device | None
TORCH = str(Path(torch.__file__).parent)
MOVES = {"aten::copy_", "aten::_to_copy"}
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_unsafe_index", "aten::_index_put_impl_"}
READS = {
    *("aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::masked_select", "aten::bincount"),
    *("aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::repeat_interleave"),
}
# Operations that do not accept CPU scalars together with GPU tensors.
STRICT = ("aten::cat", "aten::stack", "aten::_fused_", "aten::_amp_")
GROUPED = "_group_tensors_by_device_and_dtype"
LIKE = ("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like")
NEW = ("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor", "new_empty_strided")


@dataclass(frozen=True)
class Wait:
    """The CPU waited for the GPU."""

    what: str
    where: str

    def __str__(self) -> str:
        return f"{self.what} at {self.where}"


class MakeBelieve(TorchDispatchMode):
    """Tracks which device each tensor pretends to be on; `waits` lists the waits so far."""

    def __init__(self, capability: tuple[int, int]) -> None:
        super().__init__()
        self.capability, self.waits, self.process = capability, list[Wait](), os.getpid()
        self.places: dict[int, tuple[StorageWeakRef, Place]] = {}
        self.pinned: dict[int, StorageWeakRef] = {}

    # --- where tensors are --------------------------------------------------------------------------------------

    def place_of(self, tensor: Tensor) -> Place:
        """Return a tensor's device; None if it is compatible with any."""
        storage = tensor.untyped_storage()
        return self.places[storage._cdata][1] if storage._cdata in self.places else CPU

    def put(self, tensor: Tensor, place: Place) -> Tensor:
        """Place a tensor, and all that share its storage, on a device. A weak reference keeps its address from being
        reused."""
        if place == GPU and os.getpid() != self.process:
            raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")
        if len(self.places) > 20_000:
            self.places = {key: kept for key, kept in self.places.items() if not kept[0].expired()}
        self.put_storage(tensor.untyped_storage(), place)
        return tensor

    def put_storage(self, storage: Any, place: Place) -> None:
        self.places[storage._cdata] = StorageWeakRef(storage), place

    def wait(self, what: str) -> None:
        frame = sys._getframe(1)
        while frame.f_back and (frame.f_code.co_filename.startswith(TORCH) or frame.f_code.co_filename == __file__):
            frame = frame.f_back
        self.waits.append(Wait(what, f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"))

    # --- operations ---------------------------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, func._schema.name
        leaves = list(_leaves((args, kwargs)))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if name in MOVES:
            place = self._copied(name, args, kwargs)
        else:
            place = self._indexed(name, args) if name in INDEXING else self._agreed(name, tensors)
            if place == GPU and name in READS:
                self.wait(name.removeprefix("aten::"))
        for generator in (leaf for leaf in leaves if isinstance(leaf, torch._C.Generator)):
            _check_generator(generator, place)
        if place is not ANYWHERE:
            for tensor in tensors:
                if self.place_of(tensor) is ANYWHERE:
                    self.put(tensor, place)
        known = {tensor.untyped_storage()._cdata for tensor in tensors}
        result = func(*args, **kwargs)
        for made in (leaf for leaf in _leaves(result) if isinstance(leaf, Tensor)):
            storage = made.untyped_storage()._cdata
            if storage not in known and storage not in self.places:
                self.put(made, place)
            elif storage in known and self.place_of(made) not in (place, ANYWHERE):
                raise RuntimeError(f"Expected all tensors to be on the same device: {name} writes to {made.device}")
        return result

    def _agreed(self, name: str, tensors: list[Tensor]) -> Place:
        """Return the device of an operation; raise if its tensors are on several."""
        strict = name.startswith(STRICT)
        placed = [(tensor, self.place_of(tensor)) for tensor in tensors]
        found = {place for tensor, place in placed if place is not ANYWHERE and (tensor.ndim or strict)}
        scalars = {place for _, place in placed if place is not ANYWHERE}
        if len(found) > 1 or (found == {CPU} and GPU in scalars and not name.startswith("aten::_foreach")):
            devices = " and ".join(sorted(map(str, scalars)))
            raise RuntimeError(f"Expected all tensors to be on the same device, but found {devices} ({name})")
        return next(iter(found), GPU if GPU in scalars else CPU if scalars else ANYWHERE)

    def _indexed(self, name: str, args: tuple[Any, ...]) -> Place:
        """Indices may be on the CPU, and are then copied; boolean indices are counted first."""
        indices = [index for index in args[1] if index is not None]
        place = self._agreed(name, [leaf for leaf in (args[0], *args[2:]) if isinstance(leaf, Tensor)])
        if place == CPU and any(self.place_of(index) == GPU for index in indices):
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        if place == GPU:
            for index in indices:
                if index.dtype in (torch.bool, torch.uint8):
                    self.wait("boolean mask")
                elif self.place_of(index) == CPU:
                    self.wait("index from the CPU")
        return place

    def _copied(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Place:
        if name == "aten::_to_copy":  # to another dtype or layout; `to` below handles devices
            return self.place_of(args[0])
        there, here = self.place_of(args[0]), self.place_of(args[1])
        if there is ANYWHERE and here is not ANYWHERE:
            self.put(args[0], here)
        elif here is not ANYWHERE and there != here:
            self.moved(here, there, kwargs.get("non_blocking", args[2] if len(args) > 2 else False))
        return self.place_of(args[0])

    def moved(self, source: Place, target: Place, non_blocking: bool) -> None:
        """Record a copy between devices."""
        if target == GPU and not non_blocking:
            self.wait("copy to the GPU")
        if source == GPU and target == CPU:
            if non_blocking:
                raise RuntimeError("a copy from the GPU that nobody waits for")
            self.wait("copy from the GPU")

    def move(self, tensor: Tensor, target: Place, non_blocking: bool = False) -> Tensor:
        """Return a copy on another device."""
        self.moved(self.place_of(tensor), target, non_blocking)
        moved: Tensor = _Move.apply(tensor, self, target)
        return moved


class _Move(torch.autograd.Function):
    """A copy to another device; its gradient goes back to the source device."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, gpu: MakeBelieve, target: Place) -> Tensor:
        ctx.gpu, ctx.source = gpu, gpu.place_of(tensor)
        return gpu.put(tensor.detach().clone(), target)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        ctx.gpu.moved(ctx.gpu.place_of(gradient), ctx.source, False)
        return ctx.gpu.put(gradient.clone(), ctx.source), None, None


class Generator(torch._C.Generator):
    """A CPU generator that pretends to be on a device."""

    pretended = CPU

    def __new__(cls, device: Any = "cpu") -> Generator:
        generator = super().__new__(cls)
        generator.pretended = device_of(device)
        return generator

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.pretended


def _leaves(value: Any) -> Iterator[Any]:
    """Return what nested lists, tuples and dictionaries hold; `torch.utils._pytree` takes several times as long."""
    if isinstance(value, list | tuple):
        for entry in value:
            yield from _leaves(entry)
    elif isinstance(value, dict):
        for entry in value.values():
            yield from _leaves(entry)
    else:
        yield value


def _check_generator(generator: torch.Generator, place: Place) -> None:
    wanted = getattr(generator, "pretended", CPU)
    if place is not ANYWHERE and wanted != place:
        raise RuntimeError(f"Expected a '{place.type}' device type for generator but found '{wanted.type}'")


def device_of(device: Any) -> torch.device:
    """Return the device for a name, a number or a device."""
    device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if device.type == "cuda" and (device.index or 0) > 0:
        raise RuntimeError("CUDA error: invalid device ordinal")
    return GPU if device.type == "cuda" else device


# --- patches ----------------------------------------------------------------------------------------------------


@contextmanager
def make_believe(capability: tuple[int, int] = (8, 0)) -> Iterator[MakeBelieve]:
    """A GPU with this compute capability; from 8 on it supports bfloat16."""
    _settle_compiler()
    gpu = MakeBelieve(capability)
    with ExitStack() as stack:
        for owner, patches in (
            (torch.Tensor, _methods(gpu)),
            (torch, _functions(gpu)),
            (torch.cuda, _cuda(gpu)),
            (torch._C._nn, {"_parse_to": _parse_to(torch._C._nn._parse_to)}),
            (torch._C, {GROUPED: _grouped(getattr(torch._C, GROUPED))}),
            (torch.accelerator, _accelerator(gpu)),
            (torch.amp.autocast_mode, {"autocast": _Autocast}),
            (torch.amp, {"autocast": _Autocast}),
            (torch.serialization, _files(gpu)),
        ):
            for name, value in patches.items():
                stack.enter_context(patch.object(owner, name, value, create=True))
        stack.enter_context(gpu)
        yield gpu


@cache
def _settle_compiler() -> None:
    """The compiler learns once per process which functions are torch's; patched ones would not be among them."""
    from torch._dynamo import trace_rules

    trace_rules.get_torch_obj_rule_map()
    torch.compile(lambda x: x + torch.zeros(1), backend="eager")(torch.zeros(1))


def _methods(gpu: MakeBelieve) -> dict[str, Any]:
    """Patches of tensor methods."""
    real = torch.Tensor

    def device(self: Tensor) -> torch.device:
        return self.real_device if self.real_device.type == "meta" else gpu.place_of(self) or CPU  # type: ignore

    def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        target, dtype, non_blocking = _meant(args, kwargs)
        rest = {k: v for k, v in kwargs.items() if k in ("copy", "memory_format")}
        if target is None or target == self.device or "meta" in (target.type, self.device.type):
            if target is not None and target.type == "meta":
                rest["device"] = target
            return real_to(self, dtype=dtype or self.dtype, **rest)
        moved = gpu.move(real_to(self, dtype=dtype or self.dtype), target, non_blocking)
        return real_to(moved, dtype=moved.dtype, **rest) if "memory_format" in rest else moved

    def numpy(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.device == GPU:
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy it first.")
        return real_numpy(self, *args, **kwargs)

    def array(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.numpy()
        return real_array(self, *args, **kwargs)

    def tolist(self: Tensor) -> Any:
        if self.device == GPU:
            gpu.wait("tolist")
        return real_tolist(self)

    def pin_memory(self: Tensor, device: Any = None) -> Tensor:
        if self.device == GPU:
            raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")
        pinned = self.clone()
        gpu.pinned[pinned.untyped_storage()._cdata] = StorageWeakRef(pinned.untyped_storage())
        return pinned

    def deepcopy(self: Tensor, memo: Any) -> Tensor:
        return gpu.put(real_deepcopy(self, memo), gpu.place_of(self))

    def new(name: str) -> Callable[..., Tensor]:
        call = getattr(real, name)

        def made(self: Tensor, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
            return gpu.put(call(self, *args, **kwargs), device_of(device) if device else gpu.place_of(self))

        return made

    real_to, real_numpy, real_tolist, real_deepcopy = real.to, real.numpy, real.tolist, real.__deepcopy__
    real_array = real.__array__
    return {
        "real_device": real.device,
        "device": property(device),
        "is_cuda": property(lambda self: self.device.type == "cuda"),
        "is_cpu": property(lambda self: self.device.type == "cpu"),
        "get_device": lambda self: 0 if self.is_cuda else -1,
        "to": to,
        "cpu": lambda self, **kwargs: self.to("cpu"),
        "cuda": lambda self, device=None, non_blocking=False: self.to(GPU, non_blocking=non_blocking),
        "numpy": numpy,
        "__array__": array,
        "tolist": tolist,
        "pin_memory": pin_memory,
        "is_pinned": lambda self, device=None: self.untyped_storage()._cdata in gpu.pinned,
        "__deepcopy__": deepcopy,
        **{name: new(name) for name in NEW},
    }


def _meant(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.device | None, torch.dtype | None, bool]:
    """Return the device, dtype and `non_blocking` of a call to `to`."""
    device, dtype, non_blocking = kwargs.get("device"), kwargs.get("dtype"), kwargs.get("non_blocking", False)
    for arg in args:
        if isinstance(arg, Tensor):
            device, dtype = arg.device, arg.dtype
        elif isinstance(arg, torch.dtype):
            dtype = arg
        elif isinstance(arg, bool):
            non_blocking = arg
        elif isinstance(arg, str | int | torch.device):
            device = arg
    return None if device is None else device_of(device), dtype, non_blocking


def _functions(gpu: MakeBelieve) -> dict[str, Any]:
    """Patches of `torch`: everything that creates tensors, and autocast."""

    def maker(call: Callable[..., Any]) -> Callable[..., Any]:
        def made(*args: Any, device: Any = None, pin_memory: bool = False, **kwargs: Any) -> Any:
            current = torch._C._get_default_device() if device is None else device
            target = device_of(current)
            if target.type == "meta" or _within_meta():
                return call(*args, **({"device": device} if device is not None else {}), **kwargs)
            if isinstance(kwargs.get("generator"), torch._C.Generator):
                _check_generator(kwargs["generator"], target)
            made = gpu.put(call(*args, **kwargs), target)
            return made.pin_memory() if pin_memory else made

        return made

    def of_data(call: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function that copies data, which is on the CPU."""

        def made(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
            if isinstance(data, Tensor):
                source = data.detach().clone() if call is tensor else data
                return source.to(device=device or data.device, dtype=kwargs.get("dtype") or data.dtype)
            if device is not None and device_of(device).type == "meta":
                return call(data, *args, device=device, **kwargs)
            made = call(data, *args, **kwargs)
            return made.to(device) if device is not None else made

        return made

    def like(call: Callable[..., Any]) -> Callable[..., Any]:
        def made(tensor: Tensor, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
            if tensor.device.type == "meta":
                return call(tensor, *args, device=device, **kwargs)
            return gpu.put(call(tensor, *args, **kwargs), device_of(device) if device else gpu.place_of(tensor))

        return made

    tensor = torch.tensor
    datas = ("tensor", "as_tensor", "asarray")
    makers = {f.__name__ for f in _device_constructors() if getattr(torch, f.__name__, None) is f} - set(datas)
    makers = {name for name in makers if "sparse" not in name and "nested" not in name}
    autocasts = ("is_autocast_enabled", "get_autocast_dtype", "set_autocast_enabled", "set_autocast_dtype")
    return {
        **{name: maker(getattr(torch, name)) for name in makers},
        **{name: of_data(getattr(torch, name)) for name in datas},
        **{name: like(getattr(torch, name)) for name in LIKE},
        **{name: _of_cpu(getattr(torch, name)) for name in (*autocasts, "get_device_module")},
        "Generator": Generator,
        "autocast": _Autocast,
        "get_device_module": lambda device=None: getattr(torch, torch.device(device or GPU).type),
    }


def _within_meta() -> bool:
    return bool(torch.get_default_device().type == "meta")


def _of_cpu(call: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function that takes a device type, so that it gives the CPU's answer for the GPU."""
    return lambda *args: call(*("cpu" if arg == "cuda" else arg for arg in args))


class _Autocast(torch.amp.autocast_mode.autocast):
    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)


def _parse_to(call: Callable[..., Any]) -> Callable[..., Any]:
    """Patch of `nn.Module.to`, which reads a tensor's device directly."""

    def parsed(*args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], Tensor):
            args = args[0].device, args[0].dtype, *args[1:]
        return call(*args, **kwargs)

    return parsed


def _grouped(call: Callable[..., Any]) -> Callable[..., Any]:
    """Group tensors by device, as optimisers do."""

    def grouped(lists: list[list[Tensor]], with_indices: bool = False) -> dict[Any, Any]:
        groups: dict[Any, Any] = {}
        for (_, dtype), (columns, places) in call(lists, True).items():
            for i, first in enumerate(columns[0]):
                parts, indices = groups.setdefault((first.device, dtype), ([[] for _ in columns], []))
                indices.append(places[i])
                for part, column in zip(parts, columns, strict=True):
                    part += column[i : i + 1]
        return groups

    return grouped


def _stream(gpu: MakeBelieve) -> Any:
    return SimpleNamespace(
        synchronize=lambda: gpu.wait("synchronize"), wait_stream=lambda other: None, is_capturing=lambda: False
    )


def _cuda(gpu: MakeBelieve) -> dict[str, Any]:
    """Patches of `torch.cuda`."""
    states: dict[str, Tensor] = {"state": torch.zeros(16, dtype=torch.uint8)}
    properties = SimpleNamespace(name="make-believe", total_memory=16 * 10**9, major=gpu.capability[0], minor=0)
    event = SimpleNamespace(record=lambda *a: None, synchronize=lambda: gpu.wait("synchronize"), query=lambda: True)
    event.elapsed_time = lambda other: 1.0
    event.wait = lambda *a: None
    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "device": type("device", (nullcontext,), {}),
        "synchronize": lambda device=None: gpu.wait("synchronize"),
        "get_device_name": lambda device=None: "make-believe",
        "get_device_capability": lambda device=None: gpu.capability,
        "get_device_properties": lambda device=None: properties,
        "is_bf16_supported": lambda *args, **kwargs: gpu.capability >= (8, 0),
        "max_memory_allocated": lambda device=None: 2 * 10**9,
        "memory_allocated": lambda device=None: 10**9,
        "reset_peak_memory_stats": lambda device=None: None,
        "mem_get_info": lambda device=None: (10**10, 16 * 10**9),
        "empty_cache": lambda: None,
        "get_rng_state": lambda device=None: states["state"].clone(),
        "set_rng_state": lambda state, device=None: states.update(state=state.clone()),
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "Event": lambda *args, **kwargs: event,
        "Stream": lambda *args, **kwargs: _stream(gpu),
        "current_stream": lambda device=None: _stream(gpu),
        "stream": lambda stream: nullcontext(),
    }


def _accelerator(gpu: MakeBelieve) -> dict[str, Any]:
    return {
        "is_available": lambda: True,
        "current_accelerator": lambda check_available=False: torch.device("cuda"),
        "device_count": lambda: 1,
        "current_device_index": lambda: 0,
        "set_device_index": lambda device: None,
        "current_stream": lambda device=None: _stream(gpu),
        "synchronize": lambda device=None: gpu.wait("synchronize"),
    }


def _files(gpu: MakeBelieve) -> dict[str, Any]:
    """Patches of `torch.save`, which records each storage's device, and `torch.load`, which restores it."""
    real_restored = torch.serialization.default_restore_location

    def location(storage: Any) -> str:
        storage = getattr(storage, "_untyped_storage", storage)
        place = gpu.places[storage._cdata][1] if storage._cdata in gpu.places else CPU
        if place == GPU:
            gpu.wait("save")
        return str(place or CPU)

    def restored(storage: Any, location: str) -> Any:
        if not location.startswith("cuda"):
            return real_restored(storage, location)
        gpu.put_storage(getattr(storage, "_untyped_storage", storage), device_of(location))
        return storage

    return {"location_tag": location, "default_restore_location": restored}
