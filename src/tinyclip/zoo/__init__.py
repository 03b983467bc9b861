"""Weights on disk: our checkpoints and everyone else's, model names, downloads.

`checkpoint` reads and writes checkpoints. `tensors` reads any weight file without running code from it, `wrappers`
finds the CLIP inside, `openai` and `hugging_face` map its keys. `resolve` turns a name into a path, `catalogue` lists
the published models. `convert` writes other layouts, `card` the model card, `push` uploads.

May import: inputs, model, loss and common. Start with `checkpoint`, then `resolve`."""
