"""Export models to other runtimes: write, quantise, and check them against the original.

`export` writes them, `quantise` converts them to 8 bits, `agreement` compares features.

May import: evaluate and below. Start with `export`."""
