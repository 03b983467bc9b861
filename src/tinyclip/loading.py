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


@overload  # of an export too, which only its folder can tell: `RuntimePipeline` has the methods of `Pipeline`
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
    """A model ready to use: from a checkpoint of ours or of others (`docs/convert.md`), by its name in the zoo
    (`docs/zoo.md`), from the Hugging Face hub (`org/name`), or from a folder that `tinyclip export` wrote
    (`docs/export.md`). The last comes as a `RuntimePipeline`, which has the methods of a `Pipeline` and gives NumPy
    arrays; torch is then not imported.

    Args:
        device: where the weights go; "auto" takes CUDA, then MPS, then the CPU. Exports run on the CPU.
        dtype: of the weights, float32 by default; "auto" is bfloat16 where the device computes in it, float16 on
            older GPUs, else float32.
        activation: `gelu` or `quick_gelu`, for a file of others that cannot say it.
        mean: three numbers that are taken from pictures of 0 to 1, for a file of others that cannot say it.
        std: three numbers that they are then divided by.
        cache: folder of zoo downloads; $TINYCLIP_CACHE or the platform's by default.
        compile: run both towers through `torch.compile`, which takes a minute here and pays for long work
            (`docs/inference.md`); the weights must not change after.
        runtime: "auto" is the fastest that is installed for an export, and torch for a checkpoint, as converting
            takes longer than it spares until there are thousands of pictures (`docs/export.md`). "openvino" and
            "onnxruntime" convert a checkpoint in memory.

    Raises:
        ValueError: when it is missing, cannot be downloaded, anything in it does not fit, or the runtime is not
            installed or cannot run it.

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
            raise ValueError("`compile` is torch's; a runtime compiles by itself")
    if is_export:
        if activation:
            raise ValueError(f"{name_or_path} is an export, whose activation is part of its graph")
        if mean is not None or std is not None:
            raise ValueError(f"{name_or_path} is an export, which says its mean and std")
        return load_export(name_or_path, runtime, dtype)
    from tinyclip.inference import pipeline

    if runtime in EXTRAS:
        return _converted(
            pipeline.load(name_or_path, activation=activation, cache=cache, mean=mean, std=std), runtime, dtype
        )
    return pipeline.load(name_or_path, device, dtype, activation, cache, compile, mean, std)


def _converted(clip: Pipeline, runtime: str, dtype: Any) -> RuntimePipeline:
    """A checkpoint's model on another runtime, by way of a folder that is gone after."""
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
    """`tinyclip.load` for what computes with torch: exports give tensors too.

    Raises:
        ValueError: as `tinyclip.load`.
    """
    from tinyclip.inference.pipeline import Tensors

    clip = load(name_or_path, device, dtype, compile=compile, runtime=runtime)
    return Tensors(clip) if isinstance(clip, RuntimePipeline) else clip
