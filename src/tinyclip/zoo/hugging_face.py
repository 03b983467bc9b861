"""Read and write Hugging Face `CLIPModel` folders: `config.json`, weights, tokenizer and preprocessor."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinyclip.common.files import read_json_object
from tinyclip.inputs.tokenizer import OPENAI_SPECIAL, CLIPTokenizer
from tinyclip.inputs.transforms import Preprocess
from tinyclip.model.config import CLIPConfig, TransformerConfig, VisionConfig
from tinyclip.zoo.openai import (
    SAYS,
    Foreign,
    Stated,
    agree,
    canonical,
    config_from,
    own_tokenizer,
    preprocessing,
    weights_of,
)
from tinyclip.zoo.tensors import Entry, read_entries

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
# (our name, their name); the misspelling below is theirs.
TOWERS = {
    "visual.transformer.resblocks": "vision_model.encoder.layers",
    "transformer.resblocks": "text_model.encoder.layers",
}
IN_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
OUTSIDE = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "visual.proj": "visual_projection.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",
    "logit_scale": "logit_scale",
}
TRANSPOSED = ("visual.proj", "text_projection")  # linear layers in `transformers`
QKV = re.compile(r"(.+)\.(\d+)\.self_attn\.([qkv])_proj\.(weight|bias)")
BLOCK = re.compile(r"(.+)\.(\d+)\.(\w+(?:\.\w+)?)\.(weight|bias)")


# --- reading -----------------------------------------------------------------------------------------------------


def read_hugging_face(folder: Path, activation: str | None) -> Foreign:
    """Read a `CLIPModel` folder with single-file or sharded weights, in safetensors or PyTorch format.

    Raises:
        ValueError: if a part is missing or damaged, or uses a feature that our model lacks.
    """
    where = folder / "config.json"
    data = read_json_object(where)
    if data.get("model_type") != "clip":
        raise ValueError(
            f"{where}: a model of type {data.get('model_type')!r}, only 'clip' is supported; a recipe's teacher may be "
            f"another type, as `transformers:{folder}`"
        )
    vision = _section(data, "vision_config", {"hidden_size": 768, "num_attention_heads": 12}, where)
    defaults = {"hidden_size": 512, "num_attention_heads": 8, "vocab_size": 49408, "eos_token_id": 49407}
    text = _section(data, "text_config", defaults, where)
    if vision["hidden_act"] != text["hidden_act"]:
        raise ValueError(f"{where}: the towers' hidden_act differ, {vision['hidden_act']} and {text['hidden_act']}")
    head_dims = tuple(part["hidden_size"] // part["num_attention_heads"] for part in (vision, text))
    layers = (vision["num_hidden_layers"], text["num_hidden_layers"])
    size = vision.get("image_size", 224)
    if text["eos_token_id"] not in (2, text["vocab_size"] - 1):  # 2 in older files means the highest id
        raise ValueError(f"{where}: text_config.eos_token_id is {text['eos_token_id']!r}, not the highest token id")
    tensors = weights_of(_weights(folder), str(folder))
    state, _ = canonical(from_hugging_face(tensors, str(folder)), str(folder))
    stated = Stated((head_dims[0], head_dims[1]), layers, size if isinstance(size, int) else None)
    config = config_from(state, str(folder), agree(activation, text["hidden_act"], str(where)), stated)
    preprocess, said = _read_preprocess(folder, config)
    says = SAYS if said else frozenset({"activation"})
    return Foreign(config, state, read_tokenizer(folder, config), preprocess, says)


def _section(data: dict[str, Any], key: str, defaults: dict[str, int], where: Path) -> dict[str, Any]:
    """Return a tower's config with `transformers`' defaults. As in `transformers`, `..._dict` in older files wins."""
    section: dict[str, Any] = {"hidden_act": "quick_gelu", "num_hidden_layers": 12, "layer_norm_eps": 1e-5} | defaults
    said = data.get(key) if data.get(f"{key}_dict") is None else data[f"{key}_dict"]
    if not isinstance(said or {}, dict):
        raise ValueError(f"{where}: {key} should be an object")
    section |= said or {}
    for name in ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size"):
        value = section.get(name, 1)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{where}: {key}.{name} is {value!r}, not a positive whole number")
    if section["layer_norm_eps"] != 1e-5:
        raise ValueError(f"{where}: {key}.layer_norm_eps is {section['layer_norm_eps']}, only 1e-05 is supported")
    if section["hidden_size"] % section["num_attention_heads"]:
        raise ValueError(
            f"{where}: {key}: {section['num_attention_heads']} heads do not divide {section['hidden_size']}"
        )
    return section


def _weights(folder: Path) -> list[Entry]:
    for name in WEIGHTS:
        if (folder / name).is_file():
            return read_entries(folder / name)[0]
        index = folder / f"{name}.index.json"
        if index.is_file():
            shards = read_json_object(index).get("weight_map")
            names = sorted({str(shard) for shard in shards.values()}) if isinstance(shards, dict) else []
            if not names or any(Path(shard).name != shard for shard in names):
                raise ValueError(f"{index}: weight_map should name files of this folder")
            return [entry for shard in names for entry in read_entries(folder / shard)[0]]
    raise ValueError(f"{folder}: no {' or '.join(WEIGHTS)}")


def from_hugging_face(state: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Rename their keys to OpenAI's and keep unknown keys unchanged."""
    ours: dict[str, Tensor] = {}
    towers = {theirs: name for name, theirs in TOWERS.items()}
    names = {theirs: name for name, theirs in IN_BLOCK.items()}
    outside = {theirs: name for name, theirs in OUTSIDE.items()}
    for key, value in state.items():
        if key.endswith(".position_ids"):  # a buffer that older versions saved
            continue
        if (match := QKV.fullmatch(key)) and match[1] in towers:
            if match[3] == "q":
                name = f"{towers[match[1]]}.{match[2]}.attn.in_proj_{match[4]}"
                ours[name] = _joined(state, key, where)
        elif (match := BLOCK.fullmatch(key)) and match[1] in towers and match[3] in names:
            ours[f"{towers[match[1]]}.{match[2]}.{names[match[3]]}.{match[4]}"] = value
        else:
            name = outside.get(key, key)
            ours[name] = value.t() if name in TRANSPOSED and value.ndim == 2 else value
    return ours


def _joined(state: Mapping[str, Tensor], query: str, where: str) -> Tensor:
    keys = [query.replace(".q_proj.", f".{part}_proj.") for part in "qkv"]
    for key in keys:
        if key not in state:
            raise ValueError(f"{where}: {key} is missing")
        if state[key].shape != state[query].shape or state[key].ndim == 0:
            raise ValueError(f"{where}: {key} is {tuple(state[key].shape)}, {query} {tuple(state[query].shape)}")
    return torch.cat([state[key] for key in keys])


def read_tokenizer(folder: Path, config: CLIPConfig) -> CLIPTokenizer:
    """Return the folder's CLIP BPE tokenizer, or CLIP's own if the folder has none.

    Raises:
        ValueError: if it is another kind of tokenizer, or its vocabulary does not match the model's.
    """
    whole, where = folder / "tokenizer.json", folder / "merges.txt"
    vocabulary: Any
    pairs: list[Any]
    try:
        if where.is_file() and (folder / "vocab.json").is_file():
            vocabulary = read_json_object(folder / "vocab.json")
            lines = where.read_text(encoding="utf-8").splitlines()
            pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
        elif whole.is_file():
            where, model = whole, read_json_object(whole)["model"]
            vocabulary = model["vocab"]
            pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        else:
            return own_tokenizer(config, str(folder), OPENAI_SPECIAL)
        tokenizer = CLIPTokenizer([(left, right) for left, right in pairs], config.text.context_length, OPENAI_SPECIAL)
    except Exception as error:  # `tokenizers` raises a bare Exception for invalid merges
        raise ValueError(f"{where}: not a tokenizer of CLIP's kind ({type(error).__name__}: {error})") from None
    if vocabulary != _vocabulary(tokenizer):
        raise ValueError(f"{where}: its tokens are not in the order of CLIP's tokenizer: bytes, merges, start, end")
    if tokenizer.vocab_size != config.text.vocab_size:
        raise ValueError(f"{where} has {tokenizer.vocab_size:,} tokens, the model {config.text.vocab_size:,}")
    return tokenizer


def _vocabulary(tokenizer: CLIPTokenizer) -> dict[str, int]:
    return {token: i for i, token in enumerate([*tokenizer.tokens()[:-2], *OPENAI_SPECIAL])}


def _read_preprocess(folder: Path, config: CLIPConfig) -> tuple[Preprocess, bool]:
    """Return the evaluation transform, and whether the folder states a mean or std."""
    size = config.vision.image_size
    data: dict[str, Any] = {}
    where = folder / "preprocessor_config.json"
    if where.is_file():
        data = read_json_object(where)
    elif (folder / "processor_config.json").is_file():
        where = folder / "processor_config.json"
        data = read_json_object(where).get("image_processor") or {}
        if not isinstance(data, dict):
            raise ValueError(f"{where}: image_processor should be an object")
    for key, good in (
        # Height and width, even if equal, would mean resizing without keeping the aspect ratio.
        ("size", (size, {"shortest_edge": size})),
        ("crop_size", (size, {"height": size, "width": size})),
        ("resample", (3,)),
        ("rescale_factor", (1 / 255,)),
        *((f"do_{part}", (True,)) for part in ("resize", "center_crop", "rescale", "normalize")),
    ):
        if data.get(key) is not None and data[key] not in good:
            raise ValueError(f"{where}: {key} is {data[key]!r}, only {good[-1]!r} is supported for this model")
    mean, std = data.get("image_mean"), data.get("image_std")
    return preprocessing(config, mean, std, where), mean is not None or std is not None


# --- writing -----------------------------------------------------------------------------------------------------


def to_hugging_face(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename OpenAI's keys to those of `CLIPModel`."""
    theirs: dict[str, Tensor] = {}
    for key, value in state.items():
        if key in OUTSIDE:
            theirs[OUTSIDE[key]] = value.t().contiguous() if key in TRANSPOSED else value
            continue
        tower = next(name for name in TOWERS if key.startswith(f"{name}."))
        number, _, rest = key.removeprefix(f"{tower}.").partition(".")
        start = f"{TOWERS[tower]}.{number}"
        if rest.startswith("attn.in_proj_"):
            for part, third in zip("qkv", value.chunk(3), strict=True):
                theirs[f"{start}.self_attn.{part}_proj.{rest.removeprefix('attn.in_proj_')}"] = third.contiguous()
        else:
            name, _, kind = rest.rpartition(".")
            theirs[f"{start}.{IN_BLOCK[name]}.{kind}"] = value
    return theirs


def hugging_face_config(config: CLIPConfig, tokenizer: CLIPTokenizer) -> dict[str, Any]:
    """Return the `config.json` for a model whose blocks are all equal (see `convert.check_even`)."""
    vision = config.vision
    assert isinstance(vision, VisionConfig)
    ids = {"bos_token_id": tokenizer.start_id, "eos_token_id": tokenizer.end_id, "pad_token_id": tokenizer.end_id}
    text = _tower(config.text, config) | {"model_type": "clip_text_model", "vocab_size": config.text.vocab_size}
    text |= {"max_position_embeddings": config.text.context_length} | ids
    image = _tower(vision, config) | {"model_type": "clip_vision_model", "num_channels": 3}
    image |= {"image_size": vision.image_size, "patch_size": vision.patch_size}
    whole = {"architectures": ["CLIPModel"], "model_type": "clip", "torch_dtype": "float32"}
    return whole | {"projection_dim": config.embed_dim, "text_config": text, "vision_config": image}


def _tower(tower: TransformerConfig, config: CLIPConfig) -> dict[str, Any]:
    return {
        "hidden_size": tower.width,
        "intermediate_size": tower.mlp_width[0],
        "num_hidden_layers": tower.layers,
        "num_attention_heads": tower.heads[0],
        "hidden_act": config.activation,
        "layer_norm_eps": 1e-5,
        "projection_dim": config.embed_dim,
    }


def write_processor(folder: Path, tokenizer: CLIPTokenizer, preprocess: Preprocess, context_length: int) -> None:
    """Write the files that `CLIPProcessor` reads."""
    size = preprocess.image_size
    start, end = OPENAI_SPECIAL
    files: dict[str, Any] = {
        "vocab.json": _vocabulary(tokenizer),
        "tokenizer_config.json": {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": context_length,
            "bos_token": start,
            "eos_token": end,
            "unk_token": end,
            "pad_token": end,
        },
        "special_tokens_map.json": {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end},
        "preprocessor_config.json": {
            "image_processor_type": "CLIPImageProcessor",
            "processor_class": "CLIPProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"shortest_edge": size},
            "resample": 3,  # bicubic
            "do_center_crop": True,
            "crop_size": {"height": size, "width": size},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": preprocess.mean,
            "image_std": preprocess.std,
        },
    }
    for name, data in files.items():
        (folder / name).write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    merges = ["#version: 0.2", *(f"{left} {right}" for left, right in tokenizer.merges)]
    (folder / "merges.txt").write_text("\n".join(merges) + "\n", encoding="utf-8")
