"""MkDocs hook: replace links to files outside docs/, which are not on the site, with plain text."""

from __future__ import annotations

import re
from typing import Any

OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)#]+)[^)]*\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """`[the teacher](../assets/README.md)` -> ``the teacher (`assets/README.md`)``."""
    return OUTSIDE.sub(r"\1 (`\2`)", markdown)
