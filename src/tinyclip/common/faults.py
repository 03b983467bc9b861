"""What can be wrong with data: a fixed list of causes, and the samples skipped because of them. No torch here."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tinyclip.common.files import append_text, json_text

CAUSES = {
    "truncated_shard": "a tar that ends early; the samples before the end are used",
    "damaged_shard": "not a readable tar; left out",
    "empty_shard": "a shard without samples; left out",
    "vanished_shard": "deleted, or unreadable, while in use",
    "duplicate_key": "a key used twice in its shard; the first sample is used",
    "no_image": "no picture",
    "shared_key": "several pictures under one key, since a key ends at the first dot of a name",
    "bad_row": "a row of a table that cannot be read, or has no picture",
    "corrupt_image": "a picture that cannot be decoded completely",
    "huge_image": "a picture, or a sample, too large to open safely",
    "unreadable_folder": "a folder that cannot be opened",
    "file_manager": "pictures that a file manager or the system keeps for its own use; left out",
    "needs_extra": "a picture in a format that needs an extra, which is not installed",
    "no_caption": "no caption, or a blank one",
    "bad_encoding": "text that is not UTF-8",
    "bad_json": "JSON that does not parse, or is not of the expected type",
    "not_in_cache": "not in the teacher's cache, or cached with other captions",
    "unknown_class": "a class that classnames.txt does not name",
}
EXAMPLES = 3  # per cause, in listings
LONGEST_EXAMPLE = 100  # characters
SHORTEST_PLACE = 20


class Unusable(ValueError):
    """None of the data turned out to be usable when read; exit code 1; an invalid request exits with 2."""


class Fault(ValueError):
    """Why something cannot be used: one of `CAUSES`, and the details in words."""

    def __init__(self, cause: str, reason: str) -> None:
        assert cause in CAUSES, cause
        super().__init__(cause, reason)
        self.cause, self.reason = cause, reason

    def __str__(self) -> str:
        return self.reason


@dataclass(frozen=True)
class Skipped:
    """A skipped sample; with an empty key, a skipped shard or part of one."""

    shard: str
    key: str
    cause: str
    reason: str

    def __str__(self) -> str:
        place = f"{self.shard}, {self.key}" if self.shard and self.key else self.shard or self.key
        return f"{place}: {self.reason}"


def counts(skipped: Iterable[Skipped]) -> dict[str, int]:
    """Count each cause, in the order of `CAUSES`."""
    found = Counter(s.cause for s in skipped)
    return {cause: found[cause] for cause in CAUSES if found[cause]}


def summary(by_cause: dict[str, int]) -> str:
    """`2 corrupt_image, 1 no_caption`."""
    return ", ".join(f"{n:,} {cause}" for cause, n in by_cause.items())


def why(skipped: Sequence[Skipped]) -> str:
    """Return the end of a message: counts of skipped samples by cause and the first one; empty if none were skipped."""
    return f" ({summary(counts(skipped))}; the first: {skipped[0]})" if skipped else ""


COLUMNS = ("cause", "left out", "examples")


def rows(skipped: Sequence[Skipped]) -> list[list[str]]:
    """Return a row of `COLUMNS` for each cause. A sample skipped in several epochs counts once."""
    distinct = list(dict.fromkeys(skipped))
    result = []
    for cause, n in counts(distinct).items():
        examples = [_short(s) for s in distinct if s.cause == cause][:EXAMPLES]
        result.append([cause, f"{n:,}", "; ".join(examples) + ("; ..." if n > EXAMPLES else "")])
    return result


def _short(skipped: Skipped) -> str:
    """Shorten for one table line: keep only the end of a long path, to leave room for the reason and its remedy."""
    text = str(skipped)
    place, over = text.removesuffix(skipped.reason), len(text) - LONGEST_EXAMPLE
    kept = max(SHORTEST_PLACE, len(place) - over - 3)
    if over > 0 and kept + 3 < len(place):
        text = f"...{place[-kept:]}{skipped.reason}"
    return text if len(text) <= LONGEST_EXAMPLE else text[: LONGEST_EXAMPLE - 3] + "..."


def append(path: Path, skipped: Iterable[Skipped], **where: Any) -> None:
    """Append one line per sample to a `skipped.jsonl`; `where` (stage, step) goes into every line."""
    lines = [json_text(asdict(s) | where) + "\n" for s in skipped]
    if lines:
        append_text(path, "".join(lines))


def read(path: Path) -> list[Skipped]:
    """Read the entries of a `skipped.jsonl`; none if it is missing. A line truncated by a kill is ignored."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            entry = json.loads(line)
            found.append(Skipped(entry["shard"], entry["key"], entry["cause"], entry["reason"]))
        except (ValueError, KeyError, TypeError):
            continue
    return found
