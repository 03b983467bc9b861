"""Weight inheritance: masks by the manual rule, and the cut that applies any masks."""

from __future__ import annotations

import re
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from tinyclip.model.axes import GATES, NEEDED, Axis, Entry, axis_kind, axis_sizes, axis_table, resnet_sizes
from tinyclip.model.config import CLIPConfig, ResNetConfig, TransformerConfig, VisionConfig
from tinyclip.model.masks import Masks, validate
from tinyclip.model.model import CLIP, unfilled


def inherit(teacher: CLIP, student_config: CLIPConfig) -> CLIP:
    """Slice the student out of the teacher by the manual rule (TinyCLIP, ICCV 2023, section 3.2).

    Channels, heads, neurons and embedding: keep the first k. Blocks (in a ResNet, of each stage): keep 0, step, 2*step,
    ... with step = teacher_layers // student_layers. A different image size interpolates the position embeddings;
    a shorter context keeps the first positions. The teacher does not change. Warns when the activations differ.

    Raises:
        ValueError: naming every size in which the teacher is too small, or a different family.

    >>> import tinyclip
    >>> teacher = tinyclip.load("emoji-student").model
    >>> shape = teacher.config.model_dump() | {"embed_dim": 96}
    >>> tinyclip.inherit(teacher, tinyclip.CLIPConfig.from_dict(shape)).config.embed_dim
    96
    """
    masks = manual_masks(teacher.config, student_config)
    student = compact(resize_positions(teacher, student_config), masks)
    if student.config.activation != student_config.activation:
        text = f"the student's activation is {student_config.activation}, the teacher's {student.config.activation}"
        warnings.warn(text, stacklevel=2)
        student = _load(student_config, student.state_dict(), student)
    assert student.config == student_config, "the rule's masks and the student's config disagree"
    return student


def manual_masks(teacher: CLIPConfig, student: CLIPConfig) -> dict[str, Tensor]:
    """Return masks of 0 and 1 that cut a teacher to the student by the manual rule.

    Raises:
        ValueError: when the student is larger anywhere, or of another family; names every mismatch.
    """
    problems: list[str] = []
    masks: dict[str, Tensor] = {}

    def first(name: str, size: int, keep: int) -> None:
        if keep > size:
            problems.append(f"{name} {keep} > {size}")
        else:
            masks[name] = torch.arange(size) < keep

    first("embed", teacher.embed_dim, student.embed_dim)
    first("text.context", teacher.text.context_length, student.text.context_length)
    if teacher.text.vocab_size != student.text.vocab_size:
        problems.append(f"text.vocab_size {student.text.vocab_size}, not {teacher.text.vocab_size} (prune it first)")
    if teacher.vision.kind != student.vision.kind:
        raise ValueError(f"a {student.vision.kind} student cannot inherit from a {teacher.vision.kind} teacher")
    pairs = [("visual", teacher.vision, student.vision), ("text", teacher.text, student.text)]
    for tower, big, small in pairs:
        if big.head_dim != small.head_dim:
            problems.append(f"{tower}.head_dim {small.head_dim}, not {big.head_dim}")
        if isinstance(big, ResNetConfig):
            assert isinstance(small, ResNetConfig)
            _resnet_masks(masks, problems, big, small, first)
            continue
        assert isinstance(big, TransformerConfig) and isinstance(small, TransformerConfig)
        if isinstance(big, VisionConfig) and isinstance(small, VisionConfig) and big.patch_size != small.patch_size:
            problems.append(f"visual.patch_size {small.patch_size}, not {big.patch_size}")
        first(f"{tower}.hidden", big.width, small.width)
        if small.layers > big.layers:
            problems.append(f"{tower}.layers {small.layers} > {big.layers}")
            continue
        _block_masks(masks, problems, tower, big, small, first)
    if problems:
        first_of: dict[str, str] = {}
        for problem in problems:
            first_of.setdefault(re.sub(r"\.\d+:? .*", "", problem), problem)  # of a tower's blocks, the first
        raise ValueError("the student does not fit into the teacher: " + "; ".join(first_of.values()))
    return {name: mask.to(torch.float32) for name, mask in masks.items()}


def _block_masks(masks, problems, tower: str, big: TransformerConfig, small: TransformerConfig, first) -> None:  # type: ignore[no-untyped-def]
    kept = kept_blocks(big.layers, small.layers)
    for i in range(big.layers):
        j = kept.index(i) if i in kept else None
        for gate, axis, sizes, wanted in (
            ("attn", "heads", big.heads, small.heads),
            ("ffn", "mlp", big.mlp_width, small.mlp_width),
        ):
            size, keep = sizes[i], None if j is None else wanted[j]
            if size is None:
                if keep is not None:
                    problems.append(f"{tower}.{gate}.{i}: the teacher has no such branch")
            elif keep is None:
                masks[f"{tower}.{gate}.{i}"] = torch.zeros(1)
            else:
                first(f"{tower}.{axis}.{i}", size, keep)


def _resnet_masks(masks, problems, big: ResNetConfig, small: ResNetConfig, first) -> None:  # type: ignore[no-untyped-def]
    """Apply the block rule in every stage; the first block of a stage always stays."""
    sizes, wanted = resnet_sizes(big), resnet_sizes(small)
    for name, size in sizes.items():
        if axis_kind(name) not in ("conv1", "conv2", "block"):
            first(name, size, wanted[name])
    for stage, (layers, fewer) in enumerate(zip(big.layers, small.layers, strict=True), 1):
        if fewer > layers:
            problems.append(f"visual.layers of stage {stage} {fewer} > {layers}")
            continue
        kept = kept_blocks(layers, fewer)
        for i in range(layers):
            if i not in kept:
                masks[f"visual.block.{stage}.{i}"] = torch.zeros(1)
                continue
            for axis in (f"visual.conv1.{stage}", f"visual.conv2.{stage}"):
                first(f"{axis}.{i}", sizes[f"{axis}.{i}"], wanted[f"{axis}.{kept.index(i)}"])


def describe(config: CLIPConfig, masks: Masks, which: str = "the first {}") -> list[list[str]]:
    """Describe what masks of 0 and 1 keep, in rows of (axis, before, after, what); equal blocks share a row.

    Args:
        which: text naming the kept elements of an axis, {} for their number.
    """
    rows: dict[tuple[str, ...], list[str]] = {}
    for name, size in axis_sizes(config).items():
        tower, kind, block = [*name.split(".", 2), "", ""][:3]
        if kind in GATES:
            continue
        if kind in ("stem", "stage"):  # belongs to the tower, not to a block
            kind, block = f"{kind} {block}", ""
        gate = masks.get(_gate_of(name)) if block else None
        closed = gate is not None and not gate.any()
        kept = 0 if closed else int(masks[name].count_nonzero()) if name in masks else size
        label = f"{tower} {kind}".strip()
        what = "removed" if kept == 0 else "all" if kept == size else which.format(kept)
        rows.setdefault((label, str(size), str(kept), what), []).append(block)
    return [
        [f"{key[0]} of block{'s' if len(blocks) > 1 else ''} {', '.join(blocks)}" if blocks[0] else key[0], *key[1:]]
        for key, blocks in rows.items()
    ]


def _gate_of(name: str) -> str:
    """Return the gate of an axis's branch: `visual.attn.3` for `visual.heads.3`; the name itself outside a branch."""
    kinds = {"heads": "attn", "mlp": "ffn", "conv1": "block", "conv2": "block"}
    tower, kind, block = [*name.split(".", 2), "", ""][:3]
    return f"{tower}.{kinds[kind]}.{block}" if kind in kinds else name


def kept_blocks(teacher_layers: int, student_layers: int) -> list[int]:
    """Return the blocks that the manual rule keeps: 12 to 6 keeps 0, 2, 4, 6, 8, 10; 12 to 9 keeps 0 to 8."""
    step = teacher_layers // max(1, student_layers)
    return list(range(0, step * student_layers, step))


def compact(model: CLIP, masks: Masks) -> CLIP:
    """Fold mask values into the weights and cut the closed elements: return a new model with the same outputs.

    `compact(m, z)(x)` equals `m(x, masks=z)`, also for graded masks and gates. A branch whose gate is 0 is removed with
    its bias, a block without branches is removed, and the rest are renumbered; a branch that merely lost all heads or
    neurons stays as its bias. Cut dims of `embed` are dropped from the features.

    Raises:
        ValueError: when a mask does not fit the model, or would empty an axis that must not be empty.

    >>> import torch, tinyclip
    >>> model = tinyclip.load("emoji-student").model
    >>> heads = torch.tensor([1.0, 0.5, 0, 1, 1])  # of the image tower's first block
    >>> tinyclip.compact(model, {"visual.heads.0": heads}).config.vision.heads
    (4, 4, 6, 5, 6, 6)
    """
    validate(masks, model.config)
    masks = {name: mask.detach() for name, mask in masks.items()}
    kept = {name: mask.nonzero().flatten() for name, mask in masks.items()}
    closed = {name for name in kept if axis_kind(name) in GATES and len(kept[name]) == 0}
    for name, indices in kept.items():
        if len(indices) == 0 and axis_kind(name) in NEEDED and _gate_of(name) not in closed:
            raise ValueError(f"mask {name!r} removes everything")
    config, block_of = _cut_config(model.config, kept, closed)
    weights, state = model.state_dict(), {}
    with torch.no_grad():
        for key, entry in axis_table(model.config).items():
            if entry.branch in closed:
                continue
            tensor = _cut(weights[key], entry, masks, kept)
            state[_renumbered(key, entry.branch, block_of)] = tensor
    return _load(config, state, model)


def _cut(tensor: Tensor, entry: Entry, masks: Masks, kept: dict[str, Tensor]) -> Tensor:
    """Fold mask values into one parameter or buffer and cut closed elements; return a copy in the same dtype. Below 32
    bits, values are folded in float32 and rounded once."""
    dtype = tensor.dtype
    tensor = tensor.detach().clone()
    if tensor.is_floating_point() and dtype.itemsize < 4:
        tensor = tensor.float()
    for dim, axis in enumerate(entry.axes):
        if axis is None or axis.name not in masks:
            continue
        mask = masks[axis.name].to(tensor)
        if axis.scaled:
            shape = [1] * tensor.ndim
            shape[dim] = -1
            tensor = tensor * _expand(mask, axis).view(shape)
        positions = torch.arange(tensor.shape[dim]).view(axis.outer, -1, axis.inner)
        rows = positions[:, kept[axis.name].cpu()].flatten()
        tensor = tensor.index_select(dim, rows.to(tensor.device))
    if entry.gated and entry.branch is not None and entry.branch in masks:
        tensor = tensor * masks[entry.branch].to(tensor)
    return tensor.to(dtype)


def _expand(mask: Tensor, axis: Axis) -> Tensor:
    return mask.repeat_interleave(axis.inner).repeat(axis.outer)


def _cut_config(config: CLIPConfig, kept: dict[str, Tensor], closed: set[str]) -> tuple[CLIPConfig, dict[str, int]]:
    """Return the config after the cut, and the new index of every kept block (`visual.3` -> 2, `visual.4.2` -> 1)."""
    sizes = axis_sizes(config) | {name: len(indices) for name, indices in kept.items()}
    block_of: dict[str, int] = {}
    towers: dict[str, TransformerConfig | ResNetConfig] = {}
    for tower, part in (("visual", config.vision), ("text", config.text)):
        if isinstance(part, ResNetConfig):
            towers[tower] = _cut_resnet(part, sizes, closed, block_of)
            continue
        heads: list[int | None] = []
        mlp_width: list[int | None] = []
        for i in range(part.layers):
            h = None if part.heads[i] is None or f"{tower}.attn.{i}" in closed else sizes[f"{tower}.heads.{i}"]
            m = None if part.mlp_width[i] is None or f"{tower}.ffn.{i}" in closed else sizes[f"{tower}.mlp.{i}"]
            if h is not None or m is not None:
                block_of[f"{tower}.{i}"] = len(heads)
                heads.append(h)
                mlp_width.append(m)
        update = {"width": sizes[f"{tower}.hidden"], "heads": tuple(heads), "mlp_width": tuple(mlp_width)}
        if tower == "text":
            update |= {"context_length": sizes["text.context"], "vocab_size": sizes["text.vocab"]}
        towers[tower] = part.model_copy(update=update)
    data = {"embed_dim": sizes["embed"], "vision": towers["visual"], "text": towers["text"]}
    return CLIPConfig.model_validate(config.model_copy(update=data).model_dump()), block_of


def _cut_resnet(part: ResNetConfig, sizes: dict[str, int], closed: set[str], block_of: dict[str, int]) -> ResNetConfig:
    inner: dict[str, list[list[int]]] = {"conv1": [], "conv2": []}
    for stage, layers in enumerate(part.layers, 1):
        kept = [i for i in range(layers) if f"visual.block.{stage}.{i}" not in closed]
        block_of |= {f"visual.{stage}.{i}": j for j, i in enumerate(kept)}
        for kind, stages in inner.items():
            stages.append([sizes[f"visual.{kind}.{stage}.{i}"] for i in kept])
    channels = [sizes[f"visual.stage.{stage}"] for stage in (1, 2, 3, 4)]
    stem = [sizes[f"visual.stem.{i}"] for i in (1, 2, 3)]
    update = {"stem": stem, "channels": channels, "heads": sizes["visual.pool_heads"]} | inner
    return ResNetConfig.model_validate(part.model_dump() | update)


def _renumbered(key: str, branch: str | None, block_of: dict[str, int]) -> str:
    if branch is None:
        return key
    tower, _, block = branch.split(".", 2)
    if "." in block:  # ResNet: stage and block
        stage = block.partition(".")[0]
        return key.replace(f".layer{block}.", f".layer{stage}.{block_of[f'{tower}.{block}']}.", 1)
    return key.replace(f".resblocks.{block}.", f".resblocks.{block_of[f'{tower}.{block}']}.", 1)


def _load(config: CLIPConfig, state: dict[str, Tensor], like: CLIP) -> CLIP:
    """Build a model of `config` from copies of these weights, dtypes kept, on the device and in the mode of `like`."""
    model = unfilled(config).to_empty(device=like.logit_scale.device)
    for key, parameter in model.named_parameters():
        parameter.data = parameter.data.to(state[key].dtype)
    for key, buffer in model.named_buffers():
        if key in state:
            buffer.data = buffer.data.to(state[key].dtype)
    model.load_state_dict(state)
    return model.train(like.training)


def resize_positions(model: CLIP, student: CLIPConfig) -> CLIP:
    """Resize the model to the student's image size: interpolate (bicubic, antialiased) the position embeddings of the
    patches (in a ResNet: of its attention pool) and keep the first token's. Returns the model itself when the size is
    the same."""
    vision, target = model.config.vision, student.vision
    if vision.image_size == target.image_size:
        return model
    key = f"visual.{'' if isinstance(vision, VisionConfig) else 'attnpool.'}positional_embedding"
    positions = model.get_parameter(key).detach()
    grid = positions[1:].T.reshape(1, -1, vision.grid, vision.grid)
    size = (target.grid, target.grid)
    grid = F.interpolate(grid.float(), size, mode="bicubic", antialias=True, align_corners=False).to(positions)
    resized = torch.cat([positions[:1], grid.flatten(2)[0].T])
    config = model.config.model_copy(update={"vision": vision.model_copy(update={"image_size": target.image_size})})
    return _load(config, {**model.state_dict(), key: resized}, model)


def prune_vocabulary(model: CLIP, kept: list[int]) -> CLIP:
    """Return the model with only these token ids, renumbered in order (see `CLIPTokenizer.kept_ids`)."""
    mask = torch.zeros(model.config.text.vocab_size)
    mask[kept] = 1
    return compact(model, {"text.vocab": mask})
