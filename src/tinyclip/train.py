"""One training loop, for teachers and students alike; a run is a few stages of it.

A run's folder:

    recipe.yaml                 what is run
    metrics.jsonl               one line a log or evaluation
    skipped.jsonl               samples that were left out: shard, key, reason
    stages/NAME/last, best      checkpoints (`last` carries state.pt to resume from until the stage is done)
    stages/NAME/result.json     written when the stage is done
    student                     the last stage's result
"""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from megatron.energon.errors import FatalSampleError
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tinyclip.checkpoint import load_checkpoint, save_into
from tinyclip.config import CLIPConfig
from tinyclip.data import TOO_MANY_BAD, Batch, captions_of, close_loader, find_shards, read_shards, training_loader
from tinyclip.distributed import best_precision, resolve_device
from tinyclip.files import atomic_directory, write_atomically
from tinyclip.inheritance import inherit, manual_masks
from tinyclip.loss import affinity_loss, contrastive_loss
from tinyclip.model import CLIP
from tinyclip.recipe import Recipe, Stage
from tinyclip.teacher import Teacher, image_input, shorten
from tinyclip.tokenizer import CLIPTokenizer, clip_tokenizer
from tinyclip.transforms import Preprocess

Evaluator = Callable[[CLIP, CLIPTokenizer, Preprocess], dict[str, Any]]
Listener = Callable[[dict[str, Any]], None]
LARGEST_LOGIT_SCALE = math.log(100)  # OpenAI's CLIP clamps a learned scale at 100


class Interrupted(Exception):
    """The run was asked to stop and has saved itself; `signal_number` says by what."""

    def __init__(self, signal_number: int, step: int) -> None:
        super().__init__(f"stopped at step {step}")
        self.signal_number, self.step = signal_number, step


@dataclass
class Run:
    """What a run needs at hand; made by `start`, used up by `run`."""

    recipe: Recipe
    folder: Path
    teacher: Teacher | None
    configs: list[CLIPConfig]
    tokenizer: CLIPTokenizer
    preprocess: Preprocess
    device: torch.device
    precision: str
    evaluator: Evaluator | None = None
    listener: Listener = field(default=lambda event: None)

    def emit(self, event: dict[str, Any]) -> None:
        """To metrics.jsonl and to the listener."""
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(event) + "\n")
        self.listener(event)


def start(recipe: Recipe, *, overwrite: bool = False, resume: bool = False) -> Run:
    """Check everything that can be checked before the first step, and make the run's folder.

    Raises:
        ValueError: for a folder that exists, data that is missing, or a student that does not fit its start.
    """
    find_shards(recipe.data)
    device = resolve_device(recipe.device)
    precision = best_precision(device) if recipe.precision == "auto" else recipe.precision
    teacher = None
    if recipe.teacher is not None:
        model, tokenizer, preprocess = load_checkpoint(recipe.teacher)
        teacher = Teacher(model.to(device), preprocess)
        configs = plan(recipe, model.config)
    else:
        config = recipe.model
        assert config is not None, "the recipe's validation asks for a teacher or a model"
        tokenizer = _vocabulary(recipe, config)
        text = config.text.model_copy(update={"vocab_size": tokenizer.vocab_size})
        config = config.model_copy(update={"text": text})
        preprocess = Preprocess(image_size=config.vision.image_size)
        configs = plan(recipe, config)
    folder = Path(recipe.output)
    _open_folder(folder, recipe, overwrite, resume)
    return Run(recipe, folder, teacher, configs, tokenizer, preprocess, device, precision)


def plan(recipe: Recipe, first: CLIPConfig) -> list[CLIPConfig]:
    """The config of every stage's student, checked against what it inherits from.

    Raises:
        ValueError: naming the stage that does not fit.
    """
    configs: list[CLIPConfig] = []
    for i, stage in enumerate(recipe.stages):
        try:
            if stage.start not in ("previous", "teacher"):
                base = CLIPConfig.from_json(Path(stage.start) / "config.json")
            else:
                base = configs[-1] if stage.start == "previous" and configs else first
            config = stage.student.apply(base)
            if stage.inherit == "manual":
                manual_masks(base, config)
        except ValueError as error:
            raise ValueError(f"stages.{i} ({stage.name}): {error}") from None
        configs.append(config)
    return configs


def _vocabulary(recipe: Recipe, config: CLIPConfig) -> CLIPTokenizer:
    tokenizer = clip_tokenizer()
    if recipe.vocabulary == "data":
        texts = (caption for sample in read_shards(recipe.data) for caption in captions_of(sample))
        tokenizer = tokenizer.pruned(tokenizer.kept_ids(texts))
    tokenizer.context_length = config.text.context_length
    return tokenizer


def _open_folder(folder: Path, recipe: Recipe, overwrite: bool, resume: bool) -> None:
    text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
    try:
        if folder.exists() and any(folder.iterdir()) and not resume:
            if not overwrite:
                raise ValueError(f"{folder} exists; continue it with --resume or replace it with --overwrite")
            shutil.rmtree(folder)
        if resume:
            if not (folder / "recipe.yaml").exists():
                raise ValueError(f"{folder}: no run to resume")
            if (folder / "recipe.yaml").read_text(encoding="utf-8") != text:
                raise ValueError(f"{folder} was started from another recipe; see its recipe.yaml")
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "recipe.yaml", text)
    except OSError as error:
        raise ValueError(f"cannot write to {folder}: {error.strerror}") from None


def run(run: Run) -> list[dict[str, Any]]:
    """Train every stage that is not done yet; returns each stage's result.

    Raises:
        ValueError: for a loss that is not finite, or data of which too much is bad; the last checkpoint is kept.
        Interrupted: after SIGINT or SIGTERM, the state saved.
    """
    results = []
    student: CLIP | None = None
    for i, stage in enumerate(run.recipe.stages):
        folder = run.folder / "stages" / stage.name
        if (folder / "result.json").exists():
            student = load_checkpoint(folder / "last")[0]
            results.append(json.loads((folder / "result.json").read_text(encoding="utf-8")))
            continue
        student = _starting_student(run, i, student)
        run.emit({"event": "stage", "stage": stage.name, "index": i, "steps": stage.steps})
        student, result = _train_stage(run, i, student.to(run.device), folder)
        results.append(result)
    assert student is not None
    with atomic_directory(run.folder / "student") as place:
        dtype = getattr(torch, run.recipe.save_dtype)
        save_into(place, student, run.tokenizer, _preprocess_for(run, student), dtype)
    return results


def _starting_student(run: Run, i: int, previous: CLIP | None) -> CLIP:
    stage, config = run.recipe.stages[i], run.configs[i]
    torch.manual_seed(run.recipe.seed + i)
    if stage.inherit == "none":
        return CLIP(config)
    if stage.start == "previous" and previous is not None:
        base = previous
    elif stage.start in ("previous", "teacher"):
        assert run.teacher is not None, "the recipe's validation asks for a teacher here"
        base = run.teacher.model
    else:
        base, tokenizer, _ = load_checkpoint(stage.start)
        if tokenizer.merges != run.tokenizer.merges:
            raise ValueError(f"stages.{i}.start: {stage.start} has another vocabulary than the teacher")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        student = inherit(base, config)
    for warning in caught:
        run.emit({"event": "warning", "stage": stage.name, "text": str(warning.message)})
    return student


def _preprocess_for(run: Run, model: CLIP) -> Preprocess:
    return run.preprocess.model_copy(update={"image_size": model.config.vision.image_size})


# --- one stage --------------------------------------------------------------------------------------------------


def _train_stage(run: Run, i: int, student: CLIP, folder: Path) -> tuple[CLIP, dict[str, Any]]:
    stage = run.recipe.stages[i]
    optimizer = make_optimizer(student, stage)
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.precision == "float16")
    loader = _loader(run, i, student.config)
    progress = Progress()
    if (folder / "last" / "state.pt").exists():
        student = _restore(run, stage.name, folder / "last", student, optimizer, scaler, loader, progress)
    batches = iter(loader)
    student.train()
    with _stop_signals() as stop, _attention(run.device), _closing(loader):
        while progress.step < stage.steps:
            batch = _next_batch(run, batches)
            metrics = _step(run, stage, student, optimizer, scaler, batch, progress.step)
            progress.advance(len(batch.keys), batch, run.folder)
            if progress.step % run.recipe.log_every == 0 or progress.step == stage.steps:
                figures = {name: value.item() for name, value in metrics.items()}
                run.emit({"event": "step", "stage": stage.name, "step": progress.step} | figures | progress.figures())
            else:
                run.listener({"event": "tick", "stage": stage.name, "step": progress.step})
            every = run.recipe.evaluation.every if run.recipe.evaluation else None
            if progress.step == stage.steps or (every and progress.step % every == 0):
                _evaluate(run, stage, student, progress, folder)
            if stop or progress.step % run.recipe.save_every == 0 or progress.step == stage.steps:
                _save(run, folder / "last", student, (optimizer, scaler, loader, progress))
            if stop:
                raise Interrupted(stop[0], progress.step)
    result = {"stage": stage.name, "steps": stage.steps, "samples": progress.samples, "skipped": progress.skipped}
    result |= {"seconds": progress.seconds, "best_step": progress.best_step, "evaluation": progress.evaluation}
    write_atomically(folder / "result.json", json.dumps(result, indent=2) + "\n")
    (folder / "last" / "state.pt").unlink()  # only now is it of no use
    return student.eval(), result


@contextmanager
def _closing(loader: Any) -> Iterator[None]:
    """Stop the loader's workers at the end; a worker that died is an error for people."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        text = str(error).splitlines()[0]
        raise ValueError(f"{text} The last checkpoint is kept: go on with --resume") from None
    finally:
        close_loader(loader)


@dataclass
class Progress:
    """Where a stage stands; saved with it."""

    step: int = 0
    samples: int = 0
    skipped: int = 0
    seconds: float = 0.0
    best_step: int | None = None
    best_score: float = -1.0
    evaluation: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        self._since = time.perf_counter()
        self._recent: list[tuple[float, int]] = []

    def advance(self, count: int, batch: Batch, folder: Path) -> None:
        now = time.perf_counter()
        self._recent = [*self._recent[-49:], (now - self._since, count)]
        self.seconds += now - self._since
        self._since = now
        self.step += 1
        self.samples += count
        self.skipped += len(batch.skipped)
        if batch.skipped:
            with (folder / "skipped.jsonl").open("a") as file:
                file.writelines(json.dumps(asdict(s)) + "\n" for s in batch.skipped)

    def pause(self) -> None:
        """Leave out of pairs/s what is not training (evaluation, saving)."""
        self._since = time.perf_counter()

    def figures(self) -> dict[str, float]:
        seconds = sum(s for s, _ in self._recent)
        return {"pairs_per_s": sum(n for _, n in self._recent) / max(seconds, 1e-9), "skipped": self.skipped}


def _step(
    run: Run,
    stage: Stage,
    student: CLIP,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    batch: Batch,
    step: int,
) -> dict[str, Tensor]:
    """One optimiser step; returns the loss terms, the gradient norm and the learning rate."""
    lr = learning_rate(step, stage)
    for group in optimizer.param_groups:
        group["lr"] = lr
    dtype = getattr(torch, run.precision)
    with torch.autocast(run.device.type, dtype, enabled=run.precision != "float32"):
        terms = loss_terms(run, stage, student, batch)
    loss = terms["loss"]
    if not torch.isfinite(loss):
        keys = ", ".join(batch.keys[:8])
        raise ValueError(
            f"the loss of stage {stage.name} is {loss.item()} at step {step + 1}; samples {keys}, ...; "
            f"the last good checkpoint is kept. A lower optimizer.lr or precision float32 may help."
        )
    optimizer.zero_grad(set_to_none=True)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(student.parameters(), stage.optimizer.grad_clip)
    scaler.step(optimizer)
    scaler.update()
    with torch.no_grad():
        student.logit_scale.clamp_(max=LARGEST_LOGIT_SCALE)
    return {name: term.detach() for name, term in terms.items()} | {"grad_norm": norm, "lr": torch.tensor(lr)}


def loss_terms(run: Run, stage: Stage, student: CLIP, batch: Batch) -> dict[str, Tensor]:
    """The weighted sum as `loss`, and each term that has a weight."""
    images, groups = batch.images.to(run.device, non_blocking=True), batch.groups.to(run.device)
    tokens = shorten(batch.tokens, run.tokenizer.end_id, student.config.text.context_length).to(run.device)
    image_features = student.encode_image(image_input(images, _preprocess_for(run, student)), normalize=True).float()
    text_features = student.encode_text(tokens, normalize=True).float()
    learned = student.logit_scale.exp()
    terms: dict[str, Tensor] = {}
    settings = stage.loss
    if settings.affinity:
        assert run.teacher is not None
        teacher_image, teacher_text, teacher_scale = run.teacher.features(images, batch.tokens, run.tokenizer.end_id)
        given = {"teacher": teacher_scale, "learned": learned}
        scales = [given[s] if isinstance(s, str) else s for s in (settings.student_scale, settings.teacher_scale)]
        terms["affinity"] = affinity_loss(image_features, text_features, teacher_image, teacher_text, *scales)
    if settings.contrastive:
        same = groups if settings.positives == "class" else None
        terms["contrastive"] = contrastive_loss(image_features, text_features, learned, same)
    loss = torch.stack([getattr(settings, name) * term for name, term in terms.items()]).sum()
    return terms | {"loss": loss}


def make_optimizer(student: CLIP, stage: Stage) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices only."""
    settings = stage.optimizer
    parameters = [p for p in student.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)


def learning_rate(step: int, stage: Stage) -> float:
    """Linear warm-up, then cosine to 0; `step` counts from 0."""
    settings = stage.optimizer
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(1, stage.steps - settings.warmup_steps)
    return settings.lr * (1 + math.cos(math.pi * done)) / 2


def _loader(run: Run, i: int, config: CLIPConfig) -> Any:
    stage = run.recipe.stages[i]
    teacher = run.teacher.model.config if run.teacher else config
    return training_loader(
        run.recipe.data,
        tokenizer=run.tokenizer,
        context_length=max(config.text.context_length, teacher.text.context_length),
        image_size=max(config.vision.image_size, teacher.vision.image_size),
        augment=stage.augment,
        batch_size=stage.batch_size,
        workers=run.recipe.workers,
        seed=run.recipe.seed + i,  # stages see the data in different orders
    )


def _next_batch(run: Run, batches: Iterator[Batch]) -> Batch:
    try:
        return next(batches)
    except FatalSampleError as error:
        # Energon wraps the message of our Encoder in the sample's description.
        found = re.search(f"{TOO_MANY_BAD}.*", str(error))
        raise ValueError(f"{run.recipe.data}: {found.group().rstrip('.') if found else error}") from None


def _evaluate(run: Run, stage: Stage, student: CLIP, progress: Progress, folder: Path) -> None:
    if run.evaluator is None:
        return
    preprocess = _preprocess_for(run, student)
    progress.evaluation = run.evaluator(student.eval(), run.tokenizer, preprocess)
    student.train()
    run.emit({"event": "evaluation", "stage": stage.name, "step": progress.step} | progress.evaluation)
    score = progress.evaluation.get("acc1", progress.evaluation.get("image_retrieval_recall@1", 0.0))
    if score > progress.best_score:
        progress.best_score, progress.best_step = score, progress.step
        _save(run, folder / "best", student, None)
    progress.pause()


State = tuple[torch.optim.Optimizer, torch.amp.GradScaler, Any, Progress]


def _save(run: Run, place: Path, student: CLIP, state: State | None) -> None:
    with atomic_directory(place) as temporary:
        save_into(temporary, student, run.tokenizer, _preprocess_for(run, student))
        if state is not None:
            optimizer, scaler, loader, progress = state
            data: dict[str, Any] = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
            data |= {"loader": loader.save_state_rank(), "progress": asdict(progress)}
            data |= {"random": torch.get_rng_state()}
            try:
                torch.save(data, temporary / "state.pt")
            except RuntimeError as error:  # torch's own word for a full disk
                raise ValueError(f"cannot write {place}: {' '.join(str(error).split())}") from None
    if state is not None:
        state[-1].pause()


def _restore(
    run: Run,
    stage: str,
    place: Path,
    student: CLIP,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    loader: Any,
    progress: Progress,
) -> CLIP:
    """Load what `_save` wrote into the given objects."""
    student.load_state_dict(load_checkpoint(place)[0].state_dict())
    # Not weights_only: Energon's state is made of its own classes. The file is this run's own.
    data = torch.load(place / "state.pt", weights_only=False, map_location=run.device)
    optimizer.load_state_dict(data["optimizer"])
    scaler.load_state_dict(data["scaler"])
    loader.restore_state_rank(data["loader"])
    torch.set_rng_state(data["random"].cpu())
    for name, value in data["progress"].items():
        setattr(progress, name, value)
    _forget_metrics(run.folder / "metrics.jsonl", stage, progress.step)
    run.emit({"event": "resumed", "stage": stage, "step": progress.step})
    return student


def _forget_metrics(path: Path, stage: str, step: int) -> None:
    """Drop what a stage logged after `step`: it is about to be done again."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    events = [json.loads(line) for line in lines]
    kept = [s for s, e in zip(lines, events, strict=True) if e.get("stage") != stage or e.get("step", 0) <= step]
    write_atomically(path, "".join(kept))


def _attention(device: torch.device) -> AbstractContextManager[None]:
    """The attention kernel to train with. On CPUs the fused kernel's backward pass is the slower one: a whole
    step of the emoji teacher takes 1.7 times as long with it (`benchmarks/attention.py`)."""
    context: AbstractContextManager[None] = sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()
    return context


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """A list that receives SIGINT or SIGTERM, so that the loop can finish its step and save. A second SIGINT
    raises. Workers are forked with these handlers, so a Ctrl-C in a terminal does not kill them first."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def handle(number: int, frame: object) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
