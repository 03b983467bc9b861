"""Where the command begins: with nothing imported that a signal could interrupt with a traceback."""

import sys

from tinyclip.common.stopping import stoppable


def main() -> None:
    try:
        with stoppable():
            from tinyclip.cli.main import main as commands

            speak_plainly()
            commands()
    except KeyboardInterrupt:
        sys.exit(130)


def speak_plainly() -> None:
    """Warnings of any library as a line of ours; letters that the terminal's encoding lacks as `\\u2014`."""
    import warnings
    from io import TextIOWrapper

    from tinyclip.cli.terminal import warn

    warnings.showwarning = lambda message, *_: warn(str(message))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    main()
