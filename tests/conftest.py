from __future__ import annotations

import io
import json
import shlex
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from tinyclip.cli.main import main
from tinyclip.inputs.tokenizer import CLIPTokenizer, clip_tokenizer
from tinyclip.model.axes import axis_sizes
from tinyclip.model.config import CLIPConfig, vit_clip
from tinyclip.model.model import CLIP

torch.set_num_threads(1)  # for models this small a second thread only costs
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits that it is ignored

GOLDEN = Path(__file__).parent / "golden"
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(GOLDEN))

import fill  # noqa: E402  (golden/fill.py)

TEXTS = [
    "a photo of a cat",
    "two dogs playing in the snow",
    "",
    "an extremely long caption " * 30,
    "a diagram",
    "ZÜRICH café — 2024!!",
    "3/4 cup of sugar & salt",
    "日本語のテキスト",
]


def tinyclip(*arguments: object, code: int = 0) -> str:
    """Run the command in this process, which saves the start of another; returns its output (its error line when it
    should fail)."""
    output, errors, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["tinyclip", *map(str, arguments)]
    try:
        with redirect_stdout(output), redirect_stderr(errors):
            main()
        ended: object = 0
    except SystemExit as exit:
        ended = exit.code or 0
    finally:
        sys.argv = before
    assert ended == code, f"{shlex.join(map(str, arguments))}\n{output.getvalue()}{errors.getvalue()}"
    return errors.getvalue() if code else output.getvalue()


def golden(name: str) -> Any:
    path = GOLDEN / name
    return json.loads(path.read_text()) if path.suffix == ".json" else np.load(path)


def filled(config: CLIPConfig, salt: int) -> CLIP:
    """A model whose weights are `fill.py`'s for this salt."""
    model = CLIP(config)
    state = {k: torch.from_numpy(np.asarray(fill.fill(k, tuple(v.shape), salt))) for k, v in model.state_dict().items()}
    model.load_state_dict(state)
    return model.eval()


def images(config: CLIPConfig, salt: int) -> torch.Tensor:
    return torch.from_numpy(fill.images(2, config.vision.image_size, salt))


def small_config(**changes: Any) -> CLIPConfig:
    """A ViT CLIP of a few thousand parameters."""
    arguments: dict[str, Any] = {"image_size": 32, "head_dim": 8, "context_length": 12} | changes
    return vit_clip(24, (3, 32), (2, 24), 8, **arguments)


@pytest.fixture
def small_model() -> CLIP:
    torch.manual_seed(0)
    return CLIP(small_config()).eval()


def uneven_config(**changes: Any) -> CLIPConfig:
    """A ViT CLIP as a cut leaves it: unequal blocks, missing branches, empty ones, odd widths."""
    vision = {"image_size": 33, "patch_size": 8, "width": 27, "head_dim": 8}
    vision |= {"heads": (3, 0, None, 1), "mlp_width": (10, None, 7, 0)}
    text = {"width": 19, "head_dim": 4, "heads": (None, 2, 3), "mlp_width": (0, 31, None)}
    text |= {"vocab_size": 50, "context_length": 9}
    return CLIPConfig.from_dict({"embed_dim": 13, "vision": vision | {"kind": "vit"}, "text": text} | changes)


def random_model(config: CLIPConfig, seed: int = 0, dtype: torch.dtype = torch.float64) -> CLIP:
    """A model in which no parameter is at its initial 0 or 1, so that none can be forgotten unseen."""
    torch.manual_seed(seed)
    model = CLIP(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, dtype=dtype), alpha=0.2)
    return model


def random_inputs(config: CLIPConfig, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """Three pictures, and three texts of 2 to 7 tokens, zero-padded to the context."""
    generator = torch.Generator().manual_seed(7)
    size, text = config.vision.image_size, config.text
    pixels = torch.randn(3, 3, size, size, generator=generator, dtype=dtype)
    tokens = torch.zeros(3, text.context_length, dtype=torch.long)
    for row, length in zip(tokens, (2, 5, 7), strict=True):
        row[:length] = torch.randint(1, text.vocab_size - 1, (length,), generator=generator)
        row[length - 1] = text.vocab_size - 1
    return pixels, tokens


def random_masks(config: CLIPConfig, seed: int) -> dict[str, torch.Tensor]:
    """Graded masks with zeros on every axis that features have, gates included; each tower keeps two channels
    and its last branch."""
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for name, size in axis_sizes(config).items():
        mask = torch.rand(size, generator=generator, dtype=torch.float64) + 0.2
        mask[torch.rand(size, generator=generator) < 0.35] = 0
        masks[name] = mask
    gates = [name for name in masks if ".attn." in name or ".ffn." in name]
    last = [[name for name in gates if name.startswith(tower)][-1] for tower in ("visual", "text")]
    for name in ("embed", "visual.hidden", "text.hidden", *last):
        masks[name][:2] = 0.7
    return {name: mask for name, mask in masks.items() if name not in ("text.context", "text.vocab")}


def small_tokenizer() -> CLIPTokenizer:
    """CLIP's byte tokens and first 88 merges: 602 tokens."""
    return CLIPTokenizer(clip_tokenizer().merges[:88], context_length=12)


@pytest.fixture(scope="session")
def others() -> Iterator[Callable[[str], ModuleType]]:
    """Imports other people's packages, also where the installed torchvision was built for another torch and so
    lacks its operators."""
    library = None

    def load(name: str) -> ModuleType:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations inside those packages
            return import_module(name)

    try:
        load("torchvision")
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    yield load
    del library  # the operators live as long as this
