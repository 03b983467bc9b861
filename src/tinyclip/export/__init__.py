"""Models for other runtimes: written (`export`), made 8-bit (`quantise`), and compared with the original
(`agreement`).

Imports inference, evaluate and what is below them. Begin with `export`."""
