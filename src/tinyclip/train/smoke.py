"""Dry run of a recipe: two steps of every stage with the code of a real run, on random weights and synthetic data."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tinyclip.common.devices import best_precision, resolve_device
from tinyclip.data.loader import Batch
from tinyclip.data.pack import find_items, pack
from tinyclip.inference.pipeline import load
from tinyclip.inputs.tokenizer import BYTE_TOKENS, CLIPTokenizer, clip_tokenizer
from tinyclip.inputs.transforms import Preprocess
from tinyclip.model.config import CLIPConfig, TransformerConfig, VisionConfig
from tinyclip.model.model import CLIP
from tinyclip.recipe.recipe import Recipe
from tinyclip.recipe.stage import Stage
from tinyclip.recipe.student_shape import StudentShape
from tinyclip.teachers.make_cache import make_cache
from tinyclip.teachers.teacher import AnyTeacher, CachedTeacher, Teacher
from tinyclip.train import loop
from tinyclip.train.plan import Speed, shape_text, stage_shapes, teacher_config
from tinyclip.train.run import Evaluator, attention
from tinyclip.train.step import Trainee
from tinyclip.zoo.checkpoint import save_checkpoint

WORDS = ("red", "green", "blue", "round", "small", "old", "apple", "dog")
BATCH = 8  # maximum number of pairs per step
SMALL_VOCABULARY = BYTE_TOKENS + 2 + 64


def smoke(
    recipe: Recipe, small: bool = False, evaluator: Callable[[str], Evaluator] | None = None
) -> list[dict[str, Any]]:
    """Run two steps of every stage in a temporary folder, and return `stage`, `shape` and `seconds` of each.

    A stage with learned masks runs one step with masks and one after the cut; a stage that measures its masks uses two
    batches. A latency target becomes half of the MACs. Batches have at most `BATCH` pairs. Real checkpoints are read
    only for their shape, data not at all.

    Args:
        small: use a quarter of every width and head size, few tokens and pixels; layers and heads are unchanged.
        evaluator: makes the run's evaluator from a data folder, for recipes that evaluate.

    Raises:
        ValueError: as a run of the recipe would.
    """
    with tempfile.TemporaryDirectory(prefix="tinyclip-smoke-") as folder:
        short = shortened(recipe, Path(folder), small)
        run = loop.start(short)
        if short.evaluation and evaluator:
            run.evaluator = evaluator(short.evaluation.data)
        times: dict[str, float] = {}

        def note(event: dict[str, Any]) -> None:
            if event["event"] == "stage":
                times[event["stage"]] = time.perf_counter()

        run.listener = note
        loop.run(run)
        ends = [*list(times.values())[1:], time.perf_counter()]
        results = []
        for (name, begin), end in zip(times.items(), ends, strict=True):
            shape = shape_text(CLIPConfig.from_json(run.folder / "stages" / name / "last" / "config.json"))
            results.append({"stage": name, "shape": shape, "seconds": end - begin})
        return results


def shortened(recipe: Recipe, folder: Path, small: bool) -> Recipe:
    """Return the recipe with two steps per stage and a synthetic teacher, data and starts, all written to `folder`.

    Raises:
        ValueError: if the teacher's shape is unknown, a student does not fit its start, or the evaluation data is
            missing although the training data exists.
    """
    _check_evaluation(recipe)
    first, _ = teacher_config(recipe)
    shapes, _ = stage_shapes(recipe, first)
    reduce = reduced if small else lambda config: config
    data = recipe.model_dump(mode="json")
    pictures = make_pictures(folder / "pictures")
    pack(find_items(pictures, templates=["a {c}", "a photo of a {c}"]), folder / "data")
    data |= {"data": str(folder / "data"), "output": str(folder / "run"), "teacher_shape": None}
    data |= {"workers": min(recipe.workers, 1), "log_every": 1, "tracking": []}
    if recipe.evaluation:
        data["evaluation"] = {"data": str(pictures)}
    if recipe.caches:
        largest = max(reduce(config).vision.image_size for config in (first, *(shape.student for shape in shapes)))
        data["teacher"] = {"cache": _caches(recipe, folder, reduce(first), largest)}
    elif recipe.teacher is not None:
        data["teacher"] = random_checkpoint(folder / "teacher", reduce(first), recipe.seed)
    else:
        data["model"] = reduce(first).model_dump(mode="json")
    removed = 0.0
    for stage, short, shape in zip(recipe.stages, data["stages"], shapes, strict=True):
        short |= {"steps": 2, "batch_size": min(stage.batch_size, BATCH)}
        short["optimizer"]["warmup_steps"] = min(stage.optimizer.warmup_steps, 1)
        if stage.auto:
            short["auto"] |= {"steps": 1, "ramp_steps": None}
        if stage.calibrated:
            short["calibrated"]["batches"] = 2
        if stage.target:
            removed = _without_latency(short[stage.inherit], removed)
        if stage.start not in ("previous", "teacher"):
            place = folder / f"start-{stage.name}"
            short["start"] = random_checkpoint(place, reduce(shape.start), recipe.seed)
        if small and stage.student != StudentShape():
            # A stage that learns masks starts with its `student` shape; the cut happens in the stage.
            config = shape.start if shape.learned else shape.student
            short["student"] = {"like": reduce(config).model_dump(mode="json")}
    return Recipe.model_validate(data)


def _caches(recipe: Recipe, folder: Path, config: CLIPConfig, image_size: int) -> list[str]:
    """Make caches of random teachers with this shape for the data in `folder`."""
    places = []
    for i in range(len(recipe.caches)):
        clip = load(random_checkpoint(folder / f"teacher-{i}", config, recipe.seed + i))
        places.append(str(folder / f"cache-{i}"))
        views = recipe.stages[0].augment
        make_cache(clip, "random", folder / "data", places[-1], augment=views, image_size=image_size, draws=2)
    return places


def _without_latency(target: dict[str, Any], before: float) -> float:
    """Replace a latency target, which is meaningless for other sizes and machines, by a target that removes half of the
    MACs left after the fraction `before`. Return the total fraction removed; 0 if each tower has its own target."""
    if target["latency_ms"] is not None:
        target |= {"latency_ms": None, "target_sparsity": (1 + before) / 2, "unit": "macs"}
    return target["target_sparsity"] if isinstance(target["target_sparsity"], float) else 0.0


def _check_evaluation(recipe: Recipe) -> None:
    """Check that the evaluation data exists if the training data does; on other machines it cannot be checked."""
    if recipe.evaluation is None or not Path(recipe.data).exists():
        return
    for key in ("data", "templates"):
        path = getattr(recipe.evaluation, key)
        if path is not None and not Path(path).exists():
            raise ValueError(f"evaluation.{key}: {path} does not exist")


def reduced(config: CLIPConfig) -> CLIPConfig:
    """Return the model at a quarter of every width, with two patches per side, 16 tokens and a small vocabulary."""

    vision, text = config.vision, config.text
    if isinstance(vision, VisionConfig):
        vision = vision.model_copy(update=_quarter(vision) | {"image_size": 2 * vision.patch_size})
    else:
        sizes = {name: _each(getattr(vision, name)) for name in ("stem", "channels", "conv1", "conv2", "head_dim")}
        vision = vision.model_copy(update=sizes | {"image_size": 64})
    tokens = {"context_length": min(text.context_length, 16), "vocab_size": min(text.vocab_size, SMALL_VOCABULARY)}
    text = text.model_copy(update=_quarter(text) | tokens)
    return config.model_copy(update={"embed_dim": _each(config.embed_dim), "vision": vision, "text": text})


def _quarter(part: TransformerConfig) -> dict[str, Any]:
    return {name: _each(getattr(part, name)) for name in ("width", "head_dim", "mlp_width")}


def _each(size: Any) -> Any:
    """Return a quarter of a size, or of each size in a tuple, at least 1; None and 0 are unchanged."""
    return tuple(map(_each, size)) if isinstance(size, tuple) else size and max(1, size // 4)


def make_pictures(folder: Path) -> Path:
    """Write class folders of noise images, `BATCH` images in total."""
    generator = np.random.default_rng(0)
    for i in range(BATCH):
        (folder / WORDS[i % 4]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (64, 64, 3), np.uint8)).save(folder / WORDS[i % 4] / f"{i}.png")
    return folder


def random_checkpoint(folder: Path, config: CLIPConfig, seed: int) -> str:
    """Write a model with random weights and the first tokens of CLIP's vocabulary; return the folder."""
    torch.manual_seed(seed)
    save_checkpoint(folder, CLIP(config), _tokenizer(config), Preprocess(image_size=config.vision.image_size))
    return str(folder)


def _tokenizer(config: CLIPConfig) -> CLIPTokenizer:
    merges = clip_tokenizer().merges[: config.text.vocab_size - BYTE_TOKENS - 2]
    return CLIPTokenizer(merges, config.text.context_length)


# --- speed ------------------------------------------------------------------------------------------------------


def measured_speed(recipe: Recipe, steps: int = 3, pairs: int = 32) -> Speed:
    """Measure pairs/s of real training steps on the recipe's device, with random weights, full-length captions and no
    data loading.

    Batches have at most `pairs` pairs; larger ones hardly change the speed. The first step is not counted.

    Raises:
        ValueError: if the teacher's shape is unknown.
    """
    device = resolve_device(recipe.device)
    precision = best_precision(device) if recipe.precision == "auto" else recipe.precision
    first, _ = teacher_config(recipe)
    preprocess = Preprocess(image_size=first.vision.image_size)
    teacher: AnyTeacher | None = None
    if recipe.caches:
        teacher = CachedTeacher(first.embed_dim, [torch.tensor(50.0, device=device)] * len(recipe.caches))
    elif recipe.teacher is not None:
        teacher = Teacher(CLIP(first).to(device), preprocess)

    def speed(stage: Stage, config: CLIPConfig) -> float:
        tokenizer = _tokenizer(config)
        size = max(config.vision.image_size, first.vision.image_size)
        n, context = min(pairs, stage.batch_size), max(config.text.context_length, first.text.context_length)
        tokens = torch.randint(1, tokenizer.end_id, (n, context))
        tokens[:, -1] = tokenizer.end_id
        batch = Batch(torch.randint(256, (n, 3, size, size), dtype=torch.uint8), tokens, torch.arange(n), ["?"] * n)
        batch.teacher = [(torch.randn(n, first.embed_dim), torch.randn(n, first.embed_dim)) for _ in recipe.caches]
        model = CLIP(config).to(device).train()
        own = preprocess.model_copy(update={"image_size": config.vision.image_size})
        trainee = Trainee(model, stage, teacher, tokenizer, own, precision)
        with attention(device):
            trainee.step(batch, 0)["loss"].item()
            start = time.perf_counter()
            for step in range(steps):
                trainee.step(batch, step % stage.steps)["loss"].item()
        return n * steps / (time.perf_counter() - start)

    return speed
