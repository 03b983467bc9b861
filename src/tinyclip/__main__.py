"""The entry point of the `tinyclip` command. Ctrl-C during the imports ends it without a traceback."""

import signal
import sys

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `stoppable` takes over: no traceback of a half-done import

from tinyclip.common.stopping import stoppable


def main() -> None:
    try:
        with stoppable(exiting=True):
            from tinyclip.cli.main import main as commands

            speak_plainly()
            commands()
    except KeyboardInterrupt:
        sys.exit(130)


def speak_plainly() -> None:
    """Print libraries' warnings in our one-line format, and escape characters the terminal cannot encode."""
    import warnings
    from io import TextIOWrapper

    from tinyclip.cli.terminal import warn

    warnings.showwarning = lambda message, *_: warn(str(message))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    main()
