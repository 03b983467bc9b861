"""Imported by the server that forks processes for tests: what each of them would take seconds to import."""

from __future__ import annotations

import torch._dynamo  # noqa: F401  (which the first optimiser imports)

from tests.helpers import processes  # noqa: F401
from tests.helpers.quick import quick

quick()
