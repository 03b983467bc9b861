"""Features of many files: a searchable image index, and plain feature files.

`build` makes and updates an index, `index` queries it, `sheet` draws the results; `embed` writes features for other
programs.

May import: loading, data and below. Start with `index`."""
