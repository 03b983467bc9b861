"""Settings given individually on the command line, as `key.path=value`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import ValidationError

from tinyclip.common.schema import Strict, explain
from tinyclip.common.yaml_text import parse

M = TypeVar("M", bound=Strict)


def override(data: Any, text: str, option: str = "--set", form: str = "key.path=value, e.g. stages.0.steps=200") -> Any:
    """Set one value of a recipe's data, in place, and return it, parsed as YAML. `ValueError`, naming the option, for
    an invalid key."""
    path, equals, value = text.partition("=")
    *parents, last = path.split(".")
    if not equals or not all([*parents, last]):
        raise ValueError(f"{option} {text}: write {form}")
    try:
        found = parse(value)
    except ValueError as error:
        raise ValueError(f"{option} {text}: the value is {error}") from None
    try:
        node = data
        for key in parents:
            node = _child(node, key)
        if isinstance(node, list):
            node[_entry(node, last)] = found
        elif isinstance(node, dict):
            node[last] = found
        else:
            raise KeyError(last)
    except KeyError:
        raise ValueError(f"{option} {text}: there is no {path}") from None
    except IndexError as error:
        raise ValueError(f"{option} {text}: there is no {path}: {error}") from None
    return found


def _child(node: Any, key: str) -> Any:
    """Return the value of a key, created as a mapping if missing."""
    if isinstance(node, list):
        return node[_entry(node, key)]
    if not isinstance(node, dict):
        raise KeyError(key)
    if node.get(key) is None:
        node[key] = {}
    return node[key]


def _entry(entries: list[Any], key: str) -> int:
    """Return the list index that a key names: plain digits only, as Python's `int` takes much else (-1, 1_0, ٣)."""
    if re.fullmatch(r"[0-9]{1,6}", key) and int(key) < len(entries):
        return int(key)
    known = f"entries 0 to {len(entries) - 1}" if entries else "no entries"
    raise IndexError(f"the list has {known}, not {key}")


def model_from(model: type[M], option: str, overrides: Sequence[str], example: str) -> M:
    """Build a model from `key=value` items; `ValueError`, naming the option, for an unknown key or a bad value."""
    data: dict[str, Any] = {}
    for text in overrides:
        if override(data, text, option, f"e.g. {example}") is None:
            raise ValueError(f"{option} {text}: no value is given; write e.g. {example}")
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise ValueError(f"{option}: {explain(error)}") from None
