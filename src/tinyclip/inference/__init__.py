"""Encode images and texts, with torch or with an exported model.

`pipeline` is the torch path, `exported` runs exports without torch, on the runtimes in `engines`.

May import: zoo, compress, recipe and below. Start with `pipeline`."""
