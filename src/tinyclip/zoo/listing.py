"""The output of `tinyclip zoo`: the published models, their figures, and which are cached."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinyclip.model.axes import axis_table, count_parameters
from tinyclip.model.config import CLIPConfig
from tinyclip.zoo.catalogue import Entry, cache_folder, shipped


def describe_shipped(name: str) -> dict[str, str]:
    """Return the facts `tinyclip zoo` shows about a model that ships with the package."""
    return {"name": name, "state": "shipped", "path": str(shipped(name)), "card": str(shipped(name) / "README.md")}


def verify(entry: Entry, cache: str | Path | None = None) -> str:
    """Check a complete cached file against its record and return its SHA-256.

    Raises:
        ValueError: if it is not in the cache or has changed.
    """
    from tinyclip.common.download import check

    path = cache_folder(cache) / entry.file
    if not path.exists():
        raise ValueError(f"{path}: not downloaded yet")
    return str(check(path, full=True)["sha256"])


def unrecorded(entry: Entry, cache: str | Path | None = None) -> bool:
    """Whether the cached file has no known checksum, for example because it was put there by hand."""
    from tinyclip.common.download import read_record

    path = cache_folder(cache) / entry.file
    return path.exists() and read_record(path) is None


def recount(entry: Entry, cache: str | Path | None = None) -> dict[str, int] | None:
    """Return our own counts `params_image`, `params_text`, `macs_image`, `macs_text`: for manual models from the shape,
    for others from the cached file (then kept in its record); None if it is not cached."""
    if entry.shape:
        return _count(CLIPConfig.named(entry.shape))
    path = cache_folder(cache) / entry.file
    if not path.exists():
        return None
    from tinyclip.common.download import add_to_record, check
    from tinyclip.zoo.checkpoint import load_checkpoint

    record = check(path)
    counts = record.get("recount")
    if counts is None:
        counts = add_to_record(path, recount=_count(load_checkpoint(path)[0].config))["recount"]
    return dict(counts)


def _count(config: CLIPConfig) -> dict[str, int]:
    from tinyclip.model.costs import macs

    parts, operations = count_parameters(axis_table(config)), macs(config)
    counts = {f"params_{tower}": parts[tower] for tower in ("image", "text")}
    return counts | {f"macs_{tower}": operations[tower] for tower in ("image", "text")}


def describe(entry: Entry, cache: str | Path | None = None) -> dict[str, Any]:
    """Return all facts about a model, for tables and JSON. If its file is damaged, `recount` is the error message."""
    from tinyclip.common.download import partial_size, read_record

    path = cache_folder(cache) / entry.file
    state = "cached" if path.exists() else "partial" if partial_size(path) else "remote"
    try:
        counted: dict[str, int] | str | None = recount(entry, cache)
        record: Mapping[str, Any] = (read_record(path) if state == "cached" else None) or {}
    except ValueError as error:
        counted, record, state = str(error), {}, "damaged"
    published = {"imagenet_top1": entry.top1, "params_m": list(entry.params_m), "gmacs": entry.gmacs}
    return {
        "name": entry.name,
        "how": entry.how,
        "data": entry.data,
        "licence": entry.licence,
        "published": published | {"v100_pairs_per_s": entry.pairs_per_s},
        "recount": counted,
        "note": entry.note,
        "url": entry.url,
        "earlier_url": entry.earlier_url,
        "hub_id": entry.hub_id,
        "state": state,
        "path": str(path),
        "sha256": record.get("sha256"),
    }


COLUMNS = ("model", "how", "IN-1K %", "params M", "recounted", "GMACs", "recounted", "V100 pairs/s", "here")


def row(facts: Mapping[str, Any]) -> list[str]:
    """Format the result of `describe` as a row for `COLUMNS`."""
    published, counts = facts["published"], facts["recount"]
    recounted = ["from the file" if facts["how"] == "auto" else "-"] * 2
    if isinstance(counts, dict):
        recounted = [f"{counts['params_image'] / 1e6:.1f}+{counts['params_text'] / 1e6:.1f}"]
        recounted += [f"{counts['macs_image'] / 1e9:.2f}+{counts['macs_text'] / 1e9:.2f}"]
    image, text = published["params_m"]
    return [
        facts["name"],
        facts["how"],
        f"{published['imagenet_top1']}",
        f"{image}+{text}",
        recounted[0],
        f"{published['gmacs']}",
        recounted[1],
        f"{published['v100_pairs_per_s']:,}",
        "-" if facts["state"] == "remote" else facts["state"],
    ]


def details(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Format the result of `describe` as pairs of name and value."""
    lines: dict[str, Any] = {key: value for key, value in facts.items() if key not in ("published", "recount")}
    lines |= {f"published {key}": value for key, value in facts["published"].items()}
    counts = facts["recount"]
    if isinstance(counts, dict):
        lines |= {f"recounted {key}": f"{value:,}" for key, value in counts.items()}
    elif counts:
        lines["problem"] = counts
    return [(key, str(value)) for key, value in lines.items() if value]
