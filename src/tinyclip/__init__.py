"""Make CLIP models small. Names load on first use, so that `import tinyclip` does not import torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tinyclip.version import __version__ as __version__

if TYPE_CHECKING:
    from tinyclip import clip as clip
    from tinyclip import evaluate as evaluate
    from tinyclip.compress.calibrate import Calibration as Calibration
    from tinyclip.compress.calibrate import calibrate as calibrate
    from tinyclip.compress.inheritance import compact as compact
    from tinyclip.compress.inheritance import inherit as inherit
    from tinyclip.compress.learned_masks import Constraint as Constraint
    from tinyclip.compress.learned_masks import HardConcrete as HardConcrete
    from tinyclip.inference.exported import RuntimePipeline as RuntimePipeline
    from tinyclip.inference.pipeline import Pipeline as Pipeline
    from tinyclip.inference.pipeline import preprocess as preprocess
    from tinyclip.inference.pipeline import tokenize as tokenize
    from tinyclip.loading import load as load
    from tinyclip.loss import affinity_loss as affinity_loss
    from tinyclip.loss import contrastive_loss as contrastive_loss
    from tinyclip.model.config import CLIPConfig as CLIPConfig
    from tinyclip.model.model import CLIP as CLIP
    from tinyclip.model.speed import measure as measure

_HOME = {
    "CLIP": "model.model",
    "CLIPConfig": "model.config",
    "Calibration": "compress.calibrate",
    "Constraint": "compress.learned_masks",
    "HardConcrete": "compress.learned_masks",
    "Pipeline": "inference.pipeline",
    "RuntimePipeline": "inference.exported",
    "affinity_loss": "loss",
    "calibrate": "compress.calibrate",
    "compact": "compress.inheritance",
    "contrastive_loss": "loss",
    "inherit": "compress.inheritance",
    "load": "loading",
    "measure": "model.speed",
    "preprocess": "inference.pipeline",
    "tokenize": "inference.pipeline",
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
