"""Make CLIP models small. Names load on first use, so that `import tinyclip` costs no torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinyclip import clip as clip
    from tinyclip import evaluate as evaluate
    from tinyclip.config import CLIPConfig as CLIPConfig
    from tinyclip.inheritance import compact as compact
    from tinyclip.inheritance import inherit as inherit
    from tinyclip.loading import load as load
    from tinyclip.loss import affinity_loss as affinity_loss
    from tinyclip.loss import contrastive_loss as contrastive_loss
    from tinyclip.masks import HardConcrete as HardConcrete
    from tinyclip.measurement import measure as measure
    from tinyclip.model import CLIP as CLIP
    from tinyclip.pipeline import Pipeline as Pipeline
    from tinyclip.pipeline import preprocess as preprocess
    from tinyclip.pipeline import tokenize as tokenize
    from tinyclip.runtime import RuntimePipeline as RuntimePipeline

__version__ = "0.1.0"

_HOME = {
    "CLIP": "model",
    "CLIPConfig": "config",
    "HardConcrete": "masks",
    "Pipeline": "pipeline",
    "RuntimePipeline": "runtime",
    "affinity_loss": "loss",
    "compact": "inheritance",
    "contrastive_loss": "loss",
    "inherit": "inheritance",
    "load": "loading",
    "measure": "measurement",
    "preprocess": "pipeline",
    "tokenize": "pipeline",
}
_MODULES = ("clip", "evaluate")
__all__ = [*_HOME, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"tinyclip.{name}")
    if name in _HOME:
        return getattr(import_module(f"tinyclip.{_HOME[name]}"), name)
    raise AttributeError(f"module 'tinyclip' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
