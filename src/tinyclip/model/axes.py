"""The axis table: which axis of which parameter means what.

Every dimension of every parameter has a named axis or none. Axes of the same name are cut together:

    visual.hidden, text.hidden      channels of a tower's residual stream
    visual.heads.3, text.heads.3    attention heads of block 3
    visual.mlp.3, text.mlp.3        MLP neurons of block 3
    embed                           the shared embedding
    text.context, text.vocab        positions and tokens

and every parameter of a residual branch names its gate: `visual.attn.3`, `text.ffn.3`.
A ResNet image tower (stages from 1 to 4, blocks from 0, as in its keys) instead has

    visual.stem.1                   outputs of the stem's first convolution, likewise 2 and 3
    visual.stage.3                  channels between the blocks of stage 3
    visual.conv1.3.4                inner channels of block 4 of stage 3, likewise conv2
    visual.pool_heads               heads of the attention pool

and gates `visual.block.3.4`; the first block of a stage changes its shape and has none.
Parameter counts, cuts and mask folding all read this one table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tinyclip.model.config import CLIPConfig, ResNetConfig, TransformerConfig, VisionConfig

TOWERS = {"visual": "visual.transformer.resblocks", "text": "transformer.resblocks"}
GATES = ("attn", "ffn", "block")
# Kinds of axes that must keep at least one element; a block that can be removed as a whole has a gate.
NEEDED = ("embed", "hidden", "context", "vocab", "stem", "stage", "conv1", "conv2", "pool_heads")


def axis_kind(name: str) -> str:
    """Return the kind of an axis: `heads` for `visual.heads.3`, `embed` for `embed`."""
    return name.split(".")[1] if "." in name else name


@dataclass(frozen=True)
class Axis:
    """One dimension of a parameter, of length `outer * size(name) * inner`: e.g. 3 * heads * 64 for q, k and v."""

    name: str
    outer: int = 1
    inner: int = 1
    scaled: bool = False  # `compact` folds mask values in here; other axes are only cut


@dataclass(frozen=True)
class Entry:
    """A parameter or buffer: its shape, the axis of each dimension, and the branch it belongs to."""

    shape: tuple[int, ...]
    axes: tuple[Axis | None, ...]
    branch: str | None = None
    gated: bool = False  # the branch's gate multiplies this parameter
    buffer: bool = False  # statistics, not a parameter


def axis_table(config: CLIPConfig) -> dict[str, Entry]:
    """Return every parameter and buffer of the model, by its OpenAI/OpenCLIP key."""
    text = config.text
    sizes = axis_sizes(config)
    table: dict[str, Entry] = {}

    def add(key: str, *axes: Axis | int, branch: str | None = None, gated: bool = False, buffer: bool = False) -> None:
        shape = tuple(a if isinstance(a, int) else a.outer * sizes[a.name] * a.inner for a in axes)
        table[key] = Entry(shape, tuple(None if isinstance(a, int) else a for a in axes), branch, gated, buffer)

    embed = Axis("embed", scaled=True)
    if isinstance(config.vision, VisionConfig):
        _add_vit(add, config.vision)
    else:
        _add_resnet(add, config.vision)
    hidden, write = Axis("text.hidden"), Axis("text.hidden", scaled=True)
    add("token_embedding.weight", Axis("text.vocab"), write)
    add("positional_embedding", Axis("text.context"), write)
    add("ln_final.weight", hidden)
    add("ln_final.bias", hidden)
    add("text_projection", hidden, embed)
    _add_blocks(add, "text", text)
    add("logit_scale")
    return table


def _add_vit(add, vision: VisionConfig) -> None:  # type: ignore[no-untyped-def]
    hidden, write = Axis("visual.hidden"), Axis("visual.hidden", scaled=True)
    add("visual.class_embedding", write)
    add("visual.positional_embedding", vision.grid**2 + 1, write)
    add("visual.proj", hidden, Axis("embed", scaled=True))
    add("visual.conv1.weight", write, 3, vision.patch_size, vision.patch_size)
    for norm in ("ln_pre", "ln_post"):
        add(f"visual.{norm}.weight", hidden)
        add(f"visual.{norm}.bias", hidden)
    _add_blocks(add, "visual", vision)


def _add_resnet(add, vision: ResNetConfig) -> None:  # type: ignore[no-untyped-def]
    """Add a ResNet tower. Its masks are 0 or 1, so there is nothing to fold: only `embed` is scaled."""

    def convolution(place: str, conv: str, norm: str, out: Axis, inputs: Axis | int, side: int, **branch: str) -> None:
        add(f"{place}.{conv}.weight", out, inputs, side, side, **branch)
        for name in ("weight", "bias"):
            add(f"{place}.{norm}.{name}", out, **branch)
        for name in ("running_mean", "running_var"):
            add(f"{place}.{norm}.{name}", out, buffer=True, **branch)
        add(f"{place}.{norm}.num_batches_tracked", buffer=True, **branch)

    before: Axis | int = 3
    for i in (1, 2, 3):
        out = Axis(f"visual.stem.{i}")
        convolution("visual", f"conv{i}", f"bn{i}", out, before, 3)
        before = out
    for stage, layers in enumerate(vision.layers, 1):
        out = Axis(f"visual.stage.{stage}")
        for i in range(layers):
            place, branch = f"visual.layer{stage}.{i}", {"branch": f"visual.block.{stage}.{i}"} if i else {}
            one, two = (Axis(f"visual.conv{n}.{stage}.{i}") for n in (1, 2))
            convolution(place, "conv1", "bn1", one, before, 1, **branch)
            convolution(place, "conv2", "bn2", two, one, 3, **branch)
            convolution(place, "conv3", "bn3", out, two, 1, **branch)
            if i == 0:
                convolution(place, "downsample.0", "downsample.1", out, before, 1)
            before = out
    heads = Axis("visual.pool_heads", 1, vision.head_dim)
    add("visual.attnpool.positional_embedding", vision.grid**2 + 1, before)
    for name in ("q_proj", "k_proj", "v_proj"):
        add(f"visual.attnpool.{name}.weight", heads, before)
        add(f"visual.attnpool.{name}.bias", heads)
    add("visual.attnpool.c_proj.weight", Axis("embed", scaled=True), heads)
    add("visual.attnpool.c_proj.bias", Axis("embed", scaled=True))


def _add_blocks(add, tower: str, config: TransformerConfig) -> None:  # type: ignore[no-untyped-def]
    hidden, write = Axis(f"{tower}.hidden"), Axis(f"{tower}.hidden", scaled=True)
    for i, (heads, mlp) in enumerate(zip(config.heads, config.mlp_width, strict=True)):
        block = f"{TOWERS[tower]}.{i}"
        if heads is not None:
            branch, name, dim = f"{tower}.attn.{i}", f"{tower}.heads.{i}", config.head_dim
            add(f"{block}.ln_1.weight", hidden, branch=branch)
            add(f"{block}.ln_1.bias", hidden, branch=branch)
            add(f"{block}.attn.in_proj_weight", Axis(name, 3, dim), hidden, branch=branch)
            add(f"{block}.attn.in_proj_bias", Axis(name, 3, dim), branch=branch)
            add(f"{block}.attn.out_proj.weight", write, Axis(name, 1, dim, True), branch=branch, gated=True)
            add(f"{block}.attn.out_proj.bias", write, branch=branch, gated=True)
        if mlp is not None:
            branch, name = f"{tower}.ffn.{i}", f"{tower}.mlp.{i}"
            add(f"{block}.ln_2.weight", hidden, branch=branch)
            add(f"{block}.ln_2.bias", hidden, branch=branch)
            add(f"{block}.mlp.c_fc.weight", Axis(name), hidden, branch=branch)
            add(f"{block}.mlp.c_fc.bias", Axis(name), branch=branch)
            add(f"{block}.mlp.c_proj.weight", write, Axis(name, scaled=True), branch=branch, gated=True)
            add(f"{block}.mlp.c_proj.bias", write, branch=branch, gated=True)


def axis_sizes(config: CLIPConfig) -> dict[str, int]:
    """Return the length of every named axis; gates (of existing branches) have length 1."""
    text = config.text
    sizes = {"embed": config.embed_dim, "text.context": text.context_length, "text.vocab": text.vocab_size}
    towers = {"visual": config.vision, "text": config.text}
    for tower, part in towers.items():
        if isinstance(part, ResNetConfig):
            sizes |= resnet_sizes(part)
            continue
        sizes[f"{tower}.hidden"] = part.width
        for i, (heads, mlp) in enumerate(zip(part.heads, part.mlp_width, strict=True)):
            if heads is not None:
                sizes |= {f"{tower}.heads.{i}": heads, f"{tower}.attn.{i}": 1}
            if mlp is not None:
                sizes |= {f"{tower}.mlp.{i}": mlp, f"{tower}.ffn.{i}": 1}
    return sizes


def resnet_sizes(vision: ResNetConfig) -> dict[str, int]:
    """Return the length of every named axis of a ResNet tower."""
    sizes = {f"visual.stem.{i}": channels for i, channels in enumerate(vision.stem, 1)}
    for stage, (channels, ones, twos) in enumerate(zip(vision.channels, vision.conv1, vision.conv2, strict=True), 1):
        sizes[f"visual.stage.{stage}"] = channels
        for i, (one, two) in enumerate(zip(ones, twos, strict=True)):
            sizes |= {f"visual.conv1.{stage}.{i}": one, f"visual.conv2.{stage}.{i}": two}
            if i > 0:
                sizes[f"visual.block.{stage}.{i}"] = 1
    return sizes | {"visual.pool_heads": vision.heads}


def count_parameters(table: Mapping[str, Entry]) -> dict[str, int]:
    """Count parameters by part: `image`, `text` (both without the token embedding), `embedding` (token embedding)."""
    counts = {"image": 0, "text": 0, "embedding": 0}
    for key, entry in table.items():
        if entry.buffer:
            continue
        part = "image" if key.startswith("visual.") else "embedding" if key == "token_embedding.weight" else "text"
        size = 1
        for length in entry.shape:
            size *= length
        counts[part] += size
    return counts
