"""Converted models load in OpenCLIP and Hugging Face with our features, and convert back bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.golden.fill import picture
from tests.helpers.commands import tinyclip as command
from tests.helpers.models import TEXTS, random_inputs, random_model, small_tokenizer
from tinyclip.inference.pipeline import load
from tinyclip.inputs.tokenizer import CLIPTokenizer, clip_tokenizer
from tinyclip.inputs.transforms import Preprocess
from tinyclip.model.config import CLIPConfig, ResNetConfig, vit_clip
from tinyclip.model.model import CLIP
from tinyclip.zoo.checkpoint import load_checkpoint, save_checkpoint
from tinyclip.zoo.convert import convert, mlp_ratio, open_clip_config

Others = Callable[[str], ModuleType]
LOOKS = Preprocess(image_size=32, mean=(0.5, 0.4, 0.3), std=(0.25, 0.26, 0.27))


def config(activation: str = "gelu", head_dim: int = 64, mlp: int = 4 * 128, **text: Any) -> CLIPConfig:
    """Return a config with towers of width 128 and 2 image and 3 text blocks."""
    data = vit_clip(24, (2, 128), (3, 128), 16, image_size=32, head_dim=head_dim).model_dump()
    data["vision"]["mlp_width"] = [mlp] * 2
    data["text"] |= text
    return CLIPConfig.from_dict(data | {"activation": activation})


def save(folder: Path, config: CLIPConfig, tokenizer: CLIPTokenizer | None = None) -> CLIP:
    model = random_model(config, dtype=torch.float32)
    save_checkpoint(folder, model, tokenizer or clip_tokenizer(), LOOKS)
    return model


def same(a: CLIP, b: CLIP) -> bool:
    return a.config == b.config and all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def file_of(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


SHAPES = {
    "GELU": config(),
    "QuickGELU": config("quick_gelu"),
    "narrow heads, odd MLP": config(head_dim=32, mlp=357),
    "short context": config(context_length=16),
}


@pytest.fixture(params=SHAPES, scope="module")
def ours(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CLIP]:
    folder = tmp_path_factory.mktemp("convert")
    return folder, save(folder / "ours", SHAPES[request.param])


def test_hugging_face(ours: tuple[Path, CLIP], others: Others) -> None:
    folder, model = ours
    convert(folder / "ours", folder / "hf", "hf")
    read, tokenizer, preprocess = load_checkpoint(folder / "hf")
    assert same(read, model)
    assert (tokenizer.merges, preprocess) == (clip_tokenizer().merges, LOOKS)
    assert tokenizer.context_length == model.config.text.context_length
    convert(folder / "hf", folder / "back")
    assert file_of(folder / "back") == file_of(folder / "ours")

    package = others("transformers")
    theirs, report = package.CLIPModel.from_pretrained(folder / "hf", output_loading_info=True)
    assert not any(report.values()), report
    pixels, tokens = random_inputs(model.config, torch.float32)
    with torch.no_grad():
        result = theirs.eval()(input_ids=tokens.where(tokens > 0, 49407), pixel_values=pixels)
        close(result.image_embeds, model.encode_image(pixels, normalize=True))
        close(result.text_embeds, model.encode_text(tokens, normalize=True))
        close(result.logits_per_image, result.image_embeds @ result.text_embeds.T * model.logit_scale.exp())


def test_open_clip(ours: tuple[Path, CLIP], others: Others) -> None:
    folder, model = ours
    convert(folder / "ours", folder / "open_clip", "open_clip")
    read, tokenizer, preprocess = load_checkpoint(folder / "open_clip")
    assert same(read, model)
    assert (tokenizer.merges, preprocess) == (clip_tokenizer().merges, LOOKS)
    convert(folder / "open_clip", folder / "back")
    assert file_of(folder / "back") == file_of(folder / "ours")

    package = others("open_clip")
    name = f"local-dir:{folder / 'open_clip'}"
    theirs, _, transform = package.create_model_and_transforms(name)
    tokens = package.get_tokenizer(name)(TEXTS)
    pixels = random_inputs(model.config, torch.float32)[0]
    image = Image.fromarray(picture(50, 40, 1))
    clip = load(folder / "open_clip")
    with torch.no_grad():
        close(theirs.eval().encode_text(tokens, normalize=True), clip.encode_text(TEXTS))
        close(transform(image), clip.preprocess(image))
        exact = copy.deepcopy(model).double()  # features are not normalised, so float32 is not always enough
        close(theirs.double().encode_image(pixels.double()), exact.encode_image(pixels.double()))


def test_the_processor_of_hugging_face(others: Others, tmp_path: Path) -> None:
    """With a reduced vocabulary, which OpenCLIP does not support."""
    tokenizer = small_tokenizer()
    model = save(tmp_path / "ours", config(vocab_size=602, context_length=12), tokenizer)
    convert(tmp_path / "ours", tmp_path / "hf", "hf")
    read, back, _ = load_checkpoint(tmp_path / "hf")
    assert same(read, model)
    assert back.merges == tokenizer.merges

    package = others("transformers")
    processor = package.CLIPProcessor.from_pretrained(tmp_path / "hf")
    theirs = package.CLIPModel.from_pretrained(tmp_path / "hf").eval()
    texts, image = ["a dog", "Two  cats, 3/4 red!", "", "a long text " * 9], Image.fromarray(picture(50, 40, 1))
    inputs = processor(text=texts, images=image, return_tensors="pt", padding=True, truncation=True)
    clip = load(tmp_path / "ours")
    ends = (inputs["input_ids"] == tokenizer.end_id).int().argmax(1)
    for row, end, expected in zip(inputs["input_ids"], ends, clip.tokenize(texts), strict=True):
        assert row[: end + 1].tolist() == expected[expected > 0].tolist()
    with torch.no_grad():
        result = theirs(**inputs)
        close(result.text_embeds, clip.encode_text(texts))
        # They resize tensors, we resize as Pillow does; the results differ by at most one level of 255.
        torch.testing.assert_close(inputs["pixel_values"][0], clip.preprocess(image), atol=1.5 / 255 / 0.25, rtol=0)
    processor.save_pretrained(tmp_path / "again")
    theirs.save_pretrained(tmp_path / "again")
    read, back, preprocess = load_checkpoint(tmp_path / "again")  # from tokenizer.json and processor_config.json
    assert same(read, model)
    assert (back.merges, preprocess) == (tokenizer.merges, LOOKS)


@pytest.mark.parametrize("width", [64, 192, 389, 600, 768, 1000])
def test_the_mlp_ratio_gives_the_integer(width: int) -> None:
    for mlp in range(1, 5 * width, 7):
        tower = config().text.model_copy(update={"width": width, "mlp_width": (mlp,)})
        assert int(width * mlp_ratio(tower)) == mlp


# --- not supported elsewhere

EVEN = {"heads": [2, 2, 2], "mlp_width": [9, 9, 9]}


@pytest.mark.parametrize("to", ["hf", "open_clip"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({"heads": [2, 1, 2]}, r"block 1 of the text tower has 1 heads of 64 = 64 channels, the width is 128"),
        ({"mlp_width": [9, 9, 8]}, r"block 2 of the text tower has 8 MLP neurons, block 0 has 9"),
        ({"heads": [2, None, 2]}, r"block 1 of the text tower has no attention"),
        ({"mlp_width": [None, 9, 9]}, r"block 0 of the text tower has no MLP"),
        ({"mlp_width": [9, 0, 9]}, r"block 1 of the text tower has no MLP"),
        ({"heads": [], "mlp_width": []}, r"the text tower has no blocks"),
    ],
)
def test_unequal_blocks_are_named(to: str, text: dict[str, Any], message: str, tmp_path: Path) -> None:
    save(tmp_path / "ours", config(**EVEN | text))
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "ours", tmp_path / "theirs", to)
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_a_reduced_vocabulary_cannot_be_had_by_open_clip(tmp_path: Path) -> None:
    save(tmp_path / "ours", config(vocab_size=602, context_length=12), small_tokenizer())
    with pytest.raises(
        ValueError, match=r"has 602 tokens, not CLIP's own, which OpenCLIP's tokenizer does not support; convert to hf"
    ):
        convert(tmp_path / "ours", tmp_path / "theirs", "open_clip")


def test_resnets() -> None:
    config = CLIPConfig.named("RN50")
    vision = {"image_size": 224, "layers": [3, 4, 6, 3], "width": 64, "patch_size": None}
    assert open_clip_config(config)["vision_cfg"] == vision
    assert isinstance(config.vision, ResNetConfig)
    cut = config.model_copy(update={"vision": config.vision.model_copy(update={"heads": 20})})
    with pytest.raises(ValueError, match=r"20 heads of 64 = 1280 channels, OpenCLIP's has 32 x width = 2048"):
        open_clip_config(cut)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stem": (32, 30, 64)}, r"stem is \(32, 30, 64\), OpenCLIP's of width 64 has \(32, 32, 64\)"),
        ({"channels": (256, 512, 1000, 2048)}, r"channels is \(256, 512, 1000, 2048\), OpenCLIP's"),
        ({"conv2": ((64, 60, 64), (128,) * 4, (256,) * 6, (512,) * 3)}, r"conv2 is \(\(64, 60, 64\), "),
        ({"heads": 64, "head_dim": 32}, r"heads is 64, OpenCLIP's of width 64 has 32"),
    ],
)
def test_a_cut_resnet_cannot_be_had_by_open_clip(changes: dict[str, Any], message: str) -> None:
    config = CLIPConfig.named("RN50")
    cut = config.model_copy(update={"vision": config.vision.model_copy(update=changes)})
    with pytest.raises(ValueError, match=message):
        open_clip_config(cut)


# --- the command


def test_the_command(tmp_path: Path) -> None:
    model = random_model(config(), dtype=torch.float32)
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "theirs.pt")
    output = command("convert", tmp_path / "theirs.pt", tmp_path / "ours", "--activation", "quick_gelu")
    assert f"activation quick_gelu: {tmp_path / 'ours'}" in output
    assert load_checkpoint(tmp_path / "ours")[0].config == config("quick_gelu")
    assert "exists" in command("convert", tmp_path / "ours", tmp_path / "ours", code=2)
    command("convert", tmp_path / "ours", tmp_path / "ours", "--to", "open_clip", "--overwrite")  # in place
    command("convert", tmp_path / "ours", tmp_path / "ours", "--to", "hf", "--overwrite")
    assert load_checkpoint(tmp_path / "ours")[0].config == config("quick_gelu")
    assert '"macs_image"' in command("measure", tmp_path / "theirs.pt", "--json")
    assert "unknown format 'onnx'; choose tinyclip, open_clip, hf" in command(
        "convert", tmp_path / "ours", tmp_path / "x", "--to", "onnx", code=2
    )
    assert not (tmp_path / "x").exists()


def test_a_folder_of_something_else_is_not_replaced(tmp_path: Path) -> None:
    save(tmp_path / "ours", config())
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "tsconfig.json").write_text("{}")
    message = command("convert", tmp_path / "ours", tmp_path / "project", "--overwrite", code=2)
    assert "has no .tinyclip.json" in message
    assert (tmp_path / "project" / "tsconfig.json").exists()
