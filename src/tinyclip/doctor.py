"""Check what this machine has for tinyclip, and what is missing."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

from tinyclip.version import __version__
from tinyclip.zoo.catalogue import SHIPPED, cache_folder

# Purpose of each extra in pyproject.toml, where its packages are listed. Other extras are for developing tinyclip.
EXTRAS = {
    "app": "tinyclip app",
    "heif": "HEIC and HEIF pictures",
    "onnx": "exports to ONNX, and running them on onnxruntime",
    "openvino": "exports to OpenVINO, running them, and 8-bit quantisation",
    "probe": "tinyclip probe with scikit-learn",
    "search": "tinyclip index and tinyclip search",
    "teachers": "teachers from OpenCLIP and transformers",
    "tracking": "following runs in TensorBoard, trackio or wandb",
}
LOW_DISK_GB = 2  # a published model takes up to 1 GB


def examine(cache: str | Path | None = None) -> dict[str, Any]:
    """Return everything that `tinyclip doctor` reports, ready for JSON. `problems` is empty if all is well; each is one
    line that says what is broken and what to do."""
    problems: list[str] = []
    packages = _packages(problems)
    result: dict[str, Any] = {
        "tinyclip": __version__,
        "place": str(Path(__file__).parent),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
    }
    result |= _torch(problems)
    result["cache"] = _cache(cache, problems)
    result["problems"] = problems
    return result


def _packages(problems: list[str]) -> list[dict[str, Any]]:
    """Return all packages, including optional ones: `name`, installed `version` or None, `wanted`, `extra` or None."""
    try:
        requirements = metadata.requires("tinyclip") or []
    except metadata.PackageNotFoundError:
        problems.append("tinyclip itself is not installed, only its source is here: pip install --editable FOLDER")
        return []
    found = []
    for requirement in requirements:
        name, wanted, extra = _parsed(requirement)
        if extra is not None and extra not in EXTRAS:
            continue
        version = _version(name)
        found.append({"name": name, "version": version, "wanted": wanted, "extra": extra})
        if extra is None and (version is None or not _fits(version, wanted)):
            here = f"{name} {version} is installed" if version else f"{name} is missing"
            problems.append(f"{here}, tinyclip needs {name}{wanted}: pip install '{name}{wanted}'")
    return found


def _parsed(requirement: str) -> tuple[str, str, str | None]:
    """Return name, versions and extra of a requirement like `onnx>=1.17; extra == "export"`."""
    name, _, marker = requirement.partition(";")
    match = re.match(r"\s*([\w.-]+)(\[[^\]]*\])?\s*(.*)", name)
    assert match, requirement
    extra = re.search(r"extra == ['\"]([\w-]+)['\"]", marker)
    return match[1], match[3].strip(" ()"), extra[1] if extra else None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _fits(version: str, wanted: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(wanted).contains(version, prereleases=True)


def _torch(problems: list[str]) -> dict[str, Any]:
    """Return device, precision, threads and compiler, and whether the shipped student runs."""
    try:
        import torch

        from tinyclip.common.devices import best_device, best_precision
    except Exception as error:  # a broken installation can raise almost anything
        text = str(error).splitlines()
        reason = text[0] if text else type(error).__name__
        problems.append(f"torch cannot be imported ({reason}): pip install --force-reinstall torch")
        return {"device": None, "precision": None, "threads": None, "compiler": None}
    device = best_device()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    precision = best_precision(device)
    try:
        _answers(precision)
    except Exception as error:
        problems.append(f"the shipped model does not work here ({error}): pip install --force-reinstall tinyclip")
    return {
        "device": {"best": str(device), "name": name},
        "precision": {"auto": precision, "why": _why(device.type, precision)},
        "threads": _threads(torch.get_num_threads()),
        "compiler": _compiler(),
    }


def _answers(precision: str) -> None:
    """Run the shipped student once: weights, vocabulary, both towers."""
    import numpy as np

    from tinyclip.inference.pipeline import load

    clip = load(SHIPPED[0], device="auto", dtype=precision)
    chances = clip.classify(np.zeros((64, 64, 3), np.uint8), ["a dog", "a cat"])
    if not abs(chances.sum().item() - 1) < 1e-3:
        raise ValueError("its probabilities do not add up to 1")


def _why(device: str, precision: str) -> str:
    """Explain the choice of `dtype="auto"` (see `devices.best_precision`)."""
    return {
        ("cuda", "bfloat16"): "the GPU supports it",
        ("cuda", "float16"): "the GPU is older than bfloat16",
        ("cpu", "bfloat16"): "the processor multiplies it natively (AVX-512 BF16, AMX or Arm BF16)",
        ("cpu", "float32"): "the processor has no native bfloat16",
    }.get((device, precision), f"the only one used on {device}")


def _threads(used: int) -> dict[str, Any]:
    """Return the threads torch uses, and the cores available to this process by affinity and by its control group."""
    cores: float = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, int(quota) / int(period))
    except (OSError, ValueError):  # no control group, or "max": no limit
        pass
    more = used > cores + 0.5
    advice = f"more threads than cores slow torch down: set OMP_NUM_THREADS={max(1, int(cores))}" if more else None
    return {"torch": used, "cores": cores, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"), "advice": advice}


def _compiler() -> str | None:
    """Return the compiler `torch.compile` would use on a CPU."""
    return shutil.which(os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++"))


def _cache(cache: str | Path | None, problems: list[str]) -> dict[str, Any]:
    """Return the download folder and its free space in GB."""
    folder = cache_folder(cache)
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(there).free / 1e9
    try:
        tempfile.TemporaryFile(dir=there).close()
        writable = True
    except OSError:
        writable = False
        problems.append(f"downloads cannot be stored in {folder}: set TINYCLIP_CACHE to a writable folder")
    return {"folder": str(folder), "free_gb": round(free, 1), "writable": writable, "low": free < LOW_DISK_GB}


def rows(facts: dict[str, Any]) -> list[list[str]]:
    """Format the result of `examine` as rows of name, value and remark."""
    device, precision, threads, cache = (facts[key] for key in ("device", "precision", "threads", "cache"))
    lines = [
        ["tinyclip", facts["tinyclip"], facts["place"]],
        ["python", facts["python"], facts["platform"]],
    ]
    if device:
        lines += [
            ["device", device["best"], device["name"]],
            ["precision", precision["auto"], precision["why"]],
            ["threads", str(threads["torch"]), threads["advice"] or f"{threads['cores']:g} cores"],
            ["compiler", facts["compiler"] or "none", "for --compile and `compile` in recipes" + _how_compiler(facts)],
        ]
    low = ", which is little: a published model can take 1 GB" if cache["low"] else ""
    lines.append(["cache", f"{cache['free_gb']:g} GB free", f"{cache['folder']}{low}"])
    for package in facts["packages"]:
        if package["extra"] is None:
            lines.append([package["name"], package["version"] or "missing", f"needed, {package['wanted']}"])
    return lines + _optional(facts["packages"])


def _how_compiler(facts: dict[str, Any]) -> str:
    return "" if facts["compiler"] else "; install a C++ compiler (g++ or clang++)"


def _optional(packages: list[dict[str, Any]]) -> list[list[str]]:
    lines = []
    for package in packages:
        extra, version = package["extra"], package["version"]
        if extra is None:
            continue
        fits = version is not None and _fits(version, package["wanted"])
        how = "" if fits else f": pip install 'tinyclip[{extra}]'"
        lines.append([package["name"], version or "missing", f"for {EXTRAS.get(extra, extra)}{how}"])
    return lines
