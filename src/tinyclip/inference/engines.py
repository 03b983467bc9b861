"""The runtimes for exported towers: OpenVINO, ONNX Runtime, or torch for its own format. Each is imported only when
needed."""

from __future__ import annotations

import errno
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Tower:
    """A tower ready to run: takes batches, yields their features in order."""

    run: Callable[[Iterable[np.ndarray]], Iterator[np.ndarray]]
    lanes: int = 1  # batches it computes in parallel, each on its share of the cores

    def batch(self, count: int, most: int) -> int:
        """Return the batch size for `count` items that keeps all lanes busy; at most `most`."""
        return max(1, min(most, -(-count // self.lanes)))


# Runtimes for each format, fastest first (docs/export.md).
RUNS = {"onnx": ("openvino", "onnxruntime"), "openvino": ("openvino",), "torch": ("torch",)}
EXTRAS = {"openvino": "openvino", "onnxruntime": "onnx"}
HINTS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}  # OpenVINO's names


def needed(package: str, extra: str | None = None) -> Any:
    """Import a package and return it.

    Raises:
        ValueError: if it is not installed; the message gives the install command.
    """
    root = package.partition(".")[0]
    try:
        return _openvino_alone() if package == "openvino" else import_module(package)
    except ImportError as error:
        if error.name is not None and error.name.partition(".")[0] != root:
            raise ValueError(f"{package} cannot be imported: {error}") from None
        raise ValueError(f"needs {root}: pip install tinyclip[{extra or EXTRAS[root]}]") from None


def _openvino_alone() -> Any:
    """Import OpenVINO without its converter, which takes half of the import time and sends usage data."""
    converter = "openvino.tools.ovc"
    if "openvino" in sys.modules or converter in sys.modules:
        return import_module("openvino")
    sys.modules[converter] = None  # type: ignore[assignment]  # makes its import fail, which OpenVINO tolerates
    try:
        return import_module("openvino")
    finally:
        del sys.modules[converter]


def choose(kind: str, wanted: str, where: str) -> str:
    """Return the runtime for a format: the named one, or with "auto" the fastest that is installed.

    Raises:
        ValueError: if it cannot run the format or is not installed; names `where`.
    """
    able = RUNS[kind]
    if wanted == "auto":
        wanted = next((name for name in able if find_spec(name)), able[-1])
    if wanted not in {name for names in RUNS.values() for name in names}:
        raise ValueError(f"runtime {wanted!r}: choose auto, openvino, onnxruntime or torch")
    if wanted not in able:
        raise ValueError(f"{where} is an export to {kind}, which {wanted} cannot run; {' or '.join(able)} can")
    if find_spec(wanted) is None:
        raise ValueError(f"needs {wanted}: pip install tinyclip[{EXTRAS[wanted]}]")
    return wanted


def compute_dtype(runtime: str, dtype: Any) -> str:
    """Return the dtype a runtime computes in: float32 by default; "auto" is bfloat16 if the runtime supports it here.

    Args:
        dtype: a name or a torch dtype.

    Raises:
        ValueError: if the runtime does not support the dtype on this machine.
    """
    name = str(dtype or "float32").removeprefix("torch.")
    has = computes_in(runtime)
    if name == "auto":
        return "bfloat16" if "bfloat16" in has else "float32"
    if name not in has:
        raise ValueError(f"dtype {name!r}: {runtime} computes in {' or '.join(has)} here")
    return name


def core() -> Any:
    """Return OpenVINO's `Core`, one for the lifetime of the process. On CPUs with AMX, the first `Core` gives its
    thread a signal stack and frees it when deleted. Deleted by another thread, it leaves the first thread with a freed
    signal stack, and the next signal, such as SIGCHLD, kills the process."""
    return _core_of(os.getpid())


@cache
def _core_of(process: int) -> Any:
    return needed("openvino").Core()


def computes_in(runtime: str) -> list[str]:
    """Return the floating-point types that a runtime supports on this processor."""
    if runtime != "openvino":
        return ["float32"]
    found = core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return [name for name, short in (("float32", "FP32"), ("bfloat16", "BF16"), ("float16", "FP16")) if short in found]


def save_openvino(model: Any, file: Path) -> None:
    """Write an OpenVINO model without converting its weights.

    Raises:
        OSError: if it cannot be written.
    """
    try:
        needed("openvino").save_model(model, file, compress_to_fp16=False)
    except RuntimeError as error:  # what OpenVINO raises when the disk is full
        raise OSError(errno.ENOSPC, f"is the disk full? ({_gist(error)})") from None


def start(runtime: str, file: Path, dtype: str) -> Tower:
    """Load the tower in a file, ready to run.

    Raises:
        ValueError: if the runtime cannot load it; includes the runtime's message.
    """
    try:
        return STARTS[runtime](file, dtype)
    except ValueError:
        raise
    except Exception as error:  # each runtime has its own exception classes
        version = getattr(sys.modules.get(runtime), "__version__", "")
        raise ValueError(
            f"{file}: {runtime} {version} cannot load it ({_gist(error)}); export the model again"
        ) from None


def _gist(error: Exception) -> str:
    """Return the message of a runtime's error, without its source locations."""
    lines = [line.strip() for line in str(error).splitlines()]
    said = [line for line in lines if line and not line.startswith(("Exception from", "Check '", "["))]
    return (said or lines or [type(error).__name__])[0][:300]


def _openvino(file: Path, dtype: str) -> Tower:
    # Several batches in parallel, each on its share of the cores: 25 % faster than one at a time on all cores.
    settings = {"INFERENCE_PRECISION_HINT": HINTS[dtype], "PERFORMANCE_HINT": "THROUGHPUT"}
    compiled = core().compile_model(file, "CPU", settings)
    at_once = compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")
    free: list[Any] = []  # requests to reuse

    def unused() -> Any:
        try:
            return free.pop()
        except IndexError:  # none left; another thread may have taken the last one
            return compiled.create_infer_request()

    def run(inputs: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        busy: deque[tuple[Any, np.ndarray]] = deque()

        def first_done() -> np.ndarray:
            request, _ = busy.popleft()
            request.wait()
            found = request.get_output_tensor(0).data.copy()
            free.append(request)
            return found

        try:
            for batch in inputs:
                if len(busy) == at_once:
                    yield first_done()
                request = unused()
                request.start_async([batch], share_inputs=True)
                busy.append((request, batch))  # keep the batch alive as long as the request
            while busy:
                yield first_done()
        finally:  # also if producing a later batch fails
            for request, _ in busy:
                request.wait()

    return Tower(run, at_once)


def _onnxruntime(file: Path, dtype: str) -> Tower:
    onnxruntime = needed("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only; they are raised anyway
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def run(inputs: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        for batch in inputs:
            yield session.run(None, {name: batch})[0]

    return Tower(run)


_loading = Lock()  # torch can load only one program at a time: its reader is global


def _torch(file: Path, dtype: str) -> Tower:
    import torch

    with _loading:
        module = torch.export.load(file).module()

    def run(inputs: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        for batch in inputs:
            with torch.inference_mode():
                yield module(torch.from_numpy(batch)).numpy()

    return Tower(run)


STARTS: dict[str, Callable[[Path, str], Tower]] = {
    "openvino": _openvino,
    "onnxruntime": _onnxruntime,
    "torch": _torch,
}
