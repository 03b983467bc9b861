from __future__ import annotations

import json
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.helpers.models import random_model, small_config, small_tokenizer
from tinyclip.common.files import write_atomically
from tinyclip.common.folders import atomic_directory
from tinyclip.common.ownership import MARKER
from tinyclip.inputs.transforms import Preprocess
from tinyclip.model.model import CLIP
from tinyclip.zoo.checkpoint import load_checkpoint, save_checkpoint

FILES = ["config.json", "model.safetensors", "preprocess.json", "tokenizer.json"]
BIAS = "visual.ln_pre.bias"


def a_model(seed: int) -> CLIP:
    return random_model(small_config(vocab_size=small_tokenizer().vocab_size), seed, torch.float32)


def save(path: Path, model: CLIP, dtype: torch.dtype | None = None) -> None:
    save_checkpoint(path, model, small_tokenizer(), Preprocess(image_size=32), dtype)


def same(a: CLIP, b: CLIP) -> bool:
    return all(torch.equal(value, b.state_dict()[key]) for key, value in a.state_dict().items())


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save(tmp_path / "model", a_model(0))
    return tmp_path / "model"


# --- round trips


def test_what_was_saved_comes_back_to_the_bit(saved: Path) -> None:
    assert sorted(path.name for path in saved.iterdir()) == [MARKER, "README.md", *FILES]
    model, tokenizer, preprocess = load_checkpoint(str(saved))
    assert same(model, a_model(0))
    assert model.config == a_model(0).config
    assert not model.training
    assert (tokenizer.merges, preprocess) == (small_tokenizer().merges, Preprocess(image_size=32))


def test_a_half_precision_file_loads_in_float32(tmp_path: Path, saved: Path) -> None:
    save(tmp_path / "half", a_model(0), torch.float16)
    size, whole = ((path / "model.safetensors").stat().st_size for path in (tmp_path / "half", saved))
    assert size < 0.6 * whole
    model, _, _ = load_checkpoint(tmp_path / "half")
    for key, value in model.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, a_model(0).state_dict()[key].half().float())


# --- errors


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere: no such checkpoint"):
        load_checkpoint(tmp_path / "nowhere")


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(name: str, saved: Path) -> None:
    (saved / name).unlink()
    with pytest.raises(ValueError, match=f"{name}: no such file"):
        load_checkpoint(saved)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: b"\xff" * 100,
        lambda data: b"[]",
        lambda data: b"null",
    ],
    ids=["empty", "truncated", "bytes", "list", "null"],
)
def test_a_damaged_file_is_named(name: str, damage: Callable[[bytes], bytes], saved: Path) -> None:
    (saved / name).write_bytes(damage((saved / name).read_bytes()))
    with pytest.raises(ValueError, match=f"{name}: "):
        load_checkpoint(saved)


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        ("config.json", "depth", 3, r"config\.json: depth: unknown key"),
        ("preprocess.json", "crop", True, r"preprocess\.json: crop: unknown key"),
        ("preprocess.json", "image_size", 0, r"preprocess\.json: image_size: must be at least 1"),
        ("preprocess.json", "image_size", 48, r"preprocess\.json makes 48 px images, config\.json says 32"),
        ("tokenizer.json", "merges", ["a b"], r"tokenizer\.json has 515 tokens, config\.json says 602"),
        ("config.json", "embed_dim", 25, r"visual\.proj is \(32, 24\), not \(32, 25\)"),
    ],
)
def test_parts_that_do_not_fit_are_named(name: str, key: str, value: object, message: str, saved: Path) -> None:
    data = json.loads((saved / name).read_text())
    (saved / name).write_text(json.dumps(data | {key: value}))
    with pytest.raises(ValueError, match=message):
        load_checkpoint(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop(BIAS), f"missing {BIAS}"),
        (lambda state: state.update(extra=torch.ones(1)), "unexpected extra"),
        (lambda state: state.update({BIAS: torch.ones(31)}), rf"{BIAS} is \(31,\), not \(32,\)"),
        (lambda state: state[BIAS].fill_(torch.nan), f"{BIAS} has non-finite"),
        (lambda state: state[BIAS][:1].fill_(-torch.inf), f"{BIAS} has non-finite"),
        (lambda state: state.clear(), r"missing .*and \d+ more"),
    ],
    ids=["missing", "unexpected", "shape", "nan", "inf", "all missing"],
)
def test_a_bad_tensor_is_named(change: Callable[[dict[str, Tensor]], object], message: str, saved: Path) -> None:
    state = load_file(saved / "model.safetensors")
    change(state)
    save_file(state, saved / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load_checkpoint(saved)


@pytest.mark.parametrize(
    ("width", "message"),
    [
        (1_000_000, r"model\.safetensors does not fit its config: "),
        (10**12, r"config\.json: vision\.width: must be at most 1048576"),
    ],
)
def test_a_huge_config_allocates_nothing(width: int, message: str, saved: Path) -> None:
    data = json.loads((saved / "config.json").read_text())
    data["vision"]["width"] = width
    (saved / "config.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message):
        load_checkpoint(saved)


def test_eight_bit_weights(saved: Path) -> None:
    state = {key: value.to(torch.float8_e4m3fn) for key, value in load_file(saved / "model.safetensors").items()}
    save_file(state, saved / "model.safetensors")
    model = load_checkpoint(saved)[0]
    for key, value in model.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, state[key].float())
    state[BIAS] = torch.full_like(state[BIAS].float(), torch.nan).to(torch.float8_e4m3fn)
    save_file(state, saved / "model.safetensors")
    with pytest.raises(ValueError, match=f"{BIAS} has non-finite"):
        load_checkpoint(saved)


# --- writing


@pytest.mark.parametrize("place", ["file/model", "file/deeper/model"])
def test_a_place_that_cannot_be_written_is_named(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match="cannot write"):
        save(tmp_path / place, a_model(0))


def test_a_file_in_the_way_stays(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("in the way")
    with pytest.raises(ValueError, match="cannot write"):
        save(tmp_path / "model", a_model(0))
    assert (tmp_path / "model").read_text() == "in the way"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_full_disk_is_a_value_error_and_changes_nothing(saved: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # file size limit
    try:
        with pytest.raises(ValueError, match="cannot write"):
            save(saved, a_model(1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert same(load_checkpoint(saved)[0], a_model(0))
    assert [path.name for path in saved.parent.iterdir()] == ["model"]


def test_saving_again_replaces_the_whole_folder(saved: Path) -> None:
    save(saved, a_model(1))
    assert same(load_checkpoint(saved)[0], a_model(1))
    assert sorted(path.name for path in saved.iterdir()) == [MARKER, "README.md", *FILES]
    assert [path.name for path in saved.parent.iterdir()] == ["model"]


def test_an_exception_while_writing_leaves_the_old_and_no_litter(saved: Path) -> None:
    with pytest.raises(KeyError), atomic_directory(saved, "model") as folder:
        (folder / "config.json").write_text("{")
        raise KeyError
    assert same(load_checkpoint(saved)[0], a_model(0))
    assert [path.name for path in saved.parent.iterdir()] == ["model"]


KILLED = """
import os, signal, sys
from pathlib import Path
import tinyclip.zoo.checkpoint
from tinyclip.zoo.checkpoint import load_checkpoint, save_checkpoint

old, new, moment = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
parts = load_checkpoint(new)
calls = 0

def counted(function):
    def call(*arguments, **options):
        global calls
        calls += 1
        if calls == moment:
            if function.__name__ == "save_file":
                Path(arguments[1]).write_bytes(b"half of a file")
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return call

tinyclip.zoo.checkpoint.save_file = counted(tinyclip.zoo.checkpoint.save_file)
for name in ("rename", "replace"):
    setattr(os, name, counted(getattr(os, name)))
save_checkpoint(old, *parts)
"""


@pytest.mark.parametrize("moment", [1, 2, 3], ids=["half a file", "before a rename", "before the next rename"])
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(moment: int, saved: Path, tmp_path: Path) -> None:
    save(tmp_path / "new", a_model(1))
    arguments = [sys.executable, "-c", KILLED, str(saved), str(tmp_path / "new"), str(moment)]
    result = subprocess.run(arguments, capture_output=True, text=True)
    # Code that needs fewer renames survives the last moment.
    assert result.returncode in ([-signal.SIGKILL] if moment == 1 else [-signal.SIGKILL, 0]), result.stderr
    assert same(load_checkpoint(saved)[0], a_model(1 if result.returncode == 0 else 0))


def test_a_text_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_atomically(path, "old")
    write_atomically(path, "ñew")
    assert path.read_text(encoding="utf-8") == "ñew"
    with pytest.raises(ValueError, match=r"cannot write .*state\.json/new"):
        write_atomically(path / "new", "x")
    assert [p.name for p in tmp_path.iterdir()] == ["state.json"]


def test_a_text_file_that_fails_leaves_no_litter(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="cannot write"):
        write_atomically(tmp_path / "folder", "x")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_a_checkpoint_can_be_moved(saved: Path, tmp_path: Path) -> None:
    shutil.move(saved, tmp_path / "moved")
    assert same(load_checkpoint(tmp_path / "moved")[0], a_model(0))
