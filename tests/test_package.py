from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import tinyclip

SOURCE = Path(tinyclip.__file__).parent
MODULES = sorted(path.stem for path in SOURCE.glob("*.py") if path.stem != "__init__")


def imports(module: str) -> set[str]:
    """Our modules that this one imports, anywhere in its file."""
    found = set()
    for node in ast.walk(ast.parse((SOURCE / f"{module}.py").read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parent = node.module or ""
            assert node.level == 0, f"{module}.py line {node.lineno}: a relative import"
            names = {f"tinyclip.{alias.name}" for alias in node.names if alias.name != "__version__"}
            found |= names if parent == "tinyclip" else {parent}
    return {name.split(".")[1] for name in found if name.startswith("tinyclip.")}


def test_public_names() -> None:
    assert sorted(tinyclip.__all__) == [
        "CLIP",
        "CLIPConfig",
        "HardConcrete",
        "Pipeline",
        "RuntimePipeline",
        "affinity_loss",
        "clip",
        "compact",
        "contrastive_loss",
        "evaluate",
        "inherit",
        "load",
        "measure",
        "preprocess",
        "tokenize",
    ]


@pytest.mark.parametrize("name", sorted(tinyclip.__all__))
def test_a_public_name_is_there(name: str) -> None:
    assert getattr(tinyclip, name) is not None
    assert name in dir(tinyclip)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'teach'"):
        _ = tinyclip.teach


@pytest.mark.parametrize(
    "module",
    [
        *("tinyclip", "tinyclip.tokenizer", "tinyclip.transforms", "tinyclip.config", "tinyclip.axes", "tinyclip.zoo"),
        *("tinyclip.search", "tinyclip.sheet", "tinyclip.loading"),
    ],
)
def test_the_core_loads_no_torch(module: str) -> None:
    code = f"import sys, {module}; print(*{{name.split('.')[0] for name in sys.modules}})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "torch" not in result.stdout.split()


def test_nothing_imports_the_command_line() -> None:
    assert [module for module in MODULES if "cli" in imports(module)] == ["__main__"]


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        ("config", set()),
        ("distributed", set()),
        ("tokenizer", set()),
        ("progress", set()),
        ("watchdog", set()),
        ("ownership", {"files"}),
        ("folders", {"files", "ownership"}),
        ("files", {"progress"}),
        ("faults", {"files"}),
        ("metadata", set()),
        ("opening", {"faults", "metadata"}),
        ("numbers", {"opening"}),
        ("transforms", {"numbers", "opening"}),
        ("finding", {"faults", "files"}),
        ("inputs", {"transforms"}),
        ("engines", set()),
        ("runtime", {"config", "engines", "files", "inputs", "tokenizer", "transforms"}),
        ("unpickle", set()),
        ("archive", {"unpickle"}),
        ("wrappers", {"archive"}),
        ("foreign", {"archive", "config", "files", "tokenizer", "transforms", "wrappers"}),
        ("axes", {"config"}),
        ("sizes", {"axes", "config"}),
        ("masks", {"axes", "config", "sizes"}),
        ("loss", {"distributed"}),
        ("model", {"config", "masks", "progress", "resnet"}),
    ],
)
def test_the_lower_layers_import_only_what_is_below(module: str, allowed: set[str]) -> None:
    assert imports(module) <= allowed


@pytest.mark.parametrize("module", ["evaluate", "measurement"])
def test_measuring_knows_no_trainer_and_no_zoo(module: str) -> None:
    seen, todo = set[str](), [module]
    while todo:
        if (name := todo.pop()) not in seen:
            seen.add(name)
            todo += imports(name)
    assert not seen & {"train", "zoo"}
