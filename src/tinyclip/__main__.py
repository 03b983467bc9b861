"""Where the command begins: with nothing imported that Ctrl-C could interrupt with a traceback."""

import sys


def main() -> None:
    try:
        from tinyclip.cli import main as commands

        commands()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
