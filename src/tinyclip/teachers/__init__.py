"""What a student learns from: one of our models, one of another library (`foreign`), or features stored by
`make_cache` (`cache`); the training step cannot tell them apart (`teacher`).

Imports inference, data and what is below them. Begin with `teacher`."""
