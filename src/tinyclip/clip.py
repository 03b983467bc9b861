"""Drop-in replacement for OpenAI's `clip` package: change the import to `import tinyclip.clip as clip`.

`load`, `tokenize` and `available_models` have the signatures of openai/CLIP (clip/clip.py); the model that `load`
returns has the methods and attributes of its model (clip/model.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from tinyclip.common.devices import resolve_device
from tinyclip.common.download import check, fetch
from tinyclip.inference.pipeline import TensorPreprocess
from tinyclip.inference.pipeline import load as load_pipeline
from tinyclip.inputs.tokenizer import CLIPTokenizer, clip_tokenizer, openai_tokenizer, pad
from tinyclip.model.config import CLIPConfig
from tinyclip.model.masks import Masks
from tinyclip.model.model import CLIP, cast
from tinyclip.zoo import catalogue

__all__ = ["available_models", "load", "tokenize"]

# OpenAI's own files (openai/CLIP, clip/clip.py). Each link contains the SHA-256 of its file.
OPENAI = "https://openaipublic.azureedge.net/clip/models/"
OPENAI_FILES = {
    "RN50": "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762/RN50.pt",
    "RN101": "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599/RN101.pt",
    "RN50x4": "7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd/RN50x4.pt",
    "RN50x16": "52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa/RN50x16.pt",
    "RN50x64": "be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c/RN50x64.pt",
    "ViT-B/32": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/ViT-B-32.pt",
    "ViT-B/16": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f/ViT-B-16.pt",
    "ViT-L/14": "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836/ViT-L-14.pt",
    "ViT-L/14@336px": "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02/ViT-L-14-336px.pt",
}


class Model(CLIP):
    """A `CLIP` that behaves like OpenAI's: raw features in the model's `dtype`, `forward` returns logits.

    Args:
        vocabulary: the model's own tokenizer if its vocabulary was reduced; the model still accepts the tokens of
            `clip.tokenize`.
    """

    def __init__(self, config: CLIPConfig, vocabulary: CLIPTokenizer | None = None) -> None:
        super().__init__(config)
        self.vocabulary = vocabulary

    @property
    def context_length(self) -> int:
        return self.config.text.context_length

    @property
    def vocab_size(self) -> int:
        return self.config.text.vocab_size

    def encode_image(self, image: Tensor, masks: Masks | None = None, normalize: bool = False) -> Tensor:
        """Encode preprocessed images (n, 3, input_resolution, input_resolution) -> image_features (n, embed_dim)."""
        image = image.to(self.text_projection.dtype)  # not below float32 unnecessarily, see `cast`
        return super().encode_image(image, masks, normalize).to(self.dtype)

    def encode_text(self, text: Tensor, masks: Masks | None = None, normalize: bool = False) -> Tensor:
        """Encode int tokens (n, length) from `clip.tokenize` -> text_features (n, embed_dim).

        Positions after the last end token of the batch are not computed. For a reduced vocabulary, the tokens are
        decoded to words and tokenized again.
        """
        if self.vocabulary is not None:
            words = [clip_tokenizer().decode(row) for row in text.tolist()]
            rows = self.vocabulary.rows(words, self.context_length)
            text = torch.from_numpy(pad(rows, max(map(len, rows), default=2))).to(text.device)
        elif text.ndim == 2 and text.numel():
            text = text[:, : int(text.argmax(-1).max()) + 1]
        return super().encode_text(text, masks, normalize).to(self.dtype)

    def forward(  # type: ignore[override]
        self, image: Tensor, text: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return logits_per_image (images, texts) and logits_per_text (texts, images): scaled cosine similarities."""
        image_features = F.normalize(self.encode_image(image), dim=-1)
        text_features = F.normalize(self.encode_text(text), dim=-1)
        logits_per_image = self.logit_scale.exp().to(self.dtype) * image_features @ text_features.t()
        return logits_per_image, logits_per_image.t()


def available_models() -> list[str]:
    """Return the names that `load` knows: OpenAI's models, those of the zoo, and those shipped with the package."""
    return [*OPENAI_FILES, *(entry.name for entry in catalogue.ENTRIES), *catalogue.SHIPPED]


def load(
    name: str,
    device: str | torch.device | None = None,
    jit: bool = False,
    download_root: str | None = None,
) -> tuple[Model, TensorPreprocess]:
    """Load a model and its preprocessing, by a name from `available_models()` or anything `tinyclip.load` accepts.

    Args:
        device: by default CUDA if available, else the CPU. On CUDA the model computes in float16, like OpenAI's.
        jit: must be False, as TorchScript is not supported.
        download_root: download folder; by default $TINYCLIP_CACHE or the platform's cache folder.

    Returns:
        The model, in evaluation mode; and a callable that converts a PIL image to a float32 tensor
        (3, input_resolution, input_resolution).

    Raises:
        ValueError: as in `tinyclip.load`, or if `jit` is True.

    >>> import tinyclip.clip as clip
    >>> from PIL import Image
    >>> model, preprocess = clip.load("emoji-student", device="cpu")
    >>> logits_per_image, _ = model(preprocess(Image.open("photo.jpg"))[None], clip.tokenize(["a dog", "a cat"]))
    >>> logits_per_image.shape
    torch.Size([1, 2])
    """
    if jit:
        raise ValueError("jit=True: models here are not TorchScript; leave it out and use torch.compile for speed")
    place = resolve_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    path = _openai_file(name, download_root) if name in OPENAI_FILES and not Path(name).exists() else name
    clip = load_pipeline(path, cache=download_root)
    own = clip.tokenizer if clip.tokenizer.merges != clip_tokenizer().merges else None
    with torch.device("meta"):
        model = Model(clip.model.config, own)
    model.load_state_dict(clip.model.state_dict(), assign=True)
    cast(model.to(place), torch.float16 if place.type == "cuda" else torch.float32)
    return model.eval(), TensorPreprocess(clip.preprocessing)


def tokenize(texts: str | Sequence[str], context_length: int = 77, truncate: bool = False) -> Tensor:
    """Tokenize with CLIP's own vocabulary: int32 (n, context_length), zero-padded. `<|startoftext|>` and
    `<|endoftext|>` in a text become the special tokens, as in OpenAI's function.

    Args:
        truncate: cut texts that are too long, keeping the end token.

    Raises:
        RuntimeError: if a text is too long, as in OpenAI's function.
    """
    tokenizer = openai_tokenizer()
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not truncate:
        for text, row in zip(texts, tokenizer.rows(texts, context_length + 1), strict=True):
            if len(row) > context_length:
                raise RuntimeError(f"Input {text} is too long for context length {context_length}")
    return torch.from_numpy(tokenizer(texts, context_length)).int()


def _openai_file(name: str, cache: str | None) -> Path:
    """Return one of OpenAI's files, downloaded once and checked against the SHA-256 in its link."""
    digest, _, file = OPENAI_FILES[name].partition("/")
    path = catalogue.cache_folder(cache) / file
    if not path.exists():
        fetch(OPENAI + OPENAI_FILES[name], path)
    if (found := check(path)["sha256"]) != digest:
        raise ValueError(f"{path} is not OpenAI's {name}: its SHA-256 is {found}, not {digest}; delete it")
    return path
