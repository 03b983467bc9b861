"""What makes tests take longer, and changes nothing that they look at."""

from __future__ import annotations

from types import SimpleNamespace

from megatron.energon.wrappers import gc_dataset


def quick() -> None:
    """Energon collects garbage whenever a loader begins, and looks at every object in each decoding process. Where all
    of the libraries are imported that takes half a second, and loaders are what many tests begin."""
    gc_dataset.gc = SimpleNamespace(collect=int, freeze=int, unfreeze=int, get_objects=list)
