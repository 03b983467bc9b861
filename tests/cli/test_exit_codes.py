"""Exit codes of every command: 0, 1 if none of the data is usable, 2 for a bad request, 130 and 143 if stopped."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.helpers.commands import tinyclip
from tests.helpers.models import small_config
from tests.helpers.processes import SERVER, end, until
from tests.helpers.shards import good, picture, write_shard
from tinyclip import __main__
from tinyclip.cli import main
from tinyclip.cli.arguments import Command
from tinyclip.inference.pipeline import Pipeline
from tinyclip.inputs.tokenizer import clip_tokenizer
from tinyclip.inputs.transforms import Preprocess
from tinyclip.model.model import CLIP


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model`; `good` and `broken` captioned pictures, `good_classes`, `broken_classes`, `good_shards`, `broken_shards`
    (whole tars of broken pictures), `damaged` (not a tar), recipes for the last three."""
    folder = tmp_path_factory.mktemp("codes")
    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    tokenizer = tokenizer.pruned(tokenizer.kept_ids(["a photo of a caption words"]))
    config = small_config(vocab_size=tokenizer.vocab_size, image_size=16)
    Pipeline(CLIP(config), tokenizer, Preprocess(image_size=16)).save(folder / "model")
    for kind in ("good", "broken"):
        for name in ("one", "two", "six"):
            content = picture(len(name)) if kind == "good" else b"junk"
            for parent in (kind, f"{kind}_classes/cat", f"{kind}_classes/dog"):
                (folder / parent).mkdir(parents=True, exist_ok=True)
                (folder / parent / f"{name}.jpg").write_bytes(content)
            (folder / kind / f"{name}.txt").write_text(f"a photo {name}")
        (folder / f"{kind}_shards").mkdir()
        samples = [good(i) | ({} if kind == "good" else {"jpg": b"junk"}) for i in range(20)]
        write_shard(folder / f"{kind}_shards" / "0.tar", samples)
    (folder / "damaged").mkdir()
    (folder / "damaged" / "0.tar").write_bytes(b"junk" * 1000)
    for data in ("good_shards", "damaged"):
        recipe: dict[str, Any] = {"teacher": "model", "data": data, "output": "out", "device": "cpu"}
        stage = {"name": "a", "steps": 2, "batch_size": 4, "inherit": "calibrated"}
        recipe["stages"] = [stage | {"calibrated": {"target_sparsity": 0.3, "batches": 4}}]
        (folder / f"{data}.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.mark.parametrize(
    "words",
    [
        "index model broken -o out",
        "embed model broken -o out",
        "embed model broken_shards -o out --what image",
        "evaluate model broken_classes",
        "evaluate model broken",
        "evaluate model broken_shards",
        "probe model broken_classes",
        "compare model model --data broken_classes",
        "data pack broken out",
        "data prepare damaged",
        "data prepare broken_shards --check",
        "cache model broken_shards -o out",
        "inherit model out --calibrate damaged",
        "export model --to hf -o out --calibration-data broken",
        "distill damaged.yaml --set output=out",
    ],
)
def test_where_nothing_can_be_used_it_is_1(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    monkeypatch.chdir(place)
    error = tinyclip(*(re.sub(r"\bout$", str(tmp_path / "out"), word) for word in words.split()), code=1)
    said = [line for line in error.splitlines() if line.startswith("tinyclip: ")]
    assert len(said) == 1 and "Traceback" not in error
    assert any(cause in error for cause in ("junk", "picture", "damaged", "sample", "cannot", "could")), error
    assert not [path for where in (place, tmp_path) for path in where.rglob("*.tmp")]


BAD = {
    "distill": "distill absent.yaml",
    "train": "train absent.yaml",
    "plan": "plan absent.yaml",
    "report": "report absent",
    "inherit": "inherit model out --like nothing",
    "convert": "convert absent out",
    "classify": "classify model absent.jpg cat",
    "evaluate": "evaluate model absent",
    "probe": "probe model absent",
    "compare": "compare model model --data absent",
    "cache": "cache model absent",
    "export": "export model --to nothing -o out",
    "index": "index model absent -o out",
    "search": "search absent cat",
    "app": "app model --port 99999",
    "measure": "measure absent",
    "embed": "embed model absent -o out",
    "structure": "structure absent",
    "zoo": "zoo absent",
    "push": "push absent no-id",
    "doctor": "doctor --nothing",
    "data pack": "data pack absent out",
    "data prepare": "data prepare absent",
    "vocab prune": "vocab prune model out --texts absent",
}


def commands() -> dict[str, Any]:
    """Return all commands, including those in groups, by their words."""
    found = {c.callback.__name__: c for c in main.app.registered_commands if c.callback}
    for group in main.app.registered_groups:
        assert group.typer_instance
        inside = group.typer_instance.registered_commands
        found |= {f"{group.name} {c.callback.__name__}": c for c in inside if c.callback}
    return found


def test_no_command_is_forgotten() -> None:
    assert set(commands()) == set(BAD)
    assert all(command.cls is Command for command in commands().values())


@pytest.mark.parametrize("words", BAD.values(), ids=BAD.keys())
def test_a_bad_request_is_2(place: Path, monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    monkeypatch.chdir(place)
    error = tinyclip(*words.split(), code=2)
    assert error.startswith("tinyclip: ") and len(error.splitlines()) == 1
    first = words.split()[2 if words.split()[0] in ("data", "vocab") else 1]
    emptied = ["" if word == first else word for word in words.split()]
    if not first.startswith("-"):
        assert "is empty; give it a value" in tinyclip(*emptied, code=2)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("evaluate model good_classes -o ''", "--output is empty"),
        ("evaluate model good_classes --templates=", "--templates is empty"),
        ("measure ''", "MODEL is empty"),
        ("classify model good/one.jpg cat ''", "LABELS is empty"),
        ("classify model good/one.jpg \u00a0", "a label is empty"),
        ("classify model good/one.jpg cat dog cat", "the label 'cat' is given twice"),
        ("inherit model out --shape =", "--shape =: write e.g. vision.width=128"),
        ("inherit model out --shape =3", "--shape =3: write e.g."),
        ("inherit model out --shape vision.width=", "--shape vision.width=: no value is given"),
        ("inherit model out --shape vision..width=3", "--shape vision..width=3: write e.g."),
        ("inherit model out --shape vision.width=[", "--shape vision.width=[: the value is not valid YAML"),
        ("inherit model out --shape vision.width=-8", "--shape: vision.width"),
        ("inherit model out --shape vision=3", "--shape: vision"),
        ("inherit model out --shape vision.width=8 --shape vision.width.x=8", "there is no vision.width.x"),
        ("cache model good_shards --augment =", "--augment =: write e.g. rotate=20"),
        ("plan good_shards.yaml --devices 100000000000000000000000", "--devices"),
        ("plan good_shards.yaml --devices 1e23", "--devices"),
        ("plan good_shards.yaml --samples 100000000000000000000000", "--samples"),
        ("plan good_shards.yaml --tflops nan", "--tflops"),
        ("plan good_shards.yaml --pairs-per-s inf", "--pairs-per-s"),
        ("plan good_shards.yaml --set output=", "output"),
        ("plan good_shards.yaml --set output=''", "output: is empty"),
        ("plan good_shards.yaml --set data=''", "data: is empty"),
        ("plan good_shards.yaml --set teacher=''", "teacher: is empty"),
        ("plan good_shards.yaml --set stages.0.start=''", "stages.0.start: is empty"),
        ("plan good_shards.yaml --set stages.0.steps=99999999999999999999", "a number with too many digits"),
        ("plan good_shards.yaml --set stages.0.optimizer.lr=.nan", "stages.0.optimizer.lr"),
        ("inherit model out --calibrate good_shards --target nan", "--target: nan"),
        ("inherit model out --calibrate good_shards --align 99999999999999999999", "--align"),
        ("probe model good_classes --seed 99999999999999999999", "--seed"),
        ("data pack good_classes out --templates blank.txt", "blank.txt: contains no templates"),
        ("evaluate model good_classes --templates blank.txt", "blank.txt: contains no templates"),
        ("evaluate model good_classes --classes blank.txt", "blank.txt: contains no class names"),
        ("vocab prune model out --texts blank.txt", "blank.txt: contains no texts"),
        ("search absent --queries blank.txt", "blank.txt: contains no queries"),
    ],
)
def test_it_speaks_of_the_cause(place: Path, monkeypatch: pytest.MonkeyPatch, words: str, named: str) -> None:
    monkeypatch.chdir(place)
    (place / "blank.txt").write_bytes(b"\xef\xbb\xbf \n\n  \n")
    error = tinyclip(*("" if word == "''" else word for word in words.split(" ")), code=2)
    assert named in error and len(error.splitlines()) == 1
    assert not (place / "out").exists()


# --- signals ----------------------------------------------------------------------------------------------------


def held(words: list[str], folder: str, where: str, said: str) -> None:
    """Run the command in a process of the fork server until it reaches a call in the middle of its work, and hold it
    there."""
    os.chdir(folder)
    os.environ["TMPDIR"] = said + ".d"
    Path(said + ".d").mkdir()
    torch.set_num_threads(1)
    with Path(said).open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    module, name = where.split(":")
    owner: Any = import_module(f"tinyclip.{module}")
    *parents, name = name.split(".")
    for parent in parents:
        owner = getattr(owner, parent)

    def stay(*_: Any, **__: Any) -> None:
        Path(said + ".here").touch()
        while True:
            time.sleep(0.01)

    setattr(owner, name, stay)
    sys.argv = ["tinyclip", *words]
    try:
        __main__.main()
    finally:
        Path(said + ".ending").touch()
        while not Path(said + ".end").exists():
            time.sleep(0.01)


@pytest.mark.parametrize(
    ("words", "where", "number"),
    [
        ("index model good -o made", "inference.pipeline:Pipeline.encode_image", signal.SIGTERM),
        ("embed model good_shards -o made", "inference.pipeline:Pipeline.encode_text", signal.SIGINT),
        ("evaluate model good_classes -o made", "inference.pipeline:Pipeline.encode_image", signal.SIGTERM),
        ("compare model model --data good_classes -o made", "inference.pipeline:Pipeline.encode_text", signal.SIGINT),
        ("data pack good made", "data.pack:_stored", signal.SIGTERM),
        ("data prepare good_shards --check", "data.shards:image_of", signal.SIGINT),
        ("inherit model made --calibrate good_shards --batch-size 4", "compress.calibrate:fill_budget", signal.SIGTERM),
        ("export model --to hf -o made", "export.export:answers", signal.SIGINT),
        ("export model --to hf -o made", "export.export:compare", signal.SIGTERM),
        ("distill good_shards.yaml --set output=made", "compress.calibrate:fill_budget", signal.SIGTERM),
    ],
)
def test_a_signal_in_the_midst_of_work(
    place: Path, tmp_path: Path, words: str, where: str, number: signal.Signals
) -> None:
    """No traceback, no partial output, no temporary files."""
    said = tmp_path / "said"
    arguments = [word.replace("made", str(tmp_path / "made")) for word in words.split()]
    process = SERVER.Process(target=held, args=(arguments, str(place), where, str(said)))
    process.start()
    until(lambda: Path(f"{said}.here").exists(), [process])
    assert process.is_alive() and process.pid, said.read_text()
    os.kill(process.pid, number)
    os.kill(process.pid, number)  # `timeout` sends two
    until(lambda: Path(f"{said}.ending").exists(), [process])
    os.kill(process.pid, number)  # too late to change anything
    Path(f"{said}.end").touch()
    assert end([process]) == [128 + number], said.read_text()
    text = said.read_text()
    assert "Traceback" not in text and "Exception ignored" not in text
    assert not [path for path in Path(f"{said}.d").iterdir() if "torchinductor" not in path.name]  # torch's own cache
    left = {path.name for path in tmp_path.rglob("*") if path.name.endswith((".tmp", ".old", ".part"))}
    left |= {path.name for path in place.rglob("*.tmp")}
    assert not left
