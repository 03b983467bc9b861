"""CLIP's byte-pair encoding on the `tokenizers` library, whole or with a reduced vocabulary. No torch here."""

from __future__ import annotations

import html
import json
import lzma
import re
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Split
from tokenizers.pre_tokenizers import Sequence as PreTokenizers

START, END = "<start_of_text>", "<end_of_text>"  # OpenCLIP's spelling
OPENAI_SPECIAL = ("<|startoftext|>", "<|endoftext|>")  # also Hugging Face's
WORD_END = "</w>"
BYTE_TOKENS = 512  # 256 bytes, each within a word and at a word's end
PLAIN = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[a-z]+|[0-9]|[^ a-z0-9]+")  # PATTERN for plain text in lower case
KNOWN_WORDS = 100_000  # largest number of words whose ids are cached
PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def clean(text: str) -> str:
    """Clean text as OpenCLIP does: ftfy, HTML unescape twice, single spaces, lower case."""
    if not is_plain(text):
        import ftfy  # the import takes as long as tokenising a few thousand plain texts

        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


def is_plain(text: str) -> bool:
    """Whether ftfy and HTML unescaping leave the text alone and it has no special token: true of most captions;
    skipping both steps is ten times faster."""
    return text.isascii() and text.isprintable() and "&" not in text and "<" not in text


class CLIPTokenizer:
    """Texts to token ids, `[start, ..., end]`, zero-padded to the context length.

    Args:
        merges: byte-pair merges as (left, right), by rank. The vocabulary is the 512 byte tokens, one token per
            merge, start and end, so the end token always has the highest id.
        context_length: default length of a row, including start and end.
        special: how the start and end tokens are written in a text.
    """

    def __init__(
        self,
        merges: Sequence[tuple[str, str]],
        context_length: int = 77,
        special: tuple[str, str] = (START, END),
    ) -> None:
        self.merges = list(merges)
        self.context_length = context_length
        self.special = special
        tokens = self.tokens()
        vocabulary = {token: i for i, token in enumerate(tokens)}
        if len(vocabulary) != len(tokens):
            raise ValueError("the merges produce one token twice")
        self._bpe = Tokenizer(BPE(vocabulary, self.merges, continuing_subword_prefix="", end_of_word_suffix=WORD_END))
        self._bpe.pre_tokenizer = PreTokenizers(
            [Split(Regex(PATTERN), "removed", invert=True), ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        self._bpe.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
        self.start_id, self.end_id = len(tokens) - 2, len(tokens) - 1
        self._words: dict[str, list[int]] = {}

    @property
    def vocab_size(self) -> int:
        return self.end_id + 1

    def encode(self, text: str) -> list[int]:
        """Return the ids of one text, without start and end."""
        if not is_plain(text):
            return self._bpe.encode(clean(text)).ids
        ids: list[int] = []
        for word in PLAIN.findall(text.lower()):
            if (known := self._words.get(word)) is None:
                known = self._bpe.encode(word).ids
                if len(self._words) < KNOWN_WORDS:
                    self._words[word] = known
            ids += known
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids, without start, end and anything after the end."""
        table = {symbol: byte for byte, symbol in _symbol_of_byte().items()}
        tokens, words = self.tokens(), []
        for i in ids:
            if i == self.end_id:
                break
            if i != self.start_id:
                words.append(tokens[int(i)])
        joined = "".join(words).replace(WORD_END, " ")
        data = b"".join(bytes([table[c]]) if c in table else b" " for c in joined)
        return data.decode("utf-8", errors="replace").strip()

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> np.ndarray:
        """int64 (n, context_length); a text that is too long is cut and keeps its end token.

        Raises:
            ValueError: for something that is not text, or a context below 2.
        """
        length = self.context_length if context_length is None else context_length
        return pad(self.rows(texts, length), length)

    def rows(self, texts: str | Sequence[str], context_length: int | None = None) -> list[list[int]]:
        """Ids of each text from start to end token, not padded (see `__call__`)."""
        if not isinstance(texts, (str, list, tuple)):
            raise ValueError(f"expected a text or a list of texts, got {type(texts).__name__}")
        length = self.context_length if context_length is None else context_length
        if length < 2:
            raise ValueError(f"context_length {length}: must be at least 2, for the start and the end token")
        rows = []
        for text in [texts] if isinstance(texts, str) else texts:
            if not isinstance(text, str):
                raise ValueError(f"expected texts, got {type(text).__name__}")
            if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
                raise ValueError(f"{text.encode(errors='replace').decode()!r} is not valid Unicode")
            rows.append([self.start_id, *self.encode(text)[: length - 2], self.end_id])
        return rows

    def kept_ids(self, texts: Iterable[str]) -> list[int]:
        """Return the ids to keep so that `texts` encode exactly as before, ascending: their tokens and, recursively,
        the tokens these are merged from, plus the byte tokens, start and end."""
        needed = set(range(BYTE_TOKENS)) | {self.start_id, self.end_id}
        ids = {token: i for i, token in enumerate(self.tokens())}
        stack = [i for text in texts for i in set(self.encode(text))]
        while stack:
            i = stack.pop()
            if i not in needed:
                needed.add(i)
                stack += [ids[part] for part in self.merges[i - BYTE_TOKENS]]
        return sorted(needed)

    def pruned(self, kept: Sequence[int]) -> CLIPTokenizer:
        """Return a tokenizer with only the kept ids (see `kept_ids`), renumbered in order."""
        merges = [self.merges[i - BYTE_TOKENS] for i in kept if BYTE_TOKENS <= i < self.start_id]
        return CLIPTokenizer(merges, self.context_length, self.special)

    def tokens(self) -> list[str]:
        """The token of every id."""
        symbols = list(_symbol_of_byte().values())
        return [*symbols, *(s + WORD_END for s in symbols), *(a + b for a, b in self.merges), *self.special]

    def save(self, path: str | Path) -> None:
        """Write the merges, context length and special tokens as JSON."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    def to_json(self) -> str:
        """Return the JSON that `save` writes."""
        lines = [f"{a} {b}" for a, b in self.merges]
        data = {"type": "clip-bpe", "context_length": self.context_length, "special": self.special, "merges": lines}
        return json.dumps(data, ensure_ascii=False)

    @classmethod
    def from_file(cls, path: str | Path) -> CLIPTokenizer:
        """Read a tokenizer written by `save`; `ValueError` for anything else."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            merges = [_pair(line) for line in data["merges"]]
            start, end = map(str, data.get("special", (START, END)))  # missing in older files
            return cls(merges, int(data["context_length"]), (start, end))
        except FileNotFoundError:
            raise ValueError(f"{path}: no such file") from None
        except Exception as error:  # `tokenizers` raises bare Exception for merges that do not fit
            raise ValueError(f"{path}: not a tinyclip tokenizer ({type(error).__name__}: {error})") from None


def pad(rows: Sequence[Sequence[int]], length: int) -> np.ndarray:
    """Zero-pad rows of at most `length` ids: int64 (n, length)."""
    tokens = np.zeros((len(rows), length), np.int64)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    return tokens


def _pair(line: str) -> tuple[str, str]:
    left, right = line.split(" ")
    return left, right


@cache
def openai_tokenizer() -> CLIPTokenizer:
    """CLIP's own vocabulary with OpenAI's special tokens."""
    return CLIPTokenizer(clip_tokenizer().merges, special=OPENAI_SPECIAL)


@cache
def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's own vocabulary of 49,408 tokens, with OpenCLIP's special tokens."""
    data = files("tinyclip").joinpath("vocabulary/clip_merges.txt.xz").read_bytes()
    return CLIPTokenizer([_pair(line) for line in lzma.decompress(data).decode().splitlines()])


def _symbol_of_byte() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte, in CLIP's vocabulary order (openai/CLIP, simple_tokenizer.py)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(rest)}
