"""Switch off what slows tests down without affecting what they check."""

from __future__ import annotations

from types import SimpleNamespace

from megatron.energon.wrappers import gc_dataset


def quick() -> None:
    """Energon collects garbage whenever a loader starts, and scans every object in each decoding process. With all the
    libraries imported that takes half a second, and many tests start loaders."""
    gc_dataset.gc = SimpleNamespace(collect=int, freeze=int, unfreeze=int, get_objects=list)
