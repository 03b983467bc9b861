"""Checkpoints: a directory with `config.json`, `model.safetensors`, `tokenizer.json`, `preprocess.json`, and the model
card `README.md`.

A directory is written next to its destination and renamed into place, so a reader never sees a partial one.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tinyclip.common.files import check_utf8, read_json_object
from tinyclip.common.folders import atomic_directory
from tinyclip.common.schema import explain
from tinyclip.inputs.tokenizer import CLIPTokenizer
from tinyclip.inputs.transforms import Preprocess
from tinyclip.model.config import CLIPConfig
from tinyclip.model.model import CLIP, unfilled
from tinyclip.zoo.card import Card, write_card
from tinyclip.zoo.hugging_face import WEIGHTS as HUGGING_FACE_WEIGHTS  # includes our own file name
from tinyclip.zoo.hugging_face import read_hugging_face
from tinyclip.zoo.openai import (
    OPEN_CLIP_CONFIG,
    OPEN_CLIP_WEIGHTS,
    Foreign,
    agree,
    check_activation,
    read_file,
    read_open_clip,
)
from tinyclip.zoo.resolve import find_export

WEIGHTS = "model.safetensors"
FILES = ("config.json", WEIGHTS, "tokenizer.json", "preprocess.json", "README.md")  # files of our checkpoints
MODULES = "modules.json"  # sentence-transformers' list of modules


def save_checkpoint(
    path: str | Path,
    model: CLIP,
    tokenizer: CLIPTokenizer,
    preprocess: Preprocess,
    dtype: torch.dtype | None = None,
    card: Card | None = None,
    known: Collection[str] = (),
) -> None:
    """Write a model and everything it needs, atomically; `dtype` converts floating-point weights.

    Args:
        card: facts about the model for its README.md; by default only its shape.
        known: see `atomic_directory`.

    Raises:
        ValueError: if the folder cannot be written, its path is not valid UTF-8, or it holds anything besides our
            checkpoint.
    """
    check_utf8(path)
    card = card or Card()
    with atomic_directory(path, "model", known=known) as folder:
        save_into(folder, model, tokenizer, preprocess, dtype)
        write_card(folder, model.config, card.model_copy(update={"name": card.name or Path(path).name}))


def save_into(
    folder: Path,
    model: CLIP,
    tokenizer: CLIPTokenizer,
    preprocess: Preprocess,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a checkpoint's files, except its card, into an existing folder (see `save_checkpoint`)."""
    state = model.state_dict()
    if dtype is not None:  # weights only: batch-norm variances may exceed float16's range
        weights = {key for key, _ in model.named_parameters()}
        state = {key: value.to(dtype) if key in weights else value for key, value in state.items()}
    (folder / "config.json").write_text(model.config.model_dump_json(indent=2) + "\n", encoding="utf-8")
    (folder / "preprocess.json").write_text(preprocess.model_dump_json(indent=2) + "\n", encoding="utf-8")
    tokenizer.save(folder / "tokenizer.json")
    write_weights(folder / WEIGHTS, state)


def write_weights(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file into a checkpoint's new folder; `OSError` if that fails."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    try:
        save_file(tensors, path, metadata={"format": "pt"} | dict(metadata or {}))
        path.chmod(0o644)  # safetensors creates a private file
    except SafetensorError as error:  # a full disk, for example
        raise OSError(str(error)) from None


def load_checkpoint(
    path: str | Path,
    activation: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> tuple[CLIP, CLIPTokenizer, Preprocess]:
    """Read and validate a checkpoint in our format or another; weights are returned in float32. Warn about settings
    that neither a foreign file nor the user gives.

    Args:
        activation: for a file that does not state its own (see `openai.read_file`).
        mean, std: image normalisation, both or neither, for a checkpoint that does not state it.

    Raises:
        ValueError: if a part is missing or damaged, or parts do not fit each other; names them.
    """
    check_utf8(path)
    path = _whole(Path(path))
    check_activation(activation, str(path))
    if find_export(path) is not None:
        raise ValueError(
            f"{path} is an export, which cannot be used for this; give the checkpoint that it was made from"
        )
    try:
        if (foreign := read_foreign(path, activation)) is not None:
            model = filled(foreign.config, foreign.state, f"{path} is not a complete CLIP")
            preprocess = _looks(foreign.preprocess, mean, std, "normalisation" in foreign.says, str(path))
            _say_assumed(path, foreign, activation, mean)
            return model, foreign.tokenizer, preprocess
    except ValueError as error:
        if path.is_file() and _record(path).exists():
            raise ValueError(f"{error}; delete {path} to download it again") from None
        raise
    if not path.is_dir():
        raise ValueError(f"{path}: no such checkpoint")
    config = CLIPConfig.from_json(path / "config.json")
    agree(activation, config.activation, str(path / "config.json"))
    tokenizer = CLIPTokenizer.from_file(path / "tokenizer.json")
    preprocess = _looks(read_preprocess(path / "preprocess.json"), mean, std, True, str(path / "preprocess.json"))
    if tokenizer.vocab_size != config.text.vocab_size:
        raise ValueError(
            f"{path}: tokenizer.json has {tokenizer.vocab_size} tokens, config.json says {config.text.vocab_size}"
        )
    if preprocess.image_size != config.vision.image_size:
        raise ValueError(
            f"{path}: preprocess.json makes {preprocess.image_size} px images, "
            f"config.json says {config.vision.image_size}"
        )
    model = filled(config, read_weights(path / WEIGHTS), f"{path / WEIGHTS} does not fit its config")
    return model, tokenizer, preprocess


def _looks(
    preprocess: Preprocess, mean: Sequence[float] | None, std: Sequence[float] | None, said: bool, where: str
) -> Preprocess:
    """Return the transform with the user's mean and std.

    Raises:
        ValueError: if they are invalid, one is missing, or the checkpoint states others.
    """
    if mean is None and std is None:
        return preprocess
    if mean is None or std is None:
        raise ValueError(f"{where}: give mean and std together")
    try:
        given = Preprocess.model_validate({"image_size": preprocess.image_size, "mean": mean, "std": std})
    except ValidationError:
        raise ValueError(f"{where}: mean {mean} and std {std} should be three numbers each, std above 0") from None
    if said and given != preprocess:
        raise ValueError(f"{where} says mean {preprocess.mean} and std {preprocess.std}, so they cannot be changed")
    return given


def _say_assumed(path: Path, foreign: Foreign, activation: str | None, mean: Sequence[float] | None) -> None:
    """Warn about settings that a bare file does not state. Published models (files with a download record) need no
    warning, since theirs are known."""
    if foreign.says or _record(path).exists():
        return
    assumed = [] if activation else [f"the activation is {foreign.config.activation} (activation)"]
    assumed += [] if mean is not None else ["pictures are normalised by OpenAI's mean and std (mean, std)"]
    if assumed:
        warnings.warn(
            f"{path} does not state it, so assuming that {' and that '.join(assumed)}; "
            "override with these options of load, convert and export",
            stacklevel=2,
        )


def _record(path: Path) -> Path:
    """Return the path of a file's download record."""
    return path.with_name(f"{path.name}.json")


def filled(config: CLIPConfig, state: Mapping[str, Tensor], trouble: str) -> CLIP:
    """Return a model with these weights; `ValueError` as in `check_state`, before memory for the model is allocated."""
    shapes = unfilled(config)
    check_state(shapes, state, trouble)
    model = shapes.to_empty(device="cpu")
    model.load_state_dict(dict(state))
    return model.eval()


def read_config(path: str | Path) -> CLIPConfig:
    """Return the shape of a checkpoint: ours from the config alone, others' from the weights.

    Raises:
        ValueError: as in `load_checkpoint`.
    """
    path = _whole(Path(path))
    ours = (path / "preprocess.json").exists()
    return CLIPConfig.from_json(path / "config.json") if ours else load_checkpoint(path)[0].config


def read_tokenizer(path: str | Path) -> CLIPTokenizer:
    """Return a checkpoint's tokenizer, without reading weights if it is ours; `ValueError` as in `load_checkpoint`."""
    path = _whole(Path(path))
    foreign = read_foreign(path)
    return foreign.tokenizer if foreign is not None else CLIPTokenizer.from_file(path / "tokenizer.json")


def _whole(path: Path) -> Path:
    """Return the folder of a weights file with a config next to it, since the config says more than the tensors. For a
    sentence-transformers folder return the folder of its CLIP; else the path itself."""
    if (path / MODULES).is_file() and not (path / "config.json").is_file():
        return path / _clip_of_modules(path / MODULES)
    configs = dict.fromkeys(HUGGING_FACE_WEIGHTS, "config.json") | dict.fromkeys(OPEN_CLIP_WEIGHTS, OPEN_CLIP_CONFIG)
    return path.parent if path.name in configs and (path.parent / configs[path.name]).is_file() else path


def _clip_of_modules(path: Path) -> str:
    """Return the CLIP's folder from sentence-transformers' list of modules; `ValueError` if it lists none."""
    try:
        modules = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error})") from None
    for module in modules if isinstance(modules, list) else ():
        name = module.get("path") if isinstance(module, dict) else None
        if isinstance(name, str) and Path(name).name == name and (path.parent / name / "config.json").is_file():
            return name
    raise ValueError(f"{path}: does not name a folder with a CLIP")


def read_foreign(path: Path, activation: str | None = None) -> Foreign | None:
    """Read a checkpoint of others, file or folder; None if it is our folder or does not exist."""
    check_activation(activation, str(path))
    if path.is_file():
        beside = (path.parent / OPEN_CLIP_CONFIG).is_file()  # it says more than the tensors
        return read_open_clip(path.parent, activation, path) if beside else read_file(path, activation)
    if not path.is_dir():
        return None
    config, open_clip = path / "config.json", path / OPEN_CLIP_CONFIG
    kind = ""
    if config.is_file():
        with suppress(ValueError):  # damaged: treated as ours, whose reader reports the fault
            kind = str(read_json_object(config).get("model_type", ""))
    if open_clip.is_file() and kind != "clip":  # hub folders may have both
        return read_open_clip(path, activation)
    return read_hugging_face(path, activation) if kind else None


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file; `ValueError` if it is missing or damaged."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: damaged or not a safetensors file ({error})") from None


def check_state(model: torch.nn.Module, state: Mapping[str, Tensor], trouble: str) -> None:
    """Check that the weights match the model's keys and shapes exactly and are finite.

    Raises:
        ValueError: `trouble`, with the first few keys that are missing, unexpected, misshapen or not finite.
    """
    expected = model.state_dict()
    problems = [f"missing {key}" for key in expected if key not in state]
    problems += [f"unexpected {key}" for key in state if key not in expected]
    for key, value in state.items():
        if key not in expected:
            continue
        if value.shape != expected[key].shape:
            problems.append(f"{key} is {tuple(value.shape)}, not {tuple(expected[key].shape)}")
        # Via float, because 8-bit types do not support isfinite.
        elif not torch.isfinite(value.float()).all():
            problems.append(f"{key} has non-finite values")
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise ValueError(f"{trouble}: {'; '.join(problems[:5])}{more}")


def read_preprocess(path: Path) -> Preprocess:
    """Read a `preprocess.json`; `ValueError` if the file is missing or damaged."""
    try:
        return Preprocess.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except ValidationError as error:
        raise ValueError(f"{path}: {explain(error)}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error})") from None
