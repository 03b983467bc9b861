"""Embed files: read pictures, shards or texts, and write parts of normalised features with their keys.

A part is written to a temporary file, renamed, and then recorded with its files' checksums. A restarted run computes
the parts that have no record or differ from it. Processes started by `torchrun` share the parts.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from tinyclip.common import faults
from tinyclip.common.distributed import from_main, gather_objects, rank, world_size
from tinyclip.common.faults import Fault, Skipped, Unusable
from tinyclip.common.files import json_text, name_of, read_json_object, write_atomically
from tinyclip.common.folders import remove_leftovers
from tinyclip.common.locks import lock_of, take
from tinyclip.common.ownership import LOCKS, MARKER, check_replaceable, claim, discard, is_free, read_marker, remove
from tinyclip.data.samples import captions_of, image_of
from tinyclip.data.shards import read_shard
from tinyclip.data.tables import captions_in, picture_in
from tinyclip.inference.pipeline import Pipeline, Tensors
from tinyclip.inputs.batching import ahead, batches
from tinyclip.inputs.transforms import DRAFT, open_image
from tinyclip.search.feature_files import DONE, SKIPPED, Plan, files_of, is_done, record_path, write_part
from tinyclip.search.sources import Rows, Source, Text

TEXTS_AT_ONCE = 4096  # texts sorted by length and encoded between two progress reports


@dataclass
class Record:
    """The record of one part."""

    images: int = 0
    texts: int = 0
    skipped: list[Skipped] = field(default_factory=list)
    files: dict[str, list[int]] = field(default_factory=dict)  # name -> bytes and CRC-32


@dataclass
class Tally:
    """This process's progress in this run."""

    total: int | None  # pictures or texts to do; unknown for shards
    images: int = 0
    texts: int = 0


Progress = Callable[[Tally], None]


# --- a run ------------------------------------------------------------------------------------------------------


def embed(
    clip: Pipeline | Tensors,
    source: Source,
    out: str | Path,
    plan: Plan,
    *,
    overwrite: bool = False,
    progress: Progress = lambda tally: None,
) -> dict[str, Any]:
    """Compute the missing parts. Return the final content of `embed.json`, with this run's `images_per_s`.

    Args:
        progress: called after every batch.

    Raises:
        ValueError: when the folder holds something else, was made from another model or source or with other
            options, or cannot be written, or when nothing in the source can be read.
    """
    out = Path(out)
    facts = from_main(lambda: check(source, out, plan, overwrite)) | _facts(clip)
    lock = lock_of(out)
    from_main(lambda: take(lock, "tinyclip embed"))
    try:
        from_main(lambda: _open(out, facts, overwrite))
        return _fill(clip, source, out, plan, facts, progress)
    finally:
        lock.release()


def _fill(
    clip: Pipeline | Tensors, source: Source, out: Path, plan: Plan, facts: dict[str, Any], progress: Progress
) -> dict[str, Any]:
    start = time.perf_counter()
    left = [n for n in range(rank(), len(source.parts), world_size()) if not is_done(out, n)]
    total = None if source.kind == "shards" else sum(len(source.parts[n]) for n in left)
    tally = Tally(total)
    for number in left:
        record = _part(clip, source, number, out, plan, lambda: progress(tally), tally)
        write_atomically(record_path(out, number), json_text(asdict(record)))
    counts = gather_objects((tally.images, tally.texts))
    seconds = time.perf_counter() - start
    images, texts = (sum(count[i] for count in counts) for i in (0, 1))
    result = from_main(lambda: _close(out, facts, source))
    return result | {"computed": images + texts, "images_per_s": images / seconds, "texts_per_s": texts / seconds}


def check(source: Source, out: str | Path, plan: Plan, overwrite: bool = False) -> dict[str, Any]:
    """Reject, without a model, what `embed` would refuse, and return the facts for `embed.json` that need none.

    Raises:
        ValueError: as `embed`.
    """
    out = Path(out)
    both = source.kind == "shards" or (source.kind == "rows" and source.text_column is not None)
    what = plan.what if both else "text" if source.kind == "texts" else "image"
    if plan.what not in ("both", what):
        raise ValueError(f"{source.root}: contains only {source.kind}, so there are no {plan.what} features")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; choose a folder for the features")
    mine = (out / DONE).exists()
    if not mine and not is_free(out) and read_marker(out) is None:
        raise ValueError(f"{out} is not empty and holds no features from `tinyclip embed`; choose another folder")
    if overwrite or not mine:  # empty, or left by a run that was killed or read nothing
        check_replaceable(out, "features")
    facts = {
        "model": plan.model,
        "source": str(source.root),
        "source_fingerprint": source.fingerprint,
        "kind": source.kind,
        "text_column": source.text_column,
        "key_column": source.key_column,
        "what": what,
        "format": plan.format,
        "dtype": plan.dtype,
        "normalized": True,
        "part_size": None if source.kind == "shards" else plan.part_size,
        "parts": len(source.parts),
    }
    if mine and not overwrite:
        _check_same(out, facts)
    return facts


def _facts(clip: Pipeline | Tensors) -> dict[str, Any]:
    return {
        "model_fingerprint": clip.fingerprint(),
        "int8_files": _int8_files(clip),
        "computed_in": clip.computing["dtype"],
        "embed_dim": clip.embed_dim,
    }


def _int8_files(clip: Pipeline | Tensors) -> dict[str, list[int]] | None:
    """Return the files of an int8 export, whose fingerprint (the model's) is the same for every calibration."""
    if isinstance(clip, Tensors) and clip.facts["precision"] == "int8":
        return clip.facts["files"]
    return None


_NAMED = {
    "model_fingerprint": "model",
    "int8_files": "model",
    "source_fingerprint": "source",
}  # fact -> the user's name for it
_CALLED = {**_NAMED, "computed_in": "compute dtype"}
_CHECKED = (
    "computed_in",
    "model_fingerprint",
    "int8_files",
    "kind",
    "what",
    "format",
    "dtype",
    "part_size",
    "source_fingerprint",
    "text_column",
    "key_column",
)


def _check_same(out: Path, facts: dict[str, Any]) -> None:
    """Refuse to continue with features that were made with other settings."""
    before = read_json_object(out / DONE)
    for key in _CHECKED:
        if key in facts and before.get(key) != facts[key]:
            name = _CALLED.get(key, key)
            old, new = before.get(_NAMED.get(key, key)), facts[_NAMED.get(key, key)]
            change = f"{old or 'none'}, now {new or 'none'}" if old != new else f"{new}, which has changed since"
            raise ValueError(
                f"{out} was made with another {name.replace('_', ' ')} ({change}); use --overwrite to start over"
            )


def _open(out: Path, facts: dict[str, Any], overwrite: bool) -> None:
    """Prepare the output folder."""
    if overwrite:
        remove(out, "features", keep=LOCKS)
    elif (out / DONE).exists():
        _check_same(out, facts)
    claim(out, "features", files_of(facts))
    remove_leftovers(out)  # from a killed run
    write_atomically(out / DONE, json_text(facts | {"done": False}, indent=2) + "\n")


def _close(out: Path, facts: dict[str, Any], source: Source) -> dict[str, Any]:
    records = [read_json_object(record_path(out, number)) for number in range(len(source.parts))]
    skipped = [*source.skipped, *(Skipped(**row) for record in records for row in record["skipped"])]
    write_atomically(out / SKIPPED, "".join(json_text(asdict(s)) + "\n" for s in skipped))
    by_cause = faults.counts(skipped)
    counts = {name: sum(record[name] for record in records) for name in ("images", "texts")}
    if not any(counts.values()):
        discard(out, keep=(SKIPPED, MARKER, *LOCKS))
        first = f"{faults.summary(by_cause)}; the first: {skipped[0]}" if skipped else "it is empty"
        raise Unusable(f"{source.root}: nothing could be embedded: {first}")
    result = facts | counts | {"skipped": len(skipped), "skipped_by_cause": by_cause, "done": True}
    write_atomically(out / DONE, json_text(result, indent=2) + "\n")
    return result


# --- one part ---------------------------------------------------------------------------------------------------


def _part(
    clip: Pipeline | Tensors,
    source: Source,
    number: int,
    out: Path,
    plan: Plan,
    progress: Callable[[], None],
    tally: Tally,
) -> Record:
    record, part = Record(), source.parts[number]
    texts: list[Text] = []
    if source.kind == "texts":
        texts = part
    else:
        if source.kind == "pictures":
            items = _of_paths(part, source.root)
        else:
            items = (_of_shard if source.kind == "shards" else _of_rows)(part, plan, record, texts)
        shard = part.name if source.kind == "shards" else ""
        keys, rows = [], [torch.empty(0, clip.embed_dim)]
        for some, features in _images(clip, items, shard, plan, record):
            keys += some
            rows.append(features)
            tally.images += len(some)
            progress()
        if plan.what != "text":
            record.files |= write_part(out, f"image-{number:05d}", {"key": keys}, torch.cat(rows), plan)
            record.images = len(keys)
    if source.kind != "pictures" and plan.what != "image":
        rows = [torch.empty(0, clip.embed_dim)]
        for few in batches(texts, TEXTS_AT_ONCE):
            rows.append(clip.encode_text([text.caption for text in few], batch_size=plan.batch_size).cpu())
            tally.texts += len(few)
            progress()
        columns = {name: [getattr(text, name) for text in texts] for name in ("key", "number", "caption")}
        record.files |= write_part(out, f"text-{number:05d}", columns, torch.cat(rows), plan)
        record.texts = len(texts)
    return record


Item = tuple[str, Callable[[int], Any]]  # a key, and a function that opens its picture


def _of_paths(paths: Sequence[Path], root: Path) -> Iterator[Item]:
    for path in paths:
        yield name_of(path.relative_to(root)), partial(_opened, path)


def _opened(path: Path, at_least: int) -> Image.Image:
    """Call `open_image`, with errors that omit the path."""
    try:
        return open_image(path, at_least)
    except ValueError as error:
        cause = getattr(error, "cause", "corrupt_image")
        raise Fault(cause, str(error).removeprefix(f"{path}: ")) from None


def _of_shard(shard: Path, plan: Plan, record: Record, texts: list[Text]) -> Iterator[Item]:
    """Yield the shard's pictures; append its captions to `texts` and its faults to `record`."""
    for sample in read_shard(shard, record.skipped):
        key = str(sample["__key__"])
        if plan.what != "image":
            try:
                texts += [Text(key, i, caption) for i, caption in enumerate(captions_of(sample))]
            except Fault as fault:
                record.skipped.append(Skipped(shard.name, key, fault.cause, fault.reason))
        if plan.what != "text":
            yield key, partial(image_of, sample)


def _of_rows(rows: Rows, plan: Plan, record: Record, texts: list[Text]) -> Iterator[Item]:
    """Do the same for table rows that contain pictures, with row numbers as keys."""
    for number, picture, captions in rows:
        key = str(number)
        if plan.what != "image":
            try:
                texts += [Text(key, i, caption) for i, caption in enumerate(captions_in(captions))]
            except Fault as fault:
                record.skipped.append(Skipped("", key, fault.cause, fault.reason))
        if plan.what != "text":
            yield key, partial(_picture, picture_in(picture))


def _picture(data: bytes | None, at_least: int) -> Image.Image:
    if data is None:
        raise Fault("no_image", "no picture in the row")
    return open_image(io.BytesIO(data), at_least)


def _images(
    clip: Pipeline | Tensors, items: Iterable[Item], shard: str, plan: Plan, record: Record
) -> Iterator[tuple[list[str], Tensor]]:
    """Yield batches of keys and features (n, embed_dim) of readable pictures; the others go to `record`."""
    at_least = DRAFT * clip.preprocessing.image_size

    def decode(item: Item) -> tuple[str, Tensor | Skipped]:
        key, opened = item
        try:
            return key, clip.preprocess(opened(at_least))
        except ValueError as error:
            return key, Skipped(shard, key, getattr(error, "cause", "corrupt_image"), str(error))

    for some in batches(ahead(decode, items, plan.workers), clip.batch_size(plan.batch_size)):
        record.skipped += [found for _, found in some if isinstance(found, Skipped)]
        good = [(key, found) for key, found in some if isinstance(found, Tensor)]
        if good:
            yield [key for key, _ in good], clip.encode_image(torch.stack([tensor for _, tensor in good])).cpu()
