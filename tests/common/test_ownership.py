"""Every command that replaces a folder recognises ours by its marker, and removes only files listed in its record."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.models import small_config
from tests.helpers.outputs import COMMANDS, call, tree
from tinyclip.common import ownership
from tinyclip.common.folders import atomic_directory, remove_leftovers
from tinyclip.common.ownership import LOCKS, MARKER, check_replaceable
from tinyclip.inputs.tokenizer import clip_tokenizer
from tinyclip.inputs.transforms import Preprocess
from tinyclip.model.model import CLIP
from tinyclip.recipe.recipe import load_recipe
from tinyclip.train import loop
from tinyclip.train.resume import SAVED, Interrupted
from tinyclip.zoo.checkpoint import FILES, save_checkpoint


@pytest.fixture(scope="module")
def made(place: Path) -> Callable[[str], Path]:
    """The output of a command, created once."""

    def output(command: str) -> Path:
        out = place / "made" / command
        if not out.exists():
            call(place, command, out)
        return out

    return output


@pytest.fixture
def copied(made: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of it, to be modified."""

    def copy(command: str) -> Path:
        return Path(shutil.copytree(made(command), tmp_path / "out", symlinks=True))

    return copy


def listed(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def strangers(command: str, out: Path) -> list[str]:
    """File names that are not ours: at the top, in every folder, hidden, and nearly matching."""
    folders = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_dir())
    names = ["thesis.tex", ".git/HEAD", ".env", "photo.jpg.tmp", ".a.tmp", "empty/", *COMMANDS[command][1]]
    return names + [f"{folder}/{name}" for folder in folders for name in ("notes.txt", ".hidden", "mine/deep.txt")]


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_not_ours_is_named_and_left_alone(
    command: str, copied: Callable[[str], Path], place: Path, tmp_path: Path
) -> None:
    out = copied(command)
    for name in strangers(command, out):
        before = tree(out)
        path = out / name
        if name.endswith("/"):
            path.mkdir()
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("precious")
        planted = tree(out)
        said = call(place, command, out, "--overwrite", code=2)
        top = next(part for part in (path, *path.parents) if str(part.parent.relative_to(out)) in {".", *before})
        assert str(top.relative_to(out)) in said and "also holds files" in said and said.count("\n") == 1, name
        assert tree(out) == planted, name
        shutil.rmtree(top) if top.is_dir() else top.unlink()
        assert tree(out) == before
    assert listed(tmp_path) == ["out"]  # nothing next to it


@pytest.mark.parametrize("command", COMMANDS)
def test_links_are_never_followed(command: str, copied: Callable[[str], Path], place: Path, tmp_path: Path) -> None:
    out, home = copied(command), tmp_path / "home"
    home.mkdir()
    (home / "letter.txt").write_text("precious")
    (out / "linked").symlink_to(home)
    planted = tree(out)
    assert "linked" in call(place, command, out, "--overwrite", code=2)
    (out / "linked").unlink()
    file = next(path for path in sorted(out.rglob("*")) if path.is_file() and path.name not in (MARKER, *LOCKS))
    file.unlink()
    file.symlink_to(home / "letter.txt")  # in place of one of our files
    assert file.name in call(place, command, out, "--overwrite", code=2)
    assert tree(home) == {"letter.txt": b"precious"} and tree(out).keys() == planted.keys() - {"linked"}


def names(out: Path) -> set[str]:
    """Return the file names without locks; for an index, whatever its state number."""
    found = (name for name in tree(out) if Path(name).name not in LOCKS)
    return {re.sub(r"^(vectors|pictures)-\d+", r"\1-N", name) for name in found}


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_ours_is_replaced(command: str, copied: Callable[[str], Path], place: Path, tmp_path: Path) -> None:
    out = copied(command)
    before = names(out)
    (tmp_path / "link").symlink_to(out)
    if command not in ("cache", "embed", "index"):  # these continue with existing output
        assert "--overwrite" in call(place, command, out, code=2)
    for path in (out, tmp_path / "link"):
        call(place, command, path, "--overwrite")
        assert names(out) == before
    assert (tmp_path / "link").is_symlink() and listed(tmp_path) == ["link", "out"]


MARKERS: dict[str, Callable[[dict[str, object]], object]] = {
    "newer": lambda said: said | {"version": 2},
    "no list": lambda said: said | {"files": "all"},
    "numbers": lambda said: said | {"files": [1]},
    "unknown kind": lambda said: said | {"kind": "everything"},
    "another's": lambda said: {"name": "a project", "version": 1},
    "no object": lambda said: [said],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_without_a_marker_of_ours_nothing_is_replaced(
    command: str, copied: Callable[[str], Path], place: Path, tmp_path: Path
) -> None:
    """Folders from an older tinyclip have no marker; a marker may also be damaged, another project's, of another kind,
    or a link."""
    out = copied(command)
    marker = out / MARKER
    said = json.loads(marker.read_text())

    def refused(*words: str) -> None:
        planted = tree(out)
        error = call(place, command, out, "--overwrite", code=2)
        assert all(word in error for word in words) and error.count("\n") == 1
        assert tree(out) == planted

    for change in MARKERS.values():
        marker.write_text(json.dumps(change(said)))
        refused(MARKER)
    marker.write_text("{")
    refused(MARKER)
    marker.write_text(json.dumps(said | {"kind": "run" if command != "distill" else "model"}))
    refused("from tinyclip, not")
    marker.rename(tmp_path / "marker")
    refused(MARKER, "remove it by hand")
    marker.symlink_to(tmp_path / "marker")
    refused(MARKER)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_project_with_names_like_ours_stays(
    command: str, made: Callable[[str], Path], place: Path, tmp_path: Path
) -> None:
    """A folder that we did not create, with file names like ours: `recipe.yaml`, `index.json`, and a thesis."""
    out = tmp_path / "project"
    out.mkdir()
    for name in (*listed(made(command)), "recipe.yaml", "work.sqlite", "thesis.tex"):
        if name != MARKER and not (made(command) / name).is_dir():
            (out / name).write_text("precious")
    before = tree(out)
    for more in ((), ("--overwrite",)):
        assert "project" in call(place, command, out, *more, code=2)
        assert tree(out) == before
    (tmp_path / "file").write_text("precious")
    assert "file" in call(place, command, tmp_path / "file", "--overwrite", code=2)
    assert (tmp_path / "file").read_text() == "precious"


def test_other_places_that_are_refused(
    place: Path, copied: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The current folder or one above it; the home folder; the root."""
    out = copied("inherit")
    monkeypatch.setenv("HOME", str(place))
    for where in ("/", str(place), str(Path.cwd()), str(place.parent)):
        assert "left alone" in call(place, "inherit", Path(where), "--overwrite", code=2)
    monkeypatch.chdir(out)
    for where in (".", str(out)):
        assert "is the current folder" in call(place, "inherit", Path(where), "--overwrite", code=2)


# --- inside a run -------------------------------------------------------------------------------------------------


def test_a_run_leaves_alone_what_others_put_into_it(place: Path, tmp_path: Path) -> None:
    """Saving, removing older checkpoints and resuming lose no files of others, and such files do not interfere."""
    out = tmp_path / "run"
    more = ["stages.0.steps=6", "save_every=1", "keep=2"]
    started = loop.start(load_recipe(place / "recipe.yaml", [f"output={out}", *more]))
    started.listener = lambda event: signal.raise_signal(signal.SIGINT) if event.get("step") == 3 else None
    with pytest.raises(Interrupted):
        loop.run(started)
    stage = out / "stages" / "a"
    planted = [
        "step-by-step.md",
        "step-000001/notes.txt",
        "last/notes.txt",
        "last/mine/deep.txt",
        ".notes.tmp",
        "x.old",
    ]
    for name in planted:
        (stage / name).parent.mkdir(exist_ok=True, parents=True)
        (stage / name).write_text("precious")
    call(place, "distill", out, *(word for setting in more for word in ("--set", setting)), "--resume")
    assert all((stage / name).read_text() == "precious" for name in planted)
    assert "notes.txt" in call(place, "distill", out, "--overwrite", code=2)


def test_a_run_that_an_older_tinyclip_began_goes_on(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    call(place, "distill", out)
    for marker in list(out.rglob(MARKER)):
        marker.unlink()
    shutil.rmtree(out / "stages" / "a")
    call(place, "distill", out, "--resume")
    assert (out / "student" / MARKER).exists()
    before = tree(out)
    assert "remove it by hand" in call(place, "distill", out, "--overwrite", code=2)
    assert tree(out) == before


def save(folder: Path, known: tuple[str, ...] = ()) -> None:
    tokenizer = clip_tokenizer()
    tokenizer = tokenizer.pruned(tokenizer.kept_ids(["a"]))
    config = small_config(vocab_size=tokenizer.vocab_size, image_size=16)
    save_checkpoint(folder, CLIP(config), tokenizer, Preprocess(image_size=16), known=known)


def test_what_others_put_into_a_checkpoint_of_a_run_moves_along(tmp_path: Path) -> None:
    last = tmp_path / "last"
    for marked in (True, False):
        save(last, FILES)
        (last / "notes.txt").write_text("precious")
        (last / "state.pt").write_text("ours")
        if not marked:
            (last / MARKER).unlink()
        with atomic_directory(last, "model", tmp_path / "step-000001", known=SAVED) as folder:
            (folder / "config.json").write_text("new")
        assert (last / "config.json").read_text() == "new" and (last / "notes.txt").read_text() == "precious"
        assert listed(last) == [MARKER, "config.json", "notes.txt", *(["state.pt"] if marked else [])]
        assert not (tmp_path / "step-000001" / "notes.txt").exists()
        shutil.rmtree(tmp_path / "step-000001")
        shutil.rmtree(last)


def test_only_what_killed_writers_left_is_cleared_up(tmp_path: Path) -> None:
    """A half-written file or folder has a name from the record in its own name. A folder with our marker is ours with
    everything in it; one killed before it got its marker has a half-written marker."""
    run = tmp_path / "run"
    run.mkdir()
    ownership.claim(run, "run", ["recipe.yaml", "stages/a/last/"])
    stage = run / "stages" / "a"
    ours = [".recipe.yaml.ab12cd34.tmp", "stages/a/.last.ab12cd34.tmp/model.safetensors", ".recipe.yaml.tmp"]
    ours += ["stages/a/.last.ef56ab78.tmp/..tinyclip.json.ab12cd34.tmp"]
    theirs = [".letter.tmp", "stages/a/.letter.ab12cd34.tmp", "stages/a/.last.by.hand.tmp/letter.txt", ".x.old/a"]
    for name in (*ours, *theirs):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("x")
    ownership.write_marker(stage / ".last.ab12cd34.tmp", ownership.Marker("model", unfinished=True))
    remove_leftovers(run)
    assert not any((run / name).exists() for name in ours) and not list(stage.glob(".last.*[48].tmp"))
    assert all((run / name).read_text() == "x" for name in theirs)


def test_leftovers_in_a_checkpoint_of_a_run_are_cleared_up(tmp_path: Path) -> None:
    """A run killed while it adds a file to a finished checkpoint leaves the half-written file, or marker, in there."""
    run, last = tmp_path / "run", tmp_path / "run" / "stages" / "a" / "last"
    run.mkdir()
    ownership.claim(run, "run", ["stages/a/last/", "student/"])
    last.mkdir(parents=True)
    ownership.claim(last, "model", ["README.md"])
    ours, theirs = (
        (".README.md.ab12cd34.tmp", "..tinyclip.json.ab12cd34.tmp"),
        (".letter.ab12cd34.tmp", "README.md.tmp"),
    )
    for name in (*ours, *theirs):
        (last / name).write_text("x")
    remove_leftovers(run)
    assert listed(last) == sorted([MARKER, *theirs])
    for link in (run / "stages", run / "stages" / "a", last):  # what lies beyond is not the run's
        (last / ours[0]).write_text("x")
        link.rename(tmp_path / "elsewhere")
        link.symlink_to(tmp_path / "elsewhere")
        remove_leftovers(run)
        assert (last / ours[0]).exists()
        link.unlink()
        (tmp_path / "elsewhere").rename(link)
    (last / MARKER).write_text("damaged")
    remove_leftovers(run)  # nobody knows what was recorded
    assert (last / ours[0]).exists()


@pytest.mark.parametrize("moment", range(7))
def test_clearing_up_that_was_killed_can_be_done_again(
    moment: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The marker of a half-written folder goes last, since without it nobody knows whose the folder is."""
    run, half = tmp_path / "run", tmp_path / "run" / ".student.ab12cd34.tmp"
    run.mkdir()
    ownership.claim(run, "run", ["student/"])
    (half / "deep").mkdir(parents=True)
    ownership.write_marker(half, ownership.Marker("model", unfinished=True))
    for name in ("a.txt", "z.txt", "deep/b.txt", f"deep/{MARKER}"):
        (half / name).write_text("x")
    calls = 0

    def unless_killed(do: Callable[..., None]) -> Callable[..., None]:
        def done(*arguments: Any, **options: Any) -> None:
            nonlocal calls
            calls += 1
            if calls > moment:
                raise KeyboardInterrupt
            do(*arguments, **options)

        return done

    for name in ("unlink", "rmdir"):
        monkeypatch.setattr(os, name, unless_killed(getattr(os, name)))
    with pytest.raises(KeyboardInterrupt):
        remove_leftovers(run)
    monkeypatch.undo()
    assert (half / MARKER).exists() or not any(half.iterdir())
    remove_leftovers(run)
    assert listed(run) == [MARKER]


@pytest.mark.parametrize("moment", range(8))
def test_a_removal_that_was_killed_can_be_done_again(
    moment: int, made: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(shutil.copytree(made("distill"), tmp_path / "out"))
    unlinked = Path.unlink
    calls = 0

    def killed(path: Path, missing_ok: bool = False) -> None:
        nonlocal calls
        calls += 1
        if calls > 2 * moment:
            raise KeyboardInterrupt
        unlinked(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", killed)
    with pytest.raises(KeyboardInterrupt):
        ownership.remove(out, "run")
    monkeypatch.undo()
    assert (out / MARKER).exists()
    check_replaceable(out, "run")
    ownership.remove(out, "run")
    assert not out.exists()
