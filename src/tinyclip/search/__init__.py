"""Features of many files: a searchable image index, and plain feature files.

`build` makes and updates an index, `vectors` holds its features, `index` queries it, `sheet` draws the results; `embed`
writes features for other programs as `feature_files`.

May import: teachers, loading and below. Start with `index`."""
