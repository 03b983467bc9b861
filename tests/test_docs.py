"""Every snippet of the README and the docs runs, in a folder with the files it names."""

from __future__ import annotations

import io
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tarfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.helpers.commands import tinyclip
from tests.helpers.models import ROOT
from tests.helpers.shards import picture
from tests.helpers.shared import made_once
from tinyclip.model.config import vit_clip
from tinyclip.model.model import CLIP
from tinyclip.recipe.recipe import load_recipe
from tinyclip.zoo.convert import convert

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="session")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small checkpoints in the layouts of other projects."""
    return made_once(tmp_path_factory, "foreign", _fill_foreign)


def _fill_foreign(folder: Path) -> None:
    model = CLIP(vit_clip(24, (2, 64), (2, 64), 16, image_size=32))
    state = model.state_dict()
    torch.save(state | {"input_resolution": torch.tensor(32)}, folder / "ViT-B-32.pt")
    torch.save(state, folder / "open_clip_pytorch_model.bin")
    prefixed = {f"module.{key}": value for key, value in state.items()}
    torch.save({"state_dict": prefixed}, folder / "TinyCLIP-auto-ViT-45M-32-Text-18M-LAION400M.pt")
    convert(folder / "ViT-B-32.pt", folder / "clip-vit-base-patch32", "hf")


@pytest.fixture(scope="session")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The assets with a subset of the emoji, since some pages evaluate models on all of them, and half of the
    teacher's image blocks, which dozens of commands load, train and export."""
    return made_once(tmp_path_factory, "assets", _fill_assets)


def _fill_assets(folder: Path) -> None:
    (folder / "emoji").mkdir()
    for path in (ROOT / "assets").iterdir():
        if path.name not in ("emoji", "emoji-teacher"):
            (folder / path.name).symlink_to(path)
    tinyclip("inherit", ROOT / "assets" / "emoji-teacher", folder / "emoji-teacher", "--shape", "vision.layers=3")
    (folder / "emoji" / "templates.txt").symlink_to(ROOT / "assets" / "emoji" / "templates.txt")
    for part, count in (("train", 400), ("eval", 60)):
        classes = _cut(ROOT / "assets" / "emoji" / part / "shard-00000.tar.gz", folder / "emoji" / part, count)
        if part == "eval":
            (folder / "emoji" / part / "classnames.txt").write_text("".join(f"{name}\n" for name in classes))


def _cut(shard: Path, folder: Path, count: int) -> list[str]:
    """Write the first samples of a shard into a folder, a picture and a JSON each; return their classes."""
    folder.mkdir()
    classes = {}
    with tarfile.open(shard) as source, tarfile.open(folder / shard.name, "w:gz") as target:
        for number, member in enumerate(source.getmembers()):
            if number >= 2 * count and not member.name.startswith("twemoji-1f436."):  # a page names this file
                continue
            data = source.extractfile(member).read()  # type: ignore[union-attr]
            target.addfile(member, io.BytesIO(data))
            if member.name.endswith(".json"):
                classes[json.loads(data)["class"]] = True
    return list(classes)


@pytest.fixture
def workplace(tmp_path: Path, foreign: Path, assets: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The repository as a reader sees it, with small data and two-step recipes."""
    (tmp_path / "assets").symlink_to(assets)
    (tmp_path / "recipes").mkdir()
    for path in (ROOT / "recipes").glob("*.yaml"):
        shorten_recipe(path, tmp_path / "recipes" / path.name)
    for place in ("photos", "classes/red_fox", "classes/grey_wolf"):
        (tmp_path / place).mkdir(parents=True)
        for i in range(30):
            (tmp_path / place / f"{i}.jpg").write_bytes(picture(i))
            (tmp_path / place / f"{i}.txt").write_text("a red apple\na dog\n")
    (tmp_path / "photo.jpg").write_bytes(picture(1))
    (tmp_path / "products.csv").write_text("picture,title\nphotos/1.jpg,a red apple\n")
    (tmp_path / "templates.txt").write_text("a photo of a {c}\n")
    shutil.copytree(assets / "emoji-teacher", tmp_path / "my-clip")
    for path in foreign.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shorten_recipe(source: Path, target: Path) -> None:
    recipe = yaml.safe_load(source.read_text())
    if not recipe["data"].startswith("assets") and "teacher_shape" in recipe:  # pages plan it or dry-run it
        shutil.copy(source, target)
        return
    recipe.pop("evaluation", None)
    for stage in recipe["stages"]:
        stage |= {"steps": 2, "batch_size": 8}
        stage.setdefault("optimizer", {})["warmup_steps"] = 0
        if "auto" in stage:
            stage["auto"] |= {"steps": 1, "ramp_steps": 1}
        if "calibrated" in stage:
            stage["calibrated"]["batches"] = 2
    target.write_text(yaml.safe_dump(recipe))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_snippets_run(page: Path, workplace: Path) -> None:
    names: dict[str, Any] = {}
    for language, code in BLOCK.findall(page.read_text(encoding="utf-8")):
        if language == "python":
            (workplace / "snippet.py").write_text(code)
            found = runpy.run_path("snippet.py", init_globals=names, run_name="__main__")
            names = found if page.name == "own-loop.md" else {}  # one program in several snippets
        elif language == "yaml":
            (workplace / "full.yaml").write_text(code)
            shorten_recipe(workplace / "full.yaml", workplace / "recipe.yaml")
        elif language == "bash":
            for line in code.splitlines():
                assert line.startswith("tinyclip "), f"{page.name}: a command that no test runs: {line}"
                _check_recipe(shlex.split(line)[1:])
                if "distill recipes/emoji-25" in line:  # continues from the other recipe
                    tinyclip("distill", "recipes/emoji-50.yaml")
                tinyclip(*shlex.split(line)[1:])
        else:
            raise AssertionError(f"{page.name}: a block of {language!r} that no test runs")


def _check_recipe(words: list[str]) -> None:
    """A printed command must also be valid for the recipe as it is, not only for the shortened one."""
    recipe = next((ROOT / word for word in words if word.startswith("recipes/")), None)
    if recipe is not None:
        load_recipe(recipe, [value for option, value in pairwise(words) if option == "--set"])


@pytest.mark.parametrize("script", ["document_recipes.py", "document_commands.py", "figures.py"])
def test_what_is_written_by_a_script_is_up_to_date(script: str) -> None:
    command = [sys.executable, str(ROOT / "scripts" / script), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)|src=\"([^\"]+)\"", page.read_text(encoding="utf-8")):
            link = target[0] or target[1]
            if not link.startswith("http"):
                assert (page.parent / link).exists(), f"{page.name}: {link}"
