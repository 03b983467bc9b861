"""Commands that bring models to other runtimes, formats and the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tinyclip.cli.terminal import (
    AsJson,
    Mean,
    Model,
    Overwrite,
    Std,
    Templates,
    check_free,
    complete_model,
    plural,
    print_json,
    print_table,
    say,
    three,
)


def export(
    model: Annotated[str, typer.Argument(help="A checkpoint or a published model's name.")],
    to: Annotated[str, typer.Option(help="Format: onnx, openvino, torch (torch.export), hf or open_clip.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the export.")],
    int8: Annotated[
        bool, typer.Option("--int8", help="Quantise to 8 bits (onnx, openvino); needs --calibration-data.")
    ] = False,
    calibration_data: Annotated[
        Path | None, typer.Option(help="Images with captions (folder or shards) to calibrate and compare on.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Evaluation data, to report accuracy before and after.")] = None,
    templates: Templates = None,
    activation: Annotated[str | None, typer.Option(help="gelu or quick_gelu, if MODEL does not say.")] = None,
    mean: Mean = None,
    std: Std = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Export MODEL to another runtime and check the result.

    The export is loaded back and its features are compared. `tinyclip classify OUTPUT ...` then runs without torch.
    """
    from tinyclip.export.export import check_request
    from tinyclip.export.export import export as exported

    check_free(output, overwrite)
    check_request(to, int8, calibration_data)
    facts = exported(
        model,
        output,
        to,
        int8=int8,
        calibration=calibration_data,
        data=data,
        templates=templates,
        activation=activation,
        mean=three(mean, "--mean"),
        std=three(std, "--std"),
    )
    size = sum(file.stat().st_size for file in output.iterdir())
    result = {"model": model, "output": str(output), "size_mb": size / 1e6}
    result |= {key: facts[key] for key in ("export", "precision", "check")}
    result |= {key: facts[key] for key in ("calibration", "in_float") if key in facts}
    if as_json:
        print_json(result)
        return
    print_table(("compared with the model", *facts["check"]), _rows(list(facts["check"].values())))
    say(f"{facts['export']}, {facts['precision']}, {size / 1e6:,.1f} MB: {output}")


def _rows(checks: list[dict[str, Any]]) -> list[list[str]]:
    percent = {"top1_agreement", "acc1", "acc1_model"}

    def shown(name: str, value: Any) -> str:
        if isinstance(value, int):
            return f"{value:,}"
        return f"{100 * value:.2f} %" if name in percent else f"{value:.1e}" if "error" in name else f"{value:.6f}"

    return [[name, *(shown(name, check[name]) for check in checks)] for name in checks[0]]


def convert(
    source: Annotated[
        Path,
        typer.Argument(help="A checkpoint: tinyclip, OpenAI, OpenCLIP or Hugging Face.", autocompletion=complete_model),
    ],
    output: Annotated[Path, typer.Argument(help="Folder for the result.")],
    to: Annotated[str, typer.Option(help="Target format: tinyclip, open_clip or hf.")] = "tinyclip",
    activation: Annotated[str | None, typer.Option(help="gelu or quick_gelu, if SOURCE does not say.")] = None,
    mean: Mean = None,
    std: Std = None,
    overwrite: Overwrite = False,
) -> None:
    """Convert a checkpoint to another format."""
    from tinyclip.zoo.convert import convert as converted

    check_free(output, overwrite)
    model = converted(source, output, to, activation, three(mean, "--mean"), three(std, "--std"))
    count = sum(p.numel() for p in model.parameters())
    say(f"{count:,} parameters in total, activation {model.config.activation}: {output}")


def push(
    model: Model,
    repository: Annotated[str, typer.Argument(help="org/name on the Hugging Face hub; created if missing.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    revision: Annotated[str | None, typer.Option("--revision", "--branch", help="Branch; default: main.")] = None,
    message: Annotated[str, typer.Option(help="Commit message.")] = "Upload by tinyclip",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check it and list what would be uploaded.")] = False,
) -> None:
    """Upload MODEL's folder, with its card, to the Hugging Face hub.

    Uses the token of `hf auth login` or HF_TOKEN.
    """
    from tinyclip.zoo import push as pushing

    what = pushing.plan(model, repository)
    if dry_run:
        print_table(("file", "bytes"), [[name, f"{size:,}"] for name, size in what.files.items()])
        say(f"would upload {plural(len(what.files), 'file')}, {what.bytes / 1e6:.1f} MB, to {repository}")
        return
    address = pushing.push(what, private, revision, message)
    say(f"uploaded {plural(len(what.files), 'file')}, {what.bytes / 1e6:.1f} MB: {address}")
    say(f'to use it: tinyclip.load("{repository}{f"@{revision}" if revision else ""}")')
