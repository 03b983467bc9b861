"""Teachers: tinyclip's own models, models from other libraries, and cached features.

`teacher` has the interface the training step uses, `foreign` wraps OpenCLIP and transformers, `cache` reads cached
features and `make_cache` computes them.

May import: export and below. Start with `teacher`."""
