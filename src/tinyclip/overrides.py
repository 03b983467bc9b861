"""Settings given one by one on the command line, as `key.path=value`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from tinyclip.config import Strict, explain

M = TypeVar("M", bound=Strict)


def override(data: Any, text: str) -> None:
    """Set one value of a recipe's data, in place; the value as in YAML. `ValueError` for a key that it cannot have."""
    path, equals, value = text.partition("=")
    if not equals or not path:
        raise ValueError(f"--set {text}: write key.path=value, e.g. stages.0.steps=200")
    *parents, last = path.split(".")
    node = data
    try:
        for key in parents:
            node = node[int(key)] if isinstance(node, list) else node.setdefault(key, {})
        if isinstance(node, list):
            node[int(last)] = yaml.safe_load(value)
        elif isinstance(node, dict):
            node[last] = yaml.safe_load(value)
        else:
            raise KeyError(last)
    except (KeyError, IndexError, ValueError, AttributeError, TypeError):
        raise ValueError(f"--set {text}: the recipe has no {path}") from None
    except yaml.YAMLError:
        raise ValueError(f"--set {text}: the value is no valid YAML") from None


def model_from(model: type[M], option: str, overrides: Sequence[str], example: str) -> M:
    """A model from `key=value` each; `ValueError`, naming the option, for an unknown key or a bad value."""
    data: dict[str, Any] = {}
    for text in overrides:
        if "=" not in text:
            raise ValueError(f"{option} {text}: write e.g. {example}")
        override(data, text)
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise ValueError(f"{option}: {explain(error)}") from None
