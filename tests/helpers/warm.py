"""Imported by the server that forks test processes, to save each of them seconds of imports."""

from __future__ import annotations

import torch._dynamo  # noqa: F401  (the first optimiser imports it)

from tests.helpers import processes  # noqa: F401
from tests.helpers.quick import quick

quick()
