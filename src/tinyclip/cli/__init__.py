"""The command line: one module per help panel, assembled in `main`.

`terminal` has the shared options and output, `live` the display of a run, `meter` the progress bar.

May import: everything, but heavy modules only inside a command. Start with `main`."""
