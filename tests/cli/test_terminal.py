"""Printing names from data, files and checkpoints, which may contain anything."""

from __future__ import annotations

import csv
import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.helpers.commands import tinyclip
from tests.helpers.models import small_config
from tests.helpers.shards import picture
from tinyclip.cli import terminal
from tinyclip.cli.meter import Meter
from tinyclip.common.faults import Skipped
from tinyclip.common.files import printable
from tinyclip.inference.pipeline import Pipeline
from tinyclip.inputs.tokenizer import clip_tokenizer
from tinyclip.inputs.transforms import Preprocess
from tinyclip.model.model import CLIP
from tinyclip.report.comparison import cell

# Colour, a title, DEL, C1, CR, BEL, BS, VT, a line separator, right-to-left override and isolates.
NASTY = "\x1b[31m\x1b]0;pwned\x07\x7f\x9b2J\x85\r\b\v\u2028\u202egpj.exe\u2066\u2069"
STEERING = {*map(chr, range(32)), *map(chr, range(127, 160)), *"\u2028\u2029\u202a\u202b\u202c\u202d\u202e"} - {"\n"}
STEERING |= {*"\u2066\u2067\u2068\u2069"}


def test_text_is_kept_but_for_what_steers() -> None:
    assert printable(NASTY).startswith(r"\x1b[31m\x1b]0;pwned\x07\x7f\x9b2J\x85\r\x08\x0b\u2028\u202egpj.exe\u2066")
    assert printable("a\nb\tc") == r"a\nb\tc"
    others = ("ß 日本　x", "a\u00a0b", "👩\u200d👧", "می\u200cخواهم", "עברית \u200f", r"C:\x1b", "[red]x[/x] :smile:")
    for kept in others:
        assert printable(kept) == kept
    assert printable(os.fsdecode(b"caf\xe9")) == r"caf\xe9" and printable("\ud83d") == r"\ud83d"


def _fail(text: str) -> None:
    with pytest.raises(SystemExit):
        terminal.fail(text, 2)


def _meter(text: str) -> None:
    meter = Meter(terminal.errors, wait=0)
    meter(text, 1, 3, text)
    if meter.bars:
        meter.bars.refresh()
    meter.stop()


@pytest.mark.parametrize(
    "show",
    [
        terminal.say,
        terminal.console.print,
        terminal.errors.print,
        _fail,
        lambda text: terminal.print_table(("name", text), [[text, "1"]]),
        lambda text: terminal.print_faults([Skipped(text, text, "no_image", text)]),
        lambda text: terminal.print_faults([Skipped(text, text, "no_image", text)], terminal.errors),
        lambda text: terminal.print_json({text: [text]}),
        _meter,
    ],
)
@pytest.mark.parametrize("coloured", [False, True])
def test_every_way_to_print_is_clean(
    show: Callable[[str], None],
    coloured: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a terminal, where rich uses colour, the only control codes are rich's own."""
    if coloured:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TERM", "xterm")
        for console in (terminal.console, terminal.errors):
            monkeypatch.setattr(console, "_force_terminal", True)
            monkeypatch.setattr(console, "is_interactive", True)
            monkeypatch.setattr(console, "_width", 1000)
    show(f"a{NASTY}b\nc")
    shown = "".join(capsys.readouterr())
    assert "pwned" in shown and "gpj.exe" in shown
    assert "\x1b]0;" not in shown and "\x1b[31m" not in shown and "\x9b" not in shown and "\u202e" not in shown
    if not coloured:
        assert not STEERING & set(shown)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    tokenizer = tokenizer.pruned(tokenizer.kept_ids(["a photo of a caption"]))
    config = small_config(vocab_size=tokenizer.vocab_size, image_size=16)
    Pipeline(CLIP(config), tokenizer, Preprocess(image_size=16)).save(tmp_path / "model")
    return tmp_path / "model"


def test_names_of_classes_and_shards(model: Path, tmp_path: Path) -> None:
    name = NASTY.replace("/", "")
    for folder in (f"cat{name}", "dog\nexit code 0"):
        (tmp_path / "classes" / folder).mkdir(parents=True)
        (tmp_path / "classes" / folder / "1.jpg").write_bytes(picture(1))
    (tmp_path / "classes" / f"cat{name}" / f"broken{name}.jpg").write_bytes(b"junk")
    said = [tinyclip("evaluate", model, tmp_path / "classes", "--per-class")]
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards" / f"a{name}.tar", "w") as tar:
        for ending, key in (("jpg", "good"), ("txt", "good"), ("jpg", "fine"), ("txt", "fine"), ("jpg", f"b{name}")):
            info = tarfile.TarInfo(f"{key}.{ending}")
            data = b"a caption" if ending == "txt" else picture(1)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    said.append(tinyclip("data", "prepare", tmp_path / "shards", "--check"))
    said.append(tinyclip("data", "prepare", tmp_path / f"absent{NASTY}", code=2))
    said.append(tinyclip(f"no{NASTY}", code=2))
    (tmp_path / "x.yaml").write_text("teacher: t")
    said.append(tinyclip("plan", tmp_path / "x.yaml", "--set", NASTY, code=2))
    for text in said:
        assert "gpj.exe" in text and not STEERING & set(text)
        assert not any(line.startswith("exit code 0") for line in text.splitlines())


def test_warnings_are_a_line_of_ours(capsys: pytest.CaptureFixture[str]) -> None:
    import warnings

    from tinyclip.__main__ import speak_plainly

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        speak_plainly()
        warnings.warn(f"odd {NASTY}\nname", stacklevel=1)
    assert capsys.readouterr().err.startswith(r"warning: odd \x1b[31m")


def test_cells_of_a_csv_are_no_formulas() -> None:
    for text in ("=1+1", "+cmd", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "＝1", "-", "+1e5x", '=HYPERLINK("x")'):
        file = io.StringIO()
        csv.writer(file).writerow([cell(text)])
        assert cell(text) == f"'{text}" and next(csv.reader(io.StringIO(file.getvalue(), newline="")))[0][0] == "'"
    for text in ("", "cat", "-5", "+3.25", "0.5", "a=b", "a-b", "'x"):
        assert cell(text) == text
