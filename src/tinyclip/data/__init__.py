"""Datasets: training shards and every evaluation layout.

Training: `pack` makes tar shards, `shard_index` indexes them, `loader` reads them. Evaluation: `datasets` recognises
a layout, `readers` reads it.

May import: common, inputs. Start with `loader` or `datasets`."""
