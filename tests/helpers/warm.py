"""Imported by the server that forks processes for tests: what each of them would take seconds to import."""

from __future__ import annotations

import torch

from tests.helpers.models import small_config
from tests.train import test_killed  # noqa: F401
from tinyclip.model.model import CLIP

with torch.device("meta"):  # torch imports much more at its first random number there
    CLIP(small_config())
