"""Find the weights of a CLIP in a training file, whatever they are wrapped in.

There is no list of wrappers: the end of a key says what a tensor is (`visual.conv1.weight`); everything before it, the
enclosing dictionaries and modules, names the model that the tensor belongs to.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tinyclip.zoo.storages import Refused, Stored
from tinyclip.zoo.tensors import Entry, tensor_of

BLOCK = r"((ln_[12]|attn\.out_proj|mlp\.c_(fc|proj))\.(weight|bias)|attn\.in_proj_(weight|bias))"
RESNET = r"(conv[123]\.weight|bn[123]\.\w+|layer[1-4]\.\d+\.[\w.]+|attnpool\.[\w.]+)"
OPENAI = re.compile(
    rf"visual\.(conv1\.weight|class_embedding|positional_embedding|proj|ln_(pre|post)\.(weight|bias)|{RESNET}"
    rf"|transformer\.resblocks\.\d+\.{BLOCK})"
    rf"|transformer\.resblocks\.\d+\.{BLOCK}|token_embedding\.weight|positional_embedding|ln_final\.(weight|bias)"
    r"|text_projection|logit_scale"
)
HUGGING_FACE = re.compile(r"(vision_model|text_model)\.[\w.]+|(visual|text)_projection\.weight|logit_scale")
ANCHORS = (  # keys of a complete model's towers: (image, text)
    ("visual.conv1.weight", "token_embedding.weight"),
    ("vision_model.embeddings.patch_embedding.weight", "text_model.embeddings.token_embedding.weight"),
)
# First parts of a CLIP's keys. Other tensors under them would change its features.
TOWERS = {"visual", "transformer", "token_embedding", "positional_embedding", "ln_final", "text_projection", "text"}
TOWERS |= {"logit_scale", "vision_model", "text_model", "visual_projection"}
# Wrapper modules: PyTorch's (`module`, `_orig_mod`, `_fsdp_wrapped_module`), which can also appear in the middle of
# keys, and the TinyCLIP authors' tower wrappers (`_image_encoder`, `image_encoder_without_ddp`).
AROUND = re.compile(r"module|_\w+|\w+_without_ddp")
MASKS = "l0_module"  # the authors' pruning masks, already folded into the weights
AVERAGE = re.compile(r"(^|_)(emas?|averaged?|swa|shadow)(_|$)")
OPTIMISER = re.compile(r"optim|scaler|sched", re.IGNORECASE)
# Ignored among a model's own keys: buffers, and additions from other projects' training.
NO_WEIGHTS = {"attn_mask", "position_ids", "num_batches_tracked", "positional_embedding_res", "logit_bias"}
EXTRAS = ("input_resolution", "context_length", "vocab_size")  # in OpenAI's files

Path = tuple[str, ...]


@dataclass
class Found:
    """A CLIP found in a file: its weights by the ends of their keys, the keys left out, and notes for the user."""

    tensors: dict[str, Tensor]
    left_out: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)


@dataclass
class _Model:
    """The entries of one model; its name is the path of what encloses it."""

    name: Path
    entries: list[tuple[str, Entry]] = field(default_factory=list)

    @property
    def keys(self) -> set[str]:
        return {key for key, _ in self.entries}

    @property
    def whole(self) -> bool:
        return any(self.keys.issuperset(pair) for pair in ANCHORS)

    @property
    def shown(self) -> str:
        return ".".join(self.name) or "the rest"


def find_clip(entries: Sequence[Entry], where: str) -> Found:
    """Return the CLIP among a file's values. Its keys are not checked; the caller rejects those that do not fit.

    Raises:
        ValueError: if there are several CLIPs, or a weight is not a plain tensor.
    """
    models = _models(entries)
    whole = [model for model in models.values() if model.whole]
    said: list[str] = []
    try:
        if whole:
            model = _one_of(whole, where, said)
        else:
            model = _joined(list(models.values()), entries)
        others = {id(entry) for other in whole if other is not model for _, entry in other.entries}
        return _collected(model, [entry for entry in entries if id(entry) not in others], said)
    except Refused as error:
        raise ValueError(f"{where}: {error}") from None


def _models(entries: Iterable[Entry]) -> dict[Path, _Model]:
    models: dict[Path, _Model] = {}
    for entry in entries:
        if any(OPTIMISER.search(key) for key in entry.around) or MASKS in entry.path:
            continue
        if (found := _end_of(entry)) is not None:
            name, key = found
            models.setdefault(name, _Model(name)).entries.append((key, entry))
    return models


def _end_of(entry: Entry) -> tuple[Path, str] | None:
    """Return the model that a value belongs to, and its key in it; None if it is not a weight of a CLIP."""
    parts = _unwrapped(entry.path)
    for i in range(len(parts)):
        key = ".".join(parts[i:])
        if OPENAI.fullmatch(key) or HUGGING_FACE.fullmatch(key):
            name = parts[:i]
            # OpenCLIP models with `custom_text` keep their text tower in a module of its own.
            return (name[:-1] if name[-1:] == ("text",) and not key.startswith("vis") else name), key
    return None


def _unwrapped(path: Path) -> Path:
    return tuple(part for part in path if not AROUND.fullmatch(part) or _role(part))


def _role(part: str) -> str:
    """Return the role that a model's name gives it: student, teacher, average or none."""
    part = part.lower()
    return next((role for role in ("student", "teacher") if role in part), "average" if AVERAGE.search(part) else "")


def _roles(model: _Model) -> set[str]:
    return {role for part in model.name if (role := _role(part))}


def _one_of(models: list[_Model], where: str, said: list[str]) -> _Model:
    """Choose one of several models: the student rather than the teacher, the raw weights rather than their average.

    Raises:
        ValueError: if several models with different weights remain.
    """
    for role, why in (
        ("teacher", "the trained model, not its teacher"),
        ("average", "the weights themselves, not their average"),
    ):
        others = [model for model in models if role in _roles(model)]
        kept = [model for model in models if model not in others]
        if others and kept:
            names = ", ".join(model.shown for model in others)
            said.append(f"it holds several models; reading {kept[0].shown}, not {names} ({why})")
            models = kept
    first, *rest = sorted(models, key=_width, reverse=True)
    if different := [model.shown for model in rest if not _same(first, model)]:
        raise ValueError(
            f"{where} holds several CLIPs with different weights, {', '.join([first.shown, *different])}; "
            "save only the one that you want"
        )
    return first


def _width(model: _Model) -> int:
    """Return the item size in bytes of the widest dtype."""
    dtypes = [entry.value.dtype for _, entry in model.entries if isinstance(entry.value, Tensor | Stored)]
    return max((dtype.itemsize for dtype in dtypes if dtype is not None), default=0)


def _same(one: _Model, two: _Model) -> bool:
    """Return whether two models have equal weights."""
    first, second = dict(one.entries), dict(two.entries)
    return first.keys() == second.keys() and all(
        (a := tensor_of(first[key])).shape == (b := tensor_of(second[key])).shape and agreed(a, b) is not None
        for key in first
    )


def agreed(one: Tensor, two: Tensor) -> Tensor | None:
    """Return the wider of two copies of a tensor; None if they differ by more than the narrower one's rounding."""
    if one.dtype.itemsize < two.dtype.itemsize:
        one, two = two, one
    if one.shape != two.shape:
        return None
    rounded, narrow = one.to(two.dtype), two
    if narrow.dtype.itemsize == 1:  # torch does not compare these
        rounded, narrow = rounded.float(), narrow.float()
    return one if torch.equal(rounded, narrow) else None


def _joined(models: list[_Model], entries: Sequence[Entry]) -> _Model:
    """Return two separate towers as one model; if they do not make a complete one, the largest part of a CLIP found."""
    parts = [[m for m in models if any(pair[i] in m.keys for pair in ANCHORS)] for i in (0, 1)]
    if all(len(part) == 1 for part in parts):
        (image,), (text,) = parts
        return _Model(_common(image.name, text.name), image.entries + text.entries)
    fullest = next(iter(_fullest(entries)), ())
    return max(models, key=lambda model: len(model.entries), default=_Model(_unwrapped(fullest)))


def _common(one: Path, two: Path) -> Path:
    count = next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
    return one[:count]


def _collected(model: _Model, entries: Sequence[Entry], said: list[str]) -> Found:
    """Return a model's tensors, and the other entries in the same dictionaries."""
    found = Found({}, said=said)
    weights = list(model.entries)
    if model.whole and "logit_scale" not in model.keys:
        weights += _scale(entries, said)
    own = {id(entry) for _, entry in weights}
    around = {entry.around for _, entry in model.entries} or _fullest(entries)
    for entry in entries:
        if id(entry) in own or entry.around not in around or MASKS in entry.path:
            continue
        if (key := _key_within(model, entry)) is not None:
            weights.append((key, entry))
        elif not entry.attribute:
            found.left_out.append(entry.key)
    for key, entry in weights:
        value = tensor_of(entry)
        if (known := found.tensors.get(key)) is not None:
            if (wider := agreed(*(_number(tensor) for tensor in (known, value)))) is None:
                raise Refused(f"{key} appears twice with different values, the second time as {entry.key}")
            value = wider
        found.tensors[key] = value
    return found


def _number(tensor: Tensor) -> Tensor:
    """Drop the axes of a single-value tensor."""
    return tensor.reshape(()) if tensor.numel() == 1 else tensor


def _key_within(model: _Model, entry: Entry) -> str | None:
    """Return the key of a tensor that not every CLIP has but that would change this one; None if the value carries no
    weights."""
    parts, depth = _unwrapped(entry.path), len(model.name)
    if parts[:depth] != model.name or not isinstance(entry.value, Tensor | Stored) or parts[-1] in NO_WEIGHTS:
        return None
    parts, dtype = parts[depth:], entry.value.dtype
    if len(parts) == 1 and parts[0] in EXTRAS:
        return parts[0]
    inside = bool(parts) and (parts[0] in TOWERS or not model.whole)
    return ".".join(parts) if inside and (dtype is None or dtype.is_floating_point) else None


def _scale(entries: Iterable[Entry], said: list[str]) -> list[tuple[str, Entry]]:
    """Return the logit scale from outside the model, for example from a loss, if there is exactly one."""
    found = [entry for entry in entries if entry.path[-1] == "logit_scale" and not _beside(entry)]
    if len(found) == 1:
        said.append(f"the logit scale is {'.'.join(found[0].path)}")
        return [("logit_scale", found[0])]
    return []


def _beside(entry: Entry) -> bool:
    return any(OPTIMISER.search(key) for key in entry.around) or bool({_role(p) for p in entry.path} - {"", "student"})


def _fullest(entries: Iterable[Entry]) -> set[Path]:
    """Return the dictionary with the most tensors."""
    counts = Counter(entry.around for entry in entries if isinstance(entry.value, Tensor | Stored))
    return {around for around, _ in counts.most_common(1)}
