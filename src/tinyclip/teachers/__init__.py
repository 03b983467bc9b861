"""Teachers: our own models, models of other libraries, stored features.

`teacher` has the interface that the training step sees, `foreign` wraps OpenCLIP and transformers, `cache` reads
stored features and `make_cache` computes them.

May import: inference, data and below. Start with `teacher`."""
