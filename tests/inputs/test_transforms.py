from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

import tinyclip
from tests.golden import fill
from tests.helpers.models import golden
from tinyclip.inputs.transforms import OPENAI_STD, Preprocess, open_image

GOLDEN = golden("preprocess.npz")


def made(mode: str, width: int, height: int, salt: int = 0) -> Image.Image:
    image = Image.fromarray(fill.picture(width, height, salt))
    if mode == "RGBA":
        image.putalpha(128)
    return image.convert(mode)


@pytest.mark.parametrize("key", GOLDEN.files)
def test_pixels_equal_openclips_to_a_grey_level(key: str) -> None:
    size, shape, mode, salt = key.split("_")
    width, height = (int(side) for side in shape.split("x"))
    actual = Preprocess(image_size=int(size))(made(mode, width, height, int(salt)))
    assert actual.dtype == np.float32
    grey_level = np.asarray(1 / 255 / np.asarray(OPENAI_STD)).reshape(3, 1, 1)
    assert (np.abs(actual - GOLDEN[key]) <= grey_level * 1.001).all()


def test_the_public_function_gives_the_same_as_a_tensor() -> None:
    image = made("RGB", 48, 64)
    tensor = tinyclip.preprocess(32)(image)
    assert (tensor.dtype, tuple(tensor.shape)) == (torch.float32, (3, 32, 32))
    assert np.array_equal(tensor.numpy(), Preprocess(image_size=32)(image))
    plain = tinyclip.preprocess(32, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))(image)
    assert np.array_equal((plain.numpy() * 255).round(), Preprocess(image_size=32).pixels(image))


def lab(image: Image.Image) -> Image.Image:
    converted = ImageCms.profileToProfile(
        image, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    assert converted is not None
    return converted


def flat(mode: str, value: int | float | tuple[int, ...]) -> Callable[[], Image.Image]:
    return lambda: Image.new(mode, (50, 40), value)


def grey(mode: str, through: str = "RGB") -> Callable[[], Image.Image]:
    return lambda: Image.new("L", (50, 40), 128).convert(through).convert(mode)


@pytest.mark.parametrize(
    ("picture", "level"),
    [
        pytest.param(flat("1", 1), 255, id="1"),
        pytest.param(flat("L", 128), 128, id="L"),
        pytest.param(flat("LA", (128, 255)), 128, id="LA"),
        pytest.param(flat("La", (128, 255)), 128, id="La"),
        pytest.param(grey("P", "L"), 128, id="P"),
        pytest.param(grey("PA", "P"), 128, id="PA"),
        pytest.param(flat("RGB", (128, 128, 128)), 128, id="RGB"),
        pytest.param(flat("RGBA", (128, 128, 128, 99)), 128, id="RGBA"),
        pytest.param(flat("RGBa", (128, 128, 128, 255)), 128, id="RGBa"),
        pytest.param(flat("RGBX", (128, 128, 128, 7)), 128, id="RGBX"),
        pytest.param(grey("CMYK"), 128, id="CMYK"),
        pytest.param(grey("YCbCr"), 128, id="YCbCr"),
        pytest.param(grey("HSV"), 128, id="HSV"),
        pytest.param(lambda: lab(Image.new("RGB", (50, 40), (128, 128, 128))), 128, id="LAB"),
        pytest.param(flat("I", 128 * 257), 128, id="I"),
        pytest.param(flat("F", 128.0), 128, id="F"),
        pytest.param(flat("I;16", 128 * 257), 128, id="I;16"),
        pytest.param(flat("I;16B", 128 * 257), 128, id="I;16B"),
    ],
)
def test_every_mode_gives_its_grey(
    picture: Callable[[], Image.Image], level: int, request: pytest.FixtureRequest
) -> None:
    image = picture()
    assert image.mode == request.node.callspec.id
    pixels = Preprocess(image_size=32).pixels(image)
    assert (pixels.dtype, pixels.shape) == (np.uint8, (3, 32, 32))
    assert np.abs(pixels.astype(int) - level).max() <= 1
    assert np.isfinite(Preprocess(image_size=32)(image)).all()


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_other_modes_become_rgb_after_they_are_resized(mode: str) -> None:
    image = made("RGB", 64, 64).convert(mode)
    if len(image.getbands()) == 4:  # with the fourth band it matters whether RGB comes before or after
        image = Image.merge(mode, [*image.split()[:3], made("L", 64, 64, salt=1)])
    wanted = np.asarray(image.resize((16, 16), Image.Resampling.BICUBIC).convert("RGB")).transpose(2, 0, 1)
    assert np.array_equal(Preprocess(image_size=16).pixels(image), wanted)
    assert not np.array_equal(Preprocess(image_size=16).pixels(image.convert("RGB")), wanted) or mode == "L"


@pytest.mark.parametrize("mode", ["1", "P"])
def test_palettes_and_bits_become_rgb_before_they_are_resized(mode: str) -> None:
    """Resizing them directly would produce no colours in between."""
    image = made("RGB", 64, 64).convert(mode)
    pixels = Preprocess(image_size=16).pixels(image)
    assert np.array_equal(pixels, Preprocess(image_size=16).pixels(image.convert("RGB")))
    assert len(np.unique(pixels)) > 20


def test_a_palette_with_transparency_loads_quietly() -> None:
    image = made("RGB", 40, 40).quantize(8)
    file = io.BytesIO()
    image.save(file, "PNG", transparency=bytes(range(8)))
    opened = open_image(io.BytesIO(file.getvalue()))
    assert opened.mode == "P"
    assert np.array_equal(Preprocess(image_size=16).pixels(opened), Preprocess(image_size=16).pixels(image))


@pytest.mark.parametrize("size", [(1, 500), (500, 1), (1, 1), (2, 3), (333, 32), (32, 333)])
def test_any_aspect_ratio(size: tuple[int, int]) -> None:
    assert Preprocess(image_size=32).pixels(made("RGB", *size)).shape == (3, 32, 32)


def test_the_crop_is_central() -> None:
    picture = np.zeros((10, 31, 3), np.uint8)
    picture[:, 10:20] = 255  # (31 - 10) / 2 = 10.5, which torchvision and Python round to 10
    assert (Preprocess(image_size=10).pixels(Image.fromarray(picture)) == 255).all()


# --- files

SIDES = {  # EXIF 2.3: where the stored picture's first row and first column are in the scene
    1: ("top", "left"),
    2: ("top", "right"),
    3: ("bottom", "right"),
    4: ("bottom", "left"),
    5: ("left", "top"),
    6: ("right", "top"),
    7: ("right", "bottom"),
    8: ("left", "bottom"),
}


@pytest.mark.parametrize("orientation", SIDES)
def test_the_exif_orientation_is_applied(orientation: int, tmp_path: Path) -> None:
    scene = fill.picture(20, 30, 0)
    first_row, first_column = SIDES[orientation]
    stored = scene[::-1] if "bottom" in SIDES[orientation] else scene
    stored = stored[:, ::-1] if "right" in SIDES[orientation] else stored
    stored = stored.transpose(1, 0, 2) if first_row in ("left", "right") else stored
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(np.asarray(open_image(tmp_path / "a.png")), scene)


def test_a_16_bit_file_opens_in_its_own_range(tmp_path: Path) -> None:
    values = (np.arange(40 * 40).reshape(40, 40) * 40).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    pixels = Preprocess(image_size=40).pixels(open_image(str(tmp_path / "a.png")))
    assert np.abs(pixels.astype(float) - values / 65535 * 255).max() <= 0.5


@pytest.fixture
def picture_file(tmp_path: Path) -> Path:
    made("RGB", 64, 48).save(tmp_path / "picture.jpg")
    return tmp_path / "picture.jpg"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.jpg: no such file"):
        open_image(tmp_path / "none.jpg")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"", "not a picture"),
        (lambda data: b"not a picture at all", "not a picture"),
        (lambda data: data[:2], "not a picture"),
        (lambda data: data[: len(data) // 2], "damaged picture"),
        (lambda data: data[:-40], "damaged picture"),
    ],
)
def test_a_damaged_file_is_named(damage: Callable[[bytes], bytes], message: str, picture_file: Path) -> None:
    picture_file.write_bytes(damage(picture_file.read_bytes()))
    with pytest.raises(ValueError, match=rf"picture\.jpg: {message}"):
        open_image(picture_file)


def test_postscript_is_not_run(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.eps")
    (tmp_path / "picture.eps").rename(tmp_path / "picture.png")
    with pytest.raises(ValueError, match="not a picture that Pillow can read"):
        open_image(tmp_path / "picture.png")


def test_a_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=tmp_path.name):
        open_image(tmp_path)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("limit", [2000, 1000])  # Pillow warns above the limit, and refuses above twice the limit
def test_a_decompression_bomb_is_named(limit: int, picture_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(ValueError, match=rf"picture\.jpg: too large \({limit:,} pixels"):
        open_image(picture_file)


def test_broken_exif_is_no_other_error(picture_file: Path) -> None:
    """Whatever bytes the EXIF block has, the picture either opens or raises `ValueError`."""
    image = Image.open(picture_file)
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x8769] = 6, "maker", {0x9003: "2024"}
    whole, rng = exif.tobytes(), np.random.default_rng(0)
    for _ in range(150):
        data = bytearray(whole)
        for position in rng.integers(6, len(whole), 4):
            data[position] = rng.integers(256)
        file = io.BytesIO()
        image.save(file, "JPEG", exif=bytes(data))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's warnings about the damage
            try:
                open_image(io.BytesIO(file.getvalue()))
            except ValueError as error:
                assert "damaged picture" in str(error)
