"""A Gradio page for trying models: classify a picture, search an index, compare a student with its teacher.

Results are our own HTML with inline pictures, so the server never serves a file of the index.
"""

from __future__ import annotations

import base64
import io
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from PIL import Image

from tinyclip.app.guard import Uploads
from tinyclip.inputs.transforms import open_image
from tinyclip.search.index import Index, Match, pixels, plain, shown
from tinyclip.search.sheet import small_copy

MOST_LABELS, LONGEST_LABEL = 200, 300  # characters
MOST_FOUND = 60
MOST_BARS = 20
UPLOAD = 20 * 2**20  # bytes of all pictures in a request
UPLOADED_FILES = 10  # per request
CLIENT_KEEPS, ALL_KEEP = 3 * UPLOAD, 256 * 2**20  # bytes of pictures in memory, per visitor and in total
THUMBNAIL = 240  # pixels of the longer side
RUNS = 3  # runs whose median time is shown
KEPT = 3600  # seconds that an uploaded picture stays
QUEUE, SESSIONS = 64, 100  # waiting calls; open pages whose results are held


@dataclass(frozen=True)
class Timed:
    """Probabilities float64 (labels,) in label order, and the time they took."""

    chances: np.ndarray
    image_ms: float
    text_ms: float


@dataclass(frozen=True)
class Served:
    """A model used by one visitor at a time, since concurrent timings are meaningless; two models share a `lock`."""

    name: str
    clip: Any  # the result of `tinyclip.load`
    lock: Lock = field(default_factory=Lock, compare=False)

    def encode_image(self, picture: Image.Image | np.ndarray) -> np.ndarray:
        """Return features float32 (1, embed_dim)."""
        with self.lock:
            return plain(self.clip.encode_image(picture))

    def encode_text(self, texts: Sequence[str]) -> np.ndarray:
        """Return features float32 (n, embed_dim)."""
        with self.lock:
            return plain(self.clip.encode_text(texts))

    def classify(self, picture: Image.Image, labels: Sequence[str]) -> Timed:
        """Classify as `Pipeline.classify`, with the median times for the picture and for all labels, in ms."""
        with self.lock:
            image, image_ms = _timed(lambda: plain(self.clip.encode_image(picture)))
            text, text_ms = _timed(lambda: plain(self.clip.encode_text(labels)))
        logits = np.exp(self.clip.logit_scale) * (text.astype(np.float64) @ image[0].astype(np.float64))
        chances = np.exp(logits - logits.max())
        return Timed(chances / chances.sum(), image_ms, text_ms)


def _timed(compute: Callable[[], np.ndarray]) -> tuple[np.ndarray, float]:
    times = []
    for _ in range(RUNS):
        began = time.perf_counter()
        result = compute()
        times.append(1000 * (time.perf_counter() - began))
    return result, sorted(times)[RUNS // 2]


# --- what visitors give ------------------------------------------------------------------------------------------


def labels_from(text: str | None) -> list[str]:
    """Parse labels, one per line or separated by commas, ignoring blanks and duplicates.

    Raises:
        ValueError: for no label, more than `MOST_LABELS`, or one that is too long.
    """
    labels = list(dict.fromkeys(one.strip() for one in (text or "").replace(",", "\n").splitlines() if one.strip()))
    if not labels:
        raise ValueError("No labels: type some, one per line or separated by commas.")
    if len(labels) > MOST_LABELS:
        raise ValueError(f"{len(labels):,} labels are too many, {MOST_LABELS} at most.")
    if max(map(len, labels)) > LONGEST_LABEL:
        raise ValueError(f"A label is too long: {LONGEST_LABEL} characters at most.")
    return labels


def uploaded(uploads: Uploads, name: str | None) -> io.BytesIO:
    """Return the picture that a visitor uploaded.

    Raises:
        ValueError: when there is none, or it is no longer kept.
    """
    if not name:
        raise ValueError("No picture: choose one first.")
    return io.BytesIO(uploads.read(name))


def picture_from(file: io.BytesIO) -> Image.Image:
    """Decode the uploaded picture.

    Raises:
        ValueError: when it is damaged, or too large.
    """
    try:
        return open_image(file)
    except ValueError as error:
        raise ValueError(f"This cannot be used: {error}.") from None


def query_from(text: str | None) -> str:
    """Return the text to search for.

    Raises:
        ValueError: when it is empty or too long.
    """
    words = (text or "").strip()
    if not words:
        raise ValueError("Nothing to search for: type some words.")
    if len(words) > LONGEST_LABEL:
        raise ValueError(f"Too many words: {LONGEST_LABEL} characters at most.")
    return words


# --- what they get -----------------------------------------------------------------------------------------------


def safe(text: str) -> str:
    """Escape text for HTML and for the template engine that Gradio also applies to it."""
    return escape(shown(text)).translate({ord(sign): f"&#{ord(sign)};" for sign in "{}$`\\"})


def bars(labels: Sequence[str], result: Timed, title: str, times: bool = False) -> str:
    """Return HTML with a bar for each label, most probable first."""
    order = np.argsort(-result.chances, kind="stable")
    rows = [
        f'<li><span class="label">{safe(labels[i])}</span><span class="percent">{100 * result.chances[i]:.1f} %</span>'
        f'<span class="bar" aria-hidden="true"><span style="width:{100 * result.chances[i]:.2f}%"></span></span></li>'
        for i in order[:MOST_BARS]
    ]
    more = len(labels) - MOST_BARS
    rest = f"<p>{more} less probable labels are not shown.</p>" if more > 0 else ""
    label = "label" if len(labels) == 1 else "labels"
    took = f"{result.image_ms:.1f} ms for the picture, {result.text_ms:.1f} ms for {len(labels)} {label}"
    time = f'<p class="took">{took}</p>' if times else ""
    return _section(f"Probabilities, {title}", f"{time}<ol class='bars'>{''.join(rows)}</ol>{rest}")


def gallery(index: Index, matches: Sequence[Match], query: str) -> str:
    """Return HTML with the found pictures as thumbnails, best first."""
    tiles = [
        f'<li><figure>{thumbnail(index.file(match.path), match.path)}<figcaption><b title="cosine">{match.cosine:.3f}'
        f"</b> {safe(match.path)}</figcaption></figure></li>"
        for match in matches
    ]
    return _section(f"Found for {safe(query)}", f"<ol class='found'>{''.join(tiles)}</ol>")


def _section(title: str, body: str) -> str:
    return f'<section class="result" role="region" aria-label="{title}"><h3>{title}</h3>{body}</section>'


def thumbnail(file: Path, name: str) -> str:
    """Return an `img` with inline data, or a short text if the picture can no longer be read."""
    try:
        if not file.is_file():  # also excludes a pipe, which would never end
            raise OSError
        picture = small_copy(file, THUMBNAIL)
    except (ValueError, OSError) as error:
        word = "damaged" if hasattr(error, "cause") else "missing"
        return f'<span class="gone" role="img" aria-label="{safe(name)}, {word}">{word}</span>'
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=80)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f'<img alt="{safe(name)}" src="data:image/webp;base64,{data}">'


def find(index: Index, features: np.ndarray, query: str, count: float) -> str:
    """Return a gallery of the `count` pictures nearest to features (1, embed_dim).

    Raises:
        ValueError: when `count` is out of bounds.
    """
    if not 1 <= count <= MOST_FOUND:
        raise ValueError(f"{count:g} pictures: 1 to {MOST_FOUND} can be shown.")
    return gallery(index, index.search(features, int(count))[0], query)


# --- the page ----------------------------------------------------------------------------------------------------

CSS = """
.result h3 { margin: 0 0 .5rem; font-size: 1rem; overflow-wrap: anywhere; }
.result ol { list-style: none; margin: 0; padding: 0; }
.result .took { margin: 0 0 .5rem; }
.bars li { display: grid; grid-template-columns: 1fr auto; gap: 0 .75rem; margin-bottom: .6rem; }
.bars .label { overflow-wrap: anywhere; }
.bars .percent { font-variant-numeric: tabular-nums; }
.bars .bar { grid-column: 1 / -1; height: .6rem; border-radius: .3rem; background: var(--border-color-primary); }
.bars .bar span { display: block; height: 100%; min-width: 2px; border-radius: .3rem; background: var(--color-accent); }
.found { display: grid; grid-template-columns: repeat(auto-fill, minmax(130px, 1fr)); gap: 1rem; }
.found figure { margin: 0; }
.found img, .found .gone { width: 100%; aspect-ratio: 1; height: auto; object-fit: contain; margin: 0;
  border-radius: .4rem; background: var(--background-fill-secondary); }
.found .gone { display: grid; place-items: center; }
.found figcaption { font-size: .85rem; overflow-wrap: anywhere; }
button:focus-visible, [tabindex]:focus-visible { outline: 3px solid var(--color-accent); outline-offset: 2px; }
"""


def check_gradio() -> None:
    """Check that Gradio, which only this page needs, is installed, without importing it, which takes seconds.

    Raises:
        ValueError: when it is not installed.
    """
    if find_spec("gradio") is None:
        raise ValueError("the page needs gradio: pip install tinyclip[app]")


@contextmanager
def _told(gr: Any) -> Iterator[None]:
    """Turn errors that the visitor can fix into the page's own errors."""
    try:
        yield
    except ValueError as error:
        raise gr.Error(safe(" ".join(str(error).split())), print_exception=False) from None


def _picture(gr: Any, label: str = "Picture") -> Any:
    image = gr.Image(label=label, type="filepath", sources=["upload", "clipboard"], buttons=[], height=280)
    image.alt_text = "The chosen picture"
    # Gradio treats file data from clients as files on the server. The door only lets through the name of the client's
    # own upload, which to Gradio is a plain word, and stands for a picture only in `Uploads`.
    image.data_model = None
    image.preprocess = lambda name: name
    image.api_info = lambda: {"type": "string"}
    return image


def _labels(gr: Any) -> Any:
    return gr.Textbox(
        label="Labels", info="One per line, or separated by commas.", lines=4, value="a cat, a dog, an apple"
    )


def _result(gr: Any) -> Any:
    return gr.HTML(min_height=120, js_on_load=None)


def _classify_tab(gr: Any, model: Served, uploads: Uploads) -> None:
    def classify(name: str | None, text: str) -> str:
        with _told(gr):
            wanted = labels_from(text)
            return bars(wanted, model.classify(picture_from(uploaded(uploads, name)), wanted), model.name)

    with gr.Tab("Classify"), gr.Row():
        with gr.Column():
            given = [_picture(gr), _labels(gr)]
            button = gr.Button("Classify", variant="primary")
        with gr.Column():
            result = _result(gr)
        gr.on([button.click, given[1].submit], classify, given, result, api_visibility="private")


def _search_tab(gr: Any, model: Served, uploads: Uploads, index: Index) -> None:
    def by_words(text: str, count: float) -> str:
        with _told(gr):
            query = query_from(text)
            return find(index, model.encode_text([query]), f"“{query}”", count)

    def by_picture(name: str | None, count: float) -> str:
        with _told(gr):
            file = uploaded(uploads, name)
            picture_from(file)  # raises if it is damaged
            looked_at = pixels(model.clip, file)  # processed like the index's own pictures
            return find(index, model.encode_image(looked_at), "a picture like this", count)

    with gr.Tab("Search"):
        gr.Markdown(f"{len(index):,} pictures of {safe(index.path.name)}")
        with gr.Row():
            with gr.Column():
                words = gr.Textbox(label="Words", placeholder="a green apple", max_lines=1)
                asked = gr.Button("Search by words", variant="primary")
                count = gr.Slider(1, MOST_FOUND, 12, step=1, label="Pictures to find", buttons=[])
            with gr.Column():
                like = _picture(gr, "Example picture")
                shown_like = gr.Button("Search by picture")
        found = _result(gr)
        gr.on([asked.click, words.submit], by_words, [words, count], found, api_visibility="private")
        shown_like.click(by_picture, [like, count], found, api_visibility="private")


def _compare_tab(gr: Any, model: Served, uploads: Uploads, student: Served) -> None:
    def compare(name: str | None, text: str) -> tuple[str, str]:
        with _told(gr):
            wanted, image = labels_from(text), picture_from(uploaded(uploads, name))
            results = [(one.classify(image, wanted), one.name) for one in (model, student)]
            teacher, small = (bars(wanted, result, name, times=True) for result, name in results)
            return teacher, small

    with gr.Tab("Compare"):
        with gr.Row():
            given = [_picture(gr), _labels(gr)]
        button = gr.Button("Compare", variant="primary")
        with gr.Row():
            results = [_result(gr) for _ in range(2)]
        gr.on([button.click, given[1].submit], compare, given, results, api_visibility="private")


def page(model: Served, uploads: Uploads, index: Index | None = None, student: Served | None = None) -> Any:
    """Build the page's `gradio.Blocks`; without an index or a student, its tab is omitted."""
    import gradio as gr

    with gr.Blocks(title="tinyclip", analytics_enabled=False) as blocks:
        gr.Markdown(f"# tinyclip\nModel: {safe(model.name)}")
        with gr.Tabs():
            _classify_tab(gr, model, uploads)
            if index is not None:
                _search_tab(gr, model, uploads, index)
            if student is not None:
                _compare_tab(gr, model, uploads, student)
    return blocks


# --- the server --------------------------------------------------------------------------------------------------


@contextmanager
def application(model: Served, index: Index | None = None, student: Served | None = None) -> Iterator[Any]:
    """Yield the page as an ASGI app that never opens files named by clients; put a `Gate` in front of it. Meanwhile,
    Gradio has a temporary folder, which stays empty."""
    with tempfile.TemporaryDirectory(prefix="tinyclip-app-", ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # also read when Gradio is imported
        # Disables its version check and analytics; must be set before the import.
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        import gradio as gr
        from fastapi import FastAPI

        from tinyclip.app.door import Door

        uploads = Uploads(UPLOAD, UPLOADED_FILES, CLIENT_KEEPS, ALL_KEEP, KEPT)
        blocks = page(model, uploads, index, student)
        blocks.queue(max_size=QUEUE, api_open=False)
        blocks.state_session_capacity = SESSIONS
        blocks.has_launched = True  # else Gradio checks no paths; a second safeguard behind the door
        options: dict[str, Any] = {"allowed_paths": [], "max_file_size": UPLOAD, "footer_links": [], "css": CSS}
        options |= {"run_history": False, "enable_monitoring": False, "mcp_server": False, "ssr_mode": False}
        options |= {"show_error": False, "pwa": False}
        mounted = gr.mount_gradio_app(FastAPI(openapi_url=None), blocks, "/", theme=gr.themes.Default(), **options)
        yield Door(mounted, blocks, uploads, SESSIONS)
