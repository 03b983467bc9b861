"""`tinyclip.clip` as a replacement for OpenAI's package."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import tinyclip
from tests.golden import fill
from tests.helpers.models import golden, random_model, random_resnet, resnet_config, small_config, small_tokenizer
from tests.helpers.server import FileServer, serving
from tinyclip import clip
from tinyclip.common import download
from tinyclip.inference.pipeline import Pipeline
from tinyclip.inputs.tokenizer import clip_tokenizer
from tinyclip.inputs.transforms import Preprocess
from tinyclip.model.config import CLIPConfig, vit_clip
from tinyclip.model.model import cast
from tinyclip.zoo.convert import convert

# The README of openai/CLIP, "Usage", except for the package name.
README = """
import torch
import tinyclip.clip as clip
from PIL import Image

device = "cuda" if torch.cuda.is_available() else "cpu"
model, preprocess = clip.load("ViT-B/32", device=device)

image = preprocess(Image.open("CLIP.png")).unsqueeze(0).to(device)
text = clip.tokenize(["a diagram", "a dog", "a cat"]).to(device)

with torch.no_grad():
    image_features = model.encode_image(image)
    text_features = model.encode_text(text)

    logits_per_image, logits_per_text = model(image, text)
    probs = logits_per_image.softmax(dim=-1).cpu().numpy()

print("Label probs:", probs)  # prints: [[0.9927937  0.00421068 0.00299572]]
"""


def config(**changes: Any) -> CLIPConfig:
    return vit_clip(24, (2, 64), (2, 64), 16, image_size=32, activation="quick_gelu", **changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`ViT-B-32.pt` in OpenAI's layout, the same model as `hf`, a picture; `reduced` has another vocabulary."""
    folder = tmp_path_factory.mktemp("clip")
    state = random_model(config(), dtype=torch.float32).state_dict()
    torch.save(state | {"input_resolution": torch.tensor(32)}, folder / "ViT-B-32.pt")
    convert(folder / "ViT-B-32.pt", folder / "hf", "hf")
    own = small_tokenizer()
    small = random_model(small_config(vocab_size=own.vocab_size), dtype=torch.float32)
    Pipeline(small, own, Preprocess(image_size=32)).save(folder / "reduced")
    Image.fromarray(fill.picture(50, 40, 1)).save(folder / "CLIP.png")
    return folder


@pytest.fixture
def openai(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    """A server with a small model in place of OpenAI's ViT-B/32."""
    data = (folder / "ViT-B-32.pt").read_bytes()
    with serving() as running:
        running.files["ViT-B-32.pt"] = data
        monkeypatch.setattr(clip, "OPENAI", f"{running.address}/")
        monkeypatch.setitem(clip.OPENAI_FILES, "ViT-B/32", f"{sha256(data).hexdigest()}/ViT-B-32.pt")
        running.files[clip.OPENAI_FILES["ViT-B/32"]] = data
        monkeypatch.setattr(download, "FIRST_WAIT_S", 0.001)
        monkeypatch.setenv("TINYCLIP_CACHE", str(tmp_path / "cache"))
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.delenv(name, raising=False)
        yield running


def test_openais_example_runs_unchanged_and_equals_transformers(
    openai: FileServer, folder: Path, monkeypatch: pytest.MonkeyPatch, others: Callable[[str], ModuleType]
) -> None:
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(README, names)
    theirs = others("transformers").CLIPModel.from_pretrained(folder / "hf").eval()
    with torch.no_grad():
        tokens = torch.from_numpy(clip_tokenizer()(["a diagram", "a dog", "a cat"]))
        expected = theirs(input_ids=tokens, pixel_values=names["image"])
    torch.testing.assert_close(names["logits_per_image"], expected.logits_per_image, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(names["logits_per_text"], expected.logits_per_text, atol=1e-4, rtol=1e-4)
    raw = theirs.visual_projection(theirs.vision_model(names["image"]).pooler_output)
    torch.testing.assert_close(names["image_features"], raw.detach(), atol=1e-4, rtol=1e-4)  # not normalised
    assert names["probs"].shape == (1, 3)
    np.testing.assert_allclose(names["probs"].sum(), 1, rtol=1e-5)


def test_a_file_of_openai_is_downloaded_once_and_must_be_theirs(openai: FileServer, tmp_path: Path) -> None:
    root = tmp_path / "root"
    clip.load("ViT-B/32", device="cpu", download_root=str(root))
    clip.load("ViT-B/32", device="cpu", download_root=str(root))
    assert len(openai.log) == 1 and (root / "ViT-B-32.pt").exists()
    (root / "ViT-B-32.pt.json").unlink()
    (root / "ViT-B-32.pt").write_bytes(b"another")
    with pytest.raises(ValueError, match=r"ViT-B-32\.pt is not OpenAI's ViT-B/32: its SHA-256 is .*; delete it"):
        clip.load("ViT-B/32", device="cpu", download_root=str(root))


def test_the_model_has_what_code_for_openais_reads(folder: Path) -> None:
    model, preprocess = clip.load(str(folder / "ViT-B-32.pt"), device="cpu")
    assert (model.visual.input_resolution, model.context_length, model.vocab_size) == (32, 77, 49408)
    assert (model.dtype, model.training, model.logit_scale.shape) == (torch.float32, False, ())
    assert all(parameter.requires_grad for parameter in model.parameters())  # OpenAI's models can be trained further
    assert model.state_dict().keys() == torch.load(folder / "ViT-B-32.pt").keys() - {"input_resolution"}
    assert preprocess(Image.open(folder / "CLIP.png")).shape == (3, 32, 32)
    resnet = random_resnet(resnet_config())
    assert resnet.visual.input_resolution == resnet.config.vision.image_size


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_features_come_in_the_models_dtype(dtype: torch.dtype, folder: Path) -> None:
    model, preprocess = clip.load(str(folder / "ViT-B-32.pt"), device="cpu")
    image = preprocess(Image.open(folder / "CLIP.png"))[None]
    text = clip.tokenize(["a dog", "a cat sits there"])
    with torch.no_grad():
        expected = model(image, text)[0]
        for half in (cast(model, dtype), model.to(dtype)):  # as on CUDA; then the whole model, with `model.half()`
            assert half.dtype == half.encode_image(image).dtype == half.encode_text(text).dtype == dtype
            logits, transposed = half(image, text)
            torch.testing.assert_close(logits.float(), expected, atol=0.3, rtol=0.1)
            assert torch.equal(transposed, logits.T)


def test_tokens_are_openais() -> None:
    rows = golden("tokens.json")
    tokens = clip.tokenize([row["text"] for row in rows], truncate=True)
    assert (tokens.dtype, tokens.shape) == (torch.int32, (len(rows), 77))
    for found, row in zip(tokens.tolist(), rows, strict=True):
        assert found == row["ids"] + [0] * (77 - len(row["ids"]))
    assert clip.tokenize("a cat").tolist() == [[49406, 320, 2368, 49407] + [0] * 73]
    assert clip.tokenize("a cat", context_length=4).shape == (1, 4)


def test_a_text_that_is_too_long_is_openais_error() -> None:
    text = "a dog " * 38  # 76 tokens: one too many once start and end are added
    with pytest.raises(RuntimeError, match=r"Input a dog .* is too long for context length 77"):
        clip.tokenize(["short", text])
    assert clip.tokenize(text, truncate=True)[0, -1] == 49407
    assert clip.tokenize(text[:-5])[0, -1] == 49407  # as many as fit
    with pytest.raises(RuntimeError, match="Input a cat is too long for context length 3"):
        clip.tokenize("a cat", context_length=3)


def test_a_reduced_vocabulary_takes_the_same_tokens(folder: Path) -> None:
    model, _ = clip.load(str(folder / "reduced"), device="cpu")
    texts = ["the cat", "it's the other 42 things", "", "日本語", "in a thing " * 9]
    with torch.no_grad():
        found = model.encode_text(clip.tokenize(texts))
    torch.testing.assert_close(found, tinyclip.load(folder / "reduced").encode_text(texts, normalize=False))


def test_only_tokens_before_the_last_end_are_computed(folder: Path) -> None:
    model, _ = clip.load(str(folder / "ViT-B-32.pt"), device="cpu")
    tokens, seen = clip.tokenize(["a dog", "a cat on a mat"]), list[torch.Size]()
    model.token_embedding.register_forward_hook(lambda module, given, output: seen.append(given[0].shape))
    with torch.no_grad():
        short = model.encode_text(tokens)
        whole = tinyclip.CLIP.encode_text(model, tokens)
    assert seen == [(2, 7), (2, 77)]
    torch.testing.assert_close(short, whole)


def test_available_models_are_openais_and_the_zoos() -> None:
    names = clip.available_models()
    assert {"RN50", "RN50x64", "ViT-B/32", "ViT-L/14@336px"} < set(names)
    assert "TinyCLIP-ViT-40M-32-Text-19M-LAION400M" in names
    assert all(len(link.partition("/")[0]) == 64 for link in clip.OPENAI_FILES.values())


def test_the_links_are_open_clips(others: Callable[[str], ModuleType]) -> None:
    theirs = others("open_clip.pretrained")
    for name, link in clip.OPENAI_FILES.items():
        key = name.replace("@336px", "-336").replace("/", "-")
        quick = {"RN50": "RN50", "RN101": "RN101"}.get(key, key)
        assert theirs.get_pretrained_cfg(quick, "openai")["url"] == clip.OPENAI + link


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "ViT-Z", "device": "cpu"}, "ViT-Z: no such checkpoint"),
        ({"name": "ViT-B/32", "device": "warp"}, "warp"),
        ({"name": "ViT-B/32", "jit": True}, "jit=True"),
    ],
)
def test_bad_arguments_are_one_line(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        clip.load(**arguments)
    assert len(str(caught.value).splitlines()) == 1
