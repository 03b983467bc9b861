"""Reading of untrusted YAML: bounded in size, or refused in one line. All YAML is read here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

MOST_BYTES = 4 << 20
MOST_NODES = 50_000  # keys and values, with each alias counted as its expansion
DEEPEST = 50


class _Loader(yaml.SafeLoader):
    """Safe YAML loader that bounds size and depth with aliases expanded, and requires unique scalar keys.

    Keys are kept as written, so that `on`, which YAML reads as true, is an ordinary key.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.measured: dict[yaml.Node, tuple[int, int]] = {}  # nodes and levels of each finished node
        self.depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        mark, alias = self.peek_event().start_mark, self.check_event(yaml.AliasEvent)
        self.depth += 1
        if self.depth > DEEPEST:
            raise yaml.MarkedYAMLError(problem=f"nested more than {DEEPEST} deep", problem_mark=mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        if node is None:
            return None
        if alias and node not in self.measured:
            raise yaml.MarkedYAMLError(problem="an alias that contains itself", problem_mark=mark)
        if not alias:
            inner = [self.measured[n] for n in _children(node)]
            self.measured[node] = (1 + sum(n for n, _ in inner), 1 + max((level for _, level in inner), default=0))
        nodes, levels = self.measured[node]
        if nodes > MOST_NODES:
            raise yaml.MarkedYAMLError(
                problem=f"more than {MOST_NODES:,} keys and values with aliases expanded",
                problem_mark=mark,
            )
        if self.depth + levels > DEEPEST + 1:
            raise yaml.MarkedYAMLError(problem=f"nested more than {DEEPEST} deep through aliases", problem_mark=mark)
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key that is not a word", problem_mark=key.start_mark)
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"`{key.value}` is given twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return node


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _mapping(loader: _Loader, node: yaml.MappingNode) -> Any:
    """Construct a mapping in two steps, like PyYAML, so that an alias and its anchor are one object."""
    data: dict[str, Any] = {}
    yield data
    loader.flatten_mapping(node)
    data.update({key.value: loader.construct_object(value, deep=True) for key, value in node.value})


def _whole_number(loader: _Loader, node: yaml.ScalarNode) -> int:
    number = loader.construct_yaml_int(node)
    if abs(number) >= 2**63:
        raise yaml.MarkedYAMLError(problem="a number with too many digits", problem_mark=node.start_mark)
    return int(number)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
_Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)


def parse(text: str) -> Any:
    """Parse a YAML document.

    Raises:
        ValueError: naming what is wrong and the line.
    """
    try:
        return _Loader(text).get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        hint = "; YAML is indented with spaces, not tabs" if "'\\t'" in str(error.problem) else ""
        where = f"line {mark.line + 1}: " if mark else ""
        said = ", ".join(" ".join(part.split()) for part in (error.context, error.problem) if part)
        raise ValueError(f"not valid YAML ({where}{said}{hint})") from None
    except yaml.reader.ReaderError as error:
        code = error.character if isinstance(error.character, int) else ord(error.character)
        raise ValueError(f"not valid YAML (the character U+{code:04X} is not allowed in text)") from None
    except (ValueError, ArithmeticError, TypeError, KeyError, IndexError, AttributeError) as error:
        # From PyYAML's conversions of dates, numbers and values with a mismatched tag.
        raise ValueError(f"not valid YAML (a value that cannot be converted: {error})") from None


def read_yaml(path: Path) -> Any:
    """Read a YAML file in UTF-8.

    Raises:
        FileNotFoundError: when the file is missing.
        ValueError: naming the file, when it cannot be read or is not valid YAML in UTF-8.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from None
    if len(content) > MOST_BYTES:
        raise ValueError(f"{path}: cannot be read (more than {MOST_BYTES >> 20} MiB, too large for a recipe)")
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(f"{path}: cannot be read (text in UTF-16; save it as UTF-8)")
    try:
        return parse(content.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise ValueError(f"{path}: cannot be read (not UTF-8 text)") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
