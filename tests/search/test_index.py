from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sqlite3
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import tinyclip
from tests.helpers.models import random_model
from tests.helpers.pictures import drawing, encoded
from tests.helpers.processes import SERVER, kill, start_command, until
from tinyclip.app import page
from tinyclip.cli.main import main
from tinyclip.common import faults
from tinyclip.common.ownership import MARKER
from tinyclip.export.export import export
from tinyclip.inference.pipeline import Pipeline
from tinyclip.search import build as indexing
from tinyclip.search import index as search
from tinyclip.search import sheet, vectors
from tinyclip.search.build import SKIPPED, build
from tinyclip.search.index import INFO, WORK, Index
from tinyclip.search.pending import Pending, Row
from tinyclip.search.vectors import Vectors

QUERIES = ["a red apple", "the sea", "a dog in the snow"]


@pytest.fixture(scope="module")
def opened(model: Path) -> tuple[Pipeline, str]:
    return search.open_model(str(model))


@pytest.fixture(scope="module")
def clip(opened: tuple[Pipeline, str]) -> Pipeline:
    return opened[0]


def write(folder: Path, *seeds: int) -> Path:
    """Write pictures, every third one in a subfolder."""
    for seed in seeds:
        file = folder / ("more" if seed % 3 == 2 else "") / f"{seed:03}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(drawing(seed)))
    return folder


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return write(tmp_path / "pictures", *range(12))


Make = Callable[..., dict[str, Any]]


@pytest.fixture
def make(opened: tuple[Pipeline, str], pictures: Path, tmp_path: Path) -> Make:
    def made(folder: Path = pictures, out: Path = tmp_path / "index", **options: Any) -> dict[str, Any]:
        clip, fingerprint = opened
        return build(clip, folder, out, **({"model": "m", "fingerprint": fingerprint} | options))

    return made


def check(out: Path, clip: Pipeline, folder: Path, names: list[str]) -> None:
    """Check that the index holds exactly these pictures, ranked by their float64 cosines."""
    images = clip.encode_image([folder / name for name in names]).double().numpy()
    texts = clip.encode_text(QUERIES).double().numpy()
    with Index.open(out) as index:
        assert (len(index), index.facts["pictures"]) == (len(names), len(names))
        found = index.search(texts, len(names))
    for cosines, matches in zip(texts @ images.T, found, strict=True):
        assert sorted(match.path for match in matches) == sorted(names)
        expected = dict(zip(names, cosines, strict=True))
        for match in matches:
            assert match.cosine == pytest.approx(expected[match.path], abs=1e-3)
        assert [m.cosine for m in matches] == sorted((m.cosine for m in matches), reverse=True)


def names_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))


# --- building and updating


def test_pictures_are_found_by_their_cosine(make: Make, clip: Pipeline, pictures: Path, tmp_path: Path) -> None:
    result = make()
    assert {k: result[k] for k in ("pictures", "added", "changed", "removed", "kept", "computed", "skipped")} == {
        "pictures": 12,
        "added": 12,
        "changed": 0,
        "removed": 0,
        "kept": 0,
        "computed": 12,
        "skipped": 0,
    }
    assert len(names_in(pictures)) == 12
    check(tmp_path / "index", clip, pictures, names_in(pictures))
    told = json.loads((tmp_path / "index" / INFO).read_text())
    assert told.items() <= result.items() and told["embed_dim"] == 24 and told["root"] == str(pictures)


def test_an_index_is_renewed_by_what_has_changed(make: Make, clip: Pipeline, pictures: Path, tmp_path: Path) -> None:
    make()
    write(pictures, 20, 21)
    (pictures / "001.png").write_bytes(encoded(drawing(31)))
    os.utime(pictures / "000.png", ns=(1, 1))  # same size, different time
    for name in ("003.png", "more/005.png"):
        (pictures / name).unlink()
    result = make()
    assert [result[k] for k in ("added", "changed", "removed", "kept", "computed")] == [2, 2, 2, 8, 4]
    check(tmp_path / "index", clip, pictures, names_in(pictures))
    assert len(list((tmp_path / "index").glob("*-*"))) == 2  # nothing from the previous state
    again = make()
    assert [again[k] for k in ("added", "changed", "removed", "kept", "computed")] == [0, 0, 0, 12, 0]
    assert again["state"] == result["state"]


def test_many_removals_make_the_graph_anew(make: Make, clip: Pipeline, pictures: Path, tmp_path: Path) -> None:
    make()
    (pictures / "000.png").unlink()
    assert make()["holes"] == 1
    for name in ("001.png", "003.png", "004.png"):
        (pictures / name).unlink()
    assert make()["holes"] == 0
    check(tmp_path / "index", clip, pictures, names_in(pictures))


def test_what_cannot_be_read_is_listed_and_tried_again_when_it_changes(
    make: Make, clip: Pipeline, pictures: Path, tmp_path: Path
) -> None:
    (pictures / "3b.png").write_bytes(encoded(drawing(3))[:60])
    (pictures / "words.jpg").write_text("no picture")
    os.mkfifo(pictures / "pipe.png")  # would block forever
    result = make()
    listed = faults.read(tmp_path / "index" / SKIPPED)
    broken = {"3b.png": "corrupt_image", "words.jpg": "corrupt_image"}
    assert {s.key: s.cause for s in listed} == broken | {"pipe.png": "no_image"}
    assert listed[2].reason == "not a picture that Pillow can read"
    assert (result["skipped"], result["skipped_by_cause"]) == (3, {"corrupt_image": 2, "no_image": 1})
    assert make()["computed"] == 0
    (pictures / "3b.png").write_bytes(encoded(drawing(3)))
    (pictures / "words.jpg").unlink()
    (pictures / "pipe.png").unlink()
    result = make()
    assert (result["computed"], result["skipped"], result["pictures"]) == (1, 0, 13)
    assert (tmp_path / "index" / SKIPPED).read_text() == ""
    check(tmp_path / "index", clip, pictures, names_in(pictures))


def test_what_could_not_be_reached_is_tried_again(
    make: Make, clip: Pipeline, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that was away for a while does not change the pictures on it."""
    opened, away = Image.open, {"001.png": errno.EIO, "003.png": errno.EACCES, "004.png": errno.ENOENT}

    def unsure(file: Any, *arguments: Any) -> Any:
        if (code := away.get(Path(file).name)) is not None:
            raise OSError(code, os.strerror(code), str(file))
        return opened(file, *arguments)

    monkeypatch.setattr(Image, "open", unsure)
    (pictures / "words.png").write_text("no picture")
    assert (make()["pictures"], make()["computed"]) == (9, 3)
    reasons = {s.key: s.reason for s in faults.read(tmp_path / "index" / SKIPPED)}
    assert reasons["003.png"] == "cannot be read (Permission denied)" and reasons["004.png"] == "no such file"
    state = json.loads((tmp_path / "index" / INFO).read_text())["state"]
    assert make()["state"] == state  # nothing new, so nothing is written
    away.clear()
    result = make()
    assert (result["added"], result["computed"], result["skipped"]) == (3, 3, 1)
    (pictures / "words.png").unlink()
    make()
    check(tmp_path / "index", clip, pictures, names_in(pictures))


def test_features_that_are_no_numbers_are_not_indexed(model: Path, pictures: Path, tmp_path: Path) -> None:
    broken, fingerprint = search.open_model(str(model))
    broken.model.visual.proj.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite numbers"):
        build(broken, pictures, tmp_path / "index", model="m", fingerprint=fingerprint)
    assert not (tmp_path / "index" / INFO).exists()


def test_a_full_disk_costs_nothing_that_was_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(Pending(tmp_path / WORK, {})) as pending:
        pending.put([Row("a.png", (1, 1), np.ones(3, np.float16))])
    connect = sqlite3.connect

    class Full(sqlite3.Connection):
        def execute(self, sql: str, *arguments: Any) -> Any:
            if "journal_mode" in sql:
                raise sqlite3.OperationalError("database or disk is full")
            return super().execute(sql, *arguments)

    monkeypatch.setattr(sqlite3, "connect", lambda path: connect(path, factory=Full))
    with pytest.raises(ValueError, match=rf"{WORK}: database or disk is full"):
        Pending(tmp_path / WORK, {})
    monkeypatch.undo()
    with closing(Pending(tmp_path / WORK, {})) as pending:
        assert pending.states() == {"a.png": (1, 1)}


def test_names_of_any_kind(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [b"a b#?%41.png", b"new\nline.png", b"\xff\xfe.png", "ß 日本.png".encode()]
    (tmp_path / "odd").mkdir()
    for i, name in enumerate(names):
        Path(os.fsdecode(bytes(tmp_path / "odd") + b"/" + name)).write_bytes(encoded(drawing(i)))
    out = tmp_path / "o?d #%41"
    make(tmp_path / "odd", out)
    with Index.open(out) as index:
        (matches,) = index.search(np.ones(24), 9)
        assert {os.fsencode(match.path) for match in matches} == set(names)
        assert all(index.file(match.path).is_file() for match in matches)
        assert all(search.shown(match.path).isprintable() for match in matches)


def test_a_state_can_be_searched_while_the_rest_is_computed(
    make: Make, clip: Pipeline, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexing, "PUBLISH", 4)
    seen = []

    def progress(what: str, done: int, total: int) -> None:
        if what == "computing" and (tmp_path / "index" / INFO).exists():
            with Index.open(tmp_path / "index") as index:
                seen.append((len(index), len(index.search(np.ones(24), 99)[0])))

    assert make(batch_size=2, progress=progress)["added"] == 12
    assert seen == [(4, 4), (4, 4), (8, 8), (8, 8)]
    check(tmp_path / "index", clip, pictures, names_in(pictures))
    write(pictures, 0, 1)
    for path in pictures.rglob("*.png"):
        os.utime(path, ns=(5, 5))
    seen.clear()
    assert make(batch_size=2, progress=progress)["changed"] == 12
    assert {count for count, _ in seen} == {12}  # old entries of recomputed pictures stay until then
    check(tmp_path / "index", clip, pictures, names_in(pictures))


def test_a_state_that_goes_while_it_is_opened(
    make: Make, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make()
    view = Vectors.open

    def renewed_meanwhile(path: Path, dim: int, **options: Any) -> Vectors:
        monkeypatch.undo()
        write(pictures, 20)
        make()
        return view(path, dim, **options)

    monkeypatch.setattr(Vectors, "open", renewed_meanwhile)
    with Index.open(tmp_path / "index") as index:
        assert len(index) == 13


def test_who_has_opened_a_state_keeps_it(make: Make, pictures: Path, tmp_path: Path) -> None:
    make()
    with Index.open(tmp_path / "index") as before:
        first = before.search(np.ones(24), 99)
        write(pictures, 20)
        (pictures / "000.png").unlink()
        make()
        assert before.search(np.ones(24), 99) == first
        with Index.open(tmp_path / "index") as after:
            names = {match.path for match in after.search(np.ones(24), 99)[0]}
    assert names == set(names_in(pictures))


def test_an_exported_model_serves_as_well(
    opened: tuple[Pipeline, str], model: Path, pictures: Path, tmp_path: Path
) -> None:
    export(model, tmp_path / "exported", "onnx")
    exported, fingerprint = search.open_model(str(tmp_path / "exported"))
    assert fingerprint == opened[1]  # so the exported model can search the model's index
    build(exported, pictures, tmp_path / "index", model="exported", fingerprint=fingerprint)
    check(tmp_path / "index", opened[0], pictures, names_in(pictures))


# --- kills


def build_and_die(clip: Pipeline, fingerprint: str, folder: Path, out: Path, steps: int) -> None:
    """Index, and kill this process before its `steps`-th write step, or in the middle of a file."""
    left = [steps]

    def stepping(call: Callable[..., Any]) -> Callable[..., Any]:
        def stepped(*arguments: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)

        return stepped

    def torn(self: Vectors, path: Path) -> None:
        save(self, path)
        left[0] -= 1
        if left[0] == 0:
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    save = Vectors.save
    for owner, name in (
        *((Vectors, name) for name in ("add", "remove")),
        *((Pending, name) for name in ("put", "drop", "close")),
        *((indexing, name) for name in ("write_atomically", "flush", "checksum")),
        *((Path, name) for name in ("replace", "unlink")),
        (shutil, "copyfile"),
    ):
        setattr(owner, name, stepping(getattr(owner, name)))
    Vectors.save = torn  # type: ignore[method-assign]
    build(clip, folder, out, model="m", fingerprint=fingerprint, batch_size=2)


def killed_runs(model: Path, folder: Path, whole: Path, outs: Path) -> None:
    """Copy an index repeatedly; each copy is updated by a process that is killed one step later than the previous
    one."""
    torch.set_num_threads(1)
    clip, fingerprint = search.open_model(str(model))
    for steps in range(1, 100):
        out = shutil.copytree(whole, outs / str(steps))
        child = os.fork()
        if child == 0:
            build_and_die(clip, fingerprint, folder, out, steps)
            os._exit(77)  # finished without being killed
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        (out / "status").write_text(str(status))
        if status != -signal.SIGKILL:
            break


def test_a_kill_at_any_step_loses_nothing(model: Path, clip: Pipeline, make: Make, tmp_path: Path) -> None:
    folder, whole = write(tmp_path / "some", *range(5)), tmp_path / "whole"
    make(folder, whole)
    before = names_in(folder)
    write(folder, *range(8, 12))
    (folder / "000.png").write_bytes(encoded(drawing(50)))
    (folder / "001.png").unlink()
    after, seen = names_in(folder), set()
    process = SERVER.Process(target=killed_runs, args=(model, folder, whole, tmp_path / "outs"))
    process.start()
    process.join(200)
    assert process.exitcode == 0
    outs = sorted((tmp_path / "outs").iterdir(), key=lambda path: int(path.name))
    assert [int((out / "status").read_text()) for out in outs] == [-signal.SIGKILL] * (len(outs) - 1) + [77]
    for out in outs:
        (out / "status").unlink()
        with Index.open(out) as index:  # either the previous state or the new one
            found = {match.path for match in index.search(np.ones(24), 99)[0]}
            renewed = index.facts["state"] > 1
        assert found == set(after if renewed else before)
        done = 0 if renewed else waiting_in(out)
        seen.add((renewed, done))
        assert make(folder, out)["computed"] == (0 if renewed else 5 - done)
        check(out, clip, folder, after)
        names = {path.name.split("-")[0] for path in out.iterdir()}
        assert names <= {"vectors", "pictures", INFO, SKIPPED, ".lock", MARKER}
    assert seen == {(False, 0), (False, 2), (False, 4), (False, 5), (True, 0)}


def waiting_in(out: Path) -> int:
    """Return the number of pictures that a killed run had computed. Look in a copy, because opening the file recovers
    it."""
    if not (out / WORK).exists():
        return 0
    copy = shutil.copytree(out, out.with_name(f"{out.name}-copy"))
    with closing(sqlite3.connect(copy / WORK)) as database:
        tables = database.execute("SELECT count(*) FROM sqlite_master WHERE name = 'rows'").fetchone()[0]
        return int(database.execute("SELECT count(*) FROM rows").fetchone()[0]) if tables else 0


def test_a_killed_command_goes_on(model: Path, clip: Pipeline, make: Make, tmp_path: Path) -> None:
    folder, out = write(tmp_path / "many", *range(60)), tmp_path / "index"
    command = ("index", model, folder, "-o", out, "--batch-size", 1, "--dtype", "float32")
    started, log = start_command(tmp_path, *command), out / f"{WORK}-wal"
    until(lambda: log.exists() and log.stat().st_size >= 50_000, started)
    kill(started)
    with pytest.raises(ValueError, match="did not finish; run it again"):
        Index.open(out)
    result = make(folder)
    assert 0 < result["computed"] < 60 and result["added"] == 60
    check(out, clip, folder, names_in(folder))


# --- errors


def test_another_model_is_refused_until_it_replaces(
    make: Make, clip: Pipeline, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make()
    other = Pipeline(random_model(clip.model.config, 1, torch.float32), clip.tokenizer, clip.preprocessing)
    for name, said in (("n", r"\(m, now n\)"), ("m", r"\(m, which has changed since\)")):
        with pytest.raises(ValueError, match=f"made with another model {said}; .*--overwrite"):
            make(model=name, fingerprint="f")
    monkeypatch.setattr(indexing, "PUBLISH", 4)
    lengths = []

    def progress(what: str, done: int, total: int) -> None:
        with Index.open(tmp_path / "index") as index:
            lengths.append((len(index), index.facts["model"]))

    options = {"model": "n", "fingerprint": "f", "overwrite": True, "batch_size": 2, "progress": progress}
    build(other, pictures, tmp_path / "index", **options)
    assert set(lengths) == {(12, "m")}  # the old index stays until the new one is complete
    check(tmp_path / "index", other, pictures, names_in(pictures))


def test_another_folder_is_refused_and_a_moved_one_is_known(
    make: Make, clip: Pipeline, pictures: Path, tmp_path: Path
) -> None:
    make()
    before = sorted(p.name for p in (tmp_path / "index").iterdir())
    moved = pictures.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"is the index of .*pictures, not of .*moved; use --moved if"):
        make(moved)
    assert sorted(p.name for p in (tmp_path / "index").iterdir()) == before
    assert make(moved, moved=True)["computed"] == 0
    with Index.open(tmp_path / "index") as index:
        assert all(index.file(match.path).is_file() for match in index.search(np.ones(24), 5)[0])
    (tmp_path / "link").symlink_to(moved)
    assert make(tmp_path / "link")["computed"] == 0  # the same folder
    check(tmp_path / "index", clip, moved, names_in(moved))


def test_a_second_run_is_refused(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinyclip.common.locks.PATIENCE", 0.0)
    refused = []

    def second(what: str, done: int, total: int) -> None:
        with pytest.raises(ValueError) as error:
            make(overwrite=True)
        refused.append(str(error.value))

    assert make(progress=second)["pictures"] == 12
    assert set(refused) == {f"{tmp_path / 'index'}: another `tinyclip index` is running here; wait for it or stop it"}


def test_nothing_readable_leaves_the_index_alone(make: Make, clip: Pipeline, pictures: Path, tmp_path: Path) -> None:
    make()
    names = names_in(pictures)
    kept = shutil.copytree(pictures, tmp_path / "kept")
    for name in names:
        (pictures / name).write_text("no picture")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"nothing in it can be read: 12 corrupt_image; the first: 000\.png: not"):
            make()
    check(tmp_path / "index", clip, kept, names)
    shutil.rmtree(pictures)
    pictures.mkdir()
    with pytest.raises(ValueError, match="no pictures"):  # for example an unmounted disk
        make()
    check(tmp_path / "index", clip, kept, names)


@pytest.mark.parametrize(
    "wrong", ["cut", "flipped", "no vectors", "no list", "no json", "format", "field", "elsewhere"]
)
def test_damage_is_said_and_replaced_on_demand(
    wrong: str, make: Make, clip: Pipeline, pictures: Path, tmp_path: Path
) -> None:
    facts, out = make(), tmp_path / "index"
    file, data = out / facts["vectors"], bytearray((out / facts["vectors"]).read_bytes())
    told = json.loads((out / INFO).read_text())
    changed = {"format": {"format": 9}, "field": {"embed_dim": "x"}, "elsewhere": {"list": "../list"}}
    if wrong == "cut":
        file.write_bytes(data[:-100])
    elif wrong == "flipped":
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    elif wrong == "no json":
        (out / INFO).write_text("{")
    elif wrong in changed:
        (out / INFO).write_text(json.dumps(told | changed[wrong]))
    else:
        (out / facts["vectors" if wrong == "no vectors" else "list"]).unlink()
    if wrong != "flipped":  # a search does not read the whole file
        with pytest.raises(ValueError, match=r"damaged|JSON|format 9"):
            Index.open(out)
    with pytest.raises(ValueError, match=r"damaged|JSON|format 9"):
        make()
    make(overwrite=True)
    check(out, clip, pictures, names_in(pictures))


@pytest.mark.parametrize(
    ("place", "message"), [("notes.txt", "is a file"), ("full", "is not empty and holds no index")]
)
def test_a_bad_place_is_named_and_left_alone(place: str, message: str, make: Make, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    write(tmp_path / "full", 1)
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=message):
            make(out=tmp_path / place, overwrite=overwrite)
    assert (tmp_path / "notes.txt").read_text() == "mine" and names_in(tmp_path / "full") == ["001.png"]


def test_without_usearch_the_extra_is_named(
    make: Make, tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make()
    monkeypatch.setitem(sys.modules, "usearch", None)
    monkeypatch.setitem(sys.modules, "usearch.index", None)
    for call in (lambda: make(), lambda: Index.open(tmp_path / "index")):
        with pytest.raises(ValueError, match=r"pip install tinyclip\[search\]"):
            call()


def test_bad_searches_are_refused(make: Make, tmp_path: Path) -> None:
    make()
    with Index.open(tmp_path / "index") as index:
        for features, message in (
            (np.ones(23), "do not fit"),
            (np.ones((2, 2, 24)), "do not fit"),
            (np.zeros(24), "not all 0"),
            (np.full(24, np.nan), "finite"),
        ):
            with pytest.raises(ValueError, match=message):
                index.search(features)
        with pytest.raises(ValueError, match="at least 1"):
            index.search(np.ones(24), 0)
        assert index.search(np.ones((0, 24))) == []
        for path in ("../secret.png", "/etc/passwd", "more/../../x"):
            with pytest.raises(ValueError, match="not below"):
                index.file(path)


# --- vectors


def test_the_graph_finds_what_comparing_all_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((3000, 32)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    made = Vectors(32)
    made.add(np.arange(3000), rows)
    made.remove(np.arange(0, 3000, 3))
    made.save(tmp_path / "vectors")
    viewed = Vectors.open(tmp_path / "vectors", 32)
    assert len(viewed) == 2000 and sorted(viewed.keys()) == [i for i in range(3000) if i % 3]
    np.testing.assert_allclose(viewed.get([1, 2999]), rows[[1, 2999]], atol=1e-3)
    queries = rng.standard_normal((50, 32))
    cosines = queries @ rows.T.astype(float) / np.linalg.norm(queries, axis=1, keepdims=True)
    cosines[:, ::3] = -2
    best = np.sort(cosines, 1)[:, ::-1][:, :10]
    for exact in (True, False):
        found, given = viewed.search(queries, 10, exact)
        right = [np.isclose(g, b, atol=2e-4).mean() for g, b in zip(given, best, strict=True)]
        assert np.mean(right) == 1
        for keys, row, values in zip(found, cosines, given, strict=True):
            np.testing.assert_allclose(values, row[keys.astype(int)], atol=2e-4)
    found, _ = viewed.search(queries, 5000, exact=False)  # more than there are: returns all
    assert all(len(set(keys.tolist())) == 2000 for keys in found)
    with pytest.raises(ValueError, match="vectors of 32 numbers, not 31"):
        Vectors.open(tmp_path / "vectors", 31)
    (tmp_path / "vectors").write_bytes(b"no vectors")
    with pytest.raises(ValueError, match="damaged"):
        Vectors.open(tmp_path / "vectors", 32)


def test_a_large_index_follows_the_graph(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make()
    asked: list[bool] = []
    searched = Vectors.search

    def spy(self: Vectors, queries: np.ndarray, k: int, exact: bool) -> Any:
        asked.append(exact)
        return searched(self, queries, k, exact)

    monkeypatch.setattr(Vectors, "search", spy)
    with Index.open(tmp_path / "index") as index:
        index.search(np.ones(24), 3)
        monkeypatch.setattr(search, "EXACT", 11)
        index.search(np.ones(24), 3)
        index.search(np.ones(24), 3, exact=True)
    assert asked == [True, False, True] and vectors.EXACT >= 10_000


# --- commands


def command(monkeypatch: pytest.MonkeyPatch, capsys: Any, *arguments: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["tinyclip", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    said = capsys.readouterr()
    return int(end.value.code or 0), said.out, said.err


def test_the_commands_find_show_and_draw(
    model: Path, clip: Pipeline, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out = tmp_path / "index"
    (pictures / "words.jpg").write_text("no picture")
    code, said, _ = command(monkeypatch, capsys, "index", model, pictures, "-o", out)
    assert code == 0 and "12 pictures in" in said and "12 added" in said and "corrupt_image" in said
    code, said, _ = command(monkeypatch, capsys, "index", model, pictures, "-o", out)
    assert code == 0 and "nothing has changed" in said

    (tmp_path / "queries.txt").write_text("the sea\n\n  a cat \n")
    query = ("search", out, "a red apple", "--queries", tmp_path / "queries.txt", "--image", pictures / "004.png")
    code, said, _ = command(monkeypatch, capsys, *query, "--json", "-k", 3)
    told = json.loads(said)
    texts = ["a red apple", "the sea", "a cat"]
    assert code == 0 and [q.get("text") or q["image"] for q in told["queries"]] == [*texts, str(pictures / "004.png")]
    images = clip.encode_image([pictures / name for name in names_in(pictures)]).double()
    features = torch.cat([clip.encode_text(texts), clip.encode_image(pictures / "004.png")]).double()
    for cosines, query_told in zip(features @ images.T, told["queries"], strict=True):
        best = cosines.sort(descending=True).values[:3].tolist()
        assert [row["cosine"] for row in query_told["results"]] == pytest.approx(best, abs=5e-3)  # computed in bfloat16
        assert [row["rank"] for row in query_told["results"]] == [1, 2, 3]
        assert all(Path(row["path"]).is_relative_to(pictures) for row in query_told["results"])
    assert told["queries"][3]["results"][0]["path"] == str(pictures / "004.png")

    (pictures / "004.png").unlink()
    code, said, err = command(monkeypatch, capsys, "search", out, "the sea", "-k", 99, "--sheet", tmp_path / "s.png")
    lines = said.splitlines()
    assert code == 0 and len(lines) == 13 and lines[0].split() == ["rank", "cosine", "path"]
    assert [line for line in lines if line.endswith(f"{pictures / '004.png'}  (missing)")]
    assert "has only 12 pictures" in err
    with Image.open(tmp_path / "s.png") as drawn:
        assert drawn.size == (sheet.GAP + 5 * (sheet.SIDE + sheet.GAP), drawn.height)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["INDEX"], "nothing to search for"),
        (["INDEX", "  "], "a query is empty"),
        (["INDEX", "--queries", "EMPTY"], "contains no queries"),
        (["INDEX", "--queries", "none.txt"], "No such file"),
        (["INDEX", "--image", "none.png"], "no such file"),
        (["INDEX", "cat", "--sheet", "x.gif"], "written as .png"),
        (["INDEX", "cat", "--sheet", "INSIDE"], "empty.txt is a file, so a.png cannot be in it"),
        (["INDEX", "cat", "--dtype", "x"], "choose auto, float32, bfloat16 or float16\n"),
        (["INDEX", "cat", "--model", "none"], "give its new location with --model"),
        (["INDEX", "cat", "--model", "OTHER"], "made with another model"),
        (["none", "cat"], "not an index; make one with"),
    ],
)
def test_a_bad_search_is_one_line(
    arguments: list[str],
    message: str,
    model: Path,
    clip: Pipeline,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    fingerprint = search.open_model(str(model))[1]
    build(clip, pictures, tmp_path / "index", model=str(model), fingerprint=fingerprint)
    (tmp_path / "empty.txt").write_text("\n")
    other = Pipeline(random_model(clip.model.config, 1, torch.float32), clip.tokenizer, clip.preprocessing)
    other.save(tmp_path / "other")
    places = {"INDEX": tmp_path / "index", "EMPTY": tmp_path / "empty.txt", "OTHER": tmp_path / "other"}
    places |= {"INSIDE": places["EMPTY"] / "a.png"}
    code, out, err = command(monkeypatch, capsys, "search", *(places.get(a, a) for a in arguments))
    assert code == 2 and message in err and err.count("\n") == 1 and out == ""


def test_errors_that_need_no_model_come_before_it(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "none").mkdir()
    for folder, out, message in (
        (tmp_path / "gone", tmp_path / "index", "no such folder"),
        (tmp_path / "none", tmp_path / "index", "no pictures"),
        (pictures, pictures, "holds no index"),
    ):
        code, _, err = command(monkeypatch, capsys, "index", tmp_path / "no model", folder, "-o", out)
        assert code == 2 and message in err and err.count("\n") == 1
    assert not (tmp_path / "index").exists()


# --- contact sheets


def test_a_sheet_has_each_picture_in_its_place(tmp_path: Path) -> None:
    colours = [(200, 30, 30), (30, 200, 30), (30, 30, 200)]
    for i, colour in enumerate(colours):
        Image.new("RGB", (90, 60), colour).save(tmp_path / f"{i}.png")
    tiles = [
        sheet.Tile(tmp_path / f"{i}.png", (f"{i}", "a name that is far too long to stand there")) for i in range(3)
    ]
    (tmp_path / "broken.png").write_text("no picture")
    tiles += [sheet.Tile(tmp_path / "gone.png", ("x",)), sheet.Tile(tmp_path / "broken.png", ("y",))]
    sheet.draw(tmp_path / "sheet.png", [("some words", [*tiles, tiles[0]]), (tmp_path / "1.png", tiles[:1])])
    with Image.open(tmp_path / "sheet.png") as drawn:
        picture = np.asarray(drawn.convert("RGB")).astype(int)
    step, top = sheet.SIDE + sheet.GAP, sheet.GAP + sheet._head("some words") + sheet.SIDE // 2
    for i, colour in enumerate(colours):
        assert np.abs(picture[top, sheet.GAP + i * step + sheet.SIDE // 2] - colour).max() < 3
    grey = np.asarray([0xEC, 0xEF, 0xF1])
    for i in (3, 4):  # empty tiles with a word
        tile = picture[top - 90 : top + 90, sheet.GAP + i * step + 5 : sheet.GAP + i * step + 195]
        assert (tile == grey).all(-1).mean() > 0.9 and (tile != grey).any()
    below = top + sheet._step(tiles)
    assert np.abs(picture[below, sheet.GAP + sheet.SIDE // 2] - colours[0]).max() < 3  # the sixth starts a new row
    assert len(list(tmp_path.glob(".*.tmp"))) == 0


def test_small_copies_of_thin_and_odd_pictures(tmp_path: Path) -> None:
    Image.new("RGB", (3000, 2), "red").save(tmp_path / "thin.png")
    Image.fromarray(np.full((30, 20), 25_700, np.uint16)).save(tmp_path / "16.png")
    clear = Image.new("P", (8, 8))
    clear.save(tmp_path / "clear.png", transparency=0)
    assert sheet.small_copy(tmp_path / "thin.png", 200).size == (200, 1)
    deep = sheet.small_copy(tmp_path / "16.png", 60)
    assert deep.size == (40, 60) and deep.getpixel((5, 5)) == (100, 100, 100, 255)
    assert sheet.small_copy(tmp_path / "clear.png", 8).getpixel((5, 5))[3] == 0  # type: ignore[index]
    sheet.draw(tmp_path / "sheet.png", [("words", [sheet.Tile(tmp_path / "thin.png", ())])])
    assert page.thumbnail(tmp_path / "thin.png", "x").startswith("<img")


def test_a_sheet_too_large_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="501 pictures are too many"):
        sheet.draw(tmp_path / "s.png", [("x", [sheet.Tile(tmp_path / "a.png", ())] * 501)])
    assert not (tmp_path / "s.png").exists()


def test_an_exact_copy_of_a_loaded_model_has_its_fingerprint(model: Path, tmp_path: Path) -> None:
    """The compute dtype does not matter."""
    prints = {search.open_model(str(model), dtype=dtype)[1] for dtype in ("float32", "bfloat16")}
    copy = tmp_path / "copy"
    tinyclip.load(model).save(copy)
    assert prints == {search.open_model(str(copy))[1]}
