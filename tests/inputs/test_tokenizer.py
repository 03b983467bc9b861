from __future__ import annotations

import html
import json
import random
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import ftfy
import numpy as np
import pytest
import torch

import tinyclip
from tests.helpers.models import golden, small_tokenizer
from tinyclip.inputs.tokenizer import BYTE_TOKENS, CLIPTokenizer, clean, clip_tokenizer, is_plain, openai_tokenizer
from tinyclip.inputs.transforms import Preprocess
from tinyclip.zoo.hugging_face import write_processor

WORDS = [
    "photo",
    "of",
    "a",
    "cat",
    "dogs",
    "playing",
    "snow",
    "café",
    "日本語",
    "don't",
    "2024",
    "rhinoceros",
    "(red)!",
]


def padded(ids: list[int], length: int = 77) -> list[int]:
    return ids + [0] * (length - len(ids))


@pytest.mark.parametrize("row", golden("tokens.json"), ids=lambda row: ascii(row["text"][:20]))
def test_tokens_equal_openclips(row: dict[str, Any]) -> None:
    assert clip_tokenizer()(row["text"])[0].tolist() == padded(row["ids"])


def test_the_public_function_gives_int64_rows_padded_with_zeros() -> None:
    tokens = tinyclip.tokenize(["a photo of a cat", ""])
    assert (tokens.dtype, tuple(tokens.shape)) == (torch.int64, (2, 77))
    assert tokens[0].tolist() == padded([49406, 320, 1125, 539, 320, 2368, 49407])
    assert tokens[1].tolist() == padded([49406, 49407])
    assert torch.equal(tinyclip.tokenize("a photo of a cat", context_length=9), tokens[:1, :9])


def test_the_short_way_for_plain_text_is_exact() -> None:
    """Plain texts skip ftfy and html, and are assembled from cached words."""
    rng, tokenizer = random.Random(0), small_tokenizer()
    ascii_texts = ["".join(chr(rng.randrange(32, 127)) for _ in range(rng.randrange(60))) for _ in range(2000)]
    words = [
        " ".join(rng.choices([*WORDS, "'s", "it's", "WE'LL", "x1y22", "a.b", "&amp;", "<b>"], k=9)) for _ in range(500)
    ]
    texts = [*ascii_texts, *words, "<end_of_text>", "a\x1b[1mb", "a\x7fb", "a\tb", "&lt;", "  a  "]
    assert sum(map(is_plain, texts)) > 800
    for text in texts:
        cleaned = " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split()).lower()
        assert clean(text) == cleaned
        assert tokenizer.encode(text) == tokenizer._bpe.encode(cleaned).ids


def test_html_is_unescaped_twice() -> None:
    # ftfy itself unescapes once, but not if there are angle brackets.
    assert clean("<b> Salt &amp;gt; &amp;amp;amp; pepper") == "<b> salt > &amp; pepper"


@pytest.mark.parametrize("length", [2, 3, 6, 7, 8])
def test_a_text_too_long_keeps_its_end_token(length: int) -> None:
    whole = [49406, 320, 1125, 539, 320, 2368, 49407]
    wanted = [*whole[: length - 1], 49407] if length < 7 else padded(whole, length)
    assert clip_tokenizer()("a photo of a cat", length).tolist() == [wanted]


@pytest.mark.parametrize("length", [1, 0, -1])
def test_a_context_without_room_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match=f"context_length {length}"):
        clip_tokenizer()("a", length)


@pytest.mark.parametrize("texts", [["a cat", 3], [None], [b"cat"], [["a cat"]], b"cat", 3, None])
def test_what_is_no_text_is_refused(texts: Any) -> None:
    with pytest.raises(ValueError, match=r"expected (a text|texts)"):
        clip_tokenizer()(texts)


def test_what_is_no_unicode_is_refused() -> None:
    """For example labels in another encoding from the command line."""
    with pytest.raises(ValueError, match="'caf\\?' is not valid Unicode"):
        clip_tokenizer()(b"caf\xe9".decode("utf-8", "surrogateescape"))


def test_no_texts_give_no_rows() -> None:
    tokens = clip_tokenizer()([])
    assert (tokens.dtype, tokens.shape) == (np.int64, (0, 77))


@pytest.mark.parametrize(
    "text", ["a photo of a cat", "  two   Dogs\nin the snow ", "naïve café zürich", "日本語", "x 😀", ""]
)
def test_words_come_back(text: str) -> None:
    tokenizer = clip_tokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == clean(text)
    assert tokenizer.decode(tokenizer(text)[0]) == clean(text)


def test_a_saved_tokenizer_is_the_same(tmp_path: Path) -> None:
    tokenizer = small_tokenizer()
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = CLIPTokenizer.from_file(tmp_path / "tokenizer.json")
    assert (loaded.merges, loaded.context_length, loaded.vocab_size) == (tokenizer.merges, 12, BYTE_TOKENS + 88 + 2)
    assert loaded(WORDS).tolist() == tokenizer(WORDS).tolist()


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"null",
        json.dumps({"merges": ["a b"]}).encode(),
        json.dumps({"merges": ["a b"], "context_length": "long"}).encode(),
        json.dumps({"merges": ["a b", "ab"], "context_length": 77}).encode(),
        json.dumps({"merges": [3], "context_length": 77}).encode(),
        json.dumps({"merges": ["a b", "a b"], "context_length": 77}).encode(),
        json.dumps({"merges": ["in gs"], "context_length": 77}).encode(),
    ],
)
def test_a_bad_file_is_named(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json: "):
        CLIPTokenizer.from_file(path)


def test_a_pruned_tokenizer_is_exact_within_its_texts_and_writes_any_other() -> None:
    rng = random.Random(0)
    captions = [" ".join(rng.choices(WORDS, k=rng.randint(1, 9))) for _ in range(200)]
    full = clip_tokenizer()
    kept = full.kept_ids(captions)
    pruned = full.pruned(kept)
    assert kept == sorted(set(kept))
    assert pruned.vocab_size == len(kept) < 700
    # Start and end are the last two ids of both; every other id is the position of the old one in `kept`.
    assert (pruned.start_id, pruned.end_id) == (len(kept) - 2, len(kept) - 1)
    for caption in captions:
        assert [kept[i] for i in pruned.encode(caption)] == full.encode(caption)
    for other in ["unseen hippopotamus", "Привет 😀", "\x00 ÿ <end", "".join(map(chr, range(33, 1000)))]:
        tokens = pruned(other, 4000)[0]
        end = int(tokens.argmax())
        assert tokens[end] == pruned.end_id
        assert not tokens[end + 1 :].any()
        assert pruned.decode(tokens).replace(" ", "") == full.decode(full(other, 4000)[0]).replace(" ", "")


SPECIAL_TEXTS = [
    "<|startoftext|>a cat<|endoftext|>",
    "a cat <|endoftext|> a dog",
    "cat<|endoftext|>dog",
    "<|endoftext|>" * 90,
    "a <|startoftext|>",
    "<|startoftext|",
    "<start_of_text>",
    "a photo of a cat " * 30 + "<|endoftext|>",
]


@pytest.mark.parametrize("text", SPECIAL_TEXTS, ids=lambda text: text[:20])
def test_special_tokens_in_a_text_are_openais(text: str, others: Callable[[str], ModuleType], tmp_path: Path) -> None:
    """Compare with OpenCLIP's tokenizer, which spells them differently, and that of `transformers`."""
    ours = openai_tokenizer()
    write_processor(tmp_path, ours, Preprocess(image_size=32), 77)
    theirs = others("transformers").CLIPTokenizer.from_pretrained(tmp_path)
    ids = theirs([text], truncation=True, max_length=77)["input_ids"][0]
    assert ours.rows(text)[0] == ids
    assert tinyclip.clip.tokenize(text, truncate=True)[0].tolist() == padded(ids)
    spelled = text.replace("<start_of_text>", "< start_of_text >")  # not a special token of OpenAI's
    spelled = spelled.replace("<|startoftext|>", "<start_of_text>").replace("<|endoftext|>", "<end_of_text>")
    if "start_of_text >" not in spelled:
        tokens = others("open_clip.tokenizer").SimpleTokenizer()([spelled])[0].tolist()
        assert padded(ids) == tokens


def test_special_tokens_of_ours_stay_openclips() -> None:
    assert tinyclip.tokenize("a <end_of_text>")[0, :4].tolist() == [49406, 320, 49407, 49407]
    assert tinyclip.tokenize("a <|endoftext|>")[0, 2] != 49407
    assert tinyclip.clip.tokenize("a <|endoftext|>")[0, :4].tolist() == [49406, 320, 49407, 49407]
    assert tinyclip.clip.tokenize("a <end_of_text>")[0, 2] != 49407


def test_special_tokens_are_saved(tmp_path: Path) -> None:
    for tokenizer in (openai_tokenizer(), openai_tokenizer().pruned(openai_tokenizer().kept_ids(["a cat"]))):
        tokenizer.save(tmp_path / "tokenizer.json")
        read = CLIPTokenizer.from_file(tmp_path / "tokenizer.json")
        assert read.special == tokenizer.special == ("<|startoftext|>", "<|endoftext|>")
        assert read.encode("a <|endoftext|>") == tokenizer.encode("a <|endoftext|>")
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    del data["special"]  # as in older files
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    assert CLIPTokenizer.from_file(tmp_path / "tokenizer.json").special == ("<start_of_text>", "<end_of_text>")
