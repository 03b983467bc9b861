"""Building blocks of self-contained HTML reports."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from PIL import Image

from tinyclip.inputs.transforms import thumbnail

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#4c566a", "#2a7de1", "#12a37f", "#d9822b", "#c23b5a", "#7a4fd0", "#8a8a00")

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#222;background:#fafafa;margin:0}
main{max-width:1100px;margin:auto;padding:1.5rem}
h1{font-size:1.6rem} h2{font-size:1.15rem;margin-top:2rem} h3{font-size:1rem;margin:1.4rem 0 .4rem}
.scroll{overflow-x:auto} table{border-collapse:collapse;background:#fff}
th,td{padding:.35rem .8rem;text-align:right;border-bottom:1px solid #e4e4e4;white-space:nowrap}
th:first-child,td:first-child,.words td,.words th{text-align:left} .words td{white-space:normal} th{font-weight:600}
.note{color:#555;font-size:.9rem} .figure svg{max-width:100%;height:auto;background:#fff}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(320px,100%),1fr));gap:.8rem}
.card{background:#fff;border:1px solid #e4e4e4;border-radius:8px;padding:.8rem;display:flex;gap:.8rem;font-size:.82rem}
.card img{width:72px;height:72px;flex:none;object-fit:contain} .card b{display:block;margin-bottom:.3rem}
.card dl{margin:0} .card dt{color:#555;margin-top:.25rem} .card dd{margin:0} .card div{overflow-wrap:anywhere}
.right{color:#0a7d4f;font-weight:600}
"""


def page(title: str, body: str) -> str:
    """Return the complete HTML file around a body."""
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style>
<main><h1>{html.escape(title)}</h1>
{body}</main></html>
"""


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """Return an HTML table of plain-text cells; a row of one cell is a heading across the table.

    Args:
        kind: `words` for columns of text, not numbers.
    """
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "".join(f"<tr>{_cells(row, len(columns))}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _cells(row: Sequence[str], width: int) -> str:
    if len(row) == 1:
        return f'<th colspan="{width}">{html.escape(row[0])}</th>'
    return "".join(f"<td>{html.escape(cell)}</td>" for cell in row)


def escaped(text: str) -> str:
    """Escape text for HTML."""
    return html.escape(text)


def note(text: str) -> str:
    return f'<p class="note">{html.escape(text)}</p>'


def svg(figure: Figure) -> str:
    """Return a figure as an `<svg>` element, for use in a page or as a file."""
    file = io.BytesIO()
    figure.savefig(file, format="svg")
    text = file.getvalue().decode()
    return text[text.index("<svg") :]


def framed(drawing: str) -> str:
    """Frame an `<svg>` element, as wide as the page allows."""
    return f'<div class="figure">{drawing}</div>'


def card(image: Image.Image, truth: str, answers: Mapping[str, Sequence[tuple[str, bool]]]) -> str:
    """Return a thumbnail with its truth and each model's answers.

    Args:
        answers: model -> (text, whether it is right).
    """
    lines = []
    for model, said in answers.items():
        words = ", ".join(
            f'<span class="{"right" if right else ""}">{html.escape(text)}</span>' for text, right in said
        )
        lines.append(f"<dt>{html.escape(model)}</dt><dd>{words}</dd>")
    name = html.escape(truth)
    shown = f'<img alt="{name}" src="data:image/png;base64,{_png(image)}">'
    return f'<div class="card">{shown}<div><b>{name}</b><dl>{"".join(lines)}</dl></div></div>'


def _png(image: Image.Image) -> str:
    small = thumbnail(image)
    file = io.BytesIO()
    small.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
