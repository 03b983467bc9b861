"""What every room uses and what knows nothing of CLIP: files that are written whole, whose a folder is, locks, faults
of data, downloads, devices and processes, checked settings.

Imports nothing of ours but the version. Begin with `files`, then `ownership` and `faults`."""
