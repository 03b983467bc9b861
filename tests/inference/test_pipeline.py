from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import tinyclip
from tests.golden import fill
from tests.helpers.models import ROOT, random_model, small_config, small_tokenizer
from tinyclip.inference.pipeline import Pipeline, Tensors
from tinyclip.inputs import batching
from tinyclip.inputs.transforms import Preprocess
from tinyclip.model.config import CLIPConfig, vit_clip
from tinyclip.model.model import CLIP, cast


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint `model` and pictures `0.png` to `2.png`."""
    folder = tmp_path_factory.mktemp("pipeline")
    tokenizer = small_tokenizer()
    model = random_model(small_config(vocab_size=tokenizer.vocab_size), dtype=torch.float32)
    Pipeline(model, tokenizer, Preprocess(image_size=32)).save(folder / "model")
    for i in range(3):
        Image.fromarray(fill.picture(50 + i, 40, i)).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def clip(folder: Path) -> Pipeline:
    return tinyclip.load(folder / "model")


def test_load_gives_what_was_saved(folder: Path, clip: Pipeline) -> None:
    assert isinstance(clip, Pipeline)
    assert not clip.model.training
    assert (clip.device.type, clip.dtype) == ("cpu", torch.float32)
    half = tinyclip.load(str(folder / "model"), device="cpu", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    features = half.encode_image(folder / "0.png").float()
    assert torch.nn.functional.cosine_similarity(features, clip.encode_image(folder / "0.png")) > 0.99


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere: no such checkpoint"):
        tinyclip.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "give",
    [
        lambda path: path,
        lambda path: str(path),
        lambda path: [path],
        lambda path: (Image.open(path),),
        lambda path: Image.open(path),
        lambda path: np.asarray(Image.open(path)),
        lambda path: [np.asarray(Image.open(path))],
        lambda path: np.asarray(Image.open(path).convert("RGBA")),
        lambda path: tinyclip.preprocess(32)(Image.open(path)),
        lambda path: tinyclip.preprocess(32)(Image.open(path))[None],
        lambda path: [tinyclip.preprocess(32)(Image.open(path))],
    ],
)
def test_a_picture_may_come_in_any_form(give: Callable[[Path], Any], folder: Path, clip: Pipeline) -> None:
    path = folder / "0.png"
    pixels = clip.preprocess(Image.open(path))[None]
    with torch.inference_mode():
        expected = clip.model.encode_image(pixels, normalize=True)
    torch.testing.assert_close(clip.encode_image(give(path)), expected)


def test_forms_may_be_mixed_and_batches_change_nothing(folder: Path, clip: Pipeline) -> None:
    images = [folder / "0.png", Image.open(folder / "1.png"), np.asarray(Image.open(folder / "2.png"))]
    together = clip.encode_image(images)
    assert together.shape == (3, 24)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(3))
    for batch_size in (1, 2, 3):
        torch.testing.assert_close(clip.encode_image(images, batch_size=batch_size), together)
    torch.testing.assert_close(clip.encode_image(torch.stack([clip.preprocess(i) for i in images[1:2]])), together[1:2])
    raw = clip.encode_image(images, normalize=False)
    torch.testing.assert_close(raw / raw.norm(dim=1, keepdim=True), together)


def test_texts_may_be_one_or_many_and_batches_change_nothing(clip: Pipeline) -> None:
    texts = ["a cat", "", "the other thing in there", "a" * 99]
    together = clip.encode_text(texts)
    with torch.inference_mode():
        whole_rows = clip.model.encode_text(torch.from_numpy(clip.tokenizer(texts, 12)), normalize=True)
    torch.testing.assert_close(together, whole_rows)
    for batch_size in (1, 3, 4):
        torch.testing.assert_close(clip.encode_text(texts, batch_size=batch_size), together)
    torch.testing.assert_close(clip.encode_text(texts[0]), together[:1])
    assert clip.tokenize(texts).shape == (4, 12)


def test_many_texts_come_back_in_order_and_no_batch_is_longer_than_its_longest(
    clip: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [" ".join(["a"] * (i * 7 % 10)) for i in range(40)]
    with torch.inference_mode():
        expected = clip.model.encode_text(torch.from_numpy(clip.tokenizer(texts, 12)), normalize=True)
    seen: list[tuple[int, ...]] = []
    encode = clip.model.encode_text
    monkeypatch.setattr(clip.model, "encode_text", lambda tokens: seen.append(tuple(tokens.shape)) or encode(tokens))
    torch.testing.assert_close(clip.encode_text(texts, batch_size=4), expected)
    assert seen == [(4, 2 + length) for length in range(9, -1, -1)]


def test_pictures_are_decoded_only_a_little_ahead(
    folder: Path, clip: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "AHEAD", 5)
    opened, behind = [], []
    open_image, encode = batching.open_image, clip.model.encode_image
    monkeypatch.setattr(batching, "open_image", lambda path: opened.append(path) or open_image(path))
    taken = 0

    def counted(images: torch.Tensor) -> torch.Tensor:
        nonlocal taken
        taken += len(images)
        behind.append(len(opened) - taken)
        return encode(images)

    monkeypatch.setattr(clip.model, "encode_image", counted)
    images = [folder / f"{i % 3}.png" for i in range(40)]
    features = clip.encode_image(images, batch_size=4)
    assert len(behind) == 10
    assert max(behind) <= 6
    torch.testing.assert_close(features, clip.encode_image(images[:3]).repeat(14, 1)[:40])


@pytest.mark.parametrize("size", [0, -1])
def test_a_batch_of_none_is_refused(size: int, folder: Path, clip: Pipeline) -> None:
    with pytest.raises(ValueError, match=f"batch_size {size}"):
        clip.encode_text("a", batch_size=size)
    with pytest.raises(ValueError, match=f"batch_size {size}"):
        clip.encode_image(folder / "0.png", batch_size=size)


# --- precision


@pytest.mark.parametrize(
    ("given", "expected"),
    [(None, "float32"), ("float32", "float32"), ("bfloat16", "bfloat16"), (torch.float64, "float64")],
)
def test_the_dtype_is_what_was_asked_for(given: Any, expected: str, folder: Path) -> None:
    clip = tinyclip.load(folder / "model", dtype=given)
    assert clip.computing == {"dtype": expected, "device": "cpu"}
    assert clip.encode_text("a").dtype == clip.encode_image(folder / "0.png").dtype == torch.float32


@pytest.mark.parametrize("given", ["bf16", "half", torch.int8])
def test_another_dtype_is_refused(given: Any, folder: Path) -> None:
    with pytest.raises(ValueError, match="choose auto, float32, bfloat16 or float16"):
        tinyclip.load(folder / "model", dtype=given)


@pytest.mark.parametrize(("native", "expected"), [(True, "bfloat16"), (False, "float32")])
def test_auto_takes_what_the_processor_has(
    native: bool, expected: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinyclip.common.devices._cpu_has_bfloat16", lambda: native)
    assert tinyclip.load(folder / "model", dtype="auto").computing["dtype"] == expected


def test_bfloat16_features_of_real_pictures_are_those_of_float32() -> None:
    """Drawings on plain backgrounds, where rounding only the pixels to bfloat16 gives cosines down to 0.9986."""
    dataset = tinyclip.evaluate.open_dataset(ROOT / "assets/emoji/eval")
    pictures = [example.image for example in islice(dataset, 0, 240, 3)]
    names = dataset.classnames[::12]
    whole, half = (tinyclip.load(ROOT / "assets/emoji-teacher", dtype=dtype) for dtype in ("float32", "bfloat16"))
    assert F.cosine_similarity(half.encode_image(pictures), whole.encode_image(pictures)).min() > 0.9995
    assert F.cosine_similarity(half.encode_text(names), whole.encode_text(names)).min() > 0.9995


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["TinyCLIP-ViT-40M-32-Text-19M", "TinyCLIP-ResNet-19M-Text-19M"])
def test_half_precision_of_models_in_full_size(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = CLIP(CLIPConfig.named(name)).eval()
    images = torch.rand(4, 3, 224, 224) + torch.rand(4, 3, 1, 1)
    tokens = torch.randint(49406, (4, 9))
    tokens[:, -1] = 49407
    for module in model.modules():  # a block's branch is initialised to zero
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1)
    with torch.inference_mode():
        expected = model.encode_image(images), model.encode_text(tokens)
        cast(model, dtype)
        assert model.dtype == dtype
        for actual, wanted in zip((model.encode_image(images), model.encode_text(tokens)), expected, strict=True):
            assert F.cosine_similarity(actual.float(), wanted).min() > 0.9995


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # inside torch's own compiler
def test_compiled_blocks_give_the_same_for_any_batch_and_length(folder: Path, tmp_path: Path) -> None:
    """Each tower in one graph, here of one block, as compiling takes long."""
    tokenizer, shape = small_tokenizer(), {"image_size": 32, "head_dim": 8, "context_length": 12}
    config = vit_clip(24, (1, 32), (1, 24), 8, vocab_size=tokenizer.vocab_size, **shape)
    Pipeline(random_model(config, dtype=torch.float32), tokenizer, Preprocess(image_size=32)).save(tmp_path / "model")
    torch._dynamo.utils.counters.clear()
    clip, compiled = (tinyclip.load(tmp_path / "model", compile=compile) for compile in (False, True))
    texts = ["a", "the cat and the dog", "in the sea", "a thing", "the thing", "a b c d e f"]
    for count in (2, 3, 6):
        images = [folder / f"{i % 3}.png" for i in range(count)]
        torch.testing.assert_close(compiled.encode_image(images), clip.encode_image(images))
        torch.testing.assert_close(compiled.encode_text(texts[:count]), clip.encode_text(texts[:count]))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_compiling_needs_a_compiler(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"needs a C\+\+ compiler, and no-such-compiler is missing"):
        tinyclip.load(folder / "model", compile=True)


def test_nothing_gives_no_features(clip: Pipeline) -> None:
    assert clip.encode_image([]).shape == (0, 24)
    assert clip.encode_image(torch.empty(0, 3, 32, 32)).shape == (0, 24)
    assert clip.encode_text([]).shape == (0, 24)


def test_classify_gives_a_distribution_for_each_picture(folder: Path, clip: Pipeline) -> None:
    images, labels = [folder / f"{i}.png" for i in range(3)], ["a cat", "a dog", "the sea", "an hour"]
    probabilities = clip.classify(images, labels)
    assert probabilities.shape == (3, 4)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(3))
    logits = clip.similarity(images, labels) * clip.model.logit_scale.exp()
    torch.testing.assert_close(probabilities, logits.softmax(1))
    torch.testing.assert_close(clip.classify(images[1], "a cat"), torch.ones(1, 1))


def test_no_labels_are_an_error(folder: Path, clip: Pipeline) -> None:
    with pytest.raises(ValueError, match="no labels"):
        clip.classify(folder / "0.png", [])


@pytest.mark.parametrize(
    "image",
    [
        pytest.param("none.png", id="no file"),
        pytest.param("model/config.json", id="another file"),
        pytest.param(3, id="int"),
        pytest.param(None, id="None"),
        pytest.param(np.zeros((8, 8, 3), np.float32), id="float array"),
        pytest.param(np.zeros((2, 8, 8, 3), np.uint8), id="array of two"),
        pytest.param(np.zeros((8, 8, 5), np.uint8), id="array of five channels"),
        pytest.param(np.zeros((0, 8, 3), np.uint8), id="empty array"),
        pytest.param(torch.zeros(3, 31, 32), id="tensor of another size"),
        pytest.param(torch.zeros(32, 32), id="tensor without channels"),
        pytest.param(torch.zeros(3, 32, 32, dtype=torch.uint8), id="tensor of whole numbers"),
        pytest.param([torch.zeros(3, 32, 32, dtype=torch.uint8)], id="list of them"),
        pytest.param([torch.zeros(3, 32, 32), torch.zeros(3, 31, 32)], id="tensors of two sizes"),
    ],
)
def test_what_is_no_picture_is_refused(image: Any, folder: Path, clip: Pipeline) -> None:
    with pytest.raises(ValueError):
        clip.encode_image(folder / image if isinstance(image, str) else image)


def test_a_picture_that_does_not_decode_is_refused(folder: Path, clip: Pipeline) -> None:
    data = (folder / "0.png").read_bytes()
    for count in (1, 2):
        with pytest.raises(ValueError, match="damaged picture"):
            clip.encode_image([Image.open(io.BytesIO(data[: len(data) // 2]))] * count)


def test_an_unreadable_picture_is_named(folder: Path, clip: Pipeline) -> None:
    with pytest.raises(ValueError, match=r"none\.png: no such file"):
        clip.encode_image([folder / "0.png", folder / "none.png"])


def test_saving_replaces_checkpoints_alone(clip: Pipeline, tmp_path: Path) -> None:
    for _ in range(2):
        clip.save(tmp_path / "model")
    (tmp_path / "model" / "thesis.txt").touch()
    with pytest.raises(
        ValueError, match=r"model also holds files that tinyclip did not write \(thesis\.txt\), so it is left alone"
    ):
        clip.save(tmp_path / "model")
    assert (tmp_path / "model" / "thesis.txt").exists()


class Exported:
    """Stands in for a `RuntimePipeline`."""

    embed_dim = 7


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, lambda clip: pickle.loads(pickle.dumps(clip))])
def test_what_computes_with_an_export_copies_and_pickles(way: Callable[[Any], Any]) -> None:
    again = way(Tensors(Exported()))  # type: ignore[arg-type]
    assert isinstance(again, Tensors) and isinstance(again.clip, Exported) and again.embed_dim == 7
    with pytest.raises(AttributeError, match="gone"):
        _ = again.gone
