"""From files to tensors: image decoding, transforms, augmentation, tokenizer.

`decoding` opens any image file, `transforms` gives the exact evaluation pixels, `augment` draws random views for
training, `tokenizer` turns text into tokens, `batching` checks what users pass in.

May import: common. No torch at import time. Start with `transforms`."""
