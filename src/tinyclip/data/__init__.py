"""Data sets on disk. For training: tar shards, made by `pack`, indexed by `shard_index`, read by `loader`. For
judging: the layouts that people have, opened by `datasets`, read by `readers`.

Imports common and inputs. Begin with `loader` or `datasets`."""
