"""Devices and precision: what this machine can do."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from tinyclip.common.schema import Precision


def best_device() -> torch.device:
    """Return CUDA if available, else MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))  # set by torchrun: one GPU per process
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def resolve_device(name: str | torch.device) -> torch.device:
    """Return the named device, or the best one for `auto`; `ValueError` when this machine does not have it."""
    if name == "auto" or (name == "cuda" and torch.cuda.is_available()):
        return best_device()
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ValueError(f"device {name!r} is not available here; the best is {best_device().type!r}") from None
    return device


def best_precision(device: torch.device) -> Precision:
    """Return bfloat16 where the device has it natively, float16 (with loss scaling) on older GPUs, else float32."""
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float16"
    if device.type == "cpu" and _cpu_has_bfloat16():
        return "bfloat16"
    return "float32"


def resolve_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """Resolve a dtype or its name: None is float32, "auto" is `best_precision` of the device.

    Raises:
        ValueError: for an unsupported dtype.
    """
    name = str(dtype or "float32").removeprefix("torch.")
    name = best_precision(device) if name == "auto" else name
    if name not in ("float32", "bfloat16", "float16", "float64"):
        raise ValueError(f"dtype {name!r}: choose auto, float32, bfloat16 or float16")
    found: torch.dtype = getattr(torch, name)
    return found


def _cpu_has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 natively; emulated bfloat16 is slower than float32."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})
