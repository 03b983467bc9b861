"""Commands that take a model: cut, convert, use, look at."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tinyclip.cli.terminal import (
    AsJson,
    Device,
    DType,
    MaxPixels,
    Mean,
    Model,
    Overwrite,
    Runtime,
    Std,
    check_file,
    check_free,
    complete_model,
    complete_shape,
    errors,
    print_json,
    print_table,
    say,
    say_computing,
    three,
)
from tinyclip.common.progress import Counted


def inherit(
    teacher: Model,
    output: Path,
    like: Annotated[
        str | None,
        typer.Option(help="Shape of a known model, e.g. TinyCLIP-ViT-40M-32-Text-19M.", autocompletion=complete_shape),
    ] = None,
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
    batch_size: Annotated[int, typer.Option(min=2, max=10**6, help="Pairs a batch.")] = 128,
    device: Device = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Cut a student out of TEACHER, without training, and write it to OUTPUT: by the manual rule (--like or --shape)
    or by measured importance (--calibrate)."""
    from tinyclip.compress.inheritance import describe, manual_masks
    from tinyclip.compress.inheritance import inherit as cut
    from tinyclip.inference.pipeline import Pipeline, load
    from tinyclip.model.config import CLIPConfig
    from tinyclip.recipe.recipe import shape_from
    from tinyclip.recipe.stage import Calibrated
    from tinyclip.zoo.card import HOW, made_from

    check_free(output, overwrite)
    if [like is not None, bool(shape), calibrate is not None].count(True) != 1:
        raise ValueError("give one of --like, --shape and --calibrate")
    settings = {"target_sparsity": target, "unit": unit, "gates": gates, "align": align, "score": score}
    settings |= {"batches": batches}
    if calibrate is not None:
        _calibrate(teacher, output, calibrate, settings, towers, batch_size, device)
        return
    if settings != {"target_sparsity": 0.5} | Calibrated(target_sparsity=0.5).model_dump(include=set(settings)):
        raise ValueError("--target, --unit, --gates, --align, --score and --batches go with --calibrate")
    if towers != "both":
        raise ValueError("--towers goes with --calibrate")
    wanted = CLIPConfig.named(like) if like else shape_from(shape or [])  # before the teacher, which takes longer
    clip = load(teacher)
    config = wanted if isinstance(wanted, CLIPConfig) else wanted.apply(clip.model.config)
    student = cut(clip.model, config)
    preprocessing = clip.preprocessing.model_copy(update={"image_size": config.vision.image_size})
    card = made_from(teacher, f"{HOW['manual'].capitalize()} (`tinyclip inherit`), not trained since.")
    Pipeline(student, clip.tokenizer, preprocessing).save(output, card=card)
    rows = describe(clip.model.config, manual_masks(clip.model.config, config))
    print_table(("axis", "teacher", "student", "kept"), rows)


def _calibrate(
    teacher: Path, output: Path, data: Path, settings: dict[str, Any], towers: str, batch_size: int, device: str
) -> None:
    from tinyclip.cli.live import measured_on
    from tinyclip.compress.calibrate import Calibration, calibrate
    from tinyclip.compress.inheritance import compact, describe
    from tinyclip.compress.size import TOWERS
    from tinyclip.data.loader import AGAIN, closing
    from tinyclip.inference.pipeline import Pipeline, load
    from tinyclip.model.axes import axis_table, count_parameters
    from tinyclip.recipe.recipe import calibrated_from
    from tinyclip.train.calibration import plain_loader, samples
    from tinyclip.train.pruner import budgets
    from tinyclip.train.run import attention
    from tinyclip.zoo.card import HOW, made_from, shown

    if towers not in TOWERS:
        raise ValueError(f"--towers {towers}: choose {', '.join(TOWERS)}")
    chosen, clip = calibrated_from(settings), load(teacher, device=device)
    model, targets = clip.model, budgets(chosen, towers) or {}
    how = Calibration.of(chosen, model.config, model.logit_scale.exp().item())
    how.check(model.config, targets)
    loader = plain_loader(data, clip, batch_size)
    source = Counted(samples(loader, data, model, clip.tokenizer, clip.preprocessing))
    with attention(model.logit_scale.device), closing(loader, AGAIN):
        masks = calibrate(model.requires_grad_(False), source, targets, how)
    student = compact(clip.model, masks)
    how_made = f"{HOW['calibrated'].capitalize()} on {shown(data)} (`tinyclip inherit`), not trained since."
    card = made_from(teacher, how_made)
    Pipeline(student, clip.tokenizer, clip.preprocessing).save(output, card=card)
    print_table(("axis", "teacher", "student", "kept"), describe(clip.model.config, masks, "the {} most important"))
    counts = [count_parameters(axis_table(m.config)) for m in (clip.model, student)]
    before, after = (c["image"] + c["text"] for c in counts)
    say(f"measured on {measured_on(source.count, how.batches)} of {batch_size} pairs")
    say(f"{before:,} parameters before, {after:,} after ({100 * after / before:.1f} %), token embedding not counted")


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            help="A checkpoint of anyone's: ours, OpenAI, OpenCLIP, Hugging Face.", autocompletion=complete_model
        ),
    ],
    output: Annotated[Path, typer.Argument(help="Folder for the result.")],
    to: Annotated[str, typer.Option(help="tinyclip, open_clip or hf.")] = "tinyclip",
    activation: Annotated[str | None, typer.Option(help="gelu or quick_gelu, where SOURCE cannot say it.")] = None,
    mean: Mean = None,
    std: Std = None,
    overwrite: Overwrite = False,
) -> None:
    """Bring a checkpoint to another format."""
    from tinyclip.zoo.convert import convert as converted

    check_free(output, overwrite)
    model = converted(source, output, to, activation, three(mean, "--mean"), three(std, "--std"))
    count = sum(p.numel() for p in model.parameters())
    say(f"{count:,} parameters, all counted, activation {model.config.activation}: {output}")


def classify(
    model: Model,
    image: Path,
    labels: list[str],
    max_pixels: MaxPixels = None,
    device: Device = "cpu",
    dtype: DType = "auto",
    runtime: Runtime = "auto",
    as_json: AsJson = False,
) -> None:
    """How well each of LABELS fits IMAGE."""
    from tinyclip.inputs.batching import check_labels
    from tinyclip.inputs.transforms import open_image
    from tinyclip.loading import load

    check_labels(labels)  # before the model, which takes longer to be wrong
    if twice := next((label for i, label in enumerate(labels) if label in labels[:i]), None):
        raise ValueError(f"the label {twice!r} is given twice, so the two would share its probability")
    picture = open_image(image)
    clip = load(model, device=device, dtype=dtype, runtime=runtime)
    chances = clip.classify(picture, labels)[0].tolist()
    ranked = sorted(zip(labels, chances, strict=True), key=lambda pair: -pair[1])
    if as_json:
        listed = [{"label": name, "probability": p} for name, p in ranked]
        print_json({"image": str(image), "labels": listed} | clip.computing)
    else:
        say_computing(clip.computing)
        print_table(("label", "probability"), [[name, f"{100 * p:.1f} %"] for name, p in ranked])


def measure(
    model: Annotated[
        str,
        typer.Argument(help="A checkpoint, an export, a name of the zoo or of a shape.", autocompletion=complete_shape),
    ],
    device: Device = "cpu",
    dtype: DType = "auto",
    runtime: Runtime = "auto",
    as_json: AsJson = False,
) -> None:
    """Parameters, MACs and pairs/s of MODEL here; of an export also its size."""
    from tinyclip.common.devices import resolve_device, resolve_dtype
    from tinyclip.inference.pipeline import Tensors
    from tinyclip.inference.speed import measure as measured
    from tinyclip.inference.speed import measure_export
    from tinyclip.loading import load_encoder
    from tinyclip.model.config import NAMED, CLIPConfig
    from tinyclip.model.model import CLIP, cast

    if model in NAMED and not Path(model).exists():
        if runtime not in ("auto", "torch"):
            raise ValueError(f"{model} is a shape without weights, which only torch runs, not {runtime}")
        place = resolve_device(device)
        network = CLIP(CLIPConfig.named(model)).eval().to(place)
        found = measured(cast(network, resolve_dtype(dtype, place)))
    else:
        clip = load_encoder(model, device, dtype, runtime=runtime)
        found = measure_export(clip.clip) if isinstance(clip, Tensors) else measured(clip.model)
    result = {"model": model} | found
    if as_json:
        print_json(result)
        return
    rows = [
        [k, f"{v:,.1f}" if isinstance(v, float) else f"{v:,}" if isinstance(v, int) else v] for k, v in result.items()
    ]
    print_table(("figure", "value"), rows)


def structure(
    model: Model,
    of: Annotated[Path | None, typer.Option(help="The model it came from, drawn behind it.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also draw it: a .png, .svg or .pdf.")] = None,
    as_json: AsJson = False,
) -> None:
    """Width, and heads and neurons of each block, of MODEL."""
    from tinyclip.common.files import replacing
    from tinyclip.inference.pipeline import load
    from tinyclip.report import structure as drawing

    check_file(output)
    if output and output.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ValueError(f"{output}: draw to a .png, .svg or .pdf file")
    if of and not output:
        raise ValueError("--of goes with --output: it is drawn behind the picture")
    config = load(model).model.config
    if output:
        picture = drawing.figure(config, load(of).model.config if of else None)
        with replacing(output) as file:
            picture.savefig(file, dpi=150, format=output.suffix[1:].lower())
    if as_json:
        print_json(config.model_dump(mode="json"))
    else:
        print_table(("tower", "what", "in each block"), drawing.rows(config))


def zoo(
    name: Annotated[
        str | None, typer.Argument(help="Details of this model alone.", autocompletion=complete_model)
    ] = None,
    download: Annotated[bool, typer.Option("--download", help="Download it, if it is not here yet.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Read its file whole and check its SHA-256.")] = False,
    cache: Annotated[Path | None, typer.Option(help="Folder of downloads; default: $TINYCLIP_CACHE.")] = None,
    as_json: AsJson = False,
) -> None:
    """The published models, with their figures; or all that is known of NAME."""
    from tinyclip.zoo import catalogue
    from tinyclip.zoo import resolve as models

    if name is None:
        if download or verify:
            raise ValueError("--download and --verify need the name of a model")
        listed = [catalogue.describe(entry, cache) for entry in catalogue.ENTRIES]
        if as_json:
            print_json({"models": listed, "shipped": list(catalogue.SHIPPED)})
        else:
            print_table(catalogue.COLUMNS, [catalogue.row(facts) for facts in listed])
            say(f"shipped with tinyclip, of emoji drawings: {', '.join(catalogue.SHIPPED)}")
        return
    if name in catalogue.SHIPPED:
        _say_zoo(catalogue.describe_shipped(name), as_json)
        return
    entry = catalogue.get(name)
    first = verify and catalogue.unrecorded(entry, cache)  # before anything records it
    if download:
        models.local_file(entry, cache)
    if verify:
        digest = catalogue.verify(entry, cache)
        if first:
            path = catalogue.cache_folder(cache) / entry.file
            errors.print(f"{path}: no checksum was recorded, so there was nothing to compare; recorded now: {digest}")
    facts = catalogue.describe(entry, cache)
    _say_zoo(facts if as_json else dict(catalogue.details(facts)), as_json)


def _say_zoo(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(facts)
        return
    for key, value in facts.items():
        say(f"{key:26} {value}")
