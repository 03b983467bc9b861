"""Teachers built and run by another library: any OpenCLIP model, any CLIP or SigLIP of `transformers`.

    open_clip:NAME/TAG          an OpenCLIP model with published weights: open_clip:ViT-B-16-SigLIP/webli
    open_clip:NAME@FILE         ... with weights from a file
    open_clip:FOLDER            a folder with `open_clip_config.json`; also open_clip:hf-hub:ORG/NAME
    transformers:ORG/NAME       from the Hugging Face hub, optionally with @REVISION; or a FOLDER

If our own loader can read the model and agrees with the library, it becomes one of our own models, and students can
inherit from it.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tinyclip.common.files import read_json_object
from tinyclip.data.loader import Tokenize
from tinyclip.inference.pipeline import Pipeline
from tinyclip.inputs.transforms import Preprocess
from tinyclip.teachers.teacher import ForeignTeacher, Teacher
from tinyclip.zoo.checkpoint import filled, load_checkpoint
from tinyclip.zoo.openai import from_open_clip
from tinyclip.zoo.resolve import HUB_ID, resolve
from tinyclip.zoo.tensors import Entry

OPEN_CLIP, TRANSFORMERS = "open_clip:", "transformers:"
PROBES = ("a photo of a Red apple, 3/4 ripe", "two dogs")  # texts to try a model with before accepting it
NEAR = 1e-3  # largest difference between normalised features that count as equal


def is_foreign(name: str) -> bool:
    """Whether a teacher's name refers to another library."""
    return name.startswith((OPEN_CLIP, TRANSFORMERS))


def short_name(name: str) -> str:
    """Return a folder name derived from a teacher's name."""
    part = local_part(name)
    return Path(part).stem if Path(part).exists() or not is_foreign(name) else re.sub(r"[^\w.-]+", "-", part)


def local_part(name: str) -> str:
    """Return the file or folder in a teacher's name, if it has one."""
    rest = name.removeprefix(TRANSFORMERS).removeprefix(OPEN_CLIP).removeprefix("local-dir:")
    return rest.partition("@")[2] or rest if name.startswith(OPEN_CLIP) else rest


def load_teacher(name: str, device: torch.device | str = "cpu") -> Pipeline | ForeignTeacher:
    """Load a teacher by path or any kind of name, in float32 on a device; our own models come as a `Pipeline`.

    Raises:
        ValueError: if it is missing, cannot be downloaded, is inconsistent, gives no features, or needs a package that
            is not installed.
    """
    if name.startswith(OPEN_CLIP):
        loaded = _open_clip_teacher(name, device)
    elif name.startswith(TRANSFORMERS):
        loaded = _transformers_teacher(name, device)
    else:
        loaded = Pipeline(*load_checkpoint(resolve(name)))
    if isinstance(loaded, Pipeline):
        loaded.model.to(device)
    return loaded


def _made(
    name: str,
    network: nn.Module,
    towers: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]],
    tokenize: Tokenize,
    preprocess: Preprocess,
    kind: str,
) -> ForeignTeacher:
    """Return the teacher after trying it on two images and two texts.

    Raises:
        ValueError: if it fails, or the outputs are not a pair of features.
    """
    logit_scale = getattr(network, "logit_scale", None)
    if not isinstance(logit_scale, Tensor) or logit_scale.numel() != 1:
        raise ValueError(f"{name}: it has no logit_scale, so it is not a CLIP or SigLIP")
    scale = logit_scale.detach().float().reshape(()).exp()
    kind = "a SigLIP" if getattr(network, "logit_bias", None) is not None else kind
    teacher = ForeignTeacher(network, *towers, tokenize, preprocess, scale, 0, kind)
    with _library(name, "cannot be run"):
        image = teacher.image_features(_noise(preprocess.image_size, scale.device))
        text = teacher.text_features(torch.from_numpy(tokenize(PROBES)))
    if image.ndim != 2 or image.shape != text.shape:
        raise ValueError(f"{name}: features of two pictures are {tuple(image.shape)}, of two texts {tuple(text.shape)}")
    if not (image.isfinite().all() and text.isfinite().all() and scale.isfinite()):
        raise ValueError(f"{name}: its features or its scale are not finite, so its weights are damaged")
    return replace(teacher, embed_dim=image.shape[1])


def _noise(size: int, device: torch.device) -> Tensor:
    """Return two random images, uint8 (2, 3, size, size)."""
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, size, size), np.uint8)).to(device)


# --- OpenCLIP ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OpenCLIPTokens:
    """OpenCLIP's tokenizer for a model: texts -> int64 (n, context_length)."""

    tokenizer: Any

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        tokens: np.ndarray = self.tokenizer(list(texts)).numpy()
        return tokens


def _open_clip_teacher(name: str, device: torch.device | str) -> Pipeline | ForeignTeacher:
    package = _import("open_clip", "open_clip_torch", name)
    model_name, weights, quick = _open_clip_name(name, package)
    with _library(name, "OpenCLIP cannot make it"):
        warnings.filterwarnings("error", "QuickGELU mismatch")
        arguments = {"precision": "fp32", "force_quick_gelu": quick, "require_pretrained": True}
        network = package.create_model(model_name, weights, **arguments).eval()
    with _library(name, "OpenCLIP cannot make its tokenizer"):
        tokens = OpenCLIPTokens(package.get_tokenizer(model_name))
        looks = dict(package.get_model_preprocess_cfg(network))
    sides = looks["size"] if isinstance(looks["size"], (tuple, list)) else (looks["size"],)
    if len(set(sides)) > 1:
        raise ValueError(f"{name}: takes pictures of {sides[0]} x {sides[1]} px, but only squares are supported")
    preprocess = Preprocess(image_size=sides[0], mean=looks["mean"], std=looks["std"])
    towers = network.to(device).encode_image, network.encode_text
    teacher = _made(name, network, towers, tokens, preprocess, "")
    try:
        return _ours(name, package.get_model_config(model_name) | {"quick_gelu": quick}, looks, teacher)
    except ValueError as error:
        reason = str(error).removeprefix(name).removeprefix(":").strip()
        return replace(teacher, kind=teacher.kind or f"not a CLIP to inherit from ({reason})")


def _open_clip_name(name: str, package: ModuleType) -> tuple[str, str | None, bool]:
    """Return arguments for `create_model`: model name, tag or file of the weights, and whether they use QuickGELU."""
    rest = name.removeprefix(OPEN_CLIP)
    if rest.startswith(("hf-hub:", "local-dir:")) or (rest and Path(rest).is_dir()):
        model_name = rest if ":" in rest else f"local-dir:{rest}"
        with _library(name, "OpenCLIP cannot read its config"):
            return model_name, None, bool(package.get_model_config(model_name).get("quick_gelu"))
    model, at, file = rest.partition("@")
    tag = ""
    if not at and rest not in package.list_models():
        model, _, tag = rest.rpartition("/")
    model = model.replace("/", "-")
    if model not in package.list_models():
        like = difflib.get_close_matches(model or rest, package.list_models(), 3)
        hint = f"did you mean {' or '.join(like)}?" if like else "open_clip.list_models() has all"
        raise ValueError(f"{name}: neither a folder nor an OpenCLIP model; {hint}")
    if at and not Path(file).is_file():
        raise ValueError(f"{name}: {file or 'no file'}: no such file")
    tags = package.list_pretrained_tags_by_model(model)
    if not at and tag not in tags:
        some = difflib.get_close_matches(tag, tags, 3, 0.3) or tags[:3]
        known = f" (of {len(tags)} tags, as {', '.join(some)})" if tags else ""
        raise ValueError(f"{name}: name its weights, {OPEN_CLIP}{model}/TAG{known} or {OPEN_CLIP}{model}@FILE")
    # OpenCLIP only warns if the tag's activation differs from the model's.
    quick = bool(package.get_model_config(model).get("quick_gelu")) or (
        not at and bool(package.get_pretrained_cfg(model, tag).get("quick_gelu"))
    )
    return model, file if at else tag, quick


def _ours(name: str, model_cfg: dict[str, Any], looks: dict[str, Any], theirs: ForeignTeacher) -> Pipeline:
    """Return the same model as one of our own; `ValueError` if that is not possible."""
    shape = {key: value for key, value in model_cfg.items() if not key.startswith("init_logit_")}
    entries = [Entry((), key, value) for key, value in theirs.network.state_dict().items() if key != "logit_bias"]
    read = from_open_clip({"model_cfg": shape, "preprocess_cfg": looks}, entries, None, name, name)
    model = filled(read.config, read.state, f"{name} is not a complete CLIP").to(theirs.scale.device)
    ours, tokenizer = Teacher(model, read.preprocess), read.tokenizer
    tokens, their_tokens = tokenizer(list(PROBES)), theirs.tokenize(PROBES)
    if not np.array_equal(tokens, their_tokens):
        raise ValueError("its tokenizer differs")
    images = _noise(read.preprocess.image_size, theirs.scale.device)
    text = ours.text_features(torch.from_numpy(tokens)) - theirs.text_features(torch.from_numpy(their_tokens))
    image = ours.image_features(images) - theirs.image_features(images)
    if max(image.abs().max(), text.abs().max()) > NEAR:
        raise ValueError("it computes differently")
    return Pipeline(model, tokenizer, read.preprocess)


# --- transformers -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TransformersTokens:
    """A tokenizer of `transformers`: texts -> int64 (n, length), padded to the full length. If the text tower takes a
    mask, padding is -1."""

    tokenizer: Any
    length: int
    masked: bool

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        settings = {"padding": "max_length", "truncation": True, "max_length": self.length}
        found = self.tokenizer(list(texts), **settings, return_attention_mask=True)
        ids, mask = (np.array(found[name], np.int64) for name in ("input_ids", "attention_mask"))
        return np.where(mask, ids, -1) if self.masked else ids


def _transformers_teacher(name: str, device: torch.device | str) -> Pipeline | ForeignTeacher:
    rest = name.removeprefix(TRANSFORMERS)
    if not rest or (not Path(rest).is_dir() and not HUB_ID.fullmatch(rest)):
        raise ValueError(f"{name}: neither a folder nor a Hugging Face id, which is ORG/NAME")
    folder = resolve(rest if Path(rest).is_dir() else f"hf:{rest}")
    config = read_json_object(folder / "config.json")
    kind = str(config.get("model_type"))
    reason = f"a model of type {kind!r}"
    if kind == "clip":
        try:
            return Pipeline(*load_checkpoint(folder))
        except ValueError as error:  # a CLIP with a feature that our model lacks
            reason = f"not a CLIP to inherit from ({error})"
    package = _import("transformers", "transformers", name)
    with _library(name, "transformers cannot load it"):
        package.logging.disable_progress_bar()
        network = (
            package.AutoModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True).to(device).eval()
        )
    if not (hasattr(network, "get_image_features") and hasattr(network, "get_text_features")):
        raise ValueError(f"{name}: {reason}, which has no shared image and text features")
    with _library(name, "transformers cannot load its tokenizer"):
        tokenizer = package.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        length = min(tokenizer.model_max_length, network.config.text_config.max_position_embeddings)
    # SigLIP was trained with its padding visible, whatever the tokenizer says.
    masked = "attention_mask" in tokenizer.model_input_names and not kind.startswith("siglip")
    tokens = TransformersTokens(tokenizer, length, masked)
    towers = partial(_image_features, network), partial(_text_features, network, tokenizer.pad_token_id)
    preprocess = _read_preprocess(folder, getattr(network.config.vision_config, "image_size", None))
    return _made(name, network, towers, tokens, preprocess, reason)


def _image_features(network: Any, pixels: Tensor) -> Tensor:
    return _features(network.get_image_features(pixel_values=pixels))


def _text_features(network: Any, pad_id: int, tokens: Tensor) -> Tensor:
    """Compute text features from the tokens of `TransformersTokens`."""
    mask = tokens >= 0
    if mask.all():
        return _features(network.get_text_features(input_ids=tokens))
    used = int(mask.any(0).nonzero().max()) + 1  # positions that no text of the batch reaches have no effect
    tokens, mask = tokens[:, :used], mask[:, :used]
    return _features(network.get_text_features(input_ids=tokens.where(mask, pad_id), attention_mask=mask.long()))


def _features(output: Any) -> Tensor:
    """Return the features: a tensor, or since transformers 5 a tower's pooled output."""
    features: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return features


def _read_preprocess(folder: Path, image_size: Any) -> Preprocess:
    """Read resolution and normalisation. The rest of their transform makes images square, which views already are.

    Raises:
        ValueError: if the files do not state them.
    """
    where = folder / "preprocessor_config.json"
    if where.is_file():
        data: Any = read_json_object(where)
    else:
        where = folder / "processor_config.json"
        data = read_json_object(where).get("image_processor")
    mean, std = (data.get(key) if isinstance(data, dict) else None for key in ("image_mean", "image_std"))
    try:
        return Preprocess.model_validate({"image_size": image_size, "mean": mean, "std": std})
    except ValueError:
        raise ValueError(
            f"{where}: image_size {image_size!r}, image_mean {mean!r} and image_std {std!r} should be a number of "
            "pixels and three numbers each"
        ) from None


# --- the libraries ----------------------------------------------------------------------------------------------


def _import(module: str, package: str, name: str) -> ModuleType:
    """Import a library; `ValueError` if it is not installed or cannot be imported here."""
    from importlib import import_module

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # otherwise its tokenizers warn when workers fork
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations inside the library
            return import_module(module)
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision and torch builds do not match
        if getattr(error, "name", None) == module:
            raise ValueError(f"{name}: needs {package}: pip install tinyclip[teachers]") from None
        raise ValueError(f"{name}: {module} cannot be imported here ({_line(error)})") from None


@contextmanager
def _library(name: str, what: str) -> Iterator[None]:
    """Run library code that may raise and log anything: silence its logs and warnings, and turn any error into one
    line."""
    handlers, before = logging.root.handlers[:], logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:
        hint = "; download it elsewhere and give the file or folder" if "download" in str(error) else ""
        if "not found in your environment" in str(error):  # `transformers`, about a package a tokenizer needs
            hint = "; pip install tinyclip[teachers]"
        raise ValueError(f"{name}: {what} ({_line(error)}){hint}") from None
    finally:
        logging.disable(before)
        logging.root.handlers[:] = handlers  # OpenCLIP adds one


def _line(error: BaseException) -> str:
    """Return the start of an error's text on one line; for a failed import, that of its cause."""
    while isinstance(error, ImportError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    text = " ".join(str(error).split()) or type(error).__name__
    if "Weights only load failed" in text:  # torch's message advises running the file's code
        return "the file is damaged, or holds more than tensors"
    return text if len(text) <= 200 else f"{text[:200]} ..."
