"""The command line: a command is a function; heavy imports wait until a command needs them."""

from __future__ import annotations

import json
import shlex
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from tinyclip import __version__

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help="Make CLIP models small.")
data_app = typer.Typer(no_args_is_help=True, help="Make and check training shards.")
vocab_app = typer.Typer(no_args_is_help=True, help="Reduce a model's vocabulary.")
app.add_typer(data_app, name="data")
app.add_typer(vocab_app, name="vocab")
# Piped output is wide enough for every table.
console = Console(width=None if sys.stdout.isatty() else 140, markup=False, emoji=False)
errors = Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, mps or auto.")]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override: stages.0.steps=200.")]
Smoke = Annotated[bool, typer.Option("--smoke", help="Try every stage for two steps: random weights, made-up data.")]
Small = Annotated[bool, typer.Option("--small", help="With --smoke: at a quarter of every width, in seconds.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue a run that was stopped.")]
Templates = Annotated[Path | None, typer.Option(help="Prompt templates, one a line, {c} for the class.")]


def main() -> None:
    """Entry point. Exit codes: 0, 2 for what the user can mend, 130 and 143 when stopped by Ctrl-C or SIGTERM."""
    try:
        app()
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output is gone
        sys.exit(1)
    except (ValueError, OSError) as error:
        fail(str(error), 2)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported here
            raise
        fail("out of memory on the device; a lower batch_size may help", 2)


def say(text: str) -> None:
    """Print a line as it is."""
    console.print(text, highlight=False, soft_wrap=True)


def fail(text: str, code: int) -> None:
    errors.print(f"tinyclip: {' '.join(text.split())}")
    sys.exit(code)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        console.print(__version__)
        raise typer.Exit


# --- train and distil -------------------------------------------------------------------------------------------


@app.command()
def distill(
    recipe: Path,
    sets: Sets = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
    smoke: Smoke = False,
    small: Small = False,
) -> None:
    """Compress a teacher in the stages of a RECIPE; ends with a table and report.html."""
    chosen = _recipe_for(recipe, sets or [], distil=True)
    if smoke or small:
        _smoke(chosen, smoke, small)
    else:
        _train(chosen, overwrite, resume)


@app.command()
def train(
    recipe: Path,
    sets: Sets = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
    smoke: Smoke = False,
    small: Small = False,
) -> None:
    """Train a model from scratch by a RECIPE without teacher."""
    chosen = _recipe_for(recipe, sets or [], distil=False)
    if smoke or small:
        _smoke(chosen, smoke, small)
    else:
        _train(chosen, overwrite, resume)


def _recipe_for(path: Path, sets: list[str], distil: bool) -> Any:
    from tinyclip.recipe import load_recipe

    recipe = load_recipe(path, sets)
    if distil != (recipe.teacher is not None):
        other = "train" if distil else "distill"
        raise ValueError(f"{path} has {'no' if distil else 'a'} teacher: use `tinyclip {other}`")
    return recipe


def _train(recipe: Any, overwrite: bool, resume: bool) -> None:
    command = [a for a in sys.argv[1:] if a not in ("--overwrite", "--resume")]
    hint = shlex.join(["tinyclip", *command, "--resume"])
    folder = run_recipe(recipe, overwrite=overwrite, resume=resume, hint=hint)
    write_run_report([folder], folder / "report.html", folder.name)


def _smoke(recipe: Any, smoke: bool, small: bool) -> None:
    from tinyclip.report import evaluator
    from tinyclip.resume import Interrupted
    from tinyclip.smoke import smoke as tried

    if not smoke:
        raise ValueError("--small goes with --smoke")
    try:
        results = tried(recipe, small, lambda data: evaluator(data, None))
    except (Interrupted, KeyboardInterrupt) as stop:
        fail("the dry run was stopped", 128 + getattr(stop, "signal_number", signal.SIGINT))
    for result in results:
        say(f"stage {result['stage']}: ok, {result['shape']}, {result['seconds']:.1f} s")


def run_recipe(recipe: Any, *, overwrite: bool, resume: bool, hint: str) -> Path:
    """Run a recipe with a live display; returns the run's folder. Exits with 130 or 143 when interrupted."""
    from tinyclip import train as training
    from tinyclip.display import Display
    from tinyclip.report import evaluator
    from tinyclip.resume import Interrupted

    evaluation = recipe.evaluation
    check = evaluator(evaluation.data, evaluation.templates) if evaluation else None
    run = training.start(recipe, overwrite=overwrite, resume=resume)
    run.evaluator = check
    with Display(console, run) as display:
        run.listener = display
        try:
            training.run(run)
        except Interrupted as stop:
            display.stop()
            fail(f"{stop} and saved in {run.folder}; go on with: {hint}", 128 + stop.signal_number)
        except KeyboardInterrupt:
            display.stop()
            fail(f"stopped; go on with: {hint}", 128 + signal.SIGINT)
    return run.folder


def write_run_report(runs: list[Path], path: Path, title: str) -> None:
    from tinyclip.report import COLUMNS, report, table

    entries = report(runs, path, title)
    _print_table(COLUMNS, table(entries))
    say(f"report: {path}")


@app.command()
def plan(
    recipe: Path,
    sets: Sets = None,
    devices: Annotated[int, typer.Option(min=1, help="Devices that share each batch.")] = 1,
    samples: Annotated[int | None, typer.Option(min=1, help="Pairs of the data, where it is not here.")] = None,
    tflops: Annotated[float | None, typer.Option(min=1e-6, help="Hours at these sustained TFLOP/s a device.")] = None,
    pairs_per_s: Annotated[float | None, typer.Option(min=1e-6, help="Hours at this speed a device.")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Hours at the speed of a few steps timed here.")] = False,
    as_json: AsJson = False,
) -> None:
    """What a RECIPE would take: shapes, parameters, MACs, steps, memory, FLOPs, hours. Runs and writes nothing."""
    from tinyclip.display import plan_table
    from tinyclip.plan import plan as planned
    from tinyclip.recipe import load_recipe

    if (tflops is not None) + (pairs_per_s is not None) + measure > 1:
        raise ValueError("give only one of --tflops, --pairs-per-s and --measure")
    chosen = load_recipe(recipe, sets or [])
    speed: Any = (lambda stage, config: pairs_per_s) if pairs_per_s is not None else None
    if measure:
        from tinyclip.smoke import measured_speed

        speed = measured_speed(chosen)
    result = planned(chosen, devices=devices, samples=samples, tflops=tflops, speed=speed)
    if as_json:
        _print_json(result)
        return
    _print_table(*plan_table(result))
    for note in result["notes"]:
        say(f"note: {note}")


@app.command("report")
def report_command(
    runs: list[Path],
    output: Annotated[Path, typer.Option("--output", "-o", help="The HTML file.")] = Path("report.html"),
    title: Annotated[str, typer.Option(help="Heading of the report.")] = "tinyclip",
) -> None:
    """Compare finished RUNS in one table and HTML report."""
    write_run_report(runs, output, title)


@app.command()
def inherit(
    teacher: Path,
    output: Path,
    like: Annotated[str | None, typer.Option(help="Shape of a known model, e.g. TinyCLIP-ViT-40M-32-Text-19M.")] = None,
    shape: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="vision.width=128, text.layers=3.")
    ] = None,
    calibrate: Annotated[Path | None, typer.Option(help="Choose by importance, measured on these shards.")] = None,
    target: Annotated[float, typer.Option(help="With --calibrate: fraction of the blocks to remove.")] = 0.5,
    unit: Annotated[str, typer.Option(help="What --target counts: params or macs.")] = "params",
    towers: Annotated[str, typer.Option(help="What is cut: both (one budget), image or text.")] = "both",
    gates: Annotated[bool, typer.Option("--gates", help="Also remove whole attention and MLP branches.")] = False,
    align: Annotated[int, typer.Option(help="Keep multiples of this of neurons and channels.")] = 1,
    score: Annotated[str, typer.Option(help="taylor, activation or magnitude.")] = "taylor",
    batches: Annotated[int, typer.Option(help="Batches to measure.")] = 200,
    batch_size: Annotated[int, typer.Option(min=2, help="Pairs a batch.")] = 128,
    device: Device = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Cut a student out of TEACHER, without training, and write it to OUTPUT: by the manual rule (--like or --shape)
    or by measured importance (--calibrate)."""
    from tinyclip.config import CLIPConfig
    from tinyclip.inheritance import describe, manual_masks
    from tinyclip.inheritance import inherit as cut
    from tinyclip.pipeline import Pipeline, load
    from tinyclip.recipe import shape_from

    _free(output, overwrite)
    if [like is not None, bool(shape), calibrate is not None].count(True) != 1:
        raise ValueError("give one of --like, --shape and --calibrate")
    if calibrate is not None:
        settings = {"target_sparsity": target, "unit": unit, "gates": gates, "align": align, "score": score}
        _calibrate(teacher, output, calibrate, settings | {"batches": batches}, towers, batch_size, device)
        return
    clip = load(teacher)
    config = CLIPConfig.named(like) if like else shape_from(shape or []).apply(clip.model.config)
    student = cut(clip.model, config)
    preprocessing = clip.preprocessing.model_copy(update={"image_size": config.vision.image_size})
    Pipeline(student, clip.tokenizer, preprocessing).save(output)
    rows = describe(clip.model.config, manual_masks(clip.model.config, config))
    _print_table(("axis", "teacher", "student", "kept"), rows)


def _calibrate(
    teacher: Path, output: Path, data: Path, settings: dict[str, Any], towers: str, batch_size: int, device: str
) -> None:
    from rich.progress import track

    from tinyclip.axes import axis_table, count_parameters
    from tinyclip.calibrate import Calibration, calibrate
    from tinyclip.data import close_loader
    from tinyclip.inheritance import compact, describe
    from tinyclip.pipeline import Pipeline, load
    from tinyclip.pruning import TOWERS, budgets
    from tinyclip.recipe import calibrated_from
    from tinyclip.samples import plain_loader, samples
    from tinyclip.train import attention

    if towers not in TOWERS:
        raise ValueError(f"--towers {towers}: choose {', '.join(TOWERS)}")
    chosen, clip = calibrated_from(settings), load(teacher, device=device)
    model, targets = clip.model, budgets(chosen, towers) or {}
    how = Calibration.of(chosen, model.config, model.logit_scale.exp().item())
    how.check(model.config, targets)
    loader = plain_loader(data, clip, batch_size)
    source = samples(loader, data, model, clip.tokenizer, clip.preprocessing)
    shown = track(source, "measuring", how.batches, console=errors, disable=not errors.is_terminal)
    try:
        with attention(model.logit_scale.device):
            masks = calibrate(model.requires_grad_(False), shown, targets, how)
    finally:
        close_loader(loader)
    student = compact(clip.model, masks)
    Pipeline(student, clip.tokenizer, clip.preprocessing).save(output)
    _print_table(("axis", "teacher", "student", "kept"), describe(clip.model.config, masks, "the {} most important"))
    counts = [count_parameters(axis_table(m.config)) for m in (clip.model, student)]
    before, after = (c["image"] + c["text"] for c in counts)
    say(f"{before:,} parameters before, {after:,} after ({100 * after / before:.1f} %), token embedding not counted")


CONFIGS = ("config.json", "open_clip_config.json")  # of checkpoints that may be replaced


def _free(path: Path, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists; choose another or replace it with --overwrite")
    if path.is_dir() and any(path.iterdir()) and not any((path / name).exists() for name in CONFIGS):
        raise ValueError(f"{path} is no checkpoint, so it is not replaced; choose another place")


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A checkpoint of anyone's: ours, OpenAI, OpenCLIP, Hugging Face.")],
    output: Annotated[Path, typer.Argument(help="Folder for the result.")],
    to: Annotated[str, typer.Option(help="tinyclip, open_clip or hf.")] = "tinyclip",
    activation: Annotated[str | None, typer.Option(help="gelu or quick_gelu, where SOURCE cannot say it.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Bring a checkpoint to another format."""
    from tinyclip.interchange import convert as converted

    _free(output, overwrite)
    _free(output, overwrite)
    model = converted(source, output, to, activation)
    say(f"{sum(p.numel() for p in model.parameters()):,} parameters, activation {model.config.activation}: {output}")


# --- use and judge ----------------------------------------------------------------------------------------------


@app.command()
def classify(model: Path, image: Path, labels: list[str], device: Device = "cpu", as_json: AsJson = False) -> None:
    """How well each of LABELS fits IMAGE."""
    from tinyclip.pipeline import load

    clip = load(model, device=device)
    chances = clip.classify(image, labels)[0].tolist()
    ranked = sorted(zip(labels, chances, strict=True), key=lambda pair: -pair[1])
    if as_json:
        _print_json({"image": str(image), "labels": [{"label": name, "probability": p} for name, p in ranked]})
    else:
        _print_table(("label", "probability"), [[name, f"{100 * p:.1f} %"] for name, p in ranked])


@app.command()
def evaluate(
    model: Path,
    data: Path,
    templates: Templates = None,
    device: Device = "auto",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write the figures to this file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Zero-shot accuracy and retrieval recall of MODEL on DATA (class folders or shards)."""
    from tinyclip import evaluate as evaluation
    from tinyclip.files import write_atomically
    from tinyclip.pipeline import load

    dataset = evaluation.open_dataset(data, templates)
    result = {"model": str(model)} | evaluation.evaluate(load(model, device=device), dataset)
    for reason in dataset.skipped[:10]:
        errors.print(f"skipped {reason}")
    if output:
        write_atomically(output, json.dumps(result, indent=2) + "\n")
    if as_json:
        _print_json(result)
        return
    subsets = result.pop("subsets", {})
    names = [k for k, v in result.items() if isinstance(v, float)] + [k for k in result if k.startswith("n")]
    rows = [[name, *(_figure(figures.get(name)) for figures in (result, *subsets.values()))] for name in names]
    _print_table(("figure", "all", *subsets), rows)


def _figure(value: Any) -> str:
    return "-" if value is None else f"{100 * value:.2f} %" if isinstance(value, float) else f"{value:,}"


@app.command()
def measure(
    model: Annotated[str, typer.Argument(help="A checkpoint, a name of the zoo or of a shape.")],
    device: Device = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    as_json: AsJson = False,
) -> None:
    """Parameters, MACs and pairs/s of MODEL here."""
    import torch

    from tinyclip.config import NAMED, CLIPConfig
    from tinyclip.distributed import resolve_device
    from tinyclip.measurement import measure as measured
    from tinyclip.model import CLIP
    from tinyclip.pipeline import load

    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype {dtype}: choose float32, bfloat16 or float16")
    place = resolve_device(device)
    shape_only = model in NAMED and not Path(model).exists()
    network = CLIP(CLIPConfig.named(model)).eval() if shape_only else load(model).model
    result = {"model": model} | measured(network.to(place, getattr(torch, dtype)))
    if as_json:
        _print_json(result)
        return
    rows = [
        [k, f"{v:,.1f}" if isinstance(v, float) else f"{v:,}" if isinstance(v, int) else v] for k, v in result.items()
    ]
    _print_table(("figure", "value"), rows)


@app.command()
def structure(
    model: Path,
    of: Annotated[Path | None, typer.Option(help="The model it came from, drawn behind it.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also draw it: a .png, .svg or .pdf.")] = None,
    as_json: AsJson = False,
) -> None:
    """Width, and heads and neurons of each block, of MODEL."""
    from tinyclip import structure as drawing
    from tinyclip.pipeline import load

    if output and output.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"{output}: draw to a .png, .svg or .pdf file")
    config = load(model).model.config
    if output:
        picture = drawing.figure(config, load(of).model.config if of else None)
        output.parent.mkdir(parents=True, exist_ok=True)
        picture.savefig(output, dpi=150)
    if as_json:
        _print_json(config.model_dump(mode="json"))
    else:
        _print_table(("tower", "what", "in each block"), drawing.rows(config))


@app.command()
def zoo(
    name: Annotated[str | None, typer.Argument(help="Details of this model alone.")] = None,
    download: Annotated[bool, typer.Option("--download", help="Download it, if it is not here yet.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Read its file whole and check its SHA-256.")] = False,
    cache: Annotated[Path | None, typer.Option(help="Folder of downloads; default: $TINYCLIP_CACHE.")] = None,
    as_json: AsJson = False,
) -> None:
    """The published models, with their figures; or all that is known of NAME."""
    from tinyclip import zoo as models

    if name is None:
        if download or verify:
            raise ValueError("--download and --verify need the name of a model")
        listed = [models.describe(entry, cache) for entry in models.ENTRIES]
        if as_json:
            _print_json({"models": listed})
        else:
            _print_table(models.COLUMNS, [models.row(facts) for facts in listed])
        return
    entry = models.get(name)
    if download:
        models.local_file(entry, cache)
    if verify:
        models.verify(entry, cache)
    facts = models.describe(entry, cache)
    if as_json:
        _print_json(facts)
        return
    for key, value in models.details(facts):
        say(f"{key:26} {value}")


# --- data and vocabulary ----------------------------------------------------------------------------------------


@data_app.command("pack")
def data_pack(
    source: Annotated[Path, typer.Argument(help="Folder of pictures, or a .csv, .tsv, .jsonl or .parquet table.")],
    output: Annotated[Path, typer.Argument(help="Folder for the shards.")],
    image_column: Annotated[str | None, typer.Option(help="Column of picture paths.")] = None,
    caption_column: Annotated[str | None, typer.Option(help="Column of captions.")] = None,
    image_root: Annotated[Path | None, typer.Option(help="Folder that paths in a table start from.")] = None,
    templates: Annotated[
        Path | None, typer.Option(help="Class folders: captions, one a line, {c} for the class.")
    ] = None,
    shard_size: Annotated[int, typer.Option(min=1, help="Pictures a shard.")] = 5000,
    resize: Annotated[int | None, typer.Option(min=8, help="Shorter side at most, pixels.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Make training shards from your own pictures and captions."""
    from rich.progress import track

    from tinyclip.pack import find_items, pack

    lines = _lines(templates) if templates else None
    columns = {"image_column": image_column, "caption_column": caption_column}
    items = find_items(source, **columns, image_root=image_root, templates=lines)
    steps = iter(track(range(len(items)), "packing", console=errors, disable=not errors.is_terminal))

    def progress() -> None:
        next(steps, None)

    report = pack(items, output, shard_size=shard_size, resize=resize, overwrite=overwrite, progress=progress)
    progress()  # lets the bar reach its end
    say(f"packed {report.packed} pictures with {report.captions} captions into {report.shards} shards in {output}")
    if report.skipped:
        say(f"skipped {len(report.skipped)}, see {output / 'skipped.jsonl'}:")
        for reason, count in report.reasons.most_common(5):
            say(f"  {count} x {reason}")
    say(f"ready to train on: set `data: {output}` in a recipe")


@data_app.command("prepare")
def data_prepare(folder: Annotated[Path, typer.Argument(help="Folder of WebDataset shards.")]) -> None:
    """Index existing shards (of img2dataset, say); training does it by itself when it was not done."""
    from tinyclip.data import prepare

    say(f"{prepare(folder)} samples in {folder}, ready to train on")


@vocab_app.command("prune")
def vocab_prune(
    model: Path,
    output: Path,
    texts: Annotated[Path, typer.Option(help="File of texts, one a line, or folder of shards, whose tokens are kept.")],
    overwrite: Overwrite = False,
) -> None:
    """Keep only the tokens that TEXTS need: for them the model stays exactly the same."""
    from tinyclip.data import all_captions
    from tinyclip.inheritance import prune_vocabulary
    from tinyclip.pipeline import Pipeline, load

    _free(output, overwrite)
    clip = load(model)
    if texts.is_dir():
        kept = clip.tokenizer.kept_ids(all_captions(texts))
    else:
        kept = clip.tokenizer.kept_ids(_lines(texts))
    small = Pipeline(prune_vocabulary(clip.model, kept), clip.tokenizer.pruned(kept), clip.preprocessing)
    small.save(output)
    saved = (clip.tokenizer.vocab_size - len(kept)) * clip.model.config.text.width
    say(f"kept {len(kept)} of {clip.tokenizer.vocab_size} tokens, {saved:,} parameters fewer: {output}")


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: no UTF-8 text ({error.reason})") from None


def _print_table(columns: Any, rows: Any) -> None:
    table = Table(box=None, header_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _print_json(result: dict[str, Any]) -> None:
    print(json.dumps(result))


if __name__ == "__main__":
    main()
