"""Files of embedded features: parts, their records, and checks that a part is intact."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from tinyclip.common.files import checksum, flush, json_text, read_json_object, replacing, write_atomically
from tinyclip.inputs.batching import check_finite

FORMATS, DTYPES, WHATS = ("parquet", "npy"), ("float16", "float32"), ("both", "image", "text")
DONE, RECORDS, SKIPPED = "embed.json", ".parts", "skipped.jsonl"


@dataclass(frozen=True)
class Plan:
    """How features are made and written."""

    model: str  # as given by the user
    what: str = "both"  # for shards: image, text or both
    format: str = "parquet"  # or npy
    dtype: str = "float16"  # of the features on disk; or float32
    part_size: int = 10_000
    batch_size: int | None = None
    workers: int | None = None  # decoding threads

    def __post_init__(self) -> None:
        for name, known in (("format", FORMATS), ("dtype", DTYPES), ("what", WHATS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r}: choose {', '.join(known)}")


def files_of(facts: dict[str, Any]) -> Iterator[str]:
    """Yield the names of all files of a run."""
    yield from (DONE, SKIPPED)
    endings = (facts["format"], "jsonl") if facts["format"] == "npy" else (facts["format"],)
    kinds = ("image", "text") if facts["what"] == "both" else (facts["what"],)
    for number in range(facts["parts"]):
        yield f"{RECORDS}/{number:05d}.json"
        yield from (f"{kind}-{number:05d}.{ending}" for kind in kinds for ending in endings)


def record_path(out: Path, number: int) -> Path:
    return out / RECORDS / f"{number:05d}.json"


def is_done(out: Path, number: int) -> bool:
    """Whether a part's files exist, unchanged since they were written."""
    try:
        files = read_json_object(record_path(out, number))["files"]
        return all(state_of(out / name) == state for name, state in files.items())
    except (ValueError, KeyError, OSError):
        return False


def state_of(path: Path) -> list[int]:
    return [path.stat().st_size, checksum(path)]


def write_part(
    out: Path, name: str, columns: dict[str, list[Any]], features: Tensor, plan: Plan
) -> dict[str, list[int]]:
    """Write `name.parquet` with the columns and `features`, or `name.npy` with `name.jsonl`; return the files."""
    values = features.numpy().astype(plan.dtype)
    check_finite(values)
    if plan.format == "npy":
        rows = (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
        lines = "".join(json_text(row, ensure_ascii=False) + "\n" for row in rows)
        write_atomically(out / f"{name}.jsonl", lines)
    path = out / f"{name}.{plan.format}"
    written = [path, path.with_suffix(".jsonl")] if plan.format == "npy" else [path]
    with replacing(path) as temporary, temporary.open("wb") as file:
        if plan.format == "npy":
            np.save(file, values)
        else:
            _write_parquet(file, columns, values)
    flush(out)
    return {file.name: state_of(file) for file in written}


def _write_parquet(file: Any, columns: dict[str, list[Any]], values: np.ndarray) -> None:
    import pyarrow
    import pyarrow.parquet

    types = {"key": pyarrow.string(), "caption": pyarrow.string(), "number": pyarrow.int32()}
    arrays = {name: pyarrow.array(column, types[name]) for name, column in columns.items()}
    flat = pyarrow.array(values.reshape(-1))
    arrays["features"] = pyarrow.FixedSizeListArray.from_arrays(flat, values.shape[1])
    # Features do not compress.
    pyarrow.parquet.write_table(pyarrow.table(arrays), file, compression="none")
