from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib import import_module
from types import ModuleType

import pytest
import torch

from tests.helpers.models import ROOT, small_config
from tests.helpers.quick import quick
from tinyclip import __main__  # noqa: F401  (installs its SIGINT handler, so it must precede the SIGINT line below)
from tinyclip.model.model import CLIP

quick()
# So that test processes, and the server that forks them, find the package `tests` from any working directory.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
torch.set_num_threads(1)  # for models this small a second thread only slows things down
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs start with SIGINT ignored


@pytest.fixture
def small_model() -> CLIP:
    torch.manual_seed(0)
    return CLIP(small_config()).eval()


@pytest.fixture(scope="session")
def others() -> Iterator[Callable[[str], ModuleType]]:
    """Import third-party packages, even if the installed torchvision was built for another torch and so lacks its
    operators."""
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
    del library  # the operators live as long as this object
