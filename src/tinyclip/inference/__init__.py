"""Models that encode: with torch (`pipeline`), or exported and without it (`exported`, on the runtimes of `engines`).

Imports zoo and what is below it. Begin with `pipeline`."""
