"""The axis table: which axis of which parameter means what.

Every dimension of every parameter has a named axis or none. Axes with one name are cut together:

    visual.hidden, text.hidden      channels of a tower's residual stream
    visual.heads.3, text.heads.3    attention heads of block 3
    visual.mlp.3, text.mlp.3        MLP neurons of block 3
    embed                           the shared embedding
    text.context, text.vocab        positions and tokens

and every parameter of a residual branch names its gate: `visual.attn.3`, `text.ffn.3`.
Parameter counts, cuts and mask folding all read this one table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tinyclip.config import CLIPConfig, TransformerConfig, VisionConfig

TOWERS = {"visual": "visual.transformer.resblocks", "text": "transformer.resblocks"}


@dataclass(frozen=True)
class Axis:
    """One dimension of a parameter: `outer * size(name) * inner` long, e.g. q, k, v of heads of 64."""

    name: str
    outer: int = 1
    inner: int = 1
    scaled: bool = False  # `compact` folds the mask values in here; elsewhere it only cuts


@dataclass(frozen=True)
class Entry:
    """A parameter: its shape, the axis of each dimension, and the branch it belongs to."""

    shape: tuple[int, ...]
    axes: tuple[Axis | None, ...]
    branch: str | None = None
    gated: bool = False  # the branch's gate multiplies this parameter


def axis_table(config: CLIPConfig) -> dict[str, Entry]:
    """Every parameter of the model, by its OpenAI/OpenCLIP key.

    Raises:
        ValueError: for a tower that has no table.
    """
    vision, text = config.vision, config.text
    if not isinstance(vision, VisionConfig):
        raise ValueError(f"a {vision.kind} image tower has no axis table yet; only ViT towers can be built")
    sizes = axis_sizes(config)
    table: dict[str, Entry] = {}

    def add(key: str, *axes: Axis | int, branch: str | None = None, gated: bool = False) -> None:
        shape = tuple(a if isinstance(a, int) else a.outer * sizes[a.name] * a.inner for a in axes)
        table[key] = Entry(shape, tuple(None if isinstance(a, int) else a for a in axes), branch, gated)

    hidden, write = Axis("visual.hidden"), Axis("visual.hidden", scaled=True)
    embed = Axis("embed", scaled=True)
    add("visual.class_embedding", write)
    add("visual.positional_embedding", vision.grid**2 + 1, write)
    add("visual.proj", hidden, embed)
    add("visual.conv1.weight", write, 3, vision.patch_size, vision.patch_size)
    for norm in ("ln_pre", "ln_post"):
        add(f"visual.{norm}.weight", hidden)
        add(f"visual.{norm}.bias", hidden)
    _add_blocks(add, "visual", vision)

    hidden, write = Axis("text.hidden"), Axis("text.hidden", scaled=True)
    add("token_embedding.weight", Axis("text.vocab"), write)
    add("positional_embedding", Axis("text.context"), write)
    add("ln_final.weight", hidden)
    add("ln_final.bias", hidden)
    add("text_projection", hidden, embed)
    _add_blocks(add, "text", text)
    add("logit_scale")
    return table


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
    """Length of every named axis; gates (of branches that exist) have length 1."""
    text = config.text
    sizes = {"embed": config.embed_dim, "text.context": text.context_length, "text.vocab": text.vocab_size}
    towers = {"visual": config.vision, "text": config.text}
    for tower, part in towers.items():
        if not isinstance(part, TransformerConfig):
            continue
        sizes[f"{tower}.hidden"] = part.width
        for i, (heads, mlp) in enumerate(zip(part.heads, part.mlp_width, strict=True)):
            if heads is not None:
                sizes |= {f"{tower}.heads.{i}": heads, f"{tower}.attn.{i}": 1}
            if mlp is not None:
                sizes |= {f"{tower}.mlp.{i}": mlp, f"{tower}.ffn.{i}": 1}
    return sizes


def count_parameters(table: Mapping[str, Entry]) -> dict[str, int]:
    """Parameters by part: `image`, `text` (both without the token embedding), `embedding` (the token embedding)."""
    counts = {"image": 0, "text": 0, "embedding": 0}
    for key, entry in table.items():
        part = "image" if key.startswith("visual.") else "embedding" if key == "token_embedding.weight" else "text"
        size = 1
        for length in entry.shape:
            size *= length
        counts[part] += size
    return counts
