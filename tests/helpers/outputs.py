"""Every command that writes a folder, and a folder with their inputs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from tests.helpers.commands import tinyclip
from tests.helpers.models import small_config
from tests.helpers.shards import good, picture, write_shard
from tinyclip.inference.pipeline import Pipeline
from tinyclip.inputs.tokenizer import clip_tokenizer
from tinyclip.inputs.transforms import Preprocess
from tinyclip.model.model import CLIP

# Each command that writes a folder, with file names that almost match those it writes.
COMMANDS: dict[str, tuple[list[str], list[str]]] = {
    "distill": (["distill", "recipe.yaml", "--set", "output=OUT"], ["step-by-step.md", "stages/a/step-000001/x.txt"]),
    "inherit": (["inherit", "teacher", "OUT", "--shape", "text.layers=1"], ["model.safetensors.bak", "config.json~"]),
    "convert": (["convert", "teacher", "OUT", "--to", "hf"], ["tinyclip.json", "vocab.json.txt"]),
    "prune": (["vocab", "prune", "teacher", "OUT", "--texts", "texts.txt"], [".config.json.swp", "Readme.md"]),
    "export": (["export", "teacher", "--to", "hf", "-o", "OUT"], ["image.onnx", "open_clip_config.json"]),
    "compare": (["compare", "teacher", "other", "--data", "eval", "-o", "OUT"], ["figures/mine.svg", "report.htm"]),
    "pack": (["data", "pack", "pictures", "OUT"], ["shard-of-glass.tar", "shard-00001.tar", ".nv-meta/mine.yaml"]),
    "cache": (
        ["cache", "teacher", "data", "-o", "OUT", "--draws", "1", "--workers", "0", "--device", "cpu"],
        ["features/1.safetensors", "cache.json.bak"],
    ),
    "embed": (
        ["embed", "teacher", "pictures", "-o", "OUT"],
        ["image-of-results.png", "text-of-paper.docx", "image-00001.parquet", ".parts/00001.json"],
    ),
    "index": (
        ["index", "teacher", "pictures", "-o", "OUT"],
        ["pictures-of-grandma.zip", "vectors-of-flu.pdf", "pictures-7.sqlite", ".notes.tmp"],
    ),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models, data of all kinds and a recipe."""
    folder = tmp_path_factory.mktemp("ownership")
    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    tokenizer = tokenizer.pruned(tokenizer.kept_ids(["a photo of a caption words"]))
    for name in ("teacher", "other"):
        config = small_config(vocab_size=tokenizer.vocab_size, image_size=16)
        Pipeline(CLIP(config), tokenizer, Preprocess(image_size=16)).save(folder / name)
    (folder / "data").mkdir()
    write_shard(folder / "data" / "0.tar", [good(i) for i in range(20)])
    (folder / "pictures").mkdir()
    for name in ("cat", "dog"):
        (folder / "eval" / name).mkdir(parents=True)
        (folder / "eval" / name / "1.jpg").write_bytes(picture(len(name)))
        (folder / "pictures" / f"{name}.jpg").write_bytes(picture(len(name)))
        (folder / "pictures" / f"{name}.txt").write_text("a photo")
    (folder / "texts.txt").write_text("a photo\n")
    settings = {
        "teacher": str(folder / "teacher"),
        "data": str(folder / "data"),
        "output": "run",
        "device": "cpu",
        "workers": 0,
        "stages": [{"name": "a", "steps": 1, "batch_size": 8, "student": {"text": {"layers": 1}}}],
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings))
    return folder


def call(place: Path, command: str, out: Path, *more: str, code: int = 0) -> str:
    first, *words = COMMANDS[command][0]
    given = {path.name: str(path) for path in place.iterdir()}
    return tinyclip(first, *(given.get(word, word).replace("OUT", str(out)) for word in words), *more, code=code)


def tree(folder: Path) -> dict[str, object]:
    """Return the exact contents of a folder."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = path.readlink()
        else:
            found[name] = path.read_bytes() if path.is_file() else None
    return found
