"""Datasets: training shards and every evaluation layout.

Training: `pack` makes tar shards from what `captioned` finds, `shard_index` indexes them, `loader` reads them;
`shards` and `samples` say what a shard holds. Evaluation: `datasets` recognises a layout, `readers` reads it. Both read
`tables`.

May import: zoo, compress, recipe and below. Start with `loader` or `datasets`."""
