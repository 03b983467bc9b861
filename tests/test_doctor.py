"""`tinyclip doctor`, and shell completion."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.models import ROOT
from tinyclip import doctor
from tinyclip.cli.main import main


@pytest.fixture
def requirements(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The declared requirements of the installed tinyclip; a test may add to them."""
    said = ["numpy>=2.0", "torch>=2.6", 'trackio>=0.20; extra == "tracking"', 'pytest>=8; extra == "dev"']
    monkeypatch.setattr(metadata, "requires", lambda name: said)
    return said


def test_all_is_well_here(requirements: list[str], tmp_path: Path) -> None:
    facts = doctor.examine(tmp_path / "cache")
    assert facts["problems"] == []
    assert facts["cache"] == {"folder": str(tmp_path / "cache"), "free_gb": facts["cache"]["free_gb"]} | {
        "writable": True,
        "low": facts["cache"]["free_gb"] < 2,
    }
    assert facts["device"]["best"] == ("cuda:0" if torch.cuda.is_available() else "cpu")
    assert facts["threads"]["torch"] == torch.get_num_threads()
    assert [package["name"] for package in facts["packages"]] == ["numpy", "torch", "trackio"]
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("requirement", "problem"),
    [
        ("nosuch>=1.0", "nosuch is missing, tinyclip needs nosuch>=1.0: pip install 'nosuch>=1.0'"),
        (
            "numpy>=999",
            f"numpy {metadata.version('numpy')} is installed, tinyclip needs numpy>=999: pip install 'numpy>=999'",
        ),
        ("numpy<2,>=1", "tinyclip needs numpy<2,>=1"),
    ],
)
def test_what_is_missing_or_too_old_is_said(requirement: str, problem: str, requirements: list[str]) -> None:
    requirements[0] = requirement
    (said,) = doctor.examine()["problems"]
    assert problem in said


def test_what_is_optional_is_no_problem(requirements: list[str]) -> None:
    requirements.append('nosuch[all]>=1.0; extra == "tracking"')
    facts = doctor.examine()
    assert facts["problems"] == []
    (line,) = [row for row in doctor.rows(facts) if row[0] == "nosuch"]
    assert line == [
        "nosuch",
        "missing",
        "for following runs in TensorBoard, trackio or wandb: pip install 'tinyclip[tracking]'",
    ]


def test_every_extra_says_what_it_is_for() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert doctor.EXTRAS.keys() == extras.keys() - {"dev", "app-test", "docs"}


def test_a_broken_torch_is_no_traceback(requirements: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "tinyclip.common.distributed", raising=False)
    facts = doctor.examine()
    assert ["torch cannot be imported" in problem for problem in facts["problems"]] == [True]
    assert doctor.rows(facts)[2][0] == "cache"


def test_a_package_without_its_model_is_broken(requirements: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "SHIPPED", ("no-such-student",))
    (problem,) = doctor.examine()["problems"]
    assert problem.startswith("the shipped model does not work here (no-such-student: no such checkpoint")


def test_a_cache_that_cannot_be_written(requirements: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (problem,) = doctor.examine(tmp_path / "file" / "cache")["problems"]
    assert "set TINYCLIP_CACHE to a writable folder" in problem


@pytest.mark.parametrize(
    ("cores", "limit", "used", "advice"),
    [
        (8, "max 100000", 8, None),
        (8, "200000 100000", 8, "more threads than cores slow torch down: set OMP_NUM_THREADS=2"),
        (8, "50000 100000", 2, "more threads than cores slow torch down: set OMP_NUM_THREADS=1"),
        (2, None, 2, None),
        (2, None, 4, "more threads than cores slow torch down: set OMP_NUM_THREADS=2"),
    ],
)
def test_threads_beyond_the_share_of_a_container(
    cores: int, limit: str | None, used: int, advice: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(path: Path, *arguments: Any) -> str:
        if limit is None:
            raise FileNotFoundError
        return limit

    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    monkeypatch.setattr(Path, "read_text", read)
    assert doctor._threads(used)["advice"] == advice


@pytest.mark.parametrize(
    ("device", "precision", "reason"),
    [
        ("cuda", "bfloat16", "the GPU supports it"),
        ("cuda", "float16", "the GPU is older than bfloat16"),
        ("cpu", "float32", "the processor has no native bfloat16"),
        ("mps", "float32", "the only one used on mps"),
    ],
)
def test_why_a_precision_is_chosen(device: str, precision: str, reason: str) -> None:
    assert doctor._why(device, precision) == reason


def test_the_command_prints_a_table_or_json_and_its_exit_code_tells(
    requirements: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["tinyclip", "doctor", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        return int(stopped.value.code or 0)

    assert run("--json") == 0
    assert json.loads(capsys.readouterr().out)["problems"] == []
    assert run() == 0
    assert "precision" in capsys.readouterr().out
    requirements[0] = "nosuch>=1.0"
    assert run("--json") == 2
    output = capsys.readouterr()
    assert len(json.loads(output.out)["problems"]) == 1
    assert output.err == "tinyclip: nosuch is missing, tinyclip needs nosuch>=1.0: pip install 'nosuch>=1.0'\n"


def completed(*words: str) -> list[str]:
    """Return what bash would suggest for the last word; assert that torch was not loaded for it."""
    code = "import sys; from tinyclip.cli.main import app; import atexit; "
    code += "atexit.register(lambda: 'torch' in sys.modules and print('torch was loaded')); app(prog_name='tinyclip')"
    line = " ".join(("tinyclip", *words))
    settings = {"_TINYCLIP_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | settings)
    return done.stdout.split()


def test_the_shell_completes_commands_and_models() -> None:
    assert completed("pu") == ["push"]
    assert completed("classify", "emo") == ["emoji-student"]
    assert "TinyCLIP-ViT-61M-32-Text-29M" in completed("measure", "TinyCLIP-ViT-61")  # a shape
    assert completed("zoo", "TinyCLIP-ViT-8M") == ["TinyCLIP-ViT-8M-16-Text-3M-YFCC15M"]
    assert completed("classify", "some/file") == []  # left to the shell


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_script_for_each_shell(shell: str) -> None:
    settings = {"_TINYCLIP_COMPLETE": f"source_{shell}"}
    code = "from tinyclip.cli.main import app; app(prog_name='tinyclip')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | settings)
    assert "tinyclip" in done.stdout and "_TINYCLIP_COMPLETE" in done.stdout
