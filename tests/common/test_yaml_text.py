"""YAML with typing errors, and malicious YAML."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import yaml

from tests.helpers.commands import tinyclip
from tinyclip.common.yaml_text import DEEPEST, MOST_NODES, parse, read_yaml
from tinyclip.recipe.recipe import load_recipe
from tinyclip.zoo.card import read_card

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10)
)
MERGED_BOMB = "a0: &a0 {x: 1, y: 2}\n" + "".join(
    f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 10)
)
CHAIN = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 2000))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (BOMB, f"line 5: more than {MOST_NODES:,} keys and values with aliases expanded"),
        (MERGED_BOMB, f"more than {MOST_NODES:,} keys and values"),
        (f"[{'0,' * MOST_NODES}]", f"more than {MOST_NODES:,} keys and values"),
        (CHAIN, f"nested more than {DEEPEST} deep through aliases"),
        ("[" * 100_000, f"line 1: nested more than {DEEPEST} deep"),
        ("{a: " * 100_000, f"nested more than {DEEPEST} deep"),
        ("- " * 100_000, f"nested more than {DEEPEST} deep"),
        ("? " * 100_000, "deep"),
        ("&a [*a]", "line 1: an alias that contains itself"),
        ("a: 1\nb: &b\n  c: {d: *b}", "line 3: an alias that contains itself"),
        ("&a {<<: *a}", "an alias that contains itself"),
        ("a: *b", "line 1: found undefined alias 'b'"),
        ("a: 1\nb: 2\na: 3", "line 3: `a` is given twice"),
        ("a: {b: {c: 1, c: 1}}", "`c` is given twice"),
        ("on: 1\nyes: 1\n'on': 2", "line 3: `on` is given twice"),
        ("[a]: 1", "a key that is not a word"),
        ("{a: 1}: 1", "a key that is not a word"),
        ("a:\n\t- b", "line 2: .*; YAML is indented with spaces, not tabs"),
        ("a: \0", r"the character U\+0000 is not allowed in text"),
        ("a: \x1b[2J", r"the character U\+001B"),
        ("a: 2024-13-45", "a value that cannot be converted"),
        (f"a: {'9' * 5000}", "a value that cannot be converted"),
        ("a: !!int x", "a value that cannot be converted"),
        ("a: !!int ''", "a value that cannot be converted"),
        ("a: !!timestamp x", "a value that cannot be converted"),
        ("a: !!bool x", "a value that cannot be converted"),
        ("!!python/object/apply:os.system [true]", "could not determine a constructor"),
        ("a: 1\n---\na: 2", "single document"),
        ("a: [", "line 1"),
    ],
)
def test_what_is_no_yaml_is_said_at_once_in_a_line(text: str, named: str) -> None:
    begun = time.process_time()
    with pytest.raises(ValueError, match=named) as refused:
        parse(text)
    assert str(refused.value).startswith("not valid YAML (") and "\n" not in str(refused.value)
    assert len(str(refused.value)) < 300
    assert time.process_time() - begun < 20  # the anchors expand to 10^10 entries


def test_plain_yaml_means_what_it_always_did() -> None:
    text = """
    base: &base {steps: 4, lr: 1.0e-3, seeds: [1, 2]}
    again: {<<: *base, lr: 0.1}
    both: {<<: [*base, {extra: true}]}
    same: *base
    more: [null, ~, 0x10, 2024-01-31, "é 🙂", .inf]
    """
    assert parse(text) == yaml.safe_load(text)
    assert parse("1: a\non: b") == {"1": "a", "on": "b"}  # keys are strings
    assert parse("") is None and parse("a:") == {"a": None}
    assert parse("[" * DEEPEST + "]" * DEEPEST)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("a: 1".encode("utf-16"), "UTF-16; save it as UTF-8"),
        ("a: 1".encode("utf-16-be"), r"U\+0000"),
        (b"\x89PNG\r\n\x1a\n\xff\x00", "not UTF-8 text"),
        (b"a: caf\xe9", "not UTF-8 text"),
        (b"#" * (5 << 20), "more than 4 MiB"),
    ],
)
def test_files_that_are_no_text(tmp_path: Path, content: bytes, named: str) -> None:
    (tmp_path / "x.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=rf"x\.yaml: .*{named}"):
        read_yaml(tmp_path / "x.yaml")
    with pytest.raises(ValueError, match=rf"{tmp_path}: cannot be read \(Is a directory\)"):
        read_yaml(tmp_path)


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(b"\xef\xbb\xbfa: 1")
    assert read_yaml(tmp_path / "x.yaml") == {"a": 1}


@pytest.mark.parametrize("text", [BOMB, "[" * 100_000, "&a [*a]", "a: 1\na: 1", "\0"])
def test_all_that_reads_yaml_refuses_it(tmp_path: Path, text: str) -> None:
    """Recipes, command line settings, model cards (which anyone can edit) and runs."""
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"recipe\.yaml: not valid YAML"):
        load_recipe(path)
    (tmp_path / "README.md").write_text(f"---\nlicense: mit\nx:\n{text}\n---\n")
    assert read_card(tmp_path).licence == ""
    (tmp_path / "student").mkdir()
    error = tinyclip("report", tmp_path, "-o", tmp_path / "x.html", code=2)
    assert "recipe.yaml: missing or damaged" in error and len(error.splitlines()) == 1
    assert not (tmp_path / "x.html").exists()


@pytest.mark.parametrize(
    ("key", "named"),
    [
        ("stages.-1.steps", "there is no stages.-1.steps: the list has entries 0 to 0, not -1"),
        ("stages.9.steps", "there is no stages.9.steps: the list has entries 0 to 0, not 9"),
        ("stages.1.steps", "not 1"),
        ("stages.x.steps", "not x"),
        ("stages.1e3.steps", "not 1e3"),
        ("stages.0_0.steps", "not 0_0"),
        ("stages. 0.steps", "not  0"),
        ("stages.+0.steps", r"not \+0"),
        ("stages.٠.steps", "not ٠"),
        ("stages.²", "not ²"),
        (f"stages.{'9' * 5000}.steps", "not 999"),
        ("stages.-1", "not -1"),
        ("stages..steps", "write key.path=value"),
        (".stages", "write key.path=value"),
        ("stages.", "write key.path=value"),
        ("", "write key.path=value"),
        ("output.x", "there is no output.x"),
        ("stages.0.steps.x", "there is no stages.0.steps.x"),
        ("a." * 20_000 + "a", "unknown key"),
    ],
)
def test_keys_of_set_that_a_recipe_cannot_have(tmp_path: Path, key: str, named: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("teacher: t\ndata: d\noutput: o\nstages: [{name: a, steps: 9}]")
    with pytest.raises(ValueError, match=named):
        load_recipe(path, [f"{key}=4"])
    assert load_recipe(path, ["evaluation.data=x", "stages.0.steps=4"]).stages[0].steps == 4
