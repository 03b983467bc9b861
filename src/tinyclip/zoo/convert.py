"""Write checkpoints in OpenCLIP's and Hugging Face's formats, and `convert` between all formats."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tinyclip.common.folders import atomic_directory
from tinyclip.inputs.tokenizer import CLIPTokenizer, clip_tokenizer
from tinyclip.inputs.transforms import Preprocess
from tinyclip.model.config import CLIPConfig, ResNetConfig, TransformerConfig, VisionConfig, resnet_tower
from tinyclip.model.model import CLIP
from tinyclip.zoo.card import converted, write_card
from tinyclip.zoo.checkpoint import load_checkpoint, save_into, write_weights
from tinyclip.zoo.hugging_face import hugging_face_config, to_hugging_face, write_processor
from tinyclip.zoo.openai import OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHTS
from tinyclip.zoo.resolve import resolve


def convert(
    source: str | Path,
    target: str | Path,
    to: str = "tinyclip",
    activation: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> CLIP:
    """Write the checkpoint `source`, of any layout, to the folder `target` and return its model.

    Args:
        source: a path, zoo name or hub id.
        to: `tinyclip` (our own), `open_clip` (its `local-dir:` folders) or `hf` (`transformers.CLIPModel`).
        activation, mean, std: as in `load_checkpoint`.

    Raises:
        ValueError: if the source cannot be read, the other format cannot express its shape (names the block and the
            figure), or `target` holds anything besides our checkpoint. In that case nothing is written.
    """
    if to not in WRITERS:
        raise ValueError(f"unknown format {to!r}; choose {', '.join(WRITERS)}")
    model, tokenizer, preprocess = load_checkpoint(resolve(source), activation, mean, std)
    card = converted(source, Path(target).name)
    with atomic_directory(target, "model") as folder:
        WRITERS[to](folder, model, tokenizer, preprocess)
        write_card(folder, model.config, card, LIBRARIES[to])
    return model


def save_open_clip(folder: Path, model: CLIP, tokenizer: CLIPTokenizer, preprocess: Preprocess) -> None:
    """Write the files that `open_clip.create_model("local-dir:FOLDER")` loads into an existing folder.

    Raises:
        ValueError: for unequal blocks, a cut ResNet or a reduced vocabulary.
    """
    config = model.config
    if tokenizer.merges != clip_tokenizer().merges:
        raise ValueError(
            f"the vocabulary has {tokenizer.vocab_size:,} tokens, not CLIP's own, which OpenCLIP's tokenizer does not "
            "support; convert to hf, or, if it was pruned, convert the model from before `tinyclip vocab prune`"
        )
    data = {"model_cfg": open_clip_config(config), "preprocess_cfg": _open_clip_looks(preprocess)}
    _write_json(folder / OPEN_CLIP_CONFIG, data)
    write_weights(folder / OPEN_CLIP_WEIGHTS[0], model.state_dict())


def open_clip_config(config: CLIPConfig) -> dict[str, Any]:
    """Return OpenCLIP's `model_cfg`; `ValueError` if it cannot express this shape."""
    image = config.vision
    if isinstance(image, ResNetConfig):
        _check_uncut(image)
        vision: dict[str, Any] = {"layers": list(image.layers), "width": image.width, "patch_size": None}
    else:
        check_even(image, "image")
        vision = {"layers": image.layers, "width": image.width, "head_width": image.head_dim}
        vision |= {"patch_size": image.patch_size, "mlp_ratio": mlp_ratio(image)}
    vision["image_size"] = image.image_size
    check_even(config.text, "text")
    text: dict[str, Any] = {"context_length": config.text.context_length, "vocab_size": config.text.vocab_size}
    text |= {"width": config.text.width, "heads": config.text.heads[0], "layers": config.text.layers}
    text |= {"mlp_ratio": mlp_ratio(config.text)}
    quick = config.activation == "quick_gelu"
    return {"embed_dim": config.embed_dim, "quick_gelu": quick, "vision_cfg": vision, "text_cfg": text}


def _check_uncut(image: ResNetConfig) -> None:
    """Check that layers and width determine a ResNet, since OpenCLIP stores nothing else.

    Raises:
        ValueError: if another field does not follow from them; names the first.
    """
    channels = image.heads * image.head_dim
    if channels != image.width * 32:
        raise ValueError(
            f"the attention pool has {image.heads} heads of {image.head_dim} = {channels} channels, "
            f"OpenCLIP's has 32 x width = {image.width * 32}"
        )
    uncut = resnet_tower(image.layers, image.width, image_size=image.image_size)
    for name in ResNetConfig.model_fields:
        ours, theirs = getattr(image, name), getattr(uncut, name)
        if ours != theirs:
            raise ValueError(
                f"the image tower's {name} is {ours}, OpenCLIP's of width {image.width} has {theirs}; "
                "only tinyclip's own format can store that"
            )


def _open_clip_looks(preprocess: Preprocess) -> dict[str, Any]:
    return {"mean": preprocess.mean, "std": preprocess.std, "interpolation": "bicubic", "resize_mode": "shortest"}


def mlp_ratio(tower: TransformerConfig) -> float:
    """Return a ratio for which OpenCLIP's `int(width * ratio)` gives the MLP's width."""
    width = tower.mlp_width[0]
    assert width is not None
    ratio = width / tower.width
    # The quotient may be rounded down by half a unit in the last place; the middle of the interval is safe.
    return ratio if int(tower.width * ratio) == width else (width + 0.5) / tower.width


def save_hugging_face(folder: Path, model: CLIP, tokenizer: CLIPTokenizer, preprocess: Preprocess) -> None:
    """Write the files that `CLIPModel` and `CLIPProcessor` of `transformers` load into an existing folder.

    Raises:
        ValueError: for unequal blocks, or a ResNet image tower.
    """
    config = model.config
    if not isinstance(config.vision, VisionConfig):
        raise ValueError(f"the image tower is a {config.vision.kind}, which Hugging Face's CLIPModel does not have")
    check_even(config.vision, "image")
    check_even(config.text, "text")
    _write_json(folder / "config.json", hugging_face_config(config, tokenizer))
    write_processor(folder, tokenizer, preprocess, config.text.context_length)
    write_weights(folder / "model.safetensors", to_hugging_face(model.state_dict()))


def check_even(tower: TransformerConfig, name: str) -> None:
    """Check that a tower has equal blocks whose heads fill the width, as other formats require.

    Raises:
        ValueError: if a block differs; names the first one and the figure.
    """
    if not tower.layers:
        raise ValueError(f"the {name} tower has no blocks, which only tinyclip's own format can store")
    only = "only tinyclip's own format can store that"
    for i, (heads, mlp) in enumerate(zip(tower.heads, tower.mlp_width, strict=True)):
        block = f"block {i} of the {name} tower has"
        if heads is None or not mlp:
            raise ValueError(f"{block} no {'attention' if heads is None else 'MLP'}; {only}")
        if heads * tower.head_dim != tower.width:
            channels = f"{heads} heads of {tower.head_dim} = {heads * tower.head_dim} channels"
            raise ValueError(f"{block} {channels}, the width is {tower.width}; {only}")
        if mlp != tower.mlp_width[0]:
            raise ValueError(f"{block} {mlp:,} MLP neurons, block 0 has {tower.mlp_width[0]:,}; {only}")


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


LIBRARIES = {"tinyclip": "tinyclip", "open_clip": "open_clip", "hf": "transformers"}  # the hub's names for them
WRITERS: dict[str, Callable[[Path, CLIP, CLIPTokenizer, Preprocess], None]] = {
    "tinyclip": save_into,
    "open_clip": save_open_clip,
    "hf": save_hugging_face,
}
