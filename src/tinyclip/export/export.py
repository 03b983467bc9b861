"""Export models to other runtimes: write them, load them back in their runtime, compare them with the float32 model,
and refuse those that disagree."""

from __future__ import annotations

import copy
import io
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from tinyclip.common.files import checksum, json_text
from tinyclip.common.folders import atomic_directory
from tinyclip.common.ownership import MARKER
from tinyclip.common.progress import busy
from tinyclip.evaluate.metrics import Dataset, open_dataset
from tinyclip.export.agreement import Samples, answers, compare, refuse, samples_of, synthetic
from tinyclip.inference.engines import RUNS, compute_dtype, needed, save_openvino
from tinyclip.inference.exported import FORMAT, RuntimePipeline, load_export, read_facts
from tinyclip.inference.pipeline import Pipeline, load
from tinyclip.model.model import CLIP
from tinyclip.version import __version__
from tinyclip.zoo.convert import WRITERS
from tinyclip.zoo.resolve import ENDINGS, FACTS, TOKENIZER

FORMATS = ("onnx", "openvino", "torch", "hf", "open_clip")
OPSET = 18  # supported by ONNX Runtime since 1.14 and OpenVINO since 2023
LARGEST_FILE = 2**31 - 2**24  # bytes of an ONNX file; weights of larger models go into a separate file


def export(
    source: str | Path,
    target: str | Path,
    to: str,
    *,
    int8: bool = False,
    calibration: str | Path | None = None,
    data: str | Path | None = None,
    templates: str | Path | None = None,
    activation: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> dict[str, Any]:
    """Write a model for another runtime to the folder `target`; return the contents of the `tinyclip.json` written
    there.

    Args:
        source: a checkpoint, or a name from the zoo or the hub.
        to: one of `FORMATS`.
        int8: quantise to 8 bits, calibrated on `calibration`.
        calibration: images with captions, in a folder or in shards; also used for the comparison.
        data: evaluation data with classes; both models are evaluated on it.
        activation, mean, std: as in `load_checkpoint`.

    Raises:
        ValueError: if something is missing, the format cannot express the model's shape, or the export disagrees with
            the model. In that case nothing is written.
    """
    check_request(to, int8, calibration)
    dataset = open_dataset(data, templates) if data else None
    clip = load(source, activation=activation, mean=mean, std=std)
    samples = samples_of(calibration, clip) if calibration else synthetic(clip)
    check = Check(clip, samples.part(held_out=True) if int8 else samples, dataset)
    facts: dict[str, Any] = {"export": to, "precision": "int8" if int8 else "float32", "model": str(source)}
    with atomic_directory(target, "model") as folder:
        if to in WRITERS:
            WRITERS[to](folder, clip.model, clip.tokenizer, clip.preprocessing)
            return facts | {"check": {"torch float32": check.of(load(folder), "float32", f"{to} export")}}
        if int8:
            return _write_int8(folder, clip, facts, samples.part(held_out=False), check)
        facts = write(folder, clip, facts)
        facts["check"] = check.everywhere(folder)
        write_facts(folder, facts)
        return facts


def check_request(to: str, int8: bool, calibration: str | Path | None) -> None:
    """Reject invalid requests before loading a model, with the errors of `export`."""
    if to not in FORMATS:
        raise ValueError(f"unknown format {to!r}; choose {', '.join(FORMATS)}")
    if int8 and to not in ("onnx", "openvino"):
        raise ValueError(f"int8 is for onnx and openvino, not {to}")
    if int8 and calibration is None:
        raise ValueError("int8 needs pictures with captions to calibrate on: --calibration-data FOLDER")
    for package in PACKAGES.get(to, ()):
        needed(package, to)
    if int8 and to == "openvino":
        needed("nncf", to)


PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("openvino",)}


class Check:
    """Compares exports with their original model, whose answers are computed only once."""

    def __init__(self, clip: Pipeline, samples: Samples, dataset: Dataset | None) -> None:
        self.samples, self.dataset = samples, dataset
        self.expected = answers(clip, samples, dataset)

    def of(self, clip: Pipeline | RuntimePipeline, precision: str, what: str) -> dict[str, Any]:
        """Return the figures from `compare`; `ValueError` if they exceed the bounds for the precision."""
        figures = compare(self.expected, answers(clip, self.samples, self.dataset), self.samples.real)
        refuse(figures, precision, what)
        return figures

    def everywhere(self, folder: Path) -> dict[str, dict[str, Any]]:
        """Check an export in every runtime and dtype available on this machine."""
        result = {}
        facts = read_facts(folder)
        for runtime in (name for name in RUNS[facts["export"]] if find_spec(name)):
            for dtype in dict.fromkeys(("float32", compute_dtype(runtime, "auto"))):
                precision = "int8" if facts["precision"] == "int8" else dtype
                what = f"{facts['export']} export with {runtime} in {dtype}"
                with busy(f"comparing {runtime} {dtype}"):
                    result[f"{runtime} {dtype}"] = self.of(load_export(folder, runtime, dtype), precision, what)
        return result


def _write_int8(folder: Path, clip: Pipeline, facts: dict[str, Any], samples: Samples, check: Check) -> dict[str, Any]:
    """Quantise, keeping more layers in float as long as the check fails."""
    from tinyclip.export.quantise import KEPT, quantise

    with tempfile.TemporaryDirectory(dir=folder) as float32:
        write(Path(float32), clip, facts | {"precision": "float32"})
        facts = write(folder, clip, facts, towers=False)
        facts["calibration"] = {"images": len(samples.pixels), "texts": len(samples.texts)}
        for attempt, kept in enumerate(KEPT, 1):
            facts["in_float"] = quantise(Path(float32), folder, facts["export"], clip, samples, kept)
            write_facts(folder, facts)
            try:
                facts["check"] = check.everywhere(folder)
                break
            except ValueError:
                if attempt == len(KEPT):
                    raise
    write_facts(folder, facts)
    return facts


# --- the towers as graphs ---------------------------------------------------------------------------------------


class ImageTower(nn.Module):
    def __init__(self, clip: CLIP) -> None:
        super().__init__()
        self.visual = clip.visual

    def forward(self, images: Tensor) -> Tensor:
        """images: float32 (n, 3, image_size, image_size) -> (n, embed_dim), not normalised."""
        return self.visual(images)


class TextTower(nn.Module):
    def __init__(self, clip: CLIP) -> None:
        super().__init__()
        self.clip = copy.copy(clip)  # shares the weights, without the other tower's
        self.clip._modules = {name: module for name, module in clip._modules.items() if name != "visual"}

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: int64 (n, length) -> (n, embed_dim), not normalised."""
        return self.clip.encode_text(tokens)


def programs(model: CLIP) -> dict[str, ExportedProgram]:
    """Trace both towers with `torch.export`, for any batch size and texts of 2 tokens (start and end) up to the full
    context."""
    size, context = model.config.vision.image_size, model.config.text.context_length
    tokens = torch.full((3, min(5, context)), model.config.text.vocab_size - 1)
    length = {1: Dim("length", min=2, max=context)} if context > 2 else {}
    towers: dict[str, tuple[nn.Module, Tensor, dict[int, Any]]] = {
        "image": (ImageTower(model), torch.zeros(3, 3, size, size), {0: Dim("images", min=1)}),
        "text": (TextTower(model), tokens, {0: Dim("texts", min=1)} | length),
    }
    with torch.no_grad(), quietly():
        return {
            name: torch.export.export(tower.eval(), (example,), dynamic_shapes=(shapes,))
            for name, (tower, example, shapes) in towers.items()
        }


def write(folder: Path, clip: Pipeline, facts: dict[str, Any], towers: bool = True) -> dict[str, Any]:
    """Write a folder that `load_export` reads, in float32; return all its facts.

    Args:
        towers: whether to write the towers; False if the caller provides them.
    """
    with busy("tracing both towers"):
        traced = programs(clip.model) if towers else {}
    for name, program in traced.items():
        with quietly(), busy(f"writing the {name} tower"):
            TOWERS[facts["export"]](program, folder / f"{name}{ENDINGS[facts['export']]}")
    clip.tokenizer.save(folder / TOKENIZER)
    versions = {"tinyclip": __version__, "torch": str(torch.__version__)}
    versions |= {name: needed(name).__version__ for name in PACKAGES.get(facts["export"], ())}
    facts = {"format": FORMAT} | facts
    facts |= {"config": clip.model.config.model_dump(mode="json"), "logit_scale": clip.model.logit_scale.item()}
    facts |= {"fingerprint": clip.fingerprint()}
    facts |= {"preprocess": clip.preprocessing.model_dump(mode="json"), "versions": versions}
    facts |= {"opset": OPSET} if facts["export"] == "onnx" else {}
    write_facts(folder, facts)
    return facts


def write_facts(folder: Path, facts: dict[str, Any]) -> None:
    """Write `tinyclip.json`, with the size and CRC-32 of every other file."""
    files = sorted(file for file in folder.iterdir() if file.is_file() and file.name not in (FACTS, MARKER))
    facts["files"] = {file.name: [file.stat().st_size, checksum(file)] for file in files}
    (folder / FACTS).write_text(json_text(facts, indent=2) + "\n", encoding="utf-8")


def _onnx(program: ExportedProgram, file: Path) -> None:
    names: dict[str, Any] = {"input_names": ["input"], "output_names": ["features"]}
    graph = torch.onnx.export(program, opset_version=OPSET, dynamo=True, verbose=False, **names)
    assert graph is not None
    # By default slices and transposes of weights are left to run at every start, hiding the weights from quantisation.
    limits = {"input_size_limit": sys.maxsize, "output_size_limit": sys.maxsize}
    needed("onnxscript.optimizer", "onnx").optimize_ir(graph.model, **limits)
    size = sum(p.numel() * p.element_size() for p in program.state_dict.values())
    graph.save(file, external_data=size > LARGEST_FILE)


def _openvino(program: ExportedProgram, file: Path) -> None:
    save_openvino(needed("openvino.tools.ovc", "openvino").convert_model(program), file)


def _torch(program: ExportedProgram, file: Path) -> None:
    buffer = io.BytesIO()  # torch's own writer aborts the process on a full disk
    torch.export.save(program, buffer)
    file.write_bytes(buffer.getbuffer())


TOWERS: dict[str, Callable[[ExportedProgram, Path], None]] = {"onnx": _onnx, "openvino": _openvino, "torch": _torch}


@contextmanager
def quietly() -> Iterator[None]:
    """Silence the output and warnings of converters; real errors are raised."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
