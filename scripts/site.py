"""Hook of MkDocs: links of a page to files outside docs/, which the site does not have, become words."""

from __future__ import annotations

import re
from typing import Any

OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)#]+)[^)]*\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """`[the teacher](../assets/README.md)` -> ``the teacher (`assets/README.md`)``."""
    return OUTSIDE.sub(r"\1 (`\2`)", markdown)
