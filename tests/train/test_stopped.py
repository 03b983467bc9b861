"""Command line runs that are asked to stop: alone, and under torchrun with the scripts in the docs."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.helpers.models import ROOT
from tests.helpers.processes import (
    PATIENCE,
    assert_same,
    begin,
    command,
    end,
    last_step,
    output,
    start,
    start_command,
    until,
)
from tests.helpers.runs import recipe, stage
from tinyclip.cli import compress
from tinyclip.recipe.recipe import Recipe


def written(chosen: Recipe, path: Path) -> str:
    path.write_text(yaml.safe_dump(chosen.model_dump(mode="json")))
    return str(path)


def test_a_sigterm_to_the_whole_group_saves_and_exits_143(place: Path, tmp_path: Path) -> None:
    """The decoding processes get it too, and a second one has no effect."""
    changes = {"stages": [stage(steps=40)], "workers": 2, "save_every": 1000}
    whole, parts = (recipe(place, tmp_path / name, **changes) for name in ("whole", "parts"))
    begun = start_command(tmp_path, "distill", written(parts, tmp_path / "recipe.yaml"))
    until(lambda: last_step(Path(parts.output)) >= 3, begun)
    for _ in range(2):
        os.killpg(begun[0].pid, signal.SIGTERM)
        time.sleep(0.02)
    assert end(begun) == [128 + signal.SIGTERM]
    said = (tmp_path / "0.err").read_text()
    found = re.fullmatch(r"tinyclip: stopped at step \d+ and saved in .*parts; resume with: tinyclip (.*)\n", said)
    assert found, said
    assert not any(alive(begun[0].pid))
    assert end(start_command(tmp_path, *found[1].split())) == [0]
    assert end(begin(whole)) == [0]
    assert_same(Path(whole.output), Path(parts.output))


def alive(group: int) -> list[int]:
    """Return the processes of a group that are still running."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(entry.name))
    return found


def test_the_torchrun_script_stops_and_goes_on(place: Path, tmp_path: Path) -> None:
    changes = {"stages": [stage(steps=30)], "workers": 0, "save_every": 1000}
    whole, parts = (recipe(place, tmp_path / name, **changes) for name in ("whole", "parts"))
    path = written(parts, tmp_path / "recipe.yaml")
    script = ["sh", str(ROOT / "docs" / "torchrun.sh"), "distill", path]
    environment = os.environ | {"PROCESSES": "2", "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    settings: dict[str, Any] = {
        "env": environment,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "text": True,
    }
    process = subprocess.Popen(script, **settings)
    deadline = time.monotonic() + PATIENCE
    while last_step(Path(parts.output)) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.terminate()
    said = output(process)[0]
    (line,) = [line for line in said.splitlines() if line.startswith("tinyclip: ")]
    assert re.search(r"stopped at step \d+ and saved in .*; resume with: torchrun --standalone .*--resume$", line), said
    done = subprocess.run(line.partition("resume with: ")[2].split(), **settings, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("resumed after") == 1 and done.stdout.count("report:") == 1
    assert end(begin(whole, 2)) == [0, 0]
    assert_same(Path(whole.output), Path(parts.output))


def refused(words: list[str], folder: Path, port: int) -> None:
    os.environ |= {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    command(words, folder)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["absent.yaml"], "no such recipe"),
        (["RECIPE", "--set", "stages.0.batch_size=9"], "stages.0.batch_size: 9 is not a multiple of the 2 processes"),
        (["RECIPE", "--set", "data=nowhere"], "nowhere: no such data folder"),
        (["RECIPE", "--smoke"], "--smoke runs in one process"),
    ],
)
def test_what_all_processes_refuse_is_said_once(place: Path, tmp_path: Path, words: list[str], expected: str) -> None:
    path = written(recipe(place, tmp_path / "run", stages=[stage()]), tmp_path / "recipe.yaml")
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # torchrun's store
    arguments = ["distill", *(path if word == "RECIPE" else word for word in words)]
    assert end(start(refused, 2, arguments, tmp_path, store.port)) == [2, 2]
    told = "".join(file.read_text() for file in sorted(tmp_path.glob("[01].*")))
    assert told.startswith("tinyclip: ") and told.count("\n") == 1 and expected in told
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("launcher", ["torchrun", "python -m torch.distributed.run", "gone"])
def test_the_command_that_goes_on_is_torchruns_or_said_in_words(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, launcher: str
) -> None:
    """A file stands in for `/proc/PID/cmdline`, since no launcher started this process."""
    words = ["--nproc-per-node", "2", "-m", "tinyclip", "distill", "a b.yaml", "--overwrite"]
    file = tmp_path / "cmdline"
    if launcher != "gone":
        file.write_text("".join(f"{word}\0" for word in ["/usr/bin/python", *launcher.split(), *words]))
    monkeypatch.setattr(compress, "Path", lambda path: file if path.startswith("/proc") else Path(path))
    monkeypatch.setattr(sys, "argv", ["tinyclip", "distill", "a b.yaml", "--overwrite"])
    assert compress._hint() == "tinyclip distill 'a b.yaml' --resume"
    monkeypatch.setenv("WORLD_SIZE", "2")
    known = "torchrun --nproc-per-node 2 -m tinyclip distill 'a b.yaml' --resume"
    assert compress._hint() == (known if launcher == "torchrun" else "the same command with --resume")


# --- scripts in the docs ----------------------------------------------------------------------------------------


def test_the_slurm_script_resumes_and_requeues(tmp_path: Path) -> None:
    """With stand-ins for SLURM's commands that record their calls."""
    calls = tmp_path / "calls"
    stand_ins = {
        "scontrol": f'echo scontrol "$@" >> {calls}; echo node1',
        "srun": f'trap "exit 1" TERM\necho srun "$@" >> {calls}\nwhile :; do sleep 0.05; done',
    }
    for name, body in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "node[1-4]", "SLURM_NNODES": "4"}
    environment |= {"SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_ID": "17"}
    for restarts, resumed in (({}, False), ({"SLURM_RESTART_COUNT": "0"}, False), ({"SLURM_RESTART_COUNT": "2"}, True)):
        script = ["bash", str(ROOT / "docs" / "slurm.sh"), str(tmp_path / "recipe.yaml")]
        process = subprocess.Popen(script, env=environment | restarts)
        deadline = time.monotonic() + PATIENCE
        while not (calls.exists() and "srun" in calls.read_text()) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.terminate()
        assert process.wait(PATIENCE) != 0
        called = calls.read_text().splitlines()
        calls.unlink()
        assert called[-1] == "scontrol requeue 17"
        (line,) = [line for line in called if line.startswith("srun")]
        assert "--nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint node1:29500" in line
        assert line.endswith("--resume") == resumed


def test_the_page_shows_what_the_script_computes() -> None:
    script = [sys.executable, str(ROOT / "scripts" / "scaling.py"), "recipes/vit-b-32-manual.yaml", "--stage", "1"]
    done = subprocess.run(script, capture_output=True, text=True, check=True, cwd=ROOT)
    page = (ROOT / "docs" / "distributed.md").read_text()
    assert all(line.strip() in page for line in done.stdout.splitlines())
    one, strong, *_ = [line.split() for line in done.stdout.splitlines() if line.split()[:1] in (["1"], ["1024"])]
    assert float(one[-1]) == 100 and float(strong[-1]) < 50


def test_bytes_are_those_of_the_collective_operations() -> None:
    """Against the actual tensor sizes, for two GPUs and a small model."""
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        scaling = __import__("scaling")
    finally:
        sys.path.pop(0)
    features = torch.zeros(64, 24)
    parts = scaling.step(scaling.Work(1000, 500, (24, 24)), scaling.Machine(1, 1, 1, 1, 1), 2, 64)
    assert parts["features_mb"] * 1e6 == 6 * features.nbytes / 2  # half of each tensor comes from the other GPU
    assert parts["gradients_mb"] * 1e6 == torch.zeros(500).nbytes  # half goes out to be summed, then half of the sums
