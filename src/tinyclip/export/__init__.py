"""Exports to other runtimes: written, quantised, checked against the original.

`export` writes them, `quantise` makes them 8-bit, `agreement` compares features.

May import: inference, evaluate and below. Start with `export`."""
