"""The command line: a module for each group of commands, put together in `main`. What commands share is in `terminal`.

Imports everything, heavy things only when a command runs. Begin with `main`."""
