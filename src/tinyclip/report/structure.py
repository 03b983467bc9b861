"""The structure of a model, block by block, as table rows and as a figure next to its original."""

from __future__ import annotations

from dataclasses import dataclass

from matplotlib.figure import Figure

from tinyclip.model.config import CLIPConfig, ResNetConfig

KEPT, GONE = "#2a7de1", "#d8dee9"


@dataclass(frozen=True)
class Part:
    """One kind of unit in a tower, counted per block; None for a block without that branch."""

    tower: str
    kind: str
    counts: tuple[int | None, ...]


def parts(config: CLIPConfig) -> list[Part]:
    """Return the heads and neurons of each block of both towers; for a ResNet, the channels."""
    vision, text = config.vision, config.text
    if isinstance(vision, ResNetConfig):
        inner = {"first": vision.conv1, "second": vision.conv2}
        result = [
            Part("image", f"channels, {name}", tuple(c for stage in counts for c in stage))
            for name, counts in inner.items()
        ]
    else:
        result = [Part("image", "heads", vision.heads), Part("image", "neurons", vision.mlp_width)]
    return [*result, Part("text", "heads", text.heads), Part("text", "neurons", text.mlp_width)]


def widths(config: CLIPConfig) -> dict[str, str]:
    """Return the width of each tower's residual stream."""
    vision = config.vision
    image = ", ".join(map(str, vision.channels)) if isinstance(vision, ResNetConfig) else str(vision.width)
    return {"image": image, "text": str(config.text.width)}


def rows(config: CLIPConfig) -> list[list[str]]:
    """Return table rows (tower, unit, count per block), with a dash for blocks without that branch."""
    table = [[tower, "width", width] for tower, width in widths(config).items()]
    for part in parts(config):
        table.append([part.tower, part.kind, " ".join("-" if c is None else str(c) for c in part.counts)])
    return sorted(table, key=lambda row: row[0])


def figure(config: CLIPConfig, original: CLIPConfig | None = None) -> Figure:
    """Draw bars for each block of both towers and, in grey behind them, the original's.

    A cut that removes whole blocks renumbers the rest, so a grey bar then only shows the original's block with that
    number.
    """
    shown, before = parts(config), parts(original) if original else []
    picture = Figure(figsize=(10, 5), layout="constrained")
    panels = picture.subplots(2, 2)
    for panel, part in zip(panels.flat, shown, strict=True):
        reference = next((p.counts for p in before if (p.tower, p.kind) == (part.tower, part.kind)), ())
        panel.bar(range(len(reference)), [c or 0 for c in reference], color=GONE, width=0.85)
        panel.bar(range(len(part.counts)), [c or 0 for c in part.counts], color=KEPT, width=0.85)
        width = widths(config)[part.tower]
        if original and widths(original)[part.tower] != width:
            width += f" of {widths(original)[part.tower]}"
        total, whole = sum(c or 0 for c in part.counts), sum(c or 0 for c in reference)
        share = f": {total} of {whole}" if reference else f": {total}"
        panel.set_title(f"{part.tower} tower, {part.kind}{share} (width {width})", fontsize=9, loc="left")
        panel.set_xlabel("block", fontsize=8)
        panel.set_xticks(range(max(len(reference), len(part.counts))))
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    return picture
