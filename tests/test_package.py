from __future__ import annotations

import subprocess
import sys

import pytest

import tinyclip


def test_public_names() -> None:
    assert sorted(tinyclip.__all__) == [
        "CLIP",
        "CLIPConfig",
        "Calibration",
        "Constraint",
        "HardConcrete",
        "Pipeline",
        "RuntimePipeline",
        "affinity_loss",
        "calibrate",
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
        *(
            "tinyclip",
            "tinyclip.inputs.tokenizer",
            "tinyclip.inputs.transforms",
            "tinyclip.model.config",
            "tinyclip.model.axes",
            "tinyclip.zoo.resolve",
        ),
        *("tinyclip.search.index", "tinyclip.search.sheet", "tinyclip.loading"),
    ],
)
def test_the_core_loads_no_torch(module: str) -> None:
    code = f"import sys, {module}; print(*{{name.split('.')[0] for name in sys.modules}})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "torch" not in result.stdout.split()
