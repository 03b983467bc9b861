"""The command line: one module per help panel, assembled in `main`.

`compress`, `data`, `judge`, `ship`, `models`, `search`, `app` and `machine` have the commands, `terminal` the shared
options and output, `live` the display of a run, `meter` the progress bar.

May import: everything, but heavy modules only inside a command. Start with `main`."""
