from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml

from tests.helpers.commands import tinyclip
from tests.helpers.models import small_config
from tests.helpers.processes import output
from tests.helpers.shards import good, picture, write_shard
from tinyclip.cli.main import app, main
from tinyclip.cli.terminal import plural
from tinyclip.inference.pipeline import Pipeline, load
from tinyclip.inputs.tokenizer import clip_tokenizer
from tinyclip.inputs.transforms import Preprocess
from tinyclip.model.model import CLIP


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `teacher`, `mixed` (the same plus one file), `data`, `eval` (class folders) and `photo.jpg`."""
    folder = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    tokenizer = tokenizer.pruned(tokenizer.kept_ids(["a photo of a caption words"]))
    config = small_config(vocab_size=tokenizer.vocab_size, image_size=16)
    Pipeline(CLIP(config), tokenizer, Preprocess(image_size=16)).save(folder / "teacher")
    (folder / "data").mkdir()
    write_shard(folder / "data" / "0.tar", [good(i) for i in range(20)])
    for name in ("cat", "dog"):
        (folder / "eval" / name).mkdir(parents=True)
        (folder / "eval" / name / "1.jpg").write_bytes(picture(len(name)))
    (folder / "photo.jpg").write_bytes(picture(5))
    (folder / "empty.txt").write_text("\n")
    (folder / "table.csv").write_text("picture,title\nphoto.jpg,a photo\n")
    shutil.copytree(folder / "teacher", folder / "mixed")
    (folder / "mixed" / "notes.txt").write_text("of hers")
    recipe = {
        "teacher": str(folder / "teacher"),
        "data": str(folder / "data"),
        "output": str(folder / "run"),
        "evaluation": {"data": str(folder / "eval"), "every": 2},
        "stages": [{"name": "50", "steps": 4, "batch_size": 8, "student": {"text": {"layers": 1}}}],
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def test_distill_then_use_the_student(place: Path) -> None:
    recipe = place / "recipe.yaml"
    output = tinyclip("distill", recipe, "--set", "log_every=1")
    assert "stage 50: 4 steps" in output and "step 4: loss" in output and "acc1" in output
    assert "teacher" in output and "report.html" in output
    page = (place / "run" / "report.html").read_text()
    assert "<svg" in page and "data:image/png;base64," in page and "<td>teacher</td>" in page
    assert "--resume or replace" in tinyclip("distill", recipe, "--set", "log_every=1", code=2)
    student = place / "run" / "student"
    result = json.loads(tinyclip("classify", student, place / "photo.jpg", "a photo", "words", "--json"))
    chances = [entry["probability"] for entry in result["labels"]]
    assert sum(chances) == pytest.approx(1) and chances == sorted(chances, reverse=True)
    expected = load(student, dtype="auto").classify(place / "photo.jpg", ["a photo", "words"])[0].max().item()
    assert chances[0] == pytest.approx(expected, abs=1e-5)
    figures = json.loads(tinyclip("evaluate", student, place / "eval", "--json", "-o", place / "eval.json"))
    assert figures["n"] == 2 and json.loads((place / "eval.json").read_text()) == figures
    figures = json.loads(tinyclip("measure", student, "--json"))
    names = ("params_image", "params_text", "params_embedding", "macs_image", "macs_text", "pairs_per_s")
    assert all(figures[name] > 0 for name in names)
    assert "[/x] dog" in tinyclip("classify", student, place / "photo.jpg", "[/x] dog", "words")
    assert "50" in tinyclip("report", place / "run", "-o", place / "all.html")


def test_inherit_says_what_it_kept(place: Path, tmp_path: Path) -> None:
    shape = ("--shape", "vision.width=16", "--shape", "vision.layers=1")
    output = tinyclip("inherit", place / "teacher", tmp_path / "small", *shape)
    rows = {" ".join(line.split()) for line in output.splitlines()}
    assert {"visual hidden 32 16 the first 16", "visual heads of block 0 4 2 the first 2"} <= rows
    assert "visual mlp of blocks 1, 2 128 0 removed" in rows
    assert load(tmp_path / "small").model.config.vision.width == 16


def test_pack_and_prune(place: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(picture(1))
    (tmp_path / "in" / "a.txt").write_text("a caption")
    (tmp_path / "in" / "b.jpg").write_bytes(b"junk")
    output = tinyclip("data", "pack", tmp_path / "in", tmp_path / "out")
    assert "packed 1 picture with 1 caption into 1 shard " in output and "no_caption" in output
    assert "1 samples" in tinyclip("data", "prepare", tmp_path / "out")
    output = tinyclip("vocab", "prune", place / "teacher", tmp_path / "pruned", "--texts", tmp_path / "out")
    assert f"of {load(place / 'teacher').tokenizer.vocab_size} tokens" in output
    before, after = load(place / "teacher"), load(tmp_path / "pruned")
    assert after.tokenizer.vocab_size < before.tokenizer.vocab_size
    assert torch.allclose(before.encode_text("a caption"), after.encode_text("a caption"), atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("classify", "nowhere", "photo.jpg", "a"), "nowhere: no such checkpoint"),
        (("classify", "teacher", "nowhere.jpg", "a"), "nowhere.jpg: no such file"),
        (("classify", "teacher", "recipe.yaml", "a"), "not a picture"),
        (("classify", "teacher", "photo.jpg", "a", "--device", "warp"), "warp"),
        (("classify", "teacher", "photo.jpg"), "Missing argument"),
        (("classify", "teacher", "photo.jpg", "a", " "), "a label is empty"),
        (("classify", "teacher", "eval", "a"), "eval: a folder, not a picture"),
        (("evaluate", "teacher", "eval", "--templates", "photo.jpg"), "photo.jpg: not UTF-8 text"),
        (("inherit", "teacher", "x", "--shape", "vision"), "--shape vision: write"),
        (("distill", "recipe.yaml", "--set", "stages.0.batch_size=999"), "999 exceeds the 20 samples"),
        (("evaluate", "teacher", "eval", "--templates", "eval"), "a folder, not a file of templates"),
        (("vocab", "prune", "teacher", "data", "--texts", "data", "--overwrite"), "data has no .tinyclip.json"),
        (("evaluate", "teacher", "nowhere"), "nowhere: no such data folder"),
        (("measure", "ViT-Z"), "ViT-Z: no such checkpoint"),
        (("measure", "TinyCLIP-ViT-45M-32-Text-18M"), "is ambiguous: TinyCLIP-auto-ViT-45M"),
        (("measure", "teacher", "--dtype", "int8"), "int8"),
        (("distill", "nowhere.yaml"), "no such recipe"),
        (("distill", "recipe.yaml", "--set", "stages.0.stepz=1"), "stages.0.stepz: unknown key"),
        (("train", "recipe.yaml"), "use `tinyclip distill`"),
        (("inherit", "teacher", "x", "--shape", "text.layers=1", "--gates"), "need --calibrate"),
        (
            ("inherit", "teacher", "x", "--shape", "text.layers=1", "--towers", "image"),
            "--towers needs --calibrate",
        ),
        (("inherit", "teacher", "x"), "give one of --like, --shape and --calibrate"),
        (("inherit", "teacher", "x", "--like", "ViT-B-32"), "does not fit into the teacher"),
        (("inherit", "teacher", "data", "--like", "ViT-B-32"), "data exists"),
        (
            ("inherit", "teacher", "mixed", "--shape", "text.layers=1", "--overwrite"),
            "mixed also holds files",
        ),
        (("data", "pack", "nowhere", "x"), "nowhere: no such file or folder"),
        (("data", "prepare", "eval"), "no .tar shards"),
        (("vocab", "prune", "teacher", "x", "--texts", "nowhere"), "nowhere"),
        (("vocab", "prune", "teacher", "x", "--texts", "empty.txt"), "empty.txt: contains no texts"),
        (("probe", "teacher", "table.csv"), "table.csv: a table of captions has no classes"),
        (
            ("compare", "teacher", "teacher", "--data", "table.csv"),
            "name the right one with --image-column, or rename it",
        ),
        (("report", "eval"), "eval: no run in it"),
        (("report", "nowhere"), "nowhere: no such folder"),
        (("inherit", "teacher", "x", "--shape", "vision.width=999"), "visual.hidden 999 > 32; visual.heads.0"),
        (("clasify",), "No such command 'clasify'. Did you mean 'classify'? (see `tinyclip --help`)"),
        (("classify",), "Missing argument 'MODEL' (see `tinyclip classify --help`)"),
        (("search", "x", "cat", "-k", "0"), "greater than or equal to 1 (see `tinyclip search --help`)"),
        (("evaluate", "teacher", "eval", "-o", "eval"), "eval is a folder"),
        (("evaluate", "teacher", "data", "--per-class"), "data: there are no class names, so --per-class has no"),
        (("evaluate", "teacher", "eval", "-o", "recipe.yaml/x"), "recipe.yaml is a file"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    named: str,
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", ["tinyclip", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and named in error
    assert len(error.splitlines()) == 1
    assert not (place / "x").exists()


def test_help_and_version_load_no_torch() -> None:
    code = "import sys; from tinyclip.cli.main import app; app(['--help'], standalone_mode=False); "
    code += "assert 'torch' not in sys.modules"
    assert "distill" in subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert tinyclip("--version").strip().count(".") == 2


def test_without_a_command_it_tells_of_them() -> None:
    done = subprocess.run([sys.executable, "-m", "tinyclip"], capture_output=True, text=True)
    assert done.returncode == 2 and "distill" in done.stdout + done.stderr


@pytest.mark.parametrize("module", ["tinyclip.common.stopping", "tinyclip.cli.main", "typer", "tinyclip.cli.compress"])
@pytest.mark.parametrize("number", [2, 15])
def test_an_interrupted_start_is_quiet(module: str, number: int) -> None:
    """Send SIGINT or SIGTERM while a module is imported. Before our handler is installed, the signal itself ends the
    process."""
    process = subprocess.Popen([sys.executable, "-c", STARTED, module], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"here\n"
    process.send_signal(number)
    _, error = output(process)
    assert (process.returncode, error) == (-number if module == "tinyclip.common.stopping" else 128 + number, b"")


# Makes the import of a module slow enough to interrupt.
STARTED = """
import sys, time
class Slow:
    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[1]:
            print("here", flush=True)
            while True:
                time.sleep(0.01)  # short: a signal that comes just before a sleep does not wake it
sys.meta_path.insert(0, Slow())
from tinyclip.__main__ import main
main()
"""


def test_interrupting_a_run_saves_it_and_exits_130(place: Path, tmp_path: Path) -> None:
    import signal

    sets = ("--set", f"output={tmp_path / 'run'}", "--set", "stages.0.steps=5000", "--set", "log_every=1")
    command = [sys.executable, "-m", "tinyclip", "distill", str(place / "recipe.yaml"), *sets]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if "step 2:" in line:
            break
    process.send_signal(signal.SIGINT)
    _, error = output(process)
    assert process.returncode == 130
    assert (
        "saved in" in error
        and f"output={tmp_path / 'run'}" in error
        and error.strip().endswith("--resume")
        and len(error.strip().splitlines()) == 1
    )
    assert (tmp_path / "run" / "stages" / "50" / "last" / "state.pt").exists()


def test_one_of_a_thing_is_no_plural() -> None:
    assert [plural(n, "part") for n in (0, 1, 2, 1000)] == ["0 parts", "1 part", "2 parts", "1,000 parts"]


def every_command(group: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield words, group
    for name, command in getattr(group, "commands", {}).items():
        yield from every_command(command, (*words, name))


def test_every_help_ends_with_an_example_that_the_command_accepts() -> None:
    root = typer.main.get_command(app)
    for words, command in every_command(root):
        assert command.epilog.startswith(shlex.join(["Example:", "tinyclip", *words])), words
        _, _, *given = shlex.split(command.epilog)
        target = root
        while hasattr(target, "commands"):
            target = target.commands[given.pop(0)]
        target.make_context("tinyclip", given)  # a usage error raises


def test_commands_stand_in_panels_and_arguments_in_capitals() -> None:
    said = tinyclip("--help")
    panels = ["Compress", "Data", "Judge", "Ship", "Search", "Models", "This machine"]
    assert [line.split()[1] for line in said.splitlines() if line.startswith("╭─")][1:] == [
        p.split()[0] for p in panels
    ]
    assert "Usage: tinyclip search [OPTIONS] INDEX [QUERY...]" in tinyclip("search", "--help")
