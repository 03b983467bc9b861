"""HTML reports on runs and on model comparisons.

`runs` reads run folders, `comparison` shows what `evaluate.compare` found, `structure` draws what a cut kept; `html`
has the shared pieces.

May import: teachers, loading and below. Start with `runs`."""
