"""Run a command."""

from __future__ import annotations

import io
import json
import shlex
import sys
from contextlib import redirect_stderr, redirect_stdout
from typing import Any, NoReturn

from tinyclip.cli.main import main


def tinyclip(*arguments: object, code: int = 0) -> str:
    """Run the command in this process, which is faster than starting a new one; return its output, or its error line if
    it should fail."""
    output, errors, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["tinyclip", *map(str, arguments)]
    try:
        with redirect_stdout(output), redirect_stderr(errors):
            main()
        ended: object = 0
    except SystemExit as exit:
        ended = exit.code or 0
    finally:
        sys.argv = before
    assert ended == code, f"{shlex.join(map(str, arguments))}\n{output.getvalue()}{errors.getvalue()}"
    return errors.getvalue() if code else output.getvalue()


def strict(text: str) -> Any:
    def refuse(constant: str) -> NoReturn:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)
