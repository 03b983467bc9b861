"""Weights on disk: our checkpoints (`checkpoint`), everybody else's (`tensors` reads any file without running it,
`wrappers` finds the model in it, `openai` and `hugging_face` know the keys), and names that stand for them (`resolve`,
`catalogue`).

Imports common, inputs and model. Begin with `checkpoint`, then `resolve`."""
