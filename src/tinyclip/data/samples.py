"""Read the picture, captions and class of a raw sample. No torch here."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Collection, Sequence
from typing import Any

from PIL import Image

from tinyclip.common.faults import Fault
from tinyclip.common.files import lines_of
from tinyclip.data.picture_files import ENDINGS
from tinyclip.inputs.batching import is_unicode
from tinyclip.inputs.transforms import open_image

USUAL = ("jpg", "jpeg", "png", "webp")
IMAGE_TYPES = (*USUAL, *sorted({ending[1:] for ending in ENDINGS}.difference(USUAL)))
TEXT_TYPES = ("txt", "json")
RENAME = "a key ends at the first dot of a name, so rename the files with dashes (photo-1.jpg for photo.1.jpg)"


def captions_of(sample: dict[str, Any]) -> list[str]:
    """Return the captions of a raw sample (file endings -> bytes): from its JSON, else the lines of its text. Empty
    when there is none.

    Raises:
        Fault: when there is none because the text is not UTF-8, or the JSON does not parse or has a wrong type.
    """
    problem: Fault | None = None
    for read in (_json_captions, _text_captions):
        try:
            if captions := read(sample):
                return captions
        except Fault as fault:
            problem = problem or fault
    if problem:
        raise problem
    return []


def _json_captions(sample: dict[str, Any]) -> list[str]:
    data = info_of(sample)
    found = data.get("captions") or data.get("caption")
    name = "json" if data else part_of(sample, ("json",))
    if name in sample and not data and (other := json.loads(sample[name])) != {}:
        raise Fault("bad_json", f"JSON is {type(other).__name__}, not an object")
    if found and not isinstance(found, str | list):
        raise Fault("bad_json", f"caption is {type(found).__name__}, not text")
    return _usable([found] if isinstance(found, str) else found or [])


def _text_captions(sample: dict[str, Any]) -> list[str]:
    name = part_of(sample, ("txt",))
    try:
        return _usable(lines_of(sample[name].decode("utf-8-sig"))) if name else []
    except UnicodeDecodeError as error:
        raise Fault("bad_encoding", f"caption cannot be read ({error})") from None


def _usable(found: list[Any]) -> list[str]:
    captions = [c.strip() for c in found if isinstance(c, str) and c.strip()]
    if not all(map(is_unicode, captions)):
        raise Fault("bad_encoding", "caption has an unpaired surrogate")
    return captions


def part_of(sample: Collection[str], types: Sequence[str]) -> str | None:
    """Return the ending of a sample's part that has one of these types: the plain ending, else the only compound one,
    as in `key.input.jpg` and `key.outputs.txt`. If a sample has a plain text or JSON, compound endings are ignored for
    both, so that other data is not mistaken for captions."""
    plain = next((ending for ending in types if ending in sample), None)
    if plain or (types[0] in TEXT_TYPES and any(ending in sample for ending in TEXT_TYPES)):
        return plain
    found = long_endings(sample, types)
    return found[0] if len(found) == 1 else None


def long_endings(sample: Collection[str], types: Sequence[str]) -> list[str]:
    """Return the compound endings, such as `input.jpg`, that end in one of these types."""
    return [ending for ending in sample if "." in ending and ending.rpartition(".")[2] in types]


def image_of(sample: dict[str, Any], at_least: int | None = None) -> Image.Image:
    """Decode the picture of a raw sample; `Fault` when it is missing or damaged.

    Args:
        at_least: see `open_image`.
    """
    if ending := part_of(sample, IMAGE_TYPES):
        return open_image(io.BytesIO(sample[ending]), at_least)
    raise no_image(sample.get("__key__", ""), sample)


def no_image(key: str, sample: Collection[str]) -> Fault:
    """Return the fault of a sample without a usable picture."""
    if several := long_endings(sample, IMAGE_TYPES):
        return Fault("shared_key", f"{len(several)} pictures share the key {key} ({_in_short(several)}); {RENAME}")
    return Fault("no_image", f"no picture (looked for {', '.join(USUAL)} and others)")


def class_of(sample: dict[str, Any]) -> str | None:
    """Return the class given in a raw sample's JSON, if that can be read."""
    with contextlib.suppress(Fault):
        return str(info_of(sample).get("class") or "") or None
    return None


def _in_short(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def info_of(sample: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON part of a raw sample, or {}; `Fault` when it does not parse."""
    try:
        name = part_of(sample, ("json",))
        data = json.loads(sample[name]) if name else {}
    except UnicodeDecodeError as error:
        raise Fault("bad_encoding", f"caption cannot be read ({error})") from None
    except (ValueError, RecursionError) as error:
        raise Fault("bad_json", f"caption cannot be read ({error})") from None
    return data if isinstance(data, dict) else {}
