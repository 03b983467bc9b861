"""Post-training quantisation to 8 bits of ONNX or OpenVINO towers, calibrated on images and captions."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np

from tinyclip.common.progress import track
from tinyclip.export.agreement import Samples
from tinyclip.inference.engines import core, needed, save_openvino
from tinyclip.inference.pipeline import Pipeline
from tinyclip.inputs.tokenizer import pad
from tinyclip.zoo.resolve import ENDINGS

# How many weight matmuls at the start and end of a tower stay in float; the next entry is tried if the check fails.
# The last matmul is the projection, which computes only one position and matters most.
KEPT = ((0, 1), (1, 1), (5, 5))


def quantise(
    source: Path, target: Path, to: str, clip: Pipeline, samples: Samples, kept: tuple[int, int]
) -> dict[str, list[str]]:
    """Write both towers of an export in 8 bits to another folder; return what stayed in float, by tower."""
    context = clip.model.config.text.context_length
    rows = clip.tokenizer.rows(samples.texts, context)
    inputs = {
        "image": [pixels[None] for pixels in samples.pixels],
        "text": [pad([row], len(row)) for row in rows],
    }
    write = {"onnx": _onnx, "openvino": _openvino}[to]
    return {
        tower: write(source / f"{tower}{ENDINGS[to]}", target / f"{tower}{ENDINGS[to]}", inputs[tower], kept)
        for tower in inputs
    }


class _Told:
    """Calibration inputs that report how many have been used."""

    def __init__(self, inputs: list[np.ndarray], tower: str) -> None:
        self.inputs, self.what = inputs, f"quantising the {tower} tower"

    def __len__(self) -> int:
        return len(self.inputs)

    def __iter__(self) -> Iterator[np.ndarray]:
        return track(self.inputs, self.what, len(self.inputs), "inputs")


def _ends(names: list[str], kept: tuple[int, int]) -> list[str]:
    first, last = kept
    return list(dict.fromkeys([*names[:first], *names[len(names) - last :]]))


def _openvino(source: Path, target: Path, inputs: list[np.ndarray], kept: tuple[int, int]) -> list[str]:
    model, nncf = core().read_model(source), _nncf()
    products = [
        op.get_friendly_name()
        for op in model.get_ordered_ops()
        if op.get_type_name() in ("MatMul", "Convolution")
        and op.input_value(1).get_node().get_type_name() == "Constant"
    ]
    ignored = _ends(products, kept)
    unsmoothed = nncf.AdvancedSmoothQuantParameters(convolution=-1, matmul=-1)
    with _silent():
        quantised = nncf.quantize(
            model,
            nncf.Dataset(_Told(inputs, target.stem)),
            model_type=nncf.ModelType.TRANSFORMER,
            preset=nncf.QuantizationPreset.PERFORMANCE,  # symmetric: no zero points to correct for
            subset_size=len(inputs),
            # 8-bit attention costs accuracy and is slower (`benchmarks/export.py`). Smoothing is slower too, as it
            # multiplies the input of each matmul.
            ignored_scope=nncf.IgnoredScope(names=ignored, types=["ScaledDotProductAttention"], validate=False),
            advanced_parameters=nncf.AdvancedQuantizationParameters(smooth_quant_alphas=unsmoothed),
        )
    save_openvino(quantised, target)
    return ignored


def _nncf() -> Any:
    """Import NNCF without its usage reporting."""
    reporter = "openvino_telemetry"
    if "nncf" not in sys.modules and reporter not in sys.modules:
        sys.modules[reporter] = None  # type: ignore[assignment]  # makes its import fail, which NNCF tolerates
        try:
            return needed("nncf", "openvino")
        finally:
            del sys.modules[reporter]
    return needed("nncf", "openvino")


@contextmanager
def _silent() -> Iterator[None]:
    """Silence progress bars and messages of other libraries."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
            yield
    finally:
        logging.disable(level)


def _onnx(source: Path, target: Path, inputs: list[np.ndarray], kept: tuple[int, int]) -> list[str]:
    onnx = needed("onnx")
    quantization = needed("onnxruntime.quantization", "onnx")
    model = onnx.load(source)
    weights = {tensor.name for tensor in model.graph.initializer}
    products = [
        node.name
        for node in model.graph.node
        if node.op_type in ("MatMul", "Gemm", "Conv") and node.input[1] in weights
    ]
    ignored = _ends(products, kept)
    chosen = [name for name in products if name not in ignored]
    if not chosen:  # ONNX Runtime treats an empty list as all
        onnx.save(model, target)
        return ignored

    class Reader(quantization.CalibrationDataReader):  # type: ignore[name-defined]
        def __init__(self) -> None:
            self.rows = iter(_Told(inputs, target.stem))

        def get_next(self) -> Any:
            row = next(self.rows, None)
            return None if row is None else {"input": row}

    with _silent():
        quantization.quantize_static(
            source,
            target,
            Reader(),
            nodes_to_quantize=chosen,
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            extra_options={"OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm", "Conv"]},
        )
    return ignored
