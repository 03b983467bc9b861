"""Shared tools that know nothing about CLIP: files, locks, processes, devices, errors.

Atomic writes (`files`, `folders`), folder ownership (`ownership`, `locks`), data faults (`faults`), downloads,
distributed processes, checked settings (`schema`).

May import: only the version. Start with `files`, then `ownership` and `faults`."""
