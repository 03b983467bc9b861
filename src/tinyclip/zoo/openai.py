"""Read other projects' state dicts: OpenAI and OpenCLIP files, the TinyCLIP authors' training files, OpenCLIP folders.

The shape comes from the tensors alone; a config next to them (`Stated`) adds only what tensors cannot show.
`hugging_face.py` reads Hugging Face folders and calls this module once it has renamed the keys.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from torch import Tensor

from tinyclip.common.files import read_json_object
from tinyclip.inputs.tokenizer import END, OPENAI_SPECIAL, START, CLIPTokenizer, clip_tokenizer
from tinyclip.inputs.transforms import OPENAI_MEAN, OPENAI_STD, Preprocess
from tinyclip.model.config import Activation, CLIPConfig
from tinyclip.zoo.tensors import Entry, read_entries
from tinyclip.zoo.wrappers import EXTRAS, OPENAI, find_clip

OPEN_CLIP_CONFIG = "open_clip_config.json"
OPEN_CLIP_WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
)
# OpenAI uses a head size of 64; OpenCLIP's giant image towers use wider heads: (layers, width) -> head_dim.
WIDE_HEADS = {(32, 1280): 80, (40, 1408): 88, (48, 1664): 104, (56, 1792): 112}
FAMILIES = (
    ("visual.trunk.", "its image tower is in timm's layout"),
    ("vision_model.", "these are Hugging Face weights: give the folder that also has their config.json"),
    ("logit_bias", "a SigLIP model"),
    ("text.transformer.embeddings.", "its text tower is a Hugging Face model"),
    ("bert.", "a BERT model"),
    ("layer1.", "a ResNet without text tower"),
)


SAYS = frozenset({"activation", "normalisation"})


@dataclass(frozen=True)
class Foreign:
    """Another project's checkpoint in our format. `says` lists which of activation and normalisation it states; the
    rest is assumed or set by the user."""

    config: CLIPConfig
    state: dict[str, Tensor]
    tokenizer: CLIPTokenizer
    preprocess: Preprocess
    says: frozenset[str]


@dataclass(frozen=True)
class Stated:
    """What a config next to the weights states for the (image, text) towers; None where it states nothing."""

    head_dim: tuple[int | None, int | None] = (None, None)
    layers: tuple[int | None, int | None] = (None, None)
    image_size: int | None = None


def read_file(path: Path, activation: str | None) -> Foreign:
    """Read a weights file without a config, from OpenAI, OpenCLIP or the TinyCLIP authors.

    OpenAI files use QuickGELU; for the others GELU is assumed unless `activation` is given.

    Raises:
        ValueError: if the file is damaged, asks for more than tensors, or holds no readable CLIP; names the keys.
    """
    entries, kind = read_entries(path)
    state, extras = canonical(weights_of(entries, str(path)), str(path))
    openai = kind == "torchscript" or bool(extras)
    size = extras.get("input_resolution")
    stated = Stated(image_size=int(size) if size is not None and size.numel() == 1 else None)
    config = config_from(state, str(path), activation or ("quick_gelu" if openai else "gelu"), stated)
    preprocess = Preprocess(image_size=config.vision.image_size)
    tokenizer = own_tokenizer(config, str(path), OPENAI_SPECIAL if openai else (START, END))
    return Foreign(config, state, tokenizer, preprocess, SAYS if openai else frozenset())


def weights_of(entries: Sequence[Entry], where: str) -> dict[str, Tensor]:
    """Return the CLIP's weights from a file's values, under OpenAI's or Hugging Face's keys; one warning lists what is
    left out.

    Raises:
        ValueError: if there are several CLIPs, or a weight is not a plain tensor.
    """
    found = find_clip(entries, where)
    said = [*found.said]
    if found.left_out:
        said.append(f"ignored, since it is not part of the CLIP: {_some(found.left_out, 12)}")
    if said:
        warnings.warn(f"{where}: {'; '.join(said)}", stacklevel=2)
    return found.tensors


def canonical(tensors: Mapping[str, Tensor], where: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the weights under OpenAI's keys, and OpenAI's extra entries separately.

    Raises:
        ValueError: if a weight holds integers.
    """
    extras = {key: value for key, value in tensors.items() if key in EXTRAS}
    state = {key: value for key, value in tensors.items() if key not in EXTRAS}
    for key, value in state.items():
        if not value.is_floating_point() and not key.endswith("num_batches_tracked"):
            raise ValueError(f"{where}: {key} holds {value.dtype} values, not floating-point weights")
    if "logit_scale" in state and state["logit_scale"].numel() == 1:
        state["logit_scale"] = state["logit_scale"].reshape(())
    return state, extras


def config_from(state: Mapping[str, Tensor], where: str, activation: str, stated: Stated) -> CLIPConfig:
    """Return the config of the model that has these tensors (under OpenAI's keys).

    Raises:
        ValueError: if a tensor that every CLIP has is missing, or a tensor's shape is invalid.
    """
    _check_family(state, where)
    vision = _resnet(state, where) if _is_resnet(state) else _vit(state, where, stated)
    text = _blocks(state, "transformer.", stated.head_dim[1] or 64, where)
    for tower, blocks, layers in zip(("image", "text"), (vision, text), stated.layers, strict=True):
        if layers is not None and layers != len(blocks["heads"]):
            raise ValueError(f"{where}: the {tower} tower has {len(blocks['heads'])} blocks, its config says {layers}")
    vocab_size, width = state["token_embedding.weight"].shape
    text |= {"width": width, "vocab_size": vocab_size, "context_length": state["positional_embedding"].shape[0]}
    embed_dim = state["text_projection"].shape[1]
    data = {"embed_dim": embed_dim, "vision": vision, "text": text, "activation": activation}
    return CLIPConfig.from_dict(data, where)


def _is_resnet(state: Mapping[str, Tensor]) -> bool:
    return "visual.attnpool.positional_embedding" in state


def _check_family(state: Mapping[str, Tensor], where: str) -> None:
    """Check that the tensors every CLIP must have are present with the right number of axes."""
    needed = {"visual.conv1.weight": 4, "token_embedding.weight": 2, "positional_embedding": 2}
    needed |= {"text_projection": 2, "logit_scale": 0}
    if _is_resnet(state):
        needed |= {"visual.attnpool.positional_embedding": 2, "visual.attnpool.q_proj.weight": 2}
        needed |= {"visual.layer1.0.conv1.weight": 4}
    else:
        needed |= {"visual.positional_embedding": 2}
    for key, axes in needed.items():
        if key in state and state[key].ndim != axes:
            raise ValueError(f"{where}: {key} is {tuple(state[key].shape)}, it should have {axes} axes")
    if missing := [key for key in needed if key not in state]:
        family = next((text for mark, text in FAMILIES if any(key.startswith(mark) for key in state)), "")
        others = [key for key in state if not OPENAI.fullmatch(key)]
        found = f"; it has {_some(others)}" if others else ""
        raise ValueError(f"{where} is not a readable CLIP{family and f' ({family})'}: no {_some(missing)}{found}")


def _some(names: Sequence[str], count: int = 4) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def _vit(state: Mapping[str, Tensor], where: str, stated: Stated) -> dict[str, Any]:
    width, _, patch, _ = state["visual.conv1.weight"].shape
    positions = state["visual.positional_embedding"].shape[0]
    grid = _side(positions, "visual.positional_embedding", where)
    layers = len(_block_numbers(state, "visual.transformer."))
    blocks = _blocks(state, "visual.transformer.", stated.head_dim[0] or WIDE_HEADS.get((layers, width), 64), where)
    size = {"image_size": stated.image_size or grid * patch, "patch_size": patch, "width": width}
    return {"kind": "vit"} | size | blocks


def _resnet(state: Mapping[str, Tensor], where: str) -> dict[str, Any]:
    """Return the config of OpenAI's ResNet: image size is 32 times the attention pool's grid, head size is 64."""
    counts = [len({key.split(".")[2] for key in state if key.startswith(f"visual.layer{i}.")}) for i in range(1, 5)]
    channels = state["visual.attnpool.q_proj.weight"].shape[0]
    if channels % 64:
        raise ValueError(f"{where}: visual.attnpool.q_proj.weight has {channels} rows, not a multiple of a head's 64")
    grid = _side(state["visual.attnpool.positional_embedding"].shape[0], "visual.attnpool.positional_embedding", where)
    width = state["visual.layer1.0.conv1.weight"].shape[0]
    return {"kind": "resnet", "image_size": 32 * grid, "layers": counts, "width": width, "heads": channels // 64}


def _side(positions: int, key: str, where: str) -> int:
    side = math.isqrt(max(0, positions - 1))
    if side == 0 or side * side + 1 != positions:
        raise ValueError(f"{where}: {key} has {positions} positions, not one more than a square")
    return side


def _block_numbers(state: Mapping[str, Tensor], tower: str) -> list[int]:
    start = f"{tower}resblocks."
    numbers = {key.removeprefix(start).split(".")[0] for key in state if key.startswith(start)}
    return sorted(int(number) for number in numbers if number.isdecimal())


def _blocks(state: Mapping[str, Tensor], tower: str, head_dim: int, where: str) -> dict[str, Any]:
    """Return the heads and MLP width of each block; a branch exists if any of its keys does."""
    numbers = _block_numbers(state, tower)
    if gaps := sorted(set(range(len(numbers))) - set(numbers)):
        raise ValueError(f"{where}: {tower}resblocks.{gaps[0]} is missing, though there are blocks after it")
    heads: list[int | None] = []
    mlp: list[int | None] = []
    for i in numbers:
        block = f"{tower}resblocks.{i}."
        rows = _rows(state, block, ("ln_1.", "attn."), "attn.in_proj_weight", where)
        if rows is not None and rows % (3 * head_dim):
            key = f"{block}attn.in_proj_weight"
            raise ValueError(
                f"{where}: {key} has {rows} rows, not a multiple of 3 x {head_dim} (queries, keys, values)"
            )
        heads.append(None if rows is None else rows // (3 * head_dim))
        mlp.append(_rows(state, block, ("ln_2.", "mlp."), "mlp.c_fc.weight", where))
    return {"head_dim": head_dim, "heads": heads, "mlp_width": mlp}


def _rows(state: Mapping[str, Tensor], block: str, branch: tuple[str, str], name: str, where: str) -> int | None:
    """Return the number of rows in a branch's first matrix; None if the branch was pruned."""
    if not any(key.startswith((block + branch[0], block + branch[1])) for key in state):
        return None
    matrix = state.get(block + name)
    if matrix is None or matrix.ndim != 2:
        raise ValueError(f"{where}: {block}{name} is {'missing' if matrix is None else 'not a matrix'}")
    return matrix.shape[0]


def own_tokenizer(config: CLIPConfig, where: str, special: tuple[str, str] = (START, END)) -> CLIPTokenizer:
    """Return CLIP's tokenizer at the model's context length; `ValueError` if the model has another vocabulary."""
    ours = clip_tokenizer()
    text = config.text
    if text.vocab_size != ours.vocab_size:
        raise ValueError(
            f"{where}: its vocabulary has {text.vocab_size:,} tokens and CLIP's own {ours.vocab_size:,}; "
            "without its own tokenizer it cannot be used"
        )
    if (text.context_length, special) == (ours.context_length, ours.special):
        return ours
    return CLIPTokenizer(ours.merges, text.context_length, special)


def check_activation(name: str | None, where: str) -> None:
    """Raise `ValueError` for an activation that we do not support. None means unstated and is accepted."""
    if name not in (None, *get_args(Activation)):
        raise ValueError(f"{where}: activation {name!r} is not one of {', '.join(get_args(Activation))}")


def agree(activation: str | None, said: str, where: str) -> str:
    """Return the activation that a config states; `ValueError` if unsupported or not the user's."""
    check_activation(said, where)
    if activation not in (None, said):
        raise ValueError(f"{where} says {said}, so the activation cannot be {activation}")
    return said


# --- OpenCLIP's folders ------------------------------------------------------------------------------------------

# Accepted config entries besides SHAPES: unset values (None, False, 0), and values that match what our model does.
SHAPES = {"image_size", "layers", "width", "head_width", "heads", "mlp_ratio", "patch_size", "context_length"}
SHAPES |= {"vocab_size", "patch_dropout", "pad_id", "eos_id", "embed_dim", "vision_cfg", "text_cfg", "quick_gelu"}
SAME: dict[str, tuple[object, ...]] = {
    "pool_type": ("tok", "argmax"),
    "pos_embed_type": ("learnable",),
    "proj_type": ("linear",),
}
SAME |= {"block_type": ("default",), "custom_text": (True,), "attn_pooler_queries": (256,), "attn_pooler_heads": (8,)}
SAME |= {"timm_pool": ("avg",), "timm_proj": ("linear",), "hf_model_pretrained": (True,), "hf_proj_type": ("mlp",)}
SAME |= {"hf_pooler_type": ("mean_pooler",)}


def read_open_clip(folder: Path, activation: str | None, weights: Path | None = None) -> Foreign:
    """Read a folder with `open_clip_config.json` and weights, as used by OpenCLIP's `local-dir:` and the hub.

    Args:
        weights: a weights file in the folder, if its name is not one of OpenCLIP's.

    Raises:
        ValueError: as in `read_file`, and if the config uses a feature that our model lacks.
    """
    where = folder / OPEN_CLIP_CONFIG
    data = read_json_object(where)
    path = weights or next((folder / name for name in OPEN_CLIP_WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        raise ValueError(f"{folder}: no {' or '.join(OPEN_CLIP_WEIGHTS)}")
    return from_open_clip(data, read_entries(path)[0], activation, str(where), str(path))


def from_open_clip(
    data: dict[str, Any], entries: Sequence[Entry], activation: str | None, where: str, source: str
) -> Foreign:
    """Build a checkpoint from an `open_clip_config.json` and its weights.

    Args:
        where, source: names of the config and the weights in error messages.

    Raises:
        ValueError: as in `read_open_clip`.
    """
    model, looks = _object(data, "model_cfg", where), _object(data, "preprocess_cfg", where)
    vision, text = _object(model, "vision_cfg", where), _object(model, "text_cfg", where)
    for section, values in (("model_cfg", model), ("vision_cfg", vision), ("text_cfg", text)):
        for key, value in values.items():
            if key not in SHAPES and value and value not in SAME.get(key, ()):
                raise ValueError(f"{where}: {section}.{key} is {value!r}, which cannot be read")
    state, _ = canonical(weights_of(entries, source), source)
    width, heads = _number(text, "width", 512, where), _number(text, "heads", 8, where)
    head_dims = (_number(vision, "head_width", 64, where), width // heads)
    layers = (None if _is_resnet(state) else _number(vision, "layers", 12, where), _number(text, "layers", 12, where))
    stated = Stated(head_dims, layers, _number(vision, "image_size", 224, where))
    said = agree(activation, "quick_gelu" if model.get("quick_gelu") else "gelu", where)
    config = config_from(state, source, said, stated)
    for key, same in (("interpolation", "bicubic"), ("resize_mode", "shortest")):
        if looks.get(key, same) != same:
            raise ValueError(f"{where}: preprocess_cfg.{key} is {looks[key]!r}, only {same!r} is supported")
    preprocess = preprocessing(config, looks.get("mean"), looks.get("std"), where)
    says = SAYS if looks.get("mean") or looks.get("std") else frozenset({"activation"})
    return Foreign(config, state, own_tokenizer(config, source), preprocess, says)


def preprocessing(config: CLIPConfig, mean: Any, std: Any, where: str | Path) -> Preprocess:
    """Return the evaluation transform, with OpenAI's mean and std where the file states none."""
    try:
        return Preprocess(
            image_size=config.vision.image_size,
            mean=OPENAI_MEAN if mean is None else mean,
            std=OPENAI_STD if std is None else std,
        )
    except ValueError:
        raise ValueError(f"{where}: mean {mean!r} and std {std!r} should be three numbers each, std above 0") from None


def _object(data: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    value = data.get(key, {})
    if not isinstance(value, dict):
        raise ValueError(f"{where}: {key} should be an object")
    return value


def _number(data: dict[str, Any], key: str, default: int, where: str) -> int:
    value = data.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{where}: {key} is {value!r}, not a positive whole number")
    return value
