"""Cached teachers: compared with the live teacher on the same views, in runs, and when they do not match."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
import zlib
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file, save_file

from tests.helpers.models import small_config
from tests.helpers.processes import assert_same, end, start, start_command
from tests.helpers.runs import run, stage, stopped
from tests.helpers.shards import good, picture, write_shard
from tinyclip.cli.main import main
from tinyclip.common.distributed import gather_objects, is_main, processes
from tinyclip.compress.inheritance import inherit
from tinyclip.data.loader import Batch, close_loader, training_loader
from tinyclip.data.samples import captions_of, image_of
from tinyclip.data.shards import read_shards
from tinyclip.inference.pipeline import load
from tinyclip.inputs.augment import Augment, View
from tinyclip.inputs.tokenizer import clip_tokenizer
from tinyclip.inputs.transforms import Preprocess
from tinyclip.model.model import CLIP
from tinyclip.recipe.recipe import Recipe
from tinyclip.recipe.stage import Stage
from tinyclip.teachers import make_cache as making
from tinyclip.teachers.cache import Cache, FeatureFile, draw_stored, open_caches
from tinyclip.teachers.make_cache import make_cache
from tinyclip.teachers.teacher import CachedTeacher, Teacher
from tinyclip.train import loop
from tinyclip.train.stage_start import starting_student
from tinyclip.train.step import Trainee
from tinyclip.zoo.checkpoint import save_checkpoint

AUGMENT = Augment(scale=(0.5, 1), rotate=15, colour=0.3, background=True)
VIEWS = AUGMENT.model_dump(mode="json")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`data` (3 shards, 42 samples, one of them bad), `teacher`, `wide` with another embed_dim, and a cache of each."""
    folder = tmp_path_factory.mktemp("cache")
    (folder / "data").mkdir()
    for i in range(3):
        samples = [good((7 * i + j) % 30) | {"key": f"{i}/{j:05d}"} for j in range(14)]
        write_shard(folder / "data" / f"{i}.tar", samples)
    write_shard(folder / "data" / "3.tar", [good(1), {"key": "bad", "jpg": picture(0)[:200], "txt": b"truncated"}])
    tokenizer = clip_tokenizer()
    tokenizer = tokenizer.pruned(tokenizer.kept_ids(["caption words"]))
    for i, (name, embed_dim) in enumerate((("teacher", 24), ("wide", 40))):
        torch.manual_seed(i)
        config = small_config(vocab_size=tokenizer.vocab_size, image_size=16)
        model = CLIP(config.model_copy(update={"embed_dim": embed_dim}))
        save_checkpoint(folder / name, model, tokenizer, Preprocess(image_size=16))
        cached(folder, folder / f"cache-{name}", name)
    return folder


def cached(place: Path, output: Path, teacher: str = "teacher", **changes: Any) -> making.Report:
    settings: dict[str, Any] = {"augment": AUGMENT, "draws": 3, "workers": 0, "batch_size": 8} | changes
    return make_cache(load(place / teacher), teacher, place / "data", output, **settings)


def recipe(place: Path, output: Path, caches: Any = None, **changes: Any) -> Recipe:
    data: dict[str, Any] = {
        "teacher": {"cache": caches or str(place / "cache-teacher")},
        "data": str(place / "data"),
        "output": str(output),
        "workers": 0,
        "device": "cpu",
        "precision": "float32",
        "log_every": 1,
        "save_every": 2,
        "stages": [stage(augment=VIEWS, start=str(place / "teacher"))],
    }
    return Recipe.model_validate(data | changes)


def stored(folder: Path) -> dict[tuple[str, str], dict[str, np.ndarray]]:
    """Return (shard, key) -> what a cache stores for the sample, without using the cache's reader."""
    found = {}
    for file in (folder / "features").iterdir():
        tensors = load_file(file)
        for i, key in enumerate(json.loads(tensors["keys"].tobytes())):
            rows = slice(*tensors["text_offsets"][i : i + 2].tolist())
            sample = {"views": tensors["views"][i], "image": tensors["image_features"][i]}
            found[f"{file.stem}.tar", key] = sample | {"text": tensors["text_features"][rows]}
    return found


def batches(place: Path, caches: list[Cache], count: int) -> list[Batch]:
    loader = training_loader(
        place / "data",
        tokenizer=caches[0].tokenizer,
        context_length=12,
        image_size=16,
        augment=Augment(),  # not used
        batch_size=8,
        workers=0,
        seed=3,
        stored=partial(draw_stored, caches),
    )
    source = iter(loader)
    found = [next(source) for _ in range(count)]
    close_loader(loader)
    return found


# --- what is stored ---------------------------------------------------------------------------------------------


def test_every_sample_is_stored_with_what_the_teacher_says(place: Path) -> None:
    clip, found = load(place / "teacher"), stored(place / "cache-teacher")
    seen = 0
    for sample in read_shards(place / "data"):
        shard, key = sample["__shard__"], sample["__key__"]
        if key == "bad":
            assert (shard, key) not in found
            continue
        mine, image, seen = found[shard, key], image_of(sample), seen + 1
        assert mine["views"].shape == (3, 13) and mine["image"].dtype == np.float16
        pixels = [View(*row).apply(image, 16) for row in mine["views"].tolist()]
        expected = clip.encode_image([torch.from_numpy(clip.preprocessing.normalise(p)) for p in pixels])
        assert np.allclose(mine["image"], expected.numpy(), atol=5e-4)
        assert np.allclose(mine["text"], clip.encode_text(captions_of(sample)).numpy(), atol=5e-4)
    assert seen == len(found) == 43
    report = (place / "cache-teacher" / "skipped.jsonl").read_text()
    assert json.loads(report)["key"] == "bad" and "damaged" in report


def test_the_student_sees_the_stored_views_with_their_features(place: Path) -> None:
    """Pixels are recreated from the file's numbers, with features of the same draw and caption."""
    found, samples = stored(place / "cache-teacher"), list(read_shards(place / "data"))
    raw = {(s["__shard__"], s["__key__"]): s for s in samples}
    keys = {key: shard for shard, key in raw}
    tokenizer, visited = load(place / "teacher").tokenizer, set()
    for batch in batches(place, [Cache.load(place / "cache-teacher")], 30):
        ((images, texts),) = batch.teacher
        assert images.dtype == texts.dtype == torch.float16
        for i, name in enumerate(batch.keys):
            mine, sample = found[keys[name], name], raw[keys[name], name]
            views = [View(*row).apply(image_of(sample), 16) for row in mine["views"].tolist()]
            draw = next(k for k in range(3) if np.array_equal(views[k], batch.images[i].numpy()))
            assert np.array_equal(images[i].numpy(), mine["image"][draw])
            tokens = tokenizer(captions_of(sample), 12)
            caption = next(k for k in range(2) if np.array_equal(tokens[k], batch.tokens[i].numpy()))
            assert np.array_equal(texts[i].numpy(), mine["text"][caption])
            visited.add((name, draw, caption))
    assert {v[1:] for v in visited} == {(draw, caption) for draw in range(3) for caption in range(2)}
    assert len(visited) > 120  # of 258


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float16, 1e-3), (np.float32, 1e-6)])
def test_losses_are_those_of_the_live_teacher(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: Any, tolerance: float
) -> None:
    """Two equal students train on the same batches. Float16 has 11 bits, so features have relative errors up to 2**-12
    and logits of 50 are off by some thousandths in both directions; in float32 only rounding remains."""
    monkeypatch.setattr(making, "STORED", dtype)
    cached(place, tmp_path / "cache")
    caches, clip = open_caches([tmp_path / "cache"], place / "data"), load(place / "teacher")
    settings = stage(augment=VIEWS, loss={"image_affinity": 0.5, "feature": 0.1, "student_scale": 50})
    chosen = Stage.model_validate(settings)
    live, losses = Teacher(clip.model, clip.preprocessing), []
    for teacher in (live, CachedTeacher(caches[0].embed_dim, [torch.tensor(caches[0].info.scale)])):
        student = inherit(clip.model, chosen.student.apply(clip.model.config)).train()
        trainee = Trainee(student, chosen, teacher, clip.tokenizer, clip.preprocessing, "float32")
        losses.append([trainee.step(b, i)["loss"].item() for i, b in enumerate(batches(place, caches, 5))])
    assert losses[0] == pytest.approx(losses[1], rel=tolerance)
    assert len(set(losses[0])) == 5 and teacher.scale.item() == live.scale.item()


def test_several_teachers_are_averaged_in_their_targets(place: Path) -> None:
    """Compare with one cross-entropy with the mean of the softmax targets, in float64; feature sizes differ."""
    caches = open_caches([place / "cache-teacher", place / "cache-wide"], place / "data")
    (batch,) = batches(place, caches, 1)
    scales = [torch.tensor(20.0), torch.tensor(70.0)]
    teacher = CachedTeacher(caches[0].embed_dim, scales)
    chosen = Stage.model_validate(stage(augment=VIEWS, loss={"student_scale": 30, "text_affinity": 1}))
    model = load(place / "teacher").model
    student = inherit(model, chosen.student.apply(model.config)).double().train()
    trainee = Trainee(student, chosen, teacher, caches[0].tokenizer, caches[0].preprocess, "float32")
    assert [image.shape[1] for image, _ in batch.teacher] == [24, 40]
    image, text = (F.normalize(torch.randn(8, 20, dtype=torch.float64), dim=1) for _ in range(2))
    theirs = [(i.double(), t.double()) for i, t in batch.teacher]
    terms = trainee._teacher_terms({"image": image, "text": text}, theirs, None)
    logits = [scale * i @ t.T for scale, (i, t) in zip(scales, theirs, strict=True)]
    mine = 30 * image @ text.T
    rows = -(sum(x.softmax(1) for x in logits) / 2 * mine.log_softmax(1)).sum(1).mean()
    columns = -(sum(x.T.softmax(1) for x in logits) / 2 * mine.T.log_softmax(1)).sum(1).mean()
    assert terms["affinity"].item() == pytest.approx(((rows + columns) / 2).item(), rel=1e-12)
    others = ~torch.eye(8, dtype=torch.bool)
    within = [(scale * t @ t.T)[others].view(8, 7).softmax(1) for scale, (_, t) in zip(scales, theirs, strict=True)]
    own = (30 * text @ text.T)[others].view(8, 7).log_softmax(1)
    assert terms["text_affinity"].item() == pytest.approx(-(sum(within) / 2 * own).sum(1).mean().item(), rel=1e-12)


# --- runs -------------------------------------------------------------------------------------------------------


def stopped_and_resumed(chosen: Recipe, at: int) -> None:
    started = loop.start(chosen)
    stopped(started, at)
    run(chosen, resume=True)


def test_a_run_without_its_teachers_resumes_exactly(place: Path, tmp_path: Path) -> None:
    """Two cached teachers, a given shape, then learned masks; stopped while they are learned."""
    (tmp_path / "gone").mkdir()
    shutil.copytree(place / "teacher", tmp_path / "start")
    auto = {"target_sparsity": 0.85, "steps": 3, "ramp_steps": 2, "lr": 0.6}
    manual = stage("a", augment=VIEWS, start=str(tmp_path / "start"), steps=2)
    learned = stage("b", augment=VIEWS, inherit="auto", student={}, auto=auto)
    settings: dict[str, Any] = {"stages": [manual, learned], "workers": 1}
    caches = [str(place / "cache-teacher"), str(place / "cache-wide")]
    (place / "teacher").rename(tmp_path / "gone" / "teacher")
    try:
        run(recipe(place, tmp_path / "whole", caches, **settings))
        parts = recipe(place, tmp_path / "parts", caches, **settings)
        started = loop.start(parts)
        stopped(started, 2, "b")
        run(parts, resume=True)
    finally:
        (tmp_path / "gone" / "teacher").rename(place / "teacher")
    assert_same(tmp_path / "whole", tmp_path / "parts")


def recorded(settings: dict[str, Any], place: Path) -> None:
    """Run one process of a run; the first writes the batches of all processes, and the losses."""
    step, found = Trainee.step, []

    def watched(self: Trainee, batch: Batch, number: int) -> Any:
        metrics = step(self, batch, number)
        found.append(([vars(share) for share in gather_objects(batch)], metrics["loss"].item()))
        return metrics

    Trainee.step = watched  # type: ignore[method-assign]
    with processes():
        loop.run(loop.start(Recipe.model_validate(settings)))
        if is_main():
            torch.save(found, place)


def joined(shares: list[dict[str, Any]]) -> Batch:
    images, tokens, groups = (torch.cat([share[name] for share in shares]) for name in ("images", "tokens", "groups"))
    teachers = zip(*(share["teacher"] for share in shares), strict=True)
    features = [(torch.cat([i for i, _ in each]), torch.cat([t for _, t in each])) for each in teachers]
    return Batch(images, tokens, groups, [key for share in shares for key in share["keys"]], teacher=features)


def test_two_processes_with_micro_batches_train_as_one_without(place: Path, tmp_path: Path) -> None:
    """Use the same batches; several teachers, each process with its share of their features, in pieces of 3 and 1."""
    caches = [str(place / "cache-teacher"), str(place / "cache-wide")]
    settings = stage(augment=VIEWS, start=str(place / "teacher"), steps=3, loss={"image_affinity": 0.5})
    chosen = recipe(place, tmp_path / "run", caches, stages=[settings | {"micro_batch": 3}])
    assert end(start(recorded, 2, chosen.model_dump(mode="json"), tmp_path / "found.pt")) == [0, 0]
    alone = loop.start(recipe(place, tmp_path / "alone", caches, stages=[settings]))
    trainee = Trainee(
        starting_student(alone, 0, None),
        alone.recipe.stages[0],
        alone.teacher,
        alone.tokenizer,
        alone.preprocess,
        "float32",
    )
    trainee.train()
    for i, (shares, loss) in enumerate(torch.load(tmp_path / "found.pt", weights_only=False)):
        assert [len(share["keys"]) for share in shares] == [4, 4]
        assert trainee.step(joined(shares), i)["loss"].item() == pytest.approx(loss, rel=1e-5)
    assert i == 2


def test_a_sample_that_the_cache_lacks_is_skipped_and_listed(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "cache-teacher", tmp_path / "cache")
    file = tmp_path / "cache" / "features" / "1.safetensors"
    tensors, header = load_file(file), FeatureFile(file)
    gone = json.loads(tensors["keys"].tobytes())[-1]
    for name in ("key_hashes", "views", "image_features", "text_offsets"):
        tensors[name] = tensors[name][:-1].copy()
    metadata = {"source": json.dumps(header.source), "skipped": "[]"}
    metadata["checksums"] = json.dumps({name: zlib.crc32(tensor.data) for name, tensor in tensors.items()})
    save_file(tensors, file, metadata)
    run(
        recipe(
            place, tmp_path / "run", str(tmp_path / "cache"), stages=[stage(augment=VIEWS, inherit="none", steps=12)]
        )
    )
    lines = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    missed = [line for line in lines if line["key"] == gone]
    assert missed and all(m["shard"] == "1.tar" and m["cause"] == "not_in_cache" for m in missed)
    assert {line["key"] for line in lines} <= {gone, "bad"}


def test_a_dry_run_and_a_plan_need_no_teacher(place: Path, tmp_path: Path) -> None:
    from tinyclip.train.plan import plan
    from tinyclip.train.smoke import measured_speed, smoke

    both = [str(place / "cache-teacher"), str(place / "cache-wide")]
    chosen = recipe(place, tmp_path / "run", both)
    assert [r["stage"] for r in smoke(chosen)] == ["50"]
    (entry,) = plan(chosen, speed=measured_speed(chosen, steps=1, pairs=4))["stages"]
    live = plan(chosen.model_copy(update={"teacher": str(place / "teacher")}))["stages"][0]
    assert entry["memory_bytes"]["teacher"] == 0 < live["memory_bytes"]["teacher"]
    assert entry["flops"] < live["flops"] and entry["hours"] > 0


# --- mismatches -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": [stage(augment=VIEWS)]}, "stages.0.start: name the checkpoint to inherit from"),
        ({"stages": [stage(start="teacher")]}, "stages.0.start: name the checkpoint"),
        ({"stages": [stage(towers="image", start="x", student={})]}, "stages.0.towers: .* no weights"),
        ({"stages": [stage(start="x", loss={"feature": 1})], "teacher": {"cache": ["a", "b"]}}, "loss.feature: .* 2"),
        ({"teacher": {"cache": []}}, "teacher"),
        ({"teacher": {"cash": "a"}}, "teacher"),
    ],
)
def test_recipes_that_a_cache_cannot_serve(place: Path, tmp_path: Path, changes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe(place, tmp_path / "run", **changes)


def shorter(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def other_time(folder: Path) -> None:
    """A copy of the data has different file times but is still the same data."""
    for path in folder.glob("*.tar"):
        os.utime(path, (1, 1))


def changed(path: Path) -> None:
    """Change one byte of a picture, keeping the file size."""
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)


def flipped(path: Path) -> None:
    """Change one byte of the text features, which are the last or second-to-last tensor in the file."""
    data, stored_ = bytearray(path.read_bytes()), load_file(path)
    at = data.rindex(stored_["text_features"].tobytes())
    data[at + 5] ^= 1
    path.write_bytes(data)


def damage(kind: str, place: Path, cache: Path, data: Path) -> None:
    features = cache / "features" / "1.safetensors"
    if kind == "no cache":
        (cache / "cache.json").unlink()
    elif kind == "bad info":
        (cache / "cache.json").write_text('{"version": 2}')
    elif kind == "truncated":
        shorter(features)
    elif kind == "flipped":
        flipped(features)
    elif kind == "missing":
        features.unlink()
    elif kind == "changed":
        changed(data / "1.tar")
    elif kind == "grown":
        write_shard(data / "4.tar", [good(3)])
    elif kind == "other size":
        info = json.loads((cache / "cache.json").read_text())
        (cache / "cache.json").write_text(json.dumps(info | {"draws": 2}))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no cache", "not a teacher cache"),
        ("bad info", r"cache.json: version: "),
        ("truncated", r"1.safetensors: damaged .*; run the same `tinyclip cache` again to repair it"),
        (
            "flipped",
            r"1.safetensors: damaged \(text_features does not match its checksum\); run the same `tinyclip cache`",
        ),
        ("missing", r"lacks 1 of the 4 shards of .* \(the first: 1.tar\)"),
        ("changed", r"data/1.tar has changed since"),
        ("grown", r"lacks 1 of the 5 shards of .* \(the first: 4.tar\)"),
        ("other size", r"1.safetensors: its features do not fit|0.safetensors: its features do not fit"),
    ],
)
def test_caches_that_do_not_fit_are_refused_before_anything(
    place: Path, tmp_path: Path, kind: str, message: str
) -> None:
    shutil.copytree(place / "cache-teacher", tmp_path / "cache")
    shutil.copytree(place / "data", tmp_path / "data")
    other_time(tmp_path / "data")
    chosen = recipe(place, tmp_path / "run", str(tmp_path / "cache"), data=str(tmp_path / "data"))
    loop.start(chosen)
    shutil.rmtree(tmp_path / "run")
    damage(kind, place, tmp_path / "cache", tmp_path / "data")
    with pytest.raises(ValueError, match=message):
        loop.start(chosen)
    assert not (tmp_path / "run").exists()


def test_stages_that_want_other_views_are_refused(place: Path, tmp_path: Path) -> None:
    start, larger = str(place / "teacher"), {"vision": {"image_size": 32}}
    for stages, message in (
        ([stage(start=start)], r"stages.0.augment.scale: \(0.9, 1.0\), but the views of .* have \(0.5, 1.0\)"),
        ([stage(start=start, augment=VIEWS | {"rotate": 3})], "stages.0.augment.rotate: 3.0"),
        ([stage(start=start, augment=VIEWS, student=larger)], r"stages.0 \(50\): the student sees 32 px"),
    ):
        with pytest.raises(ValueError, match=message):
            loop.start(recipe(place, tmp_path / "run", stages=stages))
    cached(place, tmp_path / "other", seed=1)
    both = [str(place / "cache-teacher"), str(tmp_path / "other")]
    with pytest.raises(ValueError, match=r"other and .*cache-teacher were made with a different seed"):
        loop.start(recipe(place, tmp_path / "run", both))
    assert not (tmp_path / "run").exists()


def test_a_start_with_another_vocabulary_is_refused(place: Path, tmp_path: Path) -> None:
    tokenizer = clip_tokenizer().pruned(clip_tokenizer().kept_ids(["another text"]))
    size = load(place / "teacher").tokenizer.vocab_size
    merges = (tokenizer.merges + clip_tokenizer().merges)[: size - 514]
    other = type(tokenizer)(merges, 12)
    save_checkpoint(
        tmp_path / "start", CLIP(small_config(vocab_size=size, image_size=16)), other, Preprocess(image_size=16)
    )
    stages = [
        stage(name, augment=VIEWS, start=str(start))
        for name, start in (("a", place / "teacher"), ("b", tmp_path / "start"))
    ]
    with pytest.raises(ValueError, match=r"stages.1.start: .* has a different vocabulary from the teacher"):
        loop.start(recipe(place, tmp_path / "run", stages=stages))
    assert not (tmp_path / "run").exists()


# --- creating a cache -------------------------------------------------------------------------------------------


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Run `tinyclip` with these arguments in this process and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["tinyclip", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


def test_the_command_goes_on_refuses_and_replaces(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    shutil.copytree(place / "data", data)
    basic = ["cache", place / "teacher", data, "--draws", 2, "--workers", 1, "--precision", "float32"]
    assert command(monkeypatch, *basic, "--augment", "rotate=15") == 0
    place_, said = data / "cache-teacher", capsys.readouterr().out
    assert "43 samples with 2 views and 86 captions in 4 shards" in said and "corrupt_image" in said
    assert f"teacher: {{cache: {place_}}}" in said
    times = {file: file.stat().st_mtime_ns for file in (place_ / "features").iterdir()}
    one = place_ / "features" / "1.safetensors"
    whole = one.read_bytes()
    for harm in (Path.unlink, shorter, flipped):
        harm(one)
        assert command(monkeypatch, *basic, "--augment", "rotate=15") == 0
        assert "3 shards of it were there" in capsys.readouterr().out
        again = {file: file.stat().st_mtime_ns for file in (place_ / "features").iterdir()}
        assert [file.stem for file in times if times[file] != again[file]] == ["1"]
        assert len(one.read_bytes()) == len(whole)
    for arguments, message in (
        (basic, "differs in augment; choose another place with -o, or replace it with --overwrite"),
        ([*basic, "--augment", "rotate=999"], "--augment: rotate: "),
        ([*basic, "--augment", "rotate"], "write e.g. rotate=20"),
        ([*basic, "--precision", "float8"], "--precision float8"),
        ([*basic, "-o", data], "has no .tinyclip.json"),
        ([*basic, "--overwrite", "-o", data], "has no .tinyclip.json"),
        ([*basic, "-o", data / "0.tar"], "0.tar is a file"),
        (["cache", tmp_path / "none", data], "none"),
        (["cache", place / "teacher", tmp_path / "none"], "no such data folder"),
    ):
        assert command(monkeypatch, *arguments) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    shutil.copytree(place / "wide", tmp_path / "new" / "teacher")
    same = ["cache", tmp_path / "new" / "teacher", data, "--draws", 2, "--augment", "rotate=15"]
    assert command(monkeypatch, *same, "--precision", "float32") == 2
    assert "differs in weights" in capsys.readouterr().err
    assert command(monkeypatch, *same, "--overwrite") == 0
    assert Cache.load(place_).config.embed_dim == 40


def test_views_come_from_a_recipe(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import yaml

    larger = {"vision": {"image_size": 24}}
    stages = [stage("a", augment=VIEWS), stage("b", augment=VIEWS, student=larger)]
    data = {"teacher": str(place / "teacher"), "data": str(place / "data"), "output": "x", "stages": stages}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(data))
    basic = ["cache", place / "teacher", place / "data", "-o", tmp_path / "cache", "--recipe", tmp_path / "recipe.yaml"]
    assert command(monkeypatch, *basic, "--draws", 1) == 0
    info = Cache.load(tmp_path / "cache").info
    assert info.augment == AUGMENT and (info.image_size, info.draws) == (24, 1)
    capsys.readouterr()
    assert command(monkeypatch, *basic, "--augment", "rotate=3") == 2
    assert "either --recipe or --augment" in capsys.readouterr().err
    stages[1]["augment"] = VIEWS | {"rotate": 3}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(data))
    assert command(monkeypatch, *basic) == 2
    assert "stages a and b differ in `augment`" in capsys.readouterr().err


def same_features(one: Path, two: Path) -> bool:
    files = sorted(file.name for file in (one / "features").iterdir())
    if files != sorted(file.name for file in (two / "features").iterdir()):
        return False
    pairs = [(load_file(one / "features" / name), load_file(two / "features" / name)) for name in files]
    return all(np.array_equal(a[key], b[key]) for a, b in pairs for key in a)


def test_a_killed_cache_goes_on(place: Path, tmp_path: Path) -> None:
    """SIGKILL once some shards are done: those stay untouched, and the result equals that of an uninterrupted call."""
    data = tmp_path / "data"
    data.mkdir()
    for i in range(10):
        write_shard(data / f"{i}.tar", [good(j) | {"key": f"{i}-{j}"} for j in range(12)])
    arguments = ["cache", place / "teacher", data, "--draws", 4, "--batch-size", 1, "--workers", 0]
    features = data / "cache-teacher" / "features"
    (process,) = start_command(tmp_path, *arguments, "--precision", "float32", "--device", "cpu")
    while process.is_alive() and not list(features.glob("[0-9]*")):
        time.sleep(0.005)
    process.kill()
    assert end([process]) == [-signal.SIGKILL]
    done = {file: file.stat().st_mtime_ns for file in features.glob("[0-9]*")}
    assert 0 < len(done) < 10
    (features / ".9.safetensors.tmp").write_text("half of a file")
    clip, same = load(place / "teacher"), {"draws": 4, "batch_size": 1, "workers": 0}
    report = make_cache(clip, "teacher", data, data / "cache-teacher", augment=Augment(), **same)
    assert report.computed == 10 - len(done) and all(file.stat().st_mtime_ns == t for file, t in done.items())
    make_cache(clip, "teacher", data, tmp_path / "whole", augment=Augment(), **same)
    assert same_features(data / "cache-teacher", tmp_path / "whole")


def test_a_worker_that_dies_is_an_error_for_people(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["cache", place / "teacher", place / "data", "-o", tmp_path / "cache", "--draws", 3, "--workers", 1]
    arguments += ["--precision", "float32", "--device", "cpu"]
    item, parent = making.ShardViews._item, os.getpid()

    def killed(self: making.ShardViews, sample: dict[str, Any]) -> Any:
        if sample["__key__"] == "1/00004" and os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return item(self, sample)

    monkeypatch.setattr(making.ShardViews, "_item", killed)
    assert command(monkeypatch, *arguments) == 2
    said = capsys.readouterr().err
    assert "DataLoader worker (pid" in said and "run the same command again" in said and "Traceback" not in said
    assert [file.name for file in (tmp_path / "cache" / "features").iterdir()] == ["0.safetensors"]
    monkeypatch.undo()
    assert command(monkeypatch, *arguments) == 0
    assert "43 samples" in capsys.readouterr().out


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_two_calls_do_not_meet_in_one_folder(place: Path, tmp_path: Path, overwrite: list[str]) -> None:
    """The second call starts while the first is running, and changes nothing."""
    arguments = ["cache", place / "teacher", place / "data", "-o", tmp_path / "cache", "--draws", 3, "--device", "cpu"]
    codes = []

    def progress(done: int, total: int) -> None:
        if done and not codes:
            before = sorted(str(file) for file in (tmp_path / "cache").rglob("*"))
            codes.extend(end(start_command(tmp_path, *arguments, *overwrite)))
            assert sorted(str(file) for file in (tmp_path / "cache").rglob("*")) == before

    cached(place, tmp_path / "cache", progress=progress)
    said = (tmp_path / "0.err").read_text()
    assert codes == [2] and "another `tinyclip cache` is running here" in said and said.count("\n") == 1
    assert same_features(tmp_path / "cache", place / "cache-teacher")
    cached(place, tmp_path / "cache", overwrite=True)
    assert same_features(tmp_path / "cache", place / "cache-teacher")


def test_two_processes_share_the_shards(place: Path, tmp_path: Path) -> None:
    arguments = ["cache", place / "teacher", place / "data", "-o", tmp_path / "cache", "--draws", 3, "--batch-size", 8]
    arguments += ["--workers", 0, "--precision", "float32", "--device", "cpu"]
    for key, value in VIEWS.items():
        arguments += ["--augment", f"{key}={json.dumps(value)}"]
    assert end(start_command(tmp_path, *arguments, count=2)) == [0, 0]
    assert [("43 samples" in (tmp_path / f"{i}.out").read_text()) for i in range(2)] == [True, False]
    one, two = stored(tmp_path / "cache"), stored(place / "cache-teacher")
    assert one.keys() == two.keys()
    for key in one:
        assert all(np.array_equal(one[key][name], two[key][name]) for name in one[key])


def test_views_do_not_depend_on_teacher_or_workers(place: Path, tmp_path: Path) -> None:
    cached(place, tmp_path / "cache", workers=2, batch_size=5)
    one, two, wide = (stored(f) for f in (tmp_path / "cache", place / "cache-teacher", place / "cache-wide"))
    for key in two:
        assert np.array_equal(one[key]["views"], two[key]["views"])
        assert np.array_equal(wide[key]["views"], two[key]["views"])
        assert np.allclose(one[key]["image"], two[key]["image"], atol=1e-3)


def test_a_teacher_that_gives_no_numbers_is_refused(place: Path, tmp_path: Path) -> None:
    clip = load(place / "teacher")
    with torch.no_grad():
        clip.model.text_projection.fill_(float("inf"))
    with pytest.raises(ValueError, match=r"the teacher's features of .* are not finite"):
        make_cache(clip, "teacher", place / "data", tmp_path / "cache", augment=AUGMENT)
    assert not list((tmp_path / "cache" / "features").iterdir())


def test_data_of_which_nothing_can_be_used(place: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write_shard(tmp_path / "data" / "0.tar", [{"key": "a", "jpg": b"junk", "txt": b"t"}])
    with pytest.raises(ValueError, match="no sample could be used"):
        make_cache(load(place / "teacher"), "t", tmp_path / "data", tmp_path / "cache", augment=AUGMENT)


def test_lookups_keep_few_files_open(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tinyclip.teachers import cache as reading

    monkeypatch.setattr(reading, "OPEN_FILES", 2)
    cache = Cache.load(place / "cache-teacher")
    for shard, key in stored(place / "cache-teacher"):
        draw_stored([cache], shard, key, 2, Random(0))
        assert len(cache._files) <= 2
    with pytest.raises(ValueError, match="3 captions, but 2 in the teacher's cache"):
        draw_stored([cache], "0.tar", "0/00000", 3, Random(0))
