"""Load any model, ready to use: a checkpoint, a name or an export (`tinyclip.load`). Imports torch only when needed."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from tinyclip.inference.engines import EXTRAS
from tinyclip.inference.exported import RuntimePipeline, check_device, load_export
from tinyclip.zoo.resolve import find_export

if TYPE_CHECKING:
    import torch

    from tinyclip.inference.pipeline import Pipeline, Tensors


@overload  # exports too, as only the folder tells them apart: `RuntimePipeline` has `Pipeline`'s methods
def load(
    name_or_path: str | Path,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    activation: str | None = None,
    cache: str | Path | None = None,
    compile: bool = False,
    runtime: Literal["auto", "torch"] = "auto",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Pipeline: ...


@overload
def load(
    name_or_path: str | Path,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    activation: str | None = None,
    cache: str | Path | None = None,
    compile: bool = False,
    runtime: str = "auto",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Pipeline | RuntimePipeline: ...


def load(
    name_or_path: str | Path,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    activation: str | None = None,
    cache: str | Path | None = None,
    compile: bool = False,
    runtime: str = "auto",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Any:
    """Load a model, ready to use: a checkpoint of tinyclip or another library (`docs/convert.md`), a zoo model by name
    (`docs/zoo.md`), one from the Hugging Face hub (`org/name`), or a folder written by `tinyclip export`
    (`docs/export.md`). The last is returned as a `RuntimePipeline`, which has the methods of a `Pipeline` and returns
    NumPy arrays; torch is then not imported.

    Args:
        device: device for the weights; "auto" takes CUDA, then MPS, then the CPU. Exports run on the CPU.
        dtype: dtype of the weights, float32 by default; "auto" is bfloat16 if the device supports it, float16 on
            older GPUs, else float32.
        activation: `gelu` or `quick_gelu`, for other libraries' files that do not specify it.
        mean: three numbers to subtract from pixel values of 0 to 1, for other libraries' files that do not specify
            them.
        std: three numbers to divide by after that.
        cache: folder for zoo downloads; by default $TINYCLIP_CACHE or the platform's cache folder.
        compile: run both towers through `torch.compile`, which takes a minute and pays off for long jobs
            (`docs/inference.md`); the weights must not change afterwards.
        runtime: "auto" is the fastest installed runtime for an export, and torch for a checkpoint, since converting
            only pays off for thousands of images (`docs/export.md`). "openvino" and "onnxruntime" convert a
            checkpoint in memory.

    Raises:
        ValueError: if the model is missing, cannot be downloaded or is inconsistent, or the runtime is not installed
            or cannot run it.

    >>> import tinyclip
    >>> tinyclip.load("emoji-student")
    Pipeline(vit at 48 px, 32 tokens, 2.1 M parameters, float32 on cpu)
    """
    if runtime not in ("auto", *EXTRAS, "torch"):
        raise ValueError(f"runtime {runtime!r}: choose auto, openvino, onnxruntime or torch")
    is_export = find_export(name_or_path) is not None
    if is_export or runtime in EXTRAS:
        check_device(str(name_or_path), device)
        if compile:
            raise ValueError("`compile` is for torch; other runtimes always compile")
    if is_export:
        if activation:
            raise ValueError(f"{name_or_path} is an export, whose activation is part of its graph")
        if mean is not None or std is not None:
            raise ValueError(f"{name_or_path} is an export, which records its own mean and std")
        return load_export(name_or_path, runtime, dtype)
    from tinyclip.inference import pipeline

    if runtime in EXTRAS:
        return _converted(
            pipeline.load(name_or_path, activation=activation, cache=cache, mean=mean, std=std), runtime, dtype
        )
    return pipeline.load(name_or_path, device, dtype, activation, cache, compile, mean, std)


def _converted(clip: Pipeline, runtime: str, dtype: Any) -> RuntimePipeline:
    """Convert a checkpoint's model to another runtime, through a temporary folder."""
    from tinyclip.export.export import check_request, write

    to = "onnx" if runtime == "onnxruntime" else "openvino"
    check_request(to, False, None)
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), clip, {"export": to, "precision": "float32"})
        converted = load_export(folder, runtime, dtype)
        converted.load_towers()
    return converted


def load_encoder(
    name_or_path: str | Path,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    compile: bool = False,
    runtime: str = "auto",
) -> Pipeline | Tensors:
    """`tinyclip.load` for code that uses torch: exports return tensors too.

    Raises:
        ValueError: as `tinyclip.load`.
    """
    from tinyclip.inference.pipeline import Tensors

    clip = load(name_or_path, device, dtype, compile=compile, runtime=runtime)
    return Tensors(clip) if isinstance(clip, RuntimePipeline) else clip
