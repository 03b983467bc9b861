"""Pictures and texts on their way in: a file becomes a picture (`decoding`), a picture becomes pixels (`transforms`),
or a random view of itself for training (`augment`); a text becomes tokens (`tokenizer`).

Imports common, and no torch before it is needed. Begin with `transforms`."""
